"""The kernels of triton_kernels.py and FlexAttention as train_gpt.py calls it, on a GPU: values and gradients.

Against: the same formulas in float64 with autograd, and the plain PyTorch versions in bf16, whose error sets the
bounds; a training step with kernels and float8 against one without; and what the warm-up finds out about kernels,
attention and memory. Skipped without CUDA or Triton; float8 also below compute capability 8.9.

Run: python -m pytest tests/test_kernels.py; with -s it prints how far each kernel is from plain PyTorch in whole models
"""
import gc
import importlib
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt
from train_gpt import GPT, PRESETS, head_loss, plain_attention

kernels = train_gpt.triton_kernels
DEVICE, CUDA = "cuda", torch.cuda.is_available()
FLOAT8 = CUDA and torch.cuda.get_device_capability() >= (8, 9)
pytestmark = [pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU"),
              pytest.mark.skipif(kernels is None, reason="needs Triton"),
              pytest.mark.filterwarnings("ignore")]                     # PyTorch's hints on speed
needs_float8 = pytest.mark.skipif(not FLOAT8, reason="needs a GPU of compute capability 8.9 or above, for float8")
number_formats = pytest.mark.parametrize("float8", [False, pytest.param(True, marks=needs_float8)],
                                         ids=["bf16", "float8"])
MACHINE = train_gpt.Machine(torch.device(DEVICE, 0), 0, 1, DEVICE)
eager_and_compiled = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])

