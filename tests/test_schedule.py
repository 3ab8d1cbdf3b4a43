"""The schedule of a run: which stage a step belongs to, learning rate, momentum, loss weights, and when the head parts.

Against: small made-up tables with values that can be read off, and properties that hold for every table and length.
Run: python -m pytest tests/test_schedule.py
"""
import importlib
import math
from dataclasses import replace

import pytest
from conftest import SCRIPTS
from hypothesis import given, settings
from hypothesis import strategies as st

from train_gpt import (Hyperparameters, Stage, is_tied, loss_weights, lr_factor, momentum, schedule, stage_ends,
                       stage_index, stage_progress)


def stage(until, lr=1.0, **changes):
    """A row of a stage table."""
    row = {"batch_tokens": 512, "max_doc_tokens": 64, "short": 16, "long": 32, "next_tokens": ((1, 0, 0), (1, 0, 0)),
           "prefix": (0, 0)}
    return Stage(until=until, lr=lr, **row | changes)


def config(*stages, **changes):
    return replace(Hyperparameters(), **{"stages": stages, "num_iterations": 100, "cooldown": 0.0,
                                         "momentum_warmup": 10, "momentum_cooldown": 0.2} | changes)


# 30 steps, 40, 30, and an extension of 10.
FOUR = config(stage(0.3, 1.0), stage(0.7, 2.0), stage(1.0, 3.0), stage(1.1, 3.0), cooldown=0.5, lr_floor=0.1)


@st.composite
def configs(draw):
    """Configurations with one to five stages of any lengths."""
    ends = draw(st.lists(st.floats(0.01, 0.99), max_size=3, unique=True).map(sorted)) + [1.0]
    ends += draw(st.sampled_from([[], [1.02], [1.5]]))
    rates = draw(st.lists(st.floats(0.5, 3), min_size=len(ends), max_size=len(ends)))
    fraction = st.floats(0, 1)
    return config(*map(stage, ends, rates), num_iterations=draw(st.integers(1, 150)), cooldown=draw(fraction),
                  lr_floor=draw(st.floats(0, 0.4)), split_embed=draw(fraction), momentum_cooldown=draw(fraction),
                  momentum_warmup=draw(st.integers(0, 90)))


any_config = given(cfg=configs())
quick = settings(max_examples=50, deadline=None, derandomize=True, database=None)


# -----------------------------------------------------------------------------
# Stages

