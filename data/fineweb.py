"""FineWeb as GPT-2 token shards: published ones fetched from the hub, or made here from FineWeb's parquet files.

    python data/fineweb.py 9                    # validation shard + 9 training shards, 2.0 GB, into data/fineweb10B/
    python data/fineweb.py 103                  # everything published in fineweb10B, 20.6 GB
    python data/fineweb.py 30 --variant=edu     # FineWeb-Edu, into data/finewebedu10B/
    python data/fineweb.py 9 --from=/mnt/disk   # the same files from a folder or from http(s)://host/path
    python data/fineweb.py 2 --tokenize         # two parquet files (1.4 billion tokens) tokenised on all cores

Stop it and start it again at will: what has arrived is kept in `.NAME.part` and continued. A second run checks what is
there (header, size; --verify also every byte) and fetches only what is missing or broken. A file gets its name only
after its header, length, token ids and sha256 were checked; manifest.json then pins that sha256. HF_ENDPOINT names
another hub, HF_TOKEN a token for it. Shards, manifest.json and tokenizer.json are as data/text.py makes them.
"""

import argparse
import concurrent.futures
import contextlib
import errno
import hashlib
import itertools
import json
import os
import queue
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import namedtuple
from pathlib import Path

import numpy as np

Variant = namedtuple("Variant", "repo folder prefix train_shards parquet_repo parquet_files")
VARIANTS = {
    "10B": Variant("kjj0/fineweb10B-gpt2", "fineweb10B", "fineweb", 103, "HuggingFaceFW/fineweb", 15),
    "100B": Variant("kjj0/fineweb100B-gpt2", "fineweb100B", "fineweb", 1030, None, 0),
    "edu": Variant("kjj0/finewebedu10B-gpt2", "finewebedu10B", "finewebedu", 99, "HuggingFaceFW/fineweb-edu", 14),
}
PARQUET_FOLDER = "sample/10BT/"  # of the parquet repositories; it holds 000_00000.parquet, 001_00000.parquet, ...
OPENAI_GPT2 = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
VOCAB_SIZE, BOS_ID = 50257, 50256
GPT2_TOKENIZER_SHA256 = "2fc5cf1fe8570ed8946bc342c02ae0f0f1324b740b3a7599419e46842c18e802"  # of tokenizer.json
BLOCK_BYTES = 1 << 16  # received at a time, and so the most that a broken connection loses
READ_BYTES = 1 << 23
SMALL_BYTES = 1 << 24  # a larger manifest.json or tokenizer.json is none
TIMEOUT_SECONDS = (10, 30)  # to connect, and between two packets
RETRY_WAITS = (0.5, 1, 2, 4)  # seconds between the five tries; progress starts the count anew
INSTEAD = "without a network: python data/text.py (the text on this machine) or --from=DIR_OR_URL (a copy of the files)"


class Refused(Exception):
    """A file cannot be had; the text is the line for the user."""


class Unsound(Refused):
    """A file's bytes are wrong."""


class Transient(Exception):
    """This try failed, another may not; the text is the reason."""


class Changed(Transient):
    """The partial file does not continue into what the source has: begin anew."""


class Stopped(Exception):
    """Another thread failed or the user stopped the run: leave things as they are."""


def one_line(message):
    """The message as a line that a terminal only shows, whatever a file or a flag put into it."""
    line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(message).split()))
    return line if len(line) <= 1000 else f"{line[:600]} ... {line[-300:]}"


def fail(message):
    """Print one line to stderr and end with exit code 2."""
    print(f"fineweb.py: {one_line(message)}", file=sys.stderr)
    raise SystemExit(2)


# -----------------------------------------------------------------------------
# Checks of files (token shards, and the parquet files that --tokenize reads)