TANH_ERROR = 0.02  # bound on what the approximate tanh, 2^-11, becomes in one entry of the logit gradient, relative


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """New tensors hold NaN, so that an entry that a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float8_e5m2):
            assert torch.empty(8, 8, device=DEVICE, dtype=dtype).float().isnan().all(), dtype
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def randn(*shape, std=1.0):
    return (torch.randn(shape, device=DEVICE) * std).bfloat16()


def normalised(T, C):
    return train_gpt.norm(torch.randn(T, C, device=DEVICE)).bfloat16()


def relative(value, reference):
    """Distance from the reference in units of its norm."""
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


def as_leaves(*tensors, dtype=None):
    return [tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_() for tensor in tensors]


def maybe_compiled(function, compiled):
    if compiled:
        torch._dynamo.reset()            # each test with a cache of its own, not at the limit on recompilations
    return torch.compile(function, dynamic=False, fullgraph=True) if compiled else function


# -----------------------------------------------------------------------------
# Cross-entropy and head

def make_targets(T, V):
    """Targets (T, 4) with missing ones, repeated ones, the first and the last column, and rows without any."""
    targets = torch.randint(-1, V, (T, 4), device=DEVICE)
    targets[torch.rand(T, 4, device=DEVICE) < 0.2] = -1
    targets[:10, 0] = targets[:10, 1] = torch.randint(0, V, (10,), device=DEVICE)
    targets[10:20, 3] = targets[10:20, 0] = torch.randint(0, V, (10,), device=DEVICE)
    targets[20:22] = torch.randint(0, V, (2, 1), device=DEVICE)         # all four the same
    targets[22:24] = torch.tensor([0, V - 1, V - 1, 0], device=DEVICE)
    targets[[24, 31, T - 1]] = -1
    return targets


def exact_loss(logits, targets, weights, counts=None):
    """Sum of weighted cross-entropies in float64, by definition; counts: how often each column is in the sum."""
    capped = 23 * torch.sigmoid((logits + 5) / 7.5)
    total = (capped if counts is None else capped + counts.double().log()).logsumexp(dim=1, keepdim=True)
    losses = total - capped.gather(1, targets.clamp(min=0))
    return (losses * weights.double() * (targets >= 0)).sum()


# odd against the tiles of the kernels (32 x 128, 64 x 64) and, the last, against the 4096 columns of the row kernel
SIZES = pytest.mark.parametrize("T, V, weights", [(272, 1008, (1, .5, .25, .25)), (48, 384, (1, .3, 0, .25)),
                                                  (48, 5008, (1, 0, 0, 0))])


def cross_entropy_case(T, V, weights, float8):
    """What the kernel returns for random logits, and (loss, gradient) in float64; with them targets and weights."""
    z, targets = randn(T, V, std=2), make_targets(T, V)
    weights = torch.tensor(weights, device=DEVICE, dtype=torch.float32)
    exact, = as_leaves(z, dtype=torch.float64)
    loss = exact_loss(exact, targets, weights)
    loss.backward()
    result = kernels.cross_entropy(z.clone(), targets, weights, None, float8)
    return result, (loss.item(), exact.grad), (z, targets, weights)


@SIZES
@number_formats
def test_cross_entropy_in_each_entry(T, V, weights, float8, poisoned):
    (loss, grad, _), (exact_value, exact_grad), (_, targets, _) = cross_entropy_case(T, V, weights, float8)
    assert loss.item() == pytest.approx(exact_value, rel=1e-3)
    assert grad.dtype == (torch.float8_e5m2 if float8 else torch.bfloat16) and grad.shape == (T, V)
    scale, rounding = (kernels.GRAD_SCALE, 2**-3) if float8 else (1.0, 2**-8)
    # below the smallest normal number of e5m2, 2^-14, rounding is absolute
    torch.testing.assert_close(grad.double() / scale, exact_grad, rtol=rounding + TANH_ERROR, atol=2**-17 / 2**14)
    assert (grad.float()[(targets < 0).all(dim=1)] == 0).all(), "rows without a target have no gradient"


@SIZES
@needs_float8
def test_transposed_float8_gradient_is_exactly_the_transpose(T, V, weights, poisoned):
    (_, grad, transposed), _, _ = cross_entropy_case(T, V, weights, float8=True)
    assert transposed.shape == (V, T) and transposed.is_contiguous() and transposed.dtype == grad.dtype
    different = (grad.float().T != transposed.float()).sum().item()     # NaN differs from itself
    assert different == 0, f"{different} of {grad.numel()} entries differ"


@SIZES
def test_bf16_cross_entropy_is_as_good_as_plain_pytorch(T, V, weights, poisoned):
    (_, grad, transposed), (_, exact_grad), (z, targets, weights) = cross_entropy_case(T, V, weights, float8=False)
    assert transposed is None
    plain, = as_leaves(z)
    head_loss(plain, torch.eye(V, device=DEVICE, dtype=torch.bfloat16), targets, weights).backward()
    assert relative(grad, exact_grad) <= 1.1 * relative(plain.grad, exact_grad)


def test_bf16_cross_entropy_overwrites_its_logits():
    z, targets = randn(48, 384), make_targets(48, 384)
    _, grad, _ = kernels.cross_entropy(z, targets, torch.ones(4, device=DEVICE), None, False)
    assert grad.data_ptr() == z.data_ptr()


@pytest.mark.parametrize("T, V, chunk", [(272, 1008, 128), (48, 384, 1 << 15)], ids=["chunks", "whole"])
@eager_and_compiled
@number_formats
def test_head_loss_and_gradients(T, V, chunk, compiled, float8, monkeypatch, request):
    if not compiled:                     # under torch.compile deterministic algorithms would change other code too
        request.getfixturevalue("poisoned")
    for module in (kernels, train_gpt):  # each chunk rounds once, in either
        monkeypatch.setattr(module, "HEAD_CHUNK", chunk)
    x, weight, targets = normalised(T, 768), randn(V, 768, std=0.05), make_targets(T, V)
    weights = torch.tensor((1, .5, .25, .25), device=DEVICE)
    exact, plain, ours = as_leaves(x, weight, dtype=torch.float64), as_leaves(x, weight), as_leaves(x, weight)
    exact_value = exact_loss(exact[0] @ exact[1].T, targets, weights)
    plain_value = head_loss(*plain, targets, weights)
    our_value = maybe_compiled(kernels.head_loss, compiled)(*ours, targets, weights, None, float8)
    for loss in (exact_value, plain_value, our_value):
        (4 * loss).backward()            # the factor must reach the gradients, and not round them
    assert our_value.dtype == torch.float32
    assert our_value.item() == pytest.approx(exact_value.item(), rel=3e-3 if float8 else 1e-3)
    for name, good, usual, tensor in zip(("x", "weight"), exact, plain, ours):
        bound = 0.08 if float8 else 1.1 * relative(usual.grad, good.grad) + 1e-4
        assert relative(tensor.grad, good.grad) <= bound, name


@number_formats
def test_head_loss_with_columns_that_stand_for_several(float8, poisoned):
    """As in sampled softmax: targets stand for themselves, the others for 3.7 tokens."""
    x, weight, targets = normalised(272, 768), randn(1008, 768, std=0.05), make_targets(272, 1008)
    weights, counts = torch.tensor((1, .5, .25, .25), device=DEVICE), torch.full((1008,), 3.7, device=DEVICE)
    counts[targets[targets >= 0]] = 1
    exact, plain, ours = as_leaves(x, weight, dtype=torch.float64), as_leaves(x, weight), as_leaves(x, weight)
    exact_value = exact_loss(exact[0] @ exact[1].T, targets, weights, counts)
    plain_value = head_loss(*plain, targets, weights, counts)
    our_value = kernels.head_loss(*ours, targets, weights, counts, float8)
    for loss in (exact_value, plain_value, our_value):
        loss.backward()
    assert our_value.item() == pytest.approx(exact_value.item(), rel=3e-3 if float8 else 1e-3)
    for good, usual, tensor in zip(exact, plain, ours):
        bound = 0.08 if float8 else 1.1 * relative(usual.grad, good.grad) + 1e-4
        assert relative(tensor.grad, good.grad) <= bound


# -----------------------------------------------------------------------------
# Decoding

@pytest.mark.parametrize("B, R, H, E, D, window", [(3, 48, 2, 16, 16, 37), (1, 784, 6, 128, 128, 768),
                                                   (1, 784, 6, 64, 128, 768), (64, 272, 6, 64, 64, 256)])
def test_decode_attention(B, R, H, E, D, window, poisoned):
    """Against a softmax in float64 over what each row sees; the new token must land in its slot, and nowhere else."""
    q, k, v, keys, values = randn(B, H, E), randn(B, H, E), randn(B, H, D), randn(B, R, H, E), randn(B, R, H, D)
    position = torch.randint(0, 3 * R, (B,), device=DEVICE)
    position[0] = 0
    start = torch.randint(0, 2 * R, (B,), device=DEVICE).clamp(max=position)
    kept, rows = (keys.clone(), values.clone()), torch.arange(B, device=DEVICE)
    for ring, new in zip(kept, (k, v)):
        ring[rows, position % R] = new
    done = torch.zeros(B, H, dtype=torch.int32, device=DEVICE)
    for _ in range(2):                   # the second call finds the token in its slot and must not see it twice
        y = kernels.decode_attention(q, k, v, keys, values, position, start, window, done)
        assert torch.equal(keys, kept[0]) and torch.equal(values, kept[1]) and not done.any()
    held = position[:, None] - (position[:, None] - torch.arange(R, device=DEVICE)) % R
    seen = held >= torch.maximum(start, position - window)[:, None]
    scores = torch.einsum("bhd,brhd->bhr", q.double(), keys.double()).masked_fill(~seen[:, None], -math.inf)
    exact = torch.einsum("bhr,brhd->bhd", scores.softmax(2), values.double())
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-3)


# -----------------------------------------------------------------------------
# Float8 products

def run_both(function, reference, inputs, compiled):
    """Output and gradients of a function, those of its reference, and the reference's output in float64."""
    ours, plain = as_leaves(*inputs), as_leaves(*inputs)
    y, expected = maybe_compiled(function, compiled)(*ours), reference(*plain)
    grad = randn(*y.shape)
    y.backward(grad)
    expected.backward(grad)
    exact = reference(*(tensor.double() for tensor in inputs))
    return (y, [tensor.grad for tensor in ours]), (expected, [tensor.grad for tensor in plain]), exact


