"""The archive of records and the tool that keeps it honest: every number in a table is computed from the logs.

    python records/records.py compare train_gpt.py my_idea.py --n=6 --preset=tiny      # better, worse, or noise?
    python records/records.py compare train_gpt.py --b_flags="--lr=1.2" --n=6          # one script, two sets of flags
    python records/records.py compare --noise train_gpt.py --n=6                       # the noise of this machine
    python records/records.py summarize logs/*                     # n, mean, sd, interval, test: a table in Markdown
    python records/records.py plot logs/* --out=curves             # curves.svg and curves.png
    python records/records.py new MyIdea --track=track_1_small logs/2026-*             # a record folder of these runs
    python records/records.py check --all                          # does every table say what its logs say?
    python records/records.py replay records/track_0_dev/2026-11-21_FirstRuns          # does it come out here too?
    python records/records.py board                                # writes records/README.md and its pictures

A run folder holds run.json and log.txt. A folder with runs.json, the ledger of all runs that were started, is a record
or a comparison; RUN below means either, or a folder of run folders. `COMMAND --help` explains a command.
"""
import argparse
import difflib
import glob
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from pictures import history, plot
from runs import (COMPANIONS, MAX_JSON, MAX_LOG, NAME, REGION, Record, Run, UserError, arms_table, collect, fill,
                  lost_runs, marked, p_text, read_json, read_record, read_run, read_text, read_track, regions,
                  runs_table, seconds_text, sha256, source_files, table, tokens_after, verdict_text, write_text)
from student import describe, interval, t_test

HERE = Path(__file__).resolve().parent
RULE = "=" * 100 + "\n"                                  # ends each source at the head of a log
IMPORTS_HARNESS = re.compile(r"^\s*(?:import|from)\b.*\bharness\b", re.M)
HALF = "half a pair"                                     # begins the reason why such a run does not count
LINE = re.compile(r"^step:(\d{1,12})/(\d{1,12}) (train|val)_loss:(\S{1,40}) train_time:(\d{1,15})ms "
                  r"step_avg:(\d{1,15}\.\d\d)ms$", re.M)


# -----------------------------------------------------------------------------
# Checking

def check_record(folder: Path, guard: bool = True) -> list[str]:
    """The first thing that is not true in a record or comparison, and how many more like it; nothing if all is."""
    try:
        record = read_record(folder)
        for check in (check_ledger, check_sources, check_logs, check_arms, check_data, check_target, check_readme,
                      check_guard if guard else lambda record: []):
            if problems := check(record):
                return problems[:1] + [f"and {len(problems) - 1} more of this kind"] * (len(problems) > 1)
    except UserError as error:
        return [str(error)]
    return []


def check_ledger(record: Record) -> list[str]:
    """Every run folder is listed, statuses are those of the logs, and no seed is left out."""
    listed, problems = {run.folder.name: run for run in record.runs}, []
    for path in sorted(record.folder.glob("*/run.json")):
        if path.parent.name not in listed:
            problems.append(f"the run {path.parent.name} is not in runs.json: a dropped run")
    for entry in record.ledger["runs"]:
        run = listed.get(entry.get("folder"))
        status = run.info["status"].replace("running", "killed") if run else entry["status"]
        if run and (entry["status"], entry["seed"]) != (status, run.seed):
            problems.append(f"{run.folder.name}: runs.json says {entry['status']}, seed {entry['seed']}; run.json says "
                            f"{status}, seed {run.seed}")
    for arm in record.ledger["arms"]:
        seeds = sorted({entry["seed"] for entry in record.ledger["runs"] if entry["arm"] == arm})
        problems += [f"runs.json has no run of {arm} with seed {seed + 1}, but later ones: a dropped run"
                     for seed, following in zip(seeds, seeds[1:]) if following > seed + 1]
    return problems


def check_sources(record: Record) -> list[str]:
    """Each script is the one whose hash its runs logged."""
    problems = []
    for arm in record.ledger["arms"]:
        path, wrong = record.script(arm), {}
        source = hashlib.sha256(read_text(path, MAX_JSON).encode()).hexdigest()
        for run in record.runs:
            if run.arm == arm and run.info["source_sha256"] != source:
                wrong.setdefault(run.info["source_sha256"][:12], []).append(run.folder.name)
        problems += [f"{path.name} has sha256 {source[:12]}, but {', '.join(names)} ran {found}: an edited script"
                     for found, names in wrong.items()]
    return problems


def check_logs(record: Record) -> list[str]:
    """Each log.txt holds the sources and tells the same story as its run.json; no file changed since it was listed."""
    problems, entries = [], {entry.get("folder"): entry for entry in record.ledger["runs"]}
    exempt = record.track.get("exempt", {}).get(record.folder.resolve().name, {})
    for run in record.runs:
        script, text = record.script(run.arm), read_text(record.script(run.arm), MAX_JSON)
        needs = {"harness.py": IMPORTS_HARNESS.search(text),
                 "triton_kernels.py": run.info["config"].get("kernels") is True and "kernels" not in exempt}
        problem = log_problem(run, text, {name: read_text(script.with_name(name), MAX_JSON)
                                          for name in COMPANIONS if needs[name]})
        files = entries[run.folder.name].get("sha256")
        changed = [name for name, digest in log_hashes(run.folder).items()
                   if not isinstance(files, dict) or files.get(name) != digest]
        if problem or changed:
            problems.append(f"{run.folder.name}: " + (problem or f"{changed[0]} is not the file that was listed in "
                                                      "runs.json (its sha256 differs)"))
    return problems


