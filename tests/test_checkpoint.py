"""Runs of train_gpt.py that end before their time, by a signal, a fault or a full disk, and go on from a checkpoint.

Against: runs that nobody disturbed, bit for bit on as many ranks. The runs take a second each and are processes of
their own where they get killed; in one test torchrun's agents start them.
Run: python -m pytest tests/test_checkpoint.py
"""
import itertools
import json
import os
import re
import resource
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import join, main_of, make_data, only_folder, rank_starter, small_flags
from safetensors.torch import load_file

import sample
import train_gpt
from train_gpt import UserError, find_checkpoint, find_fault, read_json, write_checkpoint

KILLED = -signal.SIGKILL


def at_step(number, action):
    """Makes train_gpt call action() before the training step with this number (the first is 0)."""
    step = train_gpt.training_step

    def disturbed(model, optimizer, batches, index, *rest):
        if index == number:
            action()
        return step(model, optimizer, batches, index, *rest)
    train_gpt.training_step = disturbed


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def latest(logs):
    """The checkpoint that `latest` names in the one run under `logs`, None if there is none."""
    file = next(Path(logs).glob("*/checkpoint/latest"), None)
    return file and file.parent / file.read_text()


def disturbed_main(argv, number, logs, rank, kind):
    """main(), but this rank sends itself a signal at a step, once a checkpoint is there."""
    def action():
        wait_for(lambda: latest(logs))
        os.kill(os.getpid(), kind)
    if int(os.environ["RANK"]) == rank and not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        at_step(number, action)
    return main_of(argv)


def result(folder):
    """Validation losses by step, and the last checkpoint's tensors by file."""
    losses = {point["step"]: point["val_loss"] for point in read_json(folder / "run.json")["val_losses"]}
    return losses, {name: load_file(folder / "checkpoint" / "step_000020" / name) for name in train_gpt.FILES}


def assert_same(folder, other):
    (losses, files), (other_losses, other_files) = result(folder), result(other)
    assert losses == other_losses and losses.keys() == {0, 10, 20}
    for name, tensors in files.items():
        assert tensors.keys() == other_files[name].keys()
        for key in tensors.keys() - {"train_losses", "rng"}:  # each process begins with other random numbers
            assert torch.equal(tensors[key], other_files[name][key]), key
    # step and loss, not the time
    assert torch.equal(files[train_gpt.FILES[1]]["train_losses"][:, ::2],
                       other_files[train_gpt.FILES[1]]["train_losses"][:, ::2])


@pytest.fixture(scope="module")
def runs(data, forkserver, tmp_path_factory):
    """Number of ranks -> (logs of a run that nobody disturbed, logs of one whose first rank was killed at step 14)."""
    folder, found = tmp_path_factory.mktemp("checkpoint"), {}
    with rank_starter(forkserver, folder) as start:
        for world_size in (1, 2):
            whole, killed = folder / f"whole_{world_size}", folder / f"killed_{world_size}"
            processes = start(world_size, main_of, small_flags(data, out_dir=whole, save_every=10))
            assert join(processes) == [0] * world_size, processes[0].output.read_text()
            flags = small_flags(data, out_dir=killed, save_every=10)
            processes = start(world_size, disturbed_main, flags, 13, killed, 0, signal.SIGKILL)
            assert join(processes) == [KILLED] + [1] * (world_size - 1)
            assert latest(killed).name == "step_000010"
            found[world_size] = whole, killed
    return found


@pytest.fixture
def killed(runs, tmp_path):
    """Function of a number of ranks: a copy of the logs of the killed run."""
    def copy(world_size):
        return Path(shutil.copytree(runs[world_size][1], tmp_path / f"killed_{world_size}"))
    return copy


# -----------------------------------------------------------------------------
# Going on