@needs_float8
@eager_and_compiled
def test_float8_linear(compiled):
    inputs = normalised(272, 768), randn(400, 768, std=0.02)
    (y, grads), (_, expected), exact = run_both(kernels.float8_linear, F.linear, inputs, compiled)
    assert y.shape == (272, 400) and y.dtype == torch.bfloat16
    assert relative(y, exact) <= 0.07
    for grad, good in zip(grads, expected):
        assert grad.shape == good.shape and relative(grad, good) <= 0.01


@needs_float8
@eager_and_compiled
def test_float8_mlp(compiled):
    inputs = normalised(272, 768), randn(1536, 768, std=0.02), randn(1536, 768, std=0.02)
    (y, grads), (_, expected), exact = run_both(kernels.float8_mlp, train_gpt.mlp, inputs, compiled)
    assert y.shape == (272, 768) and y.dtype == torch.bfloat16
    assert relative(y, exact) <= 0.07
    for grad, good in zip(grads, expected):                 # from the pre-activations of the float8 product
        assert grad.shape == good.shape and relative(grad, good) <= 0.1


@pytest.mark.parametrize("T, F, C", [(272, 400, 144), (48, 16, 16), (128, 384, 256)])
@needs_float8
def test_relu2_product_in_each_entry(T, F, C, poisoned):
    """Sizes odd against the tiles of 128, and multiples of them; units that saturate, units without an activation."""
    u, up, grad = randn(T, C).to(torch.float8_e4m3fn), randn(F, C).to(torch.float8_e4m3fn), randn(T, C, std=100)
    grad, inverse, scale = grad.to(torch.float8_e5m2), *(torch.tensor(x, device=DEVICE) for x in (0.25, 2.0))

    def check(values, exact, rounding, largest, product_error):
        """Rounding of the result, after that of the sum: matrix units add float8 products with about 13 bits."""
        error = (values.double() - exact.clamp(-largest, largest)).abs()
        assert (error <= rounding * exact.abs() + product_error + 2**-9).all(), (error, exact)
    (root, root_error), (product, product_error) = (
        (a.double() @ up.double().T / 4, 2**-12 * (a.double().abs() @ up.double().abs().T) / 4) for a in (u, grad))
    square, square8 = kernels.relu2_product(u, up, inverse, scale, None)
    square_error = root_error * (2 * root.abs() + root_error)
    check(square, root.relu().square(), 2**-8, math.inf, square_error)
    check(square8, 2 * root.relu().square(), 2**-4, 448, 2 * square_error)
    out, out8 = kernels.relu2_product(grad, up, inverse, scale, square)
    gradient, product_error = (2 * square.double().sqrt() * x for x in (product, product_error))
    check(out, gradient, 2**-8, math.inf, product_error)
    check(out8, 2 * gradient, 2**-3, 57344, 2 * product_error)
    assert square8.dtype == torch.float8_e4m3fn and out8.dtype == torch.float8_e5m2