def log_problem(run: Run, script: str, companions: dict[str, str]) -> str:
    """The first thing in which log.txt contradicts the sources, run.json or itself, or nothing."""
    log = read_text(run.folder / "log.txt", MAX_LOG)
    if not log.startswith(script + "\n" + RULE):
        return "log.txt does not begin with the script: another run's log"
    log = log[len(script) + 1 + len(RULE):]
    for name, text in companions.items():
        if not log.startswith(text + "\n" + RULE):
            return f"log.txt does not hold {name} as it is here"
        log = log[len(text) + 1 + len(RULE):]
    lines = [(kind, int(step), int(total), loss, int(ms), float(avg))
             for step, total, kind, loss, ms, avg in LINE.findall(log.rpartition(RULE)[2])]
    for kind, step, total, loss, ms, avg in lines:
        if abs(avg - ms / max(step, 1)) > 0.5 / max(step, 1) + 0.0051:
            return f"log.txt has train_time {ms} ms at step {step}, its step_avg {avg} says {avg * step:.0f}"
    logged = [(step, loss, ms) for kind, step, _, loss, ms, _ in lines if kind == "val"]
    points = [(p["step"], f"{p['val_loss']:.6f}", p["train_time_ms"]) for p in run.info["val_losses"]]
    for said, (step, loss, ms) in zip(logged, points):
        if said != (step, loss, ms):
            return (f"run.json says a loss of {loss} after {ms} ms at step {step}, log.txt {said[1]} after {said[2]} "
                    f"ms at step {said[0]}")
    steps, times = [line[1] for line in lines if line[0] == "train"], [line[4] for line in lines]
    if times != sorted(times) or steps != list(range(1, len(steps) + 1)) or len({line[2] for line in lines}) > 1:
        return "log.txt has steps that are missing, twice, or back in time"
    if not run.finished:
        return ""
    if len(logged) != len(points) or not steps or steps[-1] != run.steps:
        return f"log.txt ends at step {steps[-1] if steps else 0} with {len(logged)} validations, run.json at " \
               f"{run.steps} with {len(points)}"
    if run.info["train_time_ms"] != points[-1][2]:
        return f"run.json says a training time of {run.info['train_time_ms']} ms, its last validation {points[-1][2]}"
    tokens = tokens_after(run.info["config"], run.steps)
    if run.info["tokens_seen"] != tokens:
        return f"run.json says {run.info['tokens_seen']} tokens, its stage table gives {tokens} in {run.steps} steps"
    return ""


def check_arms(record: Record) -> list[str]:
    """Runs of an arm have the same flags and stop at the same step; nothing was compiled while the clock ran."""
    problems, machines = [], set()
    for arm, plan in record.ledger["arms"].items():
        runs = record.of_arm(arm)
        if not runs and not (record.ledger["kind"] == "comparison"):
            problems.append(f"arm {arm} has no run that counts")
        usual = Counter(run.steps for run in runs).most_common(1)
        for run in runs:
            name, info = run.folder.name, run.info
            machines.add((info["device"], info["world_size"], json.dumps(info["versions"], sort_keys=True)))
            same = {**info["config"], **dict.fromkeys(("seed", "out_dir"))}
            if run.steps != usual[0][0]:
                problems.append(f"{name} stops at step {run.steps}, the others at {usual[0][0]}: a longer or shorter "
                                "run")
            elif run.flags != plan["flags"]:
                odd = sorted(set(run.flags) ^ set(map(str, plan["flags"])))[:3]
                problems.append(f"{name} did not run with the flags of {arm} in runs.json: {' '.join(odd)[:120]}")
            elif same != {**runs[0].info["config"], **dict.fromkeys(("seed", "out_dir"))}:
                problems.append(f"{name} has another config than {runs[0].folder.name}, with the same flags")
            elif info["recompiles"]:
                problems.append(f"{name} compiled {info['recompiles']} graphs after the clock had started")
    if len(machines) > 1 and record.ledger["kind"] == "comparison":
        problems.append("the runs were made on different machines or versions: "
                        + "; ".join(f"{ranks} x {device}, {versions}" for device, ranks, versions in sorted(machines)))
    return problems


def check_data(record: Record) -> list[str]:
    """Every counted run was validated on the track's tokens, on the track's hardware."""
    track, problems = record.track, []
    for run in record.runs if track else []:
        if not run.counted:
            continue
        info, name = run.info, run.folder.name
        if track["hardware"] not in info["device"] or info["world_size"] != track["ranks"]:
            problems.append(f"{name} ran on {info['world_size']} x {info['device']}, the track is for "
                            f"{track['ranks']} x {track['hardware']}")
        tokens = {point["tokens"] for point in info["val_losses"]} | {info["config"].get("val_tokens")}
        if tokens != {track["val_tokens"]}:
            problems.append(f"{name} was validated on {tokens} tokens, the track says {track['val_tokens']}")
        problems += [f"{name} {problem}" for problem in [data_problem(record, info)] if problem]
    hashes = {json.dumps(base_names(run.info.get("data_sha256")), sort_keys=True) for run in record.runs if run.counted}
    if not problems and len(hashes) > 1:
        problems.append("the runs were validated on different files: " + " and ".join(sorted(hashes))[:200])
    return problems


def base_names(values) -> dict:
    """A dictionary of paths with the folders left away; empty for anything else."""
    return {Path(name).name: value for name, value in values.items()} if isinstance(values, dict) else {}