@pytest.mark.parametrize("world_size", [1, 2])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(runs, killed, start_ranks, data, world_size):
    logs = killed(world_size)
    before = read_json(only_folder(logs) / "run.json")
    assert join(start_ranks(world_size, main_of, small_flags(data, out_dir=logs, save_every=10, resume="latest"))) == \
        [0] * world_size
    folder = only_folder(logs)
    assert_same(folder, only_folder(runs[world_size][0]))
    info, log = read_json(folder / "run.json"), (folder / "log.txt").read_text()
    assert info["status"] == "finished" and info["started"] == before["started"]
    assert [entry["step"] for entry in info["resumed"]] == [10] and info["tokens_seen"] == 7 * 512 + 13 * 1024
    assert log.count("\ngoes on from ") == 1 and log.count('"""Train a GPT-2-class model') == 1
    steps = re.findall(r"^step:(\d+)/20 train_loss:\S+ train_time:(\d+)ms", log, re.M)
    again = steps[[step for step, _ in steps].index("11", 11):]
    assert [int(step) for step, _ in again] == list(range(11, 21))
    times = [int(time) for _, time in again]
    assert times == sorted(times) and times[0] >= int(dict(steps[:10])["10"])  # the clock goes on
    assert sample.load_checkpoint(sample.find_checkpoint(logs), "cpu")[2]["val_loss"] == pytest.approx(
        result(folder)[0][20], abs=1e-6)


def test_everything_that_training_changes_is_put_back(runs, data, small_config):
    folder = only_folder(runs[1][1]) / "checkpoint" / "step_000010"
    model = train_gpt.GPT(small_config(seed=5))
    optimizer, machine = train_gpt.Optimizer(model), train_gpt.Machine(torch.device("cpu"), 0, 1, "cpu")
    torch.manual_seed(5)
    losses = train_gpt.restore_state(folder, read_json(folder / "meta.json"), model, optimizer, machine)
    saved = load_file(folder / train_gpt.FILES[0]) | load_file(folder / train_gpt.FILES[1])
    assert losses == saved.pop("train_losses").tolist() and len(losses) == 10
    state = train_gpt.run_state(model, optimizer, machine)
    assert state.keys() == saved.keys() > {"windows", "attn_scale", "inv_freq", "mlp.master", "embed.count", "rng"}
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    assert any(saved[name].any() for name in saved if name.endswith(".m"))


@pytest.mark.parametrize("world_size", [1, 3])
def test_another_number_of_ranks_goes_on_with_nearly_the_same_losses(runs, killed, start_ranks, data, world_size):
    logs = killed(2)
    assert join(start_ranks(world_size, main_of, small_flags(data, out_dir=logs, save_every=10, resume="latest"))) == \
        [0] * world_size
    losses, other = result(only_folder(logs))[0], result(only_folder(runs[2][0]))[0]
    assert losses[10] == other[10] and abs(losses[20] - other[20]) < 1e-3


def signalled_main(argv, moment):
    """main(), to which SIGTERM comes at a moment, once in the life of its logs."""
    logs, (name, number) = argv[-1].split("=")[1], moment
    original, calls = getattr(train_gpt, name), []

    def disturbed(*args, **named):
        calls.append(name)
        if len(calls) == number and not latest(logs):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        return original(*args, **named)
    setattr(train_gpt, name, disturbed)
    return main_of(argv)


@pytest.mark.parametrize("moment", [("training_step", 7), ("write_checkpoint", 1), ("validate", 2)], ids=lambda m: m[0])
def test_sigterm_at_any_moment_then_the_same_command_again(runs, start_ranks, data, tmp_path, moment):
    every = 8 if moment[0] == "write_checkpoint" else 20
    flags = small_flags(data, save_every=every, resume="latest", out_dir=tmp_path / "logs")
    process, = start_ranks(1, signalled_main, flags, moment)
    assert join([process]) == [130], process.output.read_text()
    assert f"--resume={only_folder(tmp_path / 'logs')}" in process.output.read_text()
    assert 6 <= read_json(latest(tmp_path / "logs") / "meta.json")["step"] <= 14
    assert join(start_ranks(1, signalled_main, flags, moment)) == [0]
    assert_same(only_folder(tmp_path / "logs"), only_folder(runs[1][0]))


def worker_main(*arguments):
    if code := disturbed_main(*arguments):
        sys.exit(code)


def agent_main(flags, *arguments):
    """torchrun with these flags, but that its ranks are forked from it: they need not load PyTorch again."""
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args
    # else agents may count restarts differently, and then their ranks look for each other under different names
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    config = config_from_args(parse_args([*flags, "--start_method=fork", "train_gpt.py"]))[0]
    elastic_launch(config, worker_main)(*arguments)
    return 0


