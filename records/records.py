"""The archive of records and the tool that keeps it honest: every number in a table is computed from the logs.

    python records/records.py compare train_gpt.py my_idea.py --n=6 --preset=tiny      # better, worse, or noise?
    python records/records.py compare train_gpt.py --b_flags="--lr=1.2" --n=6          # one script, two sets of flags
    python records/records.py compare --noise train_gpt.py --n=6                       # the noise of this machine
    python records/records.py summarize logs/*                     # n, mean, sd, interval, test: a table in Markdown
    python records/records.py plot logs/* --out=curves             # curves.svg and curves.png
    python records/records.py new MyIdea --track=track_1_small logs/2026-*             # a record folder of these runs
    python records/records.py check --all                          # does every table say what its logs say?
    python records/records.py replay records/track_0_dev/2026-11-21_FirstRuns          # does it come out here too?
    python records/records.py board                                # writes records/README.md and history.svg

A run folder holds run.json and log.txt. A folder with runs.json, the ledger of all runs that were started, is a record
or a comparison; RUN below means either, or a folder of run folders. `COMMAND --help` explains a command.
"""
import argparse
import difflib
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
MAX_JSON, MAX_LOG, MAX_RUNS = 4 << 20, 64 << 20, 1000    # what strangers send is read up to here
RULE = "=" * 100 + "\n"                                  # ends each source at the head of a log
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
LINE = re.compile(r"^step:(\d{1,12})/(\d{1,12}) (train|val)_loss:(\S{1,40}) train_time:(\d{1,15})ms "
                  r"step_avg:(\d{1,15}\.\d\d)ms$", re.M)
REGION = re.compile(r"(<!-- records\.py: (\w+) -->\n)(.*?)(<!-- end -->)", re.S)


class UserError(Exception):
    """Something the user can put right. Its text names the thing, the value and the remedy; the exit code is 2."""


# -----------------------------------------------------------------------------
# Statistics (tests/test_records.py compares them with scipy's)

def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (Lentz's method)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    value, c, d = 1.0, 1.0, 0.0
    for i in range(1000):
        m = i // 2
        term = (1.0 if i == 0 else m * (b - m) * x / ((a + i - 1) * (a + i)) if i % 2 == 0
                else -(a + m) * (a + b + m) * x / ((a + i - 1) * (a + i)))
        d = 1 / (1 + term * d)
        c = 1 + term / c
        value *= c * d
        if i and abs(c * d - 1) < 1e-15:
            break
    return front * (value - 1)


def t_cdf(t: float, df: float) -> float:
    """Probability that Student's t with df degrees of freedom is at most t."""
    tail = incomplete_beta(df / 2, 0.5, df / (df + t * t)) / 2
    return 1 - tail if t > 0 else tail


def t_quantile(p: float, df: float) -> float:
    """The t that Student's t with df degrees of freedom stays below with probability p."""
    if p < 0.5:
        return -t_quantile(1 - p, df)
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p and high < 1e12:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return high


def describe(values) -> tuple[int, float, float]:
    """Number, mean and standard deviation (of a sample; 0 for a single value)."""
    values = list(values)
    mean = math.fsum(values) / len(values)
    return len(values), mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))


def interval(values, level: float, new: bool = False) -> tuple[float, float]:
    """Confidence interval of the mean; `new`: prediction interval for one further value. Infinite for one value."""
    n, mean, sd = describe(values)
    if n < 2:
        return -math.inf, math.inf
    width = t_quantile((1 + level) / 2, n - 1) * sd * math.sqrt(1 / n + new)
    return mean - width, mean + width


def t_test(values, center: float = 0.0, sides: int = 1) -> float:
    """p of a t-test; one side: that the mean is below `center`, two: that it differs. 1 for a single value.

    On differences of pairs this is the paired t-test.
    """
    n, mean, sd = describe(values)
    if n < 2:
        return 1.0
    if sd == 0:
        return float(mean >= center if sides == 1 else mean == center)
    t = (mean - center) / (sd / math.sqrt(n))
    return t_cdf(t, n - 1) if sides == 1 else 2 * t_cdf(-abs(t), n - 1)


def t_power(effect: float, n: int, p: float, sides: int = 2) -> float:
    """Probability that a t-test at level p shows an effect of so many standard deviations with n values.

    The noncentral t by integration: normal over chi, of which the chi is integrated numerically.
    """
    df, shift, limit = n - 1, effect * math.sqrt(n), t_quantile(1 - p / sides, n - 1)
    s = np.linspace(0, 1 + 9 / math.sqrt(df), 3001)[1:]
    log_density = (math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2) + (df - 1) * np.log(s) - df * s * s / 2)
    above = np.array([math.erfc((limit * x - shift) / math.sqrt(2)) / 2 for x in s])
    return float(np.sum(np.exp(log_density) * above) * (s[1] - s[0]))


def needed_n(effect: float, p: float, sides: int = 2, power: float = 0.8, most: int = 1000) -> int | None:
    """The smallest n with that power for an effect in standard deviations; None if it is above `most`."""
    if effect <= 0 or t_power(effect, most, p, sides) < power:
        return None
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if t_power(effect, middle, p, sides) >= power else (middle, high)
    return high


