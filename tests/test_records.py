"""The archive's tool: statistics, the lies that `check` must name, verdicts of comparisons, replays, tables, pictures.

Against: SciPy; copies of the archive with one planted lie each; a stand-in training script whose losses and times are
known; train_gpt.py itself with a planted slow-down and a bad learning rate. Run: python -m pytest tests/test_records.py
"""
import dataclasses
import hashlib
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import train_gpt
from conftest import ROOT, call_with_output, run_python, small_flags

sys.path.insert(0, str(ROOT / "records"))
records, runs, student, comparison, diffs, launcher, replays = map(importlib.import_module, (
    "records", "runs", "student", "comparison", "diffs", "launcher", "replays"))
FIRST = "dev/track_0_dev/2026-11-21_FirstRuns"
NUMBERS = [3.885228, 3.898051, 3.890992, 3.9, 3.8712, 3.8953]


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """The folder of a project with a copy of its archive, which holds the first record of track_0_dev only."""
    shutil.copytree(ROOT / "records", tmp_path / "records", ignore=shutil.ignore_patterns("__pycache__", "2026-*"))
    shutil.copytree(ROOT / FIRST, tmp_path / FIRST)
    shutil.copy(ROOT / FIRST / "../track.json", tmp_path / FIRST / "../track.json")
    monkeypatch.setattr(records, "HERE", tmp_path / "records")
    return tmp_path


@pytest.fixture
def tool(monkeypatch, capsys):
    """Function that calls the command line; returns (exit code, output, lines of errors)."""
    handler = signal.getsignal(signal.SIGTERM)

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["records.py", *map(str, argv)])
        capsys.readouterr()
        code = records.main()
        out, err = capsys.readouterr()
        return code, out, err.splitlines()
    yield call
    signal.signal(signal.SIGTERM, handler)


def edit(path, function):
    """Changes the object in a JSON file in place."""
    value = json.loads(path.read_text())
    function(value)
    path.write_text(json.dumps(value, indent=1))


def replace(path, old, new, count=1):
    text = path.read_text()
    assert text.count(old) >= 1, (path, old)
    path.write_text(text.replace(old, new, count))


def cover_up(record):
    """Writes hashes and tables as if the logs had always been like this."""
    def hashes(ledger):
        for entry in ledger["runs"]:
            entry["sha256"] = records.log_hashes(record / entry["folder"])
    edit(record / "runs.json", hashes)
    path = record / "README.md"
    path.write_text(runs.fill(path.read_text(), runs.regions(runs.read_record(record))))


# -----------------------------------------------------------------------------
# Statistics

@pytest.fixture(scope="module")
def stats():
    return pytest.importorskip("scipy.stats", reason="the statistics are compared with SciPy, which is not installed")


