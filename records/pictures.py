"""Pictures of runs and records, readable without colour: line styles, marks, and labels where the lines end.

This is a module of records.py, not a command: python records/records.py plot --help says how to draw curves.
"""
import os
from pathlib import Path

import numpy as np
from runs import Record, Run, UserError, seconds_text
from student import describe

STYLES = [dict(linestyle=style, marker=mark, color=color, linewidth=width) for style, mark, color, width in (
    ("-", "o", "#000000", 1.6), ("--", "s", "#0072b2", 1.6), (":", "^", "#a03000", 2.2), ("-.", "D", "#407040", 1.6),
    ((0, (7, 2, 1, 2, 1, 2)), "v", "#7b3294", 1.6), ("-", "x", "#888888", 1.6))]
AXES = (("step", 0, 1), ("training time, s", 1, 1), ("training tokens, M", 2, 1e6))    # label, column of a curve, unit


def new_figure(*size):
    """A matplotlib figure; raises UserError if matplotlib is not installed."""
    backend = os.environ.pop("MPLBACKEND", None)         # a notebook's is refused outside of it; a file needs none
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is not installed; pip install matplotlib") from None
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    matplotlib.rcParams.update({"svg.hashsalt": "records", "svg.fonttype": "none", "font.size": 10,
                                "axes.spines.top": False, "axes.spines.right": False})
    return Figure(size, layout="constrained")


def save(figure, path: Path):
    """Writes a picture without a date in it, so that the same logs give the same file."""
    path.unlink(missing_ok=True)         # it may be a link, which writing would follow
    figure.savefig(path, facecolor="white", **({"metadata": {"Date": None}} if path.suffix == ".svg" else {"dpi": 150}))


def arms_of(runs: list[Run]) -> dict[str, np.ndarray]:
    """label -> (runs, validations, 4) of the runs that count; other validation steps make an arm of their own."""
    arms = {}
    for run in runs:
        if run.counted:
            curve = run.curve()
            arms.setdefault((run.arm, tuple(curve[:, 0])), []).append(curve)
    names = [arm for arm, _ in arms]
    labels = [arm + f", validated at {len(steps)} steps up to {steps[-1]:.0f}" * (names.count(arm) > 1)
              for arm, steps in arms]
    return {f"{label} (n = {len(curves)})": np.stack(curves) for label, curves in zip(labels, arms.values())}


def plot(runs: list[Run], *paths: Path):
    """Validation loss over steps, seconds and tokens; a line an arm (its mean), a band from lowest to highest run.

    Writes all paths (.svg, .png); the first validation, before any step, is out of sight.
    """
    arms = arms_of(runs)
    if not arms:
        raise UserError("no finished run among these, so nothing to draw")
    letters = [f"{chr(65 + i)} " if len(arms) > 1 else "" for i in range(len(arms))]
    low = min(curves[:, -1, 3].min() for curves in arms.values())
    top = max(np.interp(0.2, np.linspace(0, 1, c.shape[1]), c[:, :, 3].max(0)) for c in arms.values())
    columns = 3 if max(map(len, arms)) < 45 else 1
    figure = new_figure(13, 4.4 + 0.22 * -(-len(arms) // columns))
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (label, column, unit) in zip(axes, AXES):
        ends = []
        for i, curves in enumerate(arms.values()):
            x, y, style = curves[:, :, column].mean(0) / unit, curves[:, :, 3], STYLES[i % len(STYLES)]
            axis.plot(x, y.mean(0), **style, markersize=4, markevery=max(1, len(x) // 12))
            axis.fill_between(x, y.min(0), y.max(0), color=style["color"], alpha=0.18, linewidth=0)
            end = y[:, -1].mean()
            ends.append((end, x[-1], letters[i] + f"{end:.4f}" * (column == 0), style["color"]))
        axis.set(xlabel=label, ylim=(low - 0.06 * (top - low), top + 0.05 * (top - low)))
        axis.set_xlim(0, (1.06 if column else 1.2) * max(end[1] for end in ends))
        axis.grid(alpha=0.25)
        label_ends(axis, ends, gap=0.045 * (top - low))
    axes[0].set_ylabel("validation loss, nats per token")
    figure.legend(axes[0].get_lines(), [letter + arm for letter, arm in zip(letters, arms)], loc="outside upper center",
                  ncols=columns, frameon=False, handlelength=5)
    for path in paths:
        save(figure, path)


def label_ends(axis, ends: list[tuple], gap: float):
    """Writes beside the end (loss, x, text, color) of each line its text, moved up where two would touch."""
    width, placed = axis.get_xlim()[1], []
    for loss, x, text, color in sorted(ends):
        height = max([loss, *(other + gap for at, other in placed if abs(x - at) < 0.02 * len(text) * width)])
        axis.text(x + 0.015 * width, height, text, va="center", fontsize=9, color=color,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        placed.append((x, height))


def history(tracks: list[tuple[dict, list[Record]]], path: Path):
    """What each record of the tracks reached, oldest first; filled: a record, open: a reference.

    That is the training time, or on a track with a fixed training time the validation loss.
    """
    tracks = [(track, records) for track, records in tracks if records]
    figure = new_figure(9, 0.4 + 3.2 * max(1, len(tracks)))
    for axis, (track, records) in zip(figure.subplots(len(tracks), 1, squeeze=False)[:, 0] if tracks else [], tracks):
        records, timed = records[::-1], "seconds" in track
        times, losses = ([describe(get(run) for run in record.of_arm(record.main))[1] for record in records]
                         for get in (lambda run: run.seconds, lambda run: run.loss))
        values = losses if timed else times
        axis.plot(range(len(values)), values, color="0.6", linewidth=1)
        for i, (record, value, seconds, loss) in enumerate(zip(records, values, times, losses)):
            axis.plot(i, value, "o", color="black", mfc="black" if record.ledger["claim"] == "record" else "white")
            label = f"{loss:.4f} in {seconds_text(seconds)} s" if timed else f"{seconds_text(seconds)} s to {loss:.4f}"
            axis.annotate(label, (i, value), xytext=(0, 9), fontsize=9, textcoords="offset points", ha="center",
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
        axis.set_xticks(range(len(values)), ["\n".join(record.folder.name.split("_", 1)) for record in records])
        room = 0.3 * (max(values) - min(values)) or 0.1 * max(values)
        low, high = (min(values) - room, max(values) + 2 * room) if timed else (0, 1.25 * max(values))
        axis.set(ylim=(low, high), xlim=(-0.6, len(values) - 0.4),
                 ylabel="validation loss" if timed else "training time, s")
        task = (f"lowest loss in {track['seconds']:g} s" if timed else
                f"target {track['target']:g} shown at p < {track['p']:g}")
        axis.set_title(f"{track['title']}\nfilled: {task}; open: a reference", fontsize=10)
        axis.grid(axis="y", alpha=0.25)
    save(figure, path)


if __name__ == "__main__":
    print(__doc__.strip())
