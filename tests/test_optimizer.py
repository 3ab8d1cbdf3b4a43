"""NorMuon, Adam and the tied phase of train_gpt.py, and the warm-up that must leave no trace.

Against: singular value decompositions, rules written again here in float64, torch.optim.Adam.
Run: python -m pytest tests/test_optimizer.py
"""
import contextlib
import math
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import BOS

import train_gpt
from train_gpt import (GPT, PARAMETERS, Backward, Optimizer, ParamConfig, UserError, adam_update, adam_updates, digest,
                       normuon_update, polar_express, run_state, schedule)

MATRICES = ("attn_qk", "attn_vo", "mlp")


@pytest.fixture
def cfg(small_config):
    return small_config()


@pytest.fixture
def trained(cfg):
    """A model, its optimizer, and a function that makes the gradients of some tokens."""
    model = GPT(cfg)
    return SimpleNamespace(model=model, optimizer=Optimizer(model), params=dict(model.named_parameters()), cfg=cfg)


def random_gradients(params, seed):
    """Adds a random gradient to each parameter, as backward does; returns copies."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, param in params.items():
        made[name] = torch.randn(param.shape, generator=generator)
        param.grad = made[name].clone() if param.grad is None else param.grad + made[name]
    return made


def machine():
    return train_gpt.Machine(torch.device("cpu"), 0, 1, "cpu")


def batches(count, seed=0):
    """Micro-batches of random documents."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        tokens = torch.randint(0, BOS, (256,), generator=generator, dtype=torch.int32)
        tokens[::40] = BOS
        made.append((tokens.numpy(), tokens.roll(-1).long().numpy()))
    return made


# -----------------------------------------------------------------------------
# Moments in host memory

def test_moments_in_host_memory_change_nothing(cfg, monkeypatch):
    """Tables go through their moments in parts: so many rows at a time, whose last part is smaller."""
    monkeypatch.setattr(train_gpt, "HOST_ROWS", 50)
    states = []
    for host_state in (False, True):
        model = GPT(replace(cfg, host_state=host_state))
        optimizer, parts = Optimizer(model), []
        optimizer.adam = lambda updates, apply: (parts.extend(len(update[1]) for update in updates),
                                                 adam_updates(updates, apply))
        for step in range(4):
            random_gradients(dict(model.named_parameters()), step)
            optimizer.step(step, schedule(cfg, step))
        states.append(run_state(model, optimizer, machine()))
        assert (max(parts) == 50 and 509 % 50 in parts) == host_state
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# -----------------------------------------------------------------------------
# Polar Express