def test_two_agents_train_as_one_with_two_ranks_even_when_one_rank_is_killed(runs, start_ranks, data, tmp_path):
    """torchrun starts the ranks again; with --resume=latest they go on with their run."""
    logs = tmp_path / "logs"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_id=test", "--rdzv_backend=c10d", "--max-restarts=1",
             f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1"]
    argv = small_flags(data, out_dir=logs, save_every=10, resume="latest")
    agents = [start_ranks(1, agent_main, flags, argv, 13, logs, 1, signal.SIGKILL)[0] for _ in range(2)]
    codes, outputs = join(agents, 100), [agent.output.read_text() for agent in agents]
    assert codes == [0, 0], outputs
    said = "".join(outputs)
    assert said.count("another rank has died") == 1 and said.count("goes on from ") == 1, said
    assert_same(only_folder(logs), only_folder(runs[2][0]))


# -----------------------------------------------------------------------------
# What goes on, and what does not

@pytest.fixture
def find(data):
    """Function of logs and changed flags: what find_checkpoint says, as train() would ask it."""
    def ask(logs, **changes):
        machine = train_gpt.Machine(torch.device("cpu"), 0, 1, "cpu")
        cfg, content = train_gpt.load_data(train_gpt.parse_config(small_flags(data, out_dir=logs, **changes)), machine)
        return find_checkpoint(cfg, train_gpt.run_identity(cfg, content))
    return ask


def test_latest_is_the_newest_run_unless_it_is_finished(runs, killed, find, tmp_path):
    logs = killed(1)
    run = only_folder(logs)
    assert find(logs)[0] is None and find(logs)[2] == []  # without --resume
    for named in ("latest", run, run / "checkpoint", run / "checkpoint" / "step_000010"):
        folder, meta, notes = find(logs, resume=named)
        assert (folder, meta["step"], notes) == (run / "checkpoint" / "step_000010", 10, [])
    folder, _, (note,) = find(tmp_path / "empty", resume="latest")
    assert folder is None and "new run" in note
    shutil.copytree(only_folder(runs[1][0]), logs / "done")
    os.utime(logs / "done" / "run.json")
    folder, _, (note,) = find(logs, resume="latest")  # the newest one has nothing left to do
    assert folder is None and "new run" in note
    info = read_json(run / "run.json")
    (run / "run.json").write_text(json.dumps(info))  # now this one is the newest
    assert find(logs, resume="latest")[0].parent.parent == run
    (run / "run.json").write_text(json.dumps(info | {"script": "train_other.py"}))
    assert find(logs, resume="latest")[0] is None


@pytest.mark.parametrize("changes, names", [
    ({"lr": 0.5}, ["lr was 1.0, now 0.5"]), ({"seed": 3, "val_tokens": 1000}, ["seed was 0, now 3", "val_tokens"]),
    ({"num_iterations": 40}, ["num_iterations"]), ({"pack_tokens": 256}, ["pack_tokens"])])
def test_a_changed_flag_is_refused_by_name_unless_overridden(refused, killed, find, data, changes, names):
    logs, override = killed(1), ",".join(sorted(changes))
    line = refused(*small_flags(data, resume=only_folder(logs), **changes), words=names)
    assert f"--resume_override={override}" in line
    with pytest.raises(UserError):
        find(logs, resume="latest", resume_override="momentum", **changes)
    folder, _, notes = find(logs, resume="latest", resume_override=override, **changes)
    assert folder.name == "step_000010" and len(notes) == len(changes)


def test_flags_that_leave_a_run_what_it_is_may_change(killed, find, data):
    changes = {"val_every": 5, "save_every": "3min", "keep": 9, "micro_batch_tokens": 128, "stop_after": 15}
    assert find(killed(1), resume="latest", **changes)[2] == []


def test_other_shards_and_another_source_are_refused_by_name(killed, find, monkeypatch, tmp_path):
    logs, shards = killed(1), train_gpt.open_shards
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "open_shards", lambda *globs: (shards(*globs)[0][:1], shards(*globs)[1]))
        with pytest.raises(UserError, match="train_files was"):
            find(logs, resume="latest")
    changed = tmp_path / "train_gpt.py"
    changed.write_bytes(train_gpt.SCRIPT.read_bytes() + b"# another idea\n")
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "SCRIPT", changed)
        with pytest.raises(UserError, match="source was"):
            find(logs, resume="latest")
        assert find(logs, resume="latest", resume_override="source")[0] == latest(logs)


