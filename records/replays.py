"""Runs a record again on this machine, with its own script and flags, and compares loss and time with the record's.

This is a module of records.py, not a command: python records/records.py replay --help explains it.
"""
import contextlib
import glob
import importlib.metadata
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from checks import base_names
from launcher import Job, launch
from runs import LOSS_STEP, TIME_STEP, Record, Run, UserError, read_record, read_run, seconds_text, sha256
from student import describe, interval


def replay(args, flags: list[str]) -> int:
    """Runs a record's own script with its own flags here, and says how loss and time compare."""
    if args.n < 1 or args.ranks < 0:
        raise UserError(f"--n={args.n} --ranks={args.ranks}: at least 1 run, and no number of ranks below 0")
    if not (args.record / "runs.json").is_file():
        raise UserError(f"{args.record} is no record that can be replayed; name a folder below records/track_0_cpu or "
                        "another track with a runs.json")
    record = read_record(args.record)
    arm = shortened_arm(record, args.num_iterations) if args.num_iterations else record.main
    runs, script = record.of_arm(arm), record.script(arm)
    if not runs:
        raise UserError(f"{args.record} has no counted run of {arm} to compare with")
    if problem := runs[0].source_problem(script):
        raise UserError(f"{script} is not what the runs logged: {problem[0]}, they ran {problem[1]}; take the record's "
                        "folder from the repository again")
    replaced = {flag.partition("=")[0] for flag in flags}
    plan = [flag for flag in record.ledger["arms"][arm]["flags"] if flag.partition("=")[0] not in replaced] + flags
    ranks = args.ranks or runs[0].info["world_size"]
    first = max(entry["seed"] for entry in record.ledger["runs"]) + 1 if args.seed < 0 else args.seed
    base = args.out or Path("logs") / f"replay_{args.record.resolve().name}_{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    for line in environment(record, runs[0].info, plan):
        print(f"differs: {line}")
    print(f"replay of {args.record}: {arm}, {ranks} rank(s), {' '.join(plan)}", flush=True)
    seeds = range(first, first + args.n)     # seeds of their own: more draws from the same distribution
    jobs = (Job(script, [*plan, f"--seed={seed}"], base / f"seed{seed}", seed=seed) for seed in seeds)
    done = finished_runs(jobs, script, ranks)
    print("\n".join(replay_report(runs, done)) + f"\nlogs are in {base}")
    return 0


def finished_runs(jobs: Iterator[Job], script: Path, ranks: int) -> list[Run]:
    """The runs of the jobs, one after the other; raises UserError at the first that does not finish."""
    done = []
    with contextlib.closing(launch(announced(jobs), [{}], ranks)) as started:
        for job, outcome in started:
            if not outcome.folder or outcome.code:
                raise UserError(f"{script.name} failed with exit code {outcome.code}: {outcome.last[:300]}; its whole "
                                f"output is in {job.out_dir / 'output.txt'}")
            done.append(read_run(outcome.folder))
            print(f"seed {job.seed}: loss {done[-1].loss:.6f} in {seconds_text(done[-1].seconds)} s", flush=True)
    return done


def announced(jobs: Iterator[Job]) -> Iterator[Job]:
    """The jobs; says of each that it begins."""
    for job in jobs:
        print(f"seed {job.seed} begins", flush=True)
        yield job


def shortened_arm(record: Record, num_iterations: int) -> str:
    """The arm of a record with that many iterations; raises UserError that names the lengths there are."""
    lengths = {run.arm: run.info["config"].get("num_iterations") for run in record.runs if run.counted}
    for arm, length in lengths.items():
        if length == num_iterations:
            return arm
    raise UserError(f"--num_iterations={num_iterations}: {record.folder} has reference runs of "
                    f"{', '.join(map(str, sorted(set(lengths.values()))))} iterations only")


