"""The archive of records and its tool: every number in a table is computed from the logs.

    python records/records.py compare train_gpt.py my_idea.py --n=6 --preset=tiny      # is my_idea.py better?
    python records/records.py compare train_gpt.py --b_flags="--lr=1.2" --n=6          # one script, two sets of flags
    python records/records.py compare train_gpt.py --arms=ideas.txt --n=1 --limit=300  # a sweep: one run an idea
    python records/records.py compare --noise train_gpt.py --n=6                       # the noise of this machine
    python records/records.py summarize logs/*                     # n, mean, sd, interval, test: a table in Markdown
    python records/records.py plot logs/* --out=curves             # curves.svg and curves.png
    python records/records.py new MyIdea --track=track_1_small logs/2026-*             # a record folder of these runs
    python records/records.py check --all                          # do the tables say what the logs say?
    python records/records.py replay records/TRACK/RECORD          # run a record again here
    python records/records.py compare my_idea.py --track=track_0_cpu                   # pairs with the standing record
    python records/records.py make MyIdea my_idea.py --track=track_0_cpu               # run, and make the record folder
    python records/records.py shards track_0_cpu                   # are the shards here those of the track?
    python records/records.py new_rl MyCurve logs/*_chat_rl_*     # curves of chat_rl.py
    python records/records.py board                                # writes records/README.md and its pictures

A run folder holds run.json and log.txt. A record or a comparison is a folder with runs.json, the list of all runs that
were started for it. RUN below means a run folder, a folder of run folders, a record or a comparison.
`COMMAND --help` explains a command.
"""
import argparse
import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import reinforcement
from checks import check_record, record_order, standing_record, track_problem
from comparison import check_flags, check_script, compare, save_ledger
from diffs import script_diff
from launcher import Job, keep_run, log_hashes
from pictures import history, plot
from replays import finished_runs, matching_files, replay
from runs import (LEAST, MAX_JSON, NAME, Record, Run, UserError, arms_table, collect, fill, judge, lost_runs, marked,
                  p_text, pairs_of, read_json, read_record, read_run, read_text, read_track, regions, runs_table,
                  seconds_text, sha256, skipped_folders, source_files, table, unix_lines, user_path, verdict_text,
                  write_text)
from student import describe, t_test

HERE = Path(__file__).resolve().parent
DEV = "dev"                                              # folder of the tracks whose text only we have
RULES = """\
A track sets a task: the text, the hardware, and either a target loss or a training time. A record is a set of runs
which together show that a script does the task better than all records before it. Each record is a folder. It holds
the scripts that ran, the logs of all runs, and a README whose tables are computed from those logs.

## Rules

1. **What a record must show.** On a track with a target loss: the mean validation loss is below the target, in a
   one-sided t-test at the p of the track. The record with the shortest training time stands. On a track with a training
   time: the loss is lower than that of the standing record. Both scripts run in pairs on one machine, with the same
   seeds, and a two-sided paired t-test decides at the p of the track. The new script may take at most 1 % more training
   time than the standing one. The first record keeps within the time of the track.
2. **At least three runs, or three pairs.** They differ in their seeds only. Their number is decided before the first
   one starts. If the runs do not prove it, the folder is kept as a *reference*.
3. **Every run that was started is listed**, also those that failed. Seeds are used without gaps. A run that does not
   count says why.
4. **The text is fixed.** `track.json` names the validation shards with their sha256. On tracks 0 it names the training
   shards too. On tracks 1 and 2 the training text is free.
5. **The clock counts training only.** Compilation and validation are off the clock. Nothing is compiled while it runs.
6. **The loss is that of an honest predictor.** `guard.py` trains each script at a small size. It checks that the
   probabilities sum to 1, that no prediction sees later tokens, that the reported loss covers all validation tokens,
   and that validating does not change training.
7. **Every number comes from a log.** `check` computes the tables again and compares them with the README.
8. **A record is never edited** after it was added.

## Replay a record

```bash
pip install -r requirements.txt
python data/code.py --slice=cpu                          # track_0_cpu: 5 MB of packages from the package index
python data/code.py                                      # track_0_code: 323 MB
python data/fineweb.py 9                                 # tracks 1 and 2
python records/records.py shards track_0_cpu             # are the shards here those of the track?
python records/records.py replay records/TRACK/RECORD
```

The last line runs the record's own script with its own flags and a new seed. It first compares the versions and the
sha256 of the shards. At the end it says whether loss and time lie where the record predicts them. Add
`--train_files=...` and `--val_files=...` if your files have other names than those of the record. A machine without a
network takes the wheels from a folder: copy `data/wheels` there, and add `--wheels=data/wheels` to `data/code.py`.

## Make a record

One command runs your script and makes the folder of the record. On a track with a training time, the standing record
runs beside it, in pairs. The flags of the track are added by themselves. `--from_standing` adds those of the standing
record; flags behind it replace flags of the same name:

```bash
python records/records.py make MyIdea my_idea.py --track=track_0_cpu --n=6 --from_standing --num_iterations=230
```

You can also start the runs yourself, for example on another machine. Then name every run that was started:

```bash
for seed in 0 1 2 3; do python my_idea.py --seed=$seed --val_tokens=... ; done     # with the flags of the track
python records/records.py new MyIdea --track=TRACK logs/*_my_idea_*
```

Answer what the README that `new` has written marks FILL IN. Then:

```bash
python records/records.py check records/TRACK/DATE_MyIdea && python records/records.py board
```

## Submit it

Open a pull request that adds the folder of the record and what `board` wrote, and nothing else. Its README says what
changed, why it helps, and what you tried and dropped. The checks of the pull request run `records.py check --all`,
which trains no full model. Somebody else replays the record before it is merged."""

