"""Shards, documents, packing and the validation set of every training script, against streams made here by hand.

Proves: only whole, consistent shards are accepted and published ones are read as GPT-2's; every rank sees its own part
of one plan; a document is never cut silently (the true next token stays the target); validation holds each of the first
val_tokens targets once, whatever the length of its streams. Run: python -m pytest tests/test_data.py
"""
import base64
import hashlib
import importlib
import json
import threading

import numpy as np
import pytest
from conftest import BOS, ROOT, SCRIPTS, VOCAB, make_data, make_text, small_flags, tokenizer_json, write_shard

import train_gpt

GPT2_BPE = ROOT.parent / "shared" / "data" / "gpt2_bpe"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request):
    return importlib.import_module(request.param)


# -----------------------------------------------------------------------------
# Shards

def test_a_shard_of_our_own(tmp_path):
    tokens = [BOS, 1, 2, 3, BOS, 4]
    shard = train_gpt.read_header(write_shard(tmp_path / "a.bin", tokens))
    assert (shard.num_tokens, shard.vocab_size, shard.bos_id, shard.width) == (6, VOCAB, BOS, 2)
    assert shard.tokenizer == hashlib.sha256(tokenizer_json()).hexdigest()
    assert shard.read().tolist() == tokens


def test_a_published_shard_has_zeros_that_mean_gpt2(tmp_path):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 4
    (tmp_path / "fineweb.bin").write_bytes(header.tobytes() + np.array([50256, 15496, 995, 50256], "<u2").tobytes())
    shard = train_gpt.read_header(str(tmp_path / "fineweb.bin"))
    assert (shard.num_tokens, shard.vocab_size, shard.bos_id, shard.width) == (4, 50257, 50256, 2)
    assert shard.tokenizer == train_gpt.GPT2_TOKENIZER_SHA256
    assert shard.read().tolist() == [50256, 15496, 995, 50256]


def test_a_shard_of_wide_tokens(tmp_path):
    shard = train_gpt.read_header(write_shard(tmp_path / "a.bin", [99_999, 70_000, 65_536], w3=100_000, w4=99_999, w5=4))
    assert shard.width == 4 and shard.read().tolist() == [99_999, 70_000, 65_536]


def damaged(path, kind):
    """A file in the shard's place with something wrong; returns words of the message."""
    write_shard(path, make_text(500, 0))
    content = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
        return ["0 bytes"]
    if kind == "short header":
        path.write_bytes(content[:1000])
        return []
    if kind == "no tokens":
        write_shard(path, [])
        return ["0 tokens"]
    if kind == "truncated":
        path.write_bytes(content[:-100])
        return ["holds"]
    if kind == "longer than it says":
        path.write_bytes(content + b"\0\0")
        return []
    if kind == "promises more":
        write_shard(path, [BOS] * 10, w2=11)
        return ["11", "10"]
    if kind == "negative length":
        write_shard(path, [BOS] * 10, w2=-1)
        return ["-1"]
    if kind == "foreign":
        path.write_bytes(b"PNG, not a shard. " * 200)
        return []
    if kind == "version":
        write_shard(path, [BOS] * 10, w1=2)
        return ["version"]
    if kind == "magic":
        write_shard(path, [BOS] * 10, w0=20240521)
        return ["20240521"]
    if kind == "width":
        write_shard(path, [BOS] * 10, w5=3)
        return ["3 bytes"]
    path.unlink()
    path.mkdir()  # a folder that matches the pattern
    return []


@pytest.mark.parametrize("name", ["train_000001.bin", "val_000000.bin"])
@pytest.mark.parametrize("kind", [
    "empty", "short header", "no tokens", "truncated", "longer than it says", "promises more", "negative length",
    "foreign", "version", "magic", "width", "folder"])