@needs_float8
def test_relu2_product_keeps_what_is_not_a_number():
    one = torch.ones((), device=DEVICE)
    u, up = randn(48, 32).to(torch.float8_e4m3fn), randn(64, 32).to(torch.float8_e4m3fn)
    u.view(torch.uint8)[5, 7] = 0x7F                        # NaN of e4m3
    for out in kernels.relu2_product(u, up, one, one, None):
        assert out[5].isnan().all() and out.float().isnan().sum() == out.size(1)


@needs_float8
@eager_and_compiled
def test_huge_activations_saturate(compiled):
    u, weight = 1e4 * normalised(48, 768), randn(384, 768, std=0.02)
    largest = 448 / kernels.X_SCALE                         # the largest input that e4m3 can hold
    for function, weights in ((kernels.float8_linear, (weight,)), (kernels.float8_mlp, (weight, weight))):
        function = maybe_compiled(function, compiled)
        y = function(u, *weights)
        assert y.isfinite().all()
        assert torch.equal(y, function(u.clamp(-largest, largest), *weights))


@needs_float8
@eager_and_compiled
def test_a_float8_mlp_begins_as_nothing(compiled):
    u, up, down = as_leaves(normalised(48, 768), randn(384, 768, std=0.02), randn(384, 768, std=0))
    y = maybe_compiled(kernels.float8_mlp, compiled)(u, up, down)
    y.backward(randn(48, 768))
    assert (y == 0).all() and (u.grad == 0).all() and (up.grad == 0).all()
    assert down.grad.isfinite().all() and (down.grad != 0).any()


