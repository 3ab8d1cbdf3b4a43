"""Compares training scripts and flags: runs the arms in turn with the same seeds, and writes ledger, logs and tables.

This is a module of records.py, not a command: python records/records.py compare --help explains it.
"""
import contextlib
import hashlib
import json
import math
import re
import shutil
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flags import check_arms
from launcher import Job, Outcome, keep_run, launch, log_hashes, make_slots, visible_gpus
from runs import (LEAST, MAX_JSON, NAME, SCRIPT, UserError, Verdict, arm_result, fill, marked, read_json, read_record,
                  read_run, read_text, regions, results_table, seconds_text, source_files, user_path, verdict_text,
                  verdicts_of, write_text)

HALF = "half a round"                    # begins the reason why such a run does not count
STOPPED = "stopped after"                # begins the reason why a run that met --limit does not count
OWN_FILES = ("readme.md", "runs.json", "table.json", "table.md")     # of the output folder, in lower case
PROJECT = Path(__file__).resolve().parent.parent
EDIT = re.compile(r" =>(?: |$)")
ARM_FORM = 'write --arm="NAME: --flag=value | old text => new text", as --help says'


@dataclass(frozen=True)
class Arm:
    """What one arm of a comparison runs."""
    script: str                          # file name
    files: dict[str, bytes]              # the script, edited, and its companions
    flags: list[str]
    edits: list[str]

    def key(self) -> list:
        """What tells two arms apart."""
        return [[hashlib.sha256(content).hexdigest() for content in self.files.values()], self.flags]


# -----------------------------------------------------------------------------
# The plan

def split_flags(text: str) -> list[str]:
    """`--a=1 --b=x y` as a list; blanks inside a value stay, for only what begins with -- begins a flag."""
    return [flag for flag in re.split(r"\s+(?=--)", text.strip()) if flag]


def check_flags(flags: list[str]):
    """Raises UserError for a flag that cannot go to the scripts."""
    for flag in flags:
        if not re.match(r"--[^=]+=", flag) or flag.startswith(("--seed=", "--out_dir=")):
            raise UserError(f"{flag} cannot be passed on; flags of the scripts look like --field=value, and compare "
                            "sets --seed and --out_dir itself")


def make_arm(path: Path, flags: list[str], edits: list[str] = (), name: str = "") -> Arm:
    """An arm that runs the script at `path`, after text edits `old => new`; raises UserError."""
    check_script(path)
    if not SCRIPT.fullmatch(path.name):
        raise UserError(f"{path} has a name that is not made of letters, digits and blanks; rename it")
    check_flags(flags)
    files = {source.name: source.read_bytes() for source in source_files(path)}
    text = read_text(path.resolve(), MAX_JSON)       # a link to a script is as good as the script
    windows = "\r\n" in text
    text = text.replace("\r\n", "\n")
    for edit in edits:
        old, *new = EDIT.split(edit)
        if not old or len(new) != 1:
            raise UserError(f"--arm {name} has the edit {edit[:80]!r}, which is not of the form old => new; {ARM_FORM}")
        old, new = unescape(old), unescape(new[0])
        if text.count(old) != 1:
            raise UserError(f"--arm {name}: {old[:80]!r} occurs {text.count(old)} times in {path}; an edit needs a "
                            "text that occurs exactly once")
        text = text.replace(old, new)
    if edits:
        files[path.name] = (text.replace("\n", "\r\n") if windows else text).encode()
    return Arm(path.name, files, flags, list(edits))


def check_script(path: Path):
    """Raises UserError unless there is a Python file at `path`; names the project's own script of that name."""
    if path.suffix != ".py" or path.is_dir():
        raise UserError(f"{path} is not a training script; name one, as train_gpt.py")
    if not path.is_file():
        ours = PROJECT / path.name
        remedy = f"this project's is {ours}" if ours.is_file() else "write the path of a training script"
        raise UserError(f"there is no file {path.name} in {path.absolute().parent}; {remedy}")


def unescape(text: str) -> str:
    r"""The text with \n as a new line, \| as a bar and \\ as a backslash."""
    return re.sub(r"\\([n|\\])", lambda match: "\n" if match[1] == "n" else match[1], text)


def named_arm(text: str, script: Path, flags: list[str]) -> tuple[str, Arm]:
    """The arm of `NAME: PART | PART`: parts are flags, edits, or another script; raises UserError."""
    name, colon, rest = text.partition(":")
    name, edits = name.strip(), []
    if not colon or not NAME.fullmatch(name) or len(name) > 40:
        raise UserError(f"--arm={text[:80]!r} has no name of up to 40 letters and digits before a colon; {ARM_FORM}")
    if name.lower() in OWN_FILES or re.search(r"_seed\d", name):
        raise UserError(f"--arm {name} has the name of a file or run of the output folder; choose another name")
    own = []
    for part in re.split(r"(?<!\\)\s\|\s", f" {rest} "):
        part = part.strip()
        if EDIT.search(part):
            edits.append(part)
        elif part.startswith("--"):
            own += split_flags(part)
        elif part.endswith(".py"):
            script = user_path(part)
        elif part:
            raise UserError(f"--arm {name} has the part {part[:80]!r}, which is no flag, edit or script; {ARM_FORM}")
    return name, make_arm(script, flags + own, edits, name)


