"""The checks of records and comparisons: is every word and number what the logs say?

This is a module of records.py, not a command: python records/records.py check --help explains it.
"""
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from launcher import child_environment, log_hashes
from runs import (MAX_JSON, MAX_LOG, REGION, Record, Run, UserError, judge, marked, read_record, read_text, regions,
                  sha256, source_files, tokens_after, unix_lines)

GUARD = Path(__file__).resolve().with_name("guard.py")
RULE = "=" * 100 + "\n"                                  # ends each source at the head of a log
IMPORTS_HARNESS = re.compile(r"^\s*(?:import|from)\b.*\bharness\b", re.M)
LINE = re.compile(r"^step:(\d{1,12})/(\d{1,12}) (train|val)_loss:(\S{1,40}) train_time:(\d{1,15})ms "
                  r"step_avg:(\d{1,15}\.\d\d)ms$", re.M)


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
    """Each script, with what it imports, is the one whose hash its runs logged."""
    problems = []
    for arm in record.ledger["arms"]:
        wrong = {}
        for run in record.runs:
            if run.arm == arm and (problem := run.source_problem(record.script(arm))):
                wrong.setdefault(problem, []).append(run.folder.name)
        problems += [f"{here}, but {', '.join(names)} ran {ran}: an edited script"
                     for (here, ran), names in wrong.items()]
    return problems


def check_logs(record: Record) -> list[str]:
    """Each log.txt holds the sources and tells the same story as its run.json; no file changed since it was listed."""
    problems, entries = [], {entry.get("folder"): entry for entry in record.ledger["runs"]}
    for run in record.runs:
        files, hashes = entries[run.folder.name].get("sha256"), log_hashes(run.folder)
        files = files if isinstance(files, dict) else {}
        changed = [name for name in {**hashes, **files} if files.get(name) != hashes.get(name)]
        problem = ""
        if run.finished or "log.txt" in hashes:          # a run may fail before it has a log
            problem = sources_missing(run) or log_problem(run, record.script(run.arm), needed(record, run))
        if problem or changed:
            problems.append(f"{run.folder.name}: " + (problem or f"{changed[0]} is not the file that was listed in "
                                                      "runs.json (its sha256 differs)"))
    return problems


def needed(record: Record, run: Run) -> list[str]:
    """The companions that a log must hold: those that run.json names, or in older runs those that the script needs."""
    if "sources" in run.info:
        return [name for name in run.info["sources"] if name != run.info["script"]]
    exempt = record.track.get("exempt", {}).get(record.folder.resolve().name, {})
    imports_harness = IMPORTS_HARNESS.search(read_text(record.script(run.arm), MAX_JSON))
    kernels = run.info["config"].get("kernels") is True and "kernels" not in exempt
    return ["harness.py"] * bool(imports_harness) + ["triton_kernels.py"] * kernels


def sources_missing(run: Run) -> str:
    """Which file ran without being named in the sources of run.json, or nothing."""
    sources = run.info.get("sources")
    if sources is not None and run.info["config"].get("kernels") is True and "triton_kernels.py" not in sources:
        return "run.json says that the kernels ran, but its sources do not name triton_kernels.py"
    return ""


def log_problem(run: Run, script: Path, companions: list[str]) -> str:
    """The first thing in which log.txt contradicts the sources, run.json or itself, or nothing."""
    log = unix_lines(read_text(run.folder / "log.txt", MAX_LOG))
    for path in [script, *map(script.with_name, companions)]:
        head = unix_lines(read_text(path, MAX_JSON)) + "\n" + RULE
        if not log.startswith(head):
            return ("log.txt does not begin with the script: another run's log" if path == script else
                    f"log.txt does not hold {path.name} as it is here")
        log = log[len(head):]
    return steps_problem(run, log.rpartition(RULE)[2])


def steps_problem(run: Run, log: str) -> str:
    """The first thing in which the lines of steps contradict run.json or each other, or nothing."""
    lines = [(kind, int(step), int(total), loss, int(ms), float(avg))
             for step, total, kind, loss, ms, avg in LINE.findall(log)]
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
    if len(machines) > 1 and (record.ledger["kind"] == "comparison" or "seconds" in record.track):
        problems.append("the runs were made on different machines or versions: "
                        + "; ".join(f"{ranks} x {device}, {versions}" for device, ranks, versions in sorted(machines)))
    return problems


def check_data(record: Record) -> list[str]:
    """Every counted run was validated on the track's tokens, on the track's hardware."""
    problems = []
    exempt = record.track.get("exempt", {}).get(record.folder.resolve().name, {}) if record.track else {}
    for run in record.runs if record.track else []:
        if run.counted and (problem := track_problem(record.track, run.info, "data_sha256" in exempt)):
            problems.append(f"{run.folder.name} {problem}")
    hashes = {json.dumps(base_names(run.info.get("data_sha256")), sort_keys=True) for run in record.runs if run.counted}
    if not problems and len(hashes) > 1:
        problems.append("the runs were validated on different files: " + " and ".join(sorted(hashes))[:200])
    return problems


def base_names(values) -> dict:
    """A dictionary of paths without their folders; empty for anything else."""
    return {Path(name).name: value for name, value in values.items()} if isinstance(values, dict) else {}


