"""FineWeb as token shards: downloads published GPT-2 shards, or makes shards from FineWeb's parquet files.

    python data/fineweb.py 9                    # validation shard + 9 training shards, 2.0 GB, into data/fineweb10B/
    python data/fineweb.py 103                  # everything published in fineweb10B, 20.6 GB
    python data/fineweb.py 30 --variant=edu     # FineWeb-Edu, into data/finewebedu10B/
    python data/fineweb.py 9 --from=/mnt/disk   # the same files from a folder or from http(s)://host/path
    python data/fineweb.py 2 --tokenize         # two parquet files (1.4 billion tokens), tokenised on all cores

You can stop it at any time. The same command continues: a file that is not complete is kept as `.NAME.part`. A second
run checks the files that are there (header and size; with --verify every byte) and downloads only what is missing or
broken. A file gets its name after its header, length, token ids and sha256 are checked. manifest.json records the
sha256. The environment variable HF_ENDPOINT names another hub, HF_TOKEN a token for it.

tokenizer.json is made from GPT-2's vocabulary. The script looks for it in --vocab_dir, in the --from source (a
tokenizer.json), in tiktoken's cache, and then in the network. The shards are complete without it, and the same command
adds it later.
"""

import argparse
import concurrent.futures
import contextlib
import errno
import glob
import hashlib
import itertools
import json
import os
import queue
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import namedtuple
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
Variant = namedtuple("Variant", "repo folder prefix train_shards parquet_repo parquet_files")
VARIANTS = {
    "10B": Variant("kjj0/fineweb10B-gpt2", "fineweb10B", "fineweb", 103, "HuggingFaceFW/fineweb", 15),
    "100B": Variant("kjj0/fineweb100B-gpt2", "fineweb100B", "fineweb", 1030, None, 0),
    "edu": Variant("kjj0/finewebedu10B-gpt2", "finewebedu10B", "finewebedu", 99, "HuggingFaceFW/fineweb-edu", 14),
}
PARQUET_FOLDER = "sample/10BT/"  # in the parquet repositories; it holds 000_00000.parquet, 001_00000.parquet, ...
OPENAI_GPT2 = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
Tokenizer = namedtuple("Tokenizer", "name vocab_size bos_id sha256")  # sha256 of its tokenizer.json
GPT2_TOKENIZER_SHA256 = "2fc5cf1fe8570ed8946bc342c02ae0f0f1324b740b3a7599419e46842c18e802"
GPT2 = Tokenizer("gpt2", 50257, 50256, GPT2_TOKENIZER_SHA256)
BLOCK_BYTES = 1 << 16  # received at a time; a broken connection loses at most this much
READ_BYTES = 1 << 23
SMALL_BYTES = 1 << 24  # largest manifest.json or tokenizer.json that is read
TIMEOUT_SECONDS = (10, 30)  # to connect, and between two packets
RETRY_WAITS = (0.5, 1, 2, 4)  # seconds between the five tries; the count starts again when new data arrives
INSTEAD = ("without a network, use python data/text.py (the text on this machine) or --from=DIR_OR_URL (a copy of the "
           "files)")
# What the command printed at the end relies on: defaults of train_gpt.py and of its preset tiny.
SPEEDRUN_TRAIN_TOKENS, SPEEDRUN_VAL_TOKENS, TINY_VAL_TOKENS = 900_000_000, 10_485_760, 65_536


class Refused(Exception):
    """The job cannot be done. The text is the line for the user."""


class Unsound(Refused):
    """The bytes of a file are wrong."""


class Transient(Exception):
    """This try failed, but another one may work. The text is the reason."""


class Changed(Transient):
    """The source now has another file than the one that was begun; it must be downloaded from the start."""


class Stopped(Exception):
    """Another thread failed, or the user stopped the run."""


