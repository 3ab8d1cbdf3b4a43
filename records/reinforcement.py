"""Curves of reinforcement learning (chat_rl.py): folders of runs whose tables and pictures are computed from the logs.

This is a module of records.py, not a command: python records/records.py new_rl --help says how to make such a folder.
"""
import json
import os
import re
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from pictures import STYLES, new_figure, save
from runs import (MAX_JSON, MAX_LOG, NAME, REGION, UserError, check_fields, fill, marked, read_json, read_text, sha256,
                  table, unix_lines, write_text)
from student import describe

TRACK = "track_rl"
TITLE = "### Reinforcement learning: what to expect"
KEPT = ("run.json", "log.txt", "samples.jsonl")
POINT = {"step": int, "rights": str, "pass1": float, "pass1_se": float, "pass8": float, "greedy": float,
         "length": float, "tool_calls": float}
FIELDS = {"script": str, "status": str, "device": str, "world_size": int, "started": str, "identity": dict,
          "evaluations": list}
PASSES = 8                               # answers to each fixed question
SETTINGS = ("lr", "std", "kl")           # flags in which the arms of a folder may differ
MEASURED = re.compile(r"^step:(\d+)/\d+ pass1:(\S+) pass1_se:(\S+) pass8:(\S+) .*?greedy:(\S+)", re.M)
STEP = re.compile(r"^step:(\d+)/(\d+) reward:(\S+) .*?no_signal:(\S+) length:(\S+) .*?sampling_ms:(\d+) "
                  r"training_ms:(\d+) sampled_per_s:(\d+) trained_per_s:(\d+) ", re.M)
LOCAL_PATH = re.compile(r"(?<![\w./])(?:/[^\s\"'/=:,]+)+/(?=[^\s\"'/])")


@dataclass(frozen=True)
class Curve:
    """A run of chat_rl.py."""
    folder: Path
    info: dict
    steps: list                          # (step, reward, no_signal, length, sampling_ms, training_ms, per_s, per_s)
    alone: bool                          # nothing else ran on the card, so that its times mean something

    @property
    def arm(self) -> str:
        """The flags that may differ between the arms of a folder."""
        flags = self.info["identity"]
        return " ".join([f"--lr={flags['lr']:g}"] + ["--std"] * bool(flags["std"])
                        + [f"--kl={flags['kl']:g}"] * bool(flags["kl"]))

    @property
    def points(self) -> list[dict]:
        return self.info["evaluations"]


def read_curve(folder: Path, alone: bool = False) -> Curve:
    """The run in a folder; raises UserError if it is not a finished one of chat_rl.py, or its log contradicts it."""
    info, log = read_json(folder / "run.json"), unix_lines(read_text(folder / "log.txt", MAX_LOG))
    if info.get("script") != "chat_rl.py" or info.get("status") != "finished":
        raise UserError(f"{folder} is not a finished run of chat_rl.py ({info.get('script')}, {info.get('status')}); "
                        "name others")
    check_fields(info, FIELDS, folder / "run.json")
    for point in info["evaluations"]:
        check_fields(point, POINT, folder / "run.json")
    said = [(int(step), *values) for step, *values in MEASURED.findall(log)]
    true = [(point["step"], *(f"{point[name]:.4f}" for name in ("pass1", "pass1_se", "pass8", "greedy")))
            for point in info["evaluations"]]
    # a run that was killed and resumed measured some steps twice; the last time counts
    if sorted({one[0]: one for one in said}.values()) != true or not true:
        raise UserError(f"{folder}: run.json says other scores than log.txt")
    for point in info["evaluations"]:
        rights = re.findall(r"(?<!\S)[0-8](?!\S)", point["rights"])
        if not rights or abs(sum(map(int, rights)) / PASSES / len(rights) - point["pass1"]) > 1e-5:
            raise UserError(f"{folder}: the rights of step {point['step']} in run.json give another pass1")
    steps = {int(row[0]): (int(row[0]), *map(float, row[2:])) for row in STEP.findall(log)}
    wanted = info["identity"].get("steps")
    if sorted(steps) != list(range(1, len(steps) + 1)) or len(steps) != wanted or true[-1][0] != wanted:
        raise UserError(f"{folder}: log.txt has {len(steps)} steps, run.json says {wanted}")
    return Curve(folder, info, list(steps.values()), alone)