def track_problem(track: dict, info: dict, no_hash: bool = False) -> str:
    """Why a run cannot belong to a track, or nothing: its machine or its validation text is another one.

    no_hash: the run may lack the sha256 of its validation shards.
    """
    if track["hardware"] not in info["device"] or info["world_size"] != track["ranks"]:
        return (f"ran on {info['world_size']} x {info['device']}, the track is for {track['ranks']} x "
                f"{track['hardware']}" + "; start it with OMP_NUM_THREADS=2" * ("2 threads" in track["hardware"]))
    tokens = {point["tokens"] for point in info["val_losses"]} | {info["config"].get("val_tokens")}
    if tokens != {track["val_tokens"]}:
        return (f"was validated on {', '.join(sorted(map(str, tokens)))} tokens, the track says "
                f"{track['val_tokens']}")
    return data_problem(track, info, no_hash)


def data_problem(track: dict, info: dict, no_hash: bool) -> str:
    """What is wrong with the validation shards of a run: other names, sizes or hashes than the track's."""
    hashes, shards = base_names(info.get("data_sha256")), base_names(info["data"])
    if not hashes and not no_hash:
        return "does not say the sha256 of its validation shards (data_sha256 in run.json)"
    for name, pinned in track["val_data"].items():
        if name not in shards:
            return f"was validated on another file than the track's {name}"
        if shards[name] != pinned["tokens"]:
            return f"was validated on another file: {name} with {shards[name]} tokens, not {pinned['tokens']}"
        if hashes and (name not in hashes or (pinned["sha256"] and hashes[name] != pinned["sha256"])):
            return (f"was validated on another file: {name} has sha256 {str(hashes.get(name))[:12]}, the track's "
                    f"{pinned['sha256'][:12]}")
    odd = sorted(hashes.keys() - track["val_data"].keys())
    return f"was validated on another file: {odd[0]} is not the track's" if odd else training_problem(track, shards)


def training_problem(track: dict, shards: dict) -> str:
    """What is wrong with the names and sizes of the training shards, if the track fixes them, or nothing."""
    wanted = {name: shard["tokens"] for name, shard in track["train_data"].items()}
    found = {name: tokens for name, tokens in shards.items() if name not in track["val_data"]}
    if not wanted or found == wanted:
        return ""
    name = min(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    return f"was trained on another text: {name} with {found.get(name, 'no')} tokens, not {wanted.get(name, 'any')}"


def check_target(record: Record) -> list[str]:
    """A folder claims to be a record if and only if its runs show what its track asks for."""
    if not record.track:
        return []
    claim, (shown, sentence) = record.ledger.get("claim"), judge(record)
    if claim in ("record", "reference") and (claim == "record") == shown:
        return check_standing(record)
    return [f"runs.json claims a {claim}, but: {sentence}"]


def check_standing(record: Record) -> list[str]:
    """On a track with a time, a record is compared with the one that stood before it, as that one was."""
    if "seconds" not in record.track:
        return []
    before, said = standing_record(record.folder.resolve().parent, record), record.ledger.get("standing")
    name = said["record"] if said else None
    if name != (before.folder.name if before else None):
        return [f"runs.json says that the standing record was {name}, but it was {before and before.folder.name}"]
    if before and not same_arm(record, said["arm"], before):
        return [f"{said['arm']} did not run the script of {name} with its flags, so the pairs say nothing"]
    return []


def standing_record(track: Path, new: Record | None = None) -> Record | None:
    """The newest record of a track folder, or the newest before `new`; references do not count."""
    found = [read_record(path.parent) for path in track.glob("*/runs.json")]
    found = [record for record in found if record.ledger.get("claim") == "record"]
    if new:
        found = [record for record in found if record_order(record) < record_order(new)]
    return max(found, key=record_order, default=None)


def record_order(record: Record) -> tuple[str, bool, str, str]:
    """Sorts records by their date, then by when their first run began.

    Of those of one day the first record of a track comes first: its runs may also be the pairs of the next one.
    """
    compared = bool(record.ledger.get("standing"))
    return record.folder.name[:10], compared, record.runs[0].info["started"], record.folder.name


def same_arm(record: Record, arm: str, standing: Record) -> bool:
    """Whether an arm of a record has the files and the flags of the main arm of the standing record."""
    one, other = source_files(record.script(arm)), source_files(standing.script(standing.main))
    flags = [record.ledger["arms"][arm]["flags"], standing.ledger["arms"][standing.main]["flags"]]
    return (flags[0] == flags[1] and [path.name for path in one] == [path.name for path in other]
            and [unix_lines(read_text(path, MAX_JSON)) for path in one]
            == [unix_lines(read_text(path, MAX_JSON)) for path in other])


def check_readme(record: Record) -> list[str]:
    """The generated parts of the README are what the logs give, and no number beside them comes from elsewhere."""
    text, parts = unix_lines(read_text(record.folder / "README.md", MAX_JSON)), regions(record)
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
        if "FILL IN" in line:
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
        done = subprocess.run([sys.executable, str(GUARD), *arguments], capture_output=True,
                              env=child_environment() | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"})
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            problems.append((said or [f"guard.py ends with {done.returncode}"])[-1])
    return problems


if __name__ == "__main__":
    print(__doc__.strip())