# -----------------------------------------------------------------------------
# FlexAttention with the block mask of the model

T, H, D, WINDOWS = 4096, 6, 128, (128, 384, 1408)


@pytest.fixture(scope="module")
def compiled_flex():
    """FlexAttention and its mask compiled together, once for all windows, as in the model."""
    torch._dynamo.reset()

    def attend(q, k, v, doc_start, window):
        return train_gpt.ATTENTION["flex"](doc_start, window, max(WINDOWS))(q, k, v)
    return torch.compile(attend, dynamic=False, fullgraph=True)


@pytest.mark.parametrize("window", WINDOWS)
def test_flex_attention_is_as_good_as_plain_attention(window, compiled_flex):
    starts = torch.zeros(T, dtype=torch.int32, device=DEVICE)
    borders = torch.cat([torch.randint(1, T, (14,), device=DEVICE), torch.tensor([1024, 1025, T - 1], device=DEVICE)])
    starts[borders] = borders.int()
    starts = starts.cummax(0).values.int()
    first = torch.maximum(starts, torch.arange(T, device=DEVICE, dtype=torch.int32) - window)
    size = torch.tensor(window, device=DEVICE, dtype=torch.int32)
    q, k, v = train_gpt.norm(randn(T, H, D)) * 0.1, train_gpt.norm(randn(T, H, D)), randn(T, H, D)
    grad, results = randn(T, H, D), {}
    for name, dtype in (("exact", torch.float64), ("plain", torch.bfloat16), ("flex", torch.bfloat16)):
        inputs = as_leaves(q, k, v, dtype=dtype)
        if name == "flex":
            y = compiled_flex(*inputs, starts, size)
        else:
            y = plain_attention(*inputs, first, window)
        y.backward(grad.to(dtype))
        results[name] = [y.detach()] + [tensor.grad for tensor in inputs]
    for name, exact, plain, ours in zip(("y", "dq", "dk", "dv"), *results.values()):
        assert relative(ours, exact) <= 2 * relative(plain, exact), name


# -----------------------------------------------------------------------------
# The training step

SMALL = {"layers": train_gpt.TINY_LAYERS, "model_dim": 256, "head_dim": 64, "mlp_dim": 512, "bigram_rows": 1024,
         "vocab_size": 1024, "bos_id": 1023, "attention": "flex", "compile": False}
CONFIG = replace(PRESETS["speedrun"], **SMALL)
STEP = 1                                 # the first at which Adam moves too


def training_losses(compiled, **changes):
    """Loss per token of two training steps on the same random batch, from a model away from its initial state."""
    with torch.device(DEVICE):
        model = GPT(replace(CONFIG, **changes))
        generator = torch.Generator(DEVICE).manual_seed(1)
        with torch.no_grad():
            for param in model.parameters():
                param += 0.2 * torch.randn(param.shape, generator=generator) * (0.1 if param.dim() > 2 else 1)
            model.prefix_of.copy_(torch.randint(-1, CONFIG.bos_id, model.prefix_of.shape, generator=generator))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.bos_id, 2048, dtype=np.int32)
    tokens[[0, 300, 301, 1000, 1900]] = CONFIG.bos_id
    batch = tokens, np.roll(tokens, -1).astype(np.int64)
    # the optimizer stays as it is: only the model is compiled, to save the time
    optimizer, backward = train_gpt.Optimizer(model), train_gpt.Backward(maybe_compiled(model, compiled))
    plan = train_gpt.schedule(model.cfg, STEP)
    totals = [train_gpt.training_step(backward, optimizer, [batch], STEP, plan, MACHINE) for _ in range(2)]
    return [total[0].item() / len(tokens) for total in totals]


