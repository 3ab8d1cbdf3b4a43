"""The schedules of the speedruns against the published figures, step by step, and their shape when they are scaled.

The numbers are those of the NanoGPT speedrun's record 89: 1270 scheduled steps in three equal stages, 15 more of
extension, split_embedd after step 847; and of record 18 of its track 2. Run: python -m pytest tests/test_schedule.py
"""
from dataclasses import replace

import pytest

import train_gpt
import train_gpt_medium
from train_gpt import PRESETS, is_tied, loss_weights, lr_factor, momentum, stage_index, stage_progress

SPEEDRUN = PRESETS["speedrun"]
STEPS = range(SPEEDRUN.total_steps)


def test_the_run_has_1285_steps_in_four_stages():
    assert SPEEDRUN.num_iterations == 1270 and SPEEDRUN.total_steps == 1285
    borders = [step for step in STEPS if step == 0 or stage_index(SPEEDRUN, step) != stage_index(SPEEDRUN, step - 1)]
    assert borders == [0, 423, 847, 1270]
    assert [stage_index(SPEEDRUN, step) for step in borders] == [0, 1, 2, 3]
    assert stage_index(SPEEDRUN, 1284) == stage_index(SPEEDRUN, 1285) == 3


@pytest.mark.parametrize("first, last, batch, document, short, long", [
    (0, 422, 131_072, 896, 128, 384), (423, 846, 262_144, 2048, 384, 896),
    (847, 1269, 393_216, 2048, 640, 1408), (1270, 1284, 393_216, 2048, 768, 1664)])
def test_batch_documents_and_windows_of_every_step(first, last, batch, document, short, long):
    for step in range(first, last + 1):
        stage = SPEEDRUN.stages[stage_index(SPEEDRUN, step)]
        assert (stage.batch_tokens, stage.max_doc_tokens, stage.short, stage.long) == (batch, document, short, long)


def test_windows_of_the_final_validation_and_tokens_of_the_run():
    assert SPEEDRUN.final_windows == (768, 2560) and SPEEDRUN.val_tokens == 10_485_760
    assert sum(SPEEDRUN.stages[stage_index(SPEEDRUN, step)].batch_tokens for step in STEPS) == (
        423 * 131_072 + 424 * 262_144 + 438 * 393_216)


@pytest.mark.parametrize("step, factor", [
    (0, 1), (422, 1), (423, 1.52), (507, 1.52), (508, 1.52), (600, 1.355), (846, 0.912), (847, 1.027), (1000, 0.710),
    (1269, 0.152), (1270, 0.15), (1284, 0.15)])
def test_learning_rate_factor(step, factor):
    assert lr_factor(SPEEDRUN, step) == pytest.approx(factor, abs=5e-4)


def test_learning_rate_of_every_step_by_the_published_formula():
    for step in STEPS:
        top = 1.0 if step < 423 else 1.52 if step < 847 else 1.73
        t = min(1, max(0, (step - 508) / 762))
        assert lr_factor(SPEEDRUN, step) == pytest.approx(top * (1 - t) + 0.15 * t, rel=1e-12)


def test_momentum_rises_for_300_steps_and_falls_over_the_last_50():
    expected = {0: 0.85, 150: 0.90, 300: 0.95, 800: 0.95, 1235: 0.95, 1260: 0.90, 1284: 0.852}
    for step, value in expected.items():
        assert momentum(SPEEDRUN, step) == pytest.approx(value, abs=1e-3), step
    values = [momentum(SPEEDRUN, step) for step in STEPS]
    assert min(values) == 0.85 and max(values) == 0.95
    assert values[:300] == sorted(values[:300]) and values[1235:] == sorted(values[1235:], reverse=True)
    assert set(values[301:1235]) == {0.95}


@pytest.mark.parametrize("step, weights", [
    (0, (1, 0.5, 0.25, 0.25)), (211, (1, 0.5, 0.25 * (1 - 211 / 423), 0.25)), (422, (1, 0.5, 0.25 / 423, 0.25)),
    (423, (1, 0.5, 0, 0.25)), (635, (1, 0.25, 0, 0.125)), (846, (1, 0.5 / 424, 0, 0.25 / 424)),
    (847, (1, 0, 0, 0)), (1269, (1, 0, 0, 0)), (1284, (1, 0, 0, 0))])
def test_loss_weights(step, weights):
    assert loss_weights(SPEEDRUN, step) == pytest.approx(weights, abs=1e-12)


def test_embedding_and_head_part_after_step_847():
    assert [step for step in STEPS if is_tied(SPEEDRUN, step)] == list(range(848))