def detectable(n: int, p: float, power: float = 0.8) -> float:
    """The smallest effect, in standard deviations, that a two-sided t-test with n values shows with that power."""
    low, high = 0.0, 1.0
    while t_power(high, n, p) < power and high < 1e6:
        high *= 2
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if t_power(middle, n, p) >= power else (middle, high)
    return high


# -----------------------------------------------------------------------------
# Files

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
    """Writes under a temporary name, then renames, so that a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    steps = [point["step"] for point in points]
    if steps != sorted(set(steps)) or (info["status"] == "finished" and len(points) < 2):
        raise UserError(f"{path} has validations at steps {str(steps)[:60]}; they must rise, and end the run")
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
    if ledger["kind"] not in ("record", "comparison") or not ledger["arms"] or len(ledger["runs"]) > MAX_RUNS:
        raise UserError(f"{path} is of no kind known here, has no arms, or more than {MAX_RUNS} runs")
    for name, arm in ledger["arms"].items():
        check_fields(arm, {"script": str, "flags": list}, f"{path}, arm {name}")
        if not 1 <= len(parts := arm["script"].split("/")) <= 2 or not all(map(NAME.fullmatch, parts)):
            raise UserError(f"{path} has the script {arm['script'][:60]!r}; it must be a file in the folder")
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
    track = read_track(folder.resolve().parent) if ledger["kind"] == "record" else {}
    return Record(folder, ledger, runs, track)


def read_track(folder: Path) -> dict:
    """The track.json of a track folder; raises UserError."""
    path = folder / "track.json"
    track = read_json(path)
    check_fields(track, {"title": str, "target": float, "p": float, "val_tokens": int, "val_data": dict, "ranks": int,
                         "hardware": str, "text": str, "commands": list, "exempt": dict}, path)
    for name, shard in track["val_data"].items():
        check_fields(shard, {"sha256": str, "tokens": int}, f"{path}, {name}")
    return track | {"name": folder.name}


def collect(paths: list[Path]) -> list[Run]:
    """The runs below some folders, each with the name of its arm; raises UserError if there are none."""
    runs, loose = [], []
    for path in paths:
        if (path / "runs.json").is_file():
            record = read_record(path)
            prefix = f"{path.resolve().name} " if len(paths) > 1 else ""
            runs += [Run(run.folder, run.info, prefix + run.arm, run.counted, run.why) for run in record.runs]
        else:
            found = [path] if (path / "run.json").is_file() else sorted(p.parent for p in path.glob("*/run.json"))
            loose += [read_run(folder) for folder in found[:MAX_RUNS]]
    if not runs and not loose:
        raise UserError(f"no run.json under {', '.join(map(str, paths))}; name run folders, as in logs/")
    kinds = {run.folder: (Path(run.info["script"]).stem, run.info["source_sha256"], tuple(run.flags)) for run in loose}
    shared = set.intersection(*(set(kind[2]) for kind in kinds.values())) if kinds else set()
    sources = Counter(kind[0] for kind in {kind[:2] for kind in kinds.values()})
    for run in loose:                    # named by what differs: script, source, flags
        stem, source, flags = kinds[run.folder]
        words = [stem, source[:6] if sources[stem] > 1 else "", *(flag for flag in flags if flag not in shared)]
        why = "" if run.finished else run.info["status"]
        runs.append(Run(run.folder, run.info, " ".join(filter(None, words)), run.finished, why))
    return runs


# -----------------------------------------------------------------------------
# Tables

def seconds_text(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds >= 10 else f"{seconds:.3f}"


def p_text(p: float) -> str:
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"


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
    """The sentence a record is about."""
    runs, track = record.of_arm(record.main), record.track
    n, loss, sd = describe(run.loss for run in runs)
    _, seconds, seconds_sd = describe(run.seconds for run in runs)
    info, p = runs[0].info, t_test([run.loss for run in runs], track["target"])
    text = (f"**{loss:.4f}** (sd {sd:.4f}, n = {n}) after {runs[0].steps} steps in **{seconds_text(seconds)} s** (sd "
            f"{seconds_text(seconds_sd)}) of training on {info['world_size']} x {info['device']}.")
    if p < track["p"] and n > 1:
        return text + f" Mean loss below the target {track['target']:g}: {p_text(p)}."
    more = needed_n((track["target"] - loss) / sd, track["p"], sides=1) if sd > 0 else None
    more = f"about {more} runs with this mean and sd would show it" if more else "more runs of this kind would not help"
    return text + (f" A reference, not a record: that the mean loss is below {track['target']:g} is not shown at p < "
                   f"{track['p']:g} ({p_text(p) if n > 1 else 'n = 1'}); {more}.")


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
        command = " ".join([start, plan["script"], *map(quoted, plan["flags"]), f"--seed=N    # N: {seeds}"])
        versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
        gpus = sorted({run.info["gpu"].splitlines()[-1] for run in runs if run.info["gpu"]})
        lines += [f"{arm}: {info['world_size']} x {info['device']}; {versions}."
                  + f" GPU (name, driver, memory, clocks, power limit): {'; '.join(gpus)}." * bool(gpus),
                  f"```\n{command}\n```"]
    hashes = {name: digest for run in record.runs for name, digest in run.info.get("data_sha256", {}).items()}
    shards = {name: size for run in record.runs for name, size in run.info.get("data", {}).items()}
    lines += [f"- `{name}`: {size:,} tokens" + (f", sha256 `{hashes[name]}`" if name in hashes else "")
              for name, size in sorted(shards.items())]
    exempt = record.track.get("exempt", {}).get(record.folder.resolve().name, {})
    return "\n".join(lines + [f"- not proven by the logs: {reason}" for reason in exempt.values()])


def quoted(flag: str) -> str:
    """A flag as one types it in a shell."""
    return flag if re.fullmatch(r"[\w=.,/:+-]+", flag) else "'" + flag.replace("'", "'\\''") + "'"


def verdict_text(record: Record) -> str:
    """The paired verdicts of a comparison: one line for time, loss, and time at equal loss."""
    p = record.ledger["p"]
    arms = [{run.seed: run for run in record.of_arm(arm)} for arm in "AB"]
    pairs = [(arms[0][seed], arms[1][seed]) for seed in sorted(arms[0].keys() & arms[1].keys())]
    lines = []
    for arm in "AB":
        bad = [run for run in record.runs if run.arm == arm and run.info["status"] == "diverged"]
        lines += [f"- **{arm} diverged** in {len(bad)} of {len(bad) + len(record.of_arm(arm))} runs; the verdicts are "
                  "over the other pairs"] * bool(bad)
    if len(pairs) < 2:
        return "\n".join(lines + [f"- no verdict: {len(pairs)} finished pair(s), at least 2 are needed"])
    times = [math.log(b.seconds / a.seconds) for a, b in pairs]
    equal = [equal_loss_times(a, b) for a, b in pairs]
    lines.append(verdict("time", times, True, p))
    lines.append(verdict("loss", [b.loss - a.loss for a, b in pairs], False, p))
    if None in equal:
        lines.append("- time at equal loss: not defined, one ends above the loss that the other starts from")
    else:
        lines.append(verdict("time at equal loss", [math.log(b / a) for a, b in equal], True, p))
    looks = record.ledger["looks"]
    if len(looks) > 1:
        lines.append(f"- looked at after {', '.join(map(str, looks))} pairs: going on because of what was seen makes "
                     "chance findings likelier than p says")
    return "\n".join(lines)


def verdict(what: str, differences: list[float], relative: bool, p: float) -> str:
    """One line on the differences B - A of pairs, of logarithms if `relative`; lower is better."""
    def show(value):
        return f"{100 * math.expm1(min(value, 50)):+.2f} %" if relative else f"{value:+.4f}"
    n, mean, sd = describe(differences)
    low, high = interval(differences, 1 - p)
    found = t_test(differences, sides=2)
    effect = (f"B - A = {show(mean)} ({100 * (1 - p):g} % interval {show(low)} to {show(high)}, {p_text(found)}, "
              f"n = {n})")
    if found < p:
        return f"- **{what}: B is {'better' if mean < 0 else 'worse'}**, {effect}"
    if sd == 0:
        return f"- {what}: not distinguishable at n = {n}, the same in every pair"
    more = needed_n(abs(mean) / sd, p)
    more = f"{more} pairs" if more else "more than 1000 pairs"
    return (f"- {what}: not distinguishable at n = {n}, {effect}; a difference of this size needs {more}, {n} pairs show "
            f"{show(detectable(n, p) * sd)} or more (power 0.8)")


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
    tables = arms_table(record.runs, target) + "\n\n" + runs_table(record.runs, lost)
    head = {"result": result_text(record)} if record.track else {"verdict": verdict_text(record)}
    return head | {"tables": tables, "setup": setup_text(record)}


def fill(text: str, parts: dict[str, str]) -> str:
    """A README with its generated parts replaced."""
    return REGION.sub(lambda match: f"{match[1]}{parts.get(match[2], '')}\n{match[4]}", text)


def marked(name: str) -> str:
    return f"<!-- records.py: {name} -->\n<!-- end -->"


# -----------------------------------------------------------------------------
# Checking

def check_record(folder: Path, guard: bool = True) -> list[str]:
    """What is not true in a record or comparison, a line each; later checks are left out once one failed."""
    try:
        record = read_record(folder)
        for check in (check_ledger, check_sources, check_logs, check_arms, check_data, check_target, check_readme,
                      check_guard if guard else lambda record: []):
            if problems := check(record):
                return problems
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
        if entry["counted"] and entry["status"] != "finished":
            problems.append(f"{entry['folder']} is counted, but it is {entry['status']}")
    for arm in record.ledger["arms"]:
        seeds = {entry["seed"] for entry in record.ledger["runs"] if entry["arm"] == arm}
        gaps = sorted(set(range(min(seeds, default=0), max(seeds, default=0))) - seeds)[:5] if len(seeds) < MAX_RUNS else []
        problems += [f"runs.json has no run of {arm} with seed {', '.join(map(str, gaps))}: a dropped run"] * bool(gaps)
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
        script = record.script(run.arm)
        kernels = script.with_name("triton_kernels.py")
        needed = run.info["config"].get("kernels") is True and "kernels" not in exempt
        problem = log_problem(run, read_text(script, MAX_JSON),
                              read_text(kernels, MAX_JSON) if needed or kernels.is_file() else "", needed)
        files = entries[run.folder.name].get("sha256", {})
        changed = [name for name in ("run.json", "log.txt") if files.get(name) != sha256(run.folder / name)]
        if problem or changed:
            problems.append(f"{run.folder.name}: " + (problem or f"{changed[0]} is not the file that was listed in "
                                                      "runs.json (its sha256 differs)"))
    return problems


def log_problem(run: Run, script: str, kernels: str, needed: bool) -> str:
    """The first thing in which log.txt contradicts run.json or itself, or nothing."""
    log = read_text(run.folder / "log.txt", MAX_LOG)
    if not log.startswith(script + "\n" + RULE):
        return "log.txt does not begin with the script: another run's log"
    log = log[len(script) + 1 + len(RULE):]
    if needed and not log.startswith(kernels + "\n" + RULE):
        return "log.txt does not hold triton_kernels.py as it is here"
    lines = [(kind, int(step), int(total), loss, int(ms), float(avg))
             for step, total, kind, loss, ms, avg in LINE.findall(log.rpartition(RULE)[2])]
    for kind, step, total, loss, ms, avg in lines:
        if abs(avg - ms / max(step, 1)) > 0.5 / max(step, 1) + 0.0051:
            return f"log.txt has train_time {ms} ms at step {step}, its step_avg {avg} says {avg * step:.0f}"
    logged = [(step, loss, ms) for kind, step, _, loss, ms, _ in lines if kind == "val"]
    points = [(p["step"], f"{p['val_loss']:.6f}", p["train_time_ms"]) for p in run.info["val_losses"]]
    for said, (step, loss, ms) in zip(logged, points):
        if said != (step, loss, ms):
            return (f"run.json says a loss of {loss} after {ms} ms at step {step}, log.txt {said[1]} after {said[2]} ms "
                    f"at step {said[0]}")
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
            if run.steps != usual[0][0]:
                problems.append(f"{name} stops at step {run.steps}, the others at {usual[0][0]}: a longer or shorter run")
            elif run.flags != plan["flags"]:
                odd = sorted(set(run.flags) ^ set(map(str, plan["flags"])))[:3]
                problems.append(f"{name} did not run with the flags of {arm} in runs.json: {' '.join(odd)[:120]}")
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
            problems.append(f"{name} ran on {info['world_size']} x {info['device']}, the track is for {track['ranks']} x "
                            f"{track['hardware']}")
        tokens = {point["tokens"] for point in info["val_losses"]} | {info["config"].get("val_tokens")}
        if tokens != {track["val_tokens"]}:
            problems.append(f"{name} was validated on {tokens} tokens, the track says {track['val_tokens']}")
        problems += [f"{name} {problem}" for problem in [data_problem(record, info)] if problem]
    hashes = {json.dumps(base_names(run.info.get("data_sha256")), sort_keys=True) for run in record.runs if run.counted}
    if track and not problems and len(hashes) > 1:
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
    shown = t_test(losses, record.track["target"]) < record.track["p"]
    if claim not in ("record", "reference") or (claim == "record") != shown:
        return [f"runs.json claims a {claim}, but that the mean loss is below {record.track['target']:g} is "
                f"{'' if shown else 'not '}shown at p < {record.track['p']:g} ({p_text(t_test(losses, record.track['target']))}, "
                f"n = {len(losses)})"]
    return []


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
    problems, seen = [], set()
    for arm in record.ledger["arms"]:
        runs = record.of_arm(arm)
        key = (sha256(record.script(arm)), *record.ledger["arms"][arm]["flags"])
        if not runs or key in seen:
            continue
        seen.add(key)
        done = subprocess.run([sys.executable, str(HERE / "guard.py"), str(record.script(arm)),
                               f"--run={runs[0].folder / 'run.json'}"], capture_output=True, text=True,
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


def launch(script: Path, flags: list[str], ranks: int, out_dir: Path) -> tuple[int, Path | None, str]:
    """Runs a training script in a fresh folder: its exit code, its run folder, and the last line it printed.

    Ctrl-C and SIGTERM end the script first, which saves what it has, and then raise KeyboardInterrupt.
    """
    shutil.rmtree(out_dir, ignore_errors=True)
    out_dir.mkdir(parents=True)
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    with open(out_dir / "output.txt", "wb") as output:
        process = subprocess.Popen([sys.executable, *start, str(script), *flags, f"--out_dir={out_dir}"], stdout=output,
                                   stderr=subprocess.STDOUT, env=child_environment())
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    lines = (out_dir / "output.txt").read_bytes()[-4000:].decode(errors="replace").strip().splitlines()
    return code, next((path.parent for path in out_dir.glob("*/run.json")), None), (lines or [""])[-1]


def compare(args, flags: list[str]) -> int:
    """Alternates two scripts, or one with two sets of flags; writes the ledger as it goes and the verdict at the end."""
    plan = comparison_plan(args, flags)
    key = json.dumps([[sha256(path), path.name, arm_flags] for path, arm_flags in plan.values()] + [args.ranks])
    stems = dict.fromkeys(path.stem for path, _ in plan.values())
    folder = args.out or Path("logs") / f"compare_{'_'.join(stems)}_{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    ledger = open_comparison(folder, plan, args, key)
    for seed in range(args.n):
        pair = {run["arm"] for run in ledger["runs"] if run["seed"] == seed and run["status"] in ("finished", "diverged")
                and not run["why"].startswith("half a pair")}
        if pair == {"A", "B"}:
            continue
        for run in ledger["runs"]:       # a pair belongs together in time: half of one does not count
            if run["seed"] == seed and run["counted"]:
                run.update(counted=False, why="half a pair: the comparison was interrupted before the other half")
        for arm in "AB" if seed % 2 == 0 else "BA":
            run_half(folder, ledger, arm, seed, args)
    ledger["looks"] = sorted({*ledger["looks"], args.n})
    save_ledger(folder, ledger)
    record = read_record(folder)
    title = f"# {' against '.join(f'{arm}: ' + path.name for arm, (path, _) in plan.items())}"
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
    same = sha256(a) == sha256(b) and a_flags == b_flags
    if same != args.noise:
        raise UserError(f"A and B are {'the same' if same else 'different'}; " + (
            "change one, give --b_flags, or ask for the noise with --noise" if same else "--noise is for one script"))
    if args.n < 2 or args.ranks < 1 or not 0 < args.p < 0.5:
        raise UserError(f"--n={args.n} --ranks={args.ranks} --p={args.p:g}: at least 2 pairs, 1 rank, and p below 0.5")
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
        shutil.copy(path, folder / arm / path.name)
        if (kernels := path.with_name("triton_kernels.py")).is_file():
            shutil.copy(kernels, folder / arm / kernels.name)
    ledger = {"format": 1, "kind": "comparison", "p": args.p, "looks": [], "setup_sha256": digest, "runs": [],
              "arms": {arm: {"script": f"{arm}/{path.name}", "flags": flags} for arm, (path, flags) in plan.items()}}
    save_ledger(folder, ledger)
    return ledger


def save_ledger(folder: Path, ledger: dict):
    write_text(folder / "runs.json", json.dumps(ledger, indent=1) + "\n")


def run_half(folder: Path, ledger: dict, arm: str, seed: int, args):
    """One run of a comparison, listed before it starts; raises UserError if the script refuses to run."""
    entry = {"folder": None, "arm": arm, "seed": seed, "status": "killed", "counted": False,
             "why": "killed while it ran"}
    ledger["runs"].append(entry)
    save_ledger(folder, ledger)
    plan, name = ledger["arms"][arm], f"{arm}_seed{seed}"
    tries = sum(run["arm"] == arm and run["seed"] == seed for run in ledger["runs"])
    name += f"_{tries}" * (tries > 1)
    try:
        code, made, last = launch(folder / plan["script"], plan["flags"] + [f"--seed={seed}"], args.ranks,
                                  folder / ".running")
    except KeyboardInterrupt:
        entry.update(status="interrupted", why="interrupted while it ran")
        save_ledger(folder, ledger)
        raise
    if made:
        keep_run(made, folder / name)
        run = read_run(folder / name)
        entry.update(folder=name, status=run.info["status"].replace("running", "killed"), sha256=log_hashes(run.folder))
        entry.update(counted=run.finished, why="" if run.finished else f"{entry['status']}: {last[:200]}")
    else:
        entry.update(status="refused", why=f"exit code {code}: {last[:200]}")
    shutil.rmtree(folder / ".running")
    save_ledger(folder, ledger)
    if entry["status"] not in ("finished", "diverged"):
        raise UserError(f"{plan['script']} ends with exit code {code}: {last[:300]}")
    result = f"loss {run.loss:.6f} in {seconds_text(run.seconds)} s" if run.finished else "diverged"
    print(f"pair {seed + 1}/{args.n}, {arm}: {result}", flush=True)


def keep_run(source: Path, target: Path):
    """Copies what the archive keeps of a run folder: run.json and log.txt."""
    target.mkdir()
    for name in ("run.json", "log.txt"):
        shutil.copy(source / name, target / name)


def log_hashes(folder: Path) -> dict[str, str]:
    return {name: sha256(folder / name) for name in ("run.json", "log.txt")}


def replay(args, flags: list[str]) -> int:
    """Runs a record's own script with its own flags here, and says how loss and time compare."""
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
    print(f"replay of {args.record}: {arm}, {ranks} rank(s), {' '.join(plan)}", flush=True)
    done = []
    for seed in range(first, first + args.n):        # a seed of its own: another draw from the same distribution
        code, made, last = launch(script, plan + [f"--seed={seed}"], ranks, base / f"seed{seed}")
        if not made or code:
            raise UserError(f"{script.name} ends with exit code {code}: {last[:300]}")
        done.append(read_run(made))
        print(f"seed {seed}: loss {done[-1].loss:.6f} in {seconds_text(done[-1].seconds)} s", flush=True)
    print("\n".join(replay_report(record, runs, done)) + f"\nlogs are in {base}")
    return 0