@pytest.fixture(scope="module")
def plain_losses():
    """The same steps without kernels, float8 and torch.compile."""
    return training_losses(False, kernels=False, float8=False)


@pytest.mark.parametrize("with_kernels, float8", [(False, False), (True, False),
                                                  pytest.param(True, True, marks=needs_float8)],
                         ids=["plain", "bf16", "float8"])
@eager_and_compiled
def test_a_training_step(compiled, with_kernels, float8, plain_losses):
    losses = training_losses(compiled, kernels=with_kernels, float8=float8)
    assert losses[0] == pytest.approx(plain_losses[0], rel=1e-2)
    assert losses[1] == pytest.approx(plain_losses[1], rel=3e-2)
    assert plain_losses[1] < 0.9 * plain_losses[0], "the step must change the loss, or its gradients are not tested"


def test_replayed_micro_steps_are_the_micro_steps():
    """Two micro-batches a step, over stages, and steps at which Adam moves or rests and the head is tied or not."""
    cfg = replace(CONFIG, num_iterations=8, compile=True, kernels=True, float8=FLOAT8,
                  micro_batch_tokens=CONFIG.pack_tokens, val_stream_tokens=CONFIG.pack_tokens)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (2, cfg.pack_tokens), dtype=np.int32)
    tokens[:, ::700] = cfg.bos_id
    batches, losses = [(row, np.roll(row, -1).astype(np.int64)) for row in tokens], {}
    with torch.device(DEVICE):
        model = GPT(cfg)
    optimizer, forward = train_gpt.Optimizer(model), maybe_compiled(model, True)
    torch.cuda.reset_peak_memory_stats()                    # graphs depend on it
    for replays in (False, True):
        model.cfg = replace(cfg, graph_tokens=cfg.pack_tokens if replays else 0)
        train_gpt.initialize(model, optimizer, MACHINE)
        backward = train_gpt.Backward(forward)
        assert train_gpt.warm_up(backward, optimizer, MACHINE, SimpleNamespace(print=print)) == 1
        graphs, losses[replays] = dict(backward.graphs), []
        assert backward.replays == bool(graphs) == replays
        for step in range(8):
            model.set_stage(train_gpt.stage_index(cfg, step))
            plan = train_gpt.schedule(cfg, step)
            total = train_gpt.training_step(backward, optimizer, batches, step, plan, MACHINE)[0].item()
            losses[replays].append(total / tokens.size / sum(plan.loss_weights))
        assert backward.graphs == graphs, "a graph was captured after the warm-up"
    assert losses[True] == pytest.approx(losses[False], rel=1e-2)
    assert losses[False][-1] < 0.8 * losses[False][0], "the steps must change the loss"


# -----------------------------------------------------------------------------
# What the warm-up finds out: kernels

# name -> script, preset and changes; all but the small one are as large as they are trained
FULL = {"vocab_size": 50_304, "bos_id": 50_256, "compile": False}
MODELS = {"small": ("train_gpt", "speedrun", SMALL), "speedrun": ("train_gpt", "speedrun", FULL),
          "single": ("train_gpt", "single", FULL), "medium": ("train_gpt_medium", "speedrun", FULL)}


def build(name, float8=FLOAT8):
    """(the script, a model of it with its kernels, uncompiled, in its initial state)."""
    script, preset, changes = MODELS[name]
    script = importlib.import_module(script)
    cfg = replace(script.PRESETS[preset], **changes, kernels=True, float8=float8)
    with torch.device(DEVICE):
        model = script.GPT(cfg)
    assert list(model.kernels) == ["head_loss", *["linear", "mlp"] * float8]
    return script, model


@pytest.mark.parametrize("name, float8", [("small", False), *(
    pytest.param(name, True, marks=needs_float8) for name in MODELS)])