def data_problem(record: Record, info: dict) -> str:
    """What is wrong with the validation shards of a run: other names, sizes or hashes than the track's."""
    hashes, shards = base_names(info.get("data_sha256")), base_names(info["data"])
    exempt = "data_sha256" in record.track["exempt"].get(record.folder.resolve().name, {})
    if not hashes and not exempt:
        return "does not say the sha256 of its validation shards (data_sha256 in run.json)"
    for name, pinned in record.track["val_data"].items():
        if shards.get(name) != pinned["tokens"]:
            return f"was validated on another file: {name} with {shards.get(name)} tokens, not {pinned['tokens']}"
        if hashes and (name not in hashes or (pinned["sha256"] and hashes[name] != pinned["sha256"])):
            return (f"was validated on another file: {name} has sha256 {str(hashes.get(name))[:12]}, the track's "
                    f"{pinned['sha256'][:12]}")
    odd = sorted(hashes.keys() - record.track["val_data"].keys())
    return f"was validated on another file: {odd[0]} is not the track's" if odd else ""


def check_target(record: Record) -> list[str]:
    """A record that claims the target shows it; one that does not is called a reference."""
    if not record.track:
        return []
    claim, losses = record.ledger.get("claim"), [run.loss for run in record.of_arm(record.main)]
    target, found = record.track["target"], t_test(losses, record.track["target"])
    shown = found < record.track["p"]
    if claim in ("record", "reference") and (claim == "record") == shown:
        return []
    return [f"runs.json claims a {claim}, but that the mean loss is below {target:g} is {'' if shown else 'not '}shown "
            f"at p < {record.track['p']:g} ({p_text(found)}, n = {len(losses)})"]


def check_readme(record: Record) -> list[str]:
    """The generated parts of the README are what the logs give, and no number beside them comes from elsewhere."""
    text, parts = read_text(record.folder / "README.md", MAX_JSON), regions(record)
    found = {match[2]: match[3].removesuffix("\n") for match in REGION.finditer(text)}
    for name, part in parts.items():
        if name not in found:
            return [f"README.md lacks the part {name!r}; put its markers back: {marked(name)!r}"]
        for said, true in zip(found[name].split("\n") + [""] * 99, part.split("\n") + ["", ""]):
            if said != true:
                words = [(a.strip(), b.strip()) for a, b in zip(said.split("|"), true.split("|")) if a != b]
                a, b = words[0] if words else (said, true)
                return [f"README.md says {a[:100]!r} where the logs say {b[:100]!r} (part {name})"]
    known = set(re.findall(r"\d+\.\d{3,}", "\n".join([*parts.values(), json.dumps(record.track)])))
    for number, line in enumerate(REGION.sub("", text).split("\n"), 1):
        if line.startswith("|"):
            return [f"README.md has a table outside the generated parts: {line[:60]!r}"]
        odd = [value for value in re.findall(r"(?<![\w.])\d+\.\d{3,}(?![\w]|\.\d)", line) if value not in known]
        if odd and not line.startswith(">"):
            return [f"README.md says {odd[0]} outside the generated parts, which no log says: a number typed by hand "
                    "(what others measured goes into a line that begins with '>')"]
        if "TODO" in line:
            return [f"README.md still asks for something: {line.strip()[:80]!r}"]
    return []


def check_guard(record: Record) -> list[str]:
    """Each script passes the metric guard with the tables of its own runs."""
    scripts, problems = {}, []
    for arm in record.ledger["arms"]:
        if runs := record.of_arm(arm):
            path = record.script(arm)
            sources = tuple(map(sha256, source_files(path)))
            scripts.setdefault(sources, [str(path)]).append(f"--run={runs[0].folder / 'run.json'}")
    for arguments in scripts.values():
        done = subprocess.run([sys.executable, str(HERE / "guard.py"), *arguments], capture_output=True, text=True,
                              env=child_environment() | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            problems.append((done.stderr.strip().splitlines() or [f"guard.py ends with {done.returncode}"])[-1])
    return problems


def board_problem() -> list[str]:
    """Whether records/README.md is what `board` writes."""
    path = HERE / "README.md"
    same = path.is_file() and read_text(path, MAX_JSON) == board_text()
    return [] if same else ["records/README.md is not what the records say; write it again with records.py board"]


# -----------------------------------------------------------------------------
# Running scripts

def child_environment() -> dict:
    """For scripts in the archive: Python leaves no cache beside them."""
    return os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, or else the numbers of all NVIDIA GPUs here."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        try:
            listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
        except (OSError, subprocess.TimeoutExpired):
            return []
        return [str(i) for i in range(listed.count("GPU "))]
    return [name for name in given.split(",") if name]


def launch(jobs: list[tuple[Path, list[str], Path]], ranks: int) -> list[tuple[int, Path | None, str]]:
    """Runs training scripts at once: exit code, run folder and last printed line of each (script, flags, fresh folder).

    With two each has half of the cores and, in the order of the jobs, GPUs of its own. Ctrl-C and SIGTERM end the
    scripts first, which save what they have, and then raise KeyboardInterrupt.
    """
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    gpus, processes = visible_gpus() if len(jobs) > 1 else [], []
    try:
        for i, (script, flags, out_dir) in enumerate(jobs):
            shutil.rmtree(out_dir, ignore_errors=True)
            out_dir.mkdir(parents=True)
            environment = child_environment()
            if len(jobs) > 1:
                environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // len(jobs) // ranks))
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[i * ranks:(i + 1) * ranks])
            with open(out_dir / "output.txt", "wb") as output:
                processes.append(subprocess.Popen([sys.executable, *start, str(script), *flags, f"--out_dir={out_dir}"],
                                                  stdout=output, stderr=subprocess.STDOUT, env=environment))
        codes = [process.wait() for process in processes]
    except BaseException:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
        raise
    results = []
    for code, (_, _, out_dir) in zip(codes, jobs):
        lines = (out_dir / "output.txt").read_bytes()[-4000:].decode(errors="replace").strip().splitlines()
        made = next((path.parent for path in out_dir.glob("*/run.json")), None)
        results.append((code, made, (lines or [""])[-1]))
    return results