def comparison_plan(args, flags: list[str]) -> dict[str, Arm]:
    """The arms by name, the reference first; raises UserError if they are not what the command needs."""
    scripts, letters, standing = args.scripts, string.ascii_uppercase, args.standing
    if len(scripts) + bool(standing) > len(letters):
        raise UserError(f"{len(scripts)} scripts are too many; compare fewer than {len(letters)}, or use --arms=FILE")
    if (args.noise or args.b_flags) and len(scripts) == 1 and not standing:
        scripts = scripts * 2
    own = {"A": split_flags(args.a_flags), "B": split_flags(args.b_flags)}
    plan = {}
    if standing:
        plan["A"] = make_arm(standing.script(standing.main), standing.ledger["arms"][standing.main]["flags"])
    for letter, path in zip(letters[len(plan):], scripts):
        plan[letter] = make_arm(path, flags + own.get(letter, []))
    texts = args.arm + (read_arms(args.arms) if args.arms else [])
    for text in texts:
        name, arm = named_arm(text, scripts[0], flags)
        if name.lower() in map(str.lower, plan):
            raise UserError(f"--arm {name} is there twice; scripts are called {', '.join(letters[:3])} and so on")
        plan[name] = arm
    check_plan(args, plan)
    return plan


def read_arms(path: Path) -> list[str]:
    """The arms in a file, one a line; empty lines and those that begin with # are skipped."""
    try:
        lines = [line.strip() for line in read_text(path.resolve(), MAX_JSON).split("\n")]
    except UserError as error:
        raise UserError(f"--arms={path}: {error}; name a text file with one arm a line") from None
    arms = [line for line in lines if line and not line.startswith("#")]
    if not arms:
        raise UserError(f"--arms={path} holds no arm; write one a line, as in --lr=1.2")
    return arms