def test_the_same_shards_may_lie_in_another_folder(killed, find, data, tmp_path):
    moved = shutil.copytree(data, tmp_path / "moved", copy_function=shutil.copyfile)
    files = {f"{kind}_files": f"{moved}/{kind}_*.bin" for kind in ("train", "val")}
    assert find(killed(1), resume="latest", **files)[2] == []


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("name, damage", [
    *((name, damage) for name in train_gpt.FILES for damage in (flip, cut, Path.unlink)),
    ("meta.json", cut), ("meta.json", Path.unlink)])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(runs, find, tmp_path, name, damage):
    run = Path(shutil.copytree(only_folder(runs[1][0]), tmp_path / "logs" / "run"))
    damage(run / "checkpoint" / "step_000020" / name)
    folder, _, (note,) = find(tmp_path / "logs", resume=run)
    assert folder == run / "checkpoint" / "step_000010" and "step_000020" in note and name in note
    with pytest.raises(UserError, match=f"step_000020 is not used: its {name} is damaged"):
        find(tmp_path / "logs", resume=run / "checkpoint" / "step_000020")
    damage(run / "checkpoint" / "step_000010" / name)
    with pytest.raises(UserError, match="step_000020 is.*step_000010 is"):
        find(tmp_path / "logs", resume=run)


def test_it_goes_on_from_the_one_before_and_replaces_the_damaged_one(runs, run_main, data, tmp_path, monkeypatch):
    run = Path(shutil.copytree(only_folder(runs[1][0]), tmp_path / "logs" / "run"))
    flip(run / "checkpoint" / "step_000020" / "model.safetensors")
    done = run_main(*small_flags(data, out_dir=tmp_path / "logs", save_every=10, resume=run))
    assert done.code == 0 and "model.safetensors is damaged" in (run / "log.txt").read_text()
    assert_same(run, only_folder(runs[1][0]))
    assert sorted(path.name for path in (run / "checkpoint").iterdir()) == ["latest", "step_000010", "step_000020"]


def test_what_cannot_go_on_is_refused(refused, find, runs, data, tmp_path, run_main):
    flags = small_flags(data, out_dir=tmp_path / "logs", stop_after=2, val_every=0)
    assert run_main(*flags).code == 0
    refused(*small_flags(data, resume=only_folder(tmp_path / "logs")), words=["step_000002", "--save_every"])
    refused(*small_flags(data, resume=tmp_path / "nothing"), words=["nothing", "no checkpoint"])
    other = tmp_path / "other" / "checkpoint" / "step_000003"
    other.mkdir(parents=True)
    (other.parent / "latest").write_text(other.name)
    (other / "meta.json").write_text(json.dumps({"script": "train_gpt_simple", "step": 3}))
    refused(*small_flags(data, resume=tmp_path / "other"), words=["it is of another script, train_gpt_simple.py"])
    saved = only_folder(runs[1][0]) / "checkpoint" / "step_000010"
    alone = shutil.copytree(saved, tmp_path / "x" / "checkpoint" / "step_9")
    refused(*small_flags(data, resume=alone), words=["step_9", "not in the folder of a run"])
    again = run_main(*flags, f"--resume={only_folder(tmp_path / 'logs')}")  # nothing to do but the evaluation
    assert again.code == 0 and "step:2/20 val_loss:" in again.out


# -----------------------------------------------------------------------------
# Writing

def write_until_killed(root, step, report, moment):
    """Writes the checkpoint of the next step, whose tensors hold the step; dies before file operation `moment`."""
    count = itertools.count()

    def audit(event, _):
        if event.startswith(("open", "os.", "shutil.")) and next(count) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(audit)
    write_step(root, step + 1)
    os.write(report, b"done")
    os._exit(0)


def write_step(root, step):
    files = {name: {"x": torch.full((5000,), step)} for name in train_gpt.FILES}
    write_checkpoint(root, {"step": step, "identity": {}, "loader_position": [0, 0], "history": [[0, 0.0, 9.0]],
                            "train_time": 0.5, "tokens_seen": 1}, files, b"{}", keep=2)


def kill_writers(root):
    """Kills a writer at each of its file operations; each time the newest checkpoint is whole and none is lost."""
    found, left = 2, set()
    (root.parent / "run.json").write_text("{}")
    write_step(root, 1), write_step(root, 2)
    for moment in itertools.count():
        reader, report = os.pipe()
        if (child := os.fork()) == 0:
            write_until_killed(root, found, report, moment)
        os.close(report)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        done = os.read(reader, 4) == b"done"
        os.close(reader)
        folder = train_gpt.newest_checkpoint(root)[0]
        meta = read_json(folder / "meta.json")
        assert find_fault(folder, meta, 1 << 30) == "" and meta["step"] in (found + done, found + 1)
        assert all((load_file(folder / name)["x"] == meta["step"]).all() for name in train_gpt.FILES)
        assert len(list(root.glob("step_*"))) in (2, 3)
        found = meta["step"]
        left.add(tuple(sorted(path.name[-3:] for path in root.glob(".step*"))))
        if status == 0:
            break
        assert status == KILLED, status
    assert {(), ("tmp",), ("old",)} <= left and moment > 20, (left, moment)
    return 0


