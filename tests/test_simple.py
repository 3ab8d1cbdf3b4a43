"""train_gpt_simple.py: its model, its ideas to try, its dial, and the folder that it leaves behind.

Against: documents run one by one, forward for decode, two ranks for one, the rules of nanochat's depth dial, and the
tools that read a run: sample.py, evaluate.py, records.py compare. Run: python -m pytest tests/test_simple.py
"""
import ast
import dataclasses
import importlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BOS, ROOT, VOCAB, as_flags, assert_close, join, make_text, only_folder, stream
from torch.nn.attention.flex_attention import BlockMask

import evaluate
import sample
import train_gpt_simple as simple

sys.path.insert(0, str(ROOT / "records"))
import records  # noqa: E402

SMALL = {"preset": "tiny", "depth": 3, "model_dim": 32, "head_dim": 8, "windows": (8, 24), "pack_tokens": 128,
         "val_tokens": 1500, "val_stream_tokens": 512, "batch_tokens": 512, "num_iterations": 20, "val_every": 10,
         "width_rule": "none", "device": "cpu"}
IDEAS = {"mlp": "swiglu", "gate": "head", "value_residual": True, "norm_scaling": True, "softcap": 15.0, "z_loss": 1e-4,
         "decay_rule": "independent", "schedule": "seesaw", "optimizer": "adamw", "epochs": 2, "width_rule": "mup"}


def flags(data, **changes):
    return as_flags(SMALL | {"train_files": f"{data}/train_*.bin", "val_files": f"{data}/val_*.bin"} | changes)


def config(**changes):
    """The small configuration with everything filled in."""
    values = {name: value for name, value in SMALL.items() if name != "preset"}
    cfg = replace(simple.PRESETS["tiny"], **values | changes)
    return replace(cfg, vocab_size=VOCAB, bos_id=BOS, compile=False, attention=changes.get("attention", "plain"))


def moved(cfg):
    """A model with every parameter away from its initial value."""
    model, generator = simple.GPT(cfg).requires_grad_(False), torch.Generator().manual_seed(1)
    for param in model.parameters():
        param += 0.1 * torch.randn(param.shape, generator=generator)
    return model


@pytest.fixture
def script():
    return simple


# -----------------------------------------------------------------------------
# The model

@pytest.mark.parametrize("changes", [{}, {"gate": "element", "value_residual": True, "norm_scaling": True},
                                     {"mlp": "swiglu", "gate": "head", "softcap": 5.0, "windows": (0,)}], ids=str)
def test_documents_do_not_see_each_other_or_what_comes_later(changes):
    model, tokens = moved(config(**changes)), stream(70, 1, 600, 33)
    together = model(tokens)
    alone = torch.cat([model(document) for document in tokens.split([70, 1, 600, 33])])
    assert_close(together, alone, 1e-3)
    later = tokens.clone()
    later[400:] = 5
    assert_close(model(later)[:400], together[:400], 1e-3)


def test_layers_look_back_as_far_as_their_windows():
    model, tokens = moved(config(depth=1, windows=(8,))), stream(600)
    changed = tokens.clone()
    changed[500] = (changed[500] + 1) % 256
    seen = (model(changed) - model(tokens)).abs().amax(1).nonzero().flatten().tolist()
    assert seen == list(range(500, 509))


@pytest.mark.parametrize("changes", [{}, {"value_residual": True, "gate": "head", "windows": (0, 5)}], ids=str)
def test_decoding_equals_forward_past_window_borders(changes):
    model, tokens = moved(config(**changes)), torch.stack([stream(70), stream(70).flip(0).roll(1)])
    wanted = torch.stack([model(row) for row in tokens])
    cache = model.new_cache(2, 70)
    found = [model.decode(part, cache) for part in tokens.split([5, 1, 30, 1, 1, 32], 1)]
    assert_close(torch.cat(found, 1), wanted, 1e-3)
    with pytest.raises(ValueError, match="72 tokens"):
        model.decode(tokens[:, :2], cache)