def test_the_kernels_are_right_in_each_model(name, float8):
    script, model = build(name, float8)
    cfg, own = model.cfg, dict(model.kernels)
    said = script.check_kernels(model, MACHINE)
    assert said == "kernels that are right on this device: " + ", ".join(own)
    assert model.kernels == own and model.cfg == cfg
    assert all(param.grad is None for param in model.parameters())


def distance(have, wanted):
    """(norm of the difference in units of the norm of `wanted`, length along `wanted` in units of it less one)."""
    have, wanted = have.double(), wanted.double()
    square = wanted.square().sum().clamp(min=1e-20)
    return ((have - wanted).square().sum() / square).sqrt().item(), ((have * wanted).sum() / square).item() - 1


@pytest.mark.parametrize("name", MODELS)
def test_how_far_the_kernels_are_from_plain_pytorch(name):
    """Prints, for each kernel and some random weights, what LARGEST_ERROR and LARGEST_SCALE_ERROR bound."""
    script, model = build(name)
    model.cfg = replace(model.cfg, attention="plain")
    batch = script.to_device(script.synthetic_batch(model.cfg, 4096), MACHINE.device)
    weights, own, found = torch.ones(4, device=DEVICE), model.kernels, {}
    large = [name for name, config in script.PARAMETERS.items() if config.comms == "sharded"]
    for number in range(3):
        model.init_parameters()
        generator = torch.Generator(DEVICE).manual_seed(number)
        for param in model.parameters():
            param.data += torch.empty_like(param).normal_(0, 0.02, generator=generator)
        model.kernels = {}
        plain = kernels.loss_and_gradients(model, large, *batch, weights)
        for kernel, function in own.items():
            model.kernels = {kernel: function}
            for part, have in kernels.loss_and_gradients(model, large, *batch, weights).items():
                error, scale = distance(have, plain[part])
                assert math.isfinite(error) and math.isfinite(scale), (kernel, part)
                worst = found.setdefault((kernel, part), (0.0, 0.0))
                found[kernel, part] = max(worst[0], error), max(worst[1], scale, key=abs)
    entries = {part: plain[part].numel() for part in plain}
    for kernel in own:
        print(f"\n{name}, kernel of {kernel}: the largest error and scale - 1 with 3 seeds")
        for (other, part), (error, scale) in found.items():
            if other == kernel:
                print(f"    {part:26} {entries[part]:>11,}   error {error:.4f}   scale - 1 {scale:+.4f}")
    assert {"loss", "gradient of mlp", "gradient of attn_qk", "gradient of embed", "gradient of lm_head"} <= plain.keys()
    assert max(error for error, _ in found.values()) <= kernels.LARGEST_ERROR
    assert max(abs(scale) for _, scale in found.values()) <= kernels.LARGEST_SCALE_ERROR



def relu_mlp(u, up, down):
    return F.linear(u, up).relu() @ down


def gelu_mlp(u, up, down):
    return F.gelu(F.linear(u, up)) @ down


def without_down(u, up, down):
    return F.linear(u, up).relu().square() @ up


@needs_float8
@pytest.mark.parametrize("other", [relu_mlp, gelu_mlp, without_down])
def test_an_mlp_that_somebody_has_changed_is_noticed(other, monkeypatch):
    """The kernel would go on computing the old one."""
    _, model = build("small")
    monkeypatch.setattr(train_gpt, "mlp", other)
    with pytest.raises(train_gpt.UserError, match="the kernel of mlp .*if you have changed train_gpt.py .*"
                                                  "--kernels=false"):
        train_gpt.check_kernels(model, MACHINE)


def test_a_loss_that_somebody_has_changed_is_noticed(monkeypatch):
    _, model = build("small")
    monkeypatch.setattr(train_gpt, "LOGIT_SCALE", 30.0)
    with pytest.raises(train_gpt.UserError, match="the kernel of head_loss .*--kernels=false"):
        train_gpt.check_kernels(model, MACHINE)