def read_folder(folder: Path) -> list[Curve]:
    """The runs of a folder of the archive, arm by arm; raises UserError if a file is not the one that was added."""
    curves = []
    for entry in read_json(folder / "curves.json").get("runs", []):
        check_fields(entry, {"folder": str, "alone": bool, "sha256": dict}, folder / "curves.json")
        if not NAME.fullmatch(entry["folder"]):
            raise UserError(f"{folder / 'curves.json'} names the folder {entry['folder']!r}, which is not a run beside "
                            "it")
        for name, wanted in entry["sha256"].items():
            if name not in KEPT or sha256(folder / entry["folder"] / name) != wanted:
                raise UserError(f"{folder / entry['folder']}/{name} is not the file that was added; put it back")
        curves.append(read_curve(folder / entry["folder"], entry["alone"]))
    if not any(not curve.alone for curve in curves):
        raise UserError(f"{folder / 'curves.json'} lists no run; make the folder again with new_rl")
    return curves


# -----------------------------------------------------------------------------
# Tables and the picture

def by_arm(curves: list[Curve]) -> dict[str, list[Curve]]:
    """Arm -> its runs in the order of their seeds, without those that only measure the time."""
    arms = {}
    for curve in sorted(curves, key=lambda curve: (curve.arm, curve.info["identity"]["seed"])):
        if not curve.alone:
            arms.setdefault(curve.arm, []).append(curve)
    return arms


def gain(curves: list[Curve]) -> tuple[int, float, float]:
    """(runs, mean, standard error) of what pass@1 gained from the first to the last measurement.

    The error is the larger one of two: that over seeds, and that over the fixed questions, each compared with itself.
    """
    n, mean, sd = describe(curve.points[-1]["pass1"] - curve.points[0]["pass1"] for curve in curves)
    changes = []
    for curve in curves:
        before, after = (map(int, curve.points[i]["rights"].split()) for i in (0, -1))
        changes.append([late - early for early, late in zip(before, after)])
    questions, _, spread = describe(statistics.mean(column) / PASSES for column in zip(*changes))
    return n, mean, max(sd / n ** 0.5, spread / questions ** 0.5)


def regions(curves: list[Curve]) -> dict[str, str]:
    """The generated parts of the README of a folder."""
    return {"result": result_text(curves), "tables": arm_table(curves), "times": time_table(curves),
            "runs": run_table(curves), "setup": setup_text(curves)}


def result_text(curves: list[Curve]) -> str:
    """One sentence for each arm: whether it gained more than two standard errors."""
    lines = []
    for arm, runs in by_arm(curves).items():
        n, mean, error = gain(runs)
        verdict = "a gain" if mean > 2 * error else "a loss" if mean < -2 * error else "no change that could be shown"
        lines.append(f"`{arm}`: {verdict}; pass@1 changed by {mean:+.4f}, standard error {error:.4f}, n = {n}.")
    return "\n".join(f"* {line}" for line in lines)


def arm_table(curves: list[Curve]) -> str:
    """Scores before and after, means over the seeds of each arm."""
    rows = []
    for arm, runs in by_arm(curves).items():
        _, mean, error = gain(runs)
        row = [f"`{arm}`", len(runs), runs[0].points[-1]["step"]]
        for name in ("pass1", "greedy", "pass8"):
            row += [f"{statistics.mean(curve.points[i][name] for curve in runs):.4f}" for i in (0, -1)]
        rows.append([*row[:5], f"{mean:+.4f} ({error:.4f})", *row[5:]])
    return table("flags | n: | steps: | pass@1 before: | after: | gain (error): | greedy before: | after: | "
                 "pass@8 before: | after:", rows)


