"""Tests ideas on a ladder of small models: many runs at once, scaling laws, and verdicts with error bars.

    python dev/ladder.py sweep --arm="my idea: --gate=head" --depths=4,6 --seeds=3 --out=logs/idea     # and the base
    python dev/ladder.py technique logs/idea/results.jsonl --page=logs/idea/LADDER.md       # does it help?
    python dev/ladder.py sweep dev/ladder_plan.toml --jobs=14 --out=logs/ladder             # the plan of LADDER.md
    python dev/ladder.py fit logs/ladder/results.jsonl --hold_out=6                         # scaling laws

sweep       runs arms x depths x seeds, several at the same time, and writes a line of results.jsonl for each run.
            The same command again runs what is missing. A run that failed or diverged is kept and counted.
fit         a parabola for each FLOP budget, the best size and number of tokens, power laws, a loss law, a picture.
technique   each arm against the arm `base`, seed by seed: the difference in loss at equal tokens, seconds and FLOPs.

docs/lab.md explains how to test an idea, and what a plan file holds.
"""
import argparse
import contextlib
import gc
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "records"), str(HERE)]
import ladder_tables  # noqa: E402
import sample  # noqa: E402
from launcher import visible_gpus  # noqa: E402
from runs import UserError  # noqa: E402

PLAN_KEYS = {"flags": str, "depths": list, "seeds": int, "timing_steps": int, "arms": list}
ARM_KEYS = {"name": str, "flags": str, "group": str, "depths": list, "seeds": int, "budgets": list, "grid": dict,
            "by_depth": dict, "edits": list, "round": int, "round_step": int, "timing": bool}
# flags that the compiled model does not depend on: runs that differ in these alone share a compilation
SAME_GRAPH = set("seed num_iterations ratio epochs train_files schedule cooldown lr_floor optimizer muon_lr adamw_lr "
                 "embed_lr head_lr weight_decay decay_rule val_every val_tokens".split())
NEEDS = ("GPT", "UserError", "main", "open_shards", "parse_config", "resolve_config", "setup_machine",
         "validation_streams")

# -----------------------------------------------------------------------------
# The plan

@dataclass(frozen=True)
class Job:
    """A run to make."""
    arm: str
    group: str                   # technique, isoflop, length, transfer or timing: what the run is for
    flags: dict[str, str]        # of the training script, depth and seed among them
    budget: float = 0.0          # training FLOPs, which set the number of steps; 0: the flags do
    edits: tuple = ()            # (old text, new text) of the training script
    round: int = 0               # runs of a low round come first
    alone: bool = False          # nothing else may run at the same time, because its speed matters

    @property
    def seed(self) -> int:
        return int(self.flags["seed"])

    def argv(self) -> list[str]:
        return [f"--{name}={value}" for name, value in self.flags.items()]

    def key(self, script_sha256: str) -> str:
        """Tells runs apart, over several calls of sweep."""
        return hashlib.sha256(json.dumps([script_sha256, self.arm, self.group, self.flags, self.budget]).encode()
                              ).hexdigest()[:16]

    def graph(self) -> tuple:
        """What the compiled model depends on."""
        flags = sorted((name, value) for name, value in self.flags.items() if name not in SAME_GRAPH)
        return *flags, self.edits

    def label(self) -> str:
        return f"{self.group}: {self.arm}, depth {self.flags['depth']}, seed {self.seed}" + (
            f", {self.budget:.3g} FLOPs" if self.budget else "")


def read_flags(text: str, where: str) -> dict[str, str]:
    """`--a=1 --b=2` as a dictionary; raises UserError. A value may hold blanks, but no ` --`."""
    flags = {}
    for word in (part for part in re.split(r"\s+(?=--)", text.strip()) if part):
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not equals or not name.isidentifier():
            raise UserError(f"{where} has the flag {word!r}; write --field=value")
        if name in ("depth", "seed", "out_dir"):
            raise UserError(f"{where} sets --{name}, which sweep sets itself; use --depths, --seeds or --out")
        flags[name] = value
    return flags


