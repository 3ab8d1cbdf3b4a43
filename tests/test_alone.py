"""A training script needs nothing but itself: copied into a folder with shards, it trains, saves, resumes and samples.

Against: copies of every train_*.py, alone in folders whose paths have blanks and brackets, started from there.
Run: python -m pytest tests/test_alone.py
"""
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS, make_data, only_folder, small_flags


@pytest.fixture
def folder(tmp_path):
    """An empty folder with shards in the folder `my data [1]`."""
    folder = tmp_path / "a folder [2] of my own"
    make_data(folder / "my data [1]")
    return folder


@pytest.fixture
def start(fast_run, folder):
    """Function of a script's name and changed flags that runs it in `folder`, and returns what it prints."""
    def run(name, *flags, start=fast_run, **changes):
        changes = {"num_iterations": 4, "val_every": 0, "save_every": 2} | changes
        words = [sys.executable, name, *small_flags("my data [1]", **changes), *flags]
        done = start(words, cwd=folder, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
        return done.stdout
    return run


def next_command(output):
    """The words of the line `next: ...`."""
    line, = (line for line in output.splitlines() if line.startswith("next: "))
    return shlex.split(line.removeprefix("next: "))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_alone_trains_saves_and_resumes(name, start, folder):
    shutil.copy(ROOT / f"{name}.py", folder)
    before = {path.name for path in folder.iterdir()}
    start(f"{name}.py")
    assert {path.name for path in folder.iterdir()} == before | {"logs"}
    run = only_folder(folder / "logs")
    assert sorted(path.name for path in (run / "checkpoint").iterdir()) == ["latest", "step_000002", "step_000004"]
    assert (run / f"{name}.py").read_bytes() == (ROOT / f"{name}.py").read_bytes()
    info = json.loads((run / "run.json").read_text())
    assert info["status"] == "finished" and list(info["sources"]) == [f"{name}.py"]
    weights = run / "checkpoint" / "step_000004" / "model.safetensors"
    wanted = weights.read_bytes()

    # as if the machine had been switched off before the end
    shutil.rmtree(weights.parent)
    (run / "checkpoint" / "latest").write_text("step_000002")
    (run / "run.json").write_text(json.dumps(info | {"status": "running"}))
    assert "goes on from" in start(f"{name}.py", "--resume=latest")
    assert only_folder(folder / "logs") == run and weights.read_bytes() == wanted


@pytest.mark.parametrize("name, with_sample, named", [
    ("train_gpt.py", False, True), ("train_my.idea [3].py", True, False), ("my idea.py", True, True)])
def test_the_next_line_names_the_script_where_sampling_needs_it(name, with_sample, named, start, folder, fast_run):
    shutil.copy(ROOT / "train_gpt.py", folder / name)
    if with_sample:
        shutil.copy(ROOT / "sample.py", folder)
    words = next_command(start(name))
    run = only_folder(folder / "logs")
    assert words[:2] == ["python", "sample.py"]
    assert [word for word in words if word.startswith("--checkpoint=")] == [
        f"--checkpoint={os.path.relpath(run, folder)}/checkpoint/step_000004"]
    script = f"--script={os.path.relpath(run, folder)}/{name}"
    assert [word for word in words if word.startswith("--script=")] == [script] * named
    if not with_sample:                  # where it is, as the user has to know
        words[1] = str(ROOT / "sample.py")
    done = fast_run([sys.executable, *words[1:], "--max_tokens=3"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_script_alone_in_a_process_of_its_own(start, folder):
    """The others above are forked from one that has PyTorch loaded."""
    shutil.copy(ROOT / "train_gpt.py", folder)
    (folder / "matplotlib.py").write_text("raise ImportError('no curve, which takes as long as the rest')")
    output = start("train_gpt.py", start=subprocess.run, stop_after=2)
    assert "finished: 2 steps" in output
