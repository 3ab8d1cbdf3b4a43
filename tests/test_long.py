"""train_gpt_long.py and the long tasks: the far mask, its cache, needles that are found and lost, positions.

Against: a dense mask written as the definition says, forward for decode, memory by the formula, planted models whose
answers are known, documents whose losses are known. Run: python -m pytest tests/test_long.py
"""
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BOS, VOCAB, as_flags, assert_close, only_folder, tokenizer_json, write_shard

import evaluate
import long_tasks
import sample
import train_gpt_long as long

needles = long_tasks.load_needles()
SMALL = {"preset": "tiny", "depth": 3, "model_dim": 32, "head_dim": 8, "windows": (20, 40), "far_layers": (1, 2),
         "far_period": 4, "pack_tokens": 512, "val_tokens": 1500, "val_stream_tokens": 512, "batch_tokens": 512,
         "num_iterations": 4, "val_every": 0, "width_rule": "none", "device": "cpu"}


def flags(data, **changes):
    return as_flags(SMALL | {"train_files": f"{data}/train_*.bin", "val_files": f"{data}/val_*.bin"} | changes)


def config(**changes):
    """The small configuration with everything filled in."""
    values = {name: value for name, value in SMALL.items() if name != "preset"}
    cfg = replace(long.PRESETS["tiny"], **values | changes)
    return replace(cfg, vocab_size=VOCAB, bos_id=BOS, compile=False, attention=changes.get("attention", "plain"))


def moved(cfg):
    """A model with every parameter away from its initial value."""
    model, generator = long.GPT(cfg).requires_grad_(False), torch.Generator().manual_seed(1)
    for param in model.parameters():
        param += 0.1 * torch.randn(param.shape, generator=generator)
    return model


def document(length, seed=0):
    return torch.tensor([BOS, *np.random.default_rng(seed).integers(0, 256, length - 1)])


