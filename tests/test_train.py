"""Whole runs on a CPU: what a run writes, how it ends, what remains when it is interrupted or killed.

Against: files parsed with the standard library, losses computed again from the reloaded checkpoint. The runs take a
second each; those that get signals are processes of their own. What a good run leaves behind is looked at for every
script, bad ends for train_gpt.py, whose code the others share. Run: python -m pytest tests/test_train.py
"""
import hashlib
import importlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SCRIPTS, join, main_of, make_data, only_folder, small_flags, tokenizer_json
from safetensors.torch import load_file

import sample
import train_gpt
from train_gpt import PRESETS, UserError, config_from_dict

NUMBER = r"-?\d+(?:\.\d+)?"
STEP_LINE = rf"^step:(\d+)/(\d+) train_loss:({NUMBER}) train_time:({NUMBER})ms step_avg:{NUMBER}ms$"
VAL_LINE = rf"^step:(\d+)/(\d+) val_loss:({NUMBER}) train_time:({NUMBER})ms step_avg:{NUMBER}ms$"
STEPS = 40


def strict_json(path):
    """The content of a file that must be JSON as the standard has it: no NaN."""
    def refuse(name):
        raise AssertionError(f"{name} in {path}")
    return json.loads(path.read_text(), parse_constant=refuse)


def load_checkpoint(folder):
    """(model, meta) of a checkpoint folder, as a reader of the format would."""
    meta = strict_json(folder / "meta.json")
    script = importlib.import_module(meta["script"])
    model = script.GPT(script.config_from_dict(meta["config"]))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model, meta


def training_lines(log):
    return re.findall(STEP_LINE, log, re.M)


@pytest.fixture(scope="module", params=SCRIPTS)
def finished(request, data, tmp_path_factory):
    """A finished run of each script: its folder, exit code, console output, and its model's logits on some tokens."""
    script, logs, patch = importlib.import_module(request.param), tmp_path_factory.mktemp("logs"), pytest.MonkeyPatch()
    tokens = torch.cat([torch.tensor([256]), torch.arange(97, 122)]).repeat(4)
    captured, save, console = {}, script.Run.save_checkpoint, []

    def save_checkpoint(run, *rest, **more):
        with torch.no_grad():
            captured.update(logits=run.model(tokens), cfg=run.model.cfg)
        return save(run, *rest, **more)
    patch.setattr(script.Run, "save_checkpoint", save_checkpoint)
    flags = small_flags(data, out_dir=logs, num_iterations=STEPS, val_every=20)
    patch.setattr(sys, "argv", [f"{request.param}.py", *flags])
    patch.setattr("builtins.print", lambda *args, **_: console.append(" ".join(map(str, args))))
    try:
        code = script.main()
    finally:
        patch.undo()
    folder = only_folder(logs)
    return SimpleNamespace(script=script, source=Path(script.__file__), folder=folder, code=code, console=console,
                           tokens=tokens, log=(folder / "log.txt").read_text(), info=strict_json(folder / "run.json"),
                           **captured)


# -----------------------------------------------------------------------------
# What a run writes

def test_it_ends_well_and_says_what_to_do_next(finished):
    assert finished.code == 0
    assert any("checkpoint" in line and "sample.py" in line for line in finished.console)
    assert any(str(finished.folder) in line for line in finished.console)


def test_the_loss_falls(finished):
    first, *_, last = [point["val_loss"] for point in finished.info["val_losses"]]
    assert first == pytest.approx(torch.tensor(257.0).log().item(), abs=0.02)
    assert last < 3.0
    losses = [float(loss) for _, _, loss, _ in training_lines(finished.log)]
    assert losses[0] > 4.5 and sum(losses[-5:]) / 5 < 3.2


def test_a_line_is_printed_in_one_piece(monkeypatch, script):
    """The thread that writes checkpoints prints, too, and its line must not end in the middle of another one."""
    pieces, run = [], SimpleNamespace(master=True, live=False, log_file=io.StringIO())
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=pieces.append, flush=lambda: None))
    script.Run.print(run, "a line")
    run.live = True
    script.Run.print(run, "another")
    assert [piece for piece in pieces if piece] == ["a line\n", "\r\033[Kanother\n"]


def test_the_log_begins_with_the_source_and_has_a_line_for_each_step(finished):
    source, rest = finished.log.split("=" * 100 + "\n")
    assert source.strip() == finished.source.read_text().strip()
    steps = training_lines(rest)
    assert [(int(step), int(total)) for step, total, *_ in steps] == [(i, STEPS) for i in range(1, STEPS + 1)]
    validations = re.findall(VAL_LINE, rest, re.M)
    assert [int(step) for step, *_ in validations] == [0, 20, STEPS]
    times = [float(line[3]) for line in steps]
    assert times == sorted(times) and times[-1] > 0
    logged = [line for line in finished.console if re.match(VAL_LINE, line)]
    assert len(logged) == 3 and all(line in rest for line in logged)