@pytest.mark.parametrize("iterations", range(20, 60))
def test_they_part_at_an_odd_step_whatever_the_length(iterations):
    cfg = replace(SPEEDRUN, num_iterations=iterations)
    tied = [step for step in range(cfg.total_steps) if is_tied(cfg, step)]
    assert tied == list(range(len(tied))) and tied[-1] % 2 == 1
    assert abs(len(tied) - 2 / 3 * iterations) <= 2


def test_a_shorter_run_has_the_same_shape():
    short = replace(SPEEDRUN, num_iterations=300)
    assert short.total_steps == 304
    for step in range(304):
        same = min(STEPS, key=lambda other: abs(other / 1270 - step / 300))
        if min(abs(step - border) for border in (100, 200, 300)) > 1:  # the border may lie between the two
            assert stage_index(short, step) == stage_index(SPEEDRUN, same)
            assert lr_factor(short, step) == pytest.approx(lr_factor(SPEEDRUN, same), abs=0.02)
            assert loss_weights(short, step) == pytest.approx(loss_weights(SPEEDRUN, same), abs=0.01)
        if step < 304 - 12:  # the rise of the momentum takes 300 steps in any run, its fall a part of the run
            assert momentum(short, step) == pytest.approx(momentum(SPEEDRUN, step), abs=1e-12)
        else:
            assert momentum(short, step) <= 0.85 + 0.1 * (304 - step) / 11.7 + 1e-12
    assert [stage_index(short, step) for step in (99, 100, 199, 200, 299, 300)] == [0, 1, 1, 2, 2, 3]


def test_progress_runs_from_0_towards_1_within_each_stage():
    assert [stage_progress(SPEEDRUN, step) for step in (0, 423, 847, 1270)] == [0, 0, 0, 0]
    assert stage_progress(SPEEDRUN, 422) == pytest.approx(422 / 423)
    assert stage_progress(SPEEDRUN, 1284) == pytest.approx(14 / 15)


def test_every_preset_reaches_its_last_stage():
    for cfg in train_gpt.PRESETS.values():
        assert stage_index(cfg, cfg.total_steps - 1) == len(cfg.stages) - 1


# -----------------------------------------------------------------------------
# Track 2: twelfths of 4700 steps, of which the last five are alike, and 40 steps of extension

MEDIUM = train_gpt_medium.PRESETS["speedrun"]
MEDIUM_BLOCKS = [3, 7, 11, 13, 15, 17, 19, 21, 23]  # of 128 tokens, in the long window


@pytest.mark.parametrize("twelfth", range(12))
def test_the_stages_of_track_2(twelfth):
    for step in (round(twelfth / 12 * 4700), round((twelfth + 1) / 12 * 4700) - 1):
        stage, blocks = MEDIUM.stages[train_gpt_medium.stage_index(MEDIUM, step)], MEDIUM_BLOCKS[min(twelfth, 8)]
        batch, factor = [(131_072, 1.0), (262_144, 1.52), (393_216, 1.73), (524_288, 2.0)][min(twelfth, 3)]
        assert (stage.batch_tokens, stage.max_doc_tokens) == (batch, 4096)
        assert (stage.short, stage.long) == (128 * min(11, blocks // 2), 128 * blocks)
        done = max(0, (step - 1410) / 3290)
        assert train_gpt_medium.lr_factor(MEDIUM, step) == pytest.approx(factor * (1 - done) + 0.1 * done, rel=1e-12)


def test_the_run_of_track_2():
    assert MEDIUM.total_steps == 4740 and MEDIUM.final_windows == (1408, 3456)
    extension = MEDIUM.stages[train_gpt_medium.stage_index(MEDIUM, 4739)]
    assert (extension.batch_tokens, extension.short, extension.long) == (524_288, 1408, 2944)
    assert train_gpt_medium.lr_factor(MEDIUM, 4739) == 0.1
    assert [step for step in range(4740) if train_gpt_medium.is_tied(MEDIUM, step)] == list(range(784))
    weights = [train_gpt_medium.loss_weights(MEDIUM, step) for step in (0, 391, 392, 783, 4739)]
    assert weights[0] == [1, 0.5, 0.25, 0.25] and weights[1] == pytest.approx([1, 0.5, 0, 0.25], abs=1e-3)
    assert weights[2] == [1, 0.5, 0, 0.25] and weights[3:] == [[1, 0, 0, 0]] * 2


@pytest.mark.parametrize("script", [train_gpt, train_gpt_medium])
def test_the_preset_for_one_gpu_reads_the_same_tokens(script):
    tokens = [sum(cfg.stages[script.stage_index(cfg, step)].batch_tokens for step in range(cfg.total_steps))
              for cfg in (script.PRESETS["speedrun"], script.PRESETS["single"])]
    assert tokens[1] == pytest.approx(tokens[0], rel=1e-3)