def printable(text):
    """The text with a question mark for each control character and each byte that is not UTF-8."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text))


def one_line(message):
    """The message as one printable line, whatever a file name or a flag put into it."""
    line = printable(" ".join(str(message).split()))
    return line if len(line) <= 1000 else f"{line[:600]} ... {line[-300:]}"


def fail(message):
    """Print one line to stderr and end with exit code 2."""
    print(f"fineweb.py: {one_line(message)}", file=sys.stderr)
    raise SystemExit(2)


# -----------------------------------------------------------------------------
# Checks of files (token shards, and the parquet files that --tokenize reads)


def promised_bytes(head, name, tokenizer=GPT2):
    """Size in bytes that a file's first 1024 bytes promise (None for parquet, which does not say).

    Raises Unsound when they are not those of a shard made with `tokenizer`, or of a parquet file.
    """
    if name.endswith(".parquet"):
        if head[:4] != b"PAR1":
            raise Unsound(f"{name} is not a parquet file: it begins with {head[:12]!r}; is the source right?")
        return None
    words = np.frombuffer(head[:HEADER_BYTES].ljust(HEADER_BYTES, b"\0"), dtype="<i4")
    if len(head) < HEADER_BYTES or words[0] != MAGIC or words[1] != VERSION or words[2] <= 0:
        raise Unsound(f"{name} is not a token shard: it begins with {head[:12]!r}; is the source right?")
    # Published shards leave these words zero, which means GPT-2.
    vocab_size = int(words[3]) or GPT2.vocab_size
    bos_id = int(words[4]) or GPT2.bos_id
    width = int(words[5]) or 2
    sha256 = head[32:64].hex() if any(head[32:64]) else GPT2.sha256
    if (vocab_size, bos_id, sha256) != tokenizer[1:] or width != bytes_per_token(tokenizer):
        raise Unsound(f"{name} was made with another tokenizer than {tokenizer.name} (vocabulary {vocab_size}, "
                      f"begin-of-document id {bos_id}, {width} bytes per token, sha256 {sha256[:12]}); choose a source "
                      f"made with {tokenizer.name}")
    return HEADER_BYTES + width * int(words[2])


def bytes_per_token(tokenizer):
    return 2 if tokenizer.vocab_size <= 1 << 16 else 4


def measure(path, name, stop, tokenizer=GPT2):
    """Read a whole file and return its manifest entry: sha256, size in bytes, and for a shard tokens and documents.

    Raises Unsound when header, length, token ids or end mark are wrong, Stopped when `stop` is set meanwhile.
    """
    is_shard = name.endswith(".bin")
    size = path.stat().st_size
    documents = 0
    width = bytes_per_token(tokenizer)
    with open(path, "rb") as file:
        block = file.read(HEADER_BYTES)
        promised = promised_bytes(block, name, tokenizer)
        digest = hashlib.sha256(block)
        if promised not in (None, size):
            raise Unsound(f"{name} has {size} bytes, but its header promises {promised}")
        while following := file.read(READ_BYTES):
            if stop.is_set():
                raise Stopped
            digest.update(following)
            block = block[-4:] + following
            if is_shard:
                ids = np.frombuffer(following, dtype=f"<u{width}")
                documents += int(np.count_nonzero(ids == tokenizer.bos_id))
                if ids.max() >= tokenizer.vocab_size:
                    raise Unsound(f"{name} holds token id {ids.max()}, but the last id of {tokenizer.name} is "
                                  f"{tokenizer.vocab_size - 1}")
    if is_shard:  # the length of the text that a published shard was made from is not known
        return {"sha256": digest.hexdigest(), "size": size, "tokens": (size - HEADER_BYTES) // width,
                "documents": documents, "text_bytes": None}
    if size < 12 or block[-4:] != b"PAR1":
        raise Unsound(f"{name} is not a whole parquet file ({size} bytes, no end mark)")
    return {"sha256": digest.hexdigest(), "size": size}


# -----------------------------------------------------------------------------
# Sources, whose open(name, offset) returns a Reply

# start: first byte sent; total: size of the whole file, or None; sha256: as the hub says, or None; blocks: of bytes
Reply = namedtuple("Reply", "start total sha256 blocks")


class Folder:
    """Files of a local folder."""

    reached = True

    def __init__(self, path):
        self.address = str(path)
        self.path = Path(path)

    def open(self, name, offset):
        """Reply with the file's bytes from `offset`; FileNotFoundError when there is no such file."""
        path = self.path / name
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        total = path.stat().st_size
        if offset > total:
            raise Changed(f"{path} is shorter than the part that is here")
        return Reply(offset, total, None, self._blocks(path, offset))

    @staticmethod
    def _blocks(path, offset):
        with open(path, "rb") as file:
            file.seek(offset)
            while block := file.read(BLOCK_BYTES):
                yield block


class Web:
    """Files of one hub repository or under one http(s) address."""

    def __init__(self, address, url_of, headers=None):
        self.address, self.url_of, self.headers = address, url_of, headers or {}
        self.reached = False  # whether any answer came; without one there are few tries, so that the error comes soon

    def open(self, name, offset):
        """Reply from `offset` on (from 0 when the server ignores ranges).

        Raises FileNotFoundError on 404, Transient when another try may work, else Refused.
        """
        import requests

        url, headers = self.url_of(name), {**self.headers, "Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        try:
            answer = requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS)
        except (OSError, ValueError) as error:  # RequestException is an OSError
            raise request_error(error, url) from error
        self.reached = True
        self._check_status(answer.status_code, url)
        start, total = 0, answer.headers.get("Content-Length")
        if answer.status_code == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
            if not match or int(match[1]) != offset:
                raise Changed("the server sent another range than the one asked for")
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
            raise Changed("the part that is here is longer than the server's file")
        if status in (408, 425, 429) or status >= 500:
            raise Transient(f"{url} answers {status}")
        raise Refused(f"{url}: unexpected answer {status}; check the address")

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
    """Web source for one repository of the hub that HF_ENDPOINT names; sends the user's token if there is one."""
    from huggingface_hub import constants, get_token, hf_hub_url

    def url_of(name):
        if constants.HF_HUB_OFFLINE:
            raise Refused(f"HF_HUB_OFFLINE is set, so nothing is downloaded from the hub; unset it, or {INSTEAD}")
        return hf_hub_url(repo, folder + name, repo_type=repo_type)

    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    return Web(constants.ENDPOINT, url_of, {"Authorization": f"Bearer {token}"} if token else {})


