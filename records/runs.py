"""What runs say: run folders and ledgers as they are on disk, and the tables and sentences made of them.

This is a module of records.py, not a command: python records/records.py --help lists the commands.

A run folder holds run.json and log.txt. A folder with runs.json, the ledger of all runs that were started, is a record
or a comparison. A record belongs to the track whose track.json lies in the folder above. A comparison has no track.
These files may come from strangers. They are read up to a size, their types are checked, and a bad one raises
UserError.
"""
import hashlib
import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from student import describe, detectable, interval, needed_n, t_test

MAX_JSON, MAX_LOG, MAX_RUNS = 4 << 20, 64 << 20, 1000    # bytes, bytes, runs in a ledger
COMPANIONS = ("harness.py", "triton_kernels.py")         # what scripts import from their folder, in a log's order;
#                                                          harness.py only in older records
LEAST = 3                                                # runs or pairs that a verdict needs: two can agree by chance
SLOWER = 0.01                                            # how much longer a record may train than the standing one
LOSS_STEP, TIME_STEP = 1e-6, 1e-3                        # what the numbers of logs are rounded to: nats, seconds
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")    # of a folder in a record
SCRIPT = re.compile(r"[\w(\[][\w .,+~()\[\]-]{0,95}\.py")   # of a training script
REGION = re.compile(r"(<!-- records\.py: (\w+) -->\n)(.*?)(<!-- end -->)", re.S)


class UserError(Exception):
    """Something the user can put right. Its text names the thing, the value and the remedy; the exit code is 2."""

    def __str__(self):                   # a line that a terminal only shows, whatever a file or a flag put into it
        line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(super().__str__().split()))
        return line if len(line) <= 1000 else f"{line[:600]} ... {line[-300:]}"


# -----------------------------------------------------------------------------
# Files

def user_path(text: str) -> Path:
    """A path as a user types it, `~` included; raises UserError."""
    if not text:
        raise UserError("a path is empty; name a file or folder")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text}: the home folder of ~ is not known; write the path in full") from None


