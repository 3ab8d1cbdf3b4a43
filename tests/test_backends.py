"""Which attention and kernels a run uses, how large its micro-batches are, and where the optimizer keeps its state.

Against: planted attention backends and kernels that are wrong or do not run, copies of the script in which somebody
edited what a kernel computes, and a stand-in for a GPU of any size. The last part uses this GPU (skipped without CUDA).
Run: python -m pytest tests/test_backends.py
"""
import importlib.util
import json
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import BOS, SMALL_LAYERS, VOCAB, small_flags

import train_gpt
from train_gpt import PRESETS, Machine, UserError, with_plain

CPU = Machine(torch.device("cpu"), 0, 1, "cpu")
GPU = Machine(torch.device("cuda", 0), 0, 1, "a GPU")
TINY = replace(PRESETS["tiny"], vocab_size=VOCAB, bos_id=BOS, device="cpu", attention="plain")
ALL = replace(PRESETS["speedrun"], vocab_size=50304, bos_id=50256)
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


# -----------------------------------------------------------------------------
# What is found out about an attention backend

@pytest.fixture
def fault(monkeypatch):
    """Function of a backend that returns what try_attention says of it, uncompiled on the CPU."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)

    def run(backend, **changes):
        monkeypatch.setitem(train_gpt.ATTENTION, "flex", backend)
        return train_gpt.try_attention(replace(TINY, **changes), "flex", CPU.device)
    return run


class BadGradient(torch.autograd.Function):
    """The identity, with a gradient that is 10 % too large, or NaN."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.factor * grad, None


def unequal(output=lambda y: y, key=lambda k: k, window_change=0):
    """A backend as with_plain but for what is changed."""
    def backend(doc_start, window, longest):
        attend = with_plain(doc_start, int(window) + window_change, longest)
        return lambda q, k, v: output(attend(q, key(k), v))
    return backend


@pytest.mark.parametrize("changes", [{}, {"qk_dim": 24}, {"precision": "bf16"}])
def test_a_right_backend_has_no_fault(fault, changes):
    assert fault(unequal(), **changes) == ""


@pytest.mark.parametrize("backend", [
    unequal(lambda y: 1.05 * y), unequal(key=lambda k: BadGradient.apply(k, 1.1)),
    unequal(lambda y: torch.where(torch.arange(len(y))[:, None, None] == 7, torch.nan, y)),
    unequal(key=lambda k: BadGradient.apply(k, torch.nan)), unequal(window_change=-20),
    lambda doc_start, window, longest: with_plain(torch.zeros_like(doc_start), int(window), longest)],
    ids=["scale", "gradient", "one nan", "nan gradient", "window", "documents"])
def test_a_wrong_backend_is_noticed(fault, backend):
    assert fault(backend).startswith("wrong by ")


def test_a_backend_that_does_not_run_has_its_error_as_fault(fault):
    def backend(*_):
        raise RuntimeError("out of\nshared memory")
    assert fault(backend) == "RuntimeError: out of shared memory"


# -----------------------------------------------------------------------------
# Which attention is chosen

@pytest.fixture
def choose(monkeypatch):
    """Function of the backends that are right, that returns the chosen one, the lines and the names that were tried."""
    def run(right, cfg=ALL, machine=GPU):
        tried = []

        def try_attention(cfg, name, device):
            tried.append(name)
            return "" if name in right else f"{name} is bad"
        monkeypatch.setattr(train_gpt, "try_attention", try_attention)
        cfg, lines = train_gpt.choose_attention(cfg, machine)
        return cfg.attention, lines, tried
    return run


@pytest.mark.parametrize("right, chosen, tried", [
    ({"flex", "flex_small"}, "flex", ["flex"]), ({"flex_small"}, "flex_small", ["flex", "flex_small"]),
    (set(), "plain", ["flex", "flex_small"])])
def test_the_first_right_attention_is_used_and_faults_are_named(choose, right, chosen, tried):
    found, lines, names = choose(right)
    assert (found, names) == (chosen, tried)
    for name, line in zip(tried, lines):
        assert line == f"{name} attention " + ("is right on this device" if name in right
                                               else f"does not work here: {name} is bad")
    assert lines[len(tried):] == ["used: plain attention"] * (chosen == "plain")


@pytest.mark.parametrize("name", ["flex", "flex_small"])
def test_a_forced_attention_is_used_or_refused(choose, name):
    assert choose({name}, replace(ALL, attention=name))[::2] == (name, [name])
    with pytest.raises(UserError) as error:
        choose({"flex", "flex_small"} - {name}, replace(ALL, attention=name))
    assert str(error.value) == f"--attention={name} does not work here ({name} is bad); use --attention=auto"