def shortened_arm(record: Record, num_iterations: int) -> str:
    """The arm of a record with that many iterations; raises UserError that names the lengths there are."""
    lengths = {run.arm: run.info["config"].get("num_iterations") for run in record.runs if run.counted}
    for arm, length in lengths.items():
        if length == num_iterations:
            return arm
    raise UserError(f"--num_iterations={num_iterations}: {record.folder} has reference runs of "
                    f"{', '.join(map(str, sorted(set(lengths.values()))))} iterations only")


def replay_report(record: Record, runs: list[Run], done: list[Run]) -> list[str]:
    """Lines on what differs here, and whether loss and time lie where the record's runs predict one further run."""
    here, there = done[0].info, runs[0].info
    sides = [("GPU", "device"), ("ranks", "world_size")]
    values = [(name, there[key], here[key]) for name, key in sides]
    values += [(name, there["versions"].get(name), version) for name, version in here["versions"].items()]
    values += [(f"sha256 of {name}", base_names(there.get("data_sha256")).get(name, "not logged")[:12], digest[:12])
               for name, digest in base_names(here.get("data_sha256")).items()]
    values += [(f"tokens in {name}", base_names(there["data"]).get(name), tokens)
               for name, tokens in base_names(here["data"]).items()]
    lines = [f"differs: {name}: {was} there, {now} here" for name, was, now in values if was != now]
    lines = lines or ["GPU, ranks, versions and data are those of the record"]
    if len(runs) < 2:
        return lines + ["the record has one run: no distribution to compare with"]
    for what, get, unit in (("loss", lambda run: run.loss, ""), ("training time", lambda run: run.seconds, " s")):
        low, high = interval([get(run) for run in runs], 0.95, new=True)
        mean = describe(get(run) for run in runs)[1]
        for run in done:
            place = "lies in" if low <= get(run) <= high else "is below" if get(run) < low else "is above"
            lines.append(f"{what} {get(run):.4f}{unit} {place} {low:.4f} to {high:.4f}{unit}, where 95 % of further runs "
                         f"lie by the record's {len(runs)} (mean {mean:.4f}, this run {100 * (get(run) / mean - 1):+.2f} %)")
    return lines