MEANINGS = """\
A *record* shows what its track asks for. A *reference* does not show it. Times and losses are means, with the standard
deviation over the n runs in parentheses."""
DEV_RULES = """\
These tracks compare the scripts with the public NanoGPT speedrun. The rules are those of
[records/README.md](../records/README.md), with one difference: nobody else has the text, so nobody else can replay the
losses.

What is known about the text: about half of it is encyclopaedia articles, a fifth is books out of copyright, a tenth is
transcripts of talks about software, and the rest is textbooks, technical documentation and the blogs of public
agencies. Long documents are split, so that their lengths are those of web pages. The sources have many licences, so
the text is not handed out."""


# -----------------------------------------------------------------------------
# The archive

def track_folders() -> list[Path]:
    """The folder of each track: those beside this file, then those of development."""
    return [path.parent for folder in (HERE, HERE.parent / DEV) for path in sorted(folder.glob("track_*/track.json"))]


def record_folders() -> list[Path]:
    """The folder of each record of all tracks."""
    return [path.parent for folder in track_folders() for path in sorted(folder.glob("*/runs.json"))]


def read_archive(folder: Path) -> list[tuple[dict, list[Record]]]:
    """Each track in a folder with its records, newest first."""
    tracks = []
    for path in track_folders():
        if path.parent == folder:
            tracks.append((read_track(path), read_records(path)))
    return tracks


def read_records(track: Path) -> list[Record]:
    """The records in a track folder, newest first."""
    return sorted((read_record(path.parent) for path in track.glob("*/runs.json")), key=record_order, reverse=True)


def title_of(record: Record) -> str:
    return read_text(record.folder / "README.md", MAX_JSON).split("\n", 1)[0].lstrip("# ").strip()


def board_text() -> str:
    """records/README.md: the rules, and a table per track."""
    parts = ["# Records", "This page is written by `python records/records.py board` from the logs in these folders.",
             RULES, "## Records so far", MEANINGS, "![the records of each track](history.svg)",
             *track_texts(read_archive(HERE)), *reinforcement.board_parts(HERE), "### Development",
             f"Earlier records used a text that cannot be handed out: [{DEV}/records.md](../{DEV}/records.md)."]
    return "\n\n".join(parts) + "\n"


def dev_board_text() -> str:
    """dev/records.md: the tracks of development."""
    parts = ["# Records of development", "This page is written by `python records/records.py board`.", DEV_RULES,
             MEANINGS, *track_texts(read_archive(HERE.parent / DEV))]
    return "\n\n".join(parts) + "\n"


def track_texts(tracks: list[tuple[dict, list[Record]]]) -> list[str]:
    """The paragraphs of some tracks: what they are, and the table of their records or the commands that make one."""
    parts = []
    for track, records in tracks:
        parts += [f"### {track['title']}", track["text"]]
        if records:
            test = "against the standing record" if "seconds" in track else f"below {track['target']:g}?:"
            header = (f"date | what changed | claim | training time, s (sd): | validation loss (sd): | n: | {test} | "
                      "steps: | hardware")
            parts += [table(header, [board_row(record) for record in records]),
                      f"![validation loss along these runs]({track['name']}/curves.svg)"]
        else:
            parts.append("```bash\n" + "\n".join(track["commands"]) + "\n```")
    return parts