def check_plan(args, plan: dict[str, Arm]):
    """Raises UserError if arms are the same, or numbers make no sense."""
    for name, least in (("n", 1), ("ranks", 1), ("gpus", 0), ("limit", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name}={getattr(args, name):g} is below {least}; raise it")
    if not 0 < args.p < 0.5:
        raise UserError(f"--p={args.p:g} is not between 0 and 0.5; the rule of the records is --p=0.01")
    if len(plan) < 2:
        raise UserError("there is nothing to compare A with; name another script, or give --b_flags, --arm or --noise")
    seen = {}
    for name, arm in plan.items():
        twin = seen.setdefault(json.dumps(arm.key()), name)
        if twin != name and not args.noise:
            raise UserError(f"{twin} and {name} are the same; change one of them, or ask for the noise with --noise")
    if args.noise and (len(seen) > 1 or len(plan) > 2):
        raise UserError("A and B are different; --noise is for one script with one set of flags")
    needed = args.ranks * len(plan) if args.at_once else args.gpus
    found = len(visible_gpus()) if needed else 0
    if args.at_once and args.gpus:
        raise UserError("--at_once and --gpus exclude each other; leave one of them out")
    if args.at_once and 0 < found < needed:
        raise UserError(f"--at_once needs {needed} GPUs, or none, and finds {found}; leave it out")
    if args.gpus and (found < needed or args.gpus % args.ranks):
        raise UserError(f"--gpus={args.gpus} with --ranks={args.ranks}: {found} GPUs are visible; give a multiple of "
                        f"--ranks up to {found}" if found else f"--gpus={args.gpus}: no GPU is visible; leave it out")


# -----------------------------------------------------------------------------
# The runs

def compare(args, flags: list[str]) -> int:
    """Runs the arms in turn; writes the ledger as it goes, and the tables at the end."""
    plan = comparison_plan(args, flags)
    how = [args.ranks] + ["at once"] * args.at_once + [f"{args.gpus} GPUs"] * bool(args.gpus)
    key = json.dumps([[name, arm.script, *arm.key()] for name, arm in plan.items()] + how)
    stems = dict.fromkeys(Path(arm.script).stem for arm in plan.values())
    digest = hashlib.sha256(key.encode()).hexdigest()
    folder = args.out or Path("logs") / f"compare_{'_'.join(stems)[:80]}_{digest[:8]}"
    comparison = Comparison(folder, open_comparison(folder, plan, args, digest), args)
    if args.n < LEAST and not args.noise:
        print(f"--n={args.n} will give no verdict, which takes {LEAST} rounds", flush=True)
    try:
        comparison.run()
    finally:
        if any(run["counted"] for run in comparison.ledger["runs"]):
            comparison.write_tables()
    comparison.print_tables()
    if comparison.failed:
        raise UserError("; ".join(comparison.failed.values()) + f"; what failed runs printed is in {folder}")
    return 0


def open_comparison(folder: Path, plan: dict[str, Arm], args, digest: str) -> dict:
    """The ledger of a comparison: a new one with copies of the scripts, or the one that was begun here.

    Raises UserError if another one was begun here, or if a script of a new one does not take its flags.
    """
    if (folder / "runs.json").is_file():
        ledger = read_json(folder / "runs.json")
        if ledger.get("setup_sha256") != digest:
            raise UserError(f"--out={folder} holds another comparison; choose another folder")
        known = {run["seed"] for run in read_record(folder).ledger["runs"]}
        planned = ledger.get("rounds", args.n)
        print(f"{folder} goes on: {len(known)} of {args.n} rounds were begun"
              + f"; it was started with --n={planned}" * (planned != args.n), flush=True)
        return ledger | {"p": args.p}
    check_arms(plan)
    for name, arm in plan.items():       # what runs is a copy, so that editing goes on meanwhile
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file, content in arm.files.items():
            (folder / name / file).write_bytes(content)
    arms = {name: {"script": f"{name}/{arm.script}", "flags": arm.flags} | ({"edits": arm.edits} if arm.edits else {})
            for name, arm in plan.items()}
    ledger = {"format": 3, "kind": "comparison", "p": args.p, "rounds": args.n, "looks": [], "setup_sha256": digest,
              "runs": [], "arms": arms}
    save_ledger(folder, ledger)
    return ledger


def save_ledger(folder: Path, ledger: dict):
    write_text(folder / "runs.json", json.dumps(ledger, indent=1) + "\n")


class Comparison:
    """A comparison that goes on: its folder, its ledger, and the arms that failed."""

    def __init__(self, folder: Path, ledger: dict, args):
        self.folder, self.ledger, self.args = folder, ledger, args
        self.names = list(ledger["arms"])
        self.failed = {}                 # arm -> why; such an arm is not started again
        self.entries = {}                # (arm, seed) -> its entry in the ledger, while it runs

    def run(self):
        """Starts what is missing and lists how it ended."""
        args = self.args
        together = len(self.names) if args.at_once else max(1, args.gpus // args.ranks)
        slots = make_slots(together, args.ranks, own_gpus=bool(args.gpus))
        rounds = [range(seed, seed + 1) for seed in range(args.n)] if args.at_once else [range(args.n)]
        for seeds in rounds:             # at once: a round begins when the one before has ended
            started = launch(self.jobs(seeds), slots, args.ranks, args.limit)
            with contextlib.closing(started), self.interruptions():
                for job, outcome in started:
                    self.finish(job, outcome)
        shutil.rmtree(self.folder / ".running", ignore_errors=True)
        if not self.failed:
            self.ledger["looks"] = sorted({*self.ledger["looks"], args.n})
            save_ledger(self.folder, self.ledger)

    @contextlib.contextmanager
    def interruptions(self):
        """Lists runs that Ctrl-C ends as interrupted."""
        try:
            yield
        except KeyboardInterrupt:
            for entry in self.entries.values():
                entry.update(status="interrupted", why="interrupted while it ran")
            save_ledger(self.folder, self.ledger)
            raise

    def jobs(self, seeds: range) -> Iterator[Job]:
        """The missing runs in their order: every other round backwards. Each is listed before it starts."""
        for seed in seeds:
            names = self.missing(seed)
            for name in names if seed % 2 == 0 else reversed(names):
                if self.names[0] in self.failed or len(self.names) - len(self.failed) < 2:
                    return               # nothing is left to compare
                if name not in self.failed:
                    yield self.start(name, seed)

    def missing(self, seed: int) -> list[str]:
        """The arms to run with a seed: all of them, unless all have run.

        Runs of a round belong together in time, so part of a round does not count. A single round has no verdict and
        takes only what it lacks.
        """
        listed = [run for run in self.ledger["runs"] if run["seed"] == seed and not run["why"].startswith(HALF)]
        done = {run["arm"] for run in listed
                if run["status"] in ("finished", "diverged") or run["why"].startswith(STOPPED)}
        missing = [name for name in self.names if name not in done]
        if not missing or self.args.n == 1:
            return missing
        for run in listed:
            if run["counted"]:
                run.update(counted=False, why=f"{HALF}: the comparison was interrupted before the others had run")
        return self.names

    def start(self, name: str, seed: int) -> Job:
        """Lists a run as killed, which it is unless it says otherwise, says that it begins, and returns its job."""
        entry = {"folder": None, "arm": name, "seed": seed, "status": "killed", "counted": False,
                 "why": "killed while it ran"}
        self.entries[name, seed] = entry
        self.ledger["runs"].append(entry)
        save_ledger(self.folder, self.ledger)
        print(f"round {seed + 1} of {self.args.n}: {name} begins", flush=True)
        plan = self.ledger["arms"][name]
        return Job(self.folder / plan["script"], [*plan["flags"], f"--seed={seed}"],
                   self.folder / ".running" / f"seed{seed}" / name, name, seed)

    def finish(self, job: Job, outcome: Outcome):
        """Keeps the logs of a run that ended, lists how, and says so."""
        entry = self.entries.pop((job.arm, job.seed))
        tries = sum(run["arm"] == job.arm and run["seed"] == job.seed for run in self.ledger["runs"])
        name = f"{job.arm}_seed{job.seed}" + f"_{tries}" * (tries > 1)
        why = f"{STOPPED} {self.args.limit:g} s (--limit)" if outcome.stopped else ""
        if outcome.folder:
            keep_run(outcome.folder, self.folder / name)
            run = read_run(self.folder / name)
            status = run.info["status"].replace("running", "killed")
            entry.update(folder=name, status=status, sha256=log_hashes(run.folder), counted=run.finished,
                         why="" if run.finished else why or f"{status}: {outcome.last[:200]}")
        else:
            entry.update(status="killed" if outcome.stopped else "refused",
                         why=why or f"exit code {outcome.code}: {outcome.last[:200]}")
        result = entry["why"]
        if entry["status"] == "finished":
            result = f"loss {run.loss:.6f} in {seconds_text(run.seconds)} s"
        elif entry["status"] != "diverged" and not outcome.stopped:
            result = f"failed with exit code {outcome.code}, see {self.folder / f'{name}_output.txt'}"
            self.failed[job.arm] = f"arm {job.arm} failed with exit code {outcome.code}: {outcome.last[:300]}"
        if entry["status"] != "finished":
            shutil.copyfile(job.out_dir / "output.txt", self.folder / f"{name}_output.txt")
        shutil.rmtree(job.out_dir)
        save_ledger(self.folder, self.ledger)
        print(f"round {job.seed + 1}/{self.args.n}, {job.arm}: {result}", flush=True)

    def write_tables(self):
        """README.md, and the tables alone as table.md and table.json."""
        record = read_record(self.folder)
        arms = {name: plan["script"].split("/")[-1] for name, plan in self.ledger["arms"].items()}
        title = "# " + " against ".join(f"{name}: {script}" for name, script in arms.items())
        title += "\n\nThe runs of a round ran at once, each with its share of the cores." * self.args.at_once
        if self.args.gpus:
            together = self.args.gpus // self.args.ranks
            title += f"\n\nRuns shared the machine: {together} at a time, each on GPUs of its own."
        text = "\n\n".join([title, marked("verdict"), marked("tables"), "## Setup", marked("setup")]) + "\n"
        write_text(self.folder / "README.md", fill(text, regions(record)))
        write_text(self.folder / "table.md", tables(record) + "\n")
        rows = [arm_result(record, arm) for arm in self.names]
        for row in rows[1:]:
            row["against"] = self.names[0]
            row["verdicts"] = [verdict_numbers(verdict) for verdict in verdicts_of(record, row["arm"])]
        write_text(self.folder / "table.json", json.dumps(rounded(rows), indent=1) + "\n")

    def print_tables(self):
        """Prints the tables; nothing if no run has ended well."""
        if any(run["counted"] for run in self.ledger["runs"]):
            print(f"\n{tables(read_record(self.folder))}\n\nledger, logs and tables are in {self.folder}")


def tables(record) -> str:
    """The results of the arms and what they show."""
    return results_table(record) + "\n\n" + verdict_text(record)


def rounded(value):
    """Numbers to six digits, also those in lists and dictionaries."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def verdict_numbers(verdict: Verdict) -> dict:
    """A verdict for table.json; differences of times are of logarithms, and are given as ratios."""
    numbers = {"measure": verdict.measure, "pairs": len(verdict.differences)}
    if not verdict.differences:
        return numbers | {"verdict": "not defined"}
    name = "relative_difference" if verdict.relative else "difference"
    low, high = verdict.interval
    values = [verdict.mean, low, high]
    if verdict.relative:
        values = [math.expm1(value) if value < 700 else None for value in values]    # more is no finite number
    return numbers | {"verdict": verdict.words, name: values[0], "low": values[1], "high": values[2], "p": verdict.p,
                      "pairs_needed": verdict.pairs_needed}


if __name__ == "__main__":
    print(__doc__.strip())