def promised_bytes(head, name):
    """Size in bytes that a file's first 1024 bytes promise (None for parquet, which does not say); Unsound if wrong."""
    if name.endswith(".parquet"):
        if head[:4] != b"PAR1":
            raise Unsound(f"{name} is not a parquet file: it begins with {head[:12]!r}; is the source right?")
        return None
    words = np.frombuffer(head[:HEADER_BYTES].ljust(HEADER_BYTES, b"\0"), dtype="<i4")
    if len(head) < HEADER_BYTES or words[0] != MAGIC or words[1] != VERSION or words[2] <= 0:
        raise Unsound(f"{name} is not a token shard: it begins with {head[:12]!r}; is the source right?")
    vocab_size, bos_id, width, digest = *(int(word) for word in words[3:6]), head[32:64]
    # Zero stands for GPT-2 in each of these words: published shards leave them so.
    if (vocab_size not in (0, VOCAB_SIZE) or bos_id not in (0, BOS_ID) or width not in (0, 2)
            or digest not in (bytes(32), bytes.fromhex(GPT2_TOKENIZER_SHA256))):
        raise Unsound(f"{name} was made with another tokenizer than gpt2 (vocabulary {vocab_size}, begin-of-document "
                      f"id {bos_id}, {width} bytes a token): take a gpt2 source")
    return HEADER_BYTES + 2 * int(words[2])


def measure(path, name, stop):
    """Read a whole file and return its manifest entry: sha256, size in bytes, and for a shard tokens and documents.

    Unsound when header, length, token ids or end mark are wrong; Stopped when `stop` is set meanwhile.
    """
    is_shard, size, documents = name.endswith(".bin"), path.stat().st_size, 0
    with open(path, "rb") as file:
        block = file.read(HEADER_BYTES)
        promised, digest = promised_bytes(block, name), hashlib.sha256(block)
        if promised not in (None, size):
            raise Unsound(f"{name} has {size} bytes, its header promises {promised}")
        while following := file.read(READ_BYTES):
            if stop.is_set():
                raise Stopped
            digest.update(following)
            block = block[-4:] + following
            if is_shard:
                ids = np.frombuffer(following, dtype="<u2")
                documents += int(np.count_nonzero(ids == BOS_ID))
                if ids.max() >= VOCAB_SIZE:
                    raise Unsound(f"{name} holds token id {ids.max()}, gpt2 ends at {VOCAB_SIZE - 1}")
    if is_shard:  # nobody says how many bytes of text a published shard was made from
        return {"sha256": digest.hexdigest(), "size": size, "tokens": (size - HEADER_BYTES) // 2,
                "documents": documents, "text_bytes": None}
    if size < 12 or block[-4:] != b"PAR1":
        raise Unsound(f"{name} is not a whole parquet file ({size} bytes, no end mark)")
    return {"sha256": digest.hexdigest(), "size": size}


# -----------------------------------------------------------------------------
# Sources: open(name, offset) gives a Reply

Reply = namedtuple("Reply", "start total sha256 blocks")  # first byte sent, whole size or None, hub's hash or None


class Folder:
    """Files of a local folder."""

    reached = True

    def __init__(self, path):
        self.address = str(path)
        self.path = Path(path)

    def open(self, name, offset):
        """Reply with the file's bytes from `offset`; FileNotFoundError when it is not there."""
        path = self.path / name
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        total = path.stat().st_size
        if offset > total:
            raise Changed(f"{path} is shorter than the partial file")
        return Reply(offset, total, None, self._blocks(path, offset))

    @staticmethod
    def _blocks(path, offset):
        with open(path, "rb") as file:
            file.seek(offset)
            while block := file.read(BLOCK_BYTES):
                yield block