def test_a_kernel_that_does_not_run_is_left_out_and_said_so():
    _, model = build("small")

    def broken(*_):
        raise RuntimeError("no such\ninstruction")
    others = [name for name in model.kernels if name != "head_loss"]
    model.kernels["head_loss"] = broken
    said = train_gpt.check_kernels(model, MACHINE)
    assert list(model.kernels) == others
    assert said == (f"kernels that are right on this device: {', '.join(others) or 'none'}; head_loss does not run here "
                    "(RuntimeError: no such instruction)")


# -----------------------------------------------------------------------------
# What the warm-up finds out: attention and memory

@pytest.mark.parametrize("preset", ["speedrun", "single"])      # the keys of the latter are narrower than its values
def test_flex_attention_is_chosen(preset):
    torch._dynamo.reset()
    cfg, lines = train_gpt.choose_attention(PRESETS[preset], MACHINE)
    assert cfg.attention == "flex" and lines == ["flex attention is right on this device"]


def test_flex_attention_with_small_tiles_is_right():
    torch._dynamo.reset()
    assert train_gpt.try_attention(PRESETS["speedrun"], "flex_small", MACHINE.device) == ""


def test_attention_that_is_wrong_is_noticed(monkeypatch):
    """Windows half as long: the next backend is tried, and a flag that names a wrong one is refused."""
    for name in ("flex", "flex_small"):
        monkeypatch.setitem(train_gpt.ATTENTION, name, lambda doc_start, window, longest: train_gpt.with_plain(
            doc_start, longest // 2, longest))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    cfg, lines = train_gpt.choose_attention(PRESETS["speedrun"], MACHINE)
    assert cfg.attention == "plain" and lines[2] == "used: plain attention"
    for name, line in zip(("flex", "flex_small"), lines):
        assert line.startswith(f"{name} attention does not work here: wrong by ")
    with pytest.raises(train_gpt.UserError, match="--attention=flex does not work here .wrong by .*auto"):
        train_gpt.choose_attention(replace(PRESETS["speedrun"], attention="flex"), MACHINE)


@pytest.fixture
def gpu_memory():
    """Function that lets PyTorch have only so many bytes until the end of the test."""
    total = torch.cuda.get_device_properties(0).total_memory

    def limit(size):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(size / total, 1.0), 0)
    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0, 0)
    torch.cuda.empty_cache()


def test_the_largest_micro_batch_that_fits_is_used(gpu_memory):
    """All eight packs of a small model; with memory for about five: four, which leave no padding; then none at all."""
    torch._dynamo.reset()                # what other tests have left in memory
    gc.collect()
    cfg = replace(CONFIG, attention="plain", kernels=True, float8=FLOAT8)
    backward, optimizer = train_gpt.build(cfg, MACHINE)
    assert train_gpt.largest_micro_batch(backward, optimizer, MACHINE) == 8
    batch = train_gpt.to_device(train_gpt.synthetic_batch(cfg, 8 * cfg.pack_tokens), MACHINE.device)
    weights = torch.tensor(train_gpt.loss_weights(cfg, 0), device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        backward(*batch, weights)
    peak = torch.cuda.max_memory_allocated()
    optimizer.reset()
    del batch
    gpu_memory(0.7 * peak)
    before = {name: param.detach().clone() for name, param in optimizer.params.items()}
    assert train_gpt.largest_micro_batch(backward, optimizer, MACHINE) == 4
    assert all(torch.equal(param, before[name]) and param.grad is None for name, param in optimizer.params.items())
    gpu_memory(0.05 * peak)
    with pytest.raises(train_gpt.UserError, match="one pack of --pack_tokens=16384 needs more.*--pack_tokens=8192"):
        train_gpt.largest_micro_batch(backward, optimizer, MACHINE)


def test_a_micro_batch_that_a_flag_names_is_not_tried():
    cfg = replace(CONFIG, attention="plain", kernels=False, float8=False, micro_batch_tokens=2 * CONFIG.pack_tokens)
    _, optimizer = train_gpt.build(cfg, MACHINE)
    assert train_gpt.largest_micro_batch(None, optimizer, MACHINE) == 2