def test_validations_in_run_json_are_those_of_the_log(finished):
    logged = [(int(step), float(loss)) for step, _, loss, _ in re.findall(VAL_LINE, finished.log, re.M)]
    assert [(point["step"], point["val_loss"]) for point in finished.info["val_losses"]] == logged
    assert {point["tokens"] for point in finished.info["val_losses"]} == {1500}


def test_run_json_is_complete(finished):
    info = finished.info
    assert info["status"] == "finished" and info["script"] == finished.source.name and info["world_size"] == 1
    assert info["config"] == json.loads(json.dumps(asdict(finished.cfg)))
    assert f"--num_iterations={STEPS}" in info["argv"]
    assert info["seed"] == 0 and info["tokens_seen"] == 13 * 512 + 27 * 1024
    assert info["source_sha256"] == hashlib.sha256(finished.source.read_bytes()).hexdigest()
    assert info["sources"] == {finished.source.name: info["source_sha256"]}
    assert info["versions"]["torch"] == torch.__version__ and info["versions"]["python"]
    assert info["train_time_ms"] > 0 and info["recompiles"] == 0 and "compile_seconds" in info
    assert {"git", "gpu", "device", "started", "format", "peak_memory_gib", "data"} <= info.keys()
    assert sum(info["data"].values()) > 200_000


def test_the_run_folder_holds_the_source_and_a_curve_and_nothing_unfinished(finished):
    assert (finished.folder / finished.source.name).read_bytes() == finished.source.read_bytes()
    assert xml.etree.ElementTree.parse(finished.folder / "curve.svg").getroot().tag.endswith("svg")
    assert sorted(path.name for path in finished.folder.iterdir()) == ["checkpoint", "curve.svg", "log.txt",
                                                                        "run.json", finished.source.name]


def test_the_checkpoint_is_complete(finished):
    root = finished.folder / "checkpoint"
    name = (root / "latest").read_text().strip()
    assert name == f"step_{STEPS:06d}"
    assert sorted(path.name for path in root.iterdir()) == ["latest", name]
    assert sorted(path.name for path in (root / name).iterdir()) == ["meta.json", "model.safetensors", "tokenizer.json"]
    meta = strict_json(root / name / "meta.json")
    assert (meta["step"], meta["stage"], meta["script"]) == (STEPS, 1, finished.source.stem)
    assert meta["val_loss"] == pytest.approx(finished.info["val_losses"][-1]["val_loss"], abs=1e-6)
    assert meta["source_sha256"] == finished.info["source_sha256"]
    assert meta["tokenizer_sha256"] == hashlib.sha256(tokenizer_json()).hexdigest()
    assert (root / name / "tokenizer.json").read_bytes() == tokenizer_json()


def test_a_reloaded_checkpoint_gives_the_same_logits_and_the_same_validation_loss(finished, data):
    script, folder = finished.script, finished.folder / "checkpoint" / f"step_{STEPS:06d}"
    model, meta = load_checkpoint(folder)
    assert json.loads(json.dumps(asdict(model.cfg))) == meta["config"]
    model.set_stage(meta["stage"], final=True)
    with torch.no_grad():
        assert torch.equal(model(finished.tokens), finished.logits)
    shards = script.open_shards(model.cfg.train_files, model.cfg.val_files)[1]
    machine = script.Machine(torch.device("cpu"), 0, 1, "cpu")
    loss = script.validate(model, model.cfg, script.validation_streams(model.cfg, shards), machine)
    assert loss == pytest.approx(meta["val_loss"], abs=1e-6)
    read, tokenizer, _ = sample.load_checkpoint(folder, "cpu")         # which also is how evaluate.py does it
    assert torch.equal(read(finished.tokens), finished.logits) and tokenizer.bos_id == 256


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_the_way_through_json(name):
    cfg = replace(PRESETS[name], seed=3)
    back = config_from_dict(json.loads(json.dumps(asdict(cfg))))
    assert asdict(back).keys() == asdict(cfg).keys()
    assert json.dumps(asdict(back)) == json.dumps(asdict(cfg))
    assert [type(row) for row in (*back.stages, *back.layers)] == [type(row) for row in (*cfg.stages, *cfg.layers)]