class Web:
    """Files of one hub repository or under one http(s) address, with ranges, time limits and named errors."""

    def __init__(self, address, url_of, headers=None):
        self.address, self.url_of, self.headers = address, url_of, headers or {}
        self.reached = False  # whether any answer came: before that, few tries, so that "no network" is said soon

    def open(self, name, offset):
        """Reply from `offset` (from 0 when the server ignores ranges).

        FileNotFoundError on 404; Refused on an answer that will not get better; Transient on one that may.
        """
        import requests

        url, headers = self.url_of(name), {**self.headers, "Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        try:
            answer = requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS)
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema,
                requests.exceptions.MissingSchema) as error:
            raise Refused(f"{url} is not an http(s) address; check HF_ENDPOINT or --from") from error
        except requests.RequestException as error:
            raise Transient(network_reason(error)) from error
        self.reached = True
        self._check_status(answer.status_code, url)
        start, total = 0, answer.headers.get("Content-Length")
        if answer.status_code == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
            if not match or int(match[1]) != offset:
                raise Changed("the server answered another range than was asked for")
            start, total = offset, match[2]
        total = int(total) if total and total.isdigit() else None
        return Reply(start, total, hub_sha256([*answer.history, answer]), self._blocks(answer))

    def _check_status(self, status, url):
        if status in (200, 206):
            return
        if status == 404:
            raise FileNotFoundError(errno.ENOENT, "not found (404)", url)
        if status in (401, 403):
            raise Refused(f"{url}: access refused ({status}); set HF_TOKEN to a token that may read it")
        if status == 416:
            raise Changed("the partial file is longer than the server's")
        if status in (408, 425, 429) or status >= 500:
            raise Transient(f"{url} answers {status}")
        raise Refused(f"{url}: unexpected answer {status}")

    @staticmethod
    def _blocks(answer):
        import requests

        try:
            yield from answer.iter_content(BLOCK_BYTES)
        except requests.RequestException as error:
            raise Transient(f"the connection broke ({network_reason(error)})") from error
        finally:
            answer.close()


def hub_source(repo, repo_type, folder=""):
    """Web source for one repository of the hub that HF_ENDPOINT names, with the user's token if there is one."""
    from huggingface_hub import constants, get_token, hf_hub_url

    def url_of(name):
        if constants.HF_HUB_OFFLINE:
            raise Refused(f"HF_HUB_OFFLINE is set, so the hub is not asked; unset it, or {INSTEAD}")
        return hf_hub_url(repo, folder + name, repo_type=repo_type)

    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    return Web(constants.ENDPOINT, url_of, {"Authorization": f"Bearer {token}"} if token else {})


def given_source(text):
    """Source for --from: an http(s) address or an existing folder; Refused otherwise."""
    if text.startswith(("http://", "https://")):
        return Web(text, lambda name: f"{text.rstrip('/')}/{name}")
    if "://" in text or not Path(text).is_dir():
        raise Refused(f"--from={text} is neither a folder nor an http(s) address")
    return Folder(text)


def hub_sha256(answers):
    """Sha256 that the hub names for a large file, or None. `answers`: the redirects, then the final answer.

    Only the hub's own ETag counts: behind a redirect stands a storage host whose 64 digits may be another hash.
    """
    tags = [answer.headers.get("X-Linked-ETag") for answer in answers] + [answers[0].headers.get("ETag")]
    found = (re.fullmatch(r'(?:W/)?"?([0-9a-f]{64})"?', tag) for tag in tags if tag)
    return next((match[1] for match in found if match), None)


def network_reason(error):
    """Short cause of a requests exception, whose own text is long."""
    match = re.search(r"\[Errno -?\d+\] ([^'\")>]+)", str(error))
    return match[1] if match else "timed out" if "timed out" in str(error) else type(error).__name__


# -----------------------------------------------------------------------------
# Download


def with_retries(action, source, arrived=lambda: 0, stop=None):
    """action(), tried again after Transient with growing waits; Refused when the tries run out.

    arrived: bytes on disk so far; a try that brought a block more than any before starts the count anew.
    """
    failures, furthest, stop = 0, arrived(), stop or threading.Event()
    while True:
        try:
            return action()
        except Transient as error:
            failures = 1 if arrived() >= furthest + BLOCK_BYTES else failures + 1
            furthest = max(furthest, arrived())
            if not source.reached and failures > 1:
                raise Refused(f"cannot reach {source.address} ({error}); {INSTEAD}") from error
            if failures > len(RETRY_WAITS):
                raise Refused(f"gave up after {failures} tries: {error}; the same command continues") from error
            if stop.wait(RETRY_WAITS[failures - 1]):
                raise Stopped from error


