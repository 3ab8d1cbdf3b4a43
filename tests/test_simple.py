"""train_gpt_simple.py: its model, its ideas to try, its dial, and the folder that it leaves behind.

Against: documents run one by one, forward for decode, two ranks for one, the rules of nanochat's depth dial, and the
tools that read a run: sample.py, evaluate.py, records.py compare. Run: python -m pytest tests/test_simple.py
"""
import ast
import json
import math
import re
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from conftest import BOS, ROOT, VOCAB, as_flags, assert_close, join, only_folder

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
    cfg = replace(simple.PRESETS["tiny"], **{name: value for name, value in SMALL.items() if name != "preset"} | changes)
    return replace(cfg, vocab_size=VOCAB, bos_id=BOS, compile=False, attention=changes.get("attention", "plain"))


def moved(cfg):
    """A model with every parameter away from its initial value."""
    model, generator = simple.GPT(cfg).requires_grad_(False), torch.Generator().manual_seed(1)
    for param in model.parameters():
        param += 0.1 * torch.randn(param.shape, generator=generator)
    return model


def stream(*lengths):
    """Documents of random tokens, one after the other."""
    rng = np.random.default_rng(0)
    return torch.cat([torch.tensor([BOS, *rng.integers(0, 256, length - 1)]) for length in lengths])


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


def test_flex_attention_sees_what_plain_attention_sees():
    tokens, cfg = stream(100, 156), config(windows=(40, 0))
    plain, flex = moved(cfg), moved(replace(cfg, attention="flex"))
    assert_close(flex(tokens), plain(tokens), 1e-3)


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


def test_an_idea_is_one_field_and_few_lines():
    """At most three places outside the dataclass, its limits and the presets."""
    tree = ast.parse((ROOT / "train_gpt_simple.py").read_text())
    names = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and "cfg" in ast.unparse(node.value)]
    assert {name: names.count(name) for name in IDEAS if not 1 <= names.count(name) <= 3} == {}


def test_seesaw_reads_the_same_tokens_in_fewer_steps():
    cfg = config(num_iterations=100, schedule="seesaw")
    rows, cosine = simple.plan(cfg), simple.plan(replace(cfg, schedule="cosine"))
    assert sum(tokens for _, tokens in rows) == sum(tokens for _, tokens in cosine) == 100 * 512
    assert cfg.total_steps == len(rows) < 100 == len(cosine)
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
    """RMS of the logits and of what the blocks added, after ten steps on the same text."""
    cfg = config(model_dim=width, head_dim=16, depth=2, width_rule=rule, num_iterations=10)
    model, tokens = simple.GPT(cfg), stream(256)
    optimizers, machine = simple.make_optimizers(model), simple.Machine(torch.device("cpu"), 0, 1, "cpu")
    pack = tokens.numpy().astype(np.int32), tokens.roll(-1).numpy()
    for step in range(10):
        simple.training_step(model, optimizers, [pack] * 4, step, cfg, machine, False)
    outputs = []
    hook = model.blocks[-1].register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
    with torch.no_grad():
        logits = model(tokens)
        added = outputs[0] - model.embed(tokens)
    hook.remove()
    return [x.square().mean().sqrt().item() for x in (added, logits - logits.mean(1, keepdim=True))]