def test_rows_of_other_lengths_and_copies_of_rows():
    model, tokens = moved(config()), torch.stack([stream(40), stream(40)])
    wanted, cache, lengths = model(tokens[0]), model.new_cache(2, 40), torch.tensor([40, 11])
    last = model.decode(tokens, cache, lengths, last=True)
    assert_close(last[:, 0], wanted[[39, 10]], 1e-3)
    copy = model.new_cache(3, 64)
    copy.fill(cache, torch.tensor([1, 0, 1]))
    assert copy.length.tolist() == [11, 40, 11]
    found = model.decode(tokens[[0, 0, 1], 11:12], copy)
    assert_close(found[[0, 2], 0], wanted[[11, 11]], 1e-3)


def test_flex_attention_sees_what_plain_attention_sees(monkeypatch):
    """By its mask, whose blocks must hold all that is seen. The kernel itself is PyTorch's, and slow to load."""
    def dense(q, k, v, block_mask):
        index = torch.arange(q.size(2))
        seen = block_mask.mask_mod(0, 0, index[:, None], index)
        blocks = block_mask.to_dense()[0, 0].bool().repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert (blocks[:len(index), :len(index)] | ~seen).all() and not blocks.all()
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    monkeypatch.setattr(simple, "flex_attention", dense)
    tokens, cfg = stream(100, 156), config(windows=(40, 0))
    assert_close(moved(replace(cfg, attention="flex"))(tokens), moved(cfg)(tokens), 1e-3)


def same_lists(mask):
    """Whether PyTorch makes the same lists of blocks, also those by keys, which the backward pass reads."""
    right = BlockMask.from_kv_blocks(mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices,
                                     BLOCK_SIZE=128, seq_lengths=mask.seq_lengths)
    pairs = []
    for name in ("kv", "full_kv", "q", "full_q"):
        for one in (mask, right):
            counts, indices = getattr(one, f"{name}_num_blocks")[0, 0], getattr(one, f"{name}_indices")[0, 0]
            pairs.append([line[:count].tolist() for count, line in zip(counts, indices)])
    return pairs[::2] == pairs[1::2]


@pytest.mark.parametrize("length", [1000, 1024])
def test_blocks_of_flex_attention_hold_what_is_seen_and_no_more(length):
    """Blocks that are called full need no mask; the others that are listed have something in them."""
    tokens = stream(300, 90, length - 390)
    index = torch.arange(length)
    start = torch.where(tokens == BOS, index, 0).cummax(0).values
    for window in (40, 300, 5000):
        first = torch.maximum(start, index - window)
        mask = simple.flex_mask(first)
        seen = torch.zeros(1024, 1024, dtype=torch.bool)
        seen[:length, :length] = (index <= index[:, None]) & (index >= first[:, None])
        tiles = seen.view(8, 128, 8, 128).transpose(1, 2)
        assert mask.to_dense()[0, 0].bool().equal(tiles.any(3).any(2))
        assert same_lists(mask)
        for row in range(8):
            full = mask.full_kv_indices[0, 0, row, :mask.full_kv_num_blocks[0, 0, row]].tolist()
            assert all(tiles[row, column][:length - 128 * row].all() for column in full)
            assert mask.full_kv_num_blocks.sum() > 0 or window < 256


def test_the_masked_model_compiles_to_one_graph_for_all_texts():
    """Traced as on CUDA, without the kernels: new documents in a pack of the same length need no new graph."""
    cfg, graphs = config(depth=1, windows=(40,), attention="flex"), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward
    torch._dynamo.reset()
    model = torch.compile(simple.GPT(cfg).requires_grad_(False), backend=count, dynamic=False, fullgraph=True)
    for lengths in ((100, 156), (256,)):
        tokens = stream(*lengths)
        model(tokens, tokens.roll(-1))
    assert len(graphs) == 1