def pull(name, part, source, progress, stop):
    """Bring the partial file `part` to its full length, resuming what is there; the hub's sha256 or None.

    Transient when the transfer ends early (what came stays), Changed when `part` belongs to another file, Unsound when
    the source's file is wrong, Refused when the disk is too small.
    """
    have = part.stat().st_size if part.exists() else 0
    reply = source.open(name, max(0, have - HEADER_BYTES))  # the overlap shows whether it still is the same file
    blocks, first = iter(reply.blocks), b""
    while len(first) < HEADER_BYTES and (block := next(blocks, b"")):
        first += block
    size, limit = reply.start, reply.total
    with open(part, "r+b" if reply.start else "w+b") as file:
        head = file.read(HEADER_BYTES) or first
        file.seek(size)
        if not first.startswith(file.read()):
            raise Changed(f"{name} at the source is not the file that was begun")
        file.seek(size)
        if first:
            promised = promised_bytes(head, name)
            if promised and reply.total not in (None, promised):
                raise Unsound(f"{name} has {reply.total} bytes at the source, its header promises {promised}")
            limit = promised or limit
            progress.expect(name, limit)
        for block in itertools.chain([first], blocks):
            if stop.is_set():
                raise Stopped
            if limit and size + len(block) > limit:
                raise Unsound(f"{name}: the source sends more than the promised {limit} bytes")
            file.write(block)
            size += len(block)
            progress.arrived(name, size, len(block))
        file.flush()
        os.fsync(file.fileno())
    if size < (limit or 1):
        raise Transient(f"{name} ended after {size} of {limit or '?'} bytes")
    return reply.sha256


def download(name, folder, source, pins, progress, stop):
    """Fetch one file into `folder`, under its name only when it is sound; returns its manifest entry.

    pins: name -> (sha256 it must have, who says so). Refused when it cannot be had, Stopped when `stop` is set.
    """
    part = folder / f".{name}.part"
    if part.is_symlink() or part.is_fifo():  # writing would follow the one and wait for the other
        part.unlink()

    def attempt():
        resuming = part.exists()
        try:
            hub_hash = pull(name, part, source, progress, stop)
            entry = measure(part, name, stop)
            for wanted, who in (pins.get(name, (None, "")), (hub_hash, f"{source.address} says")):
                if wanted and entry["sha256"] != wanted:
                    raise Unsound(f"{name} has sha256 {entry['sha256']}, but {who} {wanted}; not kept")
            return entry
        except (Changed, Unsound) as error:
            part.unlink(missing_ok=True)
            progress.arrived(name, 0, 0)
            if resuming and isinstance(error, Unsound):  # the earlier part may be at fault: a fresh copy tells
                raise Changed(str(error)) from error
            raise

    try:
        entry = with_retries(attempt, source, lambda: part.stat().st_size if part.exists() else 0, stop)
        os.replace(part, folder / name)
        return entry
    except FileNotFoundError as error:
        raise Refused(f"{error.filename}: {error.strerror}; check N, --variant and --from") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"no space left for {name} in {shown(folder)}: make room, the same command continues"
            raise Refused(message) from error
        raise Refused(f"{name}: {error}") from error


class Progress:
    """Bar over all files of a download, in bytes; a line for each finished file."""

    def __init__(self, names, folder):
        from tqdm import tqdm

        parts = {name: folder / f".{name}.part" for name in names}
        self.folder, self.totals, self.received, self.lock = folder, {}, 0, threading.Lock()
        self.sizes = {name: part.stat().st_size if part.exists() else 0 for name, part in parts.items()}
        self.bar = tqdm(total=0, initial=sum(self.sizes.values()), unit="B", unit_scale=True, disable=None)

    def expect(self, name, total):
        """Note a file's whole size in bytes; Refused when the files still to come do not fit on the disk."""
        with self.lock:
            self.totals[name] = total or self.sizes[name]
            # Files not begun yet are taken to be as long as those whose size is known.
            self.bar.total = sum(self.totals.values()) * len(self.sizes) // len(self.totals)
            missing = self.bar.total - sum(self.sizes.values())
        if missing > (free := shutil.disk_usage(self.folder).free):
            raise Refused(f"no space: {shown(self.folder)} has {free / 1e9:.2f} GB free, {missing / 1e9:.2f} GB are to "
                          "come; make room or choose another --out")

    def arrived(self, name, size, new_bytes):
        """Note that a file has `size` bytes now, `new_bytes` of them just received."""
        with self.lock:
            self.received += new_bytes
            self.bar.update(size - self.sizes[name])
            self.sizes[name] = size

    def done(self, name, entry):
        """Print the line of a finished file."""
        tokens = f", {entry['tokens']:,} tokens" if "tokens" in entry else ""
        self.bar.write(f"{name}: {entry['size'] / 1e6:.1f} MB{tokens}, sha256 {entry['sha256'][:12]}")