def compare(args, flags: list[str]) -> int:
    """Alternates A and B; writes the ledger as it goes and the verdict at the end."""
    plan = comparison_plan(args, flags)
    key = json.dumps([[*map(sha256, source_files(path)), path.name, arm_flags] for path, arm_flags in plan.values()]
                     + [args.ranks] + ["at once"] * args.at_once)
    stems = dict.fromkeys(path.stem for path, _ in plan.values())
    folder = args.out or Path("logs") / f"compare_{'_'.join(stems)}_{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    ledger = open_comparison(folder, plan, args, key)
    for seed in range(args.n):
        whole = {run["arm"] for run in ledger["runs"] if run["seed"] == seed and not run["why"].startswith(HALF)
                 and run["status"] in ("finished", "diverged")}
        if whole == {"A", "B"}:
            continue
        for run in ledger["runs"]:       # a pair belongs together in time: half of one does not count
            if run["seed"] == seed and run["counted"]:
                run.update(counted=False, why=f"{HALF}: the comparison was interrupted before the other half")
        order = "AB" if seed % 2 == 0 else "BA"
        for arms in [order] if args.at_once else order:
            run_arms(folder, ledger, arms, seed, args)
    ledger["looks"] = sorted({*ledger["looks"], args.n})
    save_ledger(folder, ledger)
    record = read_record(folder)
    title = f"# {' against '.join(f'{arm}: ' + path.name for arm, (path, _) in plan.items())}"
    title += "\n\nThe runs of a pair ran at once, each with half of the cores." * args.at_once
    text = "\n\n".join([title, marked("verdict"), marked("tables"), "## Setup", marked("setup")]) + "\n"
    write_text(folder / "README.md", fill(text, regions(record)))
    print(f"\n{arms_table(record.runs)}\n\n{verdict_text(record)}\n\nledger, logs and tables are in {folder}")
    return 0


def comparison_plan(args, flags: list[str]) -> dict[str, tuple[Path, list[str]]]:
    """Script and flags of A and B; raises UserError if they are not what the command needs."""
    a_flags, b_flags = args.a_flags.split(), args.b_flags.split()
    if len(args.scripts) > 2:
        raise UserError(f"{args.scripts[2]} is one script too many; compare two, or one with --b_flags")
    for path in args.scripts:
        if path.suffix != ".py" or not path.is_file():
            raise UserError(f"{path} is not a training script; name one or two train_*.py")
    for flag in [*flags, *a_flags, *b_flags]:
        if not flag.startswith("--") or "=" not in flag or flag.startswith(("--seed=", "--out_dir=")):
            raise UserError(f"{flag} cannot be passed on; flags of the scripts look like --field=value, and --seed and "
                            "--out_dir are set here")
    a, b = args.scripts[0], args.scripts[-1]
    same = a_flags == b_flags and [*map(sha256, source_files(a))] == [*map(sha256, source_files(b))]
    if same != args.noise:
        raise UserError(f"A and B are {'the same' if same else 'different'}; " + (
            "change one, give --b_flags, or ask for the noise with --noise" if same else "--noise is for one script"))
    if args.n < 2 or args.ranks < 1 or not 0 < args.p < 0.5:
        raise UserError(f"--n={args.n} --ranks={args.ranks} --p={args.p:g}: at least 2 pairs, 1 rank, and p below 0.5")
    if args.at_once and 0 < len(gpus := visible_gpus()) < 2 * args.ranks:
        raise UserError(f"--at_once needs {2 * args.ranks} GPUs, or none, and finds {len(gpus)}; leave it away")
    return {"A": (a, flags + a_flags), "B": (b, flags + b_flags)}


def open_comparison(folder: Path, plan: dict, args, key: str) -> dict:
    """The ledger of a comparison: a new one with copies of the scripts, or the one that was begun here."""
    digest = hashlib.sha256(key.encode()).hexdigest()
    if (folder / "runs.json").is_file():
        ledger = read_json(folder / "runs.json")
        if ledger.get("setup_sha256") != digest:
            raise UserError(f"--out={folder} holds another comparison; choose another folder")
        known = sorted({run["seed"] for run in read_record(folder).ledger["runs"]})
        print(f"{folder} goes on: {len(known)} of {args.n} pairs were begun", flush=True)
        return ledger | {"p": args.p}
    for arm, (path, _) in plan.items():  # what runs is a copy, so that editing goes on meanwhile
        (folder / arm).mkdir(parents=True, exist_ok=True)
        for source in source_files(path):
            shutil.copy(source, folder / arm / source.name)
    ledger = {"format": 1, "kind": "comparison", "p": args.p, "looks": [], "setup_sha256": digest, "runs": [],
              "arms": {arm: {"script": f"{arm}/{path.name}", "flags": flags} for arm, (path, flags) in plan.items()}}
    save_ledger(folder, ledger)
    return ledger


def save_ledger(folder: Path, ledger: dict):
    write_text(folder / "runs.json", json.dumps(ledger, indent=1) + "\n")