def check_keys(table, known: dict, where: str):
    """Raises UserError unless the table has known keys with values of their types."""
    if not isinstance(table, dict):
        raise UserError(f"{where} is not a table; see docs/lab.md")
    for name, value in table.items():
        if name not in known:
            raise UserError(f"{where} has the key {name!r}; choose from {', '.join(known)}")
        if type(value) is not known[name]:
            raise UserError(f"{where} has {name} = {value!r}; give a {known[name].__name__}")
    numbers = [*table.get("depths", []), *table.get("budgets", []), *([table["seeds"]] if "seeds" in table else [])]
    if not all(type(number) in (int, float) and 0 < number < math.inf for number in numbers):
        raise UserError(f"{where} has the numbers {numbers}; depths, seeds and budgets are positive")
    if table.get("timing_steps", 0) < 0:
        raise UserError(f"{where} has timing_steps = {table['timing_steps']}; give a number of steps, or 0 for no timing")


def read_plan(path: Path) -> dict:
    """The plan in a TOML file, checked; raises UserError."""
    try:
        plan = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a plan ({error}); docs/lab.md shows one") from None
    check_keys(plan, PLAN_KEYS, str(path))
    for number, arm in enumerate(plan.get("arms", []), 1):
        check_keys(arm, ARM_KEYS, f"{path}, arm {number}")
        if not all(isinstance(edit, list) and list(map(type, edit)) == [str, str] for edit in arm.get("edits", [])):
            raise UserError(f"{path}, arm {number} has edits that are not pairs [old text, new text]; write them so")
        if "name" not in arm:
            raise UserError(f"{path}, arm {number} has no name; give it one")
    return plan


def quick_plan(texts: list[str]) -> dict:
    """The plan of --arm="NAME: --flag=value": these arms and `base`, which has no flags of its own."""
    arms = [{"name": "base"}]
    for text in texts:
        name, colon, flags = text.partition(":")
        if not colon or not name.strip():
            raise UserError(f"--arm={text!r} has no name; write --arm=\"NAME: --flag=value\"")
        arms.append({"name": name.strip(), "flags": flags})
    return {"arms": arms}


def flags_by_depth(arm: dict, listed: list[int], depth: int) -> dict[str, str]:
    """The flags that `by_depth` of an arm sets at a depth; `listed` are the depths of its plan. Raises UserError."""
    table = arm.get("by_depth", {})
    for name, values in table.items():
        if not isinstance(values, list) or len(values) != len(listed):
            raise UserError(f"arm {arm['name']!r} has by_depth {name} = {values}; give a list with one value for each "
                            f"of the depths {listed}")
    if table and depth not in listed:
        raise UserError(f"arm {arm['name']!r} has by_depth for the depths {listed}, but not for {depth}; choose from "
                        "those with --depths")
    return {name: str(values[listed.index(depth)]) for name, values in table.items()}


def plan_jobs(plan: dict, flags: dict, depths: list[int], seeds: int) -> list[Job]:
    """All runs of a plan, rounds (seeds) outermost, so that a sweep that is cut short has something of everything."""
    jobs, alone, common = [], [], read_flags(plan.get("flags", ""), "flags of the plan") | flags
    for arm in plan.get("arms", []):
        own, group = read_flags(arm.get("flags", ""), f"arm {arm['name']!r}"), arm.get("group", "technique")
        grid, edits = arm.get("grid", {}), tuple(map(tuple, arm.get("edits", [])))
        if not all(isinstance(values, list) and values for values in grid.values()):
            raise UserError(f"arm {arm['name']!r} has the grid {grid}; give a list of values for each field")
        cells = [dict(zip(grid, map(str, cell))) for cell in itertools.product(*grid.values())]
        listed = arm.get("depths", plan.get("depths", [4]))
        for cell, budget, depth, seed in itertools.product(
                cells, arm.get("budgets", [0.0]), depths or listed,
                range(seeds or arm.get("seeds", plan.get("seeds", 3)))):
            sizes = flags_by_depth(arm, listed, depth)
            values = common | own | sizes | cell | {"depth": str(depth), "seed": str(seed)}
            round_ = arm.get("round", 0) + seed * arm.get("round_step", 1)
            jobs.append(Job(arm["name"], group, values, float(budget), edits, round_))
            if plan.get("timing_steps") and group == "technique" and seed == 0 and arm.get("timing", True):
                short = {"num_iterations": str(plan["timing_steps"]), "val_every": "0"}
                alone.append(Job(arm["name"], "timing", values | short, edits=edits, alone=True))
    if not jobs:
        raise UserError("the plan has no arms; name a plan file or give --arm=\"NAME: --flag=value\"")
    if len({(job.key(""), job.edits) for job in jobs}) < len(jobs):
        raise UserError("two arms of a group have the same name and flags; remove one or rename it")
    return sorted(jobs, key=lambda job: job.round) + alone


