"""One run shared between ranks: 1, 2, 3 and 8 processes on a CPU read the same tokens and train the same model.

Against: the run with one rank. Most tables and banks of the small model have a number of rows that 2 and 3 do not
divide, so the padding of shares is part of it. Run: python -m pytest tests/test_ranks.py
"""
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import (ROOT, SMALL_STAGES, VOCAB, join, main_of, make_data, make_text, only_folder, rank_starter,
                      small_flags, write_shard)

import train_gpt

WORLDS = (1, 2, 3)
MANY = 8                        # in runs of their own, of few steps, whose batches have enough packs


def recorded_main(argv, out):
    """main() of one rank; leaves its batches, the first step's summed gradients and its last parameters in a file."""
    batches, record, step = [], {}, train_gpt.Optimizer.step
    original = train_gpt.training_batches

    def recorded_batches(*args):
        for batch in original(*args):
            batches.append([tuple(map(torch.from_numpy, part)) for part in batch[0]])     # NumPy's arrays are pickles
            yield batch

    def recorded_step(self, number, *rest):
        if number == 0:
            record["gradients"] = {name: param.grad.clone() for name, param in self.params.items()}
            for gradient in record["gradients"].values() if self.world_size > 1 else ():
                torch.distributed.all_reduce(gradient)
        step(self, number, *rest)
        record["parameters"] = {name: param.detach().clone() for name, param in self.params.items()}
    train_gpt.training_batches, train_gpt.Optimizer.step = recorded_batches, recorded_step
    code = main_of(argv)
    torch.save(record | {"batches": batches}, f"{out}_{os.environ['RANK']}.pt")
    return code


def start_run(start, folder, world_size, flags):
    """(records of the ranks, run.json, what the ranks printed, training losses) of a run that succeeds."""
    out = str(folder / "record")
    processes = start(world_size, recorded_main, flags + [f"--out_dir={folder / 'logs'}"], out)
    assert join(processes) == [0] * world_size, [process.output.read_text() for process in processes]
    records = [torch.load(f"{out}_{rank}.pt", weights_only=True) for rank in range(world_size)]
    run = only_folder(folder / "logs")
    losses = re.findall(r"^step:(\d+)/20 train_loss:(\S+)", (run / "log.txt").read_text(), re.M)
    return (records, json.loads((run / "run.json").read_text()), [process.output.read_text() for process in processes],
            {int(step): float(loss) for step, loss in losses})


@pytest.fixture(scope="module")
def runs(data, forkserver, tmp_path_factory):
    """world size -> what start_run returns of the run with so many ranks."""
    with rank_starter(forkserver, tmp_path_factory.mktemp("output")) as start:
        return {world_size: start_run(start, tmp_path_factory.mktemp("ranks"), world_size, small_flags(data))
                for world_size in WORLDS}


@pytest.fixture(scope="module")
def runs_of_many(data, forkserver, tmp_path_factory):
    """The same of 1 and 8 ranks, for three steps of 8 packs or more."""
    flags = small_flags(data, pack_tokens=128, stop_after=3, stages=[[0.1, 1024, *SMALL_STAGES[0][2:]],
                                                                     [1.0, 2304, *SMALL_STAGES[1][2:]]])
    with rank_starter(forkserver, tmp_path_factory.mktemp("output")) as start:
        return {world_size: start_run(start, tmp_path_factory.mktemp("ranks"), world_size, flags)
                for world_size in (1, MANY)}


@pytest.fixture(params=[*WORLDS[1:], MANY])
def pair(request):
    """(what start_run returns of one rank, of several, steps)."""
    many = request.param == MANY
    runs = request.getfixturevalue("runs_of_many" if many else "runs")
    return runs[1], runs[request.param], 3 if many else 20


def packs(batches):
    """The packs of some micro-batches that have a target, as lists."""
    cut = [(inputs[i:i + 128].tolist(), targets[i:i + 128].tolist())
           for inputs, targets in batches for i in range(0, len(inputs), 128)]
    return [pack for pack in cut if max(pack[1]) >= 0]


def test_the_ranks_read_the_tokens_of_one_rank(pair):
    ((one,), *_), (records, *_), steps = pair
    assert len(one["batches"]) >= steps
    for step, whole in enumerate(one["batches"][:steps]):
        shares = [packs(record["batches"][step]) for record in records]
        assert all(shares) and sum(shares, []) == packs(whole)


