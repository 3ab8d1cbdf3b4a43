"""Starts training scripts, several at a time if asked, and says how each run ended.

This is a module of records.py, not a command: compare and replay start their runs with it.
"""
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runs import MAX_JSON, MAX_LOG, read_text, sha256

PATIENCE = 60                            # seconds that a script has to save what it has and end


@dataclass(frozen=True)
class Job:
    """A run to start."""
    script: Path
    flags: list[str]
    out_dir: Path                        # is emptied first
    arm: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""
    code: int                            # exit code
    folder: Path | None                  # its run folder, if it made one
    last: str                            # the last line that it printed
    stopped: bool                        # by the limit of time


# -----------------------------------------------------------------------------
# Processes

def child_environment() -> dict:
    """For scripts in the archive: Python leaves no cache beside them."""
    return os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, or else the numbers of all NVIDIA GPUs here."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        try:
            listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, encoding="utf-8", errors="replace",
                                    timeout=60).stdout
        except (OSError, subprocess.TimeoutExpired):
            return []
        return [str(i) for i in range(listed.count("GPU "))]
    return [name for name in given.split(",") if name]


def make_slots(count: int, ranks: int, own_gpus: bool) -> list[dict]:
    """The environment of each of `count` runs at a time: a share of the cores, and GPUs of its own if there are any."""
    if count == 1 and not own_gpus:
        return [{}]
    gpus, slots = visible_gpus(), []
    for i in range(count):
        slot = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count // ranks))} if count > 1 else {}
        if gpus:
            slot["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[i * ranks:(i + 1) * ranks])
        slots.append(slot)
    return slots


class Running:
    """A training script that runs."""

    def __init__(self, job: Job, slot: dict, ranks: int, limit: float):
        self.job, self.slot, self.stopped = job, slot, False
        self.deadline = time.monotonic() + limit if limit else float("inf")
        shutil.rmtree(job.out_dir, ignore_errors=True)
        job.out_dir.mkdir(parents=True)
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        command = [sys.executable, *torchrun, str(job.script), *job.flags, f"--out_dir={job.out_dir}"]
        with open(job.out_dir / "output.txt", "wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT,
                                            env=child_environment() | slot)

    def ended(self) -> bool:
        """Whether the script has ended; ends it if its time is over."""
        if self.process.poll() is not None:
            return True
        if time.monotonic() < self.deadline:
            return False
        self.stopped = True
        self.process.terminate()
        self.wait_or_kill()
        return True

    def wait_or_kill(self):
        """Waits for a script that was told to end."""
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def outcome(self) -> Outcome:
        """How the ended script ended."""
        printed = (self.job.out_dir / "output.txt").read_bytes()[-4000:].decode(errors="replace").strip().splitlines()
        folder = next((path.parent for path in self.job.out_dir.glob("*/run.json")), None)
        return Outcome(self.process.poll(), folder, (printed or [""])[-1], self.stopped)


def launch(jobs: Iterator[Job], slots: list[dict], ranks: int = 1, limit: float = 0) -> Iterator[tuple[Job, Outcome]]:
    """Runs the jobs in their order, as many at a time as there are slots; yields each with its outcome when it ends.

    The next job is asked for when a slot is free. limit: seconds after which a run is told to end; 0: none. Ctrl-C and
    SIGTERM end the scripts first, which save what they have, and then raise KeyboardInterrupt.
    """
    free, running = list(slots), []
    try:
        while True:
            while free and (job := next(jobs, None)):
                running.append(Running(job, free.pop(0), ranks, limit))
            if not running:
                return
            ended = [one for one in running if one.ended()]
            for one in ended:
                running.remove(one)
                free.append(one.slot)
                yield one.job, one.outcome()
            if not ended:
                time.sleep(0.02)
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.wait_or_kill()


# -----------------------------------------------------------------------------
# What is kept of a run

def keep_run(source: Path, target: Path):
    """Copies what the archive keeps of a run folder: run.json and, unless the run failed before it, log.txt."""
    texts = {"run.json": read_text(source / "run.json", MAX_JSON)}
    if os.path.lexists(source / "log.txt"):
        texts["log.txt"] = read_text(source / "log.txt", MAX_LOG)
    target.mkdir()
    for name, text in texts.items():
        (target / name).write_bytes(text.encode())


def log_hashes(folder: Path) -> dict[str, str]:
    """sha256 of each file that the archive keeps of a run."""
    return {name: sha256(folder / name) for name in ("run.json", "log.txt") if os.path.lexists(folder / name)}


if __name__ == "__main__":
    print(__doc__.strip())