def test_the_head_works_in_chunks(monkeypatch):
    model, tokens = moved(config()), stream(50, 30)
    whole = model(tokens, tokens.roll(-1), 0.1)
    monkeypatch.setattr(simple, "HEAD_CHUNK", 33)
    assert model(tokens, tokens.roll(-1), 0.1).item() == pytest.approx(whole.item(), rel=1e-5)


def test_score_and_z_loss():
    model, tokens = moved(config()), stream(50, 30)
    targets = tokens.roll(-1)
    targets[-1] = -1
    logits = model(tokens)
    losses, likeliest = model.score(tokens, targets)
    assert losses[-1] == 0 and likeliest.equal(logits.argmax(1))
    assert model(tokens, targets).item() == pytest.approx(
        torch.nn.functional.cross_entropy(logits[:-1], targets[:-1], reduction="sum").item(), rel=1e-5)
    extra = model(tokens, targets, 0.1) - model(tokens, targets)
    assert extra.item() == pytest.approx(0.1 * logits[:-1].logsumexp(1).square().sum().item(), rel=1e-3)


# -----------------------------------------------------------------------------
# The ideas

def test_an_idea_that_is_off_has_no_parameters():
    names = {name.rsplit("blocks.", 1)[-1][2:] for name, _ in simple.GPT(config()).named_parameters()}
    assert not [name for name in names if "gate" in name or "lambda" in name]
    found = {name for name, _ in simple.GPT(config(gate="head", value_residual=True)).named_parameters()}
    assert "blocks.0.gate.weight" in found and "blocks.0.v_lambda" not in found and "blocks.1.v_lambda" in found


@pytest.mark.parametrize("idea", [*IDEAS.items(), ("gate", "element"), ("schedule", "cosine"), ("schedule", "linear"),
                                  ("width_rule", "nanochat")], ids=str)
def test_each_idea_trains(idea, data, run_main, tmp_path):
    done = run_main(*flags(data, out_dir=tmp_path, num_iterations=6, val_every=0, **dict([idea])))
    assert done.code == 0, done.err
    losses = json.loads((only_folder(tmp_path) / "run.json").read_text())["val_losses"]
    assert losses[-1]["val_loss"] < losses[0]["val_loss"] - 0.01


def test_the_script_is_short():
    """At most 600 lines of code, comments counted and blank lines not, and no function has more than 60."""
    source = (ROOT / "train_gpt_simple.py").read_text()
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    assert sum(bool(line) for line in source.splitlines()) <= 600
    assert {node.name: size for node in functions if (size := node.end_lineno - node.lineno + 1) > 60} == {}