@pytest.fixture
def script():
    return long


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 tokens, so that short texts have many."""
    monkeypatch.setattr(long, "BLOCK", 16)


# -----------------------------------------------------------------------------
# The mask

def packings(count):
    """(start of the document of each token, window, period, phase) of random packings; every other one is aligned."""
    rng = np.random.default_rng(0)
    for trial in range(count):
        length, period = int(rng.integers(1, 150)), int(rng.integers(1, 5))
        starts = sorted(rng.integers(0, length, rng.integers(0, 5)).tolist())
        start = np.zeros(length, np.int64)
        for place in (place // 16 * 16 if trial % 2 else place for place in starts):
            start[place:] = place
        yield torch.from_numpy(start), int(rng.integers(0, 60)), period, int(rng.integers(0, period))


def dense_mask(start, window, period, phase, heads):
    """What each head sees (heads, T, T), token by token as the definition says."""
    seen = np.zeros((heads, len(start), len(start)), bool)
    index = np.arange(len(start))
    for head in range(heads):
        for query, first in enumerate(start.tolist()):
            key = index[first:query + 1]
            far = (key - first) // 16 % period == (phase + head) % period
            seen[head, query, first:query + 1] = (key >= query - window) | far
    return torch.from_numpy(seen)


def test_the_mask_of_200_packings_is_the_dense_one(small_blocks):
    """And its tables hold the blocks in which something is seen, as full where all is seen, and no others."""
    heads = 3
    for start, window, period, phase in packings(200):
        length, index = len(start), torch.arange(len(start))
        mask = long.far_mask(torch.maximum(start, index - window), start, phase, period, heads)
        wanted = dense_mask(start, window, period, phase, heads)
        head = torch.arange(heads)[:, None, None]
        assert mask.mask_mod(0, head, index[:, None], index).equal(wanted)
        blocks = -(-length // 16)
        padded = torch.zeros(heads, 16 * blocks, 16 * blocks, dtype=torch.bool)
        padded[:, :length, :length] = wanted
        tiles = padded.view(heads, blocks, 16, blocks, 16).transpose(2, 3)
        assert mask.to_dense()[0].bool().equal(tiles.any(4).any(3))
        padded[:, length:] = True                       # queries that are not there hide no full block
        whole = tiles.all(4).all(3)
        number, listed = mask.full_kv_num_blocks[0], mask.full_kv_indices[0]
        for h in range(heads):
            for row in range(blocks):
                assert whole[h, row, listed[h, row, :number[h, row]]].all()


def test_forward_and_gradients_are_those_of_a_dense_mask(small_blocks):
    for start, window, period, phase in list(packings(24))[-12:]:
        length = len(start)
        cfg = config(depth=2, far_layers=(1, 0), model_dim=8 * period, far_period=period)
        tokens = torch.where(start == torch.arange(length), BOS, 7)
        context = long.Stream(cfg, tokens)
        first = long.far_phase(cfg, 0)
        wanted = dense_mask(start, window, period, first, period)
        qkv = torch.randn(3, length, period, 8, generator=torch.Generator().manual_seed(length))
        results = []
        for dense in (False, True):
            q, k, v = (x.clone().requires_grad_() for x in qkv)
            if dense:
                sharp = (torch.arange(length) - start + 1).log().div(math.log(16)).clamp(min=1)
                q_scaled = q * sharp[:, None, None]
                y = torch.nn.functional.scaled_dot_product_attention(
                    *(x.transpose(0, 1) for x in (q_scaled, k, v)), attn_mask=wanted).transpose(0, 1)
            else:
                y = context.attend(0, window, q, k, v)
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), (q, k, v))))
        for found, right in zip(*results):
            assert_close(found, right, 1e-5)


def test_flex_attention_sees_what_plain_attention_sees(monkeypatch):
    def dense(q, k, v, block_mask):
        index, head = torch.arange(q.size(2)), torch.arange(q.size(1))[:, None, None]
        seen = block_mask.mask_mod(0, head, index[:, None], index)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    monkeypatch.setattr(long, "flex_attention", dense)
    tokens, cfg = torch.cat([document(700), document(68), document(256)]), config()
    assert_close(moved(replace(cfg, attention="flex"))(tokens), moved(cfg)(tokens), 1e-4)


def test_the_heads_of_the_far_layers_see_every_block_between_them():
    cfg = config(far_period=8)
    phases = [(long.far_phase(cfg, layer) + head) % 8 for layer in (1, 2) for head in range(4)]
    assert sorted(phases) == list(range(8)) and long.far_phase(cfg, 0) is None
    assert long.far_phase(replace(cfg, far_period=0), 1) is None


def test_a_token_far_away_changes_the_logits_only_with_far_layers():
    tokens = document(600)
    changed = tokens.clone()
    changed[5] = (changed[5] + 1) % 256
    for period in (4, 0):
        model = moved(config(far_period=period))
        same = (model(changed)[-100:] == model(tokens)[-100:]).all()
        assert same == (period == 0)


@pytest.mark.parametrize("shared", [True, False])
def test_the_heads_of_far_layers_share_their_projections(shared):
    """Queries, keys and values are the same in all heads of far layers, and only there."""
    same = {}

    class Recorder(long.Stream):
        def attend(self, layer, window, q, k, v):
            same[layer] = [x[:, :1].expand_as(x).equal(x) for x in (q, k, v)]
            return super().attend(layer, window, q, k, v)
    cfg, tokens = config(far_shared=shared), document(50)
    moved(cfg).trunk(tokens, Recorder(cfg, tokens))
    assert same == {0: [False] * 3, 1: [shared] * 3, 2: [shared] * 3}


# -----------------------------------------------------------------------------
# Streams

def test_long_documents_begin_at_blocks_and_nothing_is_lost(monkeypatch):
    monkeypatch.setattr(long, "ALIGNED", 300)
    rng, docs = np.random.default_rng(0), []
    for length in (70, 500, 1, 301, 299, 1400, 33, 700):
        docs.append(np.array([BOS, *rng.integers(0, 256, length)]))
    packs = list(long.streams(docs, 512, BOS, whole=False))
    inputs, targets = (np.concatenate(part) for part in zip(*packs))
    real = targets >= 0
    assert inputs[real].tolist() == np.concatenate([doc[:-1] for doc in docs]).tolist()
    assert targets[real].tolist() == np.concatenate([doc[1:] for doc in docs]).tolist()
    assert (inputs[~real] == BOS).all()
    text = inputs.tolist()
    for doc in docs:
        if len(doc) - 1 > 300:
            assert next(i for i in range(len(text)) if text[i:i + 40] == doc[:40].tolist()) % 128 == 0


# -----------------------------------------------------------------------------
# The cache

@pytest.mark.parametrize("length, chunk, changes", [(1000, 2048, {}), (1000, 2048, {"far_shared": False}), (5000, 300, {
    "depth": 2, "model_dim": 16, "far_layers": (1,), "far_period": 2, "windows": (100,)})])
def test_decoding_equals_forward(length, chunk, changes):
    model, tokens = moved(config(**changes)), document(length)
    wanted, cache = model(tokens), model.new_cache(1, length, chunk)
    split = length - 3
    found = [model.decode(tokens[None, :split], cache)]
    found += [model.decode(tokens[None, i:i + 1], cache) for i in range(split, length)]
    assert_close(torch.cat(found, 1)[0], wanted, 1e-4)
    with pytest.raises(ValueError, match=f"{length + 2} tokens"):
        model.decode(tokens[None, :2], cache)


class LastQueries(long.Stream):
    """As Stream, but layer 1 attends for the last ten tokens only, which are all that the test compares."""

    def attend(self, layer, window, q, k, v):
        if layer == 0:
            return super().attend(layer, window, q, k, v)
        query, head = self.index[-10:, None], torch.arange(q.size(1))[:, None, None]
        phase, period = long.far_phase(self.cfg, 1), self.cfg.far_period
        seen = (self.index >= query - window) | (self.index // 128 % period == (phase + head) % period)
        q = q * (self.index + 1).log().div(math.log(128)).clamp(min=1)[:, None, None]
        y = torch.zeros_like(q)
        y[-10:] = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in (q[-10:], k, v)), attn_mask=seen & (self.index <= query)).transpose(0, 1)
        return y


def test_decoding_equals_forward_at_20000_tokens():
    model = moved(config(depth=2, far_layers=(1,), model_dim=16, far_period=2, windows=(100,)))
    model.cfg = replace(model.cfg, far_period=16)       # two heads then see an eighth of all blocks
    tokens, cache = document(20_000), model.new_cache(1, 20_000)
    model.decode(tokens[None, :19_990], cache, last=True)
    wanted = model.logits(model.trunk(tokens, LastQueries(model.cfg, tokens))[-10:])
    assert_close(model.decode(tokens[None, 19_990:], cache)[0], wanted, 1e-4)


def test_rows_of_other_lengths_and_copies_of_rows():
    """Short rows are padded, read in several parts, and copied to a cache whose rings have another size."""
    model, tokens = moved(config()), torch.stack([document(900), document(900)])
    wanted, lengths = model(tokens[0]), torch.tensor([890, 30])
    cache = model.new_cache(2, 900, chunk=64)
    last = model.decode(tokens, cache, lengths, last=True)
    assert_close(last[:, 0], wanted[[889, 29]], 1e-4)
    copy = model.new_cache(3, 1000, chunk=1)
    copy.fill(cache, torch.tensor([1, 0, 1]))
    assert copy.length.tolist() == [30, 890, 30]
    for step in range(3):
        places = [30 + step, 890 + step, 30 + step]
        assert_close(model.decode(tokens[0, places][:, None], copy)[:, 0], wanted[places], 1e-4)


def test_memory_is_that_of_windows_and_kept_blocks():
    """Of the design: window + T / far_period cells of a layer, and one more that is never read."""
    model = long.GPT(config(depth=4, model_dim=64, far_layers=(1, 3), far_period=8, windows=(1408,), precision="bf16"))
    cache, cell = model.new_cache(1, 65_536, chunk=1), 2 * 64 * 2               # keys and values in bf16
    assert [layer.nbytes for layer in cache.layers] == [cell * (1409 + 1), cell * (1409 + 8192 + 1)] * 2
    assert cache.bytes_read(1) == 2 * cell * (2 * 1409 + 8192)
    assert cache.layers[1].nbytes * 768 / 64 / 1e6 == pytest.approx(29.5, abs=0.1)      # the table of the design
    assert model.new_cache(2, 100).bytes_read(1) == 2 * cell * (4 * 100 + 2 * 128)


# -----------------------------------------------------------------------------
# Runs

def test_a_run_goes_on_from_the_weights_of_another(data, run_main, tmp_path, capsys):
    done = run_main(*flags(data, out_dir=tmp_path / "a", far_period=0))
    assert done.code == 0, done.err
    run = only_folder(tmp_path / "a")
    checkpoint = next(run.glob("checkpoint/step_*"))
    before = json.loads((run / "run.json").read_text())["val_losses"][-1]["val_loss"]
    go_on = flags(data, out_dir=tmp_path / "b", init_from=checkpoint, num_iterations=1)
    done = run_main(*go_on)
    assert done.code == 2 and "blocks.1.qkv" in done.err and not (tmp_path / "b").exists()
    done = run_main(*go_on, "--far_shared=false")       # a model without far layers has projections for each head
    assert done.code == 0, done.err
    after = only_folder(tmp_path / "b")
    first = json.loads((after / "run.json").read_text())["val_losses"][0]["val_loss"]
    assert first == pytest.approx(before, abs=1e-4)     # documents are shorter than the windows: far blocks add nothing
    assert sample.main([f"--checkpoint={after}", "--prompt=the", "--max_tokens=5", "--threads=1"]) == 0
    assert capsys.readouterr().out.startswith("the")


@pytest.mark.parametrize("changes, word", [
    ({"far_layers": (1, 3)}, "--far_layers=1,3"), ({"far_period": 9}, "--far_period=9"), ({"far_period": -1}, "-1"),
    ({"init_from": "nowhere"}, "--init_from=nowhere")])
def test_a_bad_value_gets_one_line(changes, word, data, refused):
    refused(*flags(data, **changes), words=[word])


def test_weights_of_another_shape_are_refused(long_run, data, refused):
    refused(*flags(data, init_from=next(long_run.glob("checkpoint/step_*")), model_dim=64), words=["--init_from="])


# -----------------------------------------------------------------------------
# Needles and positions, with planted models

class Planted(torch.nn.Module):
    """A model that copies what followed the last 19 bytes when they last stood in the `reach` tokens before."""

    def __init__(self, reach):
        super().__init__()
        self.reach, self.weight = reach, torch.nn.Parameter(torch.zeros(1))
        self.cfg = SimpleNamespace(bos_id=BOS, vocab_size=VOCAB)

    def guess(self, ids):
        """The likeliest next token after the tokens `ids` (bytes)."""
        low = max(0, len(ids) - self.reach)
        for size in range(40, 8, -1):                   # the longest match, so that the right one of four is found
            place = ids.rfind(ids[-size:], low, len(ids) - 1)
            if place >= 0 and place + size < len(ids):
                return ids[place + size]
        return 0

    def score(self, tokens, targets):
        losses, likeliest = torch.zeros(len(tokens)), torch.full((len(tokens),), -1)
        starts = (tokens == BOS).nonzero().flatten().tolist()
        for i in (targets >= 0).nonzero().flatten().tolist():
            start = max(place for place in starts if place <= i)
            likeliest[i] = self.guess(bytes(tokens[start + 1:i + 1].tolist()))
        return losses, likeliest

    def new_cache(self, batch, max_tokens, chunk=256):
        def fill(other, rows):
            cache.ids = [other.ids[row] for row in rows.tolist()]
        cache = SimpleNamespace(ids=[b""] * batch, fill=fill)
        return cache

    def decode(self, tokens, cache, lengths=None, last=False):
        logits = torch.zeros(len(tokens), 1, VOCAB)
        for row, line in enumerate(tokens.tolist()):
            line = line[:int(lengths[row])] if lengths is not None else line
            cache.ids[row] += bytes(token for token in line if token < 256)
            logits[row, 0, self.guess(cache.ids[row])] = 9.0
        return logits


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A shard of random letters in documents of about 1,500 tokens."""
    folder, rng = tmp_path_factory.mktemp("filler"), np.random.default_rng(3)
    tokens = np.concatenate([[BOS, *rng.integers(97, 123, int(rng.integers(1200, 1800)))] for _ in range(30)])
    write_shard(folder / "val_000000.bin", tokens)
    return [long.read_header(str(folder / "val_000000.bin"))]


