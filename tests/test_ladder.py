"""The lab: dev/ladder.py finds planted scaling laws and effects, and no others; dev/loss_diff.py planted differences.

Against: losses made by a known law, differences made by a known effect, a stand-in for a training script, NumPy.
Run: python -m pytest tests/test_ladder.py
"""
import dataclasses
import json
import math
import shlex
import sys

import numpy as np
import pytest
import torch
from conftest import BOS, ROOT, as_flags, make_data, only_folder

import evaluate
import train_gpt_simple as simple

sys.path[:0] = [str(ROOT / "dev"), str(ROOT / "records")]
import ladder  # noqa: E402
import ladder_tables as tables  # noqa: E402
import loss_diff  # noqa: E402
import pictures  # noqa: E402

SMALL = {"preset": "tiny", "depth": 3, "model_dim": 32, "head_dim": 8, "windows": (8, 24), "pack_tokens": 128,
         "val_tokens": 1500, "val_stream_tokens": 512, "batch_tokens": 512, "device": "cpu"}
LAW = tables.LossLaw(alpha=0.4, beta=0.3, E=1.8, A=0.9, B=0.8, n0=1e6, d0=2e7)
BUDGETS, SIZES = (1e14, 3e14, 9e14), (0.5e6, 1e6, 2e6, 4e6, 8e6)

# A training script that needs no PyTorch: its loss is a number made from its flags.
STAND_IN = '''
import argparse, json, os, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np

class UserError(Exception): pass

class Param:
    def __init__(self, *shape): self.shape, self.ndim = shape, len(shape)
    def numel(self): return int(np.prod(self.shape))

class GPT:
    def __init__(self, cfg):
        C = cfg.model_dim
        self.blocks = [SimpleNamespace(window=8)] * cfg.depth
        self.weights = [("embed.weight", Param(100, C)), ("lm_head.weight", Param(100, C)), ("v_lambda", Param())]
        self.weights += [(f"blocks.{i}", Param(12 * C, C)) for i in range(cfg.depth)]
    def named_parameters(self): return self.weights

def parse_config(argv):
    parser = argparse.ArgumentParser()
    for name, default in (("depth", 1), ("seed", 0), ("num_iterations", 10), ("val_every", 0),
                          ("idea", 0.0)):
        parser.add_argument("--" + name, type=type(default), default=default)
    parser.add_argument("--out_dir")
    args = parser.parse_args(argv)
    if args.idea > 5:
        raise UserError(f"--idea={args.idea} is out of range; choose at most 5")
    return SimpleNamespace(**vars(args), train_files="", val_files="", model_dim=4 * args.depth, batch_tokens=64)

def open_shards(train, val): return [None], [None]
def setup_machine(cfg): return None
def resolve_config(cfg, machine, shards): return SimpleNamespace(**vars(cfg), bos_id=0)
def validation_streams(cfg, shards): return [(np.array([0, 1, 2, 0, 3, 0]), np.array([1, 2, 0, 3, 0, -1]))]

def main():
    cfg = parse_config(sys.argv[1:])
    with open(Path(__file__).parent / "calls.txt", "a") as file:
        print(cfg.depth, cfg.seed, cfg.idea, cfg.num_iterations, os.getpid(), file=file)
    if cfg.idea == 4:
        os._exit(9)
    if cfg.idea == 3:
        raise RuntimeError("CUDA error: it broke")
    steps, loss = cfg.num_iterations, 5 - cfg.idea - 0.1 * cfg.depth + 0.01 * cfg.seed
    status = "diverged" if cfg.idea == 2 else "finished"
    info = {"status": status, "tokens_seen": 64 * steps, "step": steps, "val_loss": loss, "train_time_ms": 10 * steps,
            "compile_seconds": 0.0, "val_losses": [{"step": 0, "val_loss": 9.0}, {"step": steps, "val_loss": loss}],
            "device": "stand-in", "versions": {"torch": "none"}}
    run = Path(cfg.out_dir) / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps(info))
    if status == "diverged":
        print("the loss is nan; lower the learning rates", file=sys.stderr)
        return 3
    return 0
'''


def result(arm="base", depth=4, seed=0, loss=4.0, **changes):
    """A line of results.jsonl."""
    return {"arm": arm, "group": "technique", "depth": depth, "seed": seed, "status": "finished", "loss": loss,
            "tokens": 1_000_000, "flops": 6e12, "parameters": 1_000_000, "seconds": 10.0, "alone": False,
            "curve": [[0, 8.0], [50, 5.0], [100, loss]], "flags": {"muon_lr": "0.02"}, "width": 64,
            "key": f"{arm} {depth} {seed} {len(changes)} {changes}"} | changes