# -----------------------------------------------------------------------------
# Pictures

STYLES = [dict(linestyle=style, color=color, linewidth=width) for style, color, width in (
    ("-", "#000000", 1.6), ("--", "#0072b2", 1.6), (":", "#a03000", 2.2), ("-.", "#407040", 1.6),
    ((0, (7, 2, 1, 2, 1, 2)), "#7b3294", 1.6), ("-", "#999999", 1.6))]


def new_figure(*size):
    """A matplotlib figure; raises UserError if matplotlib is not installed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is not installed; pip install matplotlib") from None
    matplotlib.rcParams.update({"svg.hashsalt": "records", "svg.fonttype": "none", "font.size": 10,
                                "axes.spines.top": False, "axes.spines.right": False})
    return Figure(size, layout="constrained")


def save_figure(figure, path: Path) -> list[Path]:
    """Writes path.svg and path.png, without dates, so that the same logs give the same file."""
    paths = [path.with_suffix(suffix) for suffix in (".svg", ".png")]
    for name, more in zip(paths, ({"metadata": {"Date": None}}, {"dpi": 150})):
        figure.savefig(name, facecolor="white", **more)
    return paths


def plot(runs: list[Run], path: Path) -> list[Path]:
    """Validation loss over steps, seconds and tokens; a line an arm (its mean), a band from lowest to highest run."""
    arms = {}
    for run in runs:
        if run.counted:
            arms.setdefault(run.arm, []).append(run.curve())
    arms = {arm: np.stack([c for c in curves if np.array_equal(c[:, 0], curves[0][:, 0])])
            for arm, curves in arms.items()}
    if not arms:
        raise UserError("no finished run among these, so nothing to draw")
    figure = new_figure(13, 4.4)
    axes = figure.subplots(1, 3, sharey=True)
    final = sorted(curves[:, -1, 3].mean() for curves in arms.values())
    top = max(np.interp(0.2, np.linspace(0, 1, c.shape[1]), c[:, :, 3].max(0)) for c in arms.values())
    for axis, column, label, unit in zip(axes, (0, 1, 2), ("step", "training time, s", "training tokens, M"),
                                         (1, 1, 1e6)):
        for i, (arm, curves) in enumerate(arms.items()):
            x, y, style = curves[:, :, column].mean(0) / unit, curves[:, :, 3], STYLES[i % len(STYLES)]
            axis.plot(x, y.mean(0), **style, label=f"{arm} (n = {len(y)})", marker="o" if len(x) < 30 else None, ms=3)
            if len(y) > 1:
                axis.fill_between(x, y.min(0), y.max(0), color=style["color"], alpha=0.18, linewidth=0)
            axis.annotate(f"{'ABCDEFGH'[i % 8]} " * (len(arms) > 1) + f"{y[:, -1].mean():.3f}", (x[-1], y[:, -1].mean()),
                          xytext=(4, 0), textcoords="offset points", va="center", fontsize=9, color=style["color"])
        axis.set(xlabel=label, ylim=(final[0] - 0.03 * (top - final[0]), top))
        axis.margins(x=0.02)
        axis.set_xlim(0, axis.get_xlim()[1] * (1.12 if len(arms) > 1 else 1.1))
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("validation loss, nats per token")
    handles, labels = axes[0].get_legend_handles_labels()
    labels = [f"{'ABCDEFGH'[i % 8]}: {label}" if len(arms) > 1 else label for i, label in enumerate(labels)]
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, handlelength=4)
    return save_figure(figure, path)


def history(tracks: list[tuple[dict, list[Record]]], path: Path):
    """Training time of each record, oldest first; filled: the target is shown, open: a reference."""
    tracks = [(track, records) for track, records in tracks if records]
    figure = new_figure(9, 1 + 3.2 * max(1, len(tracks)))
    for axis, (track, records) in zip(figure.subplots(len(tracks), 1, squeeze=False)[:, 0] if tracks else [], tracks):
        records = records[::-1]
        times = [describe(run.seconds for run in record.of_arm(record.main))[1] for record in records]
        axis.plot(range(len(times)), times, color="0.6", linewidth=1)
        for i, (record, seconds) in enumerate(zip(records, times)):
            loss = describe(run.loss for run in record.of_arm(record.main))[1]
            axis.plot(i, seconds, "o", color="black", mfc="black" if record.ledger["claim"] == "record" else "white")
            axis.annotate(f"{seconds_text(seconds)} s, loss {loss:.4f}", (i, seconds), xytext=(0, 9), fontsize=9,
                          textcoords="offset points", ha="center")
        axis.set_xticks(range(len(times)), ["\n".join(record.folder.name.split("_", 1)) for record in records])
        axis.set(ylim=(0, 1.25 * max(times)), xlim=(-0.6, len(times) - 0.4), ylabel="training time, s",
                 title=f"{track['title']} (filled: target {track['target']:g} shown; open: a reference)")
        axis.grid(axis="y", alpha=0.25)
    save_figure(figure, path)[1].unlink()


# -----------------------------------------------------------------------------
# The archive

def read_archive() -> list[tuple[dict, list[Record]]]:
    """Each track with its records, newest first."""
    tracks = []
    for path in sorted(HERE.glob("track_*/track.json")):
        folders = sorted((p.parent for p in path.parent.glob("*/runs.json")), reverse=True)
        tracks.append((read_track(path.parent), [read_record(folder) for folder in folders]))
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
                         f"{seconds_text(seconds)} ({seconds_text(seconds_sd)})", f"{loss:.4f} ({sd:.4f})", n,
                         p_text(t_test([run.loss for run in runs], track["target"])) if n > 1 else "-", runs[0].steps,
                         f"{info['world_size']} x {info['device']}"])
        if rows:
            parts.append(table(f"date | what changed | claim | training time, s (sd): | validation loss (sd): | n: | below "
                               f"{track['target']:g}?: | steps: | hardware", rows))
        else:
            parts.append("```bash\n" + "\n".join(track["commands"]) + "\n```")
    return "\n\n".join(parts) + "\n"


def new(args) -> int:
    """Makes a record folder from run folders: logs, scripts, ledger, README with its tables, diff with the last one."""
    track_folder, runs = HERE / args.track, collect(args.runs)
    track, date = read_track(track_folder), args.date or time.strftime("%Y-%m-%d")
    if not NAME.fullmatch(args.name) or not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        raise UserError(f"the name {args.name!r} or the date {date!r} cannot be part of a folder's name; use letters and "
                        "digits, and YYYY-MM-DD")
    final = track_folder / f"{date}_{args.name}"
    if final.exists():
        raise UserError(f"{final} exists; choose another NAME, or remove it")
    previous = next((p.parent for p in sorted(track_folder.glob("*/runs.json"), reverse=True)), None)
    with tempfile.TemporaryDirectory(dir=track_folder, prefix=".new_") as temporary:
        folder = Path(temporary) / final.name
        folder.mkdir()
        ledger = {"format": 1, "kind": "record", "claim": "record", "arms": {}, "runs": []}
        for run in runs:
            add_run(folder, ledger, run)
        record = Record(folder, ledger, [read_run(folder / e["folder"], arm=e["arm"], counted=e["counted"], why=e["why"])
                                         for e in ledger["runs"]], track)
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
            text.insert(3, f"The change of the script since {previous.name} is in `changes.diff`.")
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
        source = read_record(run.folder.parent).script(run.arm.split(" ")[-1])
    if sha256(source) != run.info["source_sha256"]:
        raise UserError(f"{source} is not the script that {run.folder} ran (its sha256 differs)")
    kernels = source.with_name("triton_kernels.py")
    if run.arm not in ledger["arms"]:
        where = "" if not ledger["arms"] else f"{slug}/"
        (folder / where).mkdir(exist_ok=True)
        for path in (source, *[kernels] * kernels.is_file()):
            shutil.copy(path, folder / where / path.name)
        ledger["arms"][run.arm] = {"script": f"{where}{source.name}", "flags": run.flags}
    name, tries = f"{slug}_seed{run.seed}", sum(e["arm"] == run.arm and e["seed"] == run.seed for e in ledger["runs"])
    name += f"_{tries + 1}" * (tries > 0)
    keep_run(run.folder, folder / name)
    status = run.info["status"].replace("running", "killed")
    ledger["runs"].append({"folder": name, "arm": run.arm, "seed": run.seed, "status": status, "counted": run.counted,
                           "why": run.why, "sha256": log_hashes(folder / name)})


def script_diff(previous: Path, record: Record) -> str:
    """Unified diff of the main scripts of two records, or nothing."""
    old, new = read_record(previous), record.script(record.main)
    old = old.script(old.main)
    return "".join(difflib.unified_diff(*(read_text(path, MAX_JSON).splitlines(keepends=True) for path in (old, new)),
                                        f"{previous.name}/{old.name}", f"{record.folder.name}/{new.name}"))


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
    for folder in folders:
        problems = check_record(folder, guard=not args.no_guard)
        lies += [f"{folder}: {problem}" for problem in problems]
        print(f"{folder}: {'NOT ' if problems else ''}ok", flush=True)
    lies += board_problem() if args.all and not lies else []
    for line in lies:
        print(f"records.py: {line}", file=sys.stderr)
    return 1 if lies else 0


def board(args) -> int:
    """Writes records/README.md and records/history.svg."""
    write_text(HERE / "README.md", board_text())
    history(read_archive(), HERE / "history")
    print(f"wrote {HERE / 'README.md'} and {HERE / 'history.svg'}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The command line; each command's help is its whole story."""
    parser = argparse.ArgumentParser(prog="records.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name, summary, story="", run=None):
        made = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {story}",
                                   allow_abbrev=False)
        made.set_defaults(run=run)
        return made.add_argument
    add = command("summarize", "mean, sd, interval and test of some runs, as Markdown tables", "Runs of the same script "
                  "with the same flags but the seed are one arm. The interval is Student's, the test one-sided.", summarize)
    add("runs", nargs="+", type=Path, metavar="RUN")
    add("--target", type=float, default=0, help="test whether the mean loss is below it (default: no test)")
    add("--track", metavar="TRACK", help="take the target of this track, as in --track=track_1_small")
    add("--write", action="store_true", help="RUN is a record or comparison: write the tables into its README")

    add = command("check", "does every table say what its logs say?", "Ledger, scripts, logs, validation data, target, "
                  "README, and the metric guard, which runs the script. Prints a line for each lie; exit code 1.", check)
    add("records", nargs="*", type=Path, metavar="RECORD", help="record or comparison folders")
    add("--all", action="store_true", help="every record of the archive, and records/README.md")
    add("--no_guard", action="store_true", help="read only: do not run the scripts")

    add = command("replay", "run a record again on this machine", "Its own script and flags, with a new seed; further "
                  "flags, as --train_files=..., replace the record's. The loss is compared with the prediction interval "
                  "from the record's runs.", replay)
    add("record", type=Path, metavar="RECORD")
    add("--n", type=int, default=1, help="number of runs (default: %(default)s)")
    add("--ranks", type=int, default=0, help="number of GPUs (default: the record's)")
    add("--seed", type=int, default=-1, help="of the first run (default: the next after the record's)")
    add("--num_iterations", type=int, default=0, help="a shortened run, if the record has reference runs of that length")
    add("--out", type=Path, metavar="FOLDER", help="where the runs go (default: logs/replay_...)")

    add = command("compare", "is B better than A, worse, or is it noise?", "Runs A and B alternately on this machine, the "
                  "i-th pair with seed i, and tests the paired differences (two-sided paired t-test; times as ratios). "
                  "Time at equal loss: in each pair, when each run first reaches the higher of the two final losses, on "
                  "straight lines between validations; a smaller --val_every makes it finer. All other flags go to both "
                  "scripts. The same command goes on where it was stopped, and adds pairs if --n is larger.", compare)
    add("scripts", nargs="+", type=Path, metavar="SCRIPT", help="A and B, or one script with --b_flags or --noise")
    add("--n", type=int, default=6, help="number of pairs (default: %(default)s)")
    add("--a_flags", default="", help='flags of A only, as in --a_flags="--lr=0.8 --cooldown=0.5"')
    add("--b_flags", default="", help="flags of B only")
    add("--noise", action="store_true", help="run A against itself: what differences are noise here?")
    add("--p", type=float, default=0.01, help="level of the tests (default: %(default)s)")
    add("--ranks", type=int, default=1, help="GPUs for each run, through torchrun (default: %(default)s)")
    add("--out", type=Path, metavar="FOLDER", help="where the comparison goes (default: logs/compare_...)")

    add = command("plot", "curves over steps, time and tokens, as SVG and PNG", "One line an arm, with a band from its "
                  "lowest to its highest run.", lambda args: print(*plot(collect(args.runs), args.out)) or 0)
    add("runs", nargs="+", type=Path, metavar="RUN")
    add("--out", type=Path, default=Path("curves"), help="name without ending (default: %(default)s)")

    command("board", "write records/README.md and records/history.svg", run=board)

    add = command("new", "make a record folder from run folders", "Name every run that was started, also failed ones. The "
                  "first run's script is what the record is about. Checkpoints are left out.", new)
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
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
        args, rest = parser.parse_known_args()
        if args.run in (compare, replay):
            return args.run(args, rest)
        return refuse(f"unknown argument {rest[0]}") if rest else args.run(args)
    except UserError as error:
        print(f"records.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"records.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("records.py: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
