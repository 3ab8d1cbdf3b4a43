"""Which attention and kernels a run uses: what a probe notices, which backend is chosen, what lists of documents need.

Against: planted backends that are wrong, die, hang or are slow; a variable-length attention written out document by
document. The GPU part (skipped without CUDA) tries every backend on this device.
Run: python -m pytest tests/test_backends.py
"""
import io
import json
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sample
import train_gpt
from conftest import BOS, ROOT, VOCAB, write_shard
from train_gpt import ALLOWED, UserError
from train_gpt import PRESETS, with_plain, with_varlen

CPU, SCRIPT = torch.device("cpu"), ROOT / "train_gpt.py"
probe = partial(train_gpt.probe, train_gpt.probe_case)
ALLOWED["plain"] = 0.0                    # these tests try it, too
TINY = replace(PRESETS["tiny"], vocab_size=VOCAB, bos_id=BOS, device="cpu", attention="plain")


def varlen_by_hand(q, k, v, begins, begins_k, longest, longest_k, scale, window_size):
    """What torch's variable-length attention does, for (T, H, D) on the CPU."""
    assert begins is begins_k and begins.dtype == torch.int32 and longest == longest_k and window_size[1] == 0
    parts = []
    for begin, end in zip(begins.tolist(), begins.tolist()[1:]):
        if begin == end:
            continue
        assert end - begin <= longest and q.shape == k.shape == v.shape
        index = torch.arange(end - begin)
        distance = index[:, None] - index
        mask = (distance >= 0) & (distance <= window_size[0])
        q_, k_, v_ = (x[begin:end].transpose(0, 1) for x in (q, k, v))
        parts.append(F.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask, scale=scale).transpose(0, 1))
    return torch.cat(parts)


# -----------------------------------------------------------------------------
# What a probe notices

@pytest.mark.parametrize("qk_dim", [0, 24])
def test_a_right_backend_is_right(monkeypatch, qk_dim):
    cfg = replace(TINY, qk_dim=qk_dim)
    assert probe(cfg, "plain", CPU)[0] == 0
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_hand)
    error, seconds = probe(cfg, "varlen", CPU)
    assert error < 1e-5 and seconds > 0