def board_row(record: Record) -> list:
    """The cells of a record in the table of its track."""
    runs, track, name = record.of_arm(record.main), record.track, record.folder.name
    n, loss, sd = describe(run.loss for run in runs)
    _, seconds, seconds_sd = describe(run.seconds for run in runs)
    info = runs[0].info
    if "seconds" in track:
        standing = record.ledger.get("standing")
        shown = standing_text(record, standing) if standing else "the first"
    else:
        shown = p_text(t_test([run.loss for run in runs], track["target"])) if n > 1 else "-"
    return [name.split("_")[0], f"[{title_of(record)}]({track['name']}/{name}/)", record.ledger["claim"],
            seconds_text(seconds) + f" ({seconds_text(seconds_sd)})" * (n > 1),
            f"{loss:.4f}" + f" ({sd:.4f})" * (n > 1), n, shown, runs[0].steps,
            f"{info['world_size']} x {info['device']}"]


def standing_text(record: Record, standing: dict) -> str:
    """By how much the loss of a record differs from that of the standing one in their pairs."""
    pairs = pairs_of(record, standing["arm"])
    if not pairs:
        return "-"
    _, mean, sd = describe(own.loss - other.loss for own, other in pairs)
    return f"{mean:+.4f} ({sd:.4f}), n = {len(pairs)}"


def board_problem() -> list[str]:
    """Whether records/README.md and dev/records.md are what `board` writes."""
    problems = []
    for path, text in board_pages().items():
        if not path.is_file() or read_text(path, MAX_JSON) != text:
            problems.append(f"{path.parent.name}/{path.name} is not what the records say; write it again with "
                            "records.py board")
    return problems


def board_pages() -> dict[Path, str]:
    """The pages that `board` writes."""
    pages = {HERE / "README.md": board_text()}
    if read_archive(HERE.parent / DEV):
        pages[HERE.parent / DEV / "records.md"] = dev_board_text()
    return pages


# -----------------------------------------------------------------------------
# New records

def new(args) -> int:
    """Makes a record folder from run folders: logs, scripts, ledger, README with its tables, diff with the last one."""
    track, final = find_track(args.track), record_folder(args.name, args.track, args.date)
    runs = runs_of_record(args, track, final.name)
    previous = previous_record(final.parent)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=".new_") as temporary:
        folder = Path(temporary) / final.name
        folder.mkdir()
        record = fill_record(folder, track, runs, lost_runs(args.runs))
        write_readme(record, args.name, previous)
        os.rename(folder, final)
    for run in runs:
        if not run.counted:
            print(f"{run.folder} is listed, but does not count: {run.why}")
    print(f"{final}: {len(runs)} runs, a {record.ledger['claim']}\nNow answer what its README marks FILL IN. "
          f"Then run: records.py check {final} && records.py board")
    return 0


def record_folder(name: str, track: str, date: str = "") -> Path:
    """The folder that a new record gets; raises UserError if the name or the date is none, or the folder exists."""
    date = date or time.strftime("%Y-%m-%d")
    if not NAME.fullmatch(name) or not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        raise UserError(f"the name {name!r} or the date {date!r} cannot be part of a folder's name; use letters and "
                        "digits, and YYYY-MM-DD")
    folder = track_folder(track) / f"{date}_{name}"
    if folder.exists():
        raise UserError(f"{folder} exists; choose another NAME, or remove it")
    return folder


def track_folder(name: str) -> Path:
    """The folder of the track of that name; raises UserError that lists those there are."""
    folders = {path.name: path for path in track_folders()}
    if name not in folders:
        raise UserError(f"--track={name} is not a track; choose one of {', '.join(sorted(folders))}")
    return folders[name]


def find_track(name: str) -> dict:
    """The track of that name; raises UserError that lists those there are."""
    return read_track(track_folder(name))


def previous_record(track: Path) -> Record | None:
    """The standing record of a track folder, or else its newest reference."""
    return standing_record(track) or next(iter(read_records(track)), None)


def runs_of_record(args, track: dict, name: str) -> list[Run]:
    """The runs to keep, those of the main arm first; raises UserError for a run that cannot belong to the track.

    name: the folder of the record, for which the track may allow an exemption.
    """
    runs, exempt = collect_and_say(args.runs), track["exempt"].get(name, {})
    for run in runs:
        if run.counted and (problem := track_problem(track, run.info, "data_sha256" in exempt)):
            raise UserError(f"{run.folder} {problem}; name only runs that were made for {args.track}, or choose their "
                            "track with --track")
        if run.info["status"] == "running" and run.why == "running" and not args.killed:
            raise UserError(f"{run.folder} has the status running in run.json; wait for its end, or say with --killed "
                            "that such runs were killed")
    runs = [replace(run, why="killed while it ran") if run.why == "running" else run for run in runs]
    standing = standing_arm(runs, track, args.track)
    main = next((run.arm for run in runs if run.counted and run.arm != standing), None)
    if main is None:
        ends = ", ".join(sorted({run.info["status"] for run in runs}))
        raise UserError(f"none of the {len(runs)} runs counts (status: {ends}); a record needs a finished run")
    return sorted(runs, key=lambda run: run.arm != main)