def test_an_idea_is_one_field_and_few_lines():
    """At most three places outside the dataclass, its limits and the presets."""
    tree = ast.parse((ROOT / "train_gpt_simple.py").read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    names = [node.attr for node in found if "cfg" in ast.unparse(node.value)]
    assert {name: names.count(name) for name in IDEAS if not 1 <= names.count(name) <= 3} == {}


class OwnRate(torch.optim.SGD):
    """Stands for the package's Prodigy, which the tests do not need."""

    def __init__(self, groups, betas):
        super().__init__(groups, lr=1.0)


def test_prodigy_gets_all_parameters_and_the_schedule_alone(monkeypatch):
    cfg = config(optimizer="prodigy", weight_decay=0.5)
    monkeypatch.setitem(sys.modules, "prodigyopt", SimpleNamespace(Prodigy=OwnRate))
    model = simple.GPT(cfg)
    optimizer, = simple.make_optimizers(model)
    found = [param for group in optimizer.param_groups for param in group["params"]]
    assert {id(param) for param in found} == {id(param) for param in model.parameters()}
    assert {group["base_lr"] for group in optimizer.param_groups} == {1.0}
    decays = {group["params"][0].shape: group["weight_decay"] for group in optimizer.param_groups}
    assert decays[model.embed.weight.shape] == 0 and decays[model.blocks[0].fc.weight.shape] == 0.5


def test_prodigy_without_its_package_is_one_line(data, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    refused(*flags(data), "--optimizer=prodigy", words=["prodigy", "pip install"])


def test_prodigy_itself_trains(data, run_main, tmp_path):
    pytest.importorskip("prodigyopt", reason="an optional package")
    done = run_main(*flags(data, out_dir=tmp_path, num_iterations=30, val_every=0, optimizer="prodigy"))
    assert done.code == 0, done.err
    losses = json.loads((only_folder(tmp_path) / "run.json").read_text())["val_losses"]
    assert losses[-1]["val_loss"] < losses[0]["val_loss"] - 0.01


def test_seesaw_reads_the_same_tokens_in_fewer_steps():
    cfg = config(num_iterations=100, schedule="seesaw")
    rows, cosine = simple.plan(cfg), simple.plan(replace(cfg, schedule="cosine"))
    assert sum(tokens for _, tokens in rows) == sum(tokens for _, tokens in cosine) == 100 * 512
    assert len(rows) < 100 == len(cosine)
    rates = [(rate, tokens // 512) for rate, tokens in rows[20:]]
    assert all(rate == pytest.approx(batch ** -0.5) for rate, batch in rates[:-1])
    assert {batch for _, batch in rates} >= {1, 2, 4}


def test_schedules_end_at_the_floor():
    for schedule in ("wsd", "cosine", "linear"):
        rates = [rate for rate, _ in simple.plan(config(num_iterations=1000, schedule=schedule))]
        assert max(rates) <= 1 and rates[-1] == pytest.approx(0.05, abs=0.01)
        assert rates[19:] == sorted(rates[19:], reverse=True)


def test_an_independent_decay_does_not_know_the_factors():
    cfg = config(width_rule="nanochat", weight_decay=0.5)
    decays = []
    for rule in ("rate", "independent"):
        group = simple.make_optimizers(simple.GPT(replace(cfg, decay_rule=rule)))[0].param_groups[0]
        decays.append(group["base_lr"] * group["weight_decay"])
    factor = simple.rate_factors(cfg)["muon_lr"]
    assert factor < 0.1 and decays[0] == pytest.approx(factor * decays[1])


def test_orthogonal_matrices():
    x = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(0))
    for matrix in (x, x.mT):
        assert ((torch.linalg.svdvals(simple.orthogonalize(matrix)) - 1).abs() < 0.2).all()


# -----------------------------------------------------------------------------
# The dial

def test_the_dial_gives_the_sizes_of_nanochat():
    """Its table for a vocabulary of 32,768, without value embeddings and therefore with other token counts."""
    for depth, width, batch in ((6, 384, 2**18), (12, 768, 2**19), (20, 1280, 2**20), (32, 2048, 2**21)):
        cfg = simple.dial(replace(simple.parse_config([f"--depth={depth}"]), vocab_size=32_768))
        assert (cfg.model_dim, cfg.batch_tokens) == (width, batch)
        tokens = cfg.num_iterations * cfg.batch_tokens
        assert tokens == pytest.approx(10.5 * (12 * depth * width**2 + 32_768 * width), rel=0.01)
        factors = simple.rate_factors(cfg)
        assert factors["muon_lr"] == pytest.approx((batch / 2**19) ** 0.5)
        assert factors["head_lr"] == pytest.approx(factors["muon_lr"] * (width / 768) ** -0.5)
    assert simple.rate_factors(simple.dial(replace(simple.parse_config(["--depth=12"]), vocab_size=32_768)))[
        "weight_decay"] == pytest.approx(1, rel=0.01)


def test_what_is_given_beside_the_depth_stays():
    cfg = simple.parse_config(["--preset=tiny", "--depth=4", "--batch_tokens=8192", "--width_rule=mup"])
    assert (cfg.model_dim, cfg.batch_tokens, cfg.num_iterations, cfg.width_rule) == (0, 8192, 0, "mup")
    assert simple.parse_config(["--preset=tiny"]).model_dim == 192


def sizes_after_training(width, rule):
    """RMS of what each block adds to the stream, and of the logits, after ten steps on the same text."""
    cfg = config(model_dim=width, head_dim=16, depth=2, width_rule=rule, num_iterations=10)
    model, tokens = simple.GPT(cfg), torch.from_numpy(make_text(512, 0)[:512].astype(np.int64))
    optimizers, machine = simple.make_optimizers(model), simple.Machine(torch.device("cpu"), 0, 1, "cpu")
    for step in range(10):
        simple.training_step(model, optimizers, [(tokens, tokens.roll(-1))], step, cfg, machine, False)
    added = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: added.append(output[0] - inputs[0]))
    with torch.no_grad():
        logits = model(tokens)
    return np.array([x.square().mean().sqrt().item() for x in (*added, logits - logits.mean(1, keepdim=True))])


@pytest.mark.parametrize("rule", ["mup", "none"])
def test_activations_do_not_grow_with_the_width_under_mup_and_do_without(rule):
    widths = (64, 128, 256) if rule == "mup" else (64, 256)
    sizes = np.array([sizes_after_training(width, rule) for width in widths])
    spread = sizes.max(0) / sizes.min(0)
    assert (spread < 1.2).all() if rule == "mup" else (spread > 1.2).all(), sizes


# -----------------------------------------------------------------------------
# Data

def test_training_reads_the_text_from_end_to_end(data):
    cfg = replace(config(), train_files=f"{data}/train_*.bin", val_files=f"{data}/val_*.bin")
    shards, _ = simple.open_shards(cfg.train_files, cfg.val_files)
    packs = list(simple.streams(simple.training_documents(cfg, shards), 100, BOS, whole=False))
    text = np.concatenate([shard.read() for shard in shards]).astype(np.int64)
    read = np.concatenate([inputs for inputs, _ in packs])[:len(text)]
    assert (read == text).all()
    assert (np.concatenate([targets for _, targets in packs])[:len(text) - 1] == text[1:]).all()


def test_later_epochs_have_the_same_documents_in_another_order(data):
    cfg = config(epochs=3)
    shards, _ = simple.open_shards(f"{data}/train_*.bin", f"{data}/val_*.bin")
    docs = [tuple(doc[:-1]) for doc in simple.training_documents(cfg, shards[:1])]
    first, second, third = (docs[i * len(docs) // 3:(i + 1) * len(docs) // 3] for i in range(3))
    assert sorted(first) == sorted(second) == sorted(third)
    assert first != second != third != first


def test_validation_is_that_of_the_other_scripts(data):
    import train_gpt
    shards, _ = simple.open_shards(f"{data}/val_*.bin", f"{data}/val_*.bin")
    for length in (40, 512, 4096):
        cfg = config(val_tokens=1500, val_stream_tokens=length)
        mine, theirs = (script.validation_streams(cfg, shards) for script in (simple, train_gpt))
        assert len(mine) == len(theirs)
        for (inputs, targets), (wanted, wanted_targets) in zip(mine, theirs):
            counted = wanted_targets >= 0
            assert (targets == wanted_targets).all() and (inputs[counted] == wanted[counted]).all()


# -----------------------------------------------------------------------------
# Runs

@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folder of a finished run."""
    logs, patch = tmp_path_factory.mktemp("logs"), pytest.MonkeyPatch()
    patch.setattr(sys, "argv", ["train_gpt_simple.py", *flags(data, out_dir=logs, num_iterations=40)])
    assert simple.main() == 0
    patch.undo()
    return only_folder(logs)


def test_what_a_run_leaves_behind(finished):
    info, source = json.loads((finished / "run.json").read_text()), (ROOT / "train_gpt_simple.py").read_text()
    losses = [point["val_loss"] for point in info["val_losses"]]
    assert info["status"] == "finished" and len(losses) == 5 and losses[0] == pytest.approx(math.log(320), abs=0.02)
    assert losses[-1] < 3.2
    assert (finished / "train_gpt_simple.py").read_text() == source
    log = (finished / "log.txt").read_text()
    assert log.startswith(source) and len(re.findall(r"^step:\d+/40 train_loss:", log, re.M)) == 40
    assert not list(finished.rglob("*.tmp"))


def test_sample_reads_its_checkpoint(finished, capsys):
    checkpoint = finished / "checkpoint" / "step_000040"
    model, tokenizer, meta = sample.load_checkpoint(checkpoint, "cpu")
    assert meta["val_loss"] == json.loads((finished / "run.json").read_text())["val_losses"][-1]["val_loss"]
    prompt, engine = [BOS, *b"the old house "], sample.Engine(model, VOCAB, sample.Draw(0.0), 2, 64)
    drawn = [tokens[0] for tokens, _ in engine.steps([prompt], [(0, 0), (0, 1)], 20)]
    wanted = list(prompt)
    for _ in drawn:
        wanted.append(int(model(torch.tensor(wanted))[-1].argmax()))
    assert drawn == wanted[len(prompt):]
    assert sample.main([f"--checkpoint={finished}", "--prompt=the", "--max_tokens=5", "--threads=1"]) == 0
    assert capsys.readouterr().out.startswith("the")


def test_a_run_starts_from_the_weights_of_another(finished, data, run_main, tmp_path):
    """Named by its folder or its file; its first loss is the last one of that run."""
    wanted = json.loads((finished / "run.json").read_text())["val_losses"][-1]["val_loss"]
    folder = finished / "checkpoint" / "step_000040"
    for number, path in enumerate((folder, folder / "model.safetensors", finished)):
        logs = tmp_path / str(number)
        assert run_main(*flags(data, out_dir=logs, num_iterations=1, init_from=path)).code == 0
        info = json.loads((only_folder(logs) / "run.json").read_text())
        assert info["val_losses"][0]["val_loss"] == pytest.approx(wanted, abs=1e-6) and info["step"] == 1


def test_weights_that_do_not_fit_get_one_line(finished, data, refused, tmp_path):
    (tmp_path / "half.safetensors").write_bytes(b"\xff" * 100)
    folder = finished / "checkpoint" / "step_000040"
    for path, changes, word in ((tmp_path / "half.safetensors", {}, "half"), (tmp_path / "none", {}, "none"),
                                (folder, {"depth": 2, "model_dim": 32}, "blocks.2"),
                                (folder, {"model_dim": 64}, "embed"),
                                (folder, {"mlp": "swiglu"}, "fc.weight"), (folder, {"gate": "head"}, "gate")):
        refused(*flags(data, **changes), f"--init_from={path}", words=["--init_from", word])


def test_the_log_has_the_kurtosis_of_the_last_layer(finished):
    log = (finished / "log.txt").read_text().split("=" * 100)[1]
    lines = re.findall(r"^step:\d+/40 kurtosis:([\d.]+)$", log, re.M)
    assert len(lines) == 5 and all(1 < float(line) < 32 for line in lines)      # at most the number of channels
    model, tokens = moved(config()), stream(50, 30)
    x = model.trunk(tokens, simple.Stream(model.cfg, tokens)).double()
    wanted = ((x ** 4).mean(1) / (x ** 2).mean(1) ** 2).mean().item()
    assert model.kurtosis(tokens) == pytest.approx(wanted, rel=1e-3)


def test_evaluate_gets_the_loss_of_the_run(finished, capsys):
    assert evaluate.main([f"--checkpoint={finished}", "--tasks=val,bpb", "--threads=1"]) == 0
    out = capsys.readouterr().out
    scores = json.loads(out[out.index("{"):])["scores"]
    wanted = json.loads((finished / "run.json").read_text())["val_losses"][-1]["val_loss"]
    assert scores["val"]["loss"] == pytest.approx(wanted, abs=1e-4)
    assert 0 < scores["bpb"]["bpb"] < 8


def test_records_reads_its_run(finished):
    runs = sys.modules["runs"]
    curve = runs.read_run(finished).curve()
    assert curve[:, 0].tolist() == [0, 10, 20, 30, 40] and curve[-1, 2] == 40 * 512


def run_simple(argv):
    """What `python train_gpt_simple.py argv` does."""
    sys.argv = ["train_gpt_simple.py", *argv]
    return simple.main()


def test_two_ranks_do_what_one_does(data, tmp_path, start_ranks):
    losses = []
    for world_size in (1, 2):
        argv = flags(data, out_dir=tmp_path / str(world_size), num_iterations=3, val_every=0)
        assert join(start_ranks(world_size, run_simple, argv)) == [0] * world_size
        folder = only_folder(tmp_path / str(world_size))
        losses.append(re.findall(r"(?:train|val)_loss:([\d.]+)", (folder / "log.txt").read_text().split("=" * 100)[1]))
    one, two = ([float(loss) for loss in of_run] for of_run in losses)
    assert len(one) == 5 and two == pytest.approx(one, abs=2e-4)


def test_ctrl_c_saves_what_there_is(data, tmp_path, start_ranks):
    logs = tmp_path / "logs"
    process, = start_ranks(1, run_simple, flags(data, out_dir=logs, num_iterations=300, val_every=0))
    deadline = time.monotonic() + 60
    while not any("step:3/" in log.read_text() for log in logs.glob("*/log.txt")):
        assert process.is_alive() and time.monotonic() < deadline, process.output.read_text()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    assert join([process]) == [130]
    info = json.loads((only_folder(logs) / "run.json").read_text())
    model, _, meta = sample.load_checkpoint(sample.find_checkpoint(logs), "cpu")
    assert info["status"] == "interrupted" and meta["step"] == info["step"] >= 3 and meta["val_loss"] is None


def run_stuck(argv):
    """The same with a step that does not end; the file `stuck` says that it has begun."""
    def step(*_):
        Path(argv[0].partition("=")[2], "stuck").touch()
        while True:
            time.sleep(0.05)
    simple.training_step = step
    return run_simple(argv)


def test_a_second_signal_ends_a_step_that_takes_too_long(data, tmp_path, start_ranks):
    process, = start_ranks(1, run_stuck, [f"--out_dir={tmp_path}", *flags(data, num_iterations=3)])
    deadline = time.monotonic() + 60
    while not (tmp_path / "stuck").exists():
        assert process.is_alive() and time.monotonic() < deadline, process.output.read_text()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    process.join(0.3)
    assert process.is_alive()            # it would save after this step
    os.kill(process.pid, signal.SIGTERM)
    assert join([process]) == [-signal.SIGTERM]


def test_a_loss_that_is_not_finite_ends_the_run(data, run_main, tmp_path, monkeypatch):
    monkeypatch.setattr(simple, "training_step", lambda *_: torch.tensor([math.nan, 0.0]))
    done = run_main(*flags(data, out_dir=tmp_path))
    assert done.code == 3 and "train_loss of step 1 is nan" in done.err
    assert json.loads((only_folder(tmp_path) / "run.json").read_text())["status"] == "diverged"


@pytest.mark.parametrize("flag, word", [
    ("--mlp=gelu", "swiglu"), ("--depth=two", "--depth"), ("--windows=", "--windows"),
    ("--value_residual=1", "residual"), ("--lr=1", "--lr"), ("word", "word"), ("--preset=huge", "tiny"),
    ("--ratio=nan", "--ratio"), ("--ratio=-1", "--ratio"),
    ("--windows=4,-1", "--windows"), ("--head_dim=7", "--head_dim=7"), ("--model_dim=33", "--model_dim=33"),
    ("--batch_tokens=100", "--batch_tokens=100"), ("--val_tokens=999999", "--val_tokens="), ("--device=tpu", "tpu"),
    ("--attention=flex", "--attention=flex"), ("--lr_floor=2", "--lr_floor=2"), ("--cooldown=2", "--cooldown=2"),
    ("--num_iterations=100000", "--epochs="), ("--train_files=nowhere/*.bin", "nowhere"), ("--seed", "--seed"),
    ("--out_dir=/dev/null/x", "choose another")])
def test_a_bad_value_gets_one_line(flag, word, data, refused):
    refused(*flags(data), flag, words=[word])


def test_configs_of_checkpoints_are_checked():
    good = json.loads(json.dumps(dataclasses.asdict(config(out_dir='a "b" [c], d'))))
    assert simple.config_from_dict(good) == config(out_dir='a "b" [c], d')
    for bad in ({}, [], good | {"more": 1}, good | {"depth": "x"}, good | {"depth": None}, good | {"windows": []},
                good | {"epochs": 1.5}, good | {"softcap": math.nan}):
        with pytest.raises(simple.UserError):
            simple.config_from_dict(bad)


def test_help_shows_the_fields(run_main):
    done = run_main("--help")
    assert not done.code
    assert all(f"    {field.name}: " in done.out for field in dataclasses.fields(simple.Hyperparameters))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_time_of_a_step_is_measured_and_nothing_is_kept(data, fast_run, tmp_path):
    small = [flag for flag in flags(data, pack_tokens=128, batch_tokens=128, depth=1) if "num_iterations" not in flag]
    tool = [sys.executable, ROOT / "dev/profile_plain.py", ROOT / "train_gpt_simple.py"]
    done = fast_run([*tool, *small], cwd=tmp_path, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    step, loader, training = map(float, re.findall(r"^ +([\d.]+) ms ", done.stdout, re.M))
    assert step > training > loader > 0 and not list(tmp_path.iterdir())
    for flag, words in (("--num_iterations=65", "=65 are too few steps; use 66"), ("--typo=1", "--typo"),
                        ("--model_dim=4000000", "to allocate")):
        done = fast_run([*tool, *small, flag], cwd=tmp_path, text=True)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    notes = tmp_path / "notes.txt"
    notes.write_text("no script")
    for script, words in ((notes, "is not a Python file"), (ROOT / "sample.py", "has no make_optimizers")):
        done = fast_run([*tool[:2], script], cwd=tmp_path, text=True)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_kernels_are_added_up_by_name_and_by_kind(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "dev")
    profile_step = importlib.import_module("profile_step")
    kinds = torch.autograd.DeviceType
    events = [SimpleNamespace(name=name, device_type=kind, self_device_time_total=us) for name, kind, us in (
        ("nvjet_a", kinds.CUDA, 3000.0), ("nvjet_a", kinds.CUDA, 1000.0), ("triton_b", kinds.CUDA, 500.0),
        ("aten::mm", kinds.CPU, 9000.0))]
    found, kernels = profile_step.add_up(SimpleNamespace(events=lambda: events), steps=2)
    assert found == {"matrix products": 2.0, "elementwise and reductions": 0.25}
    profile_step.show_kernels(kernels)
    assert capsys.readouterr().out == "    2.000 ms     1.0 x  nvjet_a\n    0.250 ms     0.5 x  triton_b\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_of_a_step_are_listed(data, tmp_path):
    small = flags(data, num_iterations=70, pack_tokens=128, batch_tokens=128, depth=1, device="cuda", precision="bf16",
                  head_dim=16)
    done = subprocess.run([sys.executable, ROOT / "dev/profile_plain.py", ROOT / "train_gpt_simple.py", *small],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^ +[\d.]+ ms  kernels: ", done.stdout, re.M) and " x  " in done.stdout


@pytest.mark.parametrize("name", ["train_gpt_simple", "train_gpt_long"])
def test_the_printed_command_can_be_pasted(name, data, run_main, tmp_path):
    module, logs = importlib.import_module(name), tmp_path / "my logs"
    more = {"windows": (8, 24), "far_period": 0} if name == "train_gpt_long" else {}
    done = run_main(*flags(data, num_iterations=1, batch_tokens=128, depth=2, out_dir=logs, **more), module=module)
    assert done.code == 0, done.err
    assert shlex.split(done.out.splitlines()[-1])[1:] == [
        "python", "sample.py", f"--checkpoint={only_folder(logs)}/checkpoint/step_000001"]