class BadGradient(torch.autograd.Function):
    """The identity, with a gradient that is 10 % too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.1 * grad


def unequal(change_output=lambda y: y, change_input=lambda x: x, change_window=0):
    """A backend as with_plain but for what is changed."""
    def backend(starts, window, *rest):
        attend = with_plain(starts, window + change_window, *rest)
        return lambda q, k, v: change_output(attend(q, change_input(k), v))
    return backend


@pytest.mark.parametrize("backend, worst", [
    (unequal(lambda y: 1.05 * y), 0.06), (unequal(change_input=BadGradient.apply), 0.11),
    (unequal(lambda y: torch.where(torch.arange(len(y))[:, None, None] == 7, torch.nan, y)), float("inf")),
    (unequal(change_window=-40), 1.0), (lambda starts, *rest: with_plain(torch.zeros_like(starts), *rest), 1.0)],
    ids=["scale", "gradient", "one nan", "window", "documents"])
def test_a_wrong_backend_is_noticed(monkeypatch, backend, worst):
    monkeypatch.setitem(train_gpt.ATTENTION, "varlen", backend)
    error, _ = probe(replace(TINY, pack_tokens=4096), "varlen", CPU)
    assert ALLOWED["varlen"] < error <= worst


@pytest.fixture
def deadly_script(tmp_path):
    """A copy of train_gpt.py in which trying varlen ends the process."""
    text, harness_text = SCRIPT.read_text(), (ROOT / "harness.py").read_text()
    (tmp_path / "harness.py").write_text(harness_text.replace("\nALLOWED = {", '\nALLOWED = {"plain": 0.0, '))
    head = "def with_varlen(starts_T: Tensor, window: int, longest: int, max_doc_tokens: int):\n"
    assert text.count(head) == 1
    path = tmp_path / "train-1.2 copied.py"         # as someone may call an idea
    path.write_text(text.replace(head, head + "    import os\n    os.abort()\n"))
    return sample.import_script(path)


def test_a_backend_that_dies_leaves_the_others(deadly_script, fast_run, monkeypatch):
    monkeypatch.setattr(train_gpt.subprocess, "run", fast_run)         # test_harness.py has the process as it is
    cfg = deadly_script.config_from_dict(asdict(TINY))
    found = train_gpt.try_backends(deadly_script.SCRIPT, cfg, ["varlen", "plain"], CPU)
    assert list(found) == ["varlen", "plain"] and found["plain"]["fault"] == "" and found["plain"]["seconds"] > 0
    assert found["varlen"]["fault"] == "its process ended with exit code -6"


def test_a_backend_that_hangs_leaves_the_others(monkeypatch):
    def run(words, input, timeout, **rest):
        names = json.loads(input)["names"]
        right = f'hint\n{{"backend": "{names[0]}", "fault": "", "error": 0.0, "seconds": 1.0}}\n'
        if len(names) > 1:               # the first gets through, the second hangs
            raise subprocess.TimeoutExpired(words, timeout, right.encode())
        return subprocess.CompletedProcess(words, 0, right)
    monkeypatch.setattr(train_gpt.subprocess, "run", run)
    found = train_gpt.try_backends(SCRIPT, TINY, ["flex", "varlen", "plain"], CPU)
    assert {name: result["fault"] for name, result in found.items()} == {
        "flex": "", "varlen": f"no result within {train_gpt.PROBE_SECONDS} s", "plain": ""}


def out_of_memory(*_):
    raise RuntimeError("out of\nshared memory")


@pytest.mark.parametrize("backend, fault", [
    (out_of_memory, "RuntimeError: out of shared memory"), (unequal(lambda y: 2 * y), "wrong by 1")])
def test_why_a_backend_is_not_used(monkeypatch, capsys, backend, fault):
    monkeypatch.setitem(train_gpt.ATTENTION, "varlen", backend)
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(
        {"config": asdict(TINY), "names": ["varlen", "plain"], "device": "cpu"})))
    train_gpt.probe_all(train_gpt)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["backend"], line["fault"]) for line in lines] == [("varlen", fault), ("plain", "")]


# -----------------------------------------------------------------------------
# What is chosen

GPU = SimpleNamespace(device=torch.device("cuda", 0), rank=0, world_size=1, name="a GPU")
ALL = replace(PRESETS["speedrun"], vocab_size=50304, bos_id=50256)


def choose(monkeypatch, cfg, ms, faulty=()):
    """choose_backends, with these milliseconds for backends that are right; and the names that it tried."""
    tried = []

    def fake(script, cfg, names, device):
        tried.extend(names)
        return {name: {"fault": "" if name in ms or name not in faulty and name not in train_gpt.ATTENTION else "bad",
                       "error": 0.01, "seconds": ms.get(name, 1) / 1000} for name in names}
    monkeypatch.setattr(harness, "try_backends", fake)
    return *train_gpt.choose_backends(SCRIPT, cfg, GPU), tried


@pytest.mark.parametrize("ms, best", [
    ({"flex": 2, "flex_small": 3, "varlen": 4}, "flex"), ({"flex_small": 3, "varlen": 4}, "flex_small"),
    ({"varlen": 4}, "varlen"), ({"flex": 2, "flex_small": 1.9, "varlen": 1.7}, "flex"),
    ({"flex": 2, "varlen": 1.2}, "varlen"), ({}, "plain")])
def test_the_fastest_right_attention_is_used(monkeypatch, ms, best):
    cfg, lines, tried = choose(monkeypatch, ALL, ms)
    assert cfg.attention == best and tried[:3] == ["flex", "flex_small", "varlen"]
    assert lines[-1].startswith(f"used: {best} attention, kernels, float8; found out in ")
    for name in tried[:3]:
        assert any(line.startswith(f"{name}: " + ("right to 0.01" if name in ms else "bad")) for line in lines)


@pytest.mark.parametrize("name", ["flex", "flex_small", "varlen", "fa3"])
def test_a_forced_attention_is_used_or_refused(monkeypatch, name):
    with pytest.raises(UserError, match=f"--attention={name} does not work here \\(bad\\); use --attention=auto"):
        choose(monkeypatch, replace(ALL, attention=name), {})
    cfg, _, tried = choose(monkeypatch, replace(ALL, attention=name), {name: 50})
    assert cfg.attention == name and not set(tried) & (set(train_gpt.ATTENTION) - {name})


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", lambda name: None)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))


def test_what_was_found_is_remembered_until_something_changes(monkeypatch):
    ms = {"flex": 2, "flex_small": 3, "varlen": 4}
    first, lines, tried = choose(monkeypatch, ALL, ms)
    _, again, tried_again = choose(monkeypatch, replace(ALL, seed=1), {})
    assert tried and not tried_again
    assert [line.split("; found out in")[0] for line in again] == [line.split("; found out in")[0] for line in lines]
    for change in ({"pack_tokens": 8192}, {"float8": False}, {"sampled_vocab": 20_000}):
        assert choose(monkeypatch, replace(ALL, **change), ms)[2]
    monkeypatch.setattr(GPU, "name", "another GPU")
    assert choose(monkeypatch, ALL, ms)[2]
    monkeypatch.setattr(torch, "__version__", "2.99")
    assert choose(monkeypatch, ALL, ms)[2]


@pytest.mark.parametrize("content", ["{}", "[]", "x", '{"flex": 1}', "null", '{"flex": {"fault": ""}}'])
def test_a_damaged_memory_is_no_memory(monkeypatch, tmp_path, content):
    ms = {"flex": 2, "flex_small": 3, "varlen": 4}
    choose(monkeypatch, ALL, ms)
    path, = (tmp_path / "compiled").glob("backends_*.json")
    whole = json.loads(path.read_text())
    for damaged in (content, json.dumps(whole | {"flex": 1}), json.dumps(whole | {"flex": {"fault": ""}})):
        path.write_text(damaged)
        cfg, _, tried = choose(monkeypatch, ALL, ms)
        assert cfg.attention == "flex" and tried


def test_a_fault_is_looked_at_again_next_time(monkeypatch):
    assert choose(monkeypatch, ALL, {"flex": 2, "varlen": 4})[0].attention == "flex"
    assert choose(monkeypatch, ALL, {"flex": 2, "flex_small": 1, "varlen": 4})[0].attention == "flex_small"


def test_streams_of_odd_lengths_and_those_who_want_it_take_plain_attention(monkeypatch):
    for change in ({"pack_tokens": 1000}, {"attention": "plain"}):
        cfg, _, tried = choose(monkeypatch, replace(ALL, **change), {"flex": 1})
        assert cfg.attention == "plain" and not set(tried) & set(train_gpt.ATTENTION)


@pytest.mark.parametrize("faulty, kernels, float8", [
    ((), True, True), (("head_loss",), False, False), (("float8_head_loss",), True, False),
    (("float8_linear",), True, False), (("float8_mlp",), True, False)])
def test_faulty_kernels_are_not_used(monkeypatch, faulty, kernels, float8):
    cfg, lines, _ = choose(monkeypatch, ALL, {"flex": 2}, faulty)
    assert (cfg.kernels, cfg.float8) == (kernels, float8)
    assert all(f"{name}: bad" in lines for name in faulty)


@pytest.mark.parametrize("flags, tried", [
    ({"kernels": False, "float8": False}, []), ({"float8": False}, ["head_loss"])])
def test_what_is_switched_off_is_not_tried(monkeypatch, flags, tried):
    assert choose(monkeypatch, replace(ALL, attention="flex", **flags), {"flex": 2})[2] == ["flex", *tried]


def test_without_a_gpu_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(harness, "try_backends", None)
    assert train_gpt.choose_backends(SCRIPT, TINY, train_gpt.Machine(CPU, 0, 1, "cpu")) == (TINY, [])


# -----------------------------------------------------------------------------
# Lists of documents

@pytest.fixture
def short_documents(tmp_path):
    """A shard of documents of 1 to 40 tokens, then of some long ones."""
    lengths = [*np.random.default_rng(0).integers(1, 40, 3000), 500, 700, 900]
    tokens = np.concatenate([[BOS, *np.full(length, 5)] for length in lengths])
    return train_gpt.read_header(write_shard(tmp_path / "a.bin", tokens))


@pytest.mark.parametrize("attention", ["varlen", "fa3", "plain"])
def test_documents_of_every_stream_fit_the_list(short_documents, attention):
    cfg = replace(TINY, attention=attention, num_iterations=3, val_tokens=50_000)
    streams = train_gpt.validation_streams(cfg, [short_documents])
    assert sum(int((targets >= 0).sum()) for _, targets in streams) == cfg.val_tokens
    streams += [batch for batches, _ in train_gpt.training_batches(cfg, [short_documents], 0, 1, 2)
                for batch in batches]
    fits = []
    for inputs, _ in streams:
        begins = np.flatnonzero(inputs == BOS)
        listed = train_gpt.list_documents(train_gpt.Stream(train_gpt_model(cfg), torch.from_numpy(inputs)).doc_start)
        assert len(listed) == len(inputs) // 32 + 1 and listed[-1] == len(inputs)
        rest = len(listed) - len(begins)
        fits.append(rest > 0 and listed.tolist() == [*begins, *[len(inputs)] * rest])
    assert all(fits) == (attention != "plain")


def train_gpt_model(cfg):
    """What a Stream asks of a model."""
    return SimpleNamespace(cfg=cfg, attention_windows=lambda starts, longest: {})


def test_the_model_gives_the_same_logits_with_varlen_attention(monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_hand)
    model = train_gpt.GPT(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(0, 256, (384,), generator=torch.Generator().manual_seed(0))
    tokens[[0, 100, 101, 250]] = BOS
    results = []
    for attention in ("plain", "varlen"):
        model.cfg = replace(TINY, attention=attention)
        loss = model(tokens, tokens.roll(-1), torch.tensor([1, 0.5, 0.25, 0]))
        loss.backward()
        results.append([loss.detach(), *(param.grad.clone() for param in model.parameters())])
        model.zero_grad()
    for mine, other in zip(*results, strict=True):
        assert (mine - other).norm() <= 1e-4 * mine.norm()


# -----------------------------------------------------------------------------
# Memory

def plan(monkeypatch, cfg, gigabytes, world_size=1):
    """memory_plan for a card of that size."""
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(
        total_memory=2e9 * gigabytes))
    machine = train_gpt.Machine(torch.device("cuda", 0), 0, world_size, "a GPU")
    return train_gpt.memory_plan(cfg, machine, 32_768 if cfg.kernels else train_gpt.HEAD_CHUNK)


SINGLE = replace(PRESETS["single"], vocab_size=50304, bos_id=50256)


@pytest.mark.parametrize("cfg, micro_batch, world_size, measured", [
    (ALL, 131_072, 1, 52.2), (ALL, 32_768, 1, 22.5), (ALL, 16_384, 1, 15.0), (ALL, 32_768, 4, 19.0),
    (SINGLE, 32_768, 1, 16.2), (replace(ALL, kernels=False, float8=False), 32_768, 1, 22.9)])
def test_the_memory_plan_is_what_was_measured_or_a_little_more(monkeypatch, cfg, micro_batch, world_size, measured):
    """GiB on H200s, torch 2.11, as README.md has them and rows 28 and 67 of dev/EXPERIMENTS.md."""
    cfg = replace(cfg, stages=tuple(replace(stage, batch_tokens=micro_batch * world_size) for stage in cfg.stages))
    _, slots, _, sentence = plan(monkeypatch, cfg, 150, world_size)
    assert slots * cfg.pack_tokens == micro_batch
    assert measured - 0.1 < float(sentence.split(" = ")[1].split()[0]) < measured + 1.8


@pytest.mark.parametrize("gigabytes, slots, host_state", [(16, 1, True), (24, 1, False), (40, 4, False),
                                                          (80, 8, False), (141, 8, False)])
def test_the_micro_batch_follows_the_card(monkeypatch, gigabytes, slots, host_state):
    cfg, found, _, sentence = plan(monkeypatch, ALL, gigabytes)
    assert (found, cfg.host_state) == (slots, host_state) and ("host memory" in sentence) == host_state
    assert replace(cfg, host_state=False) == ALL


@pytest.mark.parametrize("gigabytes, world_size, changes, replays", [
    (80, 8, {}, True), (80, 4, {}, False), (80, 4, {"graph_tokens": 32_768}, True), (24, 8, {}, False),
    (80, 8, {"graph_tokens": 0}, False), (80, 8, {"attention": "varlen"}, False), (80, 8, {"compile": False}, False)])
def test_small_micro_batches_become_graphs(monkeypatch, gigabytes, world_size, changes, replays):
    cfg = replace(ALL, **{"attention": "flex", "graph_tokens": 16_384} | changes)
    *_, found, sentence = plan(monkeypatch, cfg, gigabytes, world_size)
    assert found == replays == ("CUDA graphs" in sentence)


def test_a_card_that_is_too_small_gets_a_value_to_try(monkeypatch):
    with pytest.raises(UserError, match="try --pack_tokens=4096"):
        plan(monkeypatch, ALL, 8)
    cfg, slots, *_ = plan(monkeypatch, replace(ALL, pack_tokens=4096), 8)
    assert slots == 1 and cfg.host_state
    with pytest.raises(UserError, match="take a larger GPU"):
        plan(monkeypatch, ALL, 2)


@pytest.mark.parametrize("flag, tokens, advice", [
    ("micro_batch_tokens", 5 * 16_384, "--micro_batch_tokens=32768"),
    ("micro_batch_tokens", 16_384, "--pack_tokens=8192"),
    ("val_stream_tokens", 131_072, "--val_stream_tokens=65536")])
def test_an_error_for_want_of_memory_names_a_flag_and_a_value(flag, tokens, advice):
    with pytest.raises(train_gpt.RankError) as error, train_gpt.memory_advice(ALL, flag, tokens):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
    assert str(error.value) == f"{tokens} tokens at a time do not fit (CUDA out of memory); try {advice}"


def test_training_and_validation_give_this_advice():
    def model(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")
    batch = np.zeros(TINY.val_stream_tokens, np.int32), np.zeros(TINY.val_stream_tokens, np.int64)
    machine, optimizer = train_gpt.Machine(CPU, 0, 1, "cpu"), SimpleNamespace(model=SimpleNamespace(cfg=TINY))
    with pytest.raises(train_gpt.RankError, match="try --val_stream_tokens=4096"):
        train_gpt.validate(model, TINY, [batch], machine)
    with pytest.raises(train_gpt.RankError, match="try --micro_batch_tokens=4096"):
        train_gpt.training_step(train_gpt.Backward(model), optimizer, [batch], 0, machine)


# -----------------------------------------------------------------------------
# On a GPU

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@cuda
def test_on_this_gpu_the_fast_backends_are_right():
    machine = train_gpt.Machine(torch.device("cuda", 0), 0, 1, torch.cuda.get_device_name())
    cfg, lines = train_gpt.choose_backends(SCRIPT, ALL, machine)
    print("\n".join(lines))
    assert cfg.attention != "plain" and cfg.kernels, lines
    assert cfg.float8 == (torch.cuda.get_device_capability() >= (8, 9)), lines
