"""One run shared between ranks: 1, 2 and 3 processes on a CPU read the same tokens and train the same model.

Against: the run with one rank. Most tables and banks of the small model have a number of rows that 2 and 3 do not
divide, so the padding of shares is part of it. Run: python -m pytest tests/test_ranks.py
"""
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import (ROOT, VOCAB, join, main_of, make_data, make_text, only_folder, rank_starter, small_flags,
                      write_shard)

WORLDS = (1, 2, 3)


def recorded_main(argv, out):
    """main() of one rank; leaves its batches, the first step's summed gradients and its last parameters in a file."""
    import train_gpt
    batches, record, step = [], {}, train_gpt.Optimizer.step
    original = train_gpt.training_batches

    def recorded_batches(*args):
        for batch in original(*args):
            batches.append([tuple(map(torch.from_numpy, part)) for part in batch[0]])     # NumPy's arrays are pickles
            yield batch

    def recorded_step(self, number, schedule, apply):
        if number == 0:
            record["gradients"] = {name: param.grad.clone() for name, param in self.params.items()}
            for gradient in record["gradients"].values() if self.world_size > 1 else ():
                torch.distributed.all_reduce(gradient)
        step(self, number, schedule, apply)
        record["parameters"] = {name: param.detach().clone() for name, param in self.params.items()}
    train_gpt.training_batches, train_gpt.Optimizer.step = recorded_batches, recorded_step
    code = main_of(argv)
    torch.save(record | {"batches": batches}, f"{out}_{os.environ['RANK']}.pt")
    return code


@pytest.fixture(scope="module")
def runs(data, forkserver, tmp_path_factory):
    """world size -> (records of the ranks, run.json, what the ranks printed)."""
    found, folder = {}, tmp_path_factory.mktemp("ranks")
    with rank_starter(forkserver, folder) as start:
        for world_size in WORLDS:
            logs, out = folder / f"logs_{world_size}", str(folder / f"record_{world_size}")
            processes = start(world_size, recorded_main, small_flags(data, out_dir=logs), out)
            assert join(processes) == [0] * world_size, [process.output.read_text() for process in processes]
            records = [torch.load(f"{out}_{rank}.pt", weights_only=True) for rank in range(world_size)]
            found[world_size] = (records, json.loads((only_folder(logs) / "run.json").read_text()),
                                 [process.output.read_text() for process in processes])
    return found


def packs(batches):
    """The packs of some micro-batches that have a target, as lists."""
    cut = [(inputs[i:i + 128].tolist(), targets[i:i + 128].tolist())
           for inputs, targets in batches for i in range(0, len(inputs), 128)]
    return [pack for pack in cut if max(pack[1]) >= 0]


@pytest.mark.parametrize("world_size", WORLDS[1:])
def test_the_ranks_read_the_tokens_of_one_rank(runs, world_size):
    (one,), _, _ = runs[1]
    records, _, _ = runs[world_size]
    assert len(one["batches"]) == 20
    for step, whole in enumerate(one["batches"]):
        shares = [packs(record["batches"][step]) for record in records]
        assert all(shares) and sum(shares, []) == packs(whole)


@pytest.mark.parametrize("world_size", WORLDS[1:])
def test_the_gradients_of_the_first_step_are_those_of_one_rank(runs, world_size):
    (one,), _, _ = runs[1]
    for record in runs[world_size][0]:
        assert record["gradients"].keys() == one["gradients"].keys()
        for name, gradient in one["gradients"].items():
            difference = (record["gradients"][name] - gradient).norm()
            assert difference <= 1e-5 * gradient.norm(), name
    assert sum(gradient.norm() > 0 for gradient in one["gradients"].values()) > 10


@pytest.mark.parametrize("world_size", WORLDS[1:])
def test_the_validation_losses_are_those_of_one_rank(runs, world_size):
    losses = {world: [(point["step"], point["val_loss"]) for point in runs[world][1]["val_losses"]] for world in WORLDS}
    assert [step for step, _ in losses[1]] == [0, 10, 20]
    assert losses[1][2][1] < losses[1][0][1] - 1  # they have moved
    for (step, mine), (same, theirs) in zip(losses[world_size], losses[1], strict=True):
        assert step == same and abs(mine - theirs) < (1e-6 if step == 0 else 1e-3)
    assert runs[world_size][1]["world_size"] == world_size
    assert runs[world_size][1]["tokens_seen"] == runs[1][1]["tokens_seen"]