@pytest.mark.parametrize("change", [
    lambda config: config.pop("seed"), lambda config: config.update(wings=2), lambda config: config.update(model_dim=7),
    lambda config: config["stages"][0].update(wings=2), lambda config: config["layers"][0].pop("ve"),
    lambda config: config.update(stages=3)])
def test_a_config_of_another_script_is_refused(change):
    config = json.loads(json.dumps(asdict(PRESETS["tiny"])))
    if change(config) == 0 and "ve" not in config["layers"][0]:
        config["layers"][0]["ve2"] = 0
    with pytest.raises(UserError):
        config_from_dict(config)


# -----------------------------------------------------------------------------
# What does not change a run, and what does

def losses_of(run_main, logs, flags):
    done = run_main(*flags, f"--out_dir={logs}")
    assert done.code == 0, done.err
    log = (only_folder(logs) / "log.txt").read_text()
    return [float(line[2]) for line in training_lines(log)], strict_json(only_folder(logs) / "run.json")


def test_runs_repeat_follow_the_seed_and_may_stop_early(run_main, data, tmp_path):
    """The same losses with the same seed, others with another; more micro-batches change only the rounding."""
    flags = small_flags(data, stop_after=8, val_every=0)
    first, info = losses_of(run_main, tmp_path / "first", flags)
    assert len(first) == 8 and info["status"] == "finished" and info["tokens_seen"] == 7 * 512 + 1024
    assert [point["step"] for point in info["val_losses"]] == [0, 8]
    again, same = losses_of(run_main, tmp_path / "again", flags)
    assert again == first and same["val_losses"][-1]["val_loss"] == info["val_losses"][-1]["val_loss"]
    assert losses_of(run_main, tmp_path / "other", [*flags, "--seed=1"])[0] != first
    split, _ = losses_of(run_main, tmp_path / "split", [*flags, "--micro_batch_tokens=128"])
    assert split == pytest.approx(first, abs=2e-3)


# -----------------------------------------------------------------------------
# Bad ends

def test_a_loss_that_is_not_a_number_stops_the_run_and_names_step_and_parameter(run_main, data, tmp_path, monkeypatch):
    honest = train_gpt.Optimizer.step

    def spoiled(self, step, *rest):
        honest(self, step, *rest)
        if step == 3:
            self.params["mlp"].data[1, 2, 3] = float("nan")
    monkeypatch.setattr(train_gpt.Optimizer, "step", spoiled)
    done = run_main(*small_flags(data, out_dir=tmp_path / "logs"))
    assert done.code == 3
    folder = only_folder(tmp_path / "logs")
    assert re.fullmatch(r"train_gpt\.py: [^\n]*\bstep 5\b[^\n]*\bnan\b[^\n]*\bmlp\b[^\n]*\n", done.err)
    info = strict_json(folder / "run.json")
    assert info["status"] == "diverged" and "mlp" in info["error"] and "step 5" in info["error"]
    assert len(training_lines((folder / "log.txt").read_text())) == 4
    assert not (folder / "checkpoint").exists()


def test_a_nan_in_the_last_update_is_not_reported_as_success(run_main, data, tmp_path, monkeypatch):
    honest = train_gpt.Optimizer.step

    def spoiled(self, step, *rest):
        honest(self, step, *rest)
        if step == 19:
            self.params["lm_head"].data.fill_(float("nan"))
    monkeypatch.setattr(train_gpt.Optimizer, "step", spoiled)
    done = run_main(*small_flags(data, out_dir=tmp_path / "logs"))
    assert done.code == 3
    assert strict_json(only_folder(tmp_path / "logs") / "run.json")["status"] == "diverged"


def test_an_output_folder_that_cannot_be_made(refused, data, tmp_path):
    (tmp_path / "file").write_text("")
    refused(*small_flags(data, out_dir=tmp_path / "file" / "logs"), words=["--out_dir", tmp_path / "file"])