def test_a_backend_must_be_right_on_all_ranks(choose, monkeypatch):
    monkeypatch.setattr(train_gpt, "all_gather_object", lambda machine, fault: [fault, "bad there"])
    assert choose({"flex", "flex_small"}) == ("plain", ["flex attention does not work here: bad there", mock.ANY,
                                                        "used: plain attention"], ["flex", "flex_small"])


@pytest.mark.parametrize("changes", [{"attention": "plain"}, {"pack_tokens": 1000}, {"val_stream_tokens": 1000}])
def test_plain_attention_and_odd_lengths_need_no_trial(choose, changes):
    assert choose({"flex"}, replace(ALL, **changes)) == ("plain", [], [])


def test_without_a_gpu_nothing_is_tried(choose):
    assert choose({"flex"}, TINY, CPU) == choose({"flex"}, replace(TINY, attention="auto"), CPU) == ("plain", [], [])


@pytest.mark.parametrize("changes, machine", [
    ({}, CPU), ({"pack_tokens": 1000}, GPU), ({"val_stream_tokens": 1000}, GPU)])
def test_a_forced_attention_that_cannot_be_is_refused(choose, changes, machine):
    with pytest.raises(UserError, match="--attention=flex_small needs a CUDA device, and multiples of 128 for "
                                        "--pack_tokens=.*; use --attention=plain"):
        choose({"flex_small"}, replace(ALL, attention="flex_small", **changes), machine)


# -----------------------------------------------------------------------------
# Kernels

@pytest.mark.parametrize("changes, capability, precision, expected", [
    ({}, (9, 0), "bf16", (True, True)), ({}, (8, 9), "bf16", (True, True)), ({}, (8, 6), "bf16", (True, False)),
    ({"vocab_multiple": 1}, (9, 0), "bf16", (True, False)), ({}, (9, 0), "fp32", (False, False)),
    ({"float8": False}, (9, 0), "bf16", (True, False)), ({"kernels": False}, (9, 0), "bf16", (False, False))])
def test_what_the_device_and_the_flags_allow(monkeypatch, changes, capability, precision, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(train_gpt, "triton_kernels", mock.MagicMock())
    shard = train_gpt.Shard("a.bin", 1000, 50257, 50256, 2, "", 0)
    cfg = train_gpt.resolve_config(replace(PRESETS["speedrun"], precision=precision, **changes), GPU, shard)
    assert (cfg.kernels, cfg.float8) == expected
    names = set(train_gpt.fused_kernels(cfg))
    assert names == ({"head_loss"} if expected[0] else set()) | ({"linear", "mlp"} if expected[1] else set())


def test_without_the_kernels_file_or_a_gpu_there_are_none(monkeypatch):
    shard = train_gpt.Shard("a.bin", 1000, 50257, 50256, 2, "", 0)
    monkeypatch.setattr(train_gpt, "triton_kernels", None)
    on_gpu = train_gpt.resolve_config(PRESETS["speedrun"], GPU, shard)
    on_cpu = train_gpt.resolve_config(PRESETS["speedrun"], CPU, shard)
    assert (on_gpu.kernels, on_gpu.float8, on_gpu.compile) == (False, False, True)
    assert (on_cpu.kernels, on_cpu.float8, on_cpu.compile) == (False, False, False)
    assert train_gpt.fused_kernels(PRESETS["speedrun"]) == {}


@pytest.fixture(scope="module")
def triton_kernels():
    """The module; where there is no Triton, with stand-ins for it, as nothing here runs a kernel."""
    if importlib.util.find_spec("triton"):
        return importlib.import_module("triton_kernels")
    names = ("triton", "triton.language", "triton.tools", "triton.tools.tensor_descriptor")
    stand_in = mock.MagicMock()
    stand_in.jit = lambda function: function
    with mock.patch.dict(sys.modules, dict.fromkeys(names, stand_in)):      # which is as before afterwards
        return importlib.import_module("triton_kernels")


class OnCuda(torch.Tensor):
    """A tensor that says it is on a GPU; what is computed from it is an ordinary one."""
    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl


@pytest.fixture
def check(monkeypatch, triton_kernels):
    """Function of a script and its kernels that runs check_kernels as on a GPU; returns its line and what is left."""
    def run(module, kernels):
        monkeypatch.setattr(module, "triton_kernels", triton_kernels)
        on_cpu = module.to_device
        monkeypatch.setattr(module, "to_device", lambda batch, device: tuple(
            tensor.as_subclass(OnCuda) for tensor in on_cpu(batch, device)))
        cfg = replace(TINY, model_dim=48, head_dim=12, mlp_dim=96, bigram_rows=101,
                      layers=tuple(train_gpt.Layer(**row) for row in SMALL_LAYERS))
        model = module.GPT(module.config_from_dict(json.loads(json.dumps(asdict(cfg)))))
        model.kernels = dict(kernels)
        line = module.check_kernels(model, module.Machine(torch.device("cpu"), 0, 1, "cpu"))
        return line, model.kernels
    return run


def kernels_of(script):
    """Stand-ins for the kernels: they compute what the functions of an unedited script do."""
    return {"head_loss": script.head_loss, "linear": F.linear, "mlp": script.mlp}


def test_right_kernels_are_used(script, check):
    line, left = check(script, kernels_of(script))
    assert line == "kernels that are right on this device: head_loss, linear, mlp" and left == kernels_of(script)


def test_a_kernel_that_does_not_run_here_is_not_used(script, check):
    def broken(*_):
        raise RuntimeError("no such\ninstruction")
    line, left = check(script, kernels_of(script) | {"mlp": broken})
    assert line == ("kernels that are right on this device: head_loss, linear; "
                    "mlp does not run here (RuntimeError: no such instruction)")
    assert left.keys() == {"head_loss", "linear"}


@pytest.mark.parametrize("name, old, new", [
    ("mlp", "return F.linear(u_TC, up_FC).relu().square() @ down_FC", "return F.gelu(F.linear(u_TC, up_FC)) @ down_FC"),
    ("mlp", ".relu().square() @ down_FC", ".relu().square() @ down_FC * 1.5"),
    ("head_loss", "return HeadLoss.apply(", "return 0.9 * HeadLoss.apply("),
    ("head_loss", "LOGIT_SCALE, LOGIT_SHIFT, LOGIT_WIDTH = 23.0", "LOGIT_SCALE, LOGIT_SHIFT, LOGIT_WIDTH = 30.0"),
])
def test_an_edited_function_is_never_ignored_by_its_kernel(script, edited, check, name, old, new):
    module = edited((old, new))
    with pytest.raises(module.UserError) as error:
        check(module, kernels_of(script))
    assert f"the kernel of {name} (triton_kernels.py)" in str(error.value)
    assert "my_idea.py" in str(error.value) and "--kernels=false" in str(error.value)


# -----------------------------------------------------------------------------
# Memory

@pytest.fixture
def card(monkeypatch):
    """Function that makes the GPU one of so many bytes, of which this process may use half."""
    def make(size):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.5)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2 * size))
    return make