def standing_arm(runs: list[Run], track: dict, name: str) -> str:
    """The arm among the runs that is the standing record of a track with a time; "" if there is nothing to beat."""
    standing = standing_record(track_folder(name)) if "seconds" in track else None
    if not standing:
        return ""
    first = standing.of_arm(standing.main)[0]
    for run in runs:
        if run.counted and (run.info["source_sha256"], run.flags) == (first.info["source_sha256"], first.flags):
            return run.arm
    raise UserError(f"no run is of the standing record {standing.folder.name}; a record of {name} needs pairs of runs "
                    f"with it, which records.py compare SCRIPT --track={name} makes")


def fill_record(folder: Path, track: dict, runs: list[Run], lost: list[dict]) -> Record:
    """Copies runs and scripts into the empty folder and writes the ledger; returns the record."""
    ledger = {"format": 2, "kind": "record", "claim": "reference", "arms": {}, "runs": []}
    for run in runs:
        add_run(folder, ledger, run, find_script(run, runs))
    copies = [read_run(folder / entry["folder"], arm=run.arm, counted=run.counted, why=run.why)
              for entry, run in zip(ledger["runs"], runs)]
    ledger["runs"] += [entry for entry in lost if entry["arm"] in ledger["arms"]]
    if odd := [entry for entry in lost if entry["arm"] not in ledger["arms"]]:
        raise UserError(f"no run of {odd[0]['arm']} left a folder; leave this comparison out, or run it to its end")
    if arm := standing_arm(runs, track, track["name"]):
        ledger["standing"] = {"record": standing_record(track_folder(track["name"])).folder.name, "arm": arm}
    record = Record(folder, ledger, copies, track)
    if judge(record)[0]:
        ledger["claim"] = "record"
    save_ledger(folder, ledger)
    return record


def write_readme(record: Record, name: str, previous: Record | None):
    """README.md with its tables and open questions, and changes.diff against the record before."""
    text = [f"# {name}: FILL IN what changed, in a few words", marked("result"),
            "FILL IN: what changed and why; what was tried and dropped. Numbers stand in the tables.",
            marked("tables"), "## Setup", marked("setup")]
    if previous:
        about, diff = script_diff(previous, record)
        if diff:
            write_text(record.folder / "changes.diff", diff)
            text.insert(3, f"`changes.diff` shows what changed since {previous.folder.name}. {about}".strip())
    write_text(record.folder / "README.md", fill("\n\n".join(text) + "\n", regions(record)))


def find_script(run: Run, runs: list[Run]) -> Path:
    """The script that a run ran; raises UserError if it is nowhere, or was edited since.

    A record or comparison keeps it once for all runs, and a run that failed early may have no copy: others have.
    """
    for other in [run, *runs]:
        if other.info["source_sha256"] != run.info["source_sha256"]:
            continue
        path = other.folder / other.info["script"]
        if not path.is_file() and (other.folder.parent / "runs.json").is_file():
            record = read_record(other.folder.parent)
            path = record.script(next(kept.arm for kept in record.runs if kept.folder == other.folder))
        if path.is_file():
            if problem := run.source_problem(path):
                raise UserError(f"{path} is not the script that {run.folder} ran: {problem[0]}, it ran {problem[1]}; "
                                "put the script that ran into its folder")
            return path
    raise UserError(f"{run.folder} holds no {run.info['script']}; put the script that ran into its folder")


def add_run(folder: Path, ledger: dict, run: Run, source: Path):
    """Copies a run and, for the first of its arm, the script into a record that is being made."""
    slug = re.sub(r"[^A-Za-z0-9.]+", "_", run.arm).strip("_.")[:60] or "arm"
    if run.arm not in ledger["arms"]:
        sources = run.sources(source) if "sources" in run.info else source_files(source)
        ledger["arms"][run.arm] = {"script": keep_script(folder, ledger, sources, slug), "flags": run.flags}
    tries = sum(entry["arm"] == run.arm and entry["seed"] == run.seed for entry in ledger["runs"])
    name = f"{slug}_seed{run.seed}" + f"_{tries + 1}" * (tries > 0)
    while (folder / name).exists():      # another arm's name may have the same letters
        name += "_"
    keep_run(run.folder, folder / name)
    status = run.info["status"].replace("running", "killed")
    ledger["runs"].append({"folder": name, "arm": run.arm, "seed": run.seed, "status": status, "counted": run.counted,
                           "why": run.why, "sha256": log_hashes(folder / name)})