@pytest.mark.parametrize("room", [0, 40_000, 130_000, 400_000])
def test_a_full_disk(run_main, data, tmp_path, room):
    """Files may not grow past `room` bytes: the first write fails, the copy of the source, the log, the checkpoint."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        done = run_main(*small_flags(data, out_dir=tmp_path / "logs", stop_after=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.code == 2 and done.err.count("\n") == 1
    assert "--out_dir" in done.err


def test_a_reader_that_leaves_ends_the_run_with_one_line(data, tmp_path):
    """As in `python train_gpt.py | head -1`."""
    flags = small_flags(data, out_dir=tmp_path, val_every=1, device="cpu")
    process = subprocess.Popen([sys.executable, train_gpt.__file__, *flags], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stdout.readline().startswith("train_gpt.py: 1 x ")
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(60) == 2 and errors.count("\n") == 1 and "nobody reads the output any more" in errors, errors
    assert json.loads((only_folder(tmp_path) / "run.json").read_text())["status"] == "failed"


def test_more_ranks_than_packs(refused, data, monkeypatch):
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 5)):
        monkeypatch.setenv(name, str(value))
    refused(*small_flags(data), words=["5 ranks", "4 packs", "pack_tokens"])


# -----------------------------------------------------------------------------
# Signals

def wait_for_step(process, logs, step, seconds=30):
    """The run's folder, once its log has the line of that step."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.is_alive():
        for log in logs.glob("*/log.txt"):
            if f"\nstep:{step}/" in log.read_text():
                return log.parent
        time.sleep(0.01)
    raise AssertionError(process.output.read_text())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_an_interrupted_run_saves_what_it_has(start_ranks, data, tmp_path, name):
    logs = tmp_path / "logs"
    process, = start_ranks(1, main_of, small_flags(data, out_dir=logs, num_iterations=35))
    folder = wait_for_step(process, logs, 3)
    os.kill(process.pid, getattr(signal, name))
    assert join([process]) == [130]
    output = process.output.read_text()
    assert "Traceback" not in output and "interrupted" in output
    info = strict_json(folder / "run.json")
    assert info["status"] == "interrupted"
    saved = folder / "checkpoint" / (folder / "checkpoint" / "latest").read_text().strip()
    model, meta = load_checkpoint(saved)
    assert 3 <= meta["step"] < 35 and meta["val_loss"] is None
    assert len(training_lines((folder / "log.txt").read_text())) == meta["step"]
    assert torch.isfinite(model(torch.tensor([256, 97, 98]))).all()


def main_killed_at(argv, number):
    """A run that the system kills at the n-th moment at which it puts a file in its place or removes one.

    Without that many moments, the exit code is their number.
    """
    calls = []

    def dying(function):
        def call(*args, **named):
            calls.append(function)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **named)
        return call
    for name in ("replace", "rename", "unlink", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))
    assert main_of(argv) == 0
    return len(calls)


def check_readable(logs):
    """What is there after a kill can be read: run.json, the log, and the checkpoint if `latest` names one."""
    for folder in logs.glob("*"):
        if (folder / "run.json").exists():
            assert strict_json(folder / "run.json")["status"] in ("running", "finished")
            assert (folder / "log.txt").read_text().startswith('"""')
        for latest in folder.glob("checkpoint/latest"):
            load_checkpoint(latest.parent / latest.read_text().strip())


def test_a_run_killed_while_it_writes_leaves_a_readable_folder(start_ranks, data, tmp_path):
    """Killed at each of the moments at which the state of the files changes."""
    def start(number):
        flags = small_flags(data, out_dir=tmp_path / f"logs_{number}", num_iterations=2, stop_after=1, val_tokens=300)
        return start_ranks(1, main_killed_at, flags, number)
    moments, = join(start(1000))
    assert 8 < moments < 40
    for low in range(1, moments + 1, 2):
        numbers = range(low, min(low + 2, moments + 1))
        processes = sum((start(number) for number in numbers), [])
        assert join(processes) == [-signal.SIGKILL] * len(numbers)
        for number in numbers:
            check_readable(tmp_path / f"logs_{number}")


def test_a_run_killed_at_any_time_leaves_a_readable_folder(start_ranks, data, tmp_path):
    for i, delay in enumerate((0.0, 0.13, 0.31)):
        logs = tmp_path / f"logs_{i}"
        process, = start_ranks(1, main_of, small_flags(data, out_dir=logs, num_iterations=35))
        folder = wait_for_step(process, logs, 1)
        time.sleep(delay)
        process.kill()
        assert join([process])[0] in (-signal.SIGKILL, 0)
        check_readable(logs)
        assert strict_json(folder / "run.json")["config"]["num_iterations"] == 35
        assert training_lines((folder / "log.txt").read_text())


def test_interrupted_before_the_first_step(start_ranks, tmp_path):
    """As soon as the run's folder is there."""
    folder, logs = make_data(tmp_path / "shards", train_tokens=100_000), tmp_path / "logs"
    process, = start_ranks(1, main_of, small_flags(folder, out_dir=logs))
    deadline = time.monotonic() + 30
    while not list(logs.glob("*/run.json")) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGTERM)
    assert join([process])[0] in (130, -signal.SIGTERM)
    assert "Traceback" not in process.output.read_text()
    check = strict_json(only_folder(logs) / "run.json")
    assert check["status"] in ("interrupted", "running")