@pytest.mark.parametrize("df", [1, 2, 3.5, 9, 100, 5000])
@pytest.mark.parametrize("t", [-40, -3.2, -0.5, 0, 1e-5, 0.7, 2.9, 31, 1e4])
def test_student_distribution(stats, df, t):
    assert student.t_cdf(t, df) == pytest.approx(stats.t.cdf(t, df), rel=1e-10, abs=1e-300)
    p = stats.t.cdf(t, df)
    if 1e-9 < p < 1 - 1e-9:
        assert student.t_quantile(p, df) == pytest.approx(t, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("a, b, x", [(0.5, 0.5, 0.3), (3, 7, 0.9), (50, 0.5, 0.99), (2, 400, 0.001), (1, 1, 0.25),
                                     (2, 3, 1)])
def test_incomplete_beta(stats, a, b, x):
    assert student.incomplete_beta(a, b, x) == pytest.approx(stats.beta.cdf(x, a, b), rel=1e-12)


@pytest.mark.parametrize("n", [2, 3, 6])
@pytest.mark.parametrize("center", [3.902, 3.88, 0])
def test_t_tests_and_intervals(stats, n, center):
    values = NUMBERS[:n]
    assert student.t_test(values, center) == pytest.approx(stats.ttest_1samp(values, center, alternative="less").pvalue)
    assert student.t_test(values, center, 2) == pytest.approx(stats.ttest_1samp(values, center).pvalue)
    other = [2 * value - 3.8 for value in reversed(values)]
    pairs = student.t_test([b - a for a, b in zip(values, other)], sides=2)
    assert pairs == pytest.approx(stats.ttest_rel(other, values).pvalue)
    mean, error = np.mean(values), np.std(values, ddof=1) / math.sqrt(n)
    assert student.interval(values, 0.99) == pytest.approx(stats.t.interval(0.99, n - 1, mean, error))
    assert student.interval(values, 0.9, new=True) == pytest.approx(
        stats.t.interval(0.9, n - 1, mean, error * math.sqrt(n + 1)))


@pytest.mark.parametrize("effect, n, p", [(0.1, 5, 0.05), (1, 2, 0.01), (1.5, 4, 0.01), (0.5, 30, 0.05),
                                          (0.2, 300, 0.01)])
@pytest.mark.parametrize("sides", [1, 2])
def test_power(stats, effect, n, p, sides):
    limit = stats.t.ppf(1 - p / sides, n - 1)
    true = stats.nct.sf(limit, n - 1, effect * math.sqrt(n))   # the other tail is no finding
    assert student.t_power(effect, n, p, sides) == pytest.approx(true, abs=2e-4)


def test_needed_n_and_detectable_effect_undo_each_other():
    for n in (3, 8, 40):
        effect = student.detectable(n, 0.01)
        assert student.t_power(effect, n, 0.01) == pytest.approx(0.8, abs=1e-3)
        assert student.needed_n(1.001 * effect, 0.01) == n
    assert student.needed_n(0, 0.01) is None and student.needed_n(0.001, 0.01) is None


def test_a_single_number_shows_nothing():
    assert student.t_test([3.0], 3.28) == 1 and student.interval([3.0], 0.95) == (-math.inf, math.inf)
    assert student.t_test([3.0, 3.0], 3.28) == 0 and student.t_test([3.0, 3.0], 3.0, sides=2) == 1


# -----------------------------------------------------------------------------
# Lies

def digit(record):
    replace(record / "README.md", "3.885228", "3.885229")


def rounded_digit(record):
    replace(record / "README.md", "**49.58 s**", "**49.48 s**")


def swapped_logs(record):
    (record / "seed0" / "log.txt").rename(record / "spare")
    (record / "seed1" / "log.txt").rename(record / "seed0" / "log.txt")
    (record / "spare").rename(record / "seed1" / "log.txt")


def swapped_runs(record):
    (record / "seed0").rename(record / "spare")
    (record / "seed1").rename(record / "seed0")
    (record / "spare").rename(record / "seed1")
    cover_up(record)


def log_of_another_script(record):
    replace(record / "seed2" / "log.txt", "softmax scale", "softmax scala")
    cover_up(record)


def edited_script(record):
    replace(record / "train_gpt.py", "cooldown: float = 0.6", "cooldown: float = 0.5")


def folder_dropped(record):
    shutil.rmtree(record / "seed1")


def entry_dropped(record):
    edit(record / "runs.json", lambda ledger: ledger["runs"].pop(1))


def run_dropped(record):
    folder_dropped(record)
    entry_dropped(record)
    cover_up(record)


def not_counted_without_reason(record):
    edit(record / "runs.json", lambda ledger: ledger["runs"][1].update(counted=False))


def other_validation_file(record):
    name = "data/dev/val_000000.bin"
    for seed in range(3):
        digest = json.loads((record.parent / "track.json").read_text())["val_data"]["val_000000.bin"]["sha256"]
        digest = "0123" + digest[4:] if seed == 1 else digest
        edit(record / f"seed{seed}" / "run.json", lambda info: info.update(data_sha256={name: digest}))
    cover_up(record)


def other_validation_size(record):
    edit(record / "seed2" / "run.json", lambda info: info["data"].update({"data/dev/val_000000.bin": 1036812}))
    cover_up(record)


def no_validation_hash(record):
    edit(record.parent / "track.json", lambda track: track["exempt"][record.name].pop("data_sha256"))


def fewer_validation_tokens(record):
    for seed in range(3):
        edit(record / f"seed{seed}" / "run.json", lambda info: info["val_losses"][-1].update(tokens=524288))
    cover_up(record)


def longer_run(record, steps=151):
    """seed1 goes on for 30 steps more, consistently everywhere."""
    log, ms = record / "seed1" / "log.txt", 600
    text = log.read_text().replace("/121 ", f"/{steps} ")
    last, loss = 49631, "3.858051"
    more = "".join(f"step:{step}/{steps} train_loss:3.8000 train_time:{last + ms * (step - 121)}ms "
                   f"step_avg:{(last + ms * (step - 121)) / step:.2f}ms\n" for step in range(122, steps + 1))
    end = last + ms * (steps - 121)
    more += f"step:{steps}/{steps} val_loss:{loss} train_time:{end}ms step_avg:{end / steps:.2f}ms\n"
    log.write_text(text.replace("finished: ", more + "finished: "))

    def longer(info):
        info["config"]["num_iterations"] = 149
        info["argv"] = [arg.replace("iterations=120", "iterations=149") for arg in info["argv"]]
        info["val_losses"].append({"step": steps, "train_time_ms": end, "val_loss": float(loss), "tokens": 983040})
        info.update(train_time_ms=end, tokens_seen=runs.tokens_after(info["config"], steps))
    edit(record / "seed1" / "run.json", longer)
    cover_up(record)


def loss_typed_into_run_json(record):
    edit(record / "seed1" / "run.json", lambda info: info["val_losses"][-1].update(val_loss=3.868051))
    cover_up(record)


def loss_typed_into_both_logs(record):
    edit(record / "seed1" / "run.json", lambda info: info["val_losses"][-1].update(val_loss=3.868051))
    replace(record / "seed1" / "log.txt", "3.898051", "3.868051")


def loss_typed_into_the_text(record):
    replace(record / "README.md", "Three runs of", "Without the slow seed the loss is 3.881. Three runs of")


def loss_typed_into_a_table(record):
    replace(record / "README.md", "## Setup", "| arm | loss |\n| --- | --- |\n| best | 3.88 |\n\n## Setup")


def time_typed_into_both_logs(record):
    edit(record / "seed0" / "run.json", lambda info: (info.update(train_time_ms=48593),
                                                      info["val_losses"][-1].update(train_time_ms=48593)))
    replace(record / "seed0" / "log.txt", "train_time:49593ms", "train_time:48593ms", count=9)
    cover_up(record)


def tokens_typed(record):
    edit(record / "seed0" / "run.json", lambda info: info.update(tokens_seen=36850496))
    cover_up(record)


def other_flags(record):
    edit(record / "seed0" / "run.json", lambda info: info["argv"].append("--lr=1.1"))
    cover_up(record)


def compiled_late(record):
    edit(record / "seed0" / "run.json", lambda info: info.update(recompiles=2))
    cover_up(record)


def two_gpus(record):
    edit(record / "seed0" / "run.json", lambda info: info.update(world_size=2))
    cover_up(record)


def claimed_too_much(record):
    edit(record / "runs.json", lambda ledger: ledger.update(claim="record"))


def question_left_open(record):
    replace(record / "README.md", "Three runs", "FILL IN: why? Three runs")


LIES = {
    digit: "README.md says '3.885229' where the logs say '3.885228'",
    rounded_digit: "README.md says",
    swapped_logs: "seed0: run.json says a loss of",
    swapped_runs: "seed0: runs.json says finished, seed 0; run.json says finished, seed 1",
    log_of_another_script: "seed2: log.txt does not begin with the script",
    edited_script: "an edited script",
    folder_dropped: "lists the run seed1, which is not there: a dropped run",
    entry_dropped: "the run seed1 is not in runs.json: a dropped run",
    run_dropped: "no run of train_gpt with seed 1, but later ones: a dropped run",
    not_counted_without_reason: "not counted without saying why",
    other_validation_file: "seed1 was validated on another file: val_000000.bin has sha256 0123",
    other_validation_size: "seed2 was validated on another file: val_000000.bin with 1036812 tokens, not 1036811",
    no_validation_hash: "does not say the sha256 of its validation shards",
    fewer_validation_tokens: "524288",
    longer_run: "seed1 stops at step 151, the others at 121",
    loss_typed_into_run_json: "seed1: run.json says a loss of 3.868051 after 49631 ms at step 121, log.txt 3.898051",
    loss_typed_into_both_logs: "seed1: run.json is not the file that was listed",
    loss_typed_into_the_text: "README.md says 3.881 outside the generated parts, which no log says",
    loss_typed_into_a_table: "a table outside the generated parts",
    time_typed_into_both_logs: "seed0: log.txt has train_time 48593 ms at step",
    tokens_typed: "seed0: run.json says 36850496 tokens, its stage table gives 31850496",
    other_flags: "seed0 did not run with the flags of train_gpt in runs.json: --lr=1.1",
    compiled_late: "seed0 compiled 2 graphs after the clock had started",
    two_gpus: "seed0 ran on 2 x NVIDIA H200, the track is for 1 x H200",
    claimed_too_much: "claims a record, but: A reference, not a record: that the mean loss is below 3.902 is not shown",
    question_left_open: "still asks for something",
}


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_check_names_the_lie(lie, archive, tool):
    lie(archive / FIRST)
    code, _, errors = tool("check", archive / FIRST, "--no_guard")
    assert code == 1
    assert LIES[lie] in errors[0], errors
    assert len(errors) == 1 or (len(errors) == 2 and "more of this kind" in errors[1]), errors


def honest_in_all_but_the_script(record, old, new):
    """A script with a cheat in it, and logs that hold that script."""
    before = (record / "train_gpt.py").read_text()
    replace(record / "train_gpt.py", old, new)
    after = (record / "train_gpt.py").read_text()
    digest = hashlib.sha256(after.encode()).hexdigest()
    for seed in range(3):
        edit(record / f"seed{seed}" / "run.json", lambda info: info.update(source_sha256=digest))
        replace(record / f"seed{seed}" / "log.txt", before, after)
    cover_up(record)


@pytest.mark.parametrize("old, new, words", [
    ("mask = (key <= index[:, :, None])", "mask = (key <= index[:, :, None] + 1)", "looks at future tokens"),
    ("return torch.stack(losses).sum()", "return 0.99 * torch.stack(losses).sum()", "normalised")])
def test_check_names_a_script_that_does_not_measure_what_it_says(old, new, words, archive, tool, fast_run, monkeypatch):
    if words == "normalised":                            # the other guard is a process like any
        monkeypatch.setattr(subprocess, "run", fast_run)
    honest_in_all_but_the_script(archive / FIRST, old, new)
    code, _, errors = tool("check", archive / FIRST)
    assert (code, len(errors)) == (1, 1) and words in errors[0], errors


def test_the_archive_as_it_is_passes(tool, fast_run, monkeypatch):
    """The guard with one record; with all of them, whose scripts do not change, in CI (.ci/run)."""
    code, out, errors = tool("check", "--all", "--no_guard")
    assert (code, errors) == (0, []) and f"{FIRST}: ok" in out
    monkeypatch.setattr(subprocess, "run", fast_run)
    code, out, errors = tool("check", ROOT / "records" / "track_0_code" / "2026-11-28_FewerSteps")
    assert (code, errors) == (0, [])


def test_a_board_that_is_not_what_the_records_say(archive, tool):
    tool("board")
    assert tool("check", "--all", "--no_guard")[0] == 0
    replace(archive / "dev/records.md", "3.8914", "3.8814")
    code, _, errors = tool("check", "--all", "--no_guard")
    assert code == 1 and "dev/records.md is not what the records say" in errors[0]
    tool("board")
    replace(archive / "records/README.md", "## Rules", "## Advice")
    code, _, errors = tool("check", "--all", "--no_guard")
    assert code == 1 and "records/README.md is not what the records say" in errors[0]


def test_a_record_without_a_ledger_is_found(archive, tool):
    (archive / FIRST / "runs.json").rename(archive / "spare.json")
    tool("board")
    code, _, errors = tool("check", "--all", "--no_guard")
    assert code == 1 and "without runs.json" in errors[0]


# -----------------------------------------------------------------------------
# What strangers send

@pytest.mark.parametrize("path, content, words", [
    ("runs.json", b"{", "is not JSON"), ("runs.json", b"[]", "is not a JSON object"),
    ("runs.json", b"[" * 100_000, "is not JSON"), ("runs.json", b" " * (5 << 20), "more than"),
    ("runs.json", b"\xff\xfe", "not UTF-8"), ("runs.json", b'{"kind": "record"}', "has arms"),
    ("runs.json", b'{"kind": "record", "arms": {}, "runs": []}', "has format None"),
    ("runs.json", b'{"format": 1, "kind": "record", "arms": {"a": {"script": "../x", "flags": []}}, "runs": []}',
     "../x"),
    ("seed0/run.json", b'{"status": NaN}', "NaN"), ("seed0/run.json", b'{"seed": 1e999}', "1e999"),
    ("seed0/run.json", b'{"status": "finished"}', "should be of type"),
    ("seed1/log.txt", b"", "another run's log"), ("README.md", b"# Nothing\n", "lacks the part"),
    ("../track.json", b"{}", "has title")])
def test_damaged_files_are_named(path, content, words, archive, tool):
    (archive / FIRST / path).write_bytes(content)
    code, _, errors = tool("check", archive / FIRST, "--no_guard")
    assert (code, len(errors)) == (1, 1) and words in errors[0], errors


@pytest.mark.parametrize("change, words", [
    ({"val_losses": [{"step": 0}]}, "train_time_ms"), ({"seed": True}, "seed 'True'"), ({"seed": -1}, "seed '-1'"),
    ({"train_time_ms": 0}, "trained for 0 ms"), ({"val_losses": []}, "must rise"), ({"world_size": "1"}, "world_size"), ({"device": None}, "device"),
    ({"config": {"stages": [{}]}}, "stage table"), ({"config": {"stages": 3}}, "stage table")])
def test_a_run_with_fields_of_the_wrong_kind_is_refused(change, words, archive, tool):
    edit(archive / FIRST / "seed0" / "run.json", lambda info: info.update(change))
    code, _, errors = tool("summarize", archive / FIRST)
    assert (code, len(errors)) == (2, 1) and words in errors[0], errors


@pytest.mark.parametrize("name", ["runs.json", "seed0/run.json"])
def test_whatever_stands_in_a_field_there_is_no_traceback(name, archive):
    path = archive / FIRST / name
    good = json.loads(path.read_text())
    places = [good, *(good.get(key) for key in ("config", "data", "arms")), *good.get("runs", []),
              *good.get("val_losses", []), *good.get("arms", {}).values()]
    for place in filter(None, places):
        for key in list(place):
            kept = place.pop(key)
            for value in (None, {"a": []}, ["x"], "x", 1e300, -1, True):
                place[key] = value
                path.write_text(json.dumps(good))
                problems = records.check_record(archive / FIRST, guard=False)
                assert all(isinstance(problem, str) for problem in problems), (key, value)
                assert problems or name == "runs.json", (key, value)
            place[key] = kept


@pytest.mark.parametrize("argv, words", [
    ([], "--help"), (["chek"], "--help"), (["check"], "--all"), (["check", "--al"], "--al"),
    (["summarize", "nowhere"], "no run.json in nowhere"), (["plot", "nowhere"], "no run.json"),
    (["replay", "nowhere"], "runs.json"),
    (["new", "X", "--track=track_9", "nowhere"], "track_9 is not a track; choose one of"),
    (["new", "X", "--track=track_0_dev", "nowhere"], "nowhere"), (["check", ""], "a path is empty"),
    (["compare", "nowhere.py", "--b_flags=--lr=2"], f"there is no file nowhere.py in {ROOT}; write the path"),
    (["compare", "data/train_gpt.py", "--b_flags=--lr=2"],
     f"there is no file train_gpt.py in {ROOT / 'data'}; this project's is {ROOT / 'train_gpt.py'}"),
    (["compare", "README.md", "--b_flags=--lr=2"], "README.md is not a training script"),
    (["compare", "train_gpt.py"], "nothing to compare A with"),
    (["compare", "train_gpt.py", "train_gpt.py"], "A and B are the same"),
    (["compare", "train_gpt.py", "--noise", "--b_flags=--lr=2"], "--noise is for one script"),
    (["compare", "train_gpt.py", "--noise", "--seed=1"], "--seed=1 cannot"),
    (["compare", "train_gpt.py", "--noise", "--n=0"], "--n=0 is below 1"),
    (["compare", "train_gpt.py", "--arm=x"], "has no name"),
    (["compare", "train_gpt.py", "--arm=../x: --lr=2"], "has no name"),
    (["compare", "train_gpt.py", "--arm=README.md: --lr=2"], "the name of a file or run of the output folder"),
    (["compare", "train_gpt.py", "--arm=A_seed0: --lr=2"], "the name of a file or run of the output folder"),
    (["compare", "train_gpt.py", "--arm=x: y"], "no flag, edit or script"),
    (["compare", "train_gpt.py", "--arm=x: a => b => c"], "not of the form old => new"),
    (["compare", "train_gpt.py", "--arm=x: import => "],
     "times in train_gpt.py; an edit needs a text that occurs exactly"),
    (["compare", "train_gpt.py", "--arm=x: no such words => y"], "occurs 0 times"),
    (["compare", "train_gpt.py", "--arm=x: y.py"], f"there is no file y.py in {ROOT}"),
    (["compare", "train_gpt.py", "--arm=x: --lr=2", "--arm=X: --lr=3"], "X is there twice"),
    (["compare", "train_gpt.py", "--arm=x: --lr=2", "--arm=y: --lr=2"], "x and y are the same"),
    (["compare", "train_gpt.py", "--b_flags=--lr=2", "--at_once", "--gpus=2"], "exclude each other"),
    (["compare", "train_gpt.py", "--b_flags=--lr=2", "--limit=-1"], "--limit=-1 is below 0"),
    (["compare", "train_gpt.py", "--arms=nowhere"], "nowhere is not there"),
    (["compare", "train_gpt.py", "--track=track_0_cpu", "--a_flags=--lr=2"], "fixes the flags of A"),
    (["compare", *["train_gpt.py"] * 27], "27 scripts are too many"), (["shards", "track_9"], "is not a track"),
    (["replay", FIRST, "--num_iterations=7"], "reference runs of 120 iterations only")])
def test_a_command_that_makes_no_sense_gets_one_line(argv, words, tool, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, out, errors = tool(*argv)
    assert (code, out, len(errors)) == (2, "", 1), errors
    assert errors[0].startswith("records.py: ") and words in errors[0]


@pytest.mark.parametrize("command", ["", "summarize", "check", "replay", "compare", "plot", "board", "new", "shards", "make"])
def test_help_is_printed(command, tool, capsys):
    with pytest.raises(SystemExit) as end:
        tool(*filter(None, [command]), "--help")
    assert end.value.code == 0 and f"usage: records.py {command}" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(path.name for path in (ROOT / "records").glob("*.py")))
def test_help_loads_nothing_that_takes_long(path):
    """`--help` of each file prints its docstring, and imports neither PyTorch nor Matplotlib."""
    code = ("import runpy, sys\nfor name in ('torch', 'matplotlib', 'safetensors'):\n    sys.modules[name] = None\n"
            f"sys.path.insert(0, {str(ROOT / 'records')!r})\nsys.argv = [{path!r}, '--help']\n"
            f"runpy.run_path({str(ROOT / 'records' / path)!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    title = (ROOT / "records" / path).read_text().split('"""')[1].split("\n")[0]
    assert (done.returncode, done.stderr) == (0, "") and title in done.stdout


def test_flags_of_compare_are_not_those_of_the_scripts():
    """Or a script could not get them."""
    names = {action.dest for action in records.make_parser()._subparsers._group_actions[0].choices["compare"]._actions}
    assert not names & {field.name for field in dataclasses.fields(train_gpt.Hyperparameters)}


# -----------------------------------------------------------------------------
# Comparisons, with a stand-in that writes what a training script would, with known losses and times

STAND_IN = r'''
import json, hashlib, os, signal, sys, time
from pathlib import Path
flags = dict(arg.removeprefix("--").split("=", 1) for arg in sys.argv[1:])
state = Path(flags["state"])
count = len(state.read_text().split()) if state.exists() else 0
state.write_text("x " * (count + 1))
if count == int(flags.get("refuse_at", -1)):
    sys.exit("toy: no shards here; make some")
seed, lr = int(flags["seed"]), float(flags.get("lr", 1))
out = Path(flags["out_dir"]) / f"run_{count}"
out.mkdir(parents=True)
noise = [0.004, -0.003, 0.001, -0.006, 0.005, 0.002, -0.001, -0.002][count % 8]
pace, script = SLOW * 100 * (1 + noise), Path(__file__)
paths = [script.with_name(name) for name in (script.name, "harness.py", "triton_kernels.py")]
sources = {path.name: path.read_text(encoding="utf-8") for path in paths if path.exists()}
head = "".join(text + "\n" + "=" * 100 + "\n" for text in sources.values())
loss = lambda step: 2 + 3 / (1 + step) * lr + 0.01 * (seed % 3) + (lr - 1) * 0.5 + noise / 10
points = [dict(step=s, train_time_ms=round(s * pace), val_loss=round(loss(s), 6), tokens=1000) for s in (0, 10, 20)]
config = dict(stages=[dict(until=1.0, batch_tokens=512)], num_iterations=20, val_tokens=1000)
info = dict(status="running", script=Path(__file__).name, argv=sys.argv[1:], config=config, seed=seed, device="cpu",
            source_sha256=hashlib.sha256(script.read_bytes()).hexdigest(), versions=dict(python="3"), world_size=1,
            gpu="", started="2026-11-22T00:00:00", val_losses=[])
if "triton_kernels.py" in sources:                   # such a script names all that ran
    contents = {name: script.with_name(name).read_bytes() for name in sources}
    info["sources"] = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    info["source_sha256"] = hashlib.sha256(b"".join(contents.values())).hexdigest()
    config["kernels"] = True
(out / "run.json").write_text(json.dumps(info))
for name in sources:
    (out / name).write_bytes(script.with_name(name).read_bytes())
if count == int(flags.get("fail_at", -1)):
    (out / "run.json").write_text(json.dumps(info | dict(status="failed", error="toy: the disk is full")))
    sys.exit("toy: the disk is full")
if count == int(flags.get("wait_at", -1)):
    time.sleep(60)
if lr > 10:
    (out / "log.txt").write_text(head, encoding="utf-8")
    (out / "run.json").write_text(json.dumps(info | dict(status="diverged")))
    sys.exit(3)
line = "step:{}/20 {}_loss:{:.6f} train_time:{}ms step_avg:{:.2f}ms\n"
log = head + line.format(0, "val", loss(0), 0, 0)
for s in range(1, 21):
    log += line.format(s, "train", loss(s), round(s * pace), round(s * pace) / s)
    log += line.format(s, "val", loss(s), round(s * pace), round(s * pace) / s) if s in (10, 20) else ""
(out / "log.txt").write_text(log, encoding="utf-8")
(out / "checkpoint").mkdir()
info |= dict(status="finished", val_losses=points, train_time_ms=round(20 * pace), compile_seconds=0.0, recompiles=0,
             tokens_seen=20 * 512, peak_memory_gib=0.0, data={"val_000000.bin": 2000},
             data_sha256={"val_000000.bin": "ab" * 32})
(out / "run.json").write_text(json.dumps(info))
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Function that writes a stand-in; a working folder of its own; the flag that counts runs."""
    monkeypatch.chdir(tmp_path)

    def write(name, slow=1.0):
        path = tmp_path / name
        path.write_text(STAND_IN.replace("SLOW", str(slow)))
        return path
    write.state = f"--state={tmp_path / 'count'}"
    return write


COLUMNS = "arm measure difference interval p pairs verdict pairs_needed visible_from".split()


def verdicts(out, arm="B"):
    """measure -> cells of the printed verdict on an arm, by name."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("| ")]
    return {row[1]: SimpleNamespace(**dict(zip(COLUMNS, row))) for row in rows if row[0] == arm and len(row) == 9}


def test_a_script_against_itself_is_not_distinguishable(toy, tool):
    toy("train_a.py")
    for scripts in (["train_a.py"], ["train_a.py", "train_a.py"]):
        code, out, errors = tool("compare", *scripts, "--noise", "--n=4", toy.state)
        assert (code, errors) == (0, [])
        found = verdicts(out)
        assert list(found) == ["time", "loss", "time at equal loss"]
        for verdict in found.values():
            assert (verdict.verdict, verdict.pairs) == ("not distinguishable", "4")
            assert verdict.pairs_needed.strip("> ").isdigit() and verdict.visible_from != "-"


def test_ten_percent_and_a_bad_learning_rate_are_seen(toy, tool):
    toy("train_a.py")
    toy("train_b.py", slow=1.1)
    _, out, _ = tool("compare", "train_a.py", "train_b.py", "--n=4", toy.state)
    found = verdicts(out)
    assert found["time"].verdict == "**worse**" and found["loss"].verdict == "not distinguishable"
    assert float(found["time"].difference.split(" ")[0]) == pytest.approx(10, abs=1.5)
    assert found["time at equal loss"].verdict == "**worse**"
    _, out, _ = tool("compare", "train_b.py", "train_a.py", "--n=4", toy.state)
    assert verdicts(out)["time"].verdict == "**better**"
    _, out, _ = tool("compare", "train_a.py", "--b_flags=--lr=1.3", "--n=4", toy.state)
    found = verdicts(out)
    assert found["loss"].verdict == "**worse**" and found["time"].verdict == "not distinguishable"
    assert found["time at equal loss"].verdict == "**worse**"


def test_a_change_that_does_not_act_is_named(toy, tool):
    """An edit that no loss depends on gets a note; a change that acts, noise, and older comparisons get none."""
    toy("train_a.py").write_text("MARK = 1\n" + STAND_IN.replace("SLOW", "1").replace("noise / 10", "0"))
    for n, pairs in ((1, "the one pair"), (3, "all 3 pairs")):
        code, out, _ = tool("compare", "train_a.py", "--arm=dead: MARK = 1 => MARK = 2", "--arm=hot: --lr=1.3",
                            f"--n={n}", toy.state, "--out=here")
        assert code == 0 and f"- **dead has the same losses as A** in {pairs}, to the last digit: with these" in out
        assert out.count("has the same losses") == Path("here/README.md").read_text().count("has the same losses") == 1
        assert tool("check", "here", "--no_guard")[::2] == (0, [])
    edit(Path("here/runs.json"), lambda ledger: ledger.update(format=2))
    assert "same losses" not in runs.verdict_text(runs.read_record(Path("here")))
    edit(Path("here/runs.json"), lambda ledger: ledger.update(format=3))
    edit(Path("here/dead_seed1/run.json"), lambda info: info["val_losses"][1].update(val_loss=2.5))
    assert "same losses" not in runs.verdict_text(runs.read_record(Path("here")))
    _, out, _ = tool("compare", "train_a.py", "--noise", "--n=3", toy.state)
    assert "same losses" not in out and "the same in every pair" in verdicts(out)["loss"].verdict


def test_the_order_alternates_and_seeds_are_pairwise_the_same(toy, tool):
    toy("train_a.py")
    _, out, _ = tool("compare", "train_a.py", "--b_flags=--lr=1.3", "--n=3", toy.state, "--out=here")
    told = [line.split(": loss")[0] for line in out.splitlines() if line.startswith("round")]
    assert told == ["round 1 of 3: A begins", "round 1/3, A", "round 1 of 3: B begins", "round 1/3, B",
                    "round 2 of 3: B begins", "round 2/3, B", "round 2 of 3: A begins", "round 2/3, A",
                    "round 3 of 3: A begins", "round 3/3, A", "round 3 of 3: B begins", "round 3/3, B"]
    ledger = json.loads(Path("here/runs.json").read_text())
    assert [(run["arm"], run["seed"]) for run in ledger["runs"]] == [
        ("A", 0), ("B", 0), ("B", 1), ("A", 1), ("A", 2), ("B", 2)]
    assert ledger["arms"]["B"]["flags"] == [toy.state, "--lr=1.3"]
    assert not list(Path("here").rglob("checkpoint")) and not Path("here/.running").exists()


def test_pairs_at_once_see_each_other_and_half_of_the_machine(toy, tool, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    path = toy("train_a.py")
    path.write_text("""
import os, sys, time
from pathlib import Path
seed = next(flag for flag in sys.argv if flag.startswith("--seed="))[7:]
arm = Path(next(flag for flag in sys.argv if flag.startswith("--out_dir="))[10:]).name
Path(f"seen_{seed}_{arm}").write_text(os.environ["CUDA_VISIBLE_DEVICES"] + " " + os.environ["OMP_NUM_THREADS"])
deadline = time.monotonic() + 30
while len(list(Path().glob(f"seen_{seed}_?"))) < 2:
    assert time.monotonic() < deadline, "the other one of the pair does not run"
    time.sleep(0.01)
""" + path.read_text())
    code, out, errors = tool("compare", "train_a.py", "--noise", "--n=2", "--at_once", toy.state, "--out=here")
    assert (code, errors) == (0, []) and out.count("round 2/2") == 2
    threads = max(1, os.cpu_count() // 2)
    assert {path.name: path.read_text() for path in Path().glob("seen_*")} == {
        "seen_0_A": f"4 {threads}", "seen_0_B": f"7 {threads}", "seen_1_B": f"4 {threads}", "seen_1_A": f"7 {threads}"}
    assert "ran at once, each with its share of the cores" in Path("here/README.md").read_text()
    assert tool("check", "here", "--no_guard")[::2] == (0, [])
    code, _, errors = tool("compare", "train_a.py", "--noise", "--n=2", toy.state, "--out=here")
    assert code == 2 and "another comparison" in errors[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    code, _, errors = tool("compare", "train_a.py", "--noise", "--n=2", "--at_once", toy.state, "--out=there")
    assert code == 2 and "needs 2 GPUs, or none, and finds 1" in errors[0] and not Path("there").exists()


def test_a_comparison_is_checked_and_summarized_like_a_record(toy, tool):
    toy("train_a.py")
    tool("compare", "train_a.py", "--noise", "--n=3", toy.state, "--out=here")
    assert tool("check", "here", "--no_guard")[::2] == (0, [])
    _, out, _ = tool("summarize", "here")
    assert "| A | 3 |" in out and verdicts(out)["time"].verdict == "not distinguishable"
    edit(Path("here/A_seed1/run.json"), lambda info: info.update(train_time_ms=1500))
    code, _, errors = tool("check", "here", "--no_guard")
    assert code == 1 and "A_seed1: run.json says a training time of 1500 ms" in errors[0]


def test_more_pairs_are_added_and_the_second_look_is_admitted(toy, tool):
    toy("train_a.py")
    command = ["compare", "train_a.py", "--noise", toy.state]
    tool(*command, "--n=2")
    code, out, _ = tool(*command, "--n=3")
    assert code == 0 and "2 of 3 rounds were begun; it was started with --n=2\n" in out and out.count("round 3/3") == 2 and "round 1/" not in out
    assert "read after 2, 3 pairs" in out
    assert Path("count").read_text().count("x") == 6


ARMS = ["--arm=hot: --lr=1.3", "--arm=slow: SLOW_MARK = 1.0 => SLOW_MARK = 1.5 | --lr=1", "--arm=other: train_b.py"]


def test_any_number_of_arms_each_against_the_first(toy, tool):
    toy("train_a.py").write_text("SLOW_MARK = 1.0\n" + STAND_IN.replace("SLOW *", "SLOW_MARK *"))
    toy("train_b.py", slow=1.1)
    command = ["compare", "train_a.py", *ARMS, "--n=4", toy.state, "--out=here"]
    code, out, errors = tool(*command)
    assert (code, errors) == (0, [])
    ledger = json.loads(Path("here/runs.json").read_text())
    assert [run["arm"] for run in ledger["runs"]] == [*(names := ["A", "hot", "slow", "other"]), *names[::-1]] * 2
    assert [run["seed"] for run in ledger["runs"]] == sorted([*range(4)] * 4)
    assert ledger["arms"]["slow"]["edits"] == ["SLOW_MARK = 1.0 => SLOW_MARK = 1.5"]
    assert Path("here/slow/train_a.py").read_text().startswith("SLOW_MARK = 1.5\n")
    assert ledger["arms"]["hot"]["flags"] == [toy.state, "--lr=1.3"]
    assert ledger["arms"]["other"]["script"] == "other/train_b.py"
    found = {arm: verdicts(out, arm) for arm in names[1:]}
    assert found["hot"]["loss"].verdict == found["slow"]["time"].verdict == "**worse**"
    assert found["other"]["time"].verdict == "**worse**"
    assert found["hot"]["time"].verdict == "not distinguishable" and not verdicts(out, "A")
    assert "3 arms were tested against A" in out
    assert tool("check", "here", "--no_guard")[::2] == (0, [])
    rows = {row["arm"]: row for row in json.loads(Path("here/table.json").read_text())}
    assert list(rows) == names and "verdicts" not in rows["A"]
    time_of_slow = rows["slow"]["verdicts"][0]
    assert time_of_slow["relative_difference"] == pytest.approx(0.5, abs=0.02) and time_of_slow["verdict"] == "worse"
    assert rows["hot"]["n"] == 4 and rows["hot"]["seconds"] == pytest.approx(2, abs=0.1)
    assert Path("here/table.md").read_text().strip() in out
    assert "- text edit: `SLOW_MARK = 1.0 => SLOW_MARK = 1.5`" in Path("here/README.md").read_text()
    assert Path("count").read_text().count("x") == 16 and tool(*command)[0] == 0
    assert Path("count").read_text().count("x") == 16                # nothing was missing


def test_intervals_that_no_number_holds():
    """Two pairs and a strict level: the interval of a ratio reaches beyond what a float can hold."""
    verdict = runs.Verdict("B", "time", [0.1, 0.9], True, 1e-6)
    assert verdict.row()[3].endswith("more than a million-fold")
    assert comparison.verdict_numbers(verdict)["high"] is None


def test_a_sweep_has_one_run_an_arm_and_no_verdicts(toy, tool):
    toy("train_a.py")
    Path("ideas.txt").write_text("# ideas\r\nhot: --lr=1.3\r\n\nbad: --lr=20\nbroken: --x=y\n")
    code, out, errors = tool("compare", "train_a.py", "--arms=ideas.txt", "--arm=far: --lr=1.4", "--n=1",
                             "--state=s", "--refuse_at=4", "--out=here")
    assert code == 2 and len(errors) == 1 and "arm broken failed with exit code 1: toy: no shards here" in errors[0]
    rows = [line for line in out.splitlines() if line.startswith("| ")][2:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == ["A", "far", "hot", "bad", "broken"]
    assert "diverged" in rows[3] and "no shards here" in rows[4] and "no verdict for far, hot, bad, broken" in out
    assert json.loads(Path("here/table.json").read_text())[4]["note"].startswith("exit code 1: toy")
    assert tool("check", "here", "--no_guard")[::2] == (0, [])
    code, out, errors = tool("compare", "train_a.py", "--arms=ideas.txt", "--arm=far: --lr=1.4", "--n=1",
                             "--state=s", "--refuse_at=4", "--out=here")
    assert (code, errors) == (0, []) and out.count("round 1/1") == 1 and "round 1/1, broken: loss" in out


def test_an_arm_that_fails_is_left_out_of_later_rounds(toy, tool):
    toy("train_a.py")
    code, out, errors = tool("compare", "train_a.py", "--b_flags=--lr=1.1", "--arm=odd: --lr=1.2", "--n=3", toy.state,
                             "--fail_at=2", "--out=here")
    assert code == 2 and "arm odd failed with exit code 1: toy: the disk is full" in errors[0]
    ledger = json.loads(Path("here/runs.json").read_text())
    assert [run["arm"] for run in ledger["runs"]] == ["A", "B", "odd", "B", "A", "A", "B"]
    assert ledger["runs"][2]["status"] == "failed" and "disk is full" in Path("here/odd_seed0_output.txt").read_text()
    assert verdicts(out)["loss"].pairs == "3" and "no verdict for odd" in out
    assert tool("check", "here", "--no_guard")[::2] == (0, [])       # though the run failed before it had a log


def test_a_run_that_takes_too_long_is_stopped_and_listed(toy, tool):
    toy("train_a.py")
    command = ["compare", "train_a.py", "--b_flags=--lr=1.1", "--n=1", toy.state, "--wait_at=1", "--limit=3",
               "--out=here"]
    code, out, errors = tool(*command)
    assert (code, errors) == (0, []) and "round 1/1, B: stopped after 3 s (--limit)" in out
    assert "| stopped after 3 s (--limit) |" in out
    assert tool("check", "here", "--no_guard")[::2] == (0, [])
    assert tool(*command)[0] == 0 and Path("count").read_text().count("x") == 2      # it is not tried again


def test_runs_on_a_gpu_each(toy, tool, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7,9")
    path = toy("train_a.py")
    path.write_text("""
import os, sys, time
from pathlib import Path
name = "seen" + "".join(flag[-4:] for flag in sys.argv if flag.startswith(("--seed=", "--lr=")))
Path(name).write_text(os.environ["CUDA_VISIBLE_DEVICES"])
deadline = time.monotonic() + 30
while len(list(Path().glob("seen*"))) < 2:
    assert time.monotonic() < deadline, "no other run runs"
    time.sleep(0.01)
""" + path.read_text())
    code, out, errors = tool("compare", "train_a.py", "--arm=x: --lr=1.11", "--n=2", "--gpus=2", "--lr=1.00", toy.state,
                             "--out=here")
    assert (code, errors) == (0, []) and out.count(": loss ") == 4
    assert {path.read_text() for path in Path().glob("seen*")} == {"4", "7"}
    assert "2 at a time, each on GPUs of its own" in Path("here/README.md").read_text()
    for flags, words in ((["--gpus=4"], "3 GPUs are visible"), (["--gpus=3", "--ranks=2"], "a multiple of --ranks")):
        code, _, errors = tool("compare", "train_a.py", "--arm=x: --lr=1.11", *flags)
        assert code == 2 and words in errors[0]
    assert launcher.make_slots(1, 2, own_gpus=True) == [{"CUDA_VISIBLE_DEVICES": "4,7"}]


def test_scripts_and_lists_of_arms_may_be_links(toy, tool):
    Path("train_a.py").symlink_to(toy("real.py"))
    Path("real.txt").write_text("x: --lr=1.1")
    Path("ideas.txt").symlink_to("real.txt")
    assert tool("compare", "train_a.py", "--arms=ideas.txt", "--n=1", toy.state, "--out=here")[::2] == (0, [])
    assert tool("check", "here", "--no_guard")[::2] == (0, [])


def test_ranks_are_started_through_torchrun(toy, monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: started.append(command) or SimpleNamespace(
        poll=lambda: 0, terminate=lambda: None))
    job = launcher.Job(Path("x.py"), ["--lr=1"], tmp_path / "out")
    assert [outcome.code for _, outcome in launcher.launch(iter([job]), [{}], ranks=3)] == [0]
    assert started == [[sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", "x.py",
                        "--lr=1", f"--out_dir={tmp_path / 'out'}"]]


def test_flags_with_blanks_and_edits_with_every_character():
    assert comparison.split_flags(' --a=1  --b={"x": [1, 2]} --c=') == ["--a=1", '--b={"x": [1, 2]}', "--c="]
    assert comparison.unescape(r"a\nb \| c \\n \t") == "a\nb | c \\n \\t"


@pytest.mark.parametrize("place", ["A", "hot", "both"])
def test_scripts_with_line_ends_of_windows(place, toy, tool):
    """They are compared and checked, their logs have plain line ends, and edits find their text."""
    script = toy("train_a.py")
    script.write_bytes(b"LAST = 1\nMARK = 2\n" + script.read_bytes())
    if place == "A":
        script.write_bytes(script.read_bytes().replace(b"\n", b"\r\n"))
    code, _, errors = tool("compare", "train_a.py", r"--arm=hot: LAST = 1\nMARK = 2 => LAST = 2", "--n=2", toy.state,
                           "--out=here")
    assert (code, errors) == (0, [])
    assert Path("here/hot/train_a.py").read_bytes().startswith(b"LAST = 2\r\n" if place == "A" else b"LAST = 2\n")
    if place != "A":                     # Git changed them after the runs
        for name in ("hot", "A")[:1 + (place == "both")]:
            path = Path("here", name, "train_a.py")
            path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert tool("check", "here", "--no_guard")[::2] == (0, [])
    path = Path("here/hot/train_a.py")
    path.write_bytes(path.read_bytes().replace(b"LAST = 2", b"LAST = 3"))
    assert "an edited script" in tool("check", "here", "--no_guard")[2][0]


def test_no_locale_is_needed(toy, tool):
    """Sources, logs and tables are UTF-8 in a locale that has ASCII only."""
    toy("train_a.py").write_text(f"# caf\u00e9 \u4e2d\n{STAND_IN.replace('SLOW', '1')}", encoding="utf-8")
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

    def call(*words):
        done = subprocess.run([sys.executable, ROOT / "records" / "records.py", *words], env=environment,
                              capture_output=True)
        assert (done.returncode, done.stderr) == (0, b""), done
        return done.stdout
    call("compare", "train_a.py", "--b_flags=--lr=1.1", "--n=2", toy.state, "--out=here", "--title=\u4e2d")
    readme = Path("here/README.md")
    assert "--title=" in readme.read_text(encoding="utf-8")
    readme.write_text(readme.read_text(encoding="utf-8").replace("# ", "# caf\u00e9 ", 1), encoding="utf-8")
    call("summarize", "here", "--write")
    assert b"ok" in call("check", "here", "--no_guard")


def test_paths_with_brackets_blanks_and_a_tilde(toy, tool, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "my [1] runs"
    folder.mkdir()
    toy("my [1] runs/train a[0].py")
    code, _, errors = tool("compare", "~/my [1] runs/train a[0].py", "--b_flags=--lr=1.1", "--n=2", toy.state,
                           "--out=~/my [1] runs/out [a]")
    assert (code, errors) == (0, [])
    assert tool("check", "~/my [1] runs/out [a]", "--no_guard")[::2] == (0, [])
    assert tool("plot", "~/my [1] runs/out [a]", "--out=~/my [1] runs/picture.svg")[0] == 0
    assert (folder / "picture.svg").is_file() and (folder / "picture.png").is_file()
    (folder / "val_[0].bin").write_text("x")
    assert replays.matching_files("~/my [1] runs/val_[0].bin") == [folder / "val_[0].bin"]
    assert replays.matching_files(f"{tmp_path}/my*/val*.bin") == [folder / "val_[0].bin"]
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no home")))
    code, _, errors = tool("check", "~nobody/x")
    assert code == 2 and "the home folder of ~ is not known" in errors[0]


def test_a_script_that_diverges_is_a_result(toy, tool):
    toy("train_a.py")
    code, out, _ = tool("compare", "train_a.py", "--b_flags=--lr=20", "--n=2", toy.state, "--out=here")
    assert code == 0 and "B diverged** in 2 of 2 runs" in out and "no verdict" in out
    assert tool("check", "here", "--no_guard")[::2] == (0, [])


def test_a_script_that_refuses_stops_the_comparison_which_then_goes_on(toy, tool):
    toy("train_a.py")
    command = ["compare", "train_a.py", "--noise", "--n=2", toy.state, "--refuse_at=1", "--out=here"]
    code, out, errors = tool(*command)
    assert code == 2 and "B failed with exit code 1: toy: no shards here; make some" in errors[0] and len(errors) == 1
    assert f"round 1/2, B: failed with exit code 1, see {Path('here/B_seed0_output.txt')}\n" in out    # said once
    assert Path("here/B_seed0_output.txt").read_text() == "toy: no shards here; make some\n"
    code, out, _ = tool(*command)
    ledger = json.loads(Path("here/runs.json").read_text())
    assert code == 0 and [run["status"] for run in ledger["runs"]] == ["finished", "refused"] + ["finished"] * 4
    assert [run["counted"] for run in ledger["runs"]] == [False, False] + [True] * 4
    assert "half a round" in ledger["runs"][0]["why"]
    assert tool("check", "here", "--no_guard")[::2] == (0, [])
    assert "half a round" in Path("here/README.md").read_text()


@pytest.mark.parametrize("name, status", [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "interrupted"),
                                          (signal.SIGKILL, "killed")])
def test_an_interrupted_comparison_goes_on(name, status, toy, tool):
    toy("train_a.py")
    command = ["compare", "train_a.py", "--noise", "--n=2", toy.state, "--wait_at=2", "--out=here"]
    ignore = "trap '' INT; " * (name == signal.SIGTERM)              # as a shell does for a job in the background
    process = subprocess.Popen(["sh", "-c", ignore + 'exec "$@"', "sh", sys.executable, ROOT / "records" / "records.py",
                                *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    deadline = time.monotonic() + 30
    while len(list(Path("here").glob(".running/*/?/*/run.json"))) < 1 or Path("count").read_text().count("x") < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, name) if name == signal.SIGKILL else os.kill(process.pid, name)
    errors = process.communicate(timeout=30)[1]
    if name != signal.SIGKILL:
        assert process.returncode == 130 and errors.count("\n") == 1 and "goes on from here" in errors, errors
    code, out, _ = tool(*command)
    assert code == 0 and "round 1/" not in out and out.count("round 2/2") == 2
    ledger = json.loads(Path("here/runs.json").read_text())
    assert [run["status"] for run in ledger["runs"]] == ["finished"] * 2 + [status] + ["finished"] * 2
    assert tool("check", "here", "--no_guard")[::2] == (0, [])


FAMILY = """
import sys
class UserError(Exception): pass
RATES = 1
def parse_config(argv):
    flags = dict(flag[2:].split("=") for flag in argv)
    if set(flags) - {"lr", "out_dir"}:
        raise UserError("--foo is not a flag;\\n--help lists them")
    return 1 / float(flags.get("lr", RATES))
if __name__ == "__main__":
    open("trained", "w")
"""


@pytest.mark.parametrize("words, said", [
    (["--foo=3"], "arms A (train_a.py), hot (train_a.py): --foo is not a flag; --help lists them"),
    (["--arm=bad: --foo=3"], "arm bad (train_a.py): --foo is not a flag; --help lists them"),
    (["--arm=bad: RATES = 1 => RATES = one"],
     "arm bad (train_a.py): NameError: name 'one' is not defined (train_a.py, line 4)"),
    (["--arm=bad: RATES = 1 => RATES = = 1", "--arm=zero: --lr=0"],
     "arm bad (train_a.py): SyntaxError: invalid syntax (train_a.py, line 4); arm zero (train_a.py): "
     "ZeroDivisionError: float division by zero (train_a.py, line 9)")])
def test_flags_and_scripts_are_checked_before_the_first_run(words, said, tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train_a.py").write_text(FAMILY)
    code, out, errors = tool("compare", "train_a.py", "--arm=hot: --lr=2", *words)
    assert (code, out, errors) == (2, "", [f"records.py: {said}"])
    assert [path.name for path in tmp_path.iterdir()] == ["train_a.py"]
    Path("train_a.py").write_text(FAMILY + "# def main\n")
    tool("compare", "train_a.py", "--arm=hot: --lr=2")
    assert Path("trained").exists()      # what can be read is started


def test_the_training_script_is_checked_before_the_first_run(fast_start, tool):
    code, out, errors = tool("compare", ROOT / "train_gpt.py", "--arm=long: --num_iterations=0", "--preset=tiny")
    assert (code, out) == (2, "") and not Path("logs").exists()
    assert errors == ["records.py: arm long (train_gpt.py): --num_iterations=0 must be at least 1"]


def test_another_comparison_is_not_mixed_in(toy, tool):
    toy("train_a.py")
    tool("compare", "train_a.py", "--noise", "--n=2", toy.state, "--out=here")
    code, _, errors = tool("compare", "train_a.py", "--noise", "--n=2", toy.state, "--out=here", "--lr=2")
    assert code == 2 and "another comparison" in errors[0]


@pytest.fixture
def toy_with_harness(toy):
    """Function that writes a stand-in and what it imports into a folder; the path of the stand-in."""
    def write(folder, harness="MARK = 1\n"):
        Path(folder).mkdir()
        script = toy(f"{folder}/train_a.py")
        script.write_text("import harness\n" + script.read_text())
        script.with_name("harness.py").write_text(harness)
        return script
    write.state = toy.state
    return write


def test_scripts_that_differ_in_their_harness_only_are_compared(toy_with_harness, tool):
    a, b = toy_with_harness("a"), toy_with_harness("b", harness="MARK = 2\n")
    code, _, errors = tool("compare", a, b, "--n=2", toy_with_harness.state, "--out=here")
    assert (code, errors) == (0, [])
    assert [Path(f"here/{arm}/harness.py").read_text() for arm in "AB"] == ["MARK = 1\n", "MARK = 2\n"]
    assert tool("check", "here", "--no_guard")[::2] == (0, [])
    b.with_name("harness.py").write_text("MARK = 1\n")
    code, _, errors = tool("compare", a, b, "--n=2", toy_with_harness.state)
    assert code == 2 and "A and B are the same" in errors[0]


@pytest.mark.parametrize("lie, words", [
    (Path.unlink, "harness.py is not there"),
    (lambda path: path.write_text("MARK = 2\n"), "log.txt does not hold harness.py as it is here")])
def test_check_names_a_harness_that_is_not_what_ran(toy_with_harness, tool, lie, words):
    tool("compare", toy_with_harness("a"), "--noise", "--n=2", toy_with_harness.state, "--out=here")
    lie(Path("here/B/harness.py"))
    code, _, errors = tool("check", "here", "--no_guard")
    assert code == 1 and words in errors[0], errors


@pytest.mark.parametrize("differences, words, shown", [
    ([-1e-5, -1e-5, -1.00000001e-5], "better", "-0.0000100"),    # more than rounding, in every pair
    ([-4e-7, -4e-7, -4.00001e-7], "not distinguishable", "-0.0000004"),    # less than the last digit of a log
    ([0.0, 0.0, 0.0], "not distinguishable", "+0.0000000"), ([-0.1, -0.1, -0.1], "better", "-0.1000")])
def test_no_spread_is_smaller_than_what_the_logs_are_rounded_to(differences, words, shown):
    verdict = runs.Verdict("B", "loss", differences, False, 0.05, runs.LOSS_STEP)
    assert (verdict.words, verdict.show(verdict.mean)) == (words, shown)
    low, high = verdict.interval
    assert high - low > 1e-6 and "0.0000 to" not in verdict.row()[3].removeprefix("+").removeprefix("-")
    assert ("the same in every pair" in verdict.row()[6]) == (not any(differences))
    assert verdict.p > 1e-12 or differences[0] == -0.1   # a spread of nearly 0 made anything certain


def test_two_pairs_give_no_verdict(toy, tool):
    toy("train_a.py")
    _, out, _ = tool("compare", "train_a.py", "--b_flags=--lr=1.3", "--n=2", toy.state)
    assert not verdicts(out) and "no verdict for B: it takes 3 finished rounds together with A" in out
    assert "| B | 2 |" in out
    assert out.index("--n=2 will give no verdict, which takes 3 rounds") < out.index("round 1 of 2: A begins")


def test_time_at_equal_loss_by_hand(tmp_path):
    def run(points):
        losses = [{"step": s, "train_time_ms": t, "val_loss": loss, "tokens": 1} for s, t, loss in points]
        return runs.Run(tmp_path, {"val_losses": losses, "config": {}})
    a = run([(0, 0, 5.0), (10, 1000, 3.0), (20, 2000, 2.0)])
    b = run([(0, 0, 5.0), (10, 2000, 2.5), (20, 4000, 1.5)])
    assert runs.equal_loss_times(a, b) == pytest.approx((2.0, 3.0))    # at 2.0, halfway between 2.5 and 1.5
    assert runs.equal_loss_times(b, a) == pytest.approx((3.0, 2.0))
    assert runs.equal_loss_times(a, run([(0, 0, 5.0), (10, 1000, 6.0)])) is None


# -----------------------------------------------------------------------------
# Comparisons of the real script

@pytest.fixture
def fast_start(forkserver, monkeypatch, tmp_path):
    """Starts scripts from a process that has PyTorch loaded already."""
    def start(command, stdout, **_):
        process = forkserver.Process(target=call_with_output, args=(stdout.name, {}, run_python, (command[1:],)))
        process.start()
        process.wait = lambda *_: process.join() or process.exitcode
        process.poll = lambda: process.exitcode
        return process
    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.chdir(tmp_path)


SLOW_CLOCK = "return self.before + ( => return 60 + self.before + ("   # far more than a busy machine adds by chance


def test_verdicts_on_the_training_script(fast_start, data, tool):
    flags = small_flags(data, num_iterations=4, val_every=2, val_tokens=500)
    code, out, _ = tool("compare", ROOT / "train_gpt.py", "--noise", "--n=3", "--p=0.0001", *flags)
    assert code == 0 and all("not distinguishable" in found.verdict for found in verdicts(out).values()), out
    assert "the same in every pair" in verdicts(out)["loss"].verdict    # the same seeds on the same machine
    code, out, _ = tool("compare", ROOT / "train_gpt.py", "--n=3", *flags, f"--arm=slow: --lr=0.02 | {SLOW_CLOCK}",
                        "--out=here")
    found = verdicts(out, "slow")
    assert found["loss"].verdict == found["time"].verdict == "**worse**", out
    assert not found["time at equal loss"].difference.startswith("-"), out
    assert tool("check", "here", "--no_guard")[::2] == (0, [])


# -----------------------------------------------------------------------------
# Records: new, replay, board, pictures

@pytest.fixture
def toy_track(archive, tool, toy):
    """A track of the stand-in, empty, and three finished runs and a diverged one under logs/."""
    edit(archive / "records/track_1_small/track.json", lambda track: track.update(
        target=2.6, val_tokens=1000, ranks=1, hardware="cpu",
        val_data={"val_000000.bin": {"sha256": "", "tokens": 2000}}))
    toy("train_toy.py")
    for seed, lr in ((0, 1), (1, 1), (2, 1), (3, 20)):
        subprocess.run([sys.executable, "train_toy.py", toy.state, f"--seed={seed}", f"--lr={lr}", "--out_dir=logs"])
    return archive / "records/track_1_small"


def test_a_new_record_passes_once_its_questions_are_answered(toy_track, tool):
    code, out, errors = tool("new", "Toy", "--track=track_1_small", "--date=2026-12-01", "logs")
    assert (code, errors) == (0, [])
    folder = toy_track / "2026-12-01_Toy"
    assert "a record" in out and not list(folder.rglob("checkpoint"))
    assert "logs/run_3 is listed, but does not count: diverged" in out
    ledger = json.loads((folder / "runs.json").read_text())
    assert list(ledger["arms"]) == ["train_toy --lr=1", "train_toy --lr=20"] and ledger["claim"] == "record"
    assert [run["counted"] for run in ledger["runs"]] == [True] * 3 + [False] and ledger["runs"][3]["why"] == "diverged"
    shutil.rmtree(folder)
    tool("new", "Toy", "--track=track_1_small", "--date=2026-12-01", *sorted(Path("logs").iterdir())[:3])
    assert "FILL IN" in tool("check", folder, "--no_guard")[2][0]
    path = folder / "README.md"
    path.write_text(path.read_text().replace("FILL IN what", "What").replace("FILL IN: what", "What"))
    assert tool("check", folder, "--no_guard")[::2] == (0, [])


def toy_run(seed, *flags, out="logs", script="train_toy.py", count="count"):
    """Runs the stand-in by hand; its run folder."""
    before = set(Path(out).glob("*"))
    subprocess.run([sys.executable, script, f"--state={count}", f"--seed={seed}", *flags, f"--out_dir={out}"])
    return (set(Path(out).glob("*")) - before).pop()


@pytest.mark.parametrize("change, words", [
    ({"device": "gpu"}, "ran on 1 x gpu, the track is for 1 x cpu; name only runs"),
    ({"world_size": 2}, "ran on 2 x cpu, the track is for 1 x cpu; name only runs"),
    ({"data_sha256": {"val_000000.bin": "cd" * 32}}, "has sha256 cdcdcdcdcdcd, the track's abababababab; name only"),
    ({"data_sha256": {}}, "does not say the sha256"),
    ({"data": {"val_000000.bin": 7}}, "val_000000.bin with 7 tokens, not 2000; name only"),
    ({"data": {"other.bin": 2000}}, "another file than the track's val_000000.bin; name only"),
    ({"config": {"val_tokens": 500}}, "was validated on 1000, 500 tokens, the track says 1000; name only"),
    ({"source_sha256": "0" * 64}, "it ran 000000000000; put the script that ran into its folder"),
    ({"status": "running"}, "has the status running in run.json; wait for its end, or say with --killed"),
    ({"script": "../x.py"}, "has script '../x.py', which is not the name of a Python file")])
def test_a_run_that_cannot_belong_to_the_track_is_refused(change, words, toy_track, tool):
    edit(toy_track / "track.json", lambda track: track["val_data"]["val_000000.bin"].update(sha256="ab" * 32))
    path = Path("logs/run_1")
    edit(path / "run.json", lambda info: info.update({
        name: info[name] | value if name == "config" else value for name, value in change.items()}))
    finished = sorted(Path("logs").iterdir())[:3]
    code, _, errors = tool("new", "Toy", "--track=track_1_small", "--date=2026-12-01", *finished)
    assert (code, len(errors)) == (2, 1) and str(path) in errors[0] and words in errors[0], errors
    assert [child.name for child in toy_track.iterdir()] == ["track.json"]
    assert tool("new", "Toy", "--track=track_1_small", "--date=2026-12-01", "logs/run_0", "logs/run_2")[0] == 0


def test_a_reader_that_goes_away_is_no_mistake_of_the_user():
    """As behind `| head`: no line on stderr, and not the exit code of a check that has passed."""
    read, write = os.pipe()
    os.close(read)
    words = ROOT / "records" / "records.py", "summarize", ROOT / "dev" / "track_0_dev" / "2026-11-21_FirstRuns"
    done = subprocess.run([sys.executable, *map(str, words)], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_a_run_without_sha256_belongs_to_the_one_record_that_its_track_exempts(toy_track, tool):
    exempt = {"2026-12-01_Toy": {"data_sha256": "the hash"}}
    edit(toy_track / "track.json", lambda track: track["exempt"].update(exempt))
    for run in Path("logs").iterdir():
        edit(run / "run.json", lambda info: info.update(data_sha256={}))
    runs = ("logs/run_0", "logs/run_2")
    assert tool("new", "Other", "--track=track_1_small", "--date=2026-12-01", *runs)[0] == 2
    assert tool("new", "Toy", "--track=track_1_small", "--date=2026-12-01", *runs)[0] == 0
    assert "not proven by the logs: the hash" in (toy_track / "2026-12-01_Toy/README.md").read_text()


def test_runs_that_did_not_finish_alone_are_no_record(toy_track, tool):
    edit(Path("logs/run_3/run.json"), lambda info: info.update(status="failed", error="no disk"))
    code, _, errors = tool("new", "Toy", "--track=track_1_small", "logs/run_3")
    assert (code, len(errors)) == (2, 1)
    assert "none of the 1 runs counts (status: failed); a record needs a finished run" in errors[0]


@pytest.mark.parametrize("same_flags", [True, False])
@pytest.mark.parametrize("has_script", [True, False])
def test_a_first_run_that_failed_is_listed_and_does_not_count(same_flags, has_script, toy_track, tool):
    failed = toy_run(0, "--lr=1" if same_flags else "--lr=1.5", "--fail_at=0", out="first", count="one")
    edit(failed / "run.json", lambda info: info["argv"].remove("--fail_at=0") or info["argv"].remove("--state=one"))
    edit(failed / "run.json", lambda info: info["argv"].insert(0, tool_state()))
    if not has_script:
        (failed / "train_toy.py").unlink()
    finished = sorted(Path("logs").iterdir())[:3]
    code, out, errors = tool("new", "Toy", "--track=track_1_small", "--date=2026-12-01", failed, *finished)
    assert (code, errors) == (0, [])
    assert f"{failed} is listed, but does not count: failed toy: the disk is full" in out
    folder = toy_track / "2026-12-01_Toy"
    ledger = json.loads((folder / "runs.json").read_text())
    assert len(ledger["arms"]) == 2 - same_flags and ledger["claim"] == "record"
    first = ledger["arms"][ledger["runs"][1]["arm"]]
    assert first["script"] == "train_toy.py" and "--lr=1" in first["flags"]
    assert sorted(entry["status"] for entry in ledger["runs"]) == ["failed"] + ["finished"] * 3
    readme = folder / "README.md"
    assert "| no: failed toy: the disk is full |" in readme.read_text()
    readme.write_text(readme.read_text().replace("FILL IN", ""))
    assert tool("check", folder, "--no_guard")[::2] == (0, [])
    assert tool("board")[0] == 0 and tool("replay", folder)[0] == 0


def tool_state():
    """The flag that the runs of toy_track have in common."""
    return next(arg for arg in json.loads(Path("logs/run_0/run.json").read_text())["argv"] if "state" in arg)


def test_killed_runs_are_listed_as_killed_when_asked(toy_track, tool):
    edit(Path("logs/run_3/run.json"), lambda info: info.update(status="running"))
    code, out, _ = tool("new", "Toy", "--track=track_1_small", "--date=2026-12-01", "--killed", "logs")
    assert code == 0 and "run_3 is listed, but does not count: killed while it ran" in out
    ledger = json.loads((toy_track / "2026-12-01_Toy" / "runs.json").read_text())
    assert [entry["status"] for entry in ledger["runs"]] == ["finished"] * 3 + ["killed"]


def test_folders_without_a_run_are_named(toy_track, tool):
    Path("logs/empty").mkdir()
    code, out, errors = tool("summarize", "logs", "logs/run_0")
    assert code == 0 and out.count("| run_0 |") == 1                 # once, though it is named twice
    assert errors == ["records.py: note: 1 folder(s) without run.json are left out: empty"]
    code, _, errors = tool("summarize", "logs/run_0", "logs/empty")
    assert code == 2 and "no run.json in logs/empty" in errors[0]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_modes_that_the_umask_says(umask, mode, toy_track, tool):
    for path in Path("logs").rglob("*.*"):
        path.chmod(0o640)
    before = os.umask(umask)
    try:
        assert tool("new", "Toy", "--track=track_1_small", "--date=2026-12-01", "logs")[0] == 0
        assert tool("compare", "train_toy.py", "--b_flags=--lr=1.1", "--n=1", "--state=s", "--out=here")[0] == 0
        assert tool("board")[0] == 0
    finally:
        os.umask(before)
    board = [toy_track.parent / "README.md", toy_track.parent / "history.svg", toy_track / "curves.svg"]
    made = [*(toy_track / "2026-12-01_Toy").rglob("*"), *Path("here").rglob("*"), *board]
    assert {oct(path.stat().st_mode & 0o777) for path in made if path.is_file()} == {oct(mode)}
    assert {oct(path.stat().st_mode & 0o777) for path in made if path.is_dir()} == {oct(0o777 & ~umask)}


# -----------------------------------------------------------------------------
# Tracks with a training time: the first record, pairs with the standing one, and lies about them

@pytest.fixture
def timed(archive, tool, toy):
    """An empty track of the stand-in for the lowest loss in 3 s, and function that makes its record `First`."""
    track = {"title": "Timed", "seconds": 3.0, "p": 0.01, "val_tokens": 1000, "ranks": 1, "hardware": "cpu",
             "val_data": {"val_000000.bin": {"sha256": "ab" * 32, "tokens": 2000}}, "train_data": {}, "text": "Toys.",
             "flags": [toy.state], "commands": ["python train_toy.py"], "exempt": {}}
    folder = archive / "records/track_0_toy"
    folder.mkdir()
    (folder / "track.json").write_text(json.dumps(track))
    toy("train_toy.py")

    def first(count=3, name="First", date="2026-12-01"):
        for seed in range(count):
            subprocess.run([sys.executable, "train_toy.py", toy.state, f"--seed={seed}", f"--out_dir={name}"])
        code, out, errors = tool("new", name, "--track=track_0_toy", f"--date={date}", name)
        assert (code, errors) == (0, [])
        return answered(folder / f"{date}_{name}")
    first.folder = folder
    return first


def answered(record):
    """The folder of a record, with the questions of its README answered."""
    path = record / "README.md"
    path.write_text(path.read_text().replace("FILL IN", ""))
    return record


def challenge(tool, script, *flags, date="2026-12-02", n=6):
    """Runs a script in pairs with the standing record; the folder of the record made of them, named after the date."""
    name = f"Idea{date[-2:]}"
    code, _, errors = tool("compare", script, "--track=track_0_toy", f"--n={n}", f"--out=logs/{name}", *flags)
    assert (code, errors) == (0, [])
    code, _, errors = tool("new", name, "--track=track_0_toy", f"--date={date}", f"logs/{name}")
    assert (code, errors) == (0, [])
    return answered(records.HERE / "track_0_toy" / f"{date}_{name}")


def claim(record):
    return json.loads((record / "runs.json").read_text())["claim"]


def test_the_first_record_keeps_within_the_time(timed, tool):
    few = timed(count=2, name="Few")
    assert claim(few) == "reference" and "The first record of a track needs 3 runs" in (few / "README.md").read_text()
    assert tool("compare", "train_toy.py", "--track=track_0_toy")[2][0].endswith("as records/README.md says")
    record = timed()
    assert claim(record) == "record" and "no run trains for more than 3 s" in (record / "README.md").read_text()
    assert tool("board")[0] == 0 and tool("check", "--all", "--no_guard")[::2] == (0, [])
    edit(timed.folder / "track.json", lambda track: track.update(seconds=1.5))
    code, _, errors = tool("check", record, "--no_guard")
    assert code == 1 and "claims a record, but: A reference, not a record. Its slowest run trains for" in errors[0]


def test_a_later_record_has_a_lower_loss_in_pairs(timed, tool, toy):
    timed()
    better = challenge(tool, "train_toy.py", "--lr=0.7")
    text, ledger = (better / "README.md").read_text(), json.loads((better / "runs.json").read_text())
    assert claim(better) == "record" and "A record. In 6 pairs with 2026-12-01_First on this machine" in text
    assert list(ledger["arms"]) == ["B", "A"] and ledger["standing"] == {"record": "2026-12-01_First", "arm": "A"}
    assert ledger["arms"]["B"]["flags"] == [toy.state, "--lr=0.7"] and ledger["arms"]["A"]["flags"] == [toy.state]
    toy("train_slow.py", slow=1.1)       # a still lower loss, in ten percent more time
    slow = challenge(tool, "train_slow.py", "--lr=0.5", date="2026-12-03", n=3)
    assert claim(slow) == "reference" and "with 2026-12-02_Idea02 on this machine" in (slow / "README.md").read_text()
    same = challenge(tool, "train_toy.py", "--lr=0.7", "--noise_of=nothing", date="2026-12-04", n=3)
    assert claim(same) == "reference" and "p < 0.01 in at most 1 % more time" in (same / "README.md").read_text()
    assert tool("board")[0] == 0 and tool("check", "--all", "--no_guard")[::2] == (0, [])
    board = (records.HERE / "README.md").read_text()
    assert "| the first |" in board and ", n = 6 |" in board and "history.svg" in board
    code, out, _ = tool("replay", better)
    assert code == 0 and "loss" in out and "lies in" in out


def test_the_first_two_records_may_come_from_one_comparison(timed, tool, toy):
    code, _, errors = tool("compare", "train_toy.py", toy.state, "--b_flags=--lr=0.7", "--n=6", "--out=logs/both")
    assert (code, errors) == (0, [])
    for name, runs in (("Second", sorted(Path("logs/both").glob("A_seed*"))), ("Idea", ["logs/both"])):
        code, _, errors = tool("new", name, "--track=track_0_toy", "--date=2026-12-01", *runs)
        assert (code, errors) == (0, [])
        answered(timed.folder / f"2026-12-01_{name}")
    assert claim(timed.folder / "2026-12-01_Second") == claim(timed.folder / "2026-12-01_Idea") == "record"
    assert tool("board")[0] == 0 and tool("check", "--all", "--no_guard")[::2] == (0, [])


def test_one_command_runs_a_script_and_makes_its_record(timed, tool, toy):
    code, _, errors = tool("make", "First", "train_toy.py", "--track=track_0_toy", "--n=3", "--from_standing")
    assert (code, len(errors)) == (2, 1) and "has no record yet" in errors[0]
    code, out, errors = tool("make", "First", "train_toy.py", "--track=track_0_toy", "--n=3")
    assert (code, errors) == (0, []) and "3 runs, a record" in out
    code, _, errors = tool("make", "Next", "train_toy.py", "--track=track_0_toy", "--n=3", "--lr=0.7", "--out=next")
    assert (code, errors) == (0, [])
    first, following = sorted(timed.folder.glob("2*"), key=lambda path: path.name.split("_")[1])
    assert claim(first) == claim(following) == "record"
    assert json.loads((following / "runs.json").read_text())["standing"] == {"record": first.name, "arm": "A"}
    assert [path.name for path in sorted(first.glob("*/run.json"))] == ["run.json"] * 3
    for record in (first, following):
        assert tool("check", answered(record), "--no_guard")[::2] == (0, [])
    track = records.find_track("track_0_toy")
    standing = records.flags_from_standing(track, "track_0_toy", [])
    assert "--lr=0.7" in standing and not set(standing) & set(track["flags"])
    assert records.flags_from_standing(track, "track_0_toy", ["--lr=0.9", "--more=1"])[-2:] == ["--lr=0.9", "--more=1"]
    count = Path("count").read_text()
    for argv, words in ((["First", "train_toy.py"], "exists; choose another NAME"), (["X", "no.py"], "there is no file no.py in "),
                        (["X", "train_toy.py", "--n=2"], "at least 3 runs"), (["../X", "train_toy.py"], "the name"),
                        (["X", "train_toy.py", "--val_files=nowhere/*.bin"], "make the text of this track: "),
                        (["X", "train_toy.py", "--seed=3"], "--seed=3 cannot be passed on")):
        code, _, errors = tool("make", *argv, "--track=track_0_toy")
        assert (code, len(errors)) == (2, 1) and words in errors[0], errors
    assert Path("count").read_text() == count            # refused before any run


def test_the_number_of_runs_of_a_record_stays_what_it_was(timed, tool):
    timed()
    command = ["make", "Next", "train_toy.py", "--track=track_0_toy", "--lr=0.7", "--refuse_at=4"]
    assert tool(*command, "--n=4")[0] == 2               # its first run fails
    count = Path("count").read_text()
    for n in (3, 5):
        code, out, errors = tool(*command, f"--n={n}")
        assert (code, out, len(errors)) == (2, "", 1) and Path("count").read_text() == count
        assert f"--n={n}, but {Path('logs/make_Next')} was started with --n=4; go on with --n=4" in errors[0]
    code, out, errors = tool(*command, "--n=4")
    assert (code, errors) == (0, []) and "1 of 4 rounds were begun\n" in out


def test_a_record_of_a_timed_track_needs_runs_of_the_standing_one(timed, tool):
    timed()
    for seed in range(3):
        toy_run(seed, "--lr=0.5", out="alone")
    code, _, errors = tool("new", "Alone", "--track=track_0_toy", "alone")
    assert code == 2 and "no run is of the standing record 2026-12-01_First" in errors[0]
    assert "--track=track_0_toy makes" in errors[0]


def compared_with_another(record):
    edit(record / "runs.json", lambda ledger: ledger["standing"].update(record="2026-11-30_Weak"))


def compared_with_nothing(record):
    edit(record / "runs.json", lambda ledger: ledger.pop("standing"))


def weaker_flags(record):
    edit(record / "runs.json", lambda ledger: ledger["arms"]["A"]["flags"].append("--lr=1"))
    for folder in record.glob("A_seed*"):
        edit(folder / "run.json", lambda info: info["argv"].insert(1, "--lr=1"))


def weaker_script(record):
    script = record / "A" / "train_toy.py"
    before = script.read_text()
    script.write_text(before + "# worse\n")
    for folder in record.glob("A_seed*"):
        edit(folder / "run.json", lambda info: info.update(
            source_sha256=hashlib.sha256(script.read_bytes()).hexdigest()))
        replace(folder / "log.txt", before, script.read_text())


def other_machine(record):
    for folder in record.glob("A_seed*"):
        edit(folder / "run.json", lambda info: info.update(device="cpu, older"))


def other_training_text(record):
    edit(record.parent / "track.json", lambda track: track.update(
        train_data={"train_000000.bin": {"sha256": "", "tokens": 5}}))


@pytest.mark.parametrize("lie, words", [
    (compared_with_another, "the standing record was 2026-11-30_Weak, but it was 2026-12-01_First"),
    (compared_with_nothing, "the standing record was None, but it was 2026-12-01_First"),
    (weaker_flags, "did not run the script of 2026-12-01_First with its flags"),
    (weaker_script, "did not run the script of 2026-12-01_First with its flags"),
    (other_machine, "the runs were made on different machines"),
    (other_training_text, "was trained on another text: train_000000.bin with no tokens, not 5")])
def test_lies_about_pairs_are_named(lie, words, timed, tool, toy):
    timed()
    toy("train_toy.py").write_text((timed.folder / "2026-12-01_First/train_toy.py").read_text() + "# mine\n")
    record = challenge(tool, "train_toy.py", "--lr=0.7", n=3)
    assert claim(record) == "record" and tool("check", record, "--no_guard")[::2] == (0, [])
    lie(record)
    cover_up(record)
    code, _, errors = tool("check", record, "--no_guard")
    assert code == 1 and words in errors[0], errors


def test_shards_that_are_not_those_of_the_track(timed, tool):
    folder = Path("data/toys")
    folder.mkdir(parents=True)
    (folder / "val_000000.bin").write_bytes(b"these")
    edit(timed.folder / "track.json", lambda track: track.update(
        flags=["--val_files=data/toys/val_*.bin", "--train_files=data/toys/train_*.bin"], train_data={},
        val_data={"val_000000.bin": {"sha256": hashlib.sha256(b"these").hexdigest(), "tokens": 5}}))
    assert tool("shards", "track_0_toy") == (0, "data/toys/val_000000.bin: ok\n", [])
    edit(timed.folder / "track.json", lambda track: track.update(
        train_data={"train_000000.bin": {"sha256": "0" * 64, "tokens": 5}}))
    (folder / "val_000000.bin").write_bytes(b"others")
    code, out, errors = tool("shards", "track_0_toy")
    assert (code, len(errors)) == (1, 1) and "2 shard(s) of track_0_toy" in errors[0]
    assert out.splitlines() == ["data/toys/train_000000.bin: is not here", "data/toys/val_000000.bin: is another file"]


def test_a_replay_refuses_another_training_text(timed, tool):
    record = timed()
    edit(timed.folder / "track.json", lambda track: track.update(
        train_data={"train_000000.bin": {"sha256": "0" * 64, "tokens": 5}}))
    Path("train_000000.bin").write_text("not that file")
    code, _, errors = tool("replay", record, "--train_files=train_*.bin")
    assert code == 2 and "losses on different texts cannot be compared" in errors[0]
    Path("train_000000.bin").unlink()
    edit(timed.folder / "track.json", lambda track: track.update(commands=["python make_text.py"]))
    before = sorted(Path().rglob("*"))
    code, _, errors = tool("replay", record, "--train_files=train_*.bin")
    assert code == 2 and "train_*.bin matches no file" in errors[0] and "python make_text.py" in errors[0]
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("change, words", [
    ({"seconds": "3"}, "has seconds '3'"), ({"flags": ["lr=1"]}, "do not begin with --"),
    ({"train_data": {"x": 1}}, "has sha256"), ({"p": 2}, "the level of a test")])
def test_a_damaged_track_is_named(change, words, timed, tool):
    edit(timed.folder / "track.json", lambda track: track.update(change))
    code, _, errors = tool("shards", "track_0_toy")
    assert (code, len(errors)) == (2, 1) and words in errors[0], errors


# -----------------------------------------------------------------------------
# Runs that name all files that ran

@pytest.fixture
def with_kernels(toy_track, toy, tool):
    """A record, without questions, of two runs whose run.json names train_k.py and triton_kernels.py."""
    Path("k").mkdir()
    toy("k/train_k.py")
    Path("k/triton_kernels.py").write_text("KERNEL = 1\n")
    for seed in range(2):
        toy_run(seed, script="k/train_k.py", out="k/logs")
    assert tool("new", "K", "--track=track_1_small", "--date=2026-12-01", "k/logs")[0] == 0
    folder = toy_track / "2026-12-01_K"
    readme = folder / "README.md"
    readme.write_text(readme.read_text().replace("FILL IN", ""))
    return folder


def kernels_edited(record):
    (record / "triton_kernels.py").write_text("KERNEL = 2\n")


def kernels_lost(record):
    (record / "triton_kernels.py").unlink()


def kernels_not_named(record):
    for name in ("train_k_seed0", "train_k_seed1"):
        edit(record / name / "run.json", lambda info: info["sources"].pop("triton_kernels.py"))
        edit(record / name / "run.json", lambda info: info.update(source_sha256=info["sources"]["train_k.py"]))
    cover_up(record)


def joined_hash_of_the_script_alone(record):
    edit(record / "train_k_seed0" / "run.json", lambda info: info.update(source_sha256=info["sources"]["train_k.py"]))
    cover_up(record)


def a_source_from_elsewhere(record):
    edit(record / "train_k_seed0" / "run.json", lambda info: info["sources"].update({"../x.py": "0" * 64}))


@pytest.mark.parametrize("lie, words", [
    (kernels_edited, "triton_kernels.py has sha256"), (kernels_lost, "triton_kernels.py is not there"),
    (kernels_not_named, "its sources do not name triton_kernels.py"), (a_source_from_elsewhere, "has sources"),
    (joined_hash_of_the_script_alone, "train_k.py with triton_kernels.py has sha256")])
def test_check_covers_every_file_that_ran(lie, words, with_kernels, tool):
    assert tool("check", with_kernels, "--no_guard")[::2] == (0, [])
    lie(with_kernels)
    code, _, errors = tool("check", with_kernels, "--no_guard")
    assert code == 1 and words in errors[0], errors


def test_new_copies_the_files_that_ran_and_no_others(toy_track, toy, tool, with_kernels):
    Path("k/logs", sorted(os.listdir("k/logs"))[0], "harness.py").write_text("OLD = 1\n")
    assert tool("new", "Again", "--track=track_1_small", "--date=2026-12-02", "k/logs")[0] == 0
    again = toy_track / "2026-12-02_Again"
    assert sorted(path.name for path in again.glob("*.py")) == ["train_k.py", "triton_kernels.py"]


# -----------------------------------------------------------------------------
# changes.diff

@pytest.fixture
def two_records(tmp_path):
    """Function of two dictionaries of files: script_diff of records that hold them."""
    def diff(old, new):
        made = []
        for name, files in (("Old", old), ("New", new)):
            folder = tmp_path / name
            folder.mkdir()
            for file, text in files.items():
                (folder / file).write_text(text, newline="")
            script = next(file for file in files if file.startswith("train_"))
            made.append(runs.Record(folder, {"arms": {"x": {"script": script, "flags": []}}}, []))
        about, text = diffs.script_diff(*made)
        return about, [line for line in text.splitlines() if line[:1] in "+-#"]
    return diff


def test_the_diff_covers_the_kernels(two_records):
    assert two_records({"train_x.py": "a = 1\r\n", "triton_kernels.py": "k = 1"},
                       {"train_y.py": "a = 1\n", "triton_kernels.py": "k = 2"}) == ("", [
        "--- Old/triton_kernels.py", "+++ New/triton_kernels.py", "-k = 1", "+k = 2"])


def test_the_diff_covers_kernels_that_came_or_went(two_records):
    assert two_records({"train_x.py": "a = 1\n", "triton_kernels.py": "k = 1\n"}, {"train_x.py": "a = 2\n"})[1] == [
        "--- Old/train_x.py", "+++ New/train_x.py", "-a = 1", "+a = 2", "--- Old/triton_kernels.py",
        "+++ New/triton_kernels.py", "-k = 1"]


def test_a_harness_that_moved_into_the_script_is_no_change(two_records):
    script = "import harness\n\nLR = 1\n\n# the model\ndef model():\n    return 1\n"
    harness = "import os\n\ndef shards():\n    return 2\n\ndef clock():\n    return 3\n"
    new = ("import os\n\nLR = 1\n\ndef clock():\n    return 3\n\ndef shards():\n    return 20\n\n"
           "# the model\ndef model():\n    return 1\n")
    about, lines = two_records({"train_x.py": script, "harness.py": harness}, {"train_x.py": new})
    assert "one file here" in about and lines[0] == f"# {about}"
    changes = [line for line in lines if line[1:].strip() and not line.startswith(("# ", "---", "+++"))]
    assert sorted(changes) == ["+    return 20", "-    return 2", "-import harness"]
    assert "--- Old/train_x.py + harness.py" in lines


def test_a_script_that_cannot_be_parsed_is_still_compared(two_records):
    _, lines = two_records({"train_x.py": "a = = 1\n", "harness.py": "b = 1\n"}, {"train_x.py": "a = 1\n"})
    assert "-a = = 1" in lines and "-b = 1" in lines and "+a = 1" in lines


def test_a_result_in_plain_words():
    """And in the words of older records, whose READMEs are frozen."""
    track = {"target": 3.28, "p": 0.01}
    assert runs.claim_text(4, 0.002, track, 3) == (
        "A record: the 4 runs show that the mean loss is below the target 3.28 (p = 0.002; a record needs p < 0.01).")
    assert runs.claim_text(3, 0.0101, track, 4) == (
        "A reference, not a record. A record must show that its mean loss is below 3.28 at p < 0.01. These 3 runs give "
        "p = 0.0101. About 4 runs with this mean and sd would show it.")
    assert runs.claim_text(1, 1.0, track, None).endswith("below 3.28, and one run cannot show that.")
    assert runs.claim_text(2, 1e-9, track, None).endswith("below 3.28, which takes 3 runs.")
    assert runs.claim_of_format_1(3, 0.0101, track, 4) == (
        "A reference, not a record: that the mean loss is below 3.28 is not shown at p < 0.01 (p = 0.0101); about 4 "
        "runs with this mean and sd would show it.")


def test_a_new_record_keeps_the_harness_of_its_runs(toy_track, toy_with_harness, tool):
    for i in range(2):                   # the second run has another one
        script = toy_with_harness(f"a{i}", harness=f"MARK = {i}\n")
        subprocess.run([sys.executable, script, toy_with_harness.state, f"--seed={i}", f"--lr=1.{i}", "--out_dir=own"])
    assert tool("new", "Own", "--track=track_1_small", "--date=2026-12-01", "own")[0] == 0
    folder = toy_track / "2026-12-01_Own"
    assert sorted(path.read_text() for path in folder.rglob("harness.py")) == ["MARK = 0\n", "MARK = 1\n"]
    path = folder / "README.md"
    path.write_text(path.read_text().replace("FILL IN", ""))
    assert tool("check", folder, "--no_guard")[::2] == (0, [])


def test_the_diff_with_the_record_before(toy_track, tool):
    runs_of = sorted(Path("logs").iterdir())[:3]
    assert tool("new", "One", "--track=track_1_small", "--date=2026-12-01", *runs_of)[0] == 0
    for path in runs_of:
        replace(path / "train_toy.py", "time.sleep(60)", "time.sleep(61)")
        digest = hashlib.sha256((path / "train_toy.py").read_bytes()).hexdigest()
        edit(path / "run.json", lambda info: info.update(source_sha256=digest))
        log = (path / "log.txt").read_text()
        (path / "log.txt").write_text(log.replace("time.sleep(60)", "time.sleep(61)"))
    assert tool("new", "Two", "--track=track_1_small", "--date=2026-12-02", *runs_of)[0] == 0
    diff = (toy_track / "2026-12-02_Two" / "changes.diff").read_text()
    assert [line for line in diff.splitlines() if line[0] in "+-"][2:] == ["-    time.sleep(60)", "+    time.sleep(61)"]
    code, _, errors = tool("new", "Two", "--track=track_1_small", "--date=2026-12-02", *runs_of)
    assert code == 2 and "exists" in errors[0]
    edit(runs_of[0] / "run.json", lambda info: info.update(source_sha256="0" * 64))
    code, _, errors = tool("new", "Three", "--track=track_1_small", *runs_of)
    assert code == 2 and "is not the script that" in errors[0]
    assert sorted(path.name for path in toy_track.iterdir()) == ["2026-12-01_One", "2026-12-02_Two", "track.json"]


def test_replay_says_whether_the_loss_comes_out_and_what_differs(toy_track, tool, toy):
    tool("new", "Toy", "--track=track_1_small", "--date=2026-12-01", *sorted(Path("logs").iterdir())[:3])
    code, out, _ = tool("replay", toy_track / "2026-12-01_Toy", "--n=2", "--seed=5")
    assert code == 0 and "device, ranks and data are those of the record" in out
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("seed")] == [
        "seed 5 begins", "seed 5", "seed 6 begins", "seed 6"]
    assert out.count("lies in") == 4 and "for 95 % of further runs" in out
    edit(toy_track / "2026-12-01_Toy" / "train_toy_seed0" / "run.json", lambda info: info.update(
        device="gpu", versions={"python": "2"}))
    _, out, _ = tool("replay", toy_track / "2026-12-01_Toy", "--lr=3")
    assert "differs: device: gpu there, cpu here" in out and "differs: python 2 there, 3." in out
    assert "is above" in out and "not replicated as to loss, which is above the interval in 1 of 1 runs" in out
    Path("val_000000.bin").write_text("not that file")
    code, _, errors = tool("replay", toy_track / "2026-12-01_Toy", "--val_files=val_*.bin")
    assert code == 2 and "losses on different texts cannot be compared" in errors[0]


@pytest.mark.parametrize("slow, words", [
    (0.7, "the record is replicated as to loss; a shorter training time, as on another machine, does not speak"),
    (1.4, "the record is replicated as to loss; a longer training time counts only on a machine like the record's"),
    (1.0, "the record is replicated as to loss; the training time is as predicted")])
def test_replay_ends_with_a_verdict(slow, words, toy_track, tool):
    """The logs of the record say that its machine was as much slower or faster."""
    for path in sorted(Path("logs").glob("*/run.json"))[:3]:
        edit(path, lambda info: info.update(train_time_ms=round(info["train_time_ms"] / slow)))
    tool("new", "Toy", "--track=track_1_small", "--date=2026-12-01", *sorted(Path("logs").iterdir())[:3])
    code, out, _ = tool("replay", toy_track / "2026-12-01_Toy", "--n=2")
    verdict, place = out.splitlines()[-2:]
    assert code == 0 and verdict.startswith(words) and place.startswith("logs are in")


def test_a_shortened_replay_takes_the_shortened_reference(toy_track, tool):
    for seed in (0, 1):
        subprocess.run([sys.executable, "train_toy.py", "--state=count", f"--seed={seed}",
                        "--lr=1.1", "--out_dir=short"])
    for path in Path("short").glob("*/run.json"):
        edit(path, lambda info: info["config"].update(num_iterations=10) or info.update(tokens_seen=10 * 512))
    tool("new", "Toy", "--track=track_1_small", "--date=2026-12-01", *sorted(Path("logs").iterdir())[:3], "short")
    code, out, _ = tool("replay", toy_track / "2026-12-01_Toy", "--num_iterations=10")
    assert code == 0 and "--lr=1.1" in out and "the record's 2 runs predict" in out
    code, _, errors = tool("replay", toy_track / "2026-12-01_Toy", "--num_iterations=15")
    assert code == 2 and "reference runs of 10, 20 iterations only" in errors[0]


def test_a_record_of_a_comparison_keeps_the_runs_that_left_nothing(toy_track, tool):
    command = ["compare", "train_toy.py", "--b_flags=--lr=1.1", "--n=2", "--state=state", "--refuse_at=1", "--out=here"]
    assert [tool(*command)[0] for _ in range(2)] == [2, 0]
    assert tool("new", "Pairs", "--track=track_1_small", "--date=2026-12-01", "here")[0] == 0
    folder = toy_track / "2026-12-01_Pairs"
    ledger = json.loads((folder / "runs.json").read_text())
    assert [run["folder"] for run in ledger["runs"]].count(None) == 1 and len(ledger["runs"]) == 6
    assert (folder / "train_toy.py").is_file() and not list(folder.glob("*/train_toy.py"))    # one script
    path = folder / "README.md"
    assert "exit code 1" in path.read_text() and "half a round" in path.read_text()
    path.write_text(path.read_text().replace("FILL IN", ""))
    assert tool("check", folder, "--no_guard")[::2] == (0, [])


def test_board_and_pictures(toy_track, tool):
    tool("new", "Toy", "--track=track_1_small", "--date=2026-12-01", *sorted(Path("logs").iterdir())[:3])
    assert tool("board")[0] == 0
    text = (toy_track.parent / "README.md").read_text()
    assert "2026-12-01_Toy/" in text and "| p < 0.0001 |" in text and text.count("No run") + text.count("no run") >= 1
    assert "Toy" in (toy_track.parent / "history.svg").read_text()
    assert "FirstRuns" in (toy_track.parent.parent / "dev/records.md").read_text()
    assert "2026-12-01_Toy (n = 3)" in (toy_track / "curves.svg").read_text()
    assert f"{toy_track.name}/curves.svg" in text and "track_2_medium/curves.svg" not in text
    code, out, _ = tool("plot", toy_track / "2026-12-01_Toy", toy_track.parent.parent / FIRST, "--out=picture")
    assert code == 0 and Path("picture.png").read_bytes()[:4] == b"\x89PNG"
    assert "train_toy" in Path("picture.svg").read_text()
    code, out, _ = tool("summarize", *sorted(Path("logs").iterdir()), "--target=2.6")
    assert code == 0 and "| train_toy --lr=1 | 3 |" in out and "no: diverged" in out


def test_the_backend_of_a_notebook_does_not_matter(tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, ROOT / "records/records.py", "plot", ROOT / FIRST, "--out=picture"]
    environment = os.environ | {"MPLBACKEND": "module://nowhere.backend"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "picture.png").is_file()


def test_the_numbers_of_the_table(archive, tool, stats):
    code, out, _ = tool("summarize", archive / FIRST, "--track=track_0_dev")
    losses = [3.885228, 3.898051, 3.890992]
    low, high = stats.t.interval(0.95, 2, np.mean(losses), stats.sem(losses))
    p = stats.ttest_1samp(losses, 3.902, alternative="less").pvalue
    row = next(line for line in out.splitlines() if line.startswith("| train_gpt |"))
    assert row == (f"| train_gpt | 3 | {np.mean(losses):.4f} | {np.std(losses, ddof=1):.4f} | {low:.4f} to {high:.4f} "
                   f"| p = {p:.2g} | {(49.593 + 49.631 + 49.525) / 3:.2f} | 0.054 |")
