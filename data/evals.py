"""The questions of evaluate.py: HellaSwag's validation set and the CORE bundle, fetched into data/evals/.

    python data/evals.py                        # from where they are published
    python data/evals.py --from=/mnt/disk       # from a folder or from http(s)://host/path

A source holds hellaswag_val.jsonl, and either eval_bundle.zip or its content: core.yaml, eval_meta_data.csv and
eval_data/CATEGORY/TASK.jsonl, in a folder eval_bundle/ or core/ or in none. Each .jsonl may be a .jsonl.xz. What
core.yaml names is taken and nothing else. Tasks without a file are named; evaluate.py leaves them out and says so. The
result has the same layout with core/, and manifest.json with the sha256, size and items of each file; a second run
compares them and fetches again only if something is missing or differs.
"""

import argparse
import contextlib
import hashlib
import json
import lzma
import os
import re
import shutil
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

from fineweb import RETRY_WAITS, Refused, Transient, Web, given_source, one_line, words

PUBLISHED = {
    "eval_bundle.zip": "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip",
    "hellaswag_val.jsonl": "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
}
ROOTS = ("core/", "eval_bundle/", "")  # where core.yaml may be
ENDS = ("", ".xz")
MAX_LINE, MAX_FILE, MAX_ZIP = 1 << 20, 1 << 26, 1 << 31  # bytes: more is not what it should be
MAX_TASKS = 1000
BLOCK_BYTES = 1 << 20


def fail(message):
    """Print one line to stderr and end with exit code 2."""
    print(f"evals.py: {one_line(message)}", file=sys.stderr)
    raise SystemExit(2)


# -----------------------------------------------------------------------------
# Fetching


def published_source():
    """Web source of the two published files; every other name is not found."""
    def url_of(name):
        if name not in PUBLISHED:
            raise FileNotFoundError(name)
        return PUBLISHED[name]
    return Web("the published files", url_of)


def copy_blocks(blocks, path, limit, name):
    """Write an iterable of bytes to a file of at most `limit` bytes; Refused when there are more."""
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

    FileNotFoundError when the source has no such file; Refused when it cannot be had.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for wait in (*RETRY_WAITS, None):
        try:
            reply = source.open(name, 0)
            size = copy_blocks(shown(reply, name), path, limit, name)
            if reply.total not in (None, size):
                raise Transient(f"{name} ended after {size} of {reply.total} bytes")
            return
        except Transient as error:
            if wait is None or not source.reached and wait != RETRY_WAITS[0]:
                raise Refused(f"cannot fetch {name} from {source.address} ({error}); try again, or name a copy of the "
                              "files with --from=DIR_OR_URL") from error
            time.sleep(wait)


def shown(reply, name):
    """The blocks of a reply, with a progress bar on a terminal."""
    from tqdm import tqdm
    with tqdm(desc=name, total=reply.total, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for block in reply.blocks:
            bar.update(len(block))
            yield block


def first_of(source, names, path):
    """Fetch the first of `names` that the source has, keeping .xz; its path, or None."""
    for name in names:
        target = path.with_name(path.name + ".xz") if name.endswith(".xz") else path
        with contextlib.suppress(FileNotFoundError):
            fetch(source, name, target)
            return target
    return None


# -----------------------------------------------------------------------------
# The bundle


def task_files(core_yaml, name):
    """The data files that core.yaml names, such as "world_knowledge/arc_easy.jsonl"; Refused for other names."""
    try:
        text = core_yaml.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Refused(f"{name} is no text; is the source right?") from error
    found = list(dict.fromkeys(re.findall(r"^\s*dataset_uri:\s*(\S.*?)\s*$", text, re.M)))
    if not 0 < len(found) <= MAX_TASKS:
        raise Refused(f"{name} names {len(found)} data files; is the source right?")
    for uri in found:
        if not re.fullmatch(r"\w[\w-]*/\w[\w-]*\.jsonl", uri, re.ASCII):
            raise Refused(f"{name} names the data file {uri!r}, which is not of the form category/task.jsonl")
    return found


def fetch_unpacked(source, work):
    """Fetch core.yaml and what it names into work/core; the missing files, or None when there is no core.yaml."""
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
    """Take core.yaml and what it names out of the bundle's zip into work/core; the missing files. Refused if unsound.

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
        raise Refused(f"eval_bundle.zip is not a sound zip file ({error}); fetch it again") from error


# -----------------------------------------------------------------------------
# Checks and the manifest


def describe(path, name):
    """Manifest entry of a file: sha256, size in bytes, and for .jsonl the items; Refused when it is damaged."""
    content = path.read_bytes()
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    if ".jsonl" not in path.name:
        return entry
    items = 0
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rb") as file:
            while line := file.readline(MAX_LINE):  # of a longer one, the rest is no object
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
    """The manifest in out_dir if nothing is missing and every file is as it says, else None."""
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
    """Fetch both sets, check them, and put them into out_dir; returns the manifest. Refused when nothing is to be had.

    Files are moved to their places when all of them are sound, the manifest last.
    """
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
                raise Refused(f"{folder} is a link to elsewhere; remove it")
            folder.mkdir(parents=True, exist_ok=True)
            os.replace(work / name, out_dir / name)
            other = f"{name}.xz" if name.endswith(".jsonl") else name.removesuffix(".xz")
            if other not in files:
                (out_dir / other).unlink(missing_ok=True)  # what an earlier fetch left under the other name
        os.replace(work / "manifest.json", out_dir / "manifest.json")
        return manifest
    finally:
        shutil.rmtree(work, ignore_errors=True)
        with contextlib.suppress(OSError):
            out_dir.rmdir()  # only if nothing came


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
    parser.add_argument("--from", dest="source", metavar="DIR_OR_URL", help="where the files are (default: where they "
                        "are published)")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "evals", metavar="FOLDER",
                        help="where they go (default: data/evals)")
    parser.add_argument("--force", action="store_true", help="fetch again what is there")
    parser.error = lambda message: fail(f"{message}; --help lists the flags")
    return parser.parse_args(words(argv, fail))


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
        print(f"{args.out}: {len(manifest['files'])} files, {items:,} items")
        if manifest["missing"]:
            print(f"missing at the source: {', '.join(manifest['missing'])}")
        print("next: python evaluate.py --tasks=hellaswag,core")
    except Refused as error:
        fail(error)
    except OSError as error:
        fail(f"{error.filename or args.out} cannot be written or read ({error.strerror}); free space or choose another "
             "--out")
    except KeyboardInterrupt:
        print("\nevals.py: stopped", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