# -----------------------------------------------------------------------------
# A worker: one process that makes many runs, so that imports and compiled code are paid for once

def mean_keys(streams: list, bos_id: int, window: int) -> float:
    """How many keys a token of these streams sees on average: those of its document within `window`, and itself."""
    total = count = 0
    for inputs, targets in streams:
        index = np.arange(len(inputs))
        position = index - np.maximum.accumulate(np.where(inputs == bos_id, index, 0))
        total += np.minimum(position, window)[targets >= 0].sum() + (targets >= 0).sum()
        count += (targets >= 0).sum()
    return float(total / count)


def describe(script, argv: list[str]) -> dict:
    """What a run will cost: `parameters` in products, `flops_per_token` of training, `batch_tokens`, `width`.

    FLOPs: 6 for each parameter that a token is multiplied with, and 12 x width x keys in each layer for attention.
    """
    cfg = script.parse_config([*argv, "--num_iterations=1"])
    shards = script.open_shards(cfg.train_files, cfg.val_files)
    cfg = script.resolve_config(cfg, script.setup_machine(cfg), shards[0])
    model = script.GPT(cfg)
    parameters = sum(param.numel() for name, param in model.named_parameters()
                     if param.ndim > 1 and name != "embed.weight")
    streams = script.validation_streams(cfg, shards[1])
    keys = {window: mean_keys(streams, cfg.bos_id, window) for window in {block.window for block in model.blocks}}
    attention = 12 * cfg.model_dim * sum(keys[block.window] for block in model.blocks)
    return {"parameters": parameters, "width": cfg.model_dim, "batch_tokens": cfg.batch_tokens,
            "flops_per_token": 6 * parameters + attention}


def train_one(script, argv: list[str], budget: float, out_dir: Path) -> tuple[int, dict]:
    """Makes one run by the script's own main(). Returns its exit code and what results.jsonl keeps of it."""
    errors, facts, code = io.StringIO(), {}, 1
    try:
        facts = describe(script, argv)
        flops = facts.pop("flops_per_token")
        if budget:
            argv = [*argv, f"--num_iterations={max(1, round(budget / flops / facts['batch_tokens']))}"]
        sys.argv = [script.__file__, *argv, f"--out_dir={out_dir}"]
        with contextlib.redirect_stderr(errors):
            code = script.main()
    except script.UserError as error:
        code = 2
        print(error, file=errors)
    except Exception as error:           # whatever a run does, the sweep goes on and counts it
        print(f"{type(error).__name__}: {error}", file=errors)
    info = next((json.loads(path.read_text(encoding="utf-8")) for path in out_dir.glob("*/run.json")), {})
    print(errors.getvalue(), file=sys.stderr, flush=True)
    why = (errors.getvalue().strip().splitlines() or [f"exit code {code}"])[-1][:300] if code else ""
    result = facts | {"status": info.get("status", "failed") if code in (0, 3) else "failed", "why": why}
    if code == 0:
        tokens = info["tokens_seen"]
        result |= {"loss": info["val_loss"], "tokens": tokens, "steps": info["step"], "flops": flops * tokens,
                   "seconds": info["train_time_ms"] / 1000, "compile_seconds": round(info["compile_seconds"], 2),
                   "curve": [[point["step"], round(point["val_loss"], 6)] for point in info["val_losses"]],
                   "device": info["device"], "torch": info["versions"]["torch"]}
    return code, result


