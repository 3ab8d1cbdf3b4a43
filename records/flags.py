"""Says whether training scripts can be imported and take their flags; nothing is trained.

This is a module of records.py, not a command: compare starts it once for each arm before the first run, as
python records/flags.py SCRIPT FLAG...  Exit code: 0 all is well, 2 with a last line that says what is wrong.
"""
import contextlib
import importlib.util
import re
import sys
import tempfile
import traceback
from pathlib import Path

from launcher import Job, launch
from runs import UserError

AT_ONCE = 4                              # processes, each of which loads PyTorch
# a script of the family has a function that reads its flags, and trains only if it is started
FAMILY = (rb"^def parse_config\(", rb"^class UserError\b", rb"^if __name__ ==")


def check_arms(plan: dict):
    """Raises UserError that names the arms whose script cannot be imported or refuses its flags, and says why.

    plan: name -> Arm. Scripts that are not of the family are not checked, for an import might train.
    """
    said = {}                            # what is wrong -> arms
    with tempfile.TemporaryDirectory() as temporary:
        jobs = []
        for name, arm in plan.items():
            if all(re.search(pattern, arm.files[arm.script], re.M) for pattern in FAMILY):
                folder = Path(temporary, name)
                folder.mkdir()
                for file, content in arm.files.items():
                    (folder / file).write_bytes(content)
                jobs.append(Job(Path(__file__), [str(folder / arm.script), *arm.flags], folder / "out", name))
        with contextlib.closing(launch(iter(jobs), [{}] * AT_ONCE)) as ended:
            for job, outcome in ended:
                if outcome.code:
                    said.setdefault(outcome.last or f"exit code {outcome.code} when it is imported", set()).add(job.arm)
    texts = []
    for words, names in said.items():
        scripts = [f"{name} ({arm.script})" for name, arm in plan.items() if name in names]
        texts.append(f"arm{'s' * (len(names) > 1)} {', '.join(scripts)}: {words}")
    if texts:
        raise UserError("; ".join(sorted(texts)))


def problem(script: Path, flags: list[str]) -> str:
    """What is wrong with a script and its flags, in one line; "" if nothing is."""
    sys.path[0] = str(script.parent)     # where it finds what lies beside it
    spec = importlib.util.spec_from_file_location("checked_script", script)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        module.parse_config(flags)
    except (Exception, SystemExit) as error:
        if type(error).__name__ == "UserError":
            return str(UserError(error))
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(script)]
        place = f" ({script.name}, line {lines[-1]})" if lines else ""       # a SyntaxError says it itself
        return str(UserError(f"{type(error).__name__}: {error}{place}"))
    return ""


def main() -> int:
    """Runs the command line: prints what is wrong."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("--"):
        print(__doc__.strip())
        return 0
    sys.stdout.reconfigure(errors="backslashreplace")
    if words := problem(Path(sys.argv[1]), sys.argv[2:]):
        print(words)
    return 2 if words else 0


if __name__ == "__main__":
    sys.exit(main())
