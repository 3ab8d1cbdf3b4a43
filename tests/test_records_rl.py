"""Folders of reinforcement curves: the tables say what the logs say, and `check` names each lie.

Against: made-up runs whose scores are known; sums worked out by hand.
Run: python -m pytest tests/test_records_rl.py
"""
import importlib
import json
import re
import shutil
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "records"))
reinforcement, runs = map(importlib.import_module, ("reinforcement", "runs"))


def write_run(folder, rights, lr=0.05, seed=0, steps=4, **identity):
    """A run folder of chat_rl.py. rights: of each measurement, the right answers of 8 to each question."""
    folder.mkdir(parents=True)
    points, lines = [], [f"chat_rl.py: 1 x card, from /home/somebody/logs/parent/checkpoint/step_{steps}"]
    for i, row in enumerate(rights):
        step = steps * i // (len(rights) - 1)
        mean = sum(row) / 8 / len(row)
        scores = {"pass1": round(mean, 6), "pass1_se": 0.1, "pass8": 1.0, "pass8_se": 0.0, "greedy": 0.5,
                  "greedy_se": 0.1, "length": 40.5, "tool_calls": 1.0, "cut_off": 0.0}
        points.append({"step": step, "train_time_ms": 10 * step} | scores | {"rights": " ".join(map(str, row))})
        lines.append(f"step:{step}/{steps} " + " ".join(f"{name}:{value:.4f}" for name, value in scores.items())
                     + " train_time:1ms step_avg:1.00ms")
    lines += [f"step:{n}/{steps} reward:0.{n}000 se:0.0100 no_signal:0.500 length:40.0 tool_calls:1.000 cut_off:0.000 "
              f"loss:0.1 sampling_ms:{100 * n} training_ms:50 sampled_per_s:1000 trained_per_s:2000 train_time:1ms "
              "step_avg:1.00ms" for n in range(1, steps + 1)]
    flags = {"task": "spellingbee", "letters": "13-16", "steps": steps, "questions": 64, "samples": 8, "lr": lr,
             "std": False, "kl": 0.0, "seed": seed, "data": {}, "parent": "ab" * 32, "sources": {}} | identity
    info = {"script": "chat_rl.py", "status": "finished", "device": "card", "world_size": 1, "started": "2026-01-01",
            "argv": ["--checkpoint=/home/somebody/logs/parent"], "identity": flags, "evaluations": points}
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "log.txt").write_text("\n".join(lines) + "\n")
    (folder / "samples.jsonl").write_text('{"answer": "see /usr/share/dict"}\n')
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder of two arms, of two seeds each, and one run that had the card alone; without open questions."""
    tmp_path = tmp_path_factory.mktemp("curves")
    made = [write_run(tmp_path / "logs" / f"{lr}_{seed}", [[0, 4, 4, 8], after], lr, seed)
            for lr, seed, after in ((0.05, 0, [8, 8, 8, 8]), (0.05, 1, [8, 8, 8, 4]), (0.2, 0, [0, 4, 4, 8]),
                                    (0.2, 1, [0, 3, 5, 8]))]
    alone = write_run(tmp_path / "logs" / "alone", [[1], [1]], steps=3, seed=7)
    found = reinforcement.new_folder(tmp_path / "records", "Curve", made, [alone], "2026-01-02")
    page = found / "README.md"
    page.write_text(re.sub("FILL IN[^\n]*", "done", page.read_text()))
    return found


@pytest.fixture
def folder(sound, tmp_path):
    """A copy of it."""
    return shutil.copytree(sound, tmp_path / "records" / "track_rl" / sound.name)


def test_tables_are_those_of_the_logs(folder):
    text = (folder / "README.md").read_text()
    # by hand: gains 0.5 and 0.375; their spread 0.0884 / sqrt(2); questions gain 1, .5, .5, -.25, their error 0.2577
    assert "`--lr=0.05`: no change that could be shown; pass@1 changed by +0.4375, standard error 0.2577, n = 2" in text
    assert "`--lr=0.2`: no change that could be shown; pass@1 changed by +0.0000, standard error" in text
    assert "| `--lr=0.05` | 2 | 4 | 0.5000 | 0.9375 | +0.4375 (0.2577) | 0.5000 | 0.5000 | 1.0000 | 1.0000 |" in text
    assert "| 512 | 40.0 | 0.30 | 0.25 | 0.05 | 1,000 | 2,000 | 0.500 |" in text    # medians of the last two steps
    assert "from the model with sha256 abababababab." in text and (folder / "curve.svg").stat().st_size > 1000
    assert reinforcement.check_folder(folder) == []
    board = "\n".join(reinforcement.board_parts(folder.parents[1]))
    assert "[Curve: done](track_rl/2026-01-02_Curve/)" in board and "| `--lr=0.2` | 2 | 4 |" in board
    assert reinforcement.board_parts(folder / "empty") == []


def test_paths_of_the_machine_are_not_kept(folder):
    kept = "".join(path.read_text() for path in folder.rglob("*") if path.suffix in (".json", ".txt"))
    assert "somebody" not in kept and "--checkpoint=parent" in kept and "from step_4" in kept and "step:1/4" in kept


@pytest.mark.parametrize("name, old, new, words", [
    ("README.md", "+0.4375", "+0.5375", "the part 'result' is not what the logs say"),
    ("README.md", "done", "it gained 0.5123", "0.5123 outside"),
    ("README.md", "done", "FILL IN more", "still asks"),
    ("lr_0.05_seed1/log.txt", "reward:0.1000", "reward:0.9000", "is not the file that was added"),
    ("lr_0.05_seed1/run.json", "finished", "finishe", "is not the file that was added"),
    ("curves.json", "lr_0.05_seed1", "../lr", "not a run beside it")])
def test_a_lie_is_named(folder, name, old, new, words):
    path = folder / name
    path.write_text(path.read_text().replace(old, new, 1))
    problem, = reinforcement.check_folder(folder)
    assert words in problem


def test_runs_that_do_not_belong_are_refused(tmp_path):
    def refused(words, *folders):
        with pytest.raises(runs.UserError, match=words):
            reinforcement.new_folder(tmp_path / "records", "Curve", list(folders), [], "2026-01-02")
        assert not any((tmp_path / "records").rglob("README.md"))
    one = write_run(tmp_path / "one", [[1], [2]])
    refused("several tasks", one, write_run(tmp_path / "two", [[1], [2]], task="gsm8k"))
    refused("the same flags and the same seed", one, write_run(tmp_path / "three", [[1], [2]]))
    for number, (name, old, new, words) in enumerate((
            ("log.txt", "pass1:0.2500", "pass1:0.3500", "other scores than log.txt"),
            ("log.txt", "step:3/4 reward", "step:9/4 reward", "has 4 steps"),
            ("run.json", '"rights": "2"', '"rights": "3"', "give another pass1"),
            ("run.json", '"finished"', '"interrupted"', "not a finished run"))):
        path = write_run(tmp_path / str(number), [[1], [2]]) / name
        path.write_text(path.read_text().replace(old, new))
        refused(words, path.parent)