def with_singular_values(values, rows, cols, seed=0):
    """A matrix with these singular values, and its singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64)).Q[:, :len(values)]
    v = torch.linalg.qr(torch.randn(cols, cols, generator=generator, dtype=torch.float64)).Q[:, :len(values)]
    return u @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ v.T, u, v


@pytest.mark.parametrize("value, expected", [
    (1e-4, 0.099), (1e-3, 0.859), (3e-3, 0.966), (0.01, 1.027), (0.03, 1.061), (0.1, 1.059), (0.3, 0.983), (0.6, 0.871),
    (0.9, 0.875), (0.98, 0.979)])
@pytest.mark.parametrize("rows, cols", [(12, 12), (8, 20), (20, 8)])
def test_what_becomes_of_a_singular_value(value, expected, rows, cols):
    rest = math.sqrt(1.02 ** -2 - value ** 2)  # so that the normalisation divides by one
    matrix, u, v = with_singular_values([value, rest], rows, cols)
    x = polar_express(7.0 * matrix[None], torch.float64)[0]
    assert float(u[:, 0] @ x @ v[:, 0]) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("rows, cols", [(16, 16), (12, 48), (48, 12)])
def test_the_result_is_near_the_orthogonal_factor_of_the_svd(rows, cols):
    g = torch.randn(5, rows, cols, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = polar_express(g, torch.float64)
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    inside = u.mT @ x @ vt.mT
    values = inside.diagonal(0, 1, 2)
    assert (inside - torch.diag_embed(values)).abs().max() < 1e-9  # the singular vectors stay
    usable = s / (1.02 * g.norm(dim=(1, 2))[:, None]) > 1e-3
    assert values[usable].min() > 0.85 and values[usable].max() < 1.145
    in_bf16 = polar_express(g.float(), torch.bfloat16)
    assert in_bf16.dtype == torch.bfloat16
    assert (in_bf16.double() - x).norm() < 0.05 * x.norm()


def test_a_zero_gradient_stays_zero():
    assert torch.equal(polar_express(torch.zeros(2, 4, 6), torch.float32), torch.zeros(2, 4, 6))


# -----------------------------------------------------------------------------
# NorMuon

def polar_reference(g):
    x = g / (1.02 * g.norm() + 1e-6)
    for a, b, c in ((8.156554524902461, -22.48329292557795, 15.878769915207462),
                    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)):
        u, s, vt = torch.linalg.svd(x, full_matrices=False)
        x = u @ torch.diag(a * s + b * s ** 3 + c * s ** 5) @ vt
    return x


def normuon_reference(p, m, v, g, mu, beta2, rate, decay):
    """One matrix in float64, by the published rule; returns the new weight, momentum and second moment."""
    m = mu * m + (1 - mu) * g
    x = polar_reference((1 - mu) * g + mu * m)
    axis = 1 if p.shape[0] >= p.shape[1] else 0
    v = beta2 * v + (1 - beta2) * (x ** 2).mean(axis, keepdim=True)
    scaled = x / v.clamp(min=1e-10).sqrt()
    x = scaled * x.norm() / scaled.norm()
    return p - decay * rate * p * (x * p >= 0) - rate * x, m, v


@pytest.mark.parametrize("rows, cols", [(6, 6), (5, 11), (11, 5)])
def test_normuon_against_the_rule_in_float64(rows, cols):
    generator = torch.Generator().manual_seed(0)
    master = torch.randn(3, rows, cols, generator=generator)
    momentum, second = torch.zeros(3, rows, cols), torch.zeros((3, rows, 1) if rows >= cols else (3, 1, cols))
    want = [(p.double(), torch.zeros(rows, cols).double(), s.double()) for p, s in zip(master, second)]
    rates, decay, beta2 = [0.05, 0.1, 0.2], 0.3, 0.9
    for step in range(4):
        mu = 0.85 + 0.03 * step
        grad = torch.randn(3, rows, cols, generator=generator)
        normuon_update(grad, master, momentum, second, torch.tensor(rates).view(3, 1, 1), torch.tensor(decay),
                       torch.tensor(mu), beta2, torch.tensor(True))
        want = [normuon_reference(*state, g.double(), mu, beta2, rate, decay)
                for state, g, rate in zip(want, grad, rates)]
        for mine, theirs in zip((master, momentum, second), zip(*want)):
            torch.testing.assert_close(mine.double(), torch.stack(theirs), atol=2e-5, rtol=2e-5)


def test_the_rates_of_each_matrix_in_a_bank(trained):
    """With the momentum and second moments of step 0 a matrix of an update has a known norm: so the rate shows."""
    before = {name: trained.params[name].detach().clone() for name in MATRICES}
    random_gradients(trained.params, 0)
    trained.optimizer.step(0, schedule(trained.cfg, 0))
    factor = train_gpt.lr_factor(trained.cfg, 0)
    decay = 1.2 * 0.023 * factor
    for name, rates in (("attn_qk", (0.023,)), ("attn_vo", (0.023,)), ("mlp", (0.046, 0.092))):
        for i, (old, new) in enumerate(zip(before[name], trained.params[name])):
            rate = rates[i % len(rates)] * factor
            x = (old - new) / rate
            x = torch.where(x * old > 0, x - torch.minimum(x.abs(), decay * old.abs()) * x.sign(), x)
            assert x.norm().item() == pytest.approx(min(x.shape) ** 0.5, rel=0.08), (name, i)


def test_second_moments_are_kept_by_row_and_only_for_wide_matrices_by_column(trained):
    shapes = {name: tuple(trained.optimizer.state[name]["v"].shape[1:]) for name in MATRICES}
    assert shapes == {"attn_qk": (1, 48), "attn_vo": (48, 1), "mlp": (96, 1)}


# -----------------------------------------------------------------------------
# Adam

def test_adam_against_the_rule_with_cautious_decay():
    generator = torch.Generator().manual_seed(0)
    param, m, v = torch.randn(50, 3, generator=generator), torch.zeros(50, 3), torch.zeros(50, 3)
    p, a, b = param.double(), m.double(), v.double()
    decayed = torch.zeros(50, 3, dtype=torch.bool)
    for step in range(1, 6):
        grad = torch.randn(50, 3, generator=generator)
        rate = 0.01 * math.sqrt(1 - 0.95 ** step) / (1 - 0.75 ** step)
        adam_update(grad, param, m, v, torch.tensor(rate), torch.tensor(0.03), 0.75, 0.95, torch.tensor(True))
        a = 0.75 * a + 0.25 * grad
        b = 0.95 * b + 0.05 * grad.double() ** 2
        update = rate * a / (b.sqrt() + 1e-10)
        decayed |= update * p > 0
        p = p - update - 0.03 * p * (update * p > 0)
        for mine, theirs in ((param, p), (m, a), (v, b)):
            torch.testing.assert_close(mine.double(), theirs, atol=1e-6, rtol=1e-5)
    assert 0 < decayed.sum() < decayed.numel() * 1.01


def test_adam_keeps_low_precision_parameters_in_their_precision():
    param, m, v = torch.randn(20).bfloat16(), torch.zeros(20), torch.zeros(20)
    before = param.clone()
    adam_update(torch.ones(20).bfloat16(), param, m, v, torch.tensor(0.5), torch.tensor(0.0), 0.9, 0.99,
                torch.tensor(True))
    torch.testing.assert_close(param, (before.float() - 0.5 * 0.1 / (0.01 ** 0.5)).bfloat16())


def test_parameters_without_decay_move_as_with_torchs_adam(trained):
    """Over a whole run of the optimizer: schedule, bias corrections, gradients of two steps summed."""
    names = [name for name, config in PARAMETERS.items() if config.optim == "adam" and config.decay == 0]
    assert len(names) >= 5
    copies = {name: torch.nn.Parameter(trained.params[name].detach().clone()) for name in names}
    groups = [{"params": [copies[name]], "betas": PARAMETERS[name].betas, "lr": 1.0} for name in names]
    theirs = torch.optim.Adam(groups, eps=1e-12)
    total = {name: 0 for name in names}
    for step in range(trained.cfg.total_steps):
        made = random_gradients(trained.params, step)
        total = {name: total[name] + made[name] for name in names}
        trained.optimizer.step(step, schedule(trained.cfg, step))
        if step % 2:
            for group, name in zip(theirs.param_groups, names):
                group["lr"] = PARAMETERS[name].lr * train_gpt.lr_factor(trained.cfg, step)
                copies[name].grad = total.pop(name)
            theirs.step()
            total = {name: 0 for name in names}
        for name in names:
            torch.testing.assert_close(trained.params[name], copies[name], atol=1e-6, rtol=1e-5)


def test_adam_rests_at_even_steps_and_matrices_never_rest(trained):
    for step in range(trained.cfg.total_steps):
        before = {name: param.detach().clone() for name, param in trained.params.items()}
        random_gradients(trained.params, step)
        trained.optimizer.step(step, schedule(trained.cfg, step))
        for name, param in trained.params.items():
            assert torch.equal(param, before[name]) == (PARAMETERS[name].optim == "adam" and step % 2 == 0), (name, step)
            assert param.grad is None or step % 2 == 0


# -----------------------------------------------------------------------------
# The table and the tied phase

def test_every_parameter_is_in_exactly_one_row(trained, monkeypatch):
    assert PARAMETERS.keys() == trained.params.keys()
    fewer = {name: config for name, config in PARAMETERS.items() if name != "smear_gate"}
    monkeypatch.setattr(train_gpt, "PARAMETERS", fewer)
    with pytest.raises(UserError, match="smear_gate; give it a row in PARAMETERS"):
        Optimizer(GPT(trained.cfg))


@pytest.fixture
def with_another(trained):
    """A model with one more parameter, which its author has not finished."""
    model = GPT(trained.cfg)
    model.one_more = torch.nn.Parameter(torch.full((2,), math.nan))
    return model


def test_a_parameter_that_nothing_trains_is_named(with_another):
    with pytest.raises(UserError, match="one_more"):
        Optimizer(with_another)


def test_a_parameter_without_a_gradient_is_named(with_another, monkeypatch):
    row = {"one_more": ParamConfig("adam", 0.1, (0.9, 0.99), 0, "replicated")}
    monkeypatch.setattr(train_gpt, "PARAMETERS", PARAMETERS | row)
    optimizer = Optimizer(with_another)
    plan, (batch,) = schedule(with_another.cfg, 1), batches(1)
    with pytest.raises(UserError, match="one_more has no gradient"):
        train_gpt.training_step(Backward(with_another), optimizer, [batch], 1, plan, machine())


def test_a_parameter_without_an_initial_value_is_named(with_another, monkeypatch):
    row = {"one_more": ParamConfig("adam", 0.1, (0.9, 0.99), 0, "replicated")}
    monkeypatch.setattr(train_gpt, "PARAMETERS", PARAMETERS | row)
    with pytest.raises(UserError, match="one_more has no initial value"):
        train_gpt.initialize(with_another, Optimizer(with_another), machine())


def test_embedding_and_head_are_one_until_they_part_with_equal_state(trained):
    params, state = trained.params, trained.optimizer.state
    last = max(step for step in range(trained.cfg.total_steps) if train_gpt.is_tied(trained.cfg, step))
    assert last == 13
    moved = params["lm_head"].detach().clone()
    for step in range(trained.cfg.total_steps):
        random_gradients(params, step)
        trained.optimizer.step(step, schedule(trained.cfg, step))
        assert torch.equal(params["embed"], params["lm_head"]) == (step <= last + 1), step
        if step <= last and step % 2:
            assert not torch.equal(params["lm_head"], moved)
            moved = params["lm_head"].detach().clone()
        if step == last:
            for key in state["embed"]:
                assert torch.equal(state["embed"][key], state["lm_head"][key]) and state["embed"][key].any(), key
            assert state["embed"]["m"].data_ptr() != state["lm_head"]["m"].data_ptr()
    assert int(state["embed"]["count"]) == int(state["lm_head"]["count"]) == 10
    assert not torch.equal(state["embed"]["m"], state["lm_head"]["m"])


def test_the_tied_gradient_is_the_sum_of_both_over_two_steps(trained):
    sums = torch.zeros_like(trained.params["lm_head"])
    for step in (0, 1):
        made = random_gradients(trained.params, step)
        sums += made["lm_head"] + made["embed"]
        trained.optimizer.step(step, schedule(trained.cfg, step))
    torch.testing.assert_close(trained.optimizer.state["lm_head"]["m"], (1 - PARAMETERS["lm_head"].betas[0]) * sums)


# -----------------------------------------------------------------------------
# Shares of the ranks

@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_the_shares_of_all_ranks_are_the_parameter_and_some_padding(cfg, world_size):
    reference = dict(GPT(cfg).named_parameters())
    optimizers = [Optimizer(GPT(cfg), rank, world_size) for rank in range(world_size)]
    for name, param in reference.items():
        parts = [optimizer.part(name) for optimizer in optimizers]
        assert torch.equal(optimizers[-1].params[name], param)
        if PARAMETERS[name].comms == "replicated":
            assert all(torch.equal(part, param) for part in parts)
            continue
        assert len({part.shape for part in parts}) == 1
        whole, flat = torch.cat(parts), param.view(-1, *parts[0].shape[1:])
        assert torch.equal(whole[:len(flat)], flat) and not whole[len(flat):].any()
        assert len(whole) - len(flat) < world_size
        for optimizer, part in zip(optimizers, parts):
            if PARAMETERS[name].optim == "muon":
                assert torch.equal(optimizer.state[name]["master"], part)
            part.fill_(3)  # a share is the parameter's own storage
            rows = slice(optimizer.rank * len(part), (optimizer.rank + 1) * len(part))
            assert (optimizer.params[name].view(flat.shape)[rows] == 3).all()
    assert world_size == 1 or len(reference["lm_head"]) % world_size  # padding took part


# -----------------------------------------------------------------------------
# Warm-up

@pytest.fixture
def fresh(small_config):
    """Function of a seed that returns a new model, whose micro-batches have two packs, and its optimizer."""
    def make(seed=0, **changes):
        model = GPT(small_config(seed=seed, micro_batch_tokens=256, **changes))
        return model, Optimizer(model)
    return make


@pytest.fixture
def warm_up(monkeypatch):
    """The function of that name for a CPU; what it logs is dropped."""
    monkeypatch.setattr(train_gpt, "device_memory", lambda machine: 2 ** 30)
    quiet = SimpleNamespace(print=lambda text: None)
    return lambda backward, optimizer: train_gpt.warm_up(backward, optimizer, machine(), quiet)


def steps(backward, optimizer, numbers, micro_batches=2):
    """The losses of some training steps."""
    cfg = optimizer.model.cfg
    return [train_gpt.training_step(backward, optimizer, batches(micro_batches, step), step, schedule(cfg, step),
                                    machine()).tolist() for step in numbers]


@pytest.mark.parametrize("seed", [0, 5])
def test_the_warm_up_leaves_everything_as_it_was(fresh, warm_up, seed):
    model, optimizer = fresh(seed)
    before = digest(run_state(model, optimizer, machine()))
    parameters = [param.detach().clone() for param in model.parameters()]
    assert warm_up(Backward(model), optimizer) == 2
    assert digest(run_state(model, optimizer, machine())) == before
    assert all(torch.equal(a, b) for a, b in zip(parameters, model.parameters()))
    assert all(param.grad is None for param in model.parameters())
    # the first steps are bit for bit those without it
    again, its_optimizer = fresh(seed)
    assert steps(Backward(model), optimizer, range(3)) == steps(Backward(again), its_optimizer, range(3))


@pytest.mark.parametrize("what", ["optimizer", "parameters"])
def test_a_warm_up_that_leaves_a_trace_is_noticed(fresh, warm_up, monkeypatch, what):
    model, optimizer = fresh()
    if what == "optimizer":
        monkeypatch.setattr(Optimizer, "reset", lambda self: None)
    else:
        monkeypatch.setattr(GPT, "init_parameters", lambda self: None)
    with pytest.raises(AssertionError, match="warm-up changed the initial state of"):
        warm_up(Backward(model), optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.uint8])
def test_a_digest_notices_any_flipped_bit(dtype):
    bits = torch.empty(0, dtype=dtype).element_size() * 8
    tensor = torch.arange(40).to(dtype)
    words = tensor.view({8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[bits])
    before = digest({"a": tensor})
    for position in (0, 1, 17, 39):
        for bit in range(bits):
            flip = 1 << bit if bit < 7 or bits == 8 or bit < bits - 1 else -(1 << bit)
            words[position] ^= flip
            assert digest({"a": tensor}) != before, (position, bit)
            words[position] ^= flip
    assert digest({"a": tensor}) == before
    swapped = tensor.clone()
    swapped[3], swapped[4] = tensor[4], tensor[3]
    assert digest({"a": swapped}) != before
    assert digest({"a": torch.tensor(1.0)}) != digest({"a": torch.tensor(-1.0)})


def test_the_digest_of_a_run_covers_parameters_state_buffers_and_random_numbers(fresh):
    model, optimizer = fresh()
    names = run_state(model, optimizer, machine()).keys()
    assert {name for name, _ in model.named_parameters()} <= names
    assert {"bigram_signs", "inv_freq", "attn_scale", "windows"} <= names
    before = digest(run_state(model, optimizer, machine()))
    torch.rand(1)
    assert digest(run_state(model, optimizer, machine())) != before
    before = digest(run_state(model, optimizer, machine()))
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.flatten()[-1:].add_(1)
            after = digest(run_state(model, optimizer, machine()))
            assert after != before
            before = after


def test_a_step_that_is_not_applied_changes_no_parameter():
    master, param = torch.randn(2, 4, 6), torch.randn(20)
    before, grad = (master.clone(), param.clone()), torch.full((2, 4, 6), float("nan"))
    normuon_update(grad, master, torch.zeros(2, 4, 6), torch.zeros(2, 1, 6), torch.ones(2, 1, 1), torch.tensor(0.1),
                   torch.tensor(0.9), 0.9, torch.tensor(False))
    adam_update(grad.flatten()[:20], param, torch.zeros(20), torch.zeros(20), torch.tensor(0.5), torch.tensor(0.0), 0.9,
                0.99, torch.tensor(False))
    assert torch.equal(master, before[0]) and torch.equal(param, before[1])


def test_once_a_loss_was_not_finite_no_parameter_moves(trained):
    """The loss is only looked at a step later, and what stands then must be what the last good step left."""
    random_gradients(trained.params, 0)
    trained.optimizer.step(0, schedule(trained.cfg, 0), torch.tensor(True))
    before = {name: param.detach().clone() for name, param in trained.params.items()}
    for step, finite in ((1, False), (2, True), (3, True)):
        random_gradients(trained.params, step)
        trained.optimizer.step(step, schedule(trained.cfg, step), torch.tensor(finite))
    assert all(torch.equal(param, before[name]) for name, param in trained.params.items())
    trained.optimizer.reset()
    random_gradients(trained.params, 0)
    trained.optimizer.step(0, schedule(trained.cfg, 0), torch.tensor(True))
    assert not torch.equal(trained.params["mlp"], before["mlp"])


# -----------------------------------------------------------------------------
# Compilation shared out over ranks

def kinds(arguments):
    """Shapes and types of the arguments of an update, on which compiled code depends."""
    return tuple((tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else x for x in arguments)


def test_a_rank_rehearses_the_updates_of_a_step(fresh, monkeypatch):
    """Else what it compiles for the other ranks is not what they need."""
    model, _ = fresh()
    optimizer = Optimizer(model, 1, 2)
    seen = []
    optimizer.adam = lambda updates, apply: seen.extend(map(kinds, updates))
    optimizer.normuon = lambda *arguments: seen.append(kinds(arguments))
    step = train_gpt.first_split_step(model.cfg)                   # all parameters move
    plan = schedule(model.cfg, step)
    train_gpt.rehearse_updates(optimizer, plan)
    rehearsed, seen[:] = sorted(map(str, seen)), []
    monkeypatch.setattr(train_gpt.dist, "all_reduce", lambda tensor, async_op: None)
    monkeypatch.setattr(train_gpt, "REDUCE_SCATTER", lambda part, whole, async_op: None)
    monkeypatch.setattr(train_gpt, "ALL_GATHER", lambda whole, part, async_op: SimpleNamespace(wait=lambda: None))
    random_gradients(optimizer.params, 0)
    optimizer.step(step, plan)
    assert sorted(map(str, seen)) == rehearsed and len(seen) == len(optimizer.params)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_compile_every_part_once_and_leave_no_trace(fresh, monkeypatch, world_size):
    model, optimizer = fresh()
    before = digest(run_state(model, optimizer, machine()))
    done = []
    monkeypatch.setattr(train_gpt, "rehearse_updates", lambda *arguments: done.append("updates"))
    monkeypatch.setattr(train_gpt.dist, "barrier", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)

    def forward(*inputs):
        done.append("validation" if len(inputs) == 2 else "training")
        return model(*inputs)
    for rank in range(world_size):
        train_gpt.share_compilation(Backward(forward_of(model, forward)), optimizer,
                                    replace(machine(), rank=rank, world_size=world_size))
    assert sorted(done) == ["training", "updates", "validation"]
    assert digest(run_state(model, optimizer, machine())) == before
    assert all(param.grad is None for param in model.parameters())


def forward_of(model, forward):
    """What stands for the compiled model: it has its parameters, and `forward` in its place."""
    class Compiled:
        parameters = model.parameters

        def __call__(self, *inputs):
            return forward(*inputs)
    return Compiled()


@pytest.mark.parametrize("visible, count, rank, seen", [
    (None, 4, 2, "2"), ("", 4, 3, "3"), ("5,6", 2, 1, "6"), ("GPU-a,GPU-b", 2, 0, "GPU-a"), ("7", 0, 0, "7")])
def test_a_rank_sees_its_own_gpu_only(monkeypatch, visible, count, rank, seen):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    train_gpt.show_one_gpu(rank)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(train_gpt.RankError, match="more ranks than the 2 GPUs here; lower --nproc_per_node"):
        train_gpt.show_one_gpu(2)


@pytest.mark.parametrize("library", [SimpleNamespace(), None])
def test_a_c_library_without_mallopt_is_no_mistake(monkeypatch, library):
    def load(name):
        if library is None:
            raise OSError("no such library")
        return library
    monkeypatch.setattr(train_gpt.ctypes, "CDLL", load)
    train_gpt.keep_freed_memory()


# -----------------------------------------------------------------------------
# Micro-steps as CUDA graphs, the graphs being ones that compute again in Python

def imitate_graphs(monkeypatch, backward):
    """A capture executes nothing, new gradients get memory but no value; a replay computes into what was captured."""
    class Graph:
        def pool(self):
            return "pool"

        def replay(self):
            (loss, grads), = [kept for graph, *kept in backward.graphs.values() if graph is self]
            params = list(backward.model.parameters())
            for param in params:
                param.grad = None
            result = backward.model(*backward.inputs)
            result.backward()
            loss.copy_(result.detach())
            for param, grad, made in zip(params, grads, self.made):
                torch.add(torch.zeros_like(grad) if made else grad, param.grad, out=grad)

    @contextlib.contextmanager
    def capturing(graph, pool):
        assert pool == ("pool" if backward.graphs else None)
        params = list(backward.model.parameters())
        values = [None if param.grad is None else param.grad.clone() for param in params]
        graph.made = [value is None for value in values]
        yield
        for param, value in zip(params, values):
            param.grad.copy_(torch.full_like(param.grad, math.nan) if value is None else value)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)


def plain_for_flex(doc_start, window, longest):
    """Stands in for FlexAttention, which takes windows as tensors and is slow uncompiled."""
    return train_gpt.with_plain(doc_start, int(window), longest)


def test_replayed_micro_steps_are_the_micro_steps(fresh, warm_up, monkeypatch):
    """Over a whole schedule: Adam moves or rests, the head is tied or not; all graphs are captured in the warm-up."""
    monkeypatch.setitem(train_gpt.ATTENTION, "flex", plain_for_flex)
    results = []
    for replays in (False, True):
        model, optimizer = fresh(num_iterations=8, graph_tokens=256 if replays else 255)
        model.cfg = replace(model.cfg, attention="flex")
        backward = Backward(model)
        imitate_graphs(monkeypatch, backward)
        warm_up(backward, optimizer)
        graphs = dict(backward.graphs)
        assert backward.replays == replays and len(graphs) == 6 * replays
        losses = []
        for step in range(model.cfg.num_iterations):
            model.set_stage(train_gpt.stage_index(model.cfg, step))
            losses += steps(backward, optimizer, [step], micro_batches=1 + step % 2)
        assert backward.graphs == graphs, "a graph was captured after the warm-up"
        results.append([*map(torch.tensor, losses), *model.parameters()])
    assert all(torch.equal(plain, replayed) for plain, replayed in zip(*results, strict=True))


def test_with_windows_that_are_numbers_nothing_is_replayed(fresh, warm_up):
    """A graph would keep the windows of the stage in which it was captured."""
    model, optimizer = fresh()
    assert model.cfg.attention in ("auto", "plain")
    backward = Backward(model)
    warm_up(backward, optimizer)
    assert not backward.replays and not backward.graphs


def test_nothing_is_replayed_if_graphs_would_take_the_memory_of_the_validation(fresh, warm_up, monkeypatch):
    monkeypatch.setitem(train_gpt.ATTENTION, "flex", plain_for_flex)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2 ** 29 + 1)
    model, optimizer = fresh()
    model.cfg = replace(model.cfg, attention="flex")
    backward = Backward(model)
    imitate_graphs(monkeypatch, backward)
    warm_up(backward, optimizer)
    assert not backward.replays and not backward.graphs