def run_arms(folder: Path, ledger: dict, arms: str, seed: int, args):
    """A run of each of `arms`, at once, listed before they start; raises UserError if a script refuses to run."""
    entries = [{"folder": None, "arm": arm, "seed": seed, "status": "killed", "counted": False,
                "why": "killed while it ran"} for arm in arms]
    ledger["runs"] += entries
    save_ledger(folder, ledger)
    plans, running = [ledger["arms"][arm] for arm in arms], folder / ".running"
    try:
        results = launch([(folder / plan["script"], plan["flags"] + [f"--seed={seed}"], running / arm)
                          for arm, plan in zip(arms, plans)], args.ranks)
    except KeyboardInterrupt:
        for entry in entries:
            entry.update(status="interrupted", why="interrupted while it ran")
        save_ledger(folder, ledger)
        raise
    refusal = ""
    for entry, plan, (code, made, last) in zip(entries, plans, results):
        arm, result = entry["arm"], "diverged"
        tries = sum(run["arm"] == arm and run["seed"] == seed for run in ledger["runs"])
        if made:
            name = f"{arm}_seed{seed}" + f"_{tries}" * (tries > 1)
            keep_run(made, folder / name)
            run = read_run(folder / name)
            status = run.info["status"].replace("running", "killed")
            entry.update(folder=name, status=status, sha256=log_hashes(run.folder), counted=run.finished,
                         why="" if run.finished else f"{status}: {last[:200]}")
            result = f"loss {run.loss:.6f} in {seconds_text(run.seconds)} s" if run.finished else result
        else:
            entry.update(status="refused", why=f"exit code {code}: {last[:200]}")
        if entry["status"] in ("finished", "diverged"):
            print(f"pair {seed + 1}/{args.n}, {arm}: {result}", flush=True)
        else:
            refusal = refusal or f"{plan['script']} ends with exit code {code}: {last[:300]}"
    shutil.rmtree(running)
    save_ledger(folder, ledger)
    if refusal:
        raise UserError(refusal)


def keep_run(source: Path, target: Path):
    """Copies what the archive keeps of a run folder: run.json and log.txt."""
    target.mkdir()
    for name, limit in (("run.json", MAX_JSON), ("log.txt", MAX_LOG)):
        (target / name).write_text(read_text(source / name, limit))


def log_hashes(folder: Path) -> dict[str, str]:
    return {name: sha256(folder / name) for name in ("run.json", "log.txt")}


def replay(args, flags: list[str]) -> int:
    """Runs a record's own script with its own flags here, and says how loss and time compare."""
    if args.n < 1:
        raise UserError(f"--n={args.n} must be at least 1")
    record = read_record(args.record)
    arm = shortened_arm(record, args.num_iterations) if args.num_iterations else record.main
    runs, script = record.of_arm(arm), record.script(arm)
    if not runs:
        raise UserError(f"{args.record} has no counted run of {arm} to compare with")
    if sha256(script) != runs[0].info["source_sha256"]:
        raise UserError(f"{script} is not the script that was logged; records.py check says more")
    replaced = {flag.partition("=")[0] for flag in flags}
    plan = [flag for flag in record.ledger["arms"][arm]["flags"] if flag.partition("=")[0] not in replaced] + flags
    ranks = args.ranks or runs[0].info["world_size"]
    first = max(entry["seed"] for entry in record.ledger["runs"]) + 1 if args.seed < 0 else args.seed
    base = args.out or Path("logs") / f"replay_{args.record.resolve().name}_{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    for line in environment(record, runs[0].info, plan):
        print(f"differs: {line}")
    print(f"replay of {args.record}: {arm}, {ranks} rank(s), {' '.join(plan)}", flush=True)
    done = []
    for seed in range(first, first + args.n):        # a seed of its own: another draw from the same distribution
        [(code, made, last)] = launch([(script, plan + [f"--seed={seed}"], base / f"seed{seed}")], ranks)
        if not made or code:
            raise UserError(f"{script.name} ends with exit code {code}: {last[:300]}")
        done.append(read_run(made))
        print(f"seed {seed}: loss {done[-1].loss:.6f} in {seconds_text(done[-1].seconds)} s", flush=True)
    print("\n".join(replay_report(runs, done)) + f"\nlogs are in {base}")
    return 0


def shortened_arm(record: Record, num_iterations: int) -> str:
    """The arm of a record with that many iterations; raises UserError that names the lengths there are."""
    lengths = {run.arm: run.info["config"].get("num_iterations") for run in record.runs if run.counted}
    for arm, length in lengths.items():
        if length == num_iterations:
            return arm
    raise UserError(f"--num_iterations={num_iterations}: {record.folder} has reference runs of "
                    f"{', '.join(map(str, sorted(set(lengths.values()))))} iterations only")


def environment(record: Record, there: dict, plan: list[str]) -> list[str]:
    """What differs here from a run's machine, a line each; raises UserError if the validation shards do."""
    here = {"python": sys.version.split()[0]}
    for package in ("torch", "numpy"):
        try:
            here[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"{package} is not installed; pip install -r requirements.txt") from None
    lines = [f"{name} {there['versions'].get(name)} there, {version} here" for name, version in here.items()
             if str(there["versions"].get(name)).split("+")[0] != version.split("+")[0]]
    pattern = next((flag.partition("=")[2] for flag in reversed(plan) if flag.startswith("--val_files=")),
                   str(there["config"].get("val_files", "")))
    pinned = {name: shard["sha256"] for name, shard in record.track.get("val_data", {}).items() if shard["sha256"]}
    pinned |= base_names(there.get("data_sha256"))
    for path in map(Path, sorted(glob.glob(pattern))):
        if (digest := sha256(path)) != pinned.get(path.name, digest):
            raise UserError(f"{path} has sha256 {digest[:12]}, the record's {path.name} {pinned[path.name][:12]}: "
                            "losses on different texts cannot be compared")
        lines += [f"the record names no sha256 for {path.name}"] * (path.name not in pinned)
    return lines