def planted_sweep(noise=0.0, seeds=1):
    rng, rows = np.random.default_rng(1), []
    for budget in BUDGETS:
        for depth, size in enumerate(SIZES, 2):
            for seed in range(seeds):
                tokens = budget / 6 / size
                rows.append(result("plain", depth, seed, float(LAW(size, tokens) + noise * rng.normal()),
                                   group="isoflop", budget=budget, parameters=int(size), tokens=int(tokens),
                                   flops=budget))
    return rows


def write_results(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def paired(effects, sd, seeds=5, depth=4, **changes):
    """Runs of base and of arms with planted effects; what a seed does to the base it does to all arms."""
    rng, rows = np.random.default_rng(2), []
    for seed in range(seeds):
        luck = rng.normal(0, 0.05)
        for arm, effect in ({"base": 0.0} | effects).items():
            noise = rng.normal(0, sd) if arm != "base" else 0
            rows.append(result(arm, depth, seed, 4 + luck + effect + noise, **changes.get(arm, {})))
    return rows


@pytest.fixture
def refused(capsys):
    """Function that expects a command line to be refused in one line that has all the words."""
    def check(main, argv, *words):
        capsys.readouterr()
        assert main(list(map(str, argv))) == 2
        out, err = capsys.readouterr()
        assert err.count("\n") == 1 and all(word in err for word in words), err
        assert out == ""
    return check


# -----------------------------------------------------------------------------
# Scaling laws

def test_a_planted_law_is_recovered():
    """Chinchilla's exponents: N ~ C^(beta / (alpha + beta)), D ~ C^(alpha / (alpha + beta))."""
    rows = planted_sweep()
    law = tables.fit_law(*tables.columns_of(rows))
    sizes, tokens, losses = tables.columns_of(rows)
    assert abs(law.alpha - 0.4) < 0.02 and abs(law.beta - 0.3) < 0.02 and abs(law.E - 1.8) < 0.05
    assert np.abs(law(sizes, tokens) - losses).max() < 1e-3
    fits = tables.fit_parabolas(rows)
    assert all(fit.interior for fit in fits)
    for name, exponent in (("best", 0.3 / 0.7), ("best_tokens", 0.4 / 0.7)):
        assert abs(tables.power_law(fits, name)[0].exponent - exponent) < 0.02


def test_the_interval_of_an_exponent_holds_the_planted_one():
    found, _ = tables.power_law(tables.fit_parabolas(planted_sweep(noise=0.01, seeds=3)), "best")
    assert found.low < 0.3 / 0.7 < found.high and 0.02 < found.high - found.low < 0.4


def test_a_size_that_was_held_out_is_predicted():
    found = tables.held_out(planted_sweep(), depth=4)
    assert len(found) == len(BUDGETS)
    for _, size, loss, by_law, by_parabola in found:
        assert size == 2e6 and abs(by_law - loss) < 2e-3 and abs(by_parabola - loss) < 2e-2
    moved = planted_sweep()
    for row in moved:
        row["loss"] += 0.1 * (row["depth"] == 4)
    assert all(abs(loss - by_law - 0.1) < 5e-3 for _, _, loss, by_law, _ in tables.held_out(moved, depth=4))


def test_a_minimum_at_the_edge_is_said_and_does_not_count(quick):
    rows = [row for row in planted_sweep() if row["budget"] < 9e14 or row["parameters"] < 2.5e6]
    text = tables.fit_tables(rows, 0)
    assert text.count("| yes |") == 2 and "**no**: the size is extrapolated" in text
    rising = [row | {"loss": 3 + math.log(row["parameters"])} for row in rows]
    assert "there is no power law" in tables.fit_tables(rising, 0)


@pytest.fixture
def quick(monkeypatch):
    """Few samples of the bootstrap."""
    monkeypatch.setattr(tables, "BOOTSTRAPS", 20)
    monkeypatch.setattr(tables, "LAW_BOOTSTRAPS", 4)


def test_fit_prints_tables_and_draws(tmp_path, capsys, quick):
    results, picture = write_results(tmp_path / "r.jsonl", planted_sweep(noise=0.002)), tmp_path / "fit.svg"
    assert ladder.main(["fit", str(results), "--hold_out=3", f"--picture={picture}"]) == 0
    out = capsys.readouterr().out
    assert "Best N ~ C^0.4" in out and "Depth 3 left out" in out
    assert "<svg" in picture.read_text()


# -----------------------------------------------------------------------------
# Techniques

def test_a_planted_effect_is_found_and_noise_is_not():
    techniques = tables.Techniques(paired({"good": -0.03, "bad": 0.03, "nothing": 0.0}, sd=0.004))
    words = {arm: tables.verdict(techniques.differences(arm, 4, "tokens")) for arm in ("good", "bad", "nothing")}
    assert words == {"good": "helps", "bad": "hurts", "nothing": "no difference seen"}
    noisy = tables.Techniques(paired({"good": -0.03}, sd=0.2))
    assert tables.verdict(noisy.differences("good", 4, "tokens")) == "no difference seen"
    assert tables.verdict([-0.03, -0.03001]) == "too few pairs"


def test_pairs_have_the_same_seed_and_depth():
    rows = paired({"idea": -0.5}, sd=0, seeds=3)
    rows = [row for row in rows if (row["arm"], row["seed"]) != ("base", 1)] + [result("idea", depth=6)]
    techniques = tables.Techniques(rows)
    assert len(techniques.pairs("idea", 4)) == 2 and techniques.depths == [4]
    assert np.allclose(techniques.differences("idea", 4, "tokens"), -0.5)


def test_equal_flops_and_seconds_against_a_base_that_trains_longer():
    """The base gains 0.1 of loss for each factor e of tokens; a token of the idea costs 1.2 x FLOPs and 2 x time."""
    rows = paired({"idea": -0.05}, sd=0, seeds=2, idea={"flops": 7.2e12})
    for row in [row for row in rows if row["arm"] == "base"]:
        for tokens in (500_000, 2_000_000):
            rows.append(row | {"group": "length", "tokens": tokens, "loss": row["loss"] - 0.1 * math.log(tokens / 1e6),
                               "key": f"{row['key']} {tokens}"})
    for arm, seconds in (("base", 10.0), ("idea", 20.0)):
        rows.append(result(arm, group="timing", alone=True, seconds=seconds))
    techniques = tables.Techniques(rows)
    assert np.allclose(techniques.differences("idea", 4, "tokens"), -0.05)
    assert np.allclose(techniques.differences("idea", 4, "FLOPs"), -0.05 + 0.1 * math.log(1.2))
    assert np.allclose(techniques.differences("idea", 4, "seconds"), -0.05 + 0.1 * math.log(2))


def test_equal_flops_without_such_runs_by_the_curve():
    dear = tables.Techniques([result(loss=4.0), result("idea", loss=3.9, flops=12e12)])
    assert dear.differences("idea", 4, "FLOPs") == [pytest.approx(5.0 - 4.0)]       # halfway the idea has 5.0
    cheap = tables.Techniques([result(loss=4.0), result("idea", loss=4.1, flops=3e12)])
    assert cheap.differences("idea", 4, "FLOPs") == [pytest.approx(4.1 - 5.0)]
    assert cheap.differences("idea", 4, "seconds") == []            # no run had the machine for itself


def test_the_page_has_verdicts_failures_and_the_best_rates(tmp_path, capsys, quick):
    rows = paired({"good": -0.03, "bad": 0.03, "nothing": 0.0}, sd=0.002) + planted_sweep(0.002)
    rows += [result("lost", seed=seed, status="diverged", why="the loss is nan") for seed in range(2)]
    for width, best in ((128, 0.02), (256, 0.04)):
        rows += [result("mup", group="transfer", width=width, flags={"muon_lr": str(rate)},
                        loss=4 + abs(math.log(rate / best))) for rate in (0.01, 0.02, 0.04)]
    results, page = write_results(tmp_path / "r.jsonl", rows), tmp_path / "LADDER.md"
    assert ladder.main(["technique", str(results), f"--page={page}"]) == 0
    text = page.read_text()
    order = [text.index(f"\n| {arm} | 5 |") for arm in ("good", "nothing", "bad")]
    assert order == sorted(order)
    assert "2 x diverged: technique, lost, depth 4: the loss is nan" in text
    assert "the best rate moves by 1 column over" in text and "| 128 | 4.6931 | **4.0000** |" in text
    one_width = tables.transfer_tables([row for row in rows if row.get("width") == 128])
    assert one_width.startswith("`mup` (n = 1 in a cell): the best rate is 0.02.\n")


def test_the_page_of_a_fit_has_losses_laws_and_failures(tmp_path, capsys, quick):
    rows = planted_sweep(noise=0.002, seeds=2)
    lost = result("too large", group="isoflop", depth=9, status="diverged", why="the loss is nan")
    results, page = write_results(tmp_path / "r.jsonl", [*rows, lost]), tmp_path / "SCALING.md"
    assert ladder.main(["fit", str(results), "--hold_out=4", f"--page={page}"]) == 0
    assert capsys.readouterr().out == f"wrote {page}\n"
    text = page.read_text()
    assert f"    python dev/ladder.py fit {results} --hold_out=4 --page={page}\n" in text
    cell = [row["loss"] for row in rows if row["budget"] == BUDGETS[0] and row["depth"] == 2]
    line = next(line for line in text.splitlines() if line.startswith("| 2 | 64 | 0.500 |"))
    assert f"| {np.mean(cell):.4f} (sd {np.std(cell, ddof=1):.4f}, n = 2), " in line
    cells = np.array([row["loss"] for row in rows]).reshape(-1, 2)      # seeds 0 and 1 of each size and budget
    sd = math.sqrt(cells.var(axis=1, ddof=1).mean())
    assert f"standard deviation of {sd:.4f}, pooled over {len(cells)} cells" in text
    assert "Best N ~ C^" in text and "The largest error is 0.0" in text
    assert "1 x diverged: isoflop, too large, depth 9: the loss is nan" in text


@pytest.mark.parametrize("name, make", [("LADDER.md", tables.make_page), ("SCALING.md", tables.make_fit_page)])
def test_the_committed_pages_are_what_their_results_give(name, make):
    text = (ROOT / "dev" / name).read_text(encoding="utf-8")
    command = next(line for line in text.splitlines() if line.startswith("    python dev/ladder.py "))
    args = ladder.make_parser().parse_args(shlex.split(command)[2:])
    assert args.page.name == name
    rows = tables.read_results([ROOT / path for path in args.results])
    assert make(rows, command.strip(), args.hold_out, args.picture.name) == text


# -----------------------------------------------------------------------------
# Sweeps

@pytest.fixture
def sweep(tmp_path, monkeypatch, capsys):
    """Function of flags that sweeps the stand-in script, and returns its output and the lines of results.jsonl."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "torch.py").write_text("class _dynamo:\n    class config: pass\nclass cuda:\n"
                                       "    is_available = staticmethod(lambda: False)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(ladder, "visible_gpus", lambda: [])

    def run(*flags):
        code = ladder.main(["sweep", f"--script={tmp_path / 'stand_in.py'}", f"--out={tmp_path / 'out'}", *flags])
        out, err = capsys.readouterr()
        assert (code, err) == (0, ""), err
        return out, tables.read_results([tmp_path / "out" / "results.jsonl"])
    run.calls = lambda: (tmp_path / "calls.txt").read_text().splitlines()
    return run


def test_a_sweep_runs_every_arm_depth_and_seed_once(sweep):
    flags = ["--arm=idea: --idea=0.5", "--depths=2,3", "--seeds=2", "--jobs=2"]
    out, rows = sweep(*flags)
    assert sorted((row["arm"], row["depth"], row["seed"]) for row in rows) == sorted(
        (arm, depth, seed) for arm in ("base", "idea") for depth in (2, 3) for seed in (0, 1))
    row = next(row for row in rows if (row["arm"], row["depth"], row["seed"]) == ("idea", 3, 1))
    assert row["loss"] == pytest.approx(5 - 0.5 - 0.3 + 0.01) and row["tokens"] == 640 and not row["alone"]
    assert row["parameters"] == 3 * 12 * 12 * 12 + 100 * 12         # without the embedding and single numbers
    keys = (1 + 2 + 3 + 1 + 2) / 5                                  # of the five tokens that have a target
    assert row["flops"] == pytest.approx(640 * (6 * row["parameters"] + 12 * 12 * 3 * keys))
    assert len({call.split()[-1] for call in sweep.calls()}) == 2   # two processes made all the runs
    again, rows = sweep(*flags)
    assert "8 runs, of which 8 are in" in again and len(sweep.calls()) == len(rows) == 8
    _, rows = sweep(*flags[:2], "--seeds=3", "--jobs=2")            # only what is missing
    assert len(sweep.calls()) == len(rows) == 12


def test_failed_runs_are_kept_counted_and_not_repeated(sweep):
    arms = [f"--arm={name}: --idea={idea}" for name, idea in (
        ("diverges", 2), ("breaks", 3), ("dies", 4), ("refused", 6))]
    out, rows = sweep(*arms, "--depths=2", "--seeds=1")
    status = {row["arm"]: (row["status"], row["why"]) for row in rows}
    assert status["base"] == ("finished", "")
    assert status["diverges"] == ("diverged", "the loss is nan; lower the learning rates")
    assert status["breaks"] == ("failed", "RuntimeError: CUDA error: it broke")
    assert status["dies"][0] == "failed" and "ended with code 9" in status["dies"][1]
    assert status["refused"] == ("failed", "--idea=6.0 is out of range; choose at most 5")
    assert "5 runs ended, 4 of them failed" in out and out.count("\nfailed: ") == 4
    assert len(sweep(*arms, "--depths=2", "--seeds=1")[1]) == 5 and len(sweep.calls()) == 4


PLAN = """
flags = "--idea=0.0"
depths = [2]
seeds = 2
timing_steps = 3
[[arms]]
name = "base"
[[arms]]
name = "late"
flags = "--idea=0.25"
seeds = 1
round = 1
timing = false
[[arms]]
name = "equal cost"
group = "isoflop"
depths = [2, 4]
budgets = [2e8]
seeds = 1
[[arms]]
name = "lengths"
group = "length"
grid = { num_iterations = [5, 20] }
seeds = 1
"""


def test_a_plan_without_timing(tmp_path):
    (tmp_path / "plan.toml").write_text("timing_steps = 0\n[[arms]]\nname = 'a'\n")
    assert ladder.read_plan(tmp_path / "plan.toml")["timing_steps"] == 0


def test_a_plan_has_budgets_grids_rounds_and_runs_that_are_timed_alone(sweep, tmp_path):
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN)
    _, rows = sweep(str(plan))
    budgeted = [row for row in rows if row["group"] == "isoflop"]
    assert [row["depth"] for row in budgeted] == [2, 4]
    assert all(abs(row["flops"] / 2e8 - 1) < 0.05 for row in budgeted)
    assert budgeted[0]["steps"] > 3 * budgeted[1]["steps"]
    assert [row["steps"] for row in rows if row["group"] == "length"] == [5, 20]
    timed, = (row for row in rows if row["group"] == "timing")
    assert (timed["arm"], timed["steps"], timed["alone"]) == ("base", 3, True) and rows[-1] == timed
    order = [(row["arm"], row["seed"]) for row in rows]
    assert order.index(("late", 0)) > max(order.index(("base", 0)), order.index(("lengths", 0)))
    _, rows = sweep(str(plan), "--groups=length", "--seeds=2", "--shared")
    assert [row["alone"] for row in rows if row["group"] == "length"] == [True] * 2 + [False] * 2
    assert sum(row["group"] == "length" for row in rows) == 4


def test_an_arm_sets_flags_by_depth(refused, tmp_path):
    plan = tmp_path / "plan.toml"
    plan.write_text('seeds = 1\ndepths = [2, 5]\n[[arms]]\nname = "narrow"\n'
                    'by_depth = { model_dim = [16, 40], head_dim = [8, 20] }\n')
    jobs = ladder.plan_jobs(ladder.read_plan(plan), {}, [], 0)
    assert [(job.flags["depth"], job.flags["model_dim"], job.flags["head_dim"]) for job in jobs] == [
        ("2", "16", "8"), ("5", "40", "20")]
    job, = ladder.plan_jobs(ladder.read_plan(plan), {}, [5], 0)     # --depths chooses among them
    assert job.flags["model_dim"] == "40"
    refused(ladder.main, ["sweep", plan, "--depths=4", f"--out={tmp_path / 'o'}"], "for the depths [2, 5]", "not for 4")
    for value in ("[16]", "16"):
        plan.write_text(f'depths = [2, 5]\n[[arms]]\nname = "narrow"\nby_depth = {{ model_dim = {value} }}\n')
        refused(ladder.main, ["sweep", plan, f"--out={tmp_path / 'o'}"], f"by_depth model_dim = {value}", "one value")


def test_an_arm_may_edit_the_script(sweep, refused, tmp_path):
    plan = tmp_path / "plan.toml"
    plan.write_text('seeds = 1\ndepths = [2]\n[[arms]]\nname = "base"\n[[arms]]\nname = "edited"\n'
                    'edits = [["loss = cfg.num_iterations, 5", "loss = cfg.num_iterations, 3"]]\n')
    _, (base, edited) = sweep(str(plan))
    assert base["loss"] - edited["loss"] == pytest.approx(2) and base["script_sha256"] != edited["script_sha256"]
    assert [row["loss"] for row in sweep(str(plan))[1]] == [base["loss"], edited["loss"]]
    for edits, words in (('[["cfg.depth", "1"]]', "occurs 4 times"), ('[["one"]]', "pairs [old text, new text]")):
        plan.write_text(f'[[arms]]\nname = "edited"\nedits = {edits}\n')
        refused(ladder.main, ["sweep", plan, f"--script={tmp_path / 'stand_in.py'}", f"--out={tmp_path / 'o'}"], words)


def test_no_run_starts_after_the_limit(sweep):
    out, rows = sweep("--arm=idea: --idea=1", "--depths=3", "--seeds=200", "--stop_after=0.01")
    assert len(rows) < 400 and f"{400 - len(rows)} are missing" in out


def test_a_worker_gets_what_it_has_compiled_then_what_nobody_has():
    def job(name, seed, **flags):
        return ladder.Job(name, "technique", {"depth": "2", "seed": str(seed)} | flags, round=seed)
    queue = ladder.Queue([job("base", 0), job("gate", 0, gate="head"), job("rate", 0, muon_lr="1"), job("base", 1)])
    assert queue.take(0).arm == "base" and queue.take(1).arm == "gate"
    assert queue.take(0).arm == "rate"              # another rate needs no new compilation
    assert (last := queue.take(1)).arm == "base" and last.seed == 1
    assert queue.take(0) is None and queue.owner(job("gate", 5, gate="head"), [0, 1]) == 1


@pytest.mark.parametrize("flags, words", [
    ([], ["either a plan file or --arm"]),
    (["--arm=no name"], ["--arm='no name' has no name"]),
    (["--arm=x: --seed=3"], ["arm 'x' sets --seed", "--seeds"]),
    (["--arm=x: gate"], ["arm 'x' has the flag 'gate'; write --field=value"]),
    (["--arm=x: --a=1", "--jobs=0"], ["--jobs=0"]),
    (["--arm=x: --a=1", "--depths=a"], ["--depths"]),
    (["--arm=x: --a=1", "--script=gone.py"], ["--script=gone.py does not exist"]),
    (["--arm=x: --a=1", "--groups=isoflop"], ["--groups=isoflop", "it has technique"]),
    (["--arm=x: --a=1", "--arm=x: --a=1"], ["same name and flags"]),
    (["gone.toml"], ["gone.toml cannot be read as a plan"])])
def test_a_bad_sweep_is_refused(refused, tmp_path, flags, words):
    out = tmp_path / "out"
    refused(ladder.main, ["sweep", *flags, f"--out={out}"], *words)
    assert not out.exists()


@pytest.mark.parametrize("text, words", [
    ("arms = 3", ["arms = 3; give a list"]), ("colour = 1", ["has the key 'colour'; choose from flags"]),
    ("timing_steps = -1\n[[arms]]\nname = 'a'", ["timing_steps = -1", "0 for no timing"]),
    ("[[arms]]\nflags = ''", ["arm 1 has no name"]), ("[[arms]]\nname = 'a'\nseeds = 0", ["seeds", "are positive"]),
    ("[[arms]]\nname = 'a'\ngrid = {x = 1}", ["give a list of values"]), ("arms = [1]", ["arm 1 is not a table"]),
    ("x = ", ["cannot be read as a plan"]), ("", ["has no arms"])])
def test_a_bad_plan_is_refused(refused, tmp_path, text, words):
    plan = tmp_path / "plan.toml"
    plan.write_text(text)
    refused(ladder.main, ["sweep", plan, f"--out={tmp_path / 'out'}"], *words)


@pytest.mark.parametrize("rows, flags, words", [
    ("not json", ["fit"], ["line 1 is not a run"]), ('{"arm": "x"}', ["technique"], ["line 1 is not a run"]),
    ([result("idea")], ["technique"], ["no finished run of the arm base"]),
    ([result(), result(key="other")], ["technique"], ["ran twice"]),
    ([result()], ["fit"], ["0 FLOP budgets"]),
    (planted_sweep()[:2], ["fit"], ["has 2 sizes", "run more depths"]),
    (planted_sweep(), ["fit", "--hold_out=9"], ["--hold_out=9", "choose one of them"]),
    (planted_sweep(), ["fit", "--depths=3"], ["--depths=3 is no flag of fit"])], ids=range(8))
def test_bad_results_are_refused(refused, tmp_path, rows, flags, words):
    path = tmp_path / "results.jsonl"
    path.write_text(rows) if isinstance(rows, str) else write_results(path, rows)
    refused(ladder.main, [flags[0], path, *flags[1:]], *words)
    refused(ladder.main, [flags[0], tmp_path / "gone.jsonl"], "gone.jsonl cannot be read")


def test_the_plain_script_has_what_a_worker_uses(tmp_path):
    """What a run will cost, by the script's own model: products as it counts them, keys within windows."""
    data = make_data(tmp_path / "data", 20_000)
    argv = as_flags(SMALL | {"gate": "head", "train_files": f"{data}/train_*.bin", "val_files": f"{data}/val_*.bin"})
    assert all(hasattr(simple, name) for name in ladder.NEEDS)
    found = ladder.describe(simple, argv)
    assert found["parameters"] == 3 * (12 * 32 * 32 + 4 * 32) + 320 * 32 and found["batch_tokens"] == 512
    text = np.fromfile(next(data.glob("val_*")), "<u2", offset=1024)[:1500]
    borders = np.append(np.flatnonzero(text == BOS), 1500)
    position = np.concatenate([np.arange(size) for size in np.diff(borders)])
    keys = sum((np.minimum(position, window) + 1).mean() for window in (8, 24, 24))    # the last layer looks far
    assert found["flops_per_token"] == pytest.approx(6 * found["parameters"] + 12 * 32 * keys)
    assert ladder.SAME_GRAPH <= {field.name for field in dataclasses.fields(simple.Hyperparameters)}


@pytest.mark.parametrize("main, argv", [(ladder.main, ["--help"]), (ladder.main, ["sweep", "--help"]),
                                        (ladder.main, ["technique", "--help"]), (loss_diff.main, ["--help"])])
def test_help(main, argv, capsys):
    with pytest.raises(SystemExit) as done:
        main(argv)
    out = capsys.readouterr().out
    assert done.value.code == 0 and out.startswith("usage: ") and max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize("name, groups", [("ladder_plan.toml", {"technique", "isoflop", "length"}),
                                          ("ladder_gpu.toml", {"technique", "isoflop", "length"}),
                                          ("ladder_scaling.toml", {"isoflop", "transfer"})])
def test_the_plans_can_be_read_and_edit_what_is_there(name, groups, tmp_path):
    jobs = ladder.plan_jobs(ladder.read_plan(ROOT / "dev" / name), {}, [], 0)
    assert {job.group for job in jobs} >= groups
    assert all("train_files" in job.flags for job in jobs)
    fields = {field.name for field in dataclasses.fields(simple.Hyperparameters)} | {"preset"}
    assert set().union(*(job.flags for job in jobs)) <= fields
    for edits in {job.edits for job in jobs}:
        path, _ = ladder.edited(ROOT / "train_gpt_simple.py", edits, tmp_path)
        compile(path.read_text(encoding="utf-8"), str(path), "exec")


# -----------------------------------------------------------------------------
# Differences per token

def losses_file(path, lengths, tokens, losses):
    losses = np.array(losses)
    np.savez(path, format=np.array(1), model=np.array("m"), text_sha256=np.array(["0" * 64] * len(lengths), "S64"),
             lengths=np.array(lengths), tokens=np.array(tokens, np.int32),
             losses=losses if losses.dtype.kind == "U" else losses.astype(np.float32))
    return path


@pytest.fixture
def two_models(tmp_path):
    """B is better by 0.5 from the fourth token of a document on, and worse by 0.25 on the rare token 7."""
    rng, lengths = np.random.default_rng(0), [3, 40, 9, 25]
    tokens = np.array([1] * 70 + [7] * 7)
    rng.shuffle(tokens)
    position = np.concatenate([np.arange(1, length + 1) for length in lengths])
    a = rng.uniform(2, 6, 77)
    b = a - 0.5 * (position >= 4) + 0.25 * (tokens == 7)
    return (losses_file(tmp_path / "a.npz", lengths, tokens, a), losses_file(tmp_path / "b.npz", lengths, tokens, b),
            lengths, tokens, position)


def test_planted_differences_are_found_where_they_are(two_models):
    a, b = map(loss_diff.read_losses, two_models[:2])
    tokens, position = two_models[3:]
    groups = {group.name: group for group in loss_diff.compare(a, b, ["x", "y", "x", "y"])}
    assert sum(group.count for group in groups.values() if group.kind.startswith("position")) == 77
    early, late = (position == 1), (position >= 4) & (position < 8)
    assert groups["1"].b - groups["1"].a == pytest.approx(0.25 * (tokens[early] == 7).mean(), abs=1e-6)
    assert groups["4 to 7"].b - groups["4 to 7"].a == pytest.approx(0.25 * (tokens[late] == 7).mean() - 0.5, abs=1e-6)
    assert groups["x"].count == 12 and groups["y"].count == 65
    assert groups["x"].share + groups["y"].share == pytest.approx(1)
    whole = groups["all tokens"]
    sums = np.add.reduceat(b.losses - a.losses, np.cumsum([0, *two_models[2][:-1]]))
    rest = sums - np.array(two_models[2]) * (whole.b - whole.a)
    assert whole.error == pytest.approx(math.sqrt(4 / 3 * (rest ** 2).sum()) / 77)


def test_tokens_are_grouped_by_how_often_they_occur():
    tokens = np.repeat(np.arange(200), np.arange(200, 0, -1))
    group, names = loss_diff.frequency_groups(tokens)
    assert names == ["rank 1 to 10", "rank 11 to 100", "rank 101 to 1,000"]
    assert (group == np.searchsorted([10, 100], tokens, side="right")).all()


@pytest.fixture
def script():
    return simple


def test_evaluate_writes_losses_that_loss_diff_reads(run_main, tmp_path, capsys, monkeypatch):
    """Their mean is the score, and the sources of the documents are found again by their text."""
    monkeypatch.setattr(pictures, "save", lambda figure, path: path.write_text(str(len(figure.axes))))
    data, out = make_data(tmp_path / "data", 2000), tmp_path / "losses.npz"
    done = run_main(*as_flags(SMALL | {
        "num_iterations": 1, "out_dir": str(tmp_path / "logs"), "train_files": f"{data}/train_*.bin",
        "val_files": f"{data}/val_*.bin"}))
    assert done.code == 0, done.err
    run = only_folder(tmp_path / "logs")
    assert evaluate.main([f"--checkpoint={run}", "--tasks=bpb", "--bpb_tokens=600", f"--losses_out={out}",
                          "--device=cpu", "--threads=1", "--stream_tokens=256"]) == 0
    score = json.loads(capsys.readouterr().out.splitlines()[-1])["scores"]["bpb"]
    found = loss_diff.read_losses(out)
    assert (len(found.tokens), len(found.lengths)) == (score["tokens"], score["n"])
    sizes = (found.tokens < BOS).sum()
    assert found.losses.sum() / math.log(2) / sizes == pytest.approx(score["bpb"], abs=1e-5)

    documents = [bytes(part.tolist()).decode() for part in np.split(found.tokens, np.cumsum(found.lengths)[:-1])]
    text = tmp_path / "text.jsonl"
    write_results(text, [{"text": document, "source": "long" if len(document) > 100 else "short"}
                         for document in documents[1:]])
    assert loss_diff.main([str(out), str(out), f"--sources={text}", f"--picture={tmp_path / 'd.svg'}"]) == 0
    printed = capsys.readouterr().out
    assert "| long |" in printed and "| short |" in printed and "| not found |" in printed
    assert "| +0.0000 ± 0.0000 | - |" in printed and (tmp_path / "d.svg").read_text() == "3"


def test_bad_files_of_losses_are_refused(refused, two_models, tmp_path):
    a, b, lengths, tokens, _ = two_models
    other = losses_file(tmp_path / "other.npz", lengths, tokens + 1, tokens)
    refused(loss_diff.main, [a, other], "hold losses of other tokens", "--bpb_tokens")
    short = losses_file(tmp_path / "short.npz", lengths, tokens, tokens[:-1])
    broken = tmp_path / "broken.npz"
    broken.write_bytes(a.read_bytes()[:200])
    kind = losses_file(tmp_path / "kind.npz", lengths, tokens, ["x"] * 77)
    for path in (short, broken, kind, tmp_path / "gone.npz"):
        refused(loss_diff.main, [a, path], f"{path} is not a file of losses")
    refused(loss_diff.main, [a, b, f"--sources={broken}"], "--sources=", "text and source")
    refused(loss_diff.main, [a, b, f"--picture={tmp_path / 'x.jpg'}"], "must end with .svg or .png")
    refused(evaluate.main, ["--tasks=val", f"--losses_out={tmp_path / 'x.npz'}"], "needs the score bpb")
    refused(evaluate.main, ["--tasks=bpb", f"--losses_out={tmp_path}"], "is a folder")