def given_source(text):
    """Source for --from: an http(s) address or an existing folder; Refused otherwise."""
    if text.startswith(("http://", "https://")):
        return Web(text, lambda name: f"{text.rstrip('/')}/{name}")
    folder = user_path(text)
    if not folder.is_dir():
        raise Refused(f"--from={text} is neither a folder nor an http(s) address; check it")
    return Folder(folder)


def hub_sha256(answers):
    """Sha256 that the hub gives for a large file, or None. `answers`: the redirects, then the final answer.

    Only the hub's own ETag counts. A redirect leads to a storage host, whose ETag may be another kind of hash.
    """
    tags = [answer.headers.get("X-Linked-ETag") for answer in answers] + [answers[0].headers.get("ETag")]
    found = (re.fullmatch(r'(?:W/)?"?([0-9a-f]{64})"?', tag) for tag in tags if tag)
    return next((match[1] for match in found if match), None)


def request_error(error, url):
    """The exception to raise for what requests.get raised: Transient if another try may work, else Refused."""
    import requests

    wrong_address = (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema,
                     requests.exceptions.MissingSchema)
    proxy = requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url)) or ""
    parts = re.match(r"(\w+)://(?:.*@)?([^/:@]+)", proxy)
    shown_proxy = f"{parts[1]}://{parts[2]}" if parts else "that is set"  # without a password
    variables = "HTTPS_PROXY, HTTP_PROXY and ALL_PROXY"
    if "dependencies for SOCKS" in str(error):  # requests does not name the package
        return Refused(f"the proxy {shown_proxy} is a SOCKS proxy, which needs the Python package PySocks: pip install "
                       f"pysocks, or unset {variables}")
    if proxy and isinstance(error, wrong_address) and re.match(r"https?://\w", url):  # then it is not the url
        return Refused(f"the proxy {shown_proxy} is not the address of an http proxy; correct or unset {variables}")
    if isinstance(error, wrong_address):
        return Refused(f"{url} is not an http(s) address; check HF_ENDPOINT or --from")
    if isinstance(error, requests.RequestException):
        return Transient(network_reason(error))
    return Refused(f"{url} cannot be asked for ({error}); check REQUESTS_CA_BUNDLE, CURL_CA_BUNDLE, {variables}")


def network_reason(error):
    """Short reason of a requests exception, whose own text is long."""
    match = re.search(r"\[Errno -?\d+\] ([^'\")>]+)", str(error))
    return match[1] if match else "timed out" if "timed out" in str(error) else type(error).__name__


# -----------------------------------------------------------------------------
# Download