def keep_script(folder: Path, ledger: dict, sources: list[Path], slug: str) -> str:
    """The path in a record of a script and its companions, copied unless another arm has the same ones."""
    for plan in ledger["arms"].values():                 # arms that differ in flags share their script
        place = (folder / plan["script"]).parent
        kept = source_files(folder / plan["script"])
        if [path.name for path in kept] == [path.name for path in sources] and all(
                sha256(place / path.name) == sha256(path) for path in sources):
            return plan["script"]
    where = f"{slug}/" if ledger["arms"] else ""
    (folder / where).mkdir(exist_ok=True)
    for path in sources:
        shutil.copyfile(path, folder / where / path.name)
    return f"{where}{sources[0].name}"


def new_rl(args) -> int:
    """Makes a folder of curves from runs of chat_rl.py."""
    folder = reinforcement.new_folder(HERE, args.name, args.runs, args.alone, args.date)
    print(f"{folder}\nNow answer what its README marks FILL IN. Then run: records.py check --all && records.py board")
    return 0


# -----------------------------------------------------------------------------
# Command line

def summarize(args) -> int:
    """Prints the tables of some runs; with --write, writes those of a record into its README."""
    if args.write:
        for folder in args.runs:
            path = folder / "README.md"
            write_text(path, fill(unix_lines(read_text(path, MAX_JSON)), regions(read_record(folder))))
            print(f"{path} is up to date")
        return 0
    target = find_track(args.track).get("target", 0) if args.track else args.target
    runs = collect_and_say(args.runs)
    print(arms_table(runs, target) + "\n\n" + runs_table(runs))
    for folder in args.runs:
        if (folder / "runs.json").is_file() and read_json(folder / "runs.json").get("kind") == "comparison":
            print("\n" + verdict_text(read_record(folder)))
    return 0


def check(args) -> int:
    """Prints a line for each lie; 1 if there is one."""
    folders = record_folders() if args.all else args.records
    unlisted = [path for folder in track_folders() for path in sorted(folder.iterdir())
                if path.is_dir() and not (path / "runs.json").is_file()]
    if not args.all and not folders:
        raise UserError("name a record or comparison folder, or --all")
    lies = [f"{path}: a record folder without runs.json" for path in unlisted if args.all]
    with ThreadPoolExecutor(os.cpu_count()) as threads:             # the guard is a process for each script
        for folder, problems in zip(folders, threads.map(partial(check_record, guard=not args.no_guard), folders)):
            lies += [f"{folder}: {problem}" for problem in problems]
            print(f"{folder}: {'NOT ' if problems else ''}ok", flush=True)
    for folder in reinforcement.folders(HERE) if args.all else ():
        problems = reinforcement.check_folder(folder)
        lies += [f"{folder}: {problem}" for problem in problems]
        print(f"{folder}: {'NOT ' if problems else ''}ok", flush=True)
    lies += board_problem() if args.all and not lies else []
    for line in lies:
        print(f"records.py: {line}", file=sys.stderr)
    return 1 if lies else 0


def collect_and_say(paths: list[Path]) -> list[Run]:
    """The runs below the paths; says which folders there hold none."""
    runs = collect(paths)
    if skipped := skipped_folders(paths):
        names = ", ".join(folder.name for folder in skipped[:5]) + ", ..." * (len(skipped) > 5)
        print(f"records.py: note: {len(skipped)} folder(s) without run.json are left out: {UserError(names)}",
              file=sys.stderr)
    return runs


def plot_runs(args) -> int:
    """Curves of runs as --out.svg and --out.png."""
    name = args.out.stem if args.out.suffix in (".svg", ".png") else args.out.name
    if not name:
        raise UserError(f"--out={args.out} is a folder; give a file name without ending, as in --out=curves")
    paths = [args.out.with_name(name + suffix) for suffix in (".svg", ".png")]
    plot(collect_and_say(args.runs), *paths)
    print(*paths)
    return 0


def board(args) -> int:
    """Writes records/README.md, records/history.svg, and curves.svg in the folder of each track that has records."""
    for path, text in board_pages().items():
        write_text(path, text)
        print(f"wrote {path}")
    history(read_archive(HERE), HERE / "history.svg")
    print(f"wrote {HERE / 'history.svg'}")
    for folder in track_folders():
        records = read_records(folder)
        runs = [replace(run, arm=record.folder.name) for record in records for run in record.of_arm(record.main)]
        if runs:
            plot(runs, folder / "curves.svg")
            print(f"wrote {folder / 'curves.svg'}")
    return 0