def in_parallel(work, names, jobs, stop):
    """Yield (name, work(name)) as they finish, on `jobs` threads; the first exception stops all and is raised."""
    todo, done = queue.SimpleQueue(), queue.SimpleQueue()
    for name in names:
        todo.put(name)

    def run():
        while not stop.is_set():
            try:
                name = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((name, work(name), None))
            except Exception as error:  # raised again in the main thread
                done.put((name, None, error))

    # Daemons, because a thread that waits for a silent server must not hold up the exit.
    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(jobs, len(names)))]
    for thread in threads:
        thread.start()
    try:
        for _ in names:
            name, result, error = done.get()
            if error:
                raise error
            yield name, result
    finally:
        stop.set()
        until = time.monotonic() + 0.5
        for thread in threads:
            thread.join(timeout=max(0, until - time.monotonic()))


def look(path, entry, pin, rehash, stop):
    """Judge what is on disk under a file's name: (entry for the manifest or None, why not). (None, "") when missing.

    entry: what the manifest has on it, or None: then the file was put there by other means and is taken when sound.
    """
    if not path.is_file():
        return None, f"{path.name} is not a file" if path.exists() else ""
    try:
        if entry and not rehash:
            with open(path, "rb") as file:
                promised, size = promised_bytes(file.read(HEADER_BYTES), path.name), path.stat().st_size
            fine = size == entry["size"] and promised in (None, size)
            return (entry, "") if fine else (None, f"{path.name} has {size} bytes instead of {entry['size']}")
        found, (wanted, who) = measure(path, path.name, stop), pin
        if wanted in (None, found["sha256"]):
            return found, ""
        return None, f"{path.name} has sha256 {found['sha256']}, but {who} {wanted}"
    except Unsound as error:
        return None, str(error)


def fetch(names, folder, source, entries, pins, args, keep=lambda: None):
    """Bring all `names` into `folder`: check what is there, download the rest. Returns the bytes received.

    entries: name -> manifest entry, filled in here, keep() being called after each change; pins: see download().
    """
    stop, missing = threading.Event(), []
    for name, (entry, problem) in in_parallel(lambda name: look(
            folder / name, entries.get(name), pins.get(name, (None, "")), args.verify, stop), names, args.jobs, stop):
        if problem:
            print(f"{problem}; fetching it again", flush=True)
        if entry is None:
            missing.append(name)
        elif entry != entries.get(name):
            entries[name] = entry
            keep()
    if not missing:
        return 0
    stop, progress = threading.Event(), Progress(missing, folder)
    with progress.bar:
        for name, entry in in_parallel(lambda name: download(name, folder, source, pins, progress, stop),
                                       sorted(missing, key=names.index), args.jobs, stop):
            entries[name] = entry
            keep()
            progress.done(name, entry)
    return progress.received


# -----------------------------------------------------------------------------
# Manifest and tokenizer