def planted_subject(model):
    machine = SimpleNamespace(device=torch.device("cpu"), rank=0, world_size=1)
    return SimpleNamespace(model=model, machine=machine, stream_tokens=4096, module=long, score_seconds=0.0,
                           name="planted")


@pytest.mark.parametrize("reach", [10**6, 1360])
def test_a_needle_is_found_within_the_reach_and_not_beyond(reach, shards):
    tokenizer, model = sample.Tokenizer(json.loads(tokenizer_json())), Planted(reach)
    items = long_tasks.make_items(tokenizer, shards, 4096, 2)
    assert {len(item.tokens) + len(item.answer) for item in items} == {2048, 4096}
    documents = [long_tasks.item_document(item) for item in items]
    results = evaluate.score_documents(planted_subject(model), model.score, documents, 1)
    records = long_tasks.judge(items, long_tasks.write_answers(model, VOCAB, items), results, tokenizer)
    for item, record in zip(items, records):
        text = bytes(item.tokens[1:].tolist()).decode()
        away = len(text) - text.index(text[text.rindex("\n"):])        # tokens from the needle to the question's end
        assert abs(away - reach) > 30                                  # the test has no needle at the edge
        assert record["decode"] == record["forward"] == (away < reach), record
    score = long_tasks.needle_score(records)
    assert score["agree"] == 1 and score["decode"]["1"]["4096"]["n"] == 10
    assert score["decode"]["4"]["4096"]["accuracy"] == (1 if reach > 4096 else 0.4)
    picture = long_tasks.heat_map(score)
    assert picture.count("<rect") == 1 + 2 * len(score["cells"]) and picture.endswith("</svg>\n")
    assert "right answers" in long_tasks.table({"needle": score})[0]