def run_table(curves: list[Curve]) -> str:
    """Every run: its seed, its reward in training, and what its answers are like."""
    rows = []
    for arm, runs in by_arm(curves).items():
        for curve in runs:
            rewards, part = [row[1] for row in curve.steps], max(1, len(curve.steps) // 5)
            rows.append([f"`{arm}`", curve.info["identity"]["seed"],
                         *(f"{curve.points[i]['pass1']:.4f}" for i in (0, -1)),
                         *(f"{statistics.mean(some):.3f}" for some in (rewards[:part], rewards[-part:])),
                         *(f"{statistics.mean(row[2] for row in some):.3f}"
                           for some in (curve.steps[:part], curve.steps[-part:])),
                         *(f"{curve.points[i]['length']:.1f}" for i in (0, -1)),
                         f"{curve.points[-1]['tool_calls']:.3f}"])
    return table("flags | seed: | pass@1 before: | after: | reward, first fifth: | last fifth: | no signal, first: | "
                 "last: | tokens before: | after: | tool calls:", rows)


def time_table(curves: list[Curve]) -> str:
    """The time of a step, of runs that had the card alone; medians without the first step."""
    rows = []
    for curve in curves:
        if curve.alone and len(curve.steps) > 1:
            columns = [statistics.median(column) for column in zip(*curve.steps[1:])]
            flags = curve.info["identity"]
            rows.append([flags["questions"] * flags["samples"], f"{columns[3]:.1f}",
                         f"{(columns[4] + columns[5]) / 1000:.2f}", f"{columns[4] / 1000:.2f}",
                         f"{columns[5] / 1000:.2f}", f"{columns[6]:,.0f}", f"{columns[7]:,.0f}", f"{columns[2]:.3f}"])
    if not rows:
        return "No run had the card alone, so no time is given."
    return table("answers a step: | tokens an answer: | step, s: | sampling, s: | training, s: | sampled tokens/s: | "
                 "trained tokens/s: | no signal:", rows)


def setup_text(curves: list[Curve]) -> str:
    """What all runs have in common."""
    info = curves[-1].info
    others = (*SETTINGS, "seed", "data", "parent", "sources")
    flags = {name: value for name, value in info["identity"].items() if name not in others}
    shown = " ".join(f"--{name}={value}" for name, value in flags.items() if value not in ("", False))
    return (f"`{shown}` on {info['world_size']} x {info['device']}, from the model with sha256 "
            f"{info['identity']['parent'][:12]}.")


def plot(curves: list[Curve], path: Path):
    """pass@1 over steps: a line for the mean of each arm, a thin one for each seed."""
    figure = new_figure(8, 4.2)
    axis = figure.subplots()
    for style, (arm, runs) in zip(STYLES, by_arm(curves).items()):
        steps = [point["step"] for point in runs[0].points]
        rows = [[point["pass1"] for point in curve.points] for curve in runs
                if [point["step"] for point in curve.points] == steps]
        for row in rows if len(rows) > 1 else ():
            axis.plot(steps, row, color=style["color"], linewidth=0.6, alpha=0.6)
        axis.plot(steps, [statistics.mean(column) for column in zip(*rows)], label=f"{arm} (n = {len(rows)})",
                  markersize=4, **style)
    task = curves[-1].info["identity"]["task"]
    axis.set(xlabel="step", ylabel=f"pass@1 on fixed questions, {task}")
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, path)


# -----------------------------------------------------------------------------
# The archive

def folders(archive: Path) -> list[Path]:
    """The folders of curves, newest first."""
    return sorted((path.parent for path in (archive / TRACK).glob("*/curves.json")), reverse=True)


def add_run(source: Path, target: Path):
    """Copies what the archive keeps of a run, with paths of the machine cut to their last part."""
    target.mkdir()
    for name in KEPT:
        if name != "samples.jsonl":
            text = LOCAL_PATH.sub("", read_text(source / name, MAX_LOG))
            write_text(target / name, text)
        elif (source / name).is_file():
            write_text(target / name, read_text(source / name, MAX_LOG))