def test_damaged_shards_are_refused(refused, tmp_path, kind, name):
    folder = make_data(tmp_path / "shards", train_tokens=2000, val_tokens=2000)
    words = damaged(folder / name, kind)
    message = refused(*small_flags(folder), words=[folder / name, *words])
    assert "again" in message  # the remedy


@pytest.mark.parametrize("flag", ["train_files", "val_files"])
def test_missing_shards_are_refused_with_the_command_that_makes_them(refused, data, flag):
    refused(*small_flags(data, **{flag: f"{data}/nothing_*.bin"}), words=[f"--{flag}", "nothing_", "data/text.py"])


@pytest.mark.parametrize("words", [{"sha256": bytes(range(32))}, {"w3": 300}, {"w4": 10}])
@pytest.mark.parametrize("name", ["val_000000.bin", "train_000001.bin"])
def test_shards_of_different_tokenizers_are_refused(refused, tmp_path, words, name):
    folder = make_data(tmp_path / "shards", train_tokens=2000, val_tokens=2000)
    write_shard(folder / name, make_text(2000, 0), **words)
    refused(*small_flags(folder), words=[name, "tokenizer", "same"])


@pytest.mark.parametrize("content, words", [
    (None, ["missing", "copy it"]), (b"", ["not the tokenizer"]),
    (tokenizer_json() + b" ", ["not the tokenizer"])])
def test_the_tokenizer_must_be_the_one_of_the_shards(refused, tmp_path, content, words):
    folder = make_data(tmp_path / "shards")
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_bytes(content)
    refused(*small_flags(folder), words=["tokenizer.json", *words])


def test_the_tokenizer_is_read_and_checked(script, data):
    shard = script.open_shards(f"{data}/train_*.bin", f"{data}/val_*.bin")[0][0]
    assert train_gpt.read_tokenizer(shard) == tokenizer_json()


@pytest.mark.parametrize("name, position", [("train_000000.bin", 20), ("val_000000.bin", 1000)])
def test_an_id_outside_the_vocabulary_is_refused(run_main, tmp_path, name, position):
    folder = make_data(tmp_path / "shards", train_tokens=100_000)
    tokens = make_text(100_000, 0)
    tokens[position] = VOCAB
    write_shard(folder / name, tokens)
    done = run_main(*small_flags(folder, out_dir=tmp_path / "logs"))
    assert done.code == 2 and done.err.count("\n") == 1
    assert name in done.err and str(VOCAB) in done.err and "again" in done.err


def test_ids_too_large_for_a_signed_number_are_refused(script, tmp_path):
    shard = train_gpt.read_header(write_shard(tmp_path / "a.bin", [BOS, 5, 2**31 + 5, 7], w5=4))
    sound = train_gpt.read_header(write_shard(tmp_path / "sound.bin", [BOS, 5, 6, 7], w5=4))
    for pieces in ([(shard.read(), 0, 4)], [(sound.read(), 0, 4), (shard.read(), 0, 4)]):
        with pytest.raises(script.UserError, match=rf"{tmp_path / 'a.bin'} holds id {2**31 + 5}, but the last one is"):
            script.fill_pack(pieces, 8, BOS, VOCAB)


def test_too_few_tokens_for_the_schedule_are_noticed_at_the_start(refused, tmp_path):
    folder = make_data(tmp_path / "shards", train_tokens=10_000)
    refused(*small_flags(folder), words=["train_files", 7 * 512 + 13 * 1024, "num_iterations"])


def test_too_few_validation_tokens(refused, data):
    refused(*small_flags(data, val_tokens=1_000_000), words=["val_files", "val_tokens=1000000"])


def test_a_validation_shard_that_does_not_begin_with_a_document(run_main, tmp_path):
    folder = make_data(tmp_path / "shards", train_tokens=100_000, val_tokens=1400)
    tokens = np.concatenate([np.full(200, 97), make_text(1400, 9)[:1400]])
    write_shard(folder / "val_000000.bin", tokens)
    done = run_main(*small_flags(folder, out_dir=tmp_path / "logs"))
    assert done.code == 2 and done.err.count("\n") == 1 and "val_files" in done.err