@pytest.fixture
def micro_batch(monkeypatch, card):
    """Function that returns largest_micro_batch, and the numbers of packs tried, on a GPU of room_for so many packs.

    Tensors stay on the CPU. A forward of more raises torch.OutOfMemoryError; `tight` is only near the limit.
    """
    def run(room_for, world_size=1, tight=None, others_fit=True, **changes):
        cfg, used, tried, resets = replace(ALL, **changes), [0], [], []
        card(1000 * room_for)

        def backward(tokens, targets, weights):
            packs = len(tokens) // cfg.pack_tokens
            if packs not in tried:
                tried.append(packs)
            if packs > room_for:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            used[0] = 1000 * room_for * 0.95 if packs == tight else 100 * packs
        for name, fake in {"max_memory_allocated": lambda: used[0], "empty_cache": lambda: None,
                           "reset_peak_memory_stats": lambda: used.__setitem__(0, 0)}.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch, "tensor", lambda values, device: values)
        monkeypatch.setattr(train_gpt, "to_device", lambda batch, device: batch)
        monkeypatch.setattr(train_gpt, "all_gather_object", lambda machine, fits: [fits, others_fit])
        optimizer = SimpleNamespace(model=SimpleNamespace(cfg=cfg), reset=lambda: resets.append(1))
        found = train_gpt.largest_micro_batch(backward, optimizer, Machine(GPU.device, 0, world_size, "a GPU"))
        assert len(resets) == len(tried)                # no gradient of a trial is left
        return found, tried
    return run


@pytest.mark.parametrize("room_for, tried", [(100, [8]), (8, [8]), (7, [8, 4]), (3, [8, 4, 2]), (1, [8, 4, 2, 1])])
def test_a_micro_batch_that_does_not_fit_is_halved(micro_batch, room_for, tried):
    assert micro_batch(room_for) == (tried[-1], tried)


def test_each_size_tried_is_at_most_half_of_the_one_before(micro_batch):
    """Each is compiled, which takes long; of 6 packs, 2 would be the largest that fits."""
    stages = tuple(replace(stage, batch_tokens=6 * ALL.pack_tokens) for stage in ALL.stages)
    assert micro_batch(2, stages=stages) == (1, [6, 3, 1])