@pytest.mark.parametrize("world_size", WORLDS[1:])
def test_all_ranks_end_with_the_same_parameters(runs, world_size):
    (one,), _, _ = runs[1]
    records = runs[world_size][0]
    for name, param in one["parameters"].items():
        for record in records:
            assert torch.equal(record["parameters"][name], records[0]["parameters"][name]), name
        assert (records[0]["parameters"][name] - param).norm() < 0.05 * param.norm() + 1e-3, name
    rows = {name: one["parameters"][name].flatten(0, -2).shape[0] for name in ("lm_head", "bigram_embed")}
    assert any(count % world_size for count in rows.values())  # padding took part


@pytest.mark.parametrize("world_size", WORLDS[1:])
def test_only_the_first_rank_speaks(runs, world_size):
    outputs = runs[world_size][2]
    assert "val_loss" in outputs[0]
    for output in outputs[1:]:
        assert not re.search(r"step:|train_gpt", output), output


def test_a_signal_ends_all_ranks_together(start_ranks, data, tmp_path):
    """The signal reaches them at different moments of the run, and once one of them only."""
    logs = tmp_path / "logs"
    processes = start_ranks(2, main_of, small_flags(data, out_dir=logs, num_iterations=35, val_every=0))
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline and not any("\nstep:2/" in log.read_text() for log in logs.glob("*/log.txt")):
        time.sleep(0.01)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert join(processes) == [130, 130], [process.output.read_text() for process in processes]
    folder = only_folder(logs)
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert (folder / "checkpoint" / "latest").exists()


def test_what_one_rank_finds_wrong_is_said_once(start_ranks, tmp_path):
    """A token outside the vocabulary in the last slot of the first step, which is not the first rank's."""
    folder = make_data(tmp_path / "shards")
    tokens = np.tile(make_text(64, 0)[:64], 400)  # two documents a slot, four slots a step
    tokens[3 * 128 + 70] = VOCAB
    write_shard(folder / "train_000000.bin", tokens)
    processes = start_ranks(2, main_of, small_flags(folder, out_dir=tmp_path / "logs"))
    processes[1].join(30)
    said = "".join(process.output.read_text() for process in processes)
    assert said.count("outside the vocabulary") == 1 and processes[1].exitcode == 2


def test_what_all_ranks_find_wrong_is_said_once(start_ranks, data, tmp_path):
    processes = start_ranks(3, main_of, small_flags(data, out_dir=tmp_path / "logs", val_tokens=1_000_000))
    assert join(processes) == [2, 2, 2]
    said = "".join(process.output.read_text() for process in processes)
    assert len(re.findall(r"^train_gpt\.py: .*val_tokens=1000000", said, re.M)) == 1
    assert not (tmp_path / "logs").exists()


def test_an_output_folder_that_the_first_rank_cannot_make_ends_all_without_a_traceback(start_ranks, data, tmp_path):
    (tmp_path / "file").write_text("")
    processes = start_ranks(2, main_of, small_flags(data, out_dir=tmp_path / "file" / "logs"))
    codes, said = join(processes), "".join(process.output.read_text() for process in processes)
    assert codes == [2, 2] and said.count("--out_dir") == 1 and "Traceback" not in said, said


def test_a_loss_that_is_not_a_number_is_said_once(start_ranks, data, tmp_path):
    processes = start_ranks(2, main_of, small_flags(data, out_dir=tmp_path / "logs", lr=1e30))
    codes, said = join(processes), "".join(process.output.read_text() for process in processes)
    assert codes == [3, 3] and len(re.findall("is nan", said)) == 1, said


def test_under_torchrun(data, tmp_path):
    logs = tmp_path / "logs"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               ROOT / "train_gpt.py", *small_flags(data, out_dir=logs, stop_after=3)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^step:3/20 val_loss:", done.stdout, re.M)
    info = json.loads((only_folder(logs) / "run.json").read_text())
    assert info["status"] == "finished" and info["world_size"] == 2
