"""Downloads the questions of evaluate.py into data/evals/: HellaSwag's validation set, the CORE bundle, and GSM8K.

    python data/evals.py                        # from where they are published
    python data/evals.py --from=/mnt/disk       # from a folder or from http(s)://host/path

A source holds hellaswag_val.jsonl and the CORE bundle. The bundle is eval_bundle.zip or its content: core.yaml,
eval_meta_data.csv and eval_data/CATEGORY/TASK.jsonl, in the folder itself, in eval_bundle/ or in core/. A .jsonl may
also be a .jsonl.xz. Only the files that core.yaml names are taken. Tasks without a file are listed; evaluate.py leaves
them out and says so. A source may also hold what the chat tasks need: gsm8k/test.jsonl, mmlu/test.jsonl,
words_alpha.txt and, to train on, gsm8k/train.jsonl. Of these only GSM8K is published in this form;
docs/evaluation.md describes the others.

The result has the same files, CORE's in the folder core/, and manifest.json with the sha256, size and number of items
of each file. A second run compares the files with it, and downloads again only if one is missing or differs.
"""

import argparse
import contextlib
import hashlib
import json
import lzma
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

from fineweb import (RETRY_WAITS, Refused, Transient, Web, given_source, one_line, printable, shown, user_path,
                     words)

PUBLISHED = {
    "eval_bundle.zip": "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip",
    "hellaswag_val.jsonl": "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
    "gsm8k/test.jsonl": "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
                        "test.jsonl",
    "gsm8k/train.jsonl": "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
                         "train.jsonl",
}
# of the chat tasks; a source may lack them. evaluate.py needs the first three, chat_sft.py and chat_rl.py the last
CHAT_FILES = ("gsm8k/test.jsonl", "mmlu/test.jsonl", "words_alpha.txt", "gsm8k/train.jsonl")
ROOTS = ("core/", "eval_bundle/", "")  # where core.yaml may be
ENDS = ("", ".xz")
MAX_LINE, MAX_FILE, MAX_ZIP = 1 << 20, 1 << 26, 1 << 31  # bytes; what is longer is refused
MAX_TASKS = 1000
BLOCK_BYTES = 1 << 20


def fail(message):
    """Print one line to stderr and end with exit code 2."""
    print(f"evals.py: {one_line(message)}", file=sys.stderr)
    raise SystemExit(2)


# -----------------------------------------------------------------------------
# Fetching


def published_source():
    """Web source of the published files. It has no other files."""
    def url_of(name):
        if name not in PUBLISHED:
            raise FileNotFoundError(name)
        return PUBLISHED[name]
    return Web("the published files", url_of)


def copy_blocks(blocks, path, limit, name):
    """Write an iterable of bytes to a file, and return its size. Raises Refused beyond `limit` bytes."""
    size = 0
    with open(path, "wb") as file:
        for block in blocks:
            size += len(block)
            if size > limit:
                raise Refused(f"{name} has more than {limit} bytes; is the source right?")
            file.write(block)
    return size