def with_retries(action, source, arrived=lambda: 0, stop=None):
    """The result of action(), tried again after Transient with growing waits; Refused after the last try.

    arrived: returns the bytes on disk so far. A try that adds a block or more starts the count of tries again.
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
                raise Refused(f"gave up after {failures} tries: {error}; run the same command later") from error
            if stop.wait(RETRY_WAITS[failures - 1]):
                raise Stopped from error


def pull(name, part, source, progress, stop):
    """Download what `part`, the incomplete file, still lacks. Returns the sha256 that the hub gives, or None.

    Raises Transient when the transfer ends early (what arrived is kept), Changed when `part` belongs to another file,
    Unsound when the source's file is wrong, Refused when the disk is too small.
    """
    have = part.stat().st_size if part.exists() else 0
    reply = source.open(name, max(0, have - HEADER_BYTES))  # the overlap shows whether it is still the same file
    blocks, first = iter(reply.blocks), b""
    while len(first) < HEADER_BYTES and (block := next(blocks, b"")):
        first += block
    size, limit = reply.start, reply.total
    with open(part, "r+b" if reply.start else "w+b") as file:
        head = file.read(HEADER_BYTES) or first
        file.seek(size)
        if not first.startswith(file.read()):
            raise Changed(f"{name} has changed at the source")
        file.seek(size)
        if first:
            promised = promised_bytes(head, name)
            if promised and reply.total not in (None, promised):
                raise Unsound(f"{name} has {reply.total} bytes at the source, but its header promises {promised}")
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
    """Download one file into `folder` and check it; returns its manifest entry.

    pins: name -> (sha256 it must have, who says so). Raises Refused when that fails, Stopped when `stop` is set.
    """
    part = folder / f".{name}.part"
    if part.is_symlink() or part.is_fifo():  # writing would follow the link or wait for the pipe
        part.unlink()

    def attempt():
        resuming = part.exists()
        try:
            hub_hash = pull(name, part, source, progress, stop)
            entry = measure(part, name, stop)
            for wanted, who in (pins.get(name, (None, "")), (hub_hash, f"{source.address} says")):
                if wanted and entry["sha256"] != wanted:
                    raise Unsound(f"{name} has sha256 {entry['sha256']}, but {who} {wanted}; the file is not kept")
            return entry
        except (Changed, Unsound) as error:
            part.unlink(missing_ok=True)
            progress.arrived(name, 0, 0)
            if resuming and isinstance(error, Unsound):  # perhaps only the earlier part is wrong
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
            message = f"no space left for {name} in {shown(folder)}; free some space and run the same command again"
            raise Refused(message) from error
        raise Refused(f"{name}: {error}") from error


class Progress:
    """A progress bar over all files of a download, in bytes, and a line for each finished file."""

    def __init__(self, names, folder):
        from tqdm import tqdm

        parts = {name: folder / f".{name}.part" for name in names}
        self.folder, self.totals, self.received, self.lock = folder, {}, 0, threading.Lock()
        self.sizes = {name: part.stat().st_size if part.exists() else 0 for name, part in parts.items()}
        self.bar = tqdm(total=0, initial=sum(self.sizes.values()), unit="B", unit_scale=True, disable=None)

    def expect(self, name, total):
        """Note a file's whole size in bytes. Raises Refused when the files do not fit on the disk."""
        with self.lock:
            self.totals[name] = total or self.sizes[name]
            # Files that have not begun are assumed to be as long as the others.
            self.bar.total = sum(self.totals.values()) * len(self.sizes) // len(self.totals)
            missing = self.bar.total - sum(self.sizes.values())
        if missing > (free := shutil.disk_usage(self.folder).free):
            raise Refused(f"no space: {shown(self.folder)} has {free / 1e9:.2f} GB free, but the files need "
                          f"{missing / 1e9:.2f} GB; free some space or choose another --out")

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
    """Yield (name, work(name)) as they finish, on `jobs` threads. The first exception stops all threads."""
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

    # Daemon threads: one that waits for a silent server must not delay the exit.
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


def look(path, entry, pin, rehash, stop, tokenizer=GPT2):
    """Check the file at `path`. Returns (its manifest entry, ""), (None, what is wrong), or (None, "") if it is absent.

    entry: from the manifest. None: somebody else put the file there, and it is used when it is right.
    """
    if not path.is_file():
        return None, f"{path.name} is not a file" if path.exists() else ""
    try:
        if entry and not rehash:
            with open(path, "rb") as file:
                promised = promised_bytes(file.read(HEADER_BYTES), path.name, tokenizer)
            size = path.stat().st_size
            fine = size == entry["size"] and promised in (None, size)
            return (entry, "") if fine else (None, f"{path.name} has {size} bytes instead of {entry['size']}")
        found, (wanted, who) = measure(path, path.name, stop, tokenizer), pin
        if wanted in (None, found["sha256"]):
            return found, ""
        return None, f"{path.name} has sha256 {found['sha256']}, but {who} {wanted}"
    except Unsound as error:
        return None, str(error)