def shards(args) -> int:
    """Compares the shards on this machine with those of a track; 1 if one is missing or another."""
    track, bad = find_track(args.track), 0
    patterns = {flag.partition("=")[0]: flag.partition("=")[2] for flag in track["flags"]}
    for side, flag in (("train_data", "--train_files"), ("val_data", "--val_files")):
        folder = Path(patterns.get(flag, "data")).parent
        for name, shard in sorted(track[side].items()):
            path = folder / name
            if not shard["sha256"]:
                state = "the track names no sha256"
            elif not path.is_file():
                state = "is not here"
            else:
                state = "ok" if sha256(path) == shard["sha256"] else "is another file"
            bad += state not in ("ok", "the track names no sha256")
            print(f"{path}: {state}")
    if bad:
        print(f"records.py: {bad} shard(s) of {args.track} are missing or not the track's; make them: "
              f"{track['commands'][0]}", file=sys.stderr)
    return int(bad > 0)


def compare_scripts(args, flags: list[str]) -> int:
    """`compare`; with --track the standing record is arm A, and the flags of the track go to the other arms."""
    args.standing = None
    if args.track:
        if args.a_flags or args.noise:
            raise UserError(f"--track={args.track} fixes the flags of A; leave --a_flags and --noise out")
        track = find_track(args.track)
        args.standing = standing_record(track_folder(args.track))
        if not args.standing:
            raise UserError(f"--track={args.track} has no record yet; make the first one as records/README.md says")
        flags = [*track["flags"], *flags]
    return compare(args, flags)


def make(args, flags: list[str]) -> int:
    """Runs a script for a track, beside the standing record if its track has a time, and makes the record folder."""
    track, out = find_track(args.track), args.out or Path("logs") / f"make_{args.name}"
    words = ["new", args.name, f"--track={args.track}", str(out)]
    record_folder(args.name, args.track)                 # a bad name is refused before the runs, not after
    if args.n < LEAST:
        raise UserError(f"--n={args.n}: a record needs at least {LEAST} runs")
    check_script(args.script)
    planned = read_json(out / "runs.json").get("rounds", args.n) if (out / "runs.json").is_file() else args.n
    if planned != args.n:
        raise UserError(f"--n={args.n}, but {out} was started with --n={planned}; go on with --n={planned}, for the "
                        "number of runs of a record is decided before the first one starts")
    if args.from_standing:
        flags = flags_from_standing(track, args.track, flags)
    given = dict(flag.partition("=")[::2] for flag in [*track["flags"], *flags])
    for name in ("--train_files", "--val_files"):
        if name in given and not matching_files(given[name]):
            raise UserError(f"{name}={given[name]} matches no file; make the text of this track: "
                            f"{track['commands'][0]}")
    if "seconds" in track and standing_record(track_folder(args.track)):
        compared = ["compare", str(args.script), f"--track={args.track}", f"--n={args.n}", f"--out={out}",
                    f"--ranks={track['ranks']}"]
        compare_scripts(*make_parser().parse_known_args([*compared, *flags]))
    else:
        if out.exists():
            raise UserError(f"{out} exists; remove it, or name another folder with --out")
        check_flags([*track["flags"], *flags])
        jobs = (Job(args.script, [*track["flags"], *flags, f"--seed={seed}"], out / f"seed{seed}", seed=seed)
                for seed in range(args.n))
        words[-1:] = [str(run.folder) for run in finished_runs(jobs, args.script, track["ranks"])]
    return new(make_parser().parse_args(words))


def flags_from_standing(track: dict, name: str, flags: list[str]) -> list[str]:
    """The flags of the standing record without those of the track; `flags` replace those of the same name."""
    standing = standing_record(track_folder(name))
    if not standing:
        raise UserError(f"--from_standing: {name} has no record yet; leave it out")
    first = standing.of_arm(standing.main)[0]
    named = {flag.partition("=")[0]: flag for flag in first.flags if flag not in track["flags"]}
    return [*(named | {flag.partition("=")[0]: flag for flag in flags}).values()]


def make_parser() -> argparse.ArgumentParser:
    """The command line; each command's help is its whole story."""
    parser = argparse.ArgumentParser(prog="records.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add_command in (add_compare, add_summarize, add_plot, add_new, add_check, add_replay, add_board, add_shards,
                        add_make, add_new_rl):
        add_command(commands)
    return parser


def add_parser(commands, name: str, run, summary: str, story: str = ""):
    """The function that adds arguments to a new command."""
    stop = "" if summary.endswith("?") else "."
    made = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}{stop}\n\n{story}",
                               allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.set_defaults(run=run)
    return made.add_argument