def fetch(source, name, path, limit=MAX_FILE):
    """Copy one file of the source to `path`, with a few tries.

    Raises FileNotFoundError when the source has no such file, Refused when all tries fail.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for wait in (*RETRY_WAITS, None):
        try:
            reply = source.open(name, 0)
            size = copy_blocks(with_bar(reply, name), path, limit, name)
            if reply.total not in (None, size):
                raise Transient(f"{name} ended after {size} of {reply.total} bytes")
            return
        except Transient as error:
            if wait is None or not source.reached and wait != RETRY_WAITS[0]:
                raise Refused(f"cannot download {name} from {source.address} ({error}); try again later, or name a "
                              "copy of the files with --from=DIR_OR_URL") from error
            time.sleep(wait)


def with_bar(reply, name):
    """The blocks of a reply; draws a progress bar on a terminal."""
    from tqdm import tqdm
    with tqdm(desc=name, total=reply.total, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for block in reply.blocks:
            bar.update(len(block))
            yield block


def first_of(source, names, path):
    """Fetch the first of `names` that the source has. Returns its path, which ends in .xz if the name does, or None."""
    for name in names:
        target = path.with_name(path.name + ".xz") if name.endswith(".xz") else path
        with contextlib.suppress(FileNotFoundError):
            fetch(source, name, target)
            return target
    return None


# -----------------------------------------------------------------------------
# The bundle


def task_files(core_yaml, name):
    """The data files that core.yaml names, such as "world_knowledge/arc_easy.jsonl"; Refused for odd names."""
    try:
        text = core_yaml.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Refused(f"{name} is not UTF-8 text; is the source right?") from error
    found = list(dict.fromkeys(re.findall(r"^\s*dataset_uri:\s*(\S.*?)\s*$", text, re.M)))
    if not 0 < len(found) <= MAX_TASKS:
        raise Refused(f"{name} names {len(found)} data files; is the source right?")
    for uri in found:
        if not re.fullmatch(r"\w[\w-]*/\w[\w-]*\.jsonl", uri, re.ASCII):
            raise Refused(f"{name} names the data file {uri!r}, which is not of the form category/task.jsonl")
    return found


def fetch_unpacked(source, work):
    """Fetch core.yaml and the files it names into work/core. Returns the missing ones, or None without a core.yaml."""
    core = work / "core"
    for root in ROOTS:
        if not first_of(source, [f"{root}core.yaml"], core / "core.yaml"):
            continue
        first_of(source, [f"{root}eval_meta_data.csv"], core / "eval_meta_data.csv")
        wanted = task_files(core / "core.yaml", f"{root}core.yaml")
        return [uri for uri in wanted if not first_of(
            source, [f"{root}eval_data/{uri}{end}" for end in ENDS], core / "eval_data" / uri)]
    return None


def unzip(path, work):
    """Unpack core.yaml and the files it names into work/core. Returns the missing ones; Refused for a damaged zip.

    Only entries with exactly the expected names are read, so an entry cannot choose where it is written.
    """
    core = work / "core"

    def take(name, target):
        if name not in bundle.NameToInfo:
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        with bundle.open(name) as entry:
            copy_blocks(iter(lambda: entry.read(BLOCK_BYTES), b""), target, MAX_FILE, f"eval_bundle.zip: {name}")
        return True
    try:
        with zipfile.ZipFile(path) as bundle:
            root = next((root for root in ROOTS if f"{root}core.yaml" in bundle.NameToInfo), None)
            if root is None:
                raise Refused("eval_bundle.zip has no core.yaml; is the source right?")
            take(f"{root}core.yaml", core / "core.yaml")
            take(f"{root}eval_meta_data.csv", core / "eval_meta_data.csv")
            wanted = task_files(core / "core.yaml", f"eval_bundle.zip: {root}core.yaml")
            return [uri for uri in wanted if not any(
                take(f"{root}eval_data/{uri}{end}", core / "eval_data" / f"{uri}{end}") for end in ENDS)]
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError, RuntimeError, EOFError) as error:
        raise Refused(f"eval_bundle.zip is not a zip file or is damaged ({error}); download it again") from error


# -----------------------------------------------------------------------------
# Checks and the manifest


def describe(path, name):
    """Manifest entry of a file: sha256, size in bytes, and for .jsonl the number of items. Refused if damaged."""
    content = path.read_bytes()
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    if ".jsonl" not in path.name:
        return entry
    items = 0
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rb") as file:
            while line := file.readline(MAX_LINE):  # the rest of a longer line is not a JSON object
                if not isinstance(json.loads(line), dict):
                    raise ValueError("not an object")
                items += 1
                if file.tell() > MAX_FILE:
                    raise ValueError(f"more than {MAX_FILE} bytes")
    except (OSError, ValueError, EOFError, lzma.LZMAError, RecursionError) as error:
        raise Refused(f"{name} is damaged at item {items} ({error}); is the source right?") from error
    if not items:
        raise Refused(f"{name} is empty; is the source right?")
    return entry | {"items": items}


def intact(out_dir):
    """The manifest in out_dir if no file is missing and all are as it says, else None."""
    def content(name, limit):
        path = out_dir / name
        if not path.is_file() or path.stat().st_size > limit or not re.fullmatch(r"[\w/-]+(\.\w+)+", name, re.ASCII):
            raise ValueError  # reading a pipe would wait for its writer
        return path.read_bytes()
    try:
        manifest = json.loads(content("manifest.json", MAX_LINE))
        whole = all(type(items := entry.get("items", 0)) is int and 0 <= items < MAX_FILE
                    and hashlib.sha256(content(name, MAX_FILE)).hexdigest() == entry["sha256"]
                    for name, entry in manifest["files"].items())
        return manifest if whole and manifest["files"] and not manifest["missing"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def fetch_all(source, out_dir, about):
    """Fetch the sets, check them, and put them into out_dir; returns the manifest. Refused if the source has neither.

    Files are moved to their places when all of them are right, the manifest last.
    """
    made = [folder for folder in (out_dir, *out_dir.parents) if not folder.exists()]
    out_dir.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".fetching-", dir=out_dir))
    try:
        missing = fetch_unpacked(source, work)
        if missing is None:
            try:
                fetch(source, "eval_bundle.zip", work / "zip.part", MAX_ZIP)
                missing = unzip(work / "zip.part", work)
                (work / "zip.part").unlink()
            except FileNotFoundError:
                missing = ["core.yaml or eval_bundle.zip"]
        if not first_of(source, [f"hellaswag_val.jsonl{end}" for end in ENDS], work / "hellaswag_val.jsonl"):
            missing.append("hellaswag_val.jsonl")
        for name in CHAT_FILES:
            first_of(source, [f"{name}{end}" for end in ENDS], work / name)
        names = sorted(path.relative_to(work).as_posix() for path in work.rglob("*") if path.is_file())
        if not any(".jsonl" in name for name in names):
            raise Refused(f"{source.address} has neither core.yaml nor eval_bundle.zip nor hellaswag_val.jsonl; name "
                          "another source with --from=DIR_OR_URL")
        files = {name: describe(work / name, name) for name in names}
        manifest = {"format": 1, "files": files, "missing": missing, "made_by": about}
        write_synced(work / "manifest.json", (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
        for name in names:
            folder = (out_dir / name).parent
            if folder.resolve() != (out_dir.resolve() / name).parent:
                raise Refused(f"{folder} is a link to another place, and files are only written inside --out; remove "
                              "the link")
            folder.mkdir(parents=True, exist_ok=True)
            os.replace(work / name, out_dir / name)
            other = name.removesuffix(".xz") if name.endswith(".xz") else f"{name}.xz"
            if other not in files:
                (out_dir / other).unlink(missing_ok=True)  # what an earlier fetch left under the other name
        os.replace(work / "manifest.json", out_dir / "manifest.json")
        return manifest
    finally:
        shutil.rmtree(work, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()


def write_synced(path, content):
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


# -----------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="evals.py", formatter_class=argparse.RawDescriptionHelpFormatter,
                                     description=__doc__, allow_abbrev=False)
    parser.add_argument("--from", dest="source", metavar="DIR_OR_URL", help="folder or http(s) address that holds "
                        "the files (default: where they are published)")
    parser.add_argument("--out", type=user_path, default=Path(__file__).resolve().parent / "evals", metavar="FOLDER",
                        help="folder to write to (default: data/evals)")
    parser.add_argument("--force", action="store_true", help="download the files again even if they are there")
    parser.error = lambda message: fail(f"{message}; --help lists the flags")
    return parser.parse_args(words(argv, fail))


def next_line(out, manifest):
    """The command that scores a model on what is here, quoted for the shell."""
    names = manifest["files"]
    tasks = ["hellaswag"] * any(name.startswith("hellaswag") for name in names)
    tasks += ["core"] * any(name.startswith("core/") and ".jsonl" in name for name in names)
    script = shlex.quote(printable(shown(Path(__file__).resolve().parent.parent / "evaluate.py")))
    flags = [f"--tasks={','.join(tasks)}"]
    if shown(out) != "data/evals":  # where evaluate.py looks without a flag
        flags.append(shlex.quote(f"--evals={printable(shown(out))}"))
    return " ".join(["next: python", script, *flags])


def main(argv=None):
    """Run the command line; exit code 0, 2 with one line on stderr, or 130 when interrupted."""
    args = parse_args(argv)
    try:
        manifest = None if args.force else intact(args.out)
        if manifest is None:
            source = given_source(args.source) if args.source else published_source()
            about = {"script": "data/evals.py", "source": args.source or PUBLISHED}
            manifest = fetch_all(source, args.out, about)
        items = sum(entry.get("items", 0) for entry in manifest["files"].values())
        print(one_line(f"{args.out}: {len(manifest['files'])} files, {items:,} items"))
        if manifest["missing"]:
            print(one_line(f"missing at the source: {', '.join(manifest['missing'])}"))
        absent = [name for name in CHAT_FILES if not any(f"{name}{end}" in manifest["files"] for end in ENDS)]
        if absent:
            print(f"of the chat tasks, without a file: {', '.join(absent)}; docs/evaluation.md describes them")
        print(next_line(args.out, manifest))
    except Refused as error:
        fail(error)
    except OSError as error:
        fail(f"{error.filename or args.out} cannot be written or read ({error.strerror}); check its permissions, free "
             "some space or choose another --out")
    except ModuleNotFoundError as error:
        fail(f"the Python package {error.name} is missing; pip install -r requirements.txt")
    except KeyboardInterrupt:
        print("\nevals.py: stopped", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a path may have letters that the locale lacks
    main()