def test_items_are_the_same_each_time_and_ask_for_the_first_needle(shards):
    tokenizer = sample.Tokenizer(json.loads(tokenizer_json()))
    items = long_tasks.make_items(tokenizer, shards, 2048, 1)
    for item, again in zip(items, long_tasks.make_items(tokenizer, shards, 2048, 1)):
        text = bytes(item.tokens[1:].tolist()).decode()
        assert (item.tokens == again.tokens).all() and text.count("The secret number of the ") == item.needles + 1
        asked = text[text.rindex("\n"):]
        place = text.index(asked)
        assert text[place + len(asked):][:6] == bytes(item.answer.tolist()).decode()
        assert place / len(text) == pytest.approx(item.depth, abs=0.06 + 0.12)


def test_training_and_evaluation_have_different_keys():
    training, other = set(needles.key_pool(True)), set(needles.key_pool(False))
    assert not training & other and len(training) > 1000 and len(other) > 500


def test_losses_by_position(shards):
    """The planted loss of a token is the number of tokens before it: its place, or as many as the cut has left."""
    rng = np.random.default_rng(0)
    documents = [np.array([BOS, *rng.integers(97, 123, length - 1)], np.int32) for length in (9000, 7000)]
    pieces, owners = long_tasks.cut_documents(documents, 9000)
    subject = planted_subject(Planted(10))
    subject.stream_tokens = 9088

    def score(tokens, targets):
        index = torch.arange(len(tokens))
        place = index - torch.where(tokens == BOS, index, 0).cummax(0).values
        return place.float() * (targets >= 0), torch.zeros_like(targets)
    results = evaluate.score_documents(subject, score, pieces, 1)
    full = long_tasks.full_losses(subject, score, documents, 9000, evaluate.fill)
    full = np.stack([full[0], full[1]])
    found = long_tasks.position_score(full, results, owners, 9000, evaluate.ratio)
    rows = {row["from"]: row for row in found["buckets"]}
    assert [*rows] == [0, 1024, 2048, 4096, 8192]
    assert rows[1024]["full"] == pytest.approx(np.arange(1023, 2047).mean()) and "cut" not in rows[1024]
    assert rows[4096]["tokens"] == 4096 + 7000 - 4096 and rows[8192]["documents"] == 1
    assert rows[8192]["full"] == pytest.approx(np.arange(8191, 8999).mean())
    assert 2048 <= rows[4096]["cut"] < 4096
    assert rows[4096]["gain"] == pytest.approx(rows[4096]["cut"] - rows[4096]["full"])
    assert sum(count for _, count, _ in results) == 9000 - 4096 + 7000 - 4096
    assert "4,096 to 8,192" in "\n".join(long_tasks.table({"position": found}))