def add_compare(commands):
    summary = "which script, flag or edit is better, and what is noise?"
    add = add_parser(commands, "compare", compare_scripts, summary, """\
The first script is arm A. Further scripts are arms B, C and so on. An arm may also be the first script with other flags
or with edits of its text. Each round runs every arm once, with the same seed, in turn; every other round runs them
backwards. At the end each arm is compared with A over the rounds, by two-sided paired t-tests:

  time                 training time, as a ratio
  loss                 final validation loss
  time at equal loss   the time at which each run first reaches the higher one of the two final losses, on straight
                       lines between validations; a smaller --val_every makes it finer

Arms with a name, one on the command line or one a line in a file (# begins a comment):

  --arm="fast: --lr=1.2 --cooldown=0.5"        other flags
  --arm="gelu: F.relu(x) => F.gelu(x)"         an edit: the old text must occur exactly once
  --arm="both: --lr=1.2 | F.relu(x) => F.gelu(x) | a = 1 => a = 2"
  --arm="mine: my_idea.py | --lr=1.2"          another script

In an edit \\n is a new line, \\| a bar and \\\\ a backslash. All other flags of the command line go to every arm. Before
the first run, each script is loaded and asked for its flags. A script without parse_config is not asked.

The output folder receives the logs, README.md, table.md, table.json, and what failed runs printed. The same command
goes on where it was stopped, and adds rounds if --n is larger. An arm that fails is left out of later rounds.""")
    add("scripts", nargs="+", type=user_path, metavar="SCRIPT", help="training scripts; the first one is the reference")
    add("--n", type=int, default=6, help="number of rounds; fewer than 3 give a table without "
        "verdicts (default: %(default)s)")
    add("--arm", action="append", default=[], metavar="ARM", help="a further arm, as above; may be repeated")
    add("--arms", type=user_path, metavar="FILE", help="further arms, one a line")
    add("--a_flags", default="", help='flags of A only, as in --a_flags="--lr=0.8 --cooldown=0.5"')
    add("--b_flags", default="", help="flags of B only; with one script, B is the same script")
    add("--track", default="", metavar="TRACK", help="A is the standing record of this track with its own flags; "
        "the other arms get the flags of the track")
    add("--noise", action="store_true", help="run A against itself: which differences are noise on this machine?")
    add("--p", type=float, default=0.05, help="level of the tests: how often equal scripts may look different; for a "
        "claim take 0.01 (default: %(default)s)")
    add("--limit", type=float, default=0, metavar="SECONDS", help="stop a run after this time (default: never)")
    add("--ranks", type=int, default=1, help="GPUs for each run, through torchrun (default: %(default)s)")
    add("--gpus", type=int, default=0, metavar="N", help="use N GPUs: N / ranks runs at a time, each on GPUs of its "
        "own (default: one run at a time)")
    add("--at_once", action="store_true", help="all arms of a round run side by side, each with its share of the cores "
        "and GPUs of its own, so that what slows the machine down slows all of them")
    add("--out", type=user_path, metavar="FOLDER", help="where the comparison goes (default: logs/compare_...)")


def add_summarize(commands):
    add = add_parser(commands, "summarize", summarize, "mean, sd, interval and test of some runs, as Markdown tables",
                     "Runs of the same script with the same flags are one arm, whatever their seed. The interval is\n"
                     "Student's, the test is one-sided.")
    add("runs", nargs="+", type=user_path, metavar="RUN")
    add("--target", type=float, default=0, help="test whether the mean loss is below this value (default: no test)")
    add("--track", metavar="TRACK", help="take the target of this track, as in --track=track_1_small")
    add("--write", action="store_true", help="RUN is a record or comparison: write the tables into its README")


def add_plot(commands):
    add = add_parser(commands, "plot", plot_runs, "curves over steps, time and tokens, as SVG and PNG",
                     "One line an arm: the mean, with a band from its lowest to its highest run.")
    add("runs", nargs="+", type=user_path, metavar="RUN")
    add("--out", type=user_path, default=Path("curves"), help="name without ending (default: %(default)s)")


def add_new(commands):
    add = add_parser(commands, "new", new, "make a record folder from run folders", """\
Name every run that was started, also those that failed: they are listed, and do not count. The record is about the
script and flags of the first finished run. A finished run of another machine or another validation text than the
track's is refused. Checkpoints are left out.""")
    add("name", metavar="NAME", help="as in MyIdea; the folder is DATE_NAME")
    add("runs", nargs="+", type=user_path, metavar="RUN")
    add("--track", required=True, help="as in track_1_small")
    add("--date", help="YYYY-MM-DD (default: today)")
    add("--killed", action="store_true", help="runs whose run.json says running were killed: list them so")