def work(folder: Path, keep: bool):
    """Reads jobs from stdin, a line each, and writes results to stdout. Ends after a run that broke down."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                        # what the script prints goes to the worker's log
    import torch
    for name in ("recompile_limit", "accumulated_recompile_limit"):     # runs of many models in one process
        setattr(torch._dynamo.config, name, 10_000)
    for line in sys.stdin:
        job = json.loads(line)
        out_dir = Path(tempfile.mkdtemp(dir=folder))
        try:
            script = sample.import_script(job["script"], NEEDS)
            code, result = train_one(script, job["argv"], job["budget"], out_dir)
        except sample.UserError as error:
            code, result = 2, {"status": "failed", "why": str(error)}
        if not keep:
            shutil.rmtree(out_dir)
        sound = code in (0, 2, 3)        # else a new process goes on, with a sound device
        print(json.dumps([sound, result]), file=answers, flush=True)
        if not sound:
            return
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# -----------------------------------------------------------------------------
# The pool

class Queue:
    """Jobs that wait. Of a round, a worker gets first what it has compiled already, then what nobody has compiled."""

    def __init__(self, jobs: list[Job]):
        self.jobs, self.lock, self.owned, self.closed = list(jobs), threading.Lock(), {}, False

    def take(self, worker: int) -> Job | None:
        """The next job of a worker; None if there is none, or if the queue is closed."""
        with self.lock:
            if self.closed or not self.jobs:
                return None
            mine = self.owned.setdefault(worker, set())
            anyone = set().union(*self.owned.values())

            def rank(job):
                return job.round, 0 if job.graph() in mine else 1 if job.graph() not in anyone else 2
            job = min(self.jobs, key=rank)
            self.jobs.remove(job)
            mine.add(job.graph())
            return job

    def owner(self, job: Job, workers: list[int]) -> int:
        """A worker that has compiled a job's model, else the first."""
        return next((worker for worker in workers if job.graph() in self.owned.get(worker, ())), workers[0])