def test_a_micro_batch_that_leaves_no_room_is_halved(micro_batch):
    assert micro_batch(8, tight=8) == (4, [8, 4])


def test_micro_batches_need_little_padding(micro_batch):
    """Of 8, 16 and 24 packs, four ranks get 2, 4 and 6 each."""
    assert micro_batch(100, world_size=4) == (2, [2])
    assert micro_batch(100, world_size=8) == (1, [1])


def test_one_rank_without_room_counts_for_all(micro_batch):
    with pytest.raises(UserError, match="one pack of --pack_tokens=16384 needs more than .* try --pack_tokens=8192"):
        micro_batch(100, others_fit=False)


def test_a_card_too_small_for_one_pack_is_named(micro_batch):
    with pytest.raises(UserError, match="--pack_tokens=16384 needs more than the GPU's 0.0 GiB; try --pack_tokens=81"):
        micro_batch(0)


@pytest.mark.parametrize("tokens, packs", [(32_768, 2), (16_384, 1), (1 << 20, 8)])
def test_a_micro_batch_that_the_user_names_is_not_tried(micro_batch, tokens, packs):
    assert micro_batch(100, micro_batch_tokens=tokens) == (packs, [])


def test_the_cpu_takes_the_smallest_batch_whole():
    optimizer = SimpleNamespace(model=SimpleNamespace(cfg=TINY))
    assert train_gpt.largest_micro_batch(None, optimizer, CPU) == 1024 // 512


@pytest.mark.parametrize("megabytes, world_size, host_state", [
    (29, 1, True), (31, 1, False), (19, 2, True), (21, 2, False)])
def test_the_host_keeps_the_state_of_tables_when_the_gpu_is_small(card, megabytes, world_size, host_state):
    """A million weights of two bytes, as many gradients, eight bytes of state each: they may fill 0.4 of it."""
    card(megabytes * 1_000_000)
    model = SimpleNamespace(cfg=ALL, parameters=lambda: [torch.empty(10**6, dtype=torch.bfloat16, device="meta")])
    cfg = train_gpt.place_state(model, Machine(GPU.device, 0, world_size, "a GPU"))
    assert cfg == replace(ALL, host_state=host_state)
    model.cfg = replace(ALL, host_state=True)                       # the user's word counts
    assert train_gpt.place_state(model, Machine(GPU.device, 0, world_size, "a GPU")).host_state


def test_on_the_cpu_there_is_no_other_place_for_the_state():
    assert train_gpt.place_state(SimpleNamespace(cfg=TINY), CPU) is TINY


def test_want_of_memory_later_on_ends_in_one_line_with_flags(run_main, monkeypatch):
    def train(cfg, argv):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")
    monkeypatch.setattr(train_gpt, "train", train)
    done = run_main()
    line, = done.err.splitlines()
    assert done.code == 2 and "out of memory" in line
    assert all(flag in line for flag in ("--micro_batch_tokens=", "--val_stream_tokens=", "--pack_tokens="))


# -----------------------------------------------------------------------------
# On a GPU

@cuda
def test_on_this_gpu_fast_attention_and_all_kernels_are_right():
    machine = Machine(torch.device("cuda", 0), 0, 1, torch.cuda.get_device_name())
    cfg, lines = train_gpt.choose_attention(ALL, machine)
    print("\n".join(lines))
    assert cfg.attention != "plain", lines
    cfg = replace(cfg, float8=torch.cuda.get_device_capability() >= (8, 9), bigram_rows=1024)
    with torch.device(machine.device):
        model = train_gpt.GPT(cfg)
    kernels = set(model.kernels)
    assert kernels and "does not run" not in train_gpt.check_kernels(model, machine)
    assert set(model.kernels) == kernels


@cuda
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs float8")
def test_an_edited_mlp_ends_in_one_line_on_this_gpu(edited, run_main, data, tmp_path):
    module = edited((".relu().square() @ down_FC", ".relu() @ down_FC"))
    sizes = {"model_dim": 256, "head_dim": 64, "mlp_dim": 512, "vocab_multiple": 16, "layers": SMALL_LAYERS,
             "device": "cuda", "precision": "bf16", "compile": True}
    done = run_main(*small_flags(data, **sizes, stop_after=2, out_dir=tmp_path / "logs"), module=module)
    line, = done.err.splitlines()
    assert done.code == 2 and "kernel of mlp" in line and "--kernels=false" in line
    flags = small_flags(data, **sizes | {"kernels": False}, stop_after=2, out_dir=tmp_path / "other")
    assert run_main(*flags, module=module).code == 0