def test_running_out_during_training(run_main, tmp_path):
    """The shards hold enough tokens, but what is cut from long documents is not used."""
    folder = make_data(tmp_path / "shards")
    for i in range(2):
        write_shard(folder / f"train_{i:06d}.bin", np.concatenate([[BOS], np.full(10_000, 97)]))
    done = run_main(*small_flags(folder, out_dir=tmp_path / "logs"))
    assert done.code == 2 and done.err.count("\n") == 1
    assert "ends at step 0 of 20" in done.err and "--epochs=2" in done.err


# -----------------------------------------------------------------------------
# Documents and slots

def test_documents_of_several_shards(script, tmp_path):
    first = train_gpt.read_header(write_shard(tmp_path / "a.bin", [7, 8, BOS, 1, 2, BOS, BOS, 3]))  # begins amid one
    second = train_gpt.read_header(write_shard(tmp_path / "b.bin", [BOS, 4]))
    third = train_gpt.read_header(write_shard(tmp_path / "c.bin", [9, 9]))
    found = [ids[start:end].tolist() for ids, start, end in script.documents([first, second, third])]
    assert found == [[BOS, 1, 2], [BOS], [BOS, 3], [BOS, 4]]


def test_documents_of_a_long_shard_lose_nothing(script, tmp_path):
    tokens = np.full(5_000_000, 97, np.uint16)
    starts = np.sort(np.random.default_rng(0).choice(5_000_000, 500, replace=False))
    starts = np.union1d(starts, [0, (1 << 22) - 1, 1 << 22, (1 << 22) + 1])  # where a search in pieces may go wrong
    tokens[starts] = BOS
    shard = train_gpt.read_header(write_shard(tmp_path / "a.bin", tokens))
    found = [(int(start), int(end)) for _, start, end in script.documents([shard])]
    assert found == list(zip(starts.tolist(), [*starts.tolist()[1:], 5_000_000]))


def test_a_slot_has_the_true_next_token_at_a_cut_and_no_target_in_the_padding(script):
    ids = np.array([BOS, 1, 2, 3, 4, BOS, 5, 6], np.uint16)
    inputs, targets = script.fill_pack([(ids, 0, 3), (ids, 5, 3)], 8, BOS, VOCAB)
    assert inputs.tolist() == [BOS, 1, 2, BOS, 5, 6, BOS, 0]
    assert targets.tolist() == [1, 2, 3, 5, 6, BOS, -1, -1]  # 3 follows the cut, a new document follows the last
    assert inputs.dtype == np.int32 and targets.dtype == np.int64


def test_an_empty_slot_is_padding(script):
    inputs, targets = script.fill_pack([], 150, BOS, VOCAB)
    assert inputs.tolist() == 2 * [BOS, *[0] * 63] + [BOS, *[0] * 21] and targets.tolist() == [-1] * 150