@pytest.mark.parametrize("words, named", [
    (["--longest=100"], "--longest=100"), (["--heat_map=x.svg", "--tasks=position"], "--heat_map=x.svg"),
    (["--stream_tokens=512"], "--stream_tokens=512"), (["--longest=1048576"], "1048576"),
    (["--tasks=position", "--longest=8192"], "--longest"), (["--heat_map=nowhere/x.svg"], "--heat_map=nowhere")])
def test_bad_input_of_the_long_tasks_gets_one_line(words, named, long_run, capsys):
    assert evaluate.main([f"--checkpoint={long_run}", "--tasks=needle", "--threads=1", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and named in error, error


@pytest.fixture(scope="module")
def long_run(data, tmp_path_factory):
    """The folder of a run of one step."""
    logs, patch = tmp_path_factory.mktemp("logs"), pytest.MonkeyPatch()
    patch.setattr("sys.argv", ["train_gpt_long.py", *flags(data, out_dir=logs, num_iterations=1)])
    assert long.main() == 0
    patch.undo()
    return only_folder(logs)


def test_evaluate_writes_scores_picture_and_items(long_run, data, tmp_path, capsys):
    code = evaluate.main([f"--checkpoint={long_run}", "--tasks=needle", "--longest=300", "--max_items=1", "--threads=1",
                          f"--heat_map={tmp_path}/map.svg", f"--items_out={tmp_path}/items.jsonl",
                          f"--shards={data}/val_*.bin"])
    out = capsys.readouterr().out
    assert code == 0
    score = json.loads(out[out.index("{"):])["scores"]["needle"]
    records = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert len(records) == 10 and len(score["cells"]) == 10 and score["agree"] >= 0.9
    assert (tmp_path / "map.svg").read_text().startswith("<svg") and [*score["decode"]["1"]] == ["300"]