def new_folder(archive: Path, name: str, runs: list[Path], alone: list[Path], date: str = "") -> Path:
    """Makes the folder DATE_NAME of these runs, with its README and curve; raises UserError."""
    date = date or time.strftime("%Y-%m-%d")
    final = archive / TRACK / f"{date}_{name}"
    if not NAME.fullmatch(name) or not re.fullmatch(r"\d{4}-\d\d-\d\d", date) or final.exists():
        raise UserError(f"{final} exists, or cannot be the name of a folder; choose another NAME")
    found = [read_curve(folder, folder in alone) for folder in [*alone, *runs]]
    if len({tuple(curve.info["identity"][name] for name in ("task", "parent")) for curve in found}) > 1:
        raise UserError("the runs have several tasks or began with several models; make a folder of each")
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=".new_") as temporary:
        folder, entries = Path(temporary) / final.name, []
        folder.mkdir()
        for number, curve in enumerate(found):
            place = re.sub(r"[^A-Za-z0-9.]+", "_", curve.arm).strip("_.") + f"_seed{curve.info['identity']['seed']}"
            place = f"alone{number}_{place}" if curve.alone else place
            if (folder / place).exists():
                raise UserError(f"{curve.folder}: another run has the same flags and the same seed; name one of them")
            add_run(curve.folder, folder / place)
            kept = {file: sha256(folder / place / file) for file in KEPT if (folder / place / file).is_file()}
            entries.append({"folder": place, "alone": curve.alone, "sha256": kept})
        write_text(folder / "curves.json", json.dumps({"format": 1, "runs": entries}, indent=1) + "\n")
        text = [f"# {name}: FILL IN what was learned, in a few words", marked("result"),
                "![pass@1 over steps](curve.svg)", "FILL IN: what was tried. Numbers stand in the tables.",
                marked("tables"), "## Time of a step", marked("times"), "## Runs", marked("runs"), "## Setup",
                marked("setup")]
        curves = read_folder(folder)
        write_text(folder / "README.md", fill("\n\n".join(text) + "\n", regions(curves)))
        plot(curves, folder / "curve.svg")
        os.rename(folder, final)
    return final


def check_folder(folder: Path) -> list[str]:
    """The first lie of a folder of curves: in its files, or in its README."""
    try:
        parts = regions(read_folder(folder))
        text = unix_lines(read_text(folder / "README.md", MAX_JSON))
    except UserError as error:
        return [str(error)]
    found = {match[2]: match[3].removesuffix("\n") for match in REGION.finditer(text)}
    for name, part in parts.items():
        if found.get(name) != part:
            return [f"README.md: the part {name!r} is not what the logs say; make the folder again"]
    known = set(re.findall(r"\d+\.\d{3,}", "\n".join(parts.values())))
    rest = REGION.sub("", text)
    if odd := [value for value in re.findall(r"(?<![\w.])\d+\.\d{3,}(?![\w]|\.\d)", rest) if value not in known]:
        return [f"README.md says {odd[0]} outside the generated parts, which no log says"]
    return ["README.md still asks for something"] if "FILL IN" in rest else []


def board_parts(archive: Path) -> list[str]:
    """The paragraphs of records/README.md about the curves; nothing if there are none."""
    rows = []
    for folder in folders(archive):
        curves = read_folder(folder)
        title = read_text(folder / "README.md", MAX_JSON).split("\n", 1)[0].lstrip("# ").strip()
        for arm, runs in by_arm(curves).items():
            n, mean, error = gain(runs)
            before, after = (statistics.mean(curve.points[i]["pass1"] for curve in runs) for i in (0, -1))
            rows.append([folder.name.split("_")[0], f"[{title}]({TRACK}/{folder.name}/)", f"`{arm}`", n,
                         runs[0].points[-1]["step"], f"{before:.4f}", f"{after:.4f}", f"{mean:+.4f} ({error:.4f})"])
    if not rows:
        return []
    return [TITLE, "Curves of `chat_rl.py` on questions that are never trained. The gain has its standard error. These "
            "are no records: nobody competes.",
            table("date | what | flags | n: | steps: | pass@1 before: | after: | gain (error):", rows)]


if __name__ == "__main__":
    print(__doc__.strip())