def write_file(path, data):
    """Write bytes to `path` so that it has either the old or the new content, also after a crash."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # left by a run that was killed, or a link, which writing would follow
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_manifest(folder, manifest):
    """Write manifest.json of a shard folder."""
    write_file(folder / "manifest.json", (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())


def read_manifest(folder):
    """manifest.json of a shard folder, or a new one; Refused when it is damaged or of another tokenizer."""
    path = folder / "manifest.json"
    if not path.is_file():
        return {"format": 1, "files": {}, "made_by": {"script": "data/fineweb.py"}, "tokenizer": {
            "name": "gpt2", "sha256": GPT2_TOKENIZER_SHA256, "vocab_size": VOCAB_SIZE, "bos_id": BOS_ID}}
    try:
        with open(path, "rb") as file:
            manifest = json.loads(file.read(SMALL_BYTES))
        name, sha256, made_by = manifest["tokenizer"]["name"], manifest["tokenizer"]["sha256"], manifest["made_by"]
        kinds = {"sha256": str, "size": int, "tokens": int}
        sound = all(re.fullmatch(r"\w[\w.-]*", file) and all(type(entry[key]) is kind for key, kind in kinds.items())
                    and min(entry["size"], entry["tokens"]) >= 0 for file, entry in manifest["files"].items())
        if manifest["format"] != 1 or not isinstance(made_by, dict) or not sound:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        message = f"{shown(path)} is damaged: remove it, the same command makes a new one from the files"
        raise Refused(message) from error
    if sha256 != GPT2_TOKENIZER_SHA256:
        raise Refused(f"{shown(folder)} holds shards of the tokenizer {name!s:.40}, not gpt2: choose another --out")
    return manifest


def small_file(source, name, limit=SMALL_BYTES):
    """Bytes of a small file of the source; FileNotFoundError when it has none, Refused when it is over 16 MiB."""
    def read():
        data = bytearray()
        for block in source.open(name, 0).blocks:
            data += block
            if len(data) > limit:
                raise Refused(f"{name} at {source.address} is over {limit} bytes")
        return bytes(data)

    return with_retries(read, source)


def source_pins(source):
    """name -> (sha256, who says so) from the manifest.json that a --from source may have beside its files."""
    try:
        files = json.loads(small_file(source, "manifest.json"))["files"]
        return {name: (str(entry["sha256"]), f"{source.address}/manifest.json says") for name, entry in files.items()}
    except (FileNotFoundError, Refused, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        if not source.reached:
            raise
        return {}


def gpt2_tokenizer(scratch):
    """(tokenizer.json of GPT-2, folder with the vocabulary it was made from or None): from here, else the network.

    scratch: an empty folder for downloads. LookupError with the reasons when no way works.
    """
    ways = ((None, ()), (lambda: hub_source("openai-community/gpt2", "model"), ("vocab.json", "merges.txt")),
            (lambda: given_source(OPENAI_GPT2), ("encoder.json", "vocab.bpe")))
    reasons = []
    for source, names in ways:
        try:
            import text

            for theirs, ours in zip(names, ("encoder.json", "vocab.bpe")):  # text.py checks their sha256
                (scratch / ours).write_bytes(small_file(source(), theirs))
            vocab_dir = scratch if names else None
            return text.gpt2_tokenizer_json(vocab_dir), vocab_dir
        except (Refused, LookupError, OSError, ImportError) as error:
            reasons.append(str(error).replace(f"; {INSTEAD}", ""))
    raise LookupError("; ".join(reasons))


def put_tokenizer(folder, given):
    """Put tokenizer.json beside the shards, or print one warning line. given: the source of --from, or None."""
    def sound(data):
        return hashlib.sha256(data).hexdigest() == GPT2_TOKENIZER_SHA256

    path, data = folder / "tokenizer.json", b""
    if path.is_file() and path.stat().st_size <= SMALL_BYTES and sound(path.read_bytes()):
        return
    if given:
        with contextlib.suppress(FileNotFoundError, Refused):
            data = small_file(given, "tokenizer.json")
    try:
        if not sound(data):
            with tempfile.TemporaryDirectory() as scratch:
                data, _ = gpt2_tokenizer(Path(scratch))
        write_file(path, data)
    except LookupError as error:
        print(f"fineweb.py: warning: no tokenizer.json for {shown(folder)} ({one_line(error)}); the shards are "
              "complete, the same command tries again", file=sys.stderr)


# -----------------------------------------------------------------------------
# The two jobs: each returns (manifest entries, bytes received or None if nothing was to do, start of file names)


def get_shards(args, out, variant):
    """Published shards, fetched into `out`."""
    names = [f"{variant.prefix}_val_000000.bin"]
    names += [f"{variant.prefix}_train_{i:06d}.bin" for i in range(1, args.shards + 1)]
    given, manifest = given_source(args.source) if args.source else None, read_manifest(out)
    source, entries = given or hub_source(variant.repo, "dataset"), manifest["files"]
    complete = all(name in entries and (out / name).exists() for name in names)
    pins = source_pins(given) if given and not complete else {}
    pins |= {name: (entry["sha256"], f"{shown(out)}/manifest.json pins") for name, entry in entries.items()}
    manifest["made_by"] |= {"variant": args.variant, "source": args.source or variant.repo}
    received = fetch(names, out, source, entries, pins, args, lambda: write_manifest(out, manifest))
    put_tokenizer(out, given)
    return [entries[name] for name in names], received or None, f"{variant.prefix}_"


def get_parquet(args, out, variant):
    """The first N parquet files: (paths, bytes received). A --from folder is read in place."""
    given = given_source(args.source) if args.source else None
    if isinstance(given, Folder):
        paths = sorted(given.path.glob("*.parquet"))[:args.shards]
        if len(paths) < args.shards:
            raise Refused(f"N={args.shards} parquet files were asked for, {args.source} has {len(paths)}")
        return paths, 0
    folder, names = out / "parquet", [f"{i:03d}_00000.parquet" for i in range(args.shards)]
    if folder.is_symlink():
        raise Refused(f"{shown(folder)} is a link, and files go nowhere but into --out: remove it")
    folder.mkdir(exist_ok=True)
    source = given or hub_source(variant.parquet_repo, "dataset", PARQUET_FOLDER)
    return [folder / name for name in names], fetch(names, folder, source, {}, {}, args)


def tokenize(args, out, variant):
    """Shards made here from FineWeb's parquet files by text.py."""
    import text

    wish = {"variant": args.variant, "parquet_files": args.shards, "source": args.source or variant.parquet_repo}
    manifest, never = read_manifest(out), threading.Event()
    entries = manifest["files"]
    if any(not name.startswith(("train_", "val_")) for name in entries):
        raise Refused(f"{shown(out)} holds published shards: choose another --out for those made here")
    if manifest["made_by"].get("fineweb") == wish and all(
            look(out / name, entry, (entry["sha256"], ""), args.verify, never)[0] for name, entry in entries.items()):
        return list(entries.values()), None, ""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            _, vocab_dir = gpt2_tokenizer(Path(scratch))
            paths, received = get_parquet(args, out, variant)
            print(f"tokenising {len(paths)} parquet files on {os.cpu_count()} cores", flush=True)
            manifest = text.build_shards(paths, out, tokenizer="gpt2", vocab_dir=vocab_dir)
        except (text.InputError, LookupError) as error:
            raise Refused(str(error)) from error
        except concurrent.futures.BrokenExecutor as error:
            raise Refused("a tokenising process was killed, perhaps for want of memory") from error
    manifest["made_by"]["fineweb"] = wish
    write_manifest(out, manifest)
    if received:
        print(f"{shown(out)}/parquet/ is no longer needed; you may delete it")
    return list(manifest["files"].values()), received, ""