def test_a_stage_ends_at_its_fraction_of_the_run():
    assert stage_ends(FOUR) == [30, 70, 100, 110] and FOUR.total_steps == 110
    assert [stage_index(FOUR, step) for step in (0, 29, 30, 69, 70, 99, 100, 109)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_after_the_last_step_the_last_stage_goes_on():
    assert stage_index(FOUR, 110) == stage_index(FOUR, 999) == 3


def test_progress_rises_from_0_within_each_stage():
    assert [stage_progress(FOUR, step) for step in (0, 15, 30, 50, 70, 85, 100, 105)] == [0, 0.5] * 4


@quick
@any_config
def test_every_step_belongs_to_one_stage_and_they_come_in_order(cfg):
    indices = [stage_index(cfg, step) for step in range(cfg.total_steps)]
    assert indices == sorted(indices) and indices[-1] <= len(cfg.stages) - 1
    ends = [0, *stage_ends(cfg)]
    assert all(ends[i] <= step < ends[i + 1] for step, i in enumerate(indices))
    assert all(0 <= stage_progress(cfg, step) < 1 for step in range(cfg.total_steps))


def test_a_longer_run_has_the_same_shape():
    longer = replace(FOUR, num_iterations=1000, momentum_warmup=100)
    for step in range(110):
        one, ten = schedule(FOUR, step), schedule(longer, 10 * step)
        assert stage_index(FOUR, step) == stage_index(longer, 10 * step)
        assert ten.lr_factor == pytest.approx(one.lr_factor) and ten.momentum == pytest.approx(one.momentum)
        assert ten.loss_weights == pytest.approx(one.loss_weights)


# -----------------------------------------------------------------------------
# Learning rate and momentum

@pytest.mark.parametrize("step, factor", [
    (0, 1.0), (29, 1.0), (30, 2.0), (50, 2.0), (60, 2 * 0.8 + 0.1 * 0.2), (75, 3 * 0.5 + 0.1 * 0.5), (100, 0.1),
    (109, 0.1)])
def test_the_learning_rate_is_the_stages_until_it_falls_to_the_floor(step, factor):
    assert lr_factor(FOUR, step) == pytest.approx(factor)


@quick
@any_config
def test_the_cooldown_never_rises_within_a_stage(cfg):
    begin = (1 - cfg.cooldown) * cfg.num_iterations
    for step in range(1, cfg.total_steps):
        before, now = lr_factor(cfg, step - 1), lr_factor(cfg, step)
        assert cfg.lr_floor - 1e-9 <= now <= cfg.stages[stage_index(cfg, step)].lr + 1e-9
        if stage_index(cfg, step - 1) == stage_index(cfg, step):
            assert now <= before
            assert now < before or not begin < step <= cfg.num_iterations
    has_cooldown = math.floor(begin) < cfg.num_iterations
    for step in range(cfg.num_iterations, cfg.total_steps) if has_cooldown else ():     # the extension
        assert lr_factor(cfg, step) == pytest.approx(cfg.lr_floor)


def test_lr_is_a_factor_on_every_step():
    half = replace(FOUR, lr=0.5)
    assert all(schedule(half, step).lr_factor == 0.5 * schedule(FOUR, step).lr_factor for step in range(110))


def test_momentum_rises_over_the_warmup_and_falls_over_the_last_steps():
    expected = {0: 0.85, 5: 0.90, 10: 0.95, 50: 0.95, 90: 0.95, 100: 0.90, 109: 0.855}
    assert {step: momentum(FOUR, step) for step in expected} == pytest.approx(expected)


@quick
@any_config
def test_momentum_stays_between_its_two_values_and_turns_once(cfg):
    low, high = cfg.momentum
    values = [momentum(cfg, step) for step in range(cfg.total_steps)]
    assert low <= min(values) and max(values) <= high
    top = values.index(max(values))
    assert values[:top + 1] == sorted(values[:top + 1]) and values[top:] == sorted(values[top:], reverse=True)


# -----------------------------------------------------------------------------
# Losses, and the matrix that is embedding and head

def test_loss_weights_go_in_a_straight_line_from_the_stages_start_to_its_end():
    cfg = config(stage(0.5, next_tokens=((1, 0.5, 0.25), (1, 0.5, 0)), prefix=(0.25, 0.25)),
                 stage(1.0, next_tokens=((1, 0.5, 0), (1, 0, 0)), prefix=(0.4, 0.2)))
    assert loss_weights(cfg, 0) == [1, 0.5, 0.25, 0.25]
    assert loss_weights(cfg, 40) == pytest.approx([1, 0.5, 0.05, 0.25])
    assert loss_weights(cfg, 50) == [1, 0.5, 0, 0.4]
    assert loss_weights(cfg, 75) == pytest.approx([1, 0.25, 0, 0.3])
    assert schedule(cfg, 75).loss_weights == loss_weights(cfg, 75)


@pytest.mark.parametrize("split, last", [(0.5, 51), (0.505, 51), (0.52, 53), (0.01, 1), (0.9, 91), (2.0, None)])
def test_embedding_and_head_are_one_until_an_odd_step(split, last):
    cfg = replace(FOUR, split_embed=split)
    assert [step for step in range(110) if is_tied(cfg, step)] == list(range(110 if last is None else last + 1))


def test_a_split_at_0_means_never_tied():
    assert not any(is_tied(replace(FOUR, split_embed=0.0), step) for step in range(110))


@quick
@any_config
def test_they_part_once_after_a_step_at_which_adam_moves(cfg):
    rows = [schedule(cfg, step) for step in range(cfg.total_steps)]
    tied = [row.tied for row in rows]
    assert tied == sorted(tied, reverse=True) and any(tied) == (cfg.split_embed > 0)
    if any(tied) and not all(tied):
        last = tied.index(False) - 1
        assert last % 2 == 1 and abs(last - cfg.split_embed * cfg.num_iterations) <= 2
        assert [step for step, row in enumerate(rows) if row.splits and step % 2] == [last]


# -----------------------------------------------------------------------------
# The tables of the scripts

@pytest.mark.parametrize("name", SCRIPTS)
def test_every_preset_reaches_all_of_its_stages(name):
    script = importlib.import_module(name)
    for cfg in script.PRESETS.values():
        steps = range(cfg.total_steps)
        assert {script.stage_index(cfg, step) for step in steps} == set(range(len(cfg.stages)))
        assert script.lr_factor(cfg, cfg.total_steps - 1) <= 1.1 * cfg.lr_floor + 0.05


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_preset_for_one_gpu_reads_the_same_tokens(name):
    script = importlib.import_module(name)
    if "single" not in script.PRESETS:
        pytest.skip("no such preset")
    tokens = [sum(cfg.stages[script.stage_index(cfg, step)].batch_tokens for step in range(cfg.total_steps))
              for cfg in (script.PRESETS["speedrun"], script.PRESETS["single"])]
    assert tokens[1] == pytest.approx(tokens[0], rel=1e-3)