def replay_report(runs: list[Run], done: list[Run]) -> list[str]:
    """Lines on the machine, and whether loss and time lie where the record's runs predict one further run."""
    here, there = done[0].info, runs[0].info
    data = [base_names(info["data"]) for info in (there, here)]
    values = [("device", there["device"], here["device"]), ("ranks", there["world_size"], here["world_size"])]
    values += [(f"tokens in {name}", data[0].get(name), tokens) for name, tokens in data[1].items()]
    lines = [f"differs: {name}: {was} there, {now} here" for name, was, now in values if was != now]
    lines = lines or ["device, ranks and data are those of the record"]
    if len(runs) < 2:
        return lines + ["the record has one run: no distribution to compare with"]
    for what, get, unit in (("loss", lambda run: run.loss, ""), ("training time", lambda run: run.seconds, " s")):
        low, high = interval([get(run) for run in runs], 0.95, new=True)
        mean = describe(get(run) for run in runs)[1]
        for run in done:
            value = get(run)
            place = "lies in" if low <= value <= high else "is below" if value < low else "is above"
            lines.append(f"{what} {value:.4f}{unit} {place} {low:.4f} to {high:.4f}{unit}, where 95 % of further runs "
                         f"lie by the record's {len(runs)} (mean {mean:.4f}, here {100 * (value / mean - 1):+.2f} %)")
    return lines


# -----------------------------------------------------------------------------
# The archive

def read_archive() -> list[tuple[dict, list[Record]]]:
    """Each track with its records, newest first."""
    tracks = []
    for path in sorted(HERE.glob("track_*/track.json")):
        records = [read_record(found.parent) for found in path.parent.glob("*/runs.json")]
        records.sort(key=lambda record: (record.folder.name[:10], record.runs[0].info["started"]), reverse=True)
        tracks.append((read_track(path.parent), records))
    return tracks


def title_of(record: Record) -> str:
    return read_text(record.folder / "README.md", MAX_JSON).split("\n", 1)[0].lstrip("# ").strip()


def board_text() -> str:
    """records/README.md: a table per track."""
    parts = ["# Records", "Written by `python records/records.py board` from the logs in these folders; "
             "`python records/records.py check --all` says whether every table is what its logs say, and whether each "
             "script's loss is that of an honest predictor (`guard.py`). Anyone can run a record again: `python "
             "records/records.py replay FOLDER`.",
             "![training time of the records](history.svg)"]
    for track, records in read_archive():
        parts += [f"## {track['title']}", track["text"]]
        rows = []
        for record in records:
            runs = record.of_arm(record.main)
            n, loss, sd = describe(run.loss for run in runs)
            _, seconds, seconds_sd = describe(run.seconds for run in runs)
            info, name = runs[0].info, record.folder.name
            rows.append([name.split("_")[0], f"[{title_of(record)}]({track['name']}/{name}/)", record.ledger["claim"],
                         seconds_text(seconds) + f" ({seconds_text(seconds_sd)})" * (n > 1),
                         f"{loss:.4f}" + f" ({sd:.4f})" * (n > 1), n,
                         p_text(t_test([run.loss for run in runs], track["target"])) if n > 1 else "-", runs[0].steps,
                         f"{info['world_size']} x {info['device']}"])
        if rows:
            parts += [table("date | what changed | claim | training time, s (sd): | validation loss (sd): | n: | "
                            f"below {track['target']:g}?: | steps: | hardware", rows),
                      f"![validation loss along these runs]({track['name']}/curves.svg)"]
        else:
            parts.append("```bash\n" + "\n".join(track["commands"]) + "\n```")
    return "\n\n".join(parts) + "\n"


def new(args) -> int:
    """Makes a record folder from run folders: logs, scripts, ledger, README with its tables, diff with the last one."""
    track_folder, runs = HERE / args.track, collect(args.runs)
    track, date = read_track(track_folder), args.date or time.strftime("%Y-%m-%d")
    if not NAME.fullmatch(args.name) or not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        raise UserError(f"the name {args.name!r} or the date {date!r} cannot be part of a folder's name; use letters "
                        "and digits, and YYYY-MM-DD")
    final = track_folder / f"{date}_{args.name}"
    if final.exists():
        raise UserError(f"{final} exists; choose another NAME, or remove it")
    previous = next((record for other, records in read_archive() if other == track for record in records), None)
    with tempfile.TemporaryDirectory(dir=track_folder, prefix=".new_") as temporary:
        folder = Path(temporary) / final.name
        folder.mkdir()
        ledger = {"format": 1, "kind": "record", "claim": "record", "arms": {}, "runs": []}
        for run in runs:
            add_run(folder, ledger, run)
        copies = [read_run(folder / entry["folder"], arm=run.arm, counted=run.counted, why=run.why)
                  for entry, run in zip(ledger["runs"], runs)]
        ledger["runs"] += lost_runs(args.runs)
        record = Record(folder, ledger, copies, track)
        losses = [run.loss for run in record.of_arm(record.main)]
        if not losses:
            raise UserError(f"no finished run of {record.main} among {len(runs)}; a record needs some")
        ledger["claim"] = "record" if t_test(losses, track["target"]) < track["p"] else "reference"
        save_ledger(folder, ledger)
        text = [f"# {args.name}: TODO what changed, in a few words", marked("result"),
                "TODO: what changed and why; what was tried and dropped. Numbers stand in the tables.",
                marked("tables"), "## Setup", marked("setup")]
        if previous and (diff := script_diff(previous, record)):
            write_text(folder / "changes.diff", diff)
            text.insert(3, f"The change of the script since {previous.folder.name} is in `changes.diff`.")
        write_text(folder / "README.md", fill("\n\n".join(text) + "\n", regions(record)))
        os.rename(folder, final)
    print(f"{final}: {len(runs)} runs, a {ledger['claim']}; write its README's TODO lines, then records.py check "
          f"{final} and records.py board")
    return 0