def test_the_gradients_of_the_first_step_are_those_of_one_rank(pair):
    ((one,), *_), (records, *_), _ = pair
    for record in records:
        assert record["gradients"].keys() == one["gradients"].keys()
        for name, gradient in one["gradients"].items():
            difference = (record["gradients"][name] - gradient).norm()
            assert difference <= 1e-4 * gradient.norm(), name
    assert sum(gradient.norm() > 0 for gradient in one["gradients"].values()) > 10


def test_the_losses_are_those_of_one_rank(pair):
    (_, one, _, one_losses), (records, several, _, several_losses), steps = pair
    assert several["world_size"] == len(records) and several["tokens_seen"] == one["tokens_seen"]
    assert several_losses.keys() == one_losses.keys() == set(range(1, steps + 1))
    for step, loss in one_losses.items():
        assert abs(several_losses[step] - loss) < (2e-4 if step == 1 else 2e-3)     # the log has four digits
    losses = [[(point["step"], point["val_loss"]) for point in info["val_losses"]] for info in (one, several)]
    assert [step for step, _ in losses[0]] == ([0, 10, 20] if steps == 20 else [0, 3])
    assert steps == 3 or losses[0][-1][1] < losses[0][0][1] - 1     # they have moved
    for (step, mine), (same, theirs) in zip(*losses, strict=True):
        assert step == same and abs(mine - theirs) < (1e-5 if step == 0 else 1e-3)


@pytest.mark.parametrize("world_size", WORLDS[1:])
def test_all_ranks_end_with_the_same_parameters(runs, world_size):
    (one,), records = runs[1][0], runs[world_size][0]
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


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_ranks_read_the_tokens_of_one_rank_again_in_each_epoch(tmp_path, small_config, epochs):
    """Nine packs a step, so that the shares of two ranks differ, and the text ends within a step."""
    folder = make_data(tmp_path / "shards", train_tokens=60_000 // epochs)
    stages = [[1.0, 1152, *SMALL_STAGES[0][2:]]]
    cfg = small_config(epochs=epochs, num_iterations=16, stages=stages)
    shards = train_gpt.open_shards(f"{folder}/train_*.bin", f"{folder}/val_*.bin")[0]
    whole, *shares = [list(train_gpt.training_batches(cfg, shards, rank, world_size, 2))
                      for world_size in (1, 2) for rank in range(world_size)]
    assert len(whole) == 16
    for (batches, position), (first, first_position), (second, second_position) in zip(whole, *shares, strict=True):
        assert packs(batches) == packs(first) + packs(second)
        assert len(first) == len(second) and position == first_position == second_position
    assert (whole[-1][1].shard >= len(shards)) == (epochs == 2)     # it has come to the second epoch


def signalled_main(argv):
    """main() of ranks, the second of which gets SIGTERM before its step 4."""
    step = train_gpt.training_step

    def disturbed(backward, optimizer, batches, index, *rest):
        if index == 4 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return step(backward, optimizer, batches, index, *rest)
    train_gpt.training_step = disturbed
    return main_of(argv)


def test_a_signal_to_one_rank_ends_all_together(start_ranks, data, tmp_path):
    """Its vote goes out with step 5 or 6, and the run ends at the next even step at which all know of it."""
    logs = tmp_path / "logs"
    processes = start_ranks(2, signalled_main, small_flags(data, out_dir=logs, val_every=0))
    assert join(processes) == [130, 130], [process.output.read_text() for process in processes]
    folder = only_folder(logs)
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert (folder / "checkpoint" / "latest").read_text() in ("step_000006", "step_000008")


def test_what_one_rank_finds_wrong_is_said_once(start_ranks, tmp_path):
    """A token outside the vocabulary in the last pack of the first step, which is not the first rank's."""
    folder = make_data(tmp_path / "shards")
    tokens = np.tile(make_text(64, 0)[:64], 400)  # two documents a pack, four packs a step
    tokens[3 * 128 + 70] = VOCAB
    write_shard(folder / "train_000000.bin", tokens)
    processes = start_ranks(2, main_of, small_flags(folder, out_dir=tmp_path / "logs"))
    processes[1].join(30)
    said = "".join(process.output.read_text() for process in processes)
    assert said.count("but the last one is") == 1 and processes[1].exitcode == 2


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