def numbered_shards(script, folder, sizes, per_shard=2):
    """Shards of documents in which every token is another number, so that each can be found again; BOS is 0 ... 1."""
    bos, tokens, shards = 1, [], []
    number = 2
    for size in sizes:
        tokens.append([bos, *range(number, number + size - 1)])
        number += size - 1
    folder.mkdir(exist_ok=True)
    for i in range(per_shard):
        part = tokens[i * len(tokens) // per_shard:(i + 1) * len(tokens) // per_shard]
        path = write_shard(folder / f"{i}.bin", np.concatenate(part), w3=number, w4=bos, w5=4)
        shards.append(train_gpt.read_header(path))
    return shards, tokens


def plan(script, cfg, shards, world_size, micro_packs):
    """steps -> ranks -> micro-batches of (inputs, targets)."""
    ranks = [[batches for batches, _ in script.training_batches(cfg, shards, rank, world_size, micro_packs)]
             for rank in range(world_size)]
    return list(zip(*ranks, strict=True))


@pytest.fixture
def packing(script, small_config, tmp_path):
    sizes = np.random.default_rng(0).integers(1, 300, 400)
    shards, docs = numbered_shards(script, tmp_path / "numbered", sizes)
    return small_config(), shards, docs


def slots_of(cfg, batches):
    """All slots of some micro-batches, without those that are padding and nothing else."""
    slots = [(inputs[i:i + cfg.pack_tokens].tolist(), targets[i:i + cfg.pack_tokens].tolist())
             for inputs, targets in batches for i in range(0, len(inputs), cfg.pack_tokens)]
    return [slot for slot in slots if max(slot[1]) >= 0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_packs", [1, 2, 3])
def test_ranks_share_one_plan(script, packing, world_size, micro_packs):
    cfg, shards, _ = packing
    whole = plan(script, cfg, shards, 1, 1)
    assert len(whole) == cfg.total_steps == 20
    for step, (ranks, (one,)) in enumerate(zip(plan(script, cfg, shards, world_size, micro_packs), whole, strict=True)):
        want = slots_of(cfg, one)
        assert len(want) == cfg.stages[script.stage_index(cfg, step)].batch_tokens // cfg.pack_tokens
        assert sum((slots_of(cfg, batches) for batches in ranks), []) == want  # disjoint, complete and in order
        assert len({len(batches) for batches in ranks}) == 1
        assert all(len(inputs) == len(targets) == micro_packs * cfg.pack_tokens
                   for batches in ranks for inputs, targets in batches)
        counts = [len(slots_of(cfg, batches)) for batches in ranks]
        assert min(counts) >= 1 and max(counts) - min(counts) <= 1


def test_packing_follows_the_rule(script, packing):
    """Documents in order, each begun once, cut at the longest length and at the end of a slot, the rest left out."""
    cfg, shards, docs = packing
    remaining = iter(docs)
    for step, (batches,) in enumerate(plan(script, cfg, shards, 1, 1)):
        longest = cfg.stages[script.stage_index(cfg, step)].max_doc_tokens
        for inputs, targets in slots_of(cfg, batches):
            want_inputs, want_targets = [], []
            while len(want_inputs) < cfg.pack_tokens:
                document = next(remaining)
                length = min(len(document), longest, cfg.pack_tokens - len(want_inputs))
                want_inputs += document[:length]
                want_targets += (document[1:] + [1])[:length]  # the true next token, or the next document's first
            assert (inputs, targets) == (want_inputs, want_targets)
            assert inputs[0] == 1


def test_training_and_stopping_early_read_the_same(script, packing):
    cfg, shards, _ = packing
    first = [batch[0].tolist() for batch in next(script.training_batches(cfg, shards, 0, 1, 2))[0]]
    again = [batch[0].tolist() for batch in next(script.training_batches(cfg, shards, 0, 1, 2))[0]]
    assert first == again


# -----------------------------------------------------------------------------
# Validation

@pytest.mark.parametrize("stream", [50, 128, 256, 1000, 5000])
def test_validation_holds_every_target_once_in_whole_documents(script, small_config, tmp_path, stream):
    sizes = np.random.default_rng(1).integers(1, 200, 40)
    shards, docs = numbered_shards(script, tmp_path / "numbered", sizes)
    cfg = small_config(val_stream_tokens=stream, val_tokens=2500)
    every = np.concatenate(docs)
    after = np.append(every[1:], 1)
    seen = []
    for inputs, targets in script.validation_streams(cfg, shards):
        assert len(inputs) == len(targets) == stream and max(targets) >= 0
        real = targets >= 0
        assert not np.any(real[1:] & ~real[:-1])  # padding only at the end
        seen += list(zip(inputs[real].tolist(), targets[real].tolist()))
        if stream > 200:
            assert inputs[0] == 1  # no document is cut when streams are longer than documents
            ends = np.flatnonzero(real)[-1]
            assert targets[ends] == 1 or targets[ends] == after[2499]
    want = list(zip(every[:2500].tolist(), after[:2500].tolist()))
    assert sorted(seen) == sorted(want)


def test_a_validation_document_longer_than_a_stream_keeps_its_order(script, small_config, tmp_path):
    shards, docs = numbered_shards(script, tmp_path / "numbered", [10, 70, 20], per_shard=1)
    streams = script.validation_streams(small_config(val_stream_tokens=32, val_tokens=99), shards)
    inputs = [inputs[targets >= 0].tolist() for inputs, targets in streams]
    assert inputs == [docs[0], docs[1][:32], docs[1][32:64], docs[1][64:] + docs[2][:19]]


# -----------------------------------------------------------------------------
# Prefixes

def test_the_prefix_of_a_token_is_the_longest_other_token_that_begins_it(script):
    ranks = [b"a", b"ab", b"abc", b"b", b"bc", b"abd", b"abcde", b"\xff", b"c"]
    tokenizer = json.loads(tokenizer_json(ranks))
    assert script.prefix_tokens(tokenizer, 12).tolist() == [-1, 0, 1, -1, 3, 1, 2, -1, -1, -1, -1, -1]


def test_prefixes_against_a_search_through_all_pairs(script):
    rng = np.random.default_rng(0)
    ranks = list({bytes(rng.integers(0, 3, rng.integers(1, 8)).astype(np.uint8)) for _ in range(300)})
    found = script.prefix_tokens(json.loads(tokenizer_json(ranks)), len(ranks) + 1)
    for token, text in enumerate(ranks):
        shorter = [other for other in ranks if text.startswith(other) and other != text]
        assert found[token] == (ranks.index(max(shorter, key=len)) if shorter else -1)
    assert found[-1] == -1 and (found >= 0).sum() > 100


def test_the_constant_is_the_hash_of_gpt2s_tokenizer():
    if not (GPT2_BPE / "vocab.bpe").exists():
        pytest.skip("needs GPT-2's vocabulary in ../shared/data/gpt2_bpe")
    # the published encoder writes bytes as printable characters: those that are printable stand for themselves
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    encoder = json.loads((GPT2_BPE / "encoder.json").read_text(encoding="utf-8"))
    texts = {token: bytes(byte_of[char] for char in text) for text, token in encoder.items() if text != "<|endoftext|>"}
    ranks = [base64.b64encode(texts[i]).decode() for i in range(50256)]
    content = {"name": "gpt2", "pattern": GPT2_PATTERN, "ranks": ranks,
               "special_tokens": {"<|endoftext|>": 50256}, "bos_id": 50256}
    text = json.dumps(content, ensure_ascii=True, sort_keys=True, separators=(",", ":")) + "\n"
    assert hashlib.sha256(text.encode("ascii")).hexdigest() == train_gpt.GPT2_TOKENIZER_SHA256


# -----------------------------------------------------------------------------
# Prefetching

def test_prefetching_keeps_the_order_and_works_ahead(script):
    made, consumed = [], []

    def items():
        for i in range(20):
            made.append((i, threading.current_thread() is threading.main_thread()))
            yield [i]
    for item in script.prefetch(items()):
        consumed.append(item)
        assert len(made) - len(consumed) <= 3
    assert consumed == [[i] for i in range(20)]
    assert not any(main for _, main in made)


def test_prefetching_passes_an_error_on_after_what_came_before_it(script):
    def items():
        yield 1
        yield 2
        raise script.UserError("no more")
    received, loader = [], script.prefetch(items())
    with pytest.raises(script.UserError, match="no more"):
        for item in loader:
            received.append(item)
    assert received == [1, 2]


def test_prefetching_that_is_given_up_leaves_no_thread(script):
    before = threading.active_count()
    loader = script.prefetch(iter([[i] for i in range(100)]))
    assert next(loader) == [0]
    loader.close()
    assert threading.active_count() == before