@dataclass
class Worker:
    """A process that runs `ladder.py work`, started when it is first needed, and again after it has ended."""
    number: int
    command: list[str]
    env: dict
    log: Path
    process: subprocess.Popen | None = None

    def run(self, job: Job, script: Path) -> dict | None:
        """The result of a job; None if the worker was killed. A worker that dies has failed the job."""
        if self.process is None or self.process.poll() is not None:
            with open(self.log, "ab") as log:
                self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                                                text=True, env=self.env, start_new_session=True)
        try:
            request = {"script": str(script), "argv": job.argv(), "budget": job.budget}
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        if line:
            sound, result = json.loads(line)
            if not sound:
                self.process.wait()
            return result
        code = self.process.wait()
        return None if code == -9 else {"status": "failed", "why": f"the worker ended with code {code}, see {self.log}"}

    def end(self):
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@dataclass
class Sweep:
    """A sweep that goes on: its folder, and what has ended."""
    out: Path
    scripts: dict[tuple, tuple[Path, str]]      # edits -> (training script, its sha256)
    workers: list[Worker]
    gpus: int                    # 0: other programs share the machine, so that no run is alone
    total: int
    done: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    failed: list[str] = field(default_factory=list)

    def record(self, job: Job, result: dict, alone: bool):
        """Adds a line to results.jsonl, and prints one."""
        digest = self.scripts[job.edits][1]
        line = {"key": job.key(digest), "arm": job.arm, "group": job.group, "depth": int(job.flags["depth"]),
                "seed": job.seed, "budget": job.budget, "flags": job.flags, "alone": alone,
                "script_sha256": digest, "edits": job.edits} | result
        with self.lock:
            with open(self.out / "results.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.done += 1
            text = f"{result['status']}, {result['why']}"
            if result["status"] == "finished":
                text = f"loss {result['loss']:.4f} in {result['seconds']:.1f} s"
            else:
                self.failed.append(f"{job.label()}: {text}")
            print(f"{self.done}/{self.total} {job.label()}: {text}", flush=True)

    def serve(self, worker: Worker, queue: Queue):
        """Lets a worker take jobs until there are none."""
        while job := queue.take(worker.number):
            result = worker.run(job, self.scripts[job.edits][0])
            if result is None:
                return
            self.record(job, result, alone=len(self.workers) <= self.gpus)

    def run(self, jobs: list[Job], stop_after: float):
        """Runs the jobs in parallel, and then one by one those whose speed is measured."""
        queue = Queue([job for job in jobs if not job.alone])
        threads = [threading.Thread(target=self.serve, args=(worker, queue), daemon=True) for worker in self.workers]
        deadline = time.monotonic() + stop_after if stop_after else math.inf
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                queue.closed = time.monotonic() > deadline
                time.sleep(0.05)
            for job in (job for job in jobs if job.alone):
                worker = self.workers[queue.owner(job, [worker.number for worker in self.workers])]
                if result := worker.run(job, self.scripts[job.edits][0]):
                    self.record(job, result, alone=self.gpus > 0)
        finally:
            queue.closed = True
            for worker in self.workers:
                worker.end()


def edited(script: Path, edits: tuple, out: Path) -> tuple[Path, str]:
    """The script after these edits and its sha256; raises UserError if an old text does not occur exactly once."""
    text = script.read_text(encoding="utf-8")
    for old, new in edits:
        if text.count(old) != 1:
            raise UserError(f"an edit needs a text that occurs exactly once, but {old[:80]!r} occurs {text.count(old)} "
                            f"times in {script}; change the edit")
        text = text.replace(old, new)
    digest = hashlib.sha256(text.encode()).hexdigest()
    path = out / "scripts" / digest[:16] / script.name if edits else script
    if edits:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return path, digest


def make_workers(jobs: int, gpus: list[str], out: Path, keep: bool) -> list[Worker]:
    """Workers that share the GPUs, the cores and one cache of compiled code."""
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(out / "compiled"), "TRITON_CACHE_DIR": str(out / "compiled" / "triton")}
    if jobs > 1:
        cache |= {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    workers = []
    for number in range(jobs):
        env = cache | dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {})
        command = [sys.executable, str(HERE / "ladder.py"), "work", str(out / "runs")] + ["--keep"] * keep
        workers.append(Worker(number, command, env, out / f"worker_{number}.txt"))
    return workers


def sweep(args, flags: list[str]) -> int:
    """Runs what is missing of a plan."""
    script = args.script.resolve()
    if not script.is_file():
        raise UserError(f"--script={args.script} does not exist; name a training script")
    if args.jobs < 1 or args.stop_after < 0 or args.seeds < 0 or not all(1 <= depth <= 64 for depth in args.depths):
        raise UserError(f"--jobs={args.jobs} --stop_after={args.stop_after:g} --seeds={args.seeds} --depths="
                        f"{args.depths}: at least 1 job, nothing below 0, depths from 1 to 64")
    if bool(args.plan) == bool(args.arm):
        raise UserError("sweep needs either a plan file or --arm=\"NAME: --flag=value\"; give one of them")
    plan = read_plan(args.plan) if args.plan else quick_plan(args.arm)
    jobs = plan_jobs(plan, read_flags(" ".join(flags), "the command line"), args.depths, args.seeds)
    if args.groups:
        wanted = args.groups.split(",")
        if unknown := set(wanted) - {job.group for job in jobs}:
            raise UserError(f"--groups={args.groups}: the plan has no group {', '.join(sorted(unknown))}; it has "
                            f"{', '.join(sorted({job.group for job in jobs}))}")
        jobs = [job for job in jobs if job.group in wanted]
    out = args.out.resolve()
    scripts = {edits: edited(script, edits, out) for edits in dict.fromkeys(job.edits for job in jobs)}
    (out / "runs").mkdir(parents=True, exist_ok=True)
    results = args.out / "results.jsonl"
    known = {row["key"] for row in ladder_tables.read_results([results])} if results.is_file() else set()
    missing = [job for job in jobs if job.key(scripts[job.edits][1]) not in known]
    print(f"{len(jobs)} runs, of which {len(jobs) - len(missing)} are in {results}", flush=True)
    gpus = args.gpus.split(",") if args.gpus else visible_gpus()
    workers = make_workers(args.jobs, gpus, out, args.keep)
    going = Sweep(out, scripts, workers, 0 if args.shared else max(1, len(gpus)), len(missing))
    going.run(missing, args.stop_after)
    for line in going.failed:
        print(f"failed: {line}")
    print(f"{going.done} runs ended, {len(going.failed)} of them failed, {len(missing) - going.done} are missing; "
          f"next: python dev/ladder.py technique {results}")
    return 0


