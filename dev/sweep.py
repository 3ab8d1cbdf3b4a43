"""Run variants of a training script on this machine and print one table.

    python dev/sweep.py VARIANTS --out=DIR [--gpus=1] [--ranks=1] [--limit=300] [common flags of the script ...]

VARIANTS is a text file with a variant a line: `name | flags | old => new | old => new`. Flags go to the script; each
`old => new` replaces text in a copy of the script (old must occur exactly once), so that an idea that is not a flag is
still one line. `#` begins a comment. --out receives the run folders, a log per variant and table.md; --limit is the
number of seconds after which a variant is stopped. Everything else is passed to every variant. They run one after the
other, or with --gpus=N on N GPUs at a time, one on each, the next on the one that is free first. --ranks=N gives each
variant N GPUs instead.
"""
import argparse
import json
import os
import queue
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

COLUMNS = "name step val_loss train_s tokens/s compile_s recompiles peak_GiB note"


def read_variants(path: Path) -> list[tuple[str, list[str], list[tuple[str, str]]]]:
    """(name, flags, replacements) of each line."""
    variants = []
    for line in path.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            name, flags, *edits = [part.strip() for part in line.split(" | ")]
            variants.append((name, flags.split(), [tuple(edit.split(" => ")) for edit in edits if edit]))
    return variants


def edited_script(script: Path, name: str, edits: list[tuple[str, str]]) -> Path:
    """A copy of the script beside it with the replacements made, or the script itself if there are none."""
    if not edits:
        return script
    text = script.read_text()
    for old, new in edits:
        old, new = old.replace("\\n", "\n"), new.replace("\\n", "\n")
        if text.count(old) != 1:
            raise SystemExit(f"sweep.py: variant {name}: {old!r} occurs {text.count(old)} times in {script}, not once")
        text = text.replace(old, new)
    copy = script.with_name(f"{script.stem}__{name}.py")
    copy.write_text(text)
    return copy


def run_variant(args, name: str, script: Path, flags: list[str], gpu: str | None) -> dict:
    """Runs one variant, on that GPU alone unless None; returns what its run.json says, with a note if it failed."""
    folder = args.out / name
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.ranks}",
               str(script), *args.common, *flags, f"--out_dir={folder}"]
    if args.ranks == 1:
        command = [sys.executable, str(script), *args.common, *flags, f"--out_dir={folder}"]
    args.out.mkdir(parents=True, exist_ok=True)
    note = ""
    with open(args.out / f"{name}.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                                   env=os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}))
        try:
            code = process.wait(timeout=args.limit)
            note = "" if code == 0 else f"exit {code}: " + (args.out / f"{name}.log").read_text().strip()[-300:]
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
            note = f"stopped after {args.limit} s"
    infos = sorted(folder.glob("*/run.json"))
    info = json.loads(infos[-1].read_text()) if infos else {}
    return info | {"note": " ".join(note.split())}


def table_row(name: str, info: dict) -> list[str]:
    """The cells of one variant."""
    last = (info.get("val_losses") or [{}])[-1]
    train_s = last.get("train_time_ms", 0) / 1000
    rate = info.get("tokens_seen", 0) / max(info.get("train_time_ms", 0) / 1000, 1e-9)
    return [name, str(last.get("step", "")), f"{last.get('val_loss', float('nan')):.4f}", f"{train_s:.2f}",
            f"{rate:.0f}", str(info.get("compile_seconds", "")), str(info.get("recompiles", "")),
            str(info.get("peak_memory_gib", "")), info["note"]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--script", type=Path, default=Path(__file__).resolve().parents[1] / "train_gpt.py")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--limit", type=float, default=300)
    args, args.common = parser.parse_known_args()
    variants = read_variants(args.variants)
    scripts, free = [], queue.SimpleQueue()
    for gpu in range(args.gpus):
        free.put(str(gpu) if args.gpus > 1 else None)

    def run(variant, script):
        gpu = free.get()
        try:
            row = table_row(variant[0], run_variant(args, variant[0], script, variant[1], gpu))
        finally:
            free.put(gpu)
        print(" | ".join(row), flush=True)
        return row
    try:
        for name, _, edits in variants:
            scripts.append(edited_script(args.script, name, edits))
        with ThreadPoolExecutor(args.gpus) as pool:
            rows = [COLUMNS.split(), *pool.map(run, variants, scripts)]
    finally:
        for script in set(scripts) - {args.script}:
            script.unlink()
    rows.insert(1, ["---"] * len(rows[0]))
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    (args.out / "table.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