def read_text(path: Path, limit: int) -> str:
    """The text of a plain file of at most `limit` bytes; raises UserError."""
    try:
        if path.is_symlink() or not path.is_file():
            raise UserError(f"{path} is not there, or not a plain file")
        with open(path, "rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise UserError(f"{path} has more than {limit} bytes, which no such file needs")
        return content.decode()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None


def read_json(path: Path) -> dict:
    """The JSON object in a file, all of whose numbers are finite; raises UserError."""
    def refuse(text):
        raise ValueError(f"it holds {text}")

    def finite(text):
        return float(text) if math.isfinite(float(text)) else refuse(text)
    try:
        value = json.loads(read_text(path, MAX_JSON), parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({str(error)[:80]})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value


def check_fields(values, fields: dict, where):
    """Raises UserError unless each named field is there with its type; float takes whole numbers too, from 0 up."""
    for name, kind in fields.items():
        value = values.get(name) if isinstance(values, dict) else None
        good = isinstance(value, (int, float) if kind is float else kind) and (kind is bool) == isinstance(value, bool)
        if not good or (kind in (int, float) and not 0 <= value < 1e15):
            raise UserError(f"{where} has {name} {str(value)[:40]!r}, which should be of type {kind.__name__}")


def write_text(path: Path, text: str):
    """Writes UTF-8 under a temporary name, then renames, so that a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)    # it may be a link, which writing would follow
    with open(temporary, "x", encoding="utf-8", errors="backslashreplace", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def unix_lines(text: str) -> str:
    """The text with line ends of Windows (CRLF) as plain line ends."""
    return text.replace("\r\n", "\n")


def sha256(path: Path) -> str:
    """sha256 of a file in hexadecimal; raises UserError for anything but a file, such as a pipe, which never ends."""
    if not path.is_file():
        raise UserError(f"{path} is not there, or not a file")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_files(script: Path) -> list[Path]:
    """A training script and the companions beside it."""
    return [script, *filter(Path.is_file, map(script.with_name, COMPANIONS))]


def source_hashes(contents: list[bytes]) -> set[str]:
    """sha256 of the contents, joined: as they are, with plain line ends, and with line ends of Windows.

    Git may change line ends when files are checked out. They do not change what a script does.
    """
    plain = [content.replace(b"\r\n", b"\n") for content in contents]
    windows = [content.replace(b"\n", b"\r\n") for content in plain]
    return {hashlib.sha256(b"".join(form)).hexdigest() for form in (contents, plain, windows)}


# -----------------------------------------------------------------------------
# Runs, and ledgers of runs

ALWAYS = {"status": str, "script": str, "argv": list, "config": dict, "source_sha256": str, "seed": int, "device": str,
          "versions": dict, "world_size": int, "gpu": str, "started": str, "val_losses": list}
AT_THE_END = {"train_time_ms": int, "compile_seconds": float, "recompiles": int, "tokens_seen": int,
              "peak_memory_gib": float, "data": dict}
POINT = {"step": int, "train_time_ms": int, "val_loss": float, "tokens": int}
ENTRY = {"arm": str, "seed": int, "status": str, "counted": bool, "why": str}


@dataclass(frozen=True)
class Run:
    """One run folder, and what the ledger says of it."""
    folder: Path
    info: dict                           # run.json
    arm: str = ""
    counted: bool = True
    why: str = ""                        # why it is not counted

    loss = property(lambda self: self.info["val_losses"][-1]["val_loss"])
    steps = property(lambda self: self.info["val_losses"][-1]["step"])
    seconds = property(lambda self: self.info["train_time_ms"] / 1000)
    seed = property(lambda self: self.info["seed"])
    finished = property(lambda self: self.info["status"] == "finished")
    flags = property(lambda self: own_flags(self.info["argv"]))

    def sources(self, script: Path) -> list[Path]:
        """The files that ran, as far as run.json names them, where the script is `script`."""
        return [script if name == self.info["script"] else script.with_name(name)
                for name in self.info.get("sources", [self.info["script"]])]

    def source_problem(self, script: Path) -> tuple[str, str] | None:
        """How `script` and the files beside it differ from what ran: (what is here, the sha256 that ran), or None."""
        paths, said = self.sources(script), self.info.get("sources", {})
        contents = [read_text(path, MAX_JSON).encode() for path in paths]
        for path, content, digest in zip(paths, contents, said.values()):
            if digest not in source_hashes([content]):
                return f"{path.name} has sha256 {hashlib.sha256(content).hexdigest()[:12]}", digest[:12]
        if self.info["source_sha256"] in source_hashes(contents):
            return None
        names, digest = " with ".join(path.name for path in paths), hashlib.sha256(b"".join(contents)).hexdigest()
        return f"{names} has sha256 {digest[:12]}", self.info["source_sha256"][:12]

    def curve(self) -> np.ndarray:
        """(validations, 4): step, training seconds, tokens, loss."""
        points = self.info["val_losses"]
        return np.array([(p["step"], p["train_time_ms"] / 1000, tokens_after(self.info["config"], p["step"]),
                          p["val_loss"]) for p in points])


def own_flags(argv: list) -> list[str]:
    """The flags that the runs of an arm have in common."""
    return [str(arg) for arg in argv if not str(arg).startswith(("--seed=", "--out_dir="))]


def tokens_after(config: dict, step: int) -> int:
    """Training tokens of the first `step` steps, by the stage table of a run."""
    if "stages" not in config:           # a script with one batch size
        return step * config.get("batch_tokens", 0)
    total, begin = 0, 0
    for row in config.get("stages", []):
        end = round(row["until"] * config["num_iterations"])
        total, begin = total + max(0, min(step, end) - begin) * row["batch_tokens"], end
    return total


def read_run(folder: Path, **ledger) -> Run:
    """The run in a folder; raises UserError if its run.json lacks what a table needs."""
    path = folder / "run.json"
    info = read_json(path)
    check_fields(info, ALWAYS | (AT_THE_END if info.get("status") == "finished" else {}), path)
    points = info["val_losses"]
    for point in points:
        check_fields(point, POINT, f"{path}, val_losses")
    if not all(isinstance(arg, str) for arg in info["argv"]):
        raise UserError(f"{path} has an argv that is not a list of words")
    for name, kind in (("data", int), ("data_sha256", str), ("sources", str)):
        check_fields(info | {name: info.get(name, {})}, {name: dict}, path)
        check_fields(info.get(name, {}), dict.fromkeys(info.get(name, {}), kind), f"{path}, {name}")
    if not SCRIPT.fullmatch(info["script"]):
        raise UserError(f"{path} has script {info['script'][:60]!r}, which is not the name of a Python file")
    odd = sorted(info.get("sources", {}).keys() - {info["script"], *COMPANIONS})
    if odd or info["script"] not in info.get("sources", {info["script"]: ""}):
        raise UserError(f"{path} has sources {', '.join(info['sources'])[:60]!r}; they must be {info['script'][:60]} "
                        f"and may be {' and '.join(COMPANIONS)}")
    if info["status"] == "finished" and not info["train_time_ms"]:
        raise UserError(f"{path} says that a finished run trained for 0 ms, so no time can be compared with it")
    steps = [point["step"] for point in points]
    if steps != sorted(set(steps)) or (info["status"] == "finished" and len(points) < 2):
        raise UserError(f"{path} has validations at steps {str(steps)[:60]}; steps must rise, and a finished run has "
                        "at least two")
    try:
        tokens_after(info["config"], 1)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
        raise UserError(f"{path} has a config whose stage table cannot be read") from None
    return Run(folder, info, **ledger)


@dataclass(frozen=True)
class Record:
    """A folder with a ledger: a record of a track, or a comparison, which has none."""
    folder: Path
    ledger: dict                         # runs.json
    runs: list[Run]                      # in the ledger's order; only those that left a folder
    track: dict = field(default_factory=dict)

    def of_arm(self, arm: str) -> list[Run]:
        """The runs of an arm that count."""
        return [run for run in self.runs if run.arm == arm and run.counted]

    def script(self, arm: str) -> Path:
        return self.folder / self.ledger["arms"][arm]["script"]

    @property
    def main(self) -> str:
        """The arm that the record is about: the first one."""
        return next(iter(self.ledger["arms"]))


def read_record(folder: Path) -> Record:
    """The record or comparison in a folder; raises UserError if its ledger is not sound or a run is missing."""
    path = folder / "runs.json"
    ledger = read_json(path)
    check_fields(ledger, {"kind": str, "arms": dict, "runs": list}, path)
    if ledger.get("format") not in (1, 2, 3) or ledger["kind"] not in ("record", "comparison"):
        raise UserError(f"{path} has format {str(ledger.get('format'))[:20]} and kind {ledger['kind'][:20]!r}; known "
                        "are formats 1 to 3, and the kinds record and comparison")
    if not ledger["arms"] or len(ledger["runs"]) > MAX_RUNS:
        raise UserError(f"{path} has no arms, or more than {MAX_RUNS} runs")
    if ledger["kind"] == "comparison":
        check_fields(ledger, {"p": float, "looks": list}, path)
        if not 0 < ledger["p"] < 0.5:
            raise UserError(f"{path} has p {ledger['p']}; the level of a test is above 0 and below 0.5")
    for name, arm in ledger["arms"].items():
        check_fields(arm, {"script": str, "flags": list}, f"{path}, arm {name}")
        check_fields({"edits": []} | arm, {"edits": list}, f"{path}, arm {name}")
        parts = arm["script"].split("/")
        in_folder = SCRIPT.fullmatch(parts[-1]) and (len(parts) == 1 or (len(parts) == 2 and NAME.fullmatch(parts[0])))
        if not in_folder or not all(isinstance(f, str) for f in arm["flags"]):
            raise UserError(f"{path} has the script {arm['script'][:60]!r}, which is no file of the folder, or flags "
                            "that are not strings")
    if ledger.get("standing") is not None:
        check_fields(ledger["standing"], {"record": str, "arm": str}, f"{path}, standing")
        if ledger["standing"]["arm"] not in ledger["arms"]:
            raise UserError(f"{path} has no arm {ledger['standing']['arm'][:40]!r}, which it says is the standing one")
    runs = []
    for entry in ledger["runs"]:
        check_fields(entry, ENTRY, f"{path}, runs")
        if entry["arm"] not in ledger["arms"] or not (entry["counted"] or entry["why"].strip()):
            raise UserError(f"{path}: a run of arm {entry['arm'][:40]!r}, seed {entry['seed']} has no such arm, or is "
                            "not counted without saying why")
        name = entry.get("folder")
        if name is None and not entry["counted"]:
            continue                     # it was started and left nothing
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UserError(f"{path} has a run folder {str(name)[:60]!r}; it must be a folder beside it")
        if not (folder / name / "run.json").is_file():
            raise UserError(f"{path} lists the run {name}, which is not there: a dropped run")
        runs.append(read_run(folder / name, arm=entry["arm"], counted=entry["counted"], why=entry["why"]))
        if entry["counted"] and not runs[-1].finished:
            raise UserError(f"{path} counts the run {name}, which is {runs[-1].info['status'][:20]}")
    record = Record(folder, ledger, runs, read_track(folder.resolve().parent) if ledger["kind"] == "record" else {})
    if record.track and not record.of_arm(record.main):
        raise UserError(f"{path} has no run of {record.main}, its first arm, that counts")
    return record


def read_track(folder: Path) -> dict:
    """The track.json of a track folder; raises UserError.

    A track asks for a target loss in the shortest time, or, if it has `seconds`, for the lowest loss in that time.
    """
    path = folder / "track.json"
    track = read_json(path)
    kind = {"seconds": float} if "seconds" in track else {"target": float}
    check_fields(track, {"title": str, "p": float, "val_tokens": int, "val_data": dict, "ranks": int, "hardware": str,
                         "text": str, "commands": list, "exempt": dict} | kind, path)
    if not 0 < track["p"] < 0.5:
        raise UserError(f"{path} has p {track['p']}; the level of a test is above 0 and below 0.5")
    track = {"train_data": {}, "flags": []} | track
    check_fields(track, {"train_data": dict, "flags": list}, path)
    for name, shard in [*track["val_data"].items(), *track["train_data"].items()]:
        check_fields(shard, {"sha256": str, "tokens": int}, f"{path}, {name}")
    if not all(isinstance(flag, str) and flag.startswith("--") for flag in track["flags"]):
        raise UserError(f"{path} has flags that do not begin with --")
    return track | {"name": folder.name}


def run_folders(path: Path) -> list[Path]:
    """The run folders that a path names: itself, or those in it; raises UserError if there are none, or too many."""
    found = [path] if (path / "run.json").is_file() else sorted(p.parent for p in path.glob("*/run.json"))
    if not found:
        raise UserError(f"no run.json in {path} or its folders; name run folders, as in logs/*")
    if len(found) > MAX_RUNS:
        raise UserError(f"{path} has {len(found)} runs, more than {MAX_RUNS}; name fewer")
    return found


def skipped_folders(paths: list[Path]) -> list[Path]:
    """Folders inside the paths that hold no run, record or comparison."""
    parents = [path for path in paths if not (path / "run.json").is_file() and not (path / "runs.json").is_file()]
    return [child for path in parents for child in sorted(path.glob("*/")) if not (child / "run.json").is_file()]


def collect(paths: list[Path]) -> list[Run]:
    """The runs below some folders, each once and with the name of its arm; raises UserError if a path has none."""
    runs, loose = [], {}
    for path in paths:
        if (path / "runs.json").is_file():
            record = read_record(path)
            runs += [replace(run, arm=arm_label(path, run.arm, paths)) for run in record.runs]
        else:
            loose |= {folder.resolve(): read_run(folder) for folder in run_folders(path)}
    kinds = {run.folder: (Path(run.info["script"]).stem, run.info["source_sha256"], tuple(run.flags))
             for run in loose.values()}
    shared = set.intersection(*(set(kind[2]) for kind in kinds.values())) if kinds else set()
    sources = Counter(kind[0] for kind in {kind[:2] for kind in kinds.values()})
    for run in loose.values():           # named by what differs: script, source, flags
        stem, source, flags = kinds[run.folder]
        words = [stem, source[:6] if sources[stem] > 1 else "", *(flag for flag in flags if flag not in shared)]
        why = "" if run.finished else f"{run.info['status']} {str(run.info.get('error', ''))[:150]}".strip()
        runs.append(replace(run, arm=" ".join(filter(None, words)), counted=run.finished, why=why))
    if not runs:
        raise UserError(f"{', '.join(map(str, paths))[:200]} lists no run that left a folder; name run folders")
    return runs


def arm_label(path: Path, arm: str, paths: list[Path]) -> str:
    """The name of an arm of the record `path` among several paths."""
    return f"{path.resolve().name} {arm}" if len(paths) > 1 else arm


def lost_runs(paths: list[Path]) -> list[dict]:
    """The entries of ledgers among the paths whose runs were started and left nothing."""
    return [entry | {"arm": arm_label(path, entry["arm"], paths)} for path in paths if (path / "runs.json").is_file()
            for entry in read_record(path).ledger["runs"] if entry.get("folder") is None]


# -----------------------------------------------------------------------------
# Tables

def seconds_text(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds >= 10 else f"{seconds:.3f}"


def p_text(p: float) -> str:
    """Two digits, three where two would be the limit of a record itself."""
    short = f"{p:.2g}" if p < 0.1 else f"{p:.2f}"
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.3g}" if short == "0.01" else f"p = {short}"


def table(header: str, rows: list[list]) -> str:
    """A Markdown table; header cells that end in ':' are aligned to the right."""
    cells = header.split(" | ")
    lines = [[cell.rstrip(":") for cell in cells], ["--:" if cell.endswith(":") else "---" for cell in cells], *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |" for row in lines)


def arms_table(runs: list[Run], target: float = 0) -> str:
    """One row an arm, over the runs that count."""
    rows = []
    for arm in dict.fromkeys(run.arm for run in runs):
        counted = [run for run in runs if run.arm == arm and run.counted]
        if not counted:
            rows.append([arm, 0, *"-----", *"--"[:1 + bool(target)]])
            continue
        n, loss, loss_sd = describe(run.loss for run in counted)
        low, high = interval([run.loss for run in counted], 0.95)
        _, seconds, seconds_sd = describe(run.seconds for run in counted)
        test = [p_text(t_test([run.loss for run in counted], target)) if n > 1 else "-"] if target else []
        rows.append([arm, n, f"{loss:.4f}", f"{loss_sd:.4f}" if n > 1 else "-",
                     f"{low:.4f} to {high:.4f}" if n > 1 else "-", *test, seconds_text(seconds),
                     seconds_text(seconds_sd) if n > 1 else "-"])
    test = f"below {target:g}?: | " if target else ""
    return table(f"arm | n: | validation loss: | sd: | 95 % interval: | {test}training time, s: | sd:", rows)


def runs_table(runs: list[Run], lost: list[dict] = ()) -> str:
    """One row a run, also of those that are not counted."""
    rows = []
    for run in runs:
        row = [run.folder.name, run.arm, run.seed]
        if run.finished:
            rate = run.info["tokens_seen"] / max(run.seconds, 1e-9)
            row += [run.steps, f"{run.loss:.6f}", seconds_text(run.seconds), f"{rate:,.0f}",
                    f"{run.info['compile_seconds']:.1f}", f"{run.info['peak_memory_gib']:.1f}"]
        else:
            row += [run.info["val_losses"][-1]["step"] if run.info["val_losses"] else "-", *"-----"]
        rows.append(row + ["yes" if run.counted else f"no: {run.why}"])
    rows += [["-", entry["arm"], entry["seed"], *"------", f"no: {entry['why']}"] for entry in lost]
    return table("run | arm | seed: | steps: | validation loss: | training time, s: | tokens/s: | compilation, s: | "
                 "memory, GiB: | counted", rows)


def result_text(record: Record) -> str:
    """The sentences a record is about."""
    runs = record.of_arm(record.main)
    n, loss, sd = describe(run.loss for run in runs)
    _, seconds, seconds_sd = describe(run.seconds for run in runs)
    spread = (f"sd {sd:.4f}, n = {n}", f" (sd {seconds_text(seconds_sd)})") if n > 1 else ("n = 1", "")
    text = (f"**{loss:.4f}** ({spread[0]}) after {runs[0].steps} steps in **{seconds_text(seconds)} s**{spread[1]} of "
            f"training on {runs[0].info['world_size']} x {runs[0].info['device']}.")
    return f"{text} {judge(record)[1]}"


def judge(record: Record) -> tuple[bool, str]:
    """(whether the runs show what a record of their track must show, the sentence that says so)."""
    if "seconds" in record.track:
        return judge_pairs(record)
    losses, track = [run.loss for run in record.of_arm(record.main)], record.track
    n, loss, sd = describe(losses)
    p = t_test(losses, track["target"], floor=LOSS_STEP / math.sqrt(12))
    more = needed_n((track["target"] - loss) / sd, track["p"], sides=1) if sd > 0 else None
    words = claim_of_format_1 if record.ledger["format"] == 1 else claim_text
    return n >= LEAST and p < track["p"], words(n, p, track, more)


def judge_pairs(record: Record) -> tuple[bool, str]:
    """`judge` for a track that asks for the lowest loss in a given time.

    The first record keeps within that time. Each later one has a lower loss than the standing record in pairs of runs
    on one machine, and takes no more time than it.
    """
    track, runs, standing = record.track, record.of_arm(record.main), record.ledger.get("standing")
    if not standing:
        slowest = max(run.seconds for run in runs)
        if len(runs) < LEAST:
            return False, f"A reference, not a record. The first record of a track needs {LEAST} runs."
        if slowest > track["seconds"]:
            return False, (f"A reference, not a record. Its slowest run trains for {seconds_text(slowest)} s, and "
                           f"{track['seconds']:g} s are allowed.")
        return True, f"A record, the first one of its track: no run trains for more than {track['seconds']:g} s."
    pairs = pairs_of(record, standing["arm"])
    if len(pairs) < LEAST:
        return False, f"A reference, not a record. It takes {LEAST} pairs of runs with {standing['record']}."
    losses = [own.loss - other.loss for own, other in pairs]
    times = [math.log(own.seconds / other.seconds) for own, other in pairs]
    loss = Verdict(record.main, "loss", losses, False, track["p"], LOSS_STEP)
    time = Verdict(record.main, "time", times, True, track["p"])
    good = loss.words == "better" and math.expm1(time.mean) <= SLOWER
    low, high = map(loss.show, loss.interval)
    return good, (f"{'A record' if good else 'A reference, not a record'}. In {len(pairs)} pairs with "
                  f"{standing['record']} on this machine the loss differs by {loss.show(loss.mean)} ({low} to {high} "
                  f"at {100 * (1 - track['p']):g} %, {p_text(loss.p)}) and the training time by {time.show(time.mean)}."
                  f" A record needs a lower loss at p < {track['p']:g} in at most {100 * SLOWER:g} % more time.")


def claim_text(n: int, p: float, track: dict, more: int | None) -> str:
    """Why a record is one, or why it is a reference; `more`: how many runs would show it."""
    if n >= LEAST and p < track["p"]:
        return (f"A record: the {n} runs show that the mean loss is below the target {track['target']:g} "
                f"({p_text(p)}; a record needs p < {track['p']:g}).")
    text = f"A reference, not a record. A record must show that its mean loss is below {track['target']:g}"
    if n < LEAST:
        return text + (", and one run cannot show that." if n == 1 else f", which takes {LEAST} runs.")
    text += f" at p < {track['p']:g}. These {n} runs give {p_text(p)}."
    return text + (f" About {more} runs with this mean and sd would show it." if more else
                   " More runs with this mean and sd would not show it.")


def claim_of_format_1(n: int, p: float, track: dict, more: int | None) -> str:
    """The same in the words of older records, whose READMEs stay as they are."""
    if n == 1:
        return f"A reference, not a record: one run cannot show that the mean is below {track['target']:g}."
    if p < track["p"]:
        return f"Mean loss below the target {track['target']:g}: {p_text(p)}."
    more = f"about {more} runs with this mean and sd would show it" if more else "more runs of this kind would not help"
    return (f"A reference, not a record: that the mean loss is below {track['target']:g} is not shown at p < "
            f"{track['p']:g} ({p_text(p)}); {more}.")


def setup_text(record: Record) -> str:
    """Hardware, versions, data and commands, from the logs."""
    lines = []
    for arm, plan in record.ledger["arms"].items():
        runs = record.of_arm(arm) or [run for run in record.runs if run.arm == arm]
        if not runs:
            continue
        info = runs[0].info
        start = "python" if info["world_size"] == 1 else f"torchrun --standalone --nproc_per_node={info['world_size']}"
        seeds = ", ".join(str(run.seed) for run in runs)
        command = " ".join([start, quoted(plan["script"]), *map(quoted, plan["flags"]), f"--seed=N    # N: {seeds}"])
        versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
        gpus = sorted({run.info["gpu"].splitlines()[-1] for run in runs if run.info["gpu"]})
        lines += [f"{arm}: {info['world_size']} x {info['device']}; {versions}."
                  + f" GPU (name, driver, memory, clocks, power limit): {'; '.join(gpus)}." * bool(gpus),
                  f"```\n{command}\n```", *(f"- text edit: `{edit}`" for edit in plan.get("edits", []))]
    hashes = {name: digest for run in record.runs for name, digest in run.info.get("data_sha256", {}).items()}
    shards = {name: size for run in record.runs for name, size in run.info.get("data", {}).items()}
    lines += [f"- `{name}`: {size:,} tokens" + (f", sha256 `{hashes[name]}`" if name in hashes else "")
              for name, size in sorted(shards.items())]
    exempt = record.track.get("exempt", {}).get(record.folder.resolve().name, {})
    return "\n".join(lines + [f"- not proven by the logs: {reason}" for reason in exempt.values()])


def quoted(flag: str) -> str:
    """A flag as one types it in a shell."""
    return flag if re.fullmatch(r"[\w=.,/:+-]+", flag) else "'" + flag.replace("'", "'\\''") + "'"


@dataclass(frozen=True)
class Verdict:
    """What the pairs of an arm and the reference say about one measure. Lower is better in all of them."""
    arm: str
    measure: str                         # "time", "loss" or "time at equal loss"
    differences: list[float]             # arm - reference of each pair; of logarithms if relative
    relative: bool
    level: float                         # p at which a difference counts
    step: float = 0.0                    # what the two numbers of a pair are rounded to

    floor = property(lambda self: self.step / math.sqrt(6))      # sd of the difference of two rounding errors
    p = property(lambda self: t_test(self.differences, sides=2, floor=self.floor))
    interval = property(lambda self: interval(self.differences, 1 - self.level, floor=self.floor))
    mean = property(lambda self: describe(self.differences)[1])
    sd = property(lambda self: max(describe(self.differences)[2], self.floor))

    @property
    def words(self) -> str:
        if self.p >= self.level:
            return "not distinguishable"
        return "better" if self.mean < 0 else "worse"

    @property
    def pairs_needed(self) -> int | None:
        """Pairs that would show a difference of this size in four comparisons of five; None: more than 1000."""
        return needed_n(abs(self.mean) / self.sd, self.level) if self.sd > 0 else None

    @property
    def visible(self) -> float:
        """The smallest difference that so many pairs show in four comparisons of five."""
        return detectable(len(self.differences), self.level) * self.sd

    def show(self, value: float) -> str:
        """A difference as text: in percent if relative. A loss that is not 0 is never shown as 0."""
        if not self.relative:
            digits = 4 if abs(value) >= 5e-5 else 7
            return f"{value:+.{digits}f}"
        if value > math.log(10):
            return f"{math.exp(value):.3g}-fold" if value < math.log(1e6) else "more than a million-fold"
        return f"{100 * math.expm1(value):+.2f} %"

    def row(self) -> list[str]:
        """The cells of this verdict in the table."""
        if not self.differences:
            return [self.arm, self.measure, *"----", "not defined: one run ends above the loss the other starts with",
                    *"--"]
        low, high = self.interval
        p = p_text(self.p).removeprefix("p = ").removeprefix("p ")
        words, more = f"**{self.words}**", ["-", "-"]
        if self.words == "not distinguishable":
            words = self.words
            if any(self.differences):
                more = [self.pairs_needed or "> 1000", self.show(self.visible)]
            else:
                words += ", the same in every pair"
        return [self.arm, self.measure, self.show(self.mean), f"{self.show(low)} to {self.show(high)}", p,
                len(self.differences), words, *more]


def pairs_of(record: Record, arm: str) -> list[tuple[Run, Run]]:
    """(run of the first arm, run of `arm`) of each seed that both finished with."""
    ones, others = ({run.seed: run for run in record.of_arm(name)} for name in (record.main, arm))
    return [(ones[seed], others[seed]) for seed in sorted(ones.keys() & others.keys())]


def same_losses(record: Record, arm: str) -> bool:
    """Whether an arm differs from the first one, but has all of its validation losses, in every pair."""
    pairs = pairs_of(record, arm)
    return bool(pairs) and all(
        (a.info["source_sha256"], a.flags) != (b.info["source_sha256"], b.flags)
        and [(point["step"], point["val_loss"]) for point in a.info["val_losses"]]
        == [(point["step"], point["val_loss"]) for point in b.info["val_losses"]] for a, b in pairs)


def verdicts_of(record: Record, arm: str) -> list[Verdict]:
    """Time, loss, and time at equal loss of an arm against the first one; empty with fewer than LEAST pairs."""
    pairs, level = pairs_of(record, arm), record.ledger["p"]
    if len(pairs) < LEAST:
        return []
    times = [math.log(b.seconds / a.seconds) for a, b in pairs]
    losses = [b.loss - a.loss for a, b in pairs]
    equal = [equal_loss_times(a, b) for a, b in pairs]
    at_equal_loss = [] if None in equal else [math.log(b / a) for a, b in equal]
    step = TIME_STEP / min(min(a.seconds, b.seconds) for a, b in pairs)
    return [Verdict(arm, "time", times, True, level, step), Verdict(arm, "loss", losses, False, level, LOSS_STEP),
            Verdict(arm, "time at equal loss", at_equal_loss, True, level, step)]


def verdict_text(record: Record) -> str:
    """The verdicts of a comparison: one table, and a line for each thing to know about it."""
    first, *others = record.ledger["arms"]
    lines, level = [], record.ledger["p"]
    for arm in record.ledger["arms"]:
        bad = [run for run in record.runs if run.arm == arm and run.info["status"] == "diverged"]
        lines += [f"- **{arm} diverged** in {len(bad)} of {len(bad) + len(record.of_arm(arm))} runs. The verdicts are "
                  "over the other pairs."] * bool(bad)
    for arm in others:                   # older comparisons stay as they are
        if record.ledger["format"] >= 3 and same_losses(record, arm):
            pairs = len(pairs_of(record, arm))
            where = f"all {pairs} pairs" if pairs > 1 else "the one pair"
            lines.append(f"- **{arm} has the same losses as {first}** in {where}, to the last digit: with these flags "
                         "the change does not act on the losses. If it should, see whether these flags use what was "
                         "changed. A preset, for example, may have tables of its own.")
    found = {arm: verdicts_of(record, arm) for arm in others}
    rows = [verdict.row() for verdicts in found.values() for verdict in verdicts]
    if few := [arm for arm in others if not found[arm]]:
        lines.append(f"- no verdict for {', '.join(few)}: it takes {LEAST} finished rounds together with "
                     f"{first}.")
    if not rows:
        return "\n".join(lines)
    lines.append(f"- A difference is the arm minus {first}; lower is better. `pairs needed` would show a difference of "
                 "this size in four comparisons of five. These pairs show `visible from` as often.")
    looks = record.ledger["looks"]
    if len(looks) > 1:
        lines.append(f"- The tests were read after {', '.join(map(str, looks))} pairs. Adding pairs because of what "
                     "was seen makes chance findings more likely than p says.")
    if len(others) > 1:
        lines.append(f"- {len(others)} arms were tested against {first}. With more arms it is more likely that one "
                     "differs by chance: compare the best one again, alone.")
    head = table(f"arm | measure | difference to {first}: | {100 * (1 - level):g} % interval: | p: | pairs: | "
                 "verdict | pairs needed: | visible from:", rows)
    return "\n".join([head, "", *lines])


def results_table(record: Record) -> str:
    """One row an arm of a comparison: means over the runs that count, and a note on those that do not."""
    rows = []
    for arm in record.ledger["arms"]:
        result = arm_result(record, arm)
        numbers = ["-"] * 9
        if result["n"]:
            several = result["n"] > 1
            numbers = [result["steps"], f"{result['loss']:.4f}", f"{result['loss_sd']:.4f}" if several else "-",
                       seconds_text(result["seconds"]), seconds_text(result["seconds_sd"]) if several else "-",
                       f"{result['tokens_per_second']:,.0f}", f"{result['compile_seconds']:.1f}",
                       result["recompiles"], f"{result['peak_memory_gib']:.1f}"]
        rows.append([arm, result["n"], *numbers, result["note"]])
    return table("arm | n: | steps: | validation loss: | sd: | training time, s: | sd: | tokens/s: | compilation, s: | "
                 "recompiles: | memory, GiB: | note", rows)


def arm_result(record: Record, arm: str) -> dict:
    """The numbers of an arm: script, flags, edits, means over its runs that count, and a note on the others."""
    plan, runs = record.ledger["arms"][arm], record.of_arm(arm)
    result = {"arm": arm, "script": plan["script"], "flags": plan["flags"], "edits": plan.get("edits", []),
              "n": len(runs), "note": arm_note(record, arm)}
    if not runs:
        return result

    def mean(get):
        return describe(map(get, runs))[1]
    _, loss, loss_sd = describe(run.loss for run in runs)
    _, seconds, seconds_sd = describe(run.seconds for run in runs)
    return result | {
        "steps": runs[0].steps, "loss": loss, "loss_sd": loss_sd, "seconds": seconds, "seconds_sd": seconds_sd,
        "tokens_per_second": mean(lambda run: run.info["tokens_seen"] / max(run.seconds, 1e-9)),
        "compile_seconds": mean(lambda run: run.info["compile_seconds"]),
        "recompiles": max(run.info["recompiles"] for run in runs),
        "peak_memory_gib": max(run.info["peak_memory_gib"] for run in runs)}


def arm_note(record: Record, arm: str) -> str:
    """How the last run of an arm ended, if that run does not count; with its last validation, if there is one."""
    last = next((entry for entry in reversed(record.ledger["runs"]) if entry["arm"] == arm), None)
    if last is None or last["counted"]:
        return ""
    run = next((run for run in record.runs if run.folder.name == last.get("folder")), None)
    point = run.info["val_losses"][-1] if run and run.info["val_losses"] else None
    return last["why"] + (f"; loss {point['val_loss']:.4f} at step {point['step']}" if point else "")


def equal_loss_times(a: Run, b: Run) -> tuple[float, float] | None:
    """Training seconds at which each run first reaches the higher of the two final losses.

    Straight lines between validations; curves are convex, so the better run is granted too little rather than too much.
    None if one is there before its first step.
    """
    level, times = max(a.loss, b.loss), []
    for curve in (a.curve(), b.curve()):
        i = int(np.argmax(curve[:, 3] <= level))
        if i == 0:
            return None
        (_, t0, _, l0), (_, t1, _, l1) = curve[i - 1], curve[i]
        times.append(t0 + (t1 - t0) * (l0 - level) / (l0 - l1))
    return tuple(times)


def regions(record: Record) -> dict[str, str]:
    """The generated parts of a README, by the name of their markers."""
    lost = [entry for entry in record.ledger["runs"] if entry.get("folder") is None]
    target = record.track.get("target", 0)
    summary = arms_table(record.runs, target) if record.track else results_table(record)
    tables = summary + "\n\n" + runs_table(record.runs, lost)
    head = {"result": result_text(record)} if record.track else {"verdict": verdict_text(record)}
    parts = head | {"tables": tables, "setup": setup_text(record)}
    return {name: part.encode(errors="backslashreplace").decode() for name, part in parts.items()}


def fill(text: str, parts: dict[str, str]) -> str:
    """A README with its generated parts replaced."""
    return REGION.sub(lambda match: f"{match[1]}{parts.get(match[2], '')}\n{match[4]}", text)


def marked(name: str) -> str:
    return f"<!-- records.py: {name} -->\n<!-- end -->"


if __name__ == "__main__":
    print(__doc__.strip())