# -----------------------------------------------------------------------------
# Command line


def shown(path):
    """A path as the user would type it: relative when it is below the current folder."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


@contextlib.contextmanager
def folder_for(out):
    """Make `out` and hold it against a second run; afterwards it is gone again when nothing was put there."""
    out.mkdir(parents=True, exist_ok=True)
    handle = None
    with contextlib.suppress(ImportError):  # a system without such locks: only this check is lost
        import fcntl

        handle = os.open(out, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refused(f"another run of fineweb.py is filling {shown(out)}: wait for it") from error
        except OSError:
            pass  # likewise a disk without locks
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)
        for part in out.glob(".*.part"):
            if part.stat().st_size == 0:
                part.unlink()
        if not any(out.iterdir()):
            out.rmdir()


def words(argv, fail):
    """The command line, by default this process's, without --name=--, which argparse reads as a list."""
    argv = sys.argv[1:] if argv is None else argv
    if empty := [arg for arg in argv if re.fullmatch("--.*=--", arg, re.S)]:
        fail(f"{empty[0]} has no value")
    return argv


def parse_arguments(argv):
    """Checked command line; bad values end with one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="fineweb.py", allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message}; --help lists the options")
    parser.add_argument("shards", type=int, nargs="?", metavar="N", help="training shards of 100 million tokens "
                        "(default 9); with --tokenize, parquet files of 0.7 billion tokens (default 1)")
    parser.add_argument("--variant", choices=VARIANTS, default="10B", help="which FineWeb (default 10B)")
    parser.add_argument("--from", dest="source", metavar="DIR_OR_URL", help="folder or http(s) address that holds the "
                        "files (default: the hub; a mirror of the whole hub is named by HF_ENDPOINT)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: data/<name of the variant>/ of this project")
    parser.add_argument("--jobs", type=int, metavar="N", default=8, help="downloads at a time (default 8)")
    parser.add_argument("--verify", action="store_true", help="compare every byte on disk with the manifest's sha256")
    parser.add_argument("--tokenize", action="store_true", help="make the shards here, from FineWeb's parquet files")
    args = parser.parse_args(words(argv, fail))
    variant = VARIANTS[args.variant]
    if args.tokenize and not variant.parquet_repo:
        fail(f"--tokenize knows the variants 10B and edu, not {args.variant}")
    default, low, high = (1, 1, variant.parquet_files) if args.tokenize else (9, 0, variant.train_shards)
    args.shards = default if args.shards is None else args.shards
    if not low <= args.shards <= high:
        fail(f"N={args.shards} is out of range: {low} to {high} for --variant={args.variant}")
    if not 1 <= args.jobs <= 64:
        fail(f"--jobs={args.jobs} is out of range: 1 to 64")
    args.out = args.out or Path(__file__).resolve().parent / (variant.folder + "_tokenized" * args.tokenize)
    if args.source and all(map(os.path.exists, (args.out, args.source))) and args.out.samefile(args.source):
        fail(f"--from and --out are the same folder: {args.source}")
    return args


def run(args):
    """Do what was asked and print what is there now and what to type next."""
    start, out = time.perf_counter(), args.out
    with folder_for(out):
        entries, received, prefix = (tokenize if args.tokenize else get_shards)(args, out, VARIANTS[args.variant])
    seconds, size = time.perf_counter() - start, sum(entry["size"] for entry in entries)
    facts = f"{len(entries)} files, {size / 1e9:.2f} GB, {sum(entry['tokens'] for entry in entries):,} tokens"
    speed = f"{seconds:.1f} s, {(received or 0) / 1e6 / seconds:.1f} MB/s"
    print(f"{facts} in {shown(out)}: {'nothing to do' if received is None else speed}")
    start = f"{shown(out)}/{prefix}"
    flags = f' --train_files="{start}train_*.bin" --val_files="{start}val_*.bin"'
    flags = "" if start == "data/fineweb10B/fineweb_" else flags  # what train_gpt.py reads by itself
    print(f"next: torchrun --standalone --nproc_per_node=gpu train_gpt.py{flags}")


def main(argv=None):
    """Entry point: returns when all files are there, exits with 2 and one line when not, with 130 when stopped."""
    args = parse_arguments(argv)
    try:
        run(args)
    except Refused as error:
        fail(error)
    except ModuleNotFoundError as error:
        fail(f"needs the Python package {error.name}: pip install -r requirements.txt")
    except OSError as error:
        fail(f"{error.filename or args.out}: {error.strerror or error}; choose another --out")
    except KeyboardInterrupt:
        print("fineweb.py: stopped; the same command continues", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    main()