def add_run(folder: Path, ledger: dict, run: Run):
    """Copies a run and, for the first of its arm, the script into a record that is being made."""
    slug = re.sub(r"[^A-Za-z0-9.]+", "_", run.arm).strip("_.")[:60] or "arm"
    source = run.folder / run.info["script"]
    if not source.is_file():             # in a record or comparison the script is kept once for all runs
        record = read_record(run.folder.parent)
        source = record.script(next(kept.arm for kept in record.runs if kept.folder == run.folder))
    if sha256(source) != run.info["source_sha256"]:
        raise UserError(f"{source} is not the script that {run.folder} ran (its sha256 differs)")
    if run.arm not in ledger["arms"]:
        sources = source_files(source)
        scripts = {plan["script"]: (folder / plan["script"]).parent for plan in ledger["arms"].values()}
        script = next((script for script, place in scripts.items() if all(      # arms that differ in flags share theirs
            (place / path.name).is_file() and sha256(place / path.name) == sha256(path) for path in sources)), None)
        if script is None:
            where = "" if not ledger["arms"] else f"{slug}/"
            (folder / where).mkdir(exist_ok=True)
            for path in sources:
                shutil.copy(path, folder / where / path.name)
            script = f"{where}{source.name}"
        ledger["arms"][run.arm] = {"script": script, "flags": run.flags}
    name, tries = f"{slug}_seed{run.seed}", sum(e["arm"] == run.arm and e["seed"] == run.seed for e in ledger["runs"])
    name += f"_{tries + 1}" * (tries > 0)
    keep_run(run.folder, folder / name)
    status = run.info["status"].replace("running", "killed")
    ledger["runs"].append({"folder": name, "arm": run.arm, "seed": run.seed, "status": status, "counted": run.counted,
                           "why": run.why, "sha256": log_hashes(folder / name)})


def script_diff(previous: Record, record: Record) -> str:
    """Unified diff of the main scripts of two records, or nothing."""
    scripts = [old.script(old.main) for old in (previous, record)]
    return "".join(difflib.unified_diff(*(read_text(path, MAX_JSON).splitlines(keepends=True) for path in scripts),
                                        *(f"{path.parent.name}/{path.name}" for path in scripts)))


# -----------------------------------------------------------------------------
# Command line

def summarize(args) -> int:
    """Prints the tables of some runs; with --write, writes those of a record into its README."""
    if args.write:
        for folder in args.runs:
            path = folder / "README.md"
            write_text(path, fill(read_text(path, MAX_JSON), regions(read_record(folder))))
            print(f"{path} is up to date")
        return 0
    target = read_track(HERE / args.track)["target"] if args.track else args.target
    runs = collect(args.runs)
    print(arms_table(runs, target) + "\n\n" + runs_table(runs))
    for folder in args.runs:
        if (folder / "runs.json").is_file() and read_json(folder / "runs.json").get("kind") == "comparison":
            print("\n" + verdict_text(read_record(folder)))
    return 0


def check(args) -> int:
    """Prints a line for each lie; 1 if there is one."""
    folders = sorted(p.parent for p in HERE.glob("track_*/*/runs.json")) if args.all else args.records
    unlisted = [p for p in sorted(HERE.glob("track_*/*")) if p.is_dir() and not (p / "runs.json").is_file()]
    if not args.all and not folders:
        raise UserError("name a record or comparison folder, or --all")
    lies = [f"{path}: a record folder without runs.json" for path in unlisted if args.all]
    with ThreadPoolExecutor(os.cpu_count()) as threads:             # the guard is a process for each script
        for folder, problems in zip(folders, threads.map(partial(check_record, guard=not args.no_guard), folders)):
            lies += [f"{folder}: {problem}" for problem in problems]
            print(f"{folder}: {'NOT ' if problems else ''}ok", flush=True)
    lies += board_problem() if args.all and not lies else []
    for line in lies:
        print(f"records.py: {line}", file=sys.stderr)
    return 1 if lies else 0


def plot_runs(args) -> int:
    """Curves of runs as --out.svg and --out.png."""
    paths = [args.out.with_suffix(suffix) for suffix in (".svg", ".png")]
    plot(collect(args.runs), *paths)
    print(*paths)
    return 0