def test_a_writer_killed_at_any_moment_loses_nothing(start_ranks, tmp_path):
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    process, = start_ranks(1, kill_writers, tmp_path / "run" / "checkpoint")
    assert join([process]) == [0], process.output.read_text()


def test_old_checkpoints_go_when_the_new_one_is_there(tmp_path):
    times = itertools.count(1)

    def write(step):
        folder = write_checkpoint(tmp_path, {"step": step}, {"model.safetensors": {"x": torch.zeros(step)}}, b"{}", 2)
        os.utime(folder, (time := next(times), time))
        return sorted(path.name for path in tmp_path.iterdir())
    write(4), write(8)
    assert write(12) == ["latest", "step_000008", "step_000012"]
    assert write(8) == ["latest", "step_000008", "step_000012"]  # a run that went back
    assert (tmp_path / "latest").read_text() == "step_000008"
    os.utime(tmp_path / "step_000012", (1 << 32, 1 << 32))  # by a clock that was wrong
    os.utime(tmp_path / "step_000008", (1 << 32, 1 << 32))
    assert write(4) == ["latest", "step_000004", "step_000012"]


@pytest.fixture
def umask():
    """Function that sets the mask of new files; the old one is back after the test."""
    before = os.umask(0)
    os.umask(before)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o027], ids=oct)
def test_files_have_the_mode_that_the_user_has_chosen(run_main, data, tmp_path, umask, mask):
    umask(mask)
    done = run_main(*small_flags(data, out_dir=tmp_path / "logs", stop_after=2, save_every=2, val_every=0))
    assert done.code == 0, done.err
    write_checkpoint(tmp_path / "logs" / "x", {"step": 1}, {name: {} for name in train_gpt.FILES}, b"", keep=1)
    (tmp_path / "logs" / "x").chmod(0o777 & ~mask)
    modes = {path: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "logs").rglob("*")}
    assert sum(path.name in train_gpt.FILES for path in modes) == 4
    assert modes == {path: oct((0o777 if path.is_dir() else 0o666) & ~mask) for path in modes}