# -----------------------------------------------------------------------------
# Command line

def make_parser() -> argparse.ArgumentParser:
    parser = sample.make_parser("ladder.py", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, text):
        found = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        found.error = parser.error
        return found

    def numbers(text):
        return [int(part) for part in text.split(",")]
    path = sample.path_flag
    text = "Run arms x depths x seeds. Flags of the training script may follow, for all runs."
    add = command("sweep", text).add_argument
    add("plan", nargs="?", type=path, metavar="PLAN.toml", help="plan file, see docs/lab.md")
    add("--arm", action="append", default=[], metavar="NAME: FLAGS", help="an arm, instead of a plan file; the arm "
        "base comes with it. May be given several times")
    add("--depths", type=numbers, default=[], metavar="LIST", help="depths of all arms; default: those of the plan, "
        "or 4")
    add("--seeds", type=int, default=0, metavar="N", help="seeds 0 to N-1 of all arms; default: those of the "
        "plan, or 3")
    add("--groups", default="", metavar="LIST", help="run only these groups of the plan, as technique,isoflop")
    add("--script", type=path, default=HERE.parent / "train_gpt_simple.py", help="default: train_gpt_simple.py")
    add("--jobs", type=int, default=1, metavar="N", help="runs at the same time, over all GPUs (default: %(default)s)")
    add("--gpus", default="", metavar="LIST", help="GPUs to use, as 0,1; default: all that are visible")
    add("--out", type=path, default=Path("logs/ladder"), metavar="DIR", help="folder of results (default: %(default)s)")
    add("--stop_after", type=float, default=0, metavar="SECONDS", help="start no run after this time; those whose "
        "speed is measured come then (default: no limit)")
    add("--shared", action="store_true", help="other programs use this machine too, so the speeds of runs do not count")
    add("--keep", action="store_true", help="keep the run folders, with their checkpoints, in DIR/runs")
    for name, text in (("fit", "Fit scaling laws to runs of the group isoflop."),
                       ("technique", "Compare each arm with the arm base, and write a page.")):
        add = command(name, text).add_argument
        add("results", nargs="+", type=path, metavar="RESULTS", help="results.jsonl of a sweep")
        add("--hold_out", type=int, default=0, metavar="DEPTH", help="leave this depth out of the fit and predict its "
            "losses")
        add("--picture", type=path, metavar="FILE", help="write the picture of the fit, .svg or .png")
        add("--page", type=path, metavar="FILE", help="write the tables to this file, as markdown; default: print them")
    worker = commands.add_parser("work")
    worker.add_argument("folder", type=Path)
    worker.add_argument("--keep", action="store_true")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0 done, 2 an error that the user can correct, 130 interrupted."""
    try:
        args, flags = make_parser().parse_known_args(argv)
        if flags and args.command != "sweep":
            raise UserError(f"{flags[0]} is no flag of {args.command}; --help lists the flags")
        if args.command == "work":
            work(args.folder, args.keep)
            return 0
        return sweep(args, flags) if args.command == "sweep" else ladder_tables.run(args)
    except (UserError, sample.UserError) as error:
        print(f"ladder.py: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:                              # nobody reads on, as behind `| head`
        sample.close_stdout()
        return 0
    except OSError as error:
        print(f"ladder.py: {UserError(error)}; name another path", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ladder.py: stopped; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    for stop in (signal.SIGINT, signal.SIGTERM):        # both end the workers, also if a shell has it in the background
        signal.signal(stop, signal.default_int_handler)
    sys.exit(main())