def add_new_rl(commands):
    add = add_parser(commands, "new_rl", new_rl, "make a folder of curves from runs of chat_rl.py", """\
Copies run.json, log.txt and samples.jsonl of each run to records/track_rl/DATE_NAME, and writes a README whose tables
are computed from them, with the curve of pass@1. Runs may differ in --lr, --std, --kl and --seed. Paths of the machine
are cut to their last part. `check --all` computes the tables again.""")
    add("name", metavar="NAME", help="as in SpellingBee; the folder is DATE_NAME")
    add("runs", nargs="+", type=user_path, metavar="RUN", help="run folders of finished runs")
    add("--alone", type=user_path, action="append", default=[], metavar="RUN", help="a further run, which had the "
        "card alone and says how long a step takes; may be given several times")
    add("--date", help="YYYY-MM-DD (default: today)")


def add_check(commands):
    add = add_parser(commands, "check", check, "do the tables say what the logs say?", """\
Checks the list of runs, scripts, logs, machine, validation text, target and README. Then the metric guard runs each
script at a small size. Prints the first lie of each record; exit code 1 if there is one.""")
    add("records", nargs="*", type=user_path, metavar="RECORD", help="record or comparison folders")
    add("--all", action="store_true", help="every record of the archive, and records/README.md")
    add("--no_guard", action="store_true", help="read only: do not run the scripts")


def add_replay(commands):
    add = add_parser(commands, "replay", replay, "run a record again on this machine", """\
Runs the record's own script with its own flags and a new seed. Other flags, as --train_files=..., replace those of the
record. Versions and the sha256 of the validation files are compared before the run. After it, loss and training time
are compared with the interval that the record's runs predict.""")
    add("record", type=user_path, metavar="RECORD")
    add("--n", type=int, default=1, help="number of runs (default: %(default)s)")
    add("--ranks", type=int, default=0, help="number of GPUs (default: the record's)")
    add("--seed", type=int, default=-1, help="seed of the first run (default: the next after the record's)")
    add("--num_iterations", type=int, default=0, help="a shorter run, if the record has reference runs of that length")
    add("--out", type=user_path, metavar="FOLDER", help="where the runs go (default: logs/replay_...)")


def add_board(commands):
    add_parser(commands, "board", board, "write records/README.md and its pictures")


def add_make(commands):
    add = add_parser(commands, "make", make, "run a script for a track and make its record folder", """\
On a track with a training time, the script runs in pairs with the standing record, as `compare --track` does. On other
tracks, and if there is no record yet, it runs with the seeds 0, 1, 2 and so on. The flags of the track and all other
flags of the command line go to the script. Then a record folder is made, as `new` does.""")
    add("name", metavar="NAME", help="as in MyIdea; the folder is DATE_NAME")
    add("script", metavar="SCRIPT", type=user_path, help="a training script")
    add("--track", required=True, help="as in track_0_cpu")
    add("--n", type=int, default=6, help="number of runs, or of pairs; it stays when the command goes on (default: "
        "%(default)s)")
    add("--from_standing", action="store_true", help="also give the script the flags of the standing record; a flag of "
        "the command line replaces the one of the same name")
    add("--out", type=user_path, metavar="FOLDER", help="where the runs go (default: logs/make_NAME)")


def add_shards(commands):
    add = add_parser(commands, "shards", shards, "are the shards here those of a track?",
                     "Compares the sha256 of each shard that the track names; exit code 1 if one differs.")
    add("track", metavar="TRACK", help="as in track_0_cpu")


def main() -> int:
    """Runs the command line.

    Exit code: 0 done, 1 check found a lie, 2 the user can put it right, 130 interrupted, 141 nobody reads the output.
    """
    parser = make_parser()

    def refuse(message):
        raise UserError(f"{message}; --help lists commands and flags")
    for stream in (sys.stdout, sys.stderr):              # a terminal may lack letters that a title has
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")
    try:
        for one in [parser, *parser._subparsers._group_actions[0].choices.values()]:
            one.error = refuse
        signal.signal(signal.SIGTERM, signal.default_int_handler)    # ends like Ctrl-C, also where that is ignored
        if empty := [word for word in sys.argv[1:] if re.fullmatch("--.*=--", word, re.S)]:
            refuse(f"{empty[0]} has no value")                       # argparse would read it as a list
        args, rest = parser.parse_known_args()
        if args.run in (compare_scripts, replay, make):
            return args.run(args, rest)
        return refuse(f"unknown argument {rest[0]}") if rest else args.run(args)
    except UserError as error:
        print(f"records.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:                              # nobody reads on, as behind `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE                      # not 0: `check` has not looked at everything
    except OSError as error:
        print(f"records.py: {UserError(error)}; name another path", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("records.py: interrupted" + "; the same command goes on from here" * ("compare" in sys.argv),
              file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