def board(args) -> int:
    """Writes records/README.md, records/history.svg, and curves.svg in the folder of each track that has records."""
    write_text(HERE / "README.md", board_text())
    history(read_archive(), HERE / "history.svg")
    print(f"wrote {HERE / 'README.md'} and {HERE / 'history.svg'}")
    for track, records in read_archive():
        runs = [replace(run, arm=record.folder.name) for record in records for run in record.of_arm(record.main)]
        if runs:
            plot(runs, HERE / track["name"] / "curves.svg")
            print(f"wrote {HERE / track['name'] / 'curves.svg'}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The command line; each command's help is its whole story."""
    parser = argparse.ArgumentParser(prog="records.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name, summary, story="", run=None):
        stop = "" if summary.endswith("?") else "."
        made = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}{stop} {story}",
                                   allow_abbrev=False)
        made.set_defaults(run=run)
        return made.add_argument
    add = command("summarize", "mean, sd, interval and test of some runs, as Markdown tables",
                  "Runs of the same script with the same flags but the seed are one arm. The interval is Student's, "
                  "the test one-sided.", summarize)
    add("runs", nargs="+", type=Path, metavar="RUN")
    add("--target", type=float, default=0, help="test whether the mean loss is below it (default: no test)")
    add("--track", metavar="TRACK", help="take the target of this track, as in --track=track_1_small")
    add("--write", action="store_true", help="RUN is a record or comparison: write the tables into its README")

    add = command("check", "does every table say what its logs say?",
                  "Ledger, scripts, logs, validation data, target, README, and the metric guard, which runs the "
                  "script. Prints the first lie of each record; exit code 1 if there is one.", check)
    add("records", nargs="*", type=Path, metavar="RECORD", help="record or comparison folders")
    add("--all", action="store_true", help="every record of the archive, and records/README.md")
    add("--no_guard", action="store_true", help="read only: do not run the scripts")

    add = command("replay", "run a record again on this machine",
                  "Its own script and flags, with a new seed; further flags, as --train_files=..., replace the "
                  "record's. Versions and the validation shards' sha256 are compared before, loss and time after: do "
                  "they lie in the prediction interval from the record's runs?", replay)
    add("record", type=Path, metavar="RECORD")
    add("--n", type=int, default=1, help="number of runs (default: %(default)s)")
    add("--ranks", type=int, default=0, help="number of GPUs (default: the record's)")
    add("--seed", type=int, default=-1, help="of the first run (default: the next after the record's)")
    add("--num_iterations", type=int, default=0, help="a shortened run, if the record has reference runs that short")
    add("--out", type=Path, metavar="FOLDER", help="where the runs go (default: logs/replay_...)")

    add = command("compare", "is B better than A, worse, or is it noise?",
                  "Runs A and B alternately on this machine, the i-th pair with seed i, and tests the paired "
                  "differences (two-sided paired t-test; times as ratios). Time at equal loss: in each pair, when each "
                  "run first reaches the higher of the two final losses, on straight lines between validations; a "
                  "smaller --val_every makes it finer. All other flags go to both scripts. The same command goes on "
                  "where it was stopped, and adds pairs if --n is larger.", compare)
    add("scripts", nargs="+", type=Path, metavar="SCRIPT", help="A and B, or one script with --b_flags or --noise")
    add("--n", type=int, default=6, help="number of pairs (default: %(default)s)")
    add("--a_flags", default="", help='flags of A only, as in --a_flags="--lr=0.8 --cooldown=0.5"')
    add("--b_flags", default="", help="flags of B only")
    add("--noise", action="store_true", help="run A against itself: what differences are noise here?")
    add("--p", type=float, default=0.05, help="level of the tests: how often equal scripts may look different; for a "
        "claim take 0.01 (default: %(default)s)")
    add("--ranks", type=int, default=1, help="GPUs for each run, through torchrun (default: %(default)s)")
    add("--at_once", action="store_true", help="A and B of a pair run side by side, each with half of the cores and "
        "GPUs of its own, so that what slows the machine down slows both")
    add("--out", type=Path, metavar="FOLDER", help="where the comparison goes (default: logs/compare_...)")

    add = command("plot", "curves over steps, time and tokens, as SVG and PNG",
                  "One line an arm, with a band from its lowest to its highest run.",
                  plot_runs)
    add("runs", nargs="+", type=Path, metavar="RUN")
    add("--out", type=Path, default=Path("curves"), help="name without ending (default: %(default)s)")

    command("board", "write records/README.md and its pictures", run=board)

    add = command("new", "make a record folder from run folders",
                  "Name every run that was started, also failed ones. The first run's script is what the record is "
                  "about. Checkpoints are left out.", new)
    add("name", metavar="NAME", help="as in MyIdea; the folder is DATE_NAME")
    add("runs", nargs="+", type=Path, metavar="RUN")
    add("--track", required=True, help="as in track_1_small")
    add("--date", help="YYYY-MM-DD (default: today)")
    return parser


def main() -> int:
    """Runs the command line. Exit code: 0 done, 1 check found a lie, 2 the user can put it right, 130 interrupted."""
    parser = make_parser()

    def refuse(message):
        raise UserError(f"{message}; --help lists commands and flags")
    try:
        for one in [parser, *parser._subparsers._group_actions[0].choices.values()]:
            one.error = refuse
        signal.signal(signal.SIGTERM, signal.default_int_handler)    # ends like Ctrl-C, also where that is ignored
        if empty := [word for word in sys.argv[1:] if re.fullmatch("--.*=--", word, re.S)]:
            refuse(f"{empty[0]} has no value")                       # argparse would read it as a list
        args, rest = parser.parse_known_args()
        if args.run in (compare, replay):
            return args.run(args, rest)
        return refuse(f"unknown argument {rest[0]}") if rest else args.run(args)
    except UserError as error:
        print(f"records.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"records.py: {UserError(error)}; name another path", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("records.py: interrupted" + "; the same command goes on from here" * ("compare" in sys.argv),
              file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