def test_weights_do_not_take_the_mode_of_the_folder(tmp_path, umask):
    """A folder closed to others by hand, or made under another mask."""
    umask(0o022)
    tmp_path.chmod(0o700)
    folder = write_checkpoint(tmp_path / "checkpoint", {"step": 1}, {train_gpt.FILES[0]: {}}, b"{}", keep=1)
    assert {oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {"0o644"}


def test_a_full_disk_while_saving_is_a_warning(run_main, data, tmp_path, monkeypatch):
    """For four steps no file may grow: the checkpoint of step 12 is not written, nor is the log until it can be."""
    limits, seen = resource.getrlimit(resource.RLIMIT_FSIZE), {}
    monkeypatch.setattr(train_gpt, "training_step", train_gpt.training_step)

    def write(root, meta, *args):
        try:
            return write_checkpoint(root, meta, *args)
        finally:
            seen[meta["step"]] = True
    monkeypatch.setattr(train_gpt, "write_checkpoint", write)

    def restore():
        wait_for(lambda: 12 in seen)
        seen["latest"] = latest(tmp_path / "logs").name
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    at_step(10, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1])))
    at_step(14, restore)
    try:
        done = run_main(*small_flags(data, out_dir=tmp_path / "logs", save_every=4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    folder = only_folder(tmp_path / "logs")
    log = (folder / "log.txt").read_text()
    assert done.code == 0 and seen["latest"] == "step_000008" and latest(tmp_path / "logs").name == "step_000020"
    assert len(re.findall(r"^warning: no checkpoint of step 12 .*step_000008$", log, re.M)) == 1
    assert [int(step) for step in re.findall(r"^step:(\d+)/20 train_loss", log, re.M)] == list(range(1, 21))
    assert sorted(path.name for path in (folder / "checkpoint").iterdir()) == ["latest", "step_000016", "step_000020"]


# -----------------------------------------------------------------------------
# Faults

@pytest.mark.parametrize("spoiled, step, good", [(13, 15, 12), (11, 12, 8)])
def test_nan_names_the_last_good_checkpoint(run_main, data, tmp_path, monkeypatch, spoiled, step, good):
    """The second is due to be saved: it is looked at first."""
    honest = train_gpt.Optimizer.step

    def spoil(self, index, *rest):
        honest(self, index, *rest)
        if index == spoiled:
            self.params["mlp"].data[1, 2, 3] = float("nan")
    monkeypatch.setattr(train_gpt.Optimizer, "step", spoil)
    done = run_main(*small_flags(data, out_dir=tmp_path / "logs", save_every=4, val_every=0))
    assert done.code == 3 and done.err.count("\n") == 1
    assert all(word in done.err for word in (f"step {step} is nan", "mlp", f"step_{good:06d}")), done.err
    assert read_json(only_folder(tmp_path / "logs") / "run.json")["status"] == "diverged"
    assert latest(tmp_path / "logs").name == f"step_{good:06d}"


def main_of_a_bad_machine(argv):
    """main() of ranks, the second of which changes an entry of a parameter by more than rounding can hide."""
    step = train_gpt.training_step

    def spoiling(backward, optimizer, batches, index, *rest):
        if index == 4:
            optimizer.params["resid_lambdas"].data[1, 1] += 0.5
        return step(backward, optimizer, batches, index, *rest)
    if os.environ["RANK"] == "1":
        train_gpt.training_step = spoiling
    return main_of(argv)


def test_ranks_that_hold_other_parameters_are_noticed_at_the_next_validation(start_ranks, data, tmp_path):
    processes = start_ranks(2, main_of_a_bad_machine, small_flags(data, out_dir=tmp_path / "logs"))
    assert join(processes) == [3, 3], [process.output.read_text() for process in processes]
    said = "".join(process.output.read_text() for process in processes)
    assert len(re.findall("after step 10, resid_lambdas of rank 1 is not that of rank 0", said)) == 1


def test_a_rank_that_dies_ends_each_other_with_one_line(start_ranks, data, tmp_path):
    logs = tmp_path / "logs"
    argv = small_flags(data, out_dir=logs, save_every=4, val_every=0)
    processes = start_ranks(3, disturbed_main, argv, 9, logs, 1, signal.SIGKILL)
    assert join(processes) == [1, KILLED, 1], [process.output.read_text() for process in processes]
    for process in (processes[0], processes[2]):
        said = process.output.read_text()
        assert len(re.findall(r"^train_gpt\.py: another rank has died.*--resume=latest$", said, re.M)) == 1, said
        assert said.count("train_gpt.py: ") == 1 + (process is processes[0]) and "Traceback" not in said, said
    info = read_json(only_folder(logs) / "run.json")
    assert info["status"] == "failed" and info["error"]
    assert latest(logs).name == "step_000008"


@pytest.mark.parametrize("where", ["largest_micro_batch", "training_step", "validate"])
@pytest.mark.parametrize("error", [RuntimeError, UserError, torch.OutOfMemoryError, KeyboardInterrupt, SystemExit])
def test_a_run_that_fails_says_so_in_its_folder(run_main, data, tmp_path, monkeypatch, where, error):
    def fail(*_):
        raise error("out of luck")
    monkeypatch.setattr(train_gpt, where, fail)
    argv = small_flags(data, out_dir=tmp_path / "logs")
    try:
        done = run_main(*argv)
        assert done.code in (2, 130) and done.err.count("\n") == 1
    except (RuntimeError, SystemExit):
        assert error in (RuntimeError, SystemExit)
    info = read_json(only_folder(tmp_path / "logs") / "run.json")
    assert info["status"] == ("interrupted" if error is KeyboardInterrupt else "failed")
    assert info["error"] == f"{error.__name__}: out of luck"


@pytest.mark.parametrize("change", [lambda path: os.utime(path, (1, 1)), Path.unlink], ids=["written", "gone"])
def test_a_shard_that_changes_while_it_is_in_use_is_named(run_main, tmp_path, monkeypatch, change):
    folder = make_data(tmp_path / "shards", train_tokens=80_000)
    monkeypatch.setattr(train_gpt, "training_step", train_gpt.training_step)
    at_step(3, lambda: change(folder / "train_000000.bin"))
    done = run_main(*small_flags(folder, out_dir=tmp_path / "logs"))
    assert done.code == 2 and done.err.count("\n") == 1 and "train_000000.bin changed or disappeared" in done.err