def fetch(names, folder, source, entries, pins, args, keep=lambda: None):
    """Check the files `names` in `folder` and download those that are missing or broken. Returns the bytes received.

    entries: name -> manifest entry, filled in here; keep() is called after each change. pins: see download().
    """
    stop, missing = threading.Event(), []
    for name, (entry, problem) in in_parallel(lambda name: look(
            folder / name, entries.get(name), pins.get(name, (None, "")), args.verify, stop), names, args.jobs, stop):
        if problem:
            print(f"{problem}; downloading it again", flush=True)
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
    """Write bytes to `path`. After a crash it has either the old or the new content."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # left by a run that was killed, or a link that writing would follow
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
    """manifest.json of a shard folder, or a new one for GPT-2 shards; Refused when it is damaged."""
    path = folder / "manifest.json"
    if not path.is_file():
        return {"format": 1, "files": {}, "made_by": {"script": "data/fineweb.py"}, "tokenizer": {
            "name": GPT2.name, "sha256": GPT2.sha256, "vocab_size": GPT2.vocab_size, "bos_id": GPT2.bos_id}}
    try:
        with open(path, "rb") as file:
            manifest = json.loads(file.read(SMALL_BYTES))
        made_by = manifest["made_by"]
        manifest_tokenizer(manifest)
        kinds = {"sha256": str, "size": int, "tokens": int}
        sound = all(re.fullmatch(r"\w[\w.-]*", file) and all(type(entry[key]) is kind for key, kind in kinds.items())
                    and min(entry["size"], entry["tokens"]) >= 0 for file, entry in manifest["files"].items())
        if manifest["format"] != 1 or not isinstance(made_by, dict) or not sound:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(f"{shown(path)} is damaged; remove it, and the same command makes a new one") from error
    return manifest


def manifest_tokenizer(manifest):
    """The Tokenizer of a manifest; KeyError, TypeError or ValueError when there is none."""
    about = manifest["tokenizer"]
    vocab_size, bos_id = about.get("vocab_size", 0), about.get("bos_id", 0)
    if type(vocab_size) is not int or type(bos_id) is not int or not re.fullmatch(r"\w{1,64}", about["sha256"]):
        raise ValueError
    return Tokenizer(f"{about['name']!s:.40}", vocab_size, bos_id, about["sha256"])


def small_file(source, name, limit=SMALL_BYTES):
    """Bytes of a small file of the source; FileNotFoundError when there is none, Refused when it is too long."""
    def read():
        data = bytearray()
        for block in source.open(name, 0).blocks:
            data += block
            if len(data) > limit:
                raise Refused(f"{name} at {source.address} has more than {limit} bytes; is the source right?")
        return bytes(data)

    return with_retries(read, source)


def source_pins(source):
    """name -> (sha256, who says so), from the manifest.json of a --from source if it has one."""
    try:
        files = json.loads(small_file(source, "manifest.json"))["files"]
        return {name: (str(entry["sha256"]), f"{source.address}/manifest.json says") for name, entry in files.items()}
    except (FileNotFoundError, Refused, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        if not source.reached:
            raise
        return {}


def read_vocab_dir(vocab_dir):
    """tokenizer.json of GPT-2 from the folder of --vocab_dir; Refused unless it has encoder.json and vocab.bpe."""
    import text

    try:
        return text.gpt2_tokenizer_json(vocab_dir)
    except LookupError as error:
        raise Refused(f"--vocab_dir={vocab_dir}: {error}; name a folder with GPT-2's encoder.json and "
                      "vocab.bpe") from error


def gpt2_tokenizer(scratch):
    """(tokenizer.json of GPT-2, folder with its vocabulary, which is None for tiktoken's cache).

    Looks in tiktoken's cache, and then in the network. scratch: an empty folder for downloads. Raises LookupError with
    all reasons when the vocabulary is nowhere.
    """
    import text

    reasons = []
    try:
        return text.gpt2_tokenizer_json(), None
    except LookupError as error:
        reasons.append(str(error))
    for source, names in ((lambda: hub_source("openai-community/gpt2", "model"), ("vocab.json", "merges.txt")),
                          (lambda: given_source(OPENAI_GPT2), ("encoder.json", "vocab.bpe"))):
        try:
            for theirs, ours in zip(names, ("encoder.json", "vocab.bpe")):  # text.py checks their sha256
                (scratch / ours).write_bytes(small_file(source(), theirs))
            return text.gpt2_tokenizer_json(scratch), scratch
        except (Refused, LookupError, OSError, ImportError) as error:
            reasons.append(str(error).replace(f"; {INSTEAD}", ""))
    raise LookupError("; ".join(reasons))


def is_gpt2_tokenizer(path):
    """Whether the file is the tokenizer.json of GPT-2."""
    if not path.is_file() or path.stat().st_size > SMALL_BYTES:
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() == GPT2_TOKENIZER_SHA256


def put_tokenizer(folder, given, vocab_dir):
    """Put tokenizer.json beside the shards and return True, or print one line that says what works without it.

    given: the source of --from, or None.
    """
    path = folder / "tokenizer.json"
    if is_gpt2_tokenizer(path):
        return True
    data = read_vocab_dir(vocab_dir) if vocab_dir else b""
    if given and not data:
        with contextlib.suppress(FileNotFoundError, Refused):
            data = small_file(given, "tokenizer.json")
    try:
        if hashlib.sha256(data).hexdigest() != GPT2_TOKENIZER_SHA256:
            with tempfile.TemporaryDirectory() as scratch:
                data, _ = gpt2_tokenizer(Path(scratch))
    except (LookupError, ImportError) as error:
        reason = one_line(error)[:400]
        if path.exists():
            reason = f"the one that is there is another tokenizer's: remove it; {reason}"
        warn(f"no tokenizer.json for {shown(folder)} ({reason}). The shards are complete. Without the vocabulary, "
             "train_gpt.py trains --preset=tiny, whose stages have no prefix targets; for the other presets, for "
             "sample.py and for evaluate.py pass --vocab_dir=FOLDER with GPT-2's encoder.json and vocab.bpe. To add "
             "tokenizer.json, run this command again with --vocab_dir=FOLDER or with a network")
        return False
    write_file(path, data)
    return True


# -----------------------------------------------------------------------------
# The two jobs. Each returns a Result.

# entries: name -> manifest entry; received: bytes, or None if there was nothing to do; prefix: start of the file names;
# has_tokenizer: whether tokenizer.json is beside the shards
Result = namedtuple("Result", "entries received prefix has_tokenizer")


def get_shards(args, out, variant):
    """Download published shards into `out`."""
    names = [f"{variant.prefix}_val_000000.bin"]
    names += [f"{variant.prefix}_train_{i:06d}.bin" for i in range(1, args.shards + 1)]
    if args.vocab_dir:
        read_vocab_dir(args.vocab_dir)  # a wrong one is refused before the download
    given = given_source(args.source) if args.source else None
    manifest = read_manifest(out)
    if (tokenizer := manifest_tokenizer(manifest)).sha256 != GPT2.sha256:
        raise Refused(f"{shown(out)} holds shards of the tokenizer {tokenizer.name}, not gpt2; choose another --out")
    source = given or hub_source(variant.repo, "dataset")
    entries = manifest["files"]
    complete = all(name in entries and (out / name).exists() for name in names)
    pins = source_pins(given) if given and not complete else {}
    pins |= {name: (entry["sha256"], f"{shown(out)}/manifest.json says") for name, entry in entries.items()}
    manifest["made_by"] |= {"variant": args.variant, "source": args.source or variant.repo}
    received = fetch(names, out, source, entries, pins, args, lambda: write_manifest(out, manifest))
    has_tokenizer = put_tokenizer(out, given, args.vocab_dir)
    return Result({name: entries[name] for name in names}, received or None, f"{variant.prefix}_", has_tokenizer)


def get_parquet(args, out, variant):
    """The first N parquet files: (paths, bytes received). Those of a --from folder stay where they are."""
    given = given_source(args.source) if args.source else None
    if isinstance(given, Folder):
        paths = sorted(given.path.glob("*.parquet"))[:args.shards]
        if len(paths) < args.shards:
            raise Refused(f"N={args.shards} asks for {args.shards} parquet files, but the folder {args.source} has "
                          f"{len(paths)}; lower N or name another folder with --from")
        return paths, 0
    folder = out / "parquet"
    names = [f"{i:03d}_00000.parquet" for i in range(args.shards)]
    if folder.is_symlink():
        raise Refused(f"{shown(folder)} is a link, but files are only written inside --out; remove the link")
    folder.mkdir(exist_ok=True)
    source = given or hub_source(variant.parquet_repo, "dataset", PARQUET_FOLDER)
    return [folder / name for name in names], fetch(names, folder, source, {}, {}, args)


def tokenizer_identity(tokenizer):
    """What the manifest records of --tokenizer: gpt2, bytes, or the sha256 of a file; Refused for another file."""
    if tokenizer in ("gpt2", "bytes"):
        return tokenizer
    try:
        if not tokenizer.is_file():  # reading a pipe would wait for its writer
            raise FileNotFoundError(errno.ENOENT, "no such file")
        with open(tokenizer, "rb") as file:
            content = file.read(SMALL_BYTES)
        spec = json.loads(content)
        missing = {"name", "pattern", "ranks", "special_tokens", "bos_id"} - {*spec}
        if missing or not isinstance(spec, dict):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not a tokenizer.json of this project: {error}"
        raise Refused(f"--tokenizer={tokenizer}: {reason}; name gpt2, bytes, or a tokenizer.json that data/text.py or "
                      "this script wrote") from error
    return hashlib.sha256(content).hexdigest()


def finished_shards(args, out, wish):
    """Manifest entries of the shards in `out` if they are what `wish` describes, else None.

    Raises Refused when the folder holds shards of another origin, which tokenising would replace.
    """
    manifest = read_manifest(out)
    entries, made_by = manifest["files"], manifest["made_by"].get("fineweb")
    if not isinstance(made_by, dict) and (entries or any(out.glob("*.bin"))):
        raise Refused(f"{shown(out)} holds shards of another origin, which would be replaced; choose another --out")
    if not entries:
        return None
    if (before := made_by.get("tokenizer", "gpt2")) != (now := wish.get("tokenizer", "gpt2")):
        raise Refused(f"{shown(out)} holds shards of the tokenizer {before!s:.12}, not {now:.12}; choose another --out")
    if made_by != wish:
        return None
    tokenizer, never = manifest_tokenizer(manifest), threading.Event()
    whole = all(look(out / name, entry, (entry["sha256"], ""), args.verify, never, tokenizer)[0]
                for name, entry in entries.items())
    return entries if whole else None


def vocabulary_folder(scratch):
    """Folder with GPT-2's vocabulary, None for tiktoken's cache; Refused when the vocabulary is nowhere."""
    try:
        return gpt2_tokenizer(scratch)[1]
    except LookupError as error:
        raise Refused(f"GPT-2's vocabulary was not found ({error}); pass --vocab_dir=FOLDER with encoder.json and "
                      "vocab.bpe, or another tokenizer with --tokenizer=FILE") from error


def tokenize(args, out, variant):
    """Make shards from FineWeb's parquet files with text.py."""
    import text

    wish = {"variant": args.variant, "parquet_files": args.shards, "source": args.source or variant.parquet_repo}
    if args.tokenizer != "gpt2":
        wish["tokenizer"] = tokenizer_identity(args.tokenizer)
    if args.vocab_dir:
        read_vocab_dir(args.vocab_dir)
    if entries := finished_shards(args, out, wish):
        return Result(entries, None, "", True)
    with tempfile.TemporaryDirectory() as scratch:
        vocab_dir = args.vocab_dir
        if args.tokenizer == "gpt2" and not vocab_dir:
            vocab_dir = vocabulary_folder(Path(scratch))
        paths, received = get_parquet(args, out, variant)
        print(f"tokenising {len(paths)} parquet files on {os.cpu_count()} cores", flush=True)
        try:
            manifest = text.build_shards(paths, out, tokenizer=str(args.tokenizer), vocab_dir=vocab_dir)
        except text.InputError as error:
            raise Refused(str(error)) from error
        except concurrent.futures.BrokenExecutor as error:
            raise Refused("a tokenising process was killed, perhaps because memory ran out; close other programs and "
                          "run the same command again") from error
    manifest["made_by"]["fineweb"] = wish
    write_manifest(out, manifest)
    if received:
        print(f"{one_line(shown(out))}/parquet/ is no longer needed; you may delete it")
    return Result(manifest["files"], received, "", True)


# -----------------------------------------------------------------------------
# Command line


def warn(message):
    """Print one line to stderr."""
    print(f"fineweb.py: warning: {printable(message)}", file=sys.stderr)


def shown(path):
    """A path as the user would type it: relative when it is in the current folder."""
    relative = os.path.relpath(path)
    if relative.split(os.sep)[0] == os.pardir:
        return os.path.abspath(path)
    return f"./{relative}" if relative.startswith(("-", "~")) else relative


def user_path(text):
    """The path that a flag names, where a leading ~ is the home folder."""
    return Path(text if os.path.exists(text) else os.path.expanduser(text))


@contextlib.contextmanager
def folder_for(out):
    """Make `out` and lock it against a second run. At the end it is removed again if it was made here and is empty."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    handle = None
    with contextlib.suppress(ImportError):  # a system without such locks goes without this check
        import fcntl

        handle = os.open(out, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refused(f"another run of fineweb.py is writing to {shown(out)}; wait until it ends") from error
        except OSError:
            pass  # so does a disk without locks
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)
        for part in out.glob(".*.part"):
            if part.stat().st_size == 0:
                part.unlink()
        with contextlib.suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()


def words(argv, fail):
    """The command line, by default this process's. Calls fail for --name=--, which argparse reads as a list."""
    argv = sys.argv[1:] if argv is None else argv
    if empty := [arg for arg in argv if re.fullmatch("--[^=]*=(--)?", arg)]:
        fail(f"{empty[0]} has no value")
    return argv


def parse_arguments(argv):
    """The checked command line; bad values end with one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="fineweb.py", allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message}; --help lists the options")
    add = parser.add_argument
    add("shards", type=int, nargs="?", metavar="N", help="how many training shards of 100 million tokens (default 9); "
        "with --tokenize: how many parquet files of 0.7 billion tokens (default 1)")
    add("--variant", choices=VARIANTS, default="10B", help="which FineWeb (default 10B)")
    add("--from", dest="source", metavar="DIR_OR_URL", help="folder or http(s) address that holds the files (default: "
        "the hub; HF_ENDPOINT names a mirror of the whole hub)")
    add("--out", type=user_path, metavar="DIR", help="folder to write to (default: data/NAME_OF_THE_VARIANT)")
    add("--vocab_dir", type=user_path, metavar="DIR", help="folder with GPT-2's encoder.json and vocab.bpe (default: "
        "tiktoken's cache, else they are downloaded)")
    add("--jobs", type=int, metavar="N", default=8, help="how many downloads at a time (default 8)")
    add("--verify", action="store_true", help="compare every byte on disk with the sha256 in manifest.json")
    add("--tokenize", action="store_true", help="make the shards here, from FineWeb's parquet files")
    add("--tokenizer", metavar="gpt2|bytes|FILE", help="with --tokenize: the tokenizer; FILE is a tokenizer.json in "
        "this project's format (default gpt2)")
    args = parser.parse_args(words(argv, fail))
    check_tokenizer_flags(args)
    variant = VARIANTS[args.variant]
    if args.tokenize and not variant.parquet_repo:
        fail(f"--variant={args.variant} has no parquet files for --tokenize; use --variant=10B or edu")
    default, low, high = (1, 1, variant.parquet_files) if args.tokenize else (9, 0, variant.train_shards)
    args.shards = default if args.shards is None else args.shards
    if not low <= args.shards <= high:
        fail(f"N={args.shards} is out of range: {low} to {high} for --variant={args.variant}")
    if not 1 <= args.jobs <= 64:
        fail(f"--jobs={args.jobs} is out of range: 1 to 64")
    if not args.out:
        kind = "_tokenized" * args.tokenize
        if args.tokenizer != "gpt2":  # so that each tokenizer has its own folder
            kind += f"_{args.tokenizer if args.tokenizer == 'bytes' else args.tokenizer.resolve().parent.name}"
        args.out = HERE / (variant.folder + kind)
    if args.source and "://" not in args.source:
        try:
            same = args.out.samefile(user_path(args.source))
        except OSError:                  # one of them is not there
            same = False
        if same:
            fail(f"--from and --out are the same folder: {args.source}; to check it, leave out --from")
    return args


def check_tokenizer_flags(args):
    """Turns --tokenizer into gpt2, bytes or a path; flags that do not fit together end with one line."""
    if args.tokenizer and not args.tokenize:
        fail(f"--tokenizer={args.tokenizer} needs --tokenize: published shards are made with gpt2")
    if args.vocab_dir and args.tokenizer not in (None, "gpt2"):
        fail(f"--vocab_dir={args.vocab_dir} is for gpt2, not for --tokenizer={args.tokenizer}; leave out one of them")
    if args.tokenizer not in (None, "gpt2", "bytes"):
        args.tokenizer = user_path(args.tokenizer)
    args.tokenizer = args.tokenizer or "gpt2"


def pattern_flag(name, pattern):
    """A flag of train_gpt.py, quoted for the shell. Characters that cannot be typed become the wildcard `?`."""
    return shlex.quote(f"--{name}={printable(pattern)}")


def next_lines(out, result):
    """The lines that end the output: a command that trains on the shards, or what is missing for one."""
    tokens = {split: sum(entry["tokens"] for name, entry in result.entries.items()
                         if name.startswith(f"{result.prefix}{split}_")) for split in ("train", "val")}
    if not tokens["train"]:
        return ["no next command: there is no training shard; give N=1 or more"]
    if not tokens["val"]:
        return ["no next command: there is no validation shard, because the text is one document; give more text"]
    on_gpus = result.has_tokenizer and shutil.which("nvidia-smi") is not None
    flags, lines = [] if on_gpus else ["--preset=tiny"], []
    start = f"{shown(out)}/{result.prefix}"
    if not on_gpus or start != "data/fineweb10B/fineweb_":  # which the script reads without a flag
        start = f"{glob.escape(shown(out))}/{result.prefix}"
        flags += [pattern_flag(f"{split}_files", f"{start}{split}_*.bin") for split in ("train", "val")]
    if tokens["val"] <= (SPEEDRUN_VAL_TOKENS if on_gpus else TINY_VAL_TOKENS):
        most = tokens["val"] - 1
        flags.append(f"--val_tokens={most // 1024 * 1024 or most}")
    if on_gpus and tokens["train"] < SPEEDRUN_TRAIN_TOKENS:
        epochs = -(-SPEEDRUN_TRAIN_TOKENS // tokens["train"])
        flags.append(f"--epochs={epochs}")
        lines.append(f"The speedrun needs up to {SPEEDRUN_TRAIN_TOKENS / 1e9:.1f} billion training tokens. So the "
                     f"command reads the {tokens['train']:,} of these shards {epochs} times.")
    start = "torchrun --standalone --nproc_per_node=gpu" if on_gpus else "python"
    script = shlex.quote(printable(shown(HERE.parent / "train_gpt.py")))
    return [*lines, " ".join([f"next: {start} {script}", *flags])]


def run(args):
    """Do what was asked. Print what is there now and what to type next."""
    start, out = time.perf_counter(), args.out
    with folder_for(out):
        result = (tokenize if args.tokenize else get_shards)(args, out, VARIANTS[args.variant])
    entries, received = result.entries.values(), result.received
    seconds = time.perf_counter() - start
    size, tokens = (sum(entry[key] for entry in entries) for key in ("size", "tokens"))
    speed = f"{seconds:.1f} s, {(received or 0) / 1e6 / seconds:.1f} MB/s"
    print(one_line(f"{len(entries)} files, {size / 1e9:.2f} GB, {tokens:,} tokens in {shown(out)}: "
                   f"{'nothing to do' if received is None else speed}"))
    print("\n".join(next_lines(out, result)))


def main(argv=None):
    """Entry point: returns when all files are there, exits with 2 and one line when not, with 130 when stopped."""
    args = parse_arguments(argv)
    try:
        run(args)
    except Refused as error:
        fail(error)
    except ModuleNotFoundError as error:
        if error.name == "text":
            fail("data/text.py is missing; put it beside fineweb.py")
        fail(f"the Python package {error.name} is missing; pip install -r requirements.txt")
    except OSError as error:
        fail(f"{error.filename or args.out}: {error.strerror or error}; check its permissions, or choose another --out")
    except KeyboardInterrupt:
        print("fineweb.py: stopped; the same command continues", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    sys.stdout.reconfigure(errors="backslashreplace")  # a path may have letters that the locale lacks
    main()