def environment(record: Record, there: dict, plan: list[str]) -> list[str]:
    """What differs here from a run's machine, a line each; raises UserError if the shards do."""
    here = {"python": sys.version.split()[0]}
    for package in ("torch", "numpy"):
        try:
            here[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"{package} is not installed; pip install -r requirements.txt") from None
    lines = [f"{name} {there['versions'].get(name)} there, {version} here" for name, version in here.items()
             if str(there["versions"].get(name)).split("+")[0] != version.split("+")[0]]
    for flag, side, said in (("train_files", "train_data", {}), ("val_files", "val_data", there.get("data_sha256"))):
        pattern = next((word.partition("=")[2] for word in reversed(plan) if word.startswith(f"--{flag}=")),
                       str(there["config"].get(flag, "")))
        pinned = {name: shard["sha256"] for name, shard in record.track.get(side, {}).items() if shard["sha256"]}
        pinned |= base_names(said)
        paths = matching_files(pattern) if pinned or side == "val_data" else []
        if pattern and pinned and not paths:
            remedy = (record.track.get("commands") or ["see records/README.md"])[0]
            raise UserError(f"--{flag}={pattern} matches no file; make the text of this track: {remedy}")
        for path in paths:
            if (digest := sha256(path)) != pinned.get(path.name, digest):
                raise UserError(f"{path} has sha256 {digest[:12]}, the record's {path.name} {pinned[path.name][:12]}: "
                                "losses on different texts cannot be compared")
            lines += [f"the record names no sha256 for {path.name}"] * (path.name not in pinned)
    return lines


def matching_files(pattern: str) -> list[Path]:
    """The files that a glob names; a file that exists names itself, whatever brackets its name has."""
    pattern = os.path.expanduser(pattern)
    found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))
    return [Path(path) for path in found]


def replay_report(runs: list[Run], done: list[Run]) -> list[str]:
    """Lines on the machine, and on whether loss and time lie where the record's runs predict one; then a verdict."""
    here, there = done[0].info, runs[0].info
    data = [base_names(info["data"]) for info in (there, here)]
    values = [("device", there["device"], here["device"]), ("ranks", there["world_size"], here["world_size"])]
    values += [(f"tokens in {name}", data[0].get(name), tokens) for name, tokens in data[1].items()]
    lines = [f"differs: {name}: {was} there, {now} here" for name, was, now in values if was != now]
    lines = lines or ["device, ranks and data are those of the record"]
    if len(runs) < 2:
        return lines + ["the record has one run, so it predicts no interval for another one, and this replay has no "
                        "verdict"]
    places = {}
    for what, get, unit, step in (("loss", lambda run: run.loss, "", LOSS_STEP),
                                  ("training time", lambda run: run.seconds, " s", TIME_STEP)):
        low, high = interval([get(run) for run in runs], 0.95, new=True, floor=step / math.sqrt(12))
        mean = describe(get(run) for run in runs)[1]
        places[what] = []
        for run in done:
            value = get(run)
            place = "lies in" if low <= value <= high else "is below" if value < low else "is above"
            places[what].append(place)
            lines.append(f"{what} {value:.4f}{unit} {place} {low:.4f} to {high:.4f}{unit}, the interval that the "
                         f"record's {len(runs)} runs predict for 95 % of further runs (their mean: {mean:.4f}, this "
                         f"run: {100 * (value / mean - 1):+.2f} %)")
    return lines + [replay_verdict(places["loss"], places["training time"])]


def replay_verdict(losses: list[str], times: list[str]) -> str:
    """A sentence: does the record hold as to loss, and what do the times say? Each list has the place of each run."""
    outside = [place for place in losses if place != "lies in"]
    if not outside:
        verdict = "the record is replicated as to loss"
    else:
        side = " and ".join(sorted({place.removeprefix("is ") for place in outside}))
        verdict = (f"the record is not replicated as to loss, which is {side} the interval in {len(outside)} of "
                   f"{len(losses)} runs, as by chance in one of 20")
    if "is above" in times:
        return f"{verdict}; a longer training time counts only on a machine like the record's that does nothing else"
    if "is below" in times:
        return f"{verdict}; a shorter training time, as on another machine, does not speak against the record"
    return f"{verdict}; the training time is as predicted"


if __name__ == "__main__":
    print(__doc__.strip())
