"""Turns your own text into training shards: `train_*.bin`, `val_*.bin`, `tokenizer.json`, `manifest.json`.

    python data/text.py                             # the Python library on this machine -> data/local/
    python data/text.py my_folder/ more.jsonl.gz    # your files -> data/my_folder_more/

Read are .txt .md .rst .py .html (as they stand, tags included), .jsonl (also .gz .xz .zst) and .parquet; folders with
all they hold, except hidden ones, __pycache__, node_modules and site-packages. Files of other kinds are passed over;
what is damaged, empty or not text is skipped, counted and reported. Needs numpy, tqdm, and tiktoken for gpt2.

How it works, with memory that does not grow with the input: workers tokenise fixed pieces of the input (groups of
files, byte ranges, blocks of lines, row groups) into a temporary folder and note for each document a 40-byte record
with a sort key made from the document's sha256 and the seed. Sorting the records by key is the shuffle, so neither the
number of processes nor the order of the files can change the result. Then each shard is gathered on its own.
Validation is chosen by sha256 too: a document lands on the same side in every run, and copies never straddle.
On disk the temporary folder needs about as much as the result; a gathering process holds one shard in memory.
"""

import argparse
import base64
import concurrent.futures as futures
import contextlib
import errno
import functools
import gzip
import hashlib
import importlib
import io
import json
import lzma
import multiprocessing
import os
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
import warnings
import zlib
from collections import namedtuple
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
LAYOUT = 1  # raise it when the same input and options would give other shards
TASK_BYTES = 4 << 20  # input one task reads; a block of decompressed lines has this size too
DOC_BYTES = 8 << 20  # a longer text file counts as several documents, so that no file has to fit in memory
WINDOW = 1 << 16  # bytes searched for a paragraph end when a long text file is cut
MANIFEST_BYTES = 1 << 24  # a larger manifest.json is none
VOCAB_BYTES = 1 << 22  # larger files are not GPT-2's vocabulary
LINE_BYTES = 1 << 25  # a longer line of .jsonl is left out: as objects it can take 24 times as much
CHUNK_TOKENS = 1024  # --stream: longest chunk, when --max_doc_tokens does not say
SORT_ROWS = 4_000_000  # document records sorted at a time, 40 bytes each
MAX_GATHERERS = 8  # processes that each hold one shard in memory
TEXT_ENDINGS = (".txt", ".md", ".rst", ".py", ".html")
PACKED_ENDINGS = (".jsonl.gz", ".jsonl.xz", ".jsonl.zst")
SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "dist-packages"}
BROKEN_ON_PURPOSE = r"/tests?/(.*/)?(\w*data\d*/|cjkencodings/|bad\w*\.py|\w+_testcases)"  # in the standard library
OUR_NAMES = re.compile(r"(train|val)_\d{6}\.bin")

MAGIC, VERSION = 20240520, 1
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_TOKENIZER_SHA256 = "2fc5cf1fe8570ed8946bc342c02ae0f0f1324b740b3a7599419e46842c18e802"
# tiktoken names the files in its cache after the address they came from.
ENCODER_JSON_URL = b"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json"
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"

# One row a document (or piece of one). doc: first 8 bytes of its sha256; worker, start, tokens: where its ids lie.
RECORD = np.dtype([("key", "<u8"), ("doc", "<u8"), ("start", "<u8"), ("worker", "<u4"), ("piece", "<u4"),
                   ("tokens", "<u4"), ("bytes", "<u4")])
Source = namedtuple("Source", "path name size mtime_ns kind")


class InputError(ValueError):
    """A mistake of the user's, told in one line that names the thing, the value and the remedy."""


# -----------------------------------------------------------------------------
# Tokenizers


def canonical_json(obj):
    """The bytes of `obj` as tokenizer files hold it: sorted keys, no spaces, ASCII, one line."""
    return (json.dumps(obj, ensure_ascii=True, sort_keys=True, separators=(",", ":")) + "\n").encode("ascii")


def bytes_tokenizer_json():
    """tokenizer.json of the `bytes` tokenizer (bytes): 256 byte values and a begin-of-document id."""
    ranks = [base64.b64encode(bytes([b])).decode() for b in range(256)]
    return canonical_json({"name": "bytes", "pattern": "", "ranks": ranks, "special_tokens": {"<|bos|>": 256},
                           "bos_id": 256})


@functools.cache  # 0.15 s, and the command line asks before build_shards does
def gpt2_tokenizer_json(vocab_dir=None):
    """tokenizer.json of GPT-2 (bytes), from `vocab_dir` (vocab.bpe, encoder.json) or else from tiktoken's cache.

    Never touches the network. Raises LookupError, with the reason, when the vocabulary is missing or not GPT-2's.
    """
    path = _cached_encoder_json()
    if vocab_dir is not None:
        path = Path(vocab_dir, "encoder.json")
        _read_checked(Path(vocab_dir, "vocab.bpe"), VOCAB_BPE_SHA256)
    elif not path.exists():
        raise LookupError("GPT-2's vocabulary is not in tiktoken's cache")
    ranks = [base64.b64encode(token).decode() for token in _tokens_of(_read_checked(path, ENCODER_JSON_SHA256))]
    data = canonical_json({"name": "gpt2", "pattern": GPT2_PATTERN, "ranks": ranks,
                           "special_tokens": {"<|endoftext|>": 50256}, "bos_id": 50256})
    assert hashlib.sha256(data).hexdigest() == GPT2_TOKENIZER_SHA256, "hash-checked files gave another vocabulary"
    return data


def _read_checked(path, sha256):
    """The file's bytes; LookupError when it cannot be read or its sha256 is another."""
    try:
        if not path.is_file():  # reading a pipe would wait for its writer
            raise FileNotFoundError(errno.ENOENT, "no such file")
        with open(path, "rb") as file:
            data = file.read(VOCAB_BYTES)
    except OSError as e:
        raise LookupError(f"{path} cannot be read ({e.strerror})") from None
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise LookupError(f"{path} is not GPT-2's: its sha256 is {found}, expected {sha256}")
    return data


def _cached_encoder_json():
    """Where tiktoken keeps GPT-2's encoder.json after its first download."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    return Path(folder or Path(tempfile.gettempdir(), "data-gym-cache"), hashlib.sha1(ENCODER_JSON_URL).hexdigest())


def _tokens_of(encoder_json):
    """The bytes of GPT-2's tokens in order of id; the file spells invisible bytes as chr(256), chr(257), ..."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    byte_of = {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}
    ids = json.loads(encoder_json)
    del ids["<|endoftext|>"]
    return [bytes(byte_of[c] for c in token) for token in sorted(ids, key=ids.get)]


class Encoder:
    """Text to ids by a tokenizer.json; `width` is the smallest numpy type for ids without the begin-of-document id."""

    def __init__(self, tokenizer_json):
        spec = json.loads(tokenizer_json)
        tokens = [base64.b64decode(rank) for rank in spec["ranks"]]
        self.token_bytes = np.array([len(token) for token in tokens])
        self.width = np.uint8 if spec["name"] == "bytes" else np.uint16
        self.bpe = None
        if spec["name"] != "bytes":
            import tiktoken  # only here, so that `bytes` needs nothing but numpy

            ranks = {token: i for i, token in enumerate(tokens)}
            self.bpe = tiktoken.Encoding(spec["name"], pat_str=spec["pattern"], mergeable_ranks=ranks,
                                         special_tokens=spec["special_tokens"])

    def encode(self, raw, text):
        """Ids of a text given as UTF-8 and as str, (N,) of `width`; "<|endoftext|>" in it is ordinary text."""
        if self.bpe is None:
            return np.frombuffer(raw, np.uint8)
        try:
            ids = self.bpe.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # a run of a million blanks overflows tiktoken's regex; in parts, it still decodes the same
            parts = (text[i:i + 100_000] for i in range(0, len(text), 100_000))
            ids = np.concatenate([self.bpe.encode_to_numpy(part, disallowed_special=()) for part in parts])
        return ids.astype(self.width)

    def ends(self, ids):
        """Where each token ends in the text, in bytes, (N,) int64."""
        return np.arange(1, len(ids) + 1) if self.bpe is None else np.cumsum(self.token_bytes[ids])


# -----------------------------------------------------------------------------
# Finding the input


def find_files(inputs, exclude=""):
    """The Sources under `inputs` (files and folders), sorted by name, each file once.

    exclude: regular expression; files whose name, from the input folder's name on, contains it are left out.
    Raises InputError for a missing path, a named file of an unknown kind, or when nothing is left.
    """
    leave_out = re.compile(exclude) if exclude else None
    found, unknown = {}, set()
    for given in map(Path, inputs):
        if not given.exists():
            raise InputError(f"{given}: no such file or folder; check the path")
        root = given.resolve()
        for path in sorted(_walk(root)) if root.is_dir() else [root]:
            name = path.relative_to(root.parent).as_posix()
            kind = _kind(path.name)
            if kind is None:
                unknown.add(path.suffix or path.name)
            elif path.is_file() and not (leave_out and leave_out.search(name)):
                stat = path.stat()
                found.setdefault(path.resolve(), Source(path, name, stat.st_size, stat.st_mtime_ns, kind))
        if root.is_file() and _kind(root.name) is None:
            raise InputError(f"{given}: unknown kind of file; known are {_known()}")
    if not found:
        only = f" (found only {', '.join(sorted(unknown)[:8])})" if unknown else ""
        raise InputError(f"{', '.join(map(str, inputs))}: no file to read{only}; known are {_known()}")
    return sorted(found.values(), key=lambda source: source[1:])


def _walk(root):
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in SKIPPED_FOLDERS and not f.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _kind(name):
    name = name.lower()
    if name.endswith(PACKED_ENDINGS):
        return "packed"
    kinds = {".jsonl": "jsonl", ".parquet": "parquet"} | dict.fromkeys(TEXT_ENDINGS, "text")
    return kinds.get(Path(name).suffix)


def _known():
    return f"{' '.join(TEXT_ENDINGS)} .jsonl {' '.join(PACKED_ENDINGS)} .parquet"


def plan_tasks(files, text_column, val_fraction, skipped):
    """Yields (size, units): what one worker reads at a time; `size` counts bytes on disk, for the progress bar.

    Units: ("text" | "jsonl", path, nominal start, nominal end), ("lines", path, bytes), ("parquet", path, row group).
    Packed files are unpacked here, one after the other; damage is noted in `skipped`.
    """
    lone = len(files) == 1 and val_fraction > 0  # one text file: several documents, so that some can be held out
    step = min(max(files[0].size // 64, 4096), DOC_BYTES) if lone else DOC_BYTES
    row_groups = {f.path: _row_groups(f.path, text_column, skipped) for f in files if f.kind == "parquet"}
    units, gathered = [], 0
    for f in files:
        size = step if f.kind == "text" else TASK_BYTES
        if f.kind in ("text", "jsonl"):
            for start in range(0, max(f.size, 1), size):
                end = min(start + size, f.size)
                units.append((f.kind, f.path, start, end))
                gathered += end - start
                if gathered >= TASK_BYTES:
                    yield gathered, units
                    units, gathered = [], 0
        elif f.kind == "parquet":
            for group in range(row_groups[f.path]):
                yield f.size // row_groups[f.path], [("parquet", f.path, group)]
        else:
            for read, block in _unpack(f.path, skipped):
                yield read, [("lines", f.path, block)]
    if units:
        yield gathered, units


def _unpack(path, skipped):
    """Yields (packed bytes read, block of whole lines) of a .jsonl.gz, .xz or .zst file."""
    at = 0
    with open(path, "rb") as packed:
        lines, damage = _open_packed(packed, path)
        try:
            while block := lines.read(TASK_BYTES):
                block = _whole_lines(block, lines, path, skipped)
                yield packed.tell() - at, block
                at = packed.tell()
        except (EOFError, OSError, damage) as e:
            note(skipped, "damaged compressed file, its rest lost", f"{path.name}: {e}")


def _whole_lines(block, file, path, skipped):
    """The block with the rest of its last line, after which the file then stands; without a line over LINE_BYTES."""
    rest = b"" if block.endswith(b"\n") else file.readline(LINE_BYTES)
    if len(rest) < LINE_BYTES or rest.endswith(b"\n"):
        return block + rest
    while (more := file.readline(LINE_BYTES)) and not more.endswith(b"\n"):
        pass
    note(skipped, f"line of more than {LINE_BYTES >> 20} MiB", path.name)
    return block[:block.rfind(b"\n") + 1]


def _open_packed(file, path):
    """(unpacked stream, the error class of its format)"""
    if path.suffix.lower() == ".gz":
        return gzip.open(file), zlib.error
    if path.suffix.lower() == ".xz":
        return lzma.open(file), lzma.LZMAError
    zstandard = _optional("zstandard", path)
    stream = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
    return io.BufferedReader(stream), zstandard.ZstdError


def _optional(package, path):
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.split(".")[0]
        raise InputError(f"{path.name}: reading {path.suffix} needs {name}; pip install {name}") from None


def _row_groups(path, column, skipped):
    """Number of row groups of a .parquet file; InputError when the text column is absent or holds no text."""
    pa, pq = _optional("pyarrow", path), _optional("pyarrow.parquet", path)
    try:
        with pq.ParquetFile(path) as file:
            schema, groups = file.schema_arrow, file.num_row_groups
    except (pa.ArrowException, OSError) as e:
        note(skipped, "damaged parquet file", f"{path.name}: {str(e).splitlines()[0]}")
        return 0
    if column not in schema.names:
        names = ", ".join(schema.names[:20])
        raise InputError(f"{path.name}: no column {column!r}; choose with --text_column among: {names}")
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise InputError(f"{path.name}: column {column!r} holds {kind}, not text; choose another with --text_column")
    return groups


# -----------------------------------------------------------------------------
# Reading documents (in the workers)

CUTS = [re.compile(p) for p in (rb"\n(?:[ \t\r]*\n)+", rb"\n", rb"[.!?](?=\s)", rb"\S(?=\s)")]  # paragraph, line, ...
CONTROL = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b")) + b"\x7f"


def note(skipped, reason, example):
    """Counts one thing left out; keeps the alphabetically first example, so that it does not depend on timing."""
    count, first = skipped.get(reason, (0, example))
    skipped[reason] = (count + 1, min(first, example))


def read_documents(unit, column, skipped):
    """Yields (UTF-8 bytes, str) of the documents of one unit; what cannot be used is noted in `skipped`."""
    kind, path = unit[:2]
    try:
        if kind == "text":
            texts = _read_text(path, *unit[2:], skipped)
        elif kind == "parquet":
            texts = _read_row_group(path, unit[2], column, skipped)
        else:
            block = unit[2] if kind == "lines" else _read_lines(path, *unit[2:], skipped)
            texts = _parse_lines(path, block, column, skipped)
        for raw, text in texts:
            if raw.isspace() or not raw:
                note(skipped, "empty document", path.name)
            else:
                yield raw, text
    except OSError as e:
        note(skipped, "file that cannot be read", f"{path.name}: {e.strerror or e}")


def _read_text(path, start, end, skipped):
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start, end = _cut_near(file, start, size), _cut_near(file, end, size)
        file.seek(start)
        raw = file.read(end - start)
    if start == end and size:  # a paragraph longer than the nominal range: all of it went to the unit before
        return
    raw = raw.removeprefix(b"\xef\xbb\xbf") if start == 0 else raw
    strange = len(raw) if b"\0" in raw else 0
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = raw.decode(errors="replace")
        strange += text.count("\ufffd") + len(raw) - len(raw.translate(None, CONTROL))
        if 10 * strange <= len(raw):
            note(skipped, "file not in UTF-8, kept with replacement characters", path.name)
        raw = text.encode()
    if 10 * strange > len(raw):
        note(skipped, "file that is not text", path.name)
    else:
        yield raw, text


def _cut_near(file, at, size):
    """First paragraph end at or after byte `at` (else line end, else start of a character) within WINDOW bytes.

    A pure function of file and position, so the two workers that share a border agree on it.
    """
    if at <= 0 or at >= size:
        return min(max(at, 0), size)
    file.seek(at)
    window = file.read(WINDOW)
    for pattern in CUTS[:2]:
        if match := pattern.search(window):
            return at + match.end()
    return at + next((i for i, byte in enumerate(window) if byte & 0xC0 != 0x80), 0)


def _read_lines(path, start, end, skipped):
    """The whole lines that begin in [start, end)."""
    with open(path, "rb") as file:
        if start:
            file.seek(start - 1)
            while (before := file.readline(TASK_BYTES)) and not before.endswith(b"\n"):
                pass
        block = file.read(max(end - file.tell(), 0))
        return _whole_lines(block, file, path, skipped) if block else block


def _parse_lines(path, block, column, skipped):
    for line in block.split(b"\n"):
        if not line or line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            note(skipped, "line that is not JSON", path.name)
            continue
        if not isinstance(row, dict) or column not in row:
            has = ", ".join(sorted(row)[:12]) if isinstance(row, dict) else type(row).__name__
            note(skipped, f"line without the column {column!r}", f"{path.name} has: {has}")
        elif not isinstance(row[column], str):
            note(skipped, f"line whose column {column!r} is not text", path.name)
        else:
            yield _utf8(row[column])


def _utf8(text):
    try:
        return text.encode(), text
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which no UTF-8 text can hold
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text.encode(), text


def _read_row_group(path, group, column, skipped):
    pa, pq = _optional("pyarrow", path), _optional("pyarrow.parquet", path)
    try:
        with pq.ParquetFile(path) as file:  # in batches: a row group may be larger than memory allows
            for batch in file.iter_batches(256, row_groups=[group], columns=[column], use_threads=False):
                yield from (_utf8(text or "") for text in batch.column(0).to_pylist())
    except pa.ArrowException as e:
        note(skipped, "damaged row group, its rest lost", f"{path.name}: {str(e).splitlines()[0]}")


# -----------------------------------------------------------------------------
# Tokenising (in the workers)


def cut_tokens(raw, ends, limit):
    """Where to cut a document into pieces of at most `limit` tokens: token counts, the last one being all tokens.

    raw: the text in UTF-8; ends: (N,) where each token ends in it. Each piece ends at the last paragraph end that
    fits, else line end, sentence end, word end, or at least between two characters; pieces joined give all tokens.
    """
    levels = {}
    first_byte = np.append(np.frombuffer(raw, np.uint8), 0)

    def last_cut(level, start):
        if level not in levels:
            if level < len(CUTS):
                at = np.fromiter((m.end() for m in CUTS[level].finditer(raw)), np.int64)
                levels[level] = 1 + np.flatnonzero(np.isin(ends, at, assume_unique=True))
            else:
                levels[level] = 1 + np.flatnonzero(first_byte[ends] & 0xC0 != 0x80)
        fitting = np.searchsorted(levels[level], start + limit, side="right")
        return levels[level][fitting - 1] if fitting else 0

    cuts = [0]
    while len(ends) - cuts[-1] > limit:
        found = (last_cut(level, cuts[-1]) for level in range(len(CUTS) + 1))
        cuts.append(int(next((cut for cut in found if cut > cuts[-1]), cuts[-1] + limit)))
    return cuts[1:] + [len(ends)]


def sort_keys(doc, piece, pieces, seed, stream):
    """Places of documents (or pieces of them) in the shuffled order, (N,) uint64.

    doc, piece, pieces: (N,) hash of the document, number of the piece, how many there are. Each piece has a random
    place; with `stream` only the first one, and the others follow at even distances around the whole corpus, so that
    pieces of one document are as far apart as they can be.
    """
    start = _mix(doc ^ _mix(np.array([seed % 2**64], np.uint64)))
    if stream:
        return start + piece * (np.uint64(2**64 - 1) // pieces)  # wraps around
    return _mix(start + piece)


def _mix(x):
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): each bit of x changes each bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Tokeniser:
    """A worker: reads tasks, appends ids to its own file in the temporary folder, gives back records and counts."""

    def __init__(self, building, options):
        self.building, self.options, self.stopped = building, options, False
        self.encoder = Encoder((building / "tokenizer.json").read_bytes())
        self.limit = options["max_doc_tokens"] or (CHUNK_TOKENS if options["stream"] else 0)

    def run(self, task):
        """(size, records, documents, text bytes, skipped) of a task; size as in the task."""
        size, units = task
        parts, rows, skipped, documents, text_bytes = [], [], {}, 0, 0
        for unit in units:
            for raw, text in read_documents(unit, self.options["text_column"], skipped):
                if self.stopped:
                    raise InterruptedError("the caller was interrupted")
                doc = int.from_bytes(hashlib.sha256(raw).digest()[:8], "little")
                ids = self.encoder.encode(raw, text)
                if self.limit and len(ids) >= self.limit:  # the begin-of-document id counts
                    self.cut(raw, doc, ids, parts, rows)
                else:
                    parts.append(ids)
                    rows.append((doc, 0, 1, len(raw)))
                documents += 1
                text_bytes += len(raw)
        return size, self.save(parts, rows), documents, text_bytes, skipped

    def cut(self, raw, doc, ids, parts, rows):
        """Appends the pieces of a long document to `parts` and `rows`."""
        ends = self.encoder.ends(ids)
        cuts = cut_tokens(raw, ends, self.limit - 1)
        byte_ends = [0, *ends[np.array(cuts) - 1].tolist()]
        for piece, (a, b) in enumerate(pairwise([0, *cuts])):
            parts.append(ids[a:b])
            rows.append((doc, piece, len(cuts), byte_ends[piece + 1] - byte_ends[piece]))

    def save(self, parts, rows):
        """Writes the ids in shuffled order, so that a shard finds its part of them in one place; returns records."""
        records = np.zeros(len(parts), RECORD)
        if not parts:
            return records
        doc, piece, pieces, records["bytes"] = np.array(rows, np.uint64).T
        records["doc"], records["piece"], records["worker"] = doc, piece, os.getpid()
        records["key"] = sort_keys(doc, piece, pieces, self.options["seed"], self.options["stream"])
        records["tokens"] = [len(part) for part in parts]
        order = np.argsort(records["key"], kind="stable")
        records = records[order]
        with open(self.building / f"ids-{os.getpid()}", "ab") as file:
            start = np.uint64(file.tell() // parts[0].itemsize)
            records["start"] = start + np.cumsum(records["tokens"], dtype=np.uint64) - records["tokens"]
            file.writelines(parts[i] for i in order)
        return records


_worker = None


def _start_worker(building, options):
    global _worker
    _worker = Tokeniser(building, options)
    if multiprocessing.parent_process():  # killed while it answers, it would leave a reader that waits for the rest
        signal.signal(signal.SIGTERM, lambda *_: setattr(_worker, "stopped", True))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _run_worker(task):
    return _worker.run(task)


# -----------------------------------------------------------------------------
# Shuffling and gathering


def choose_threshold(index, val_fraction):
    """Documents whose `doc` lies below the result are held out; with two documents or more, both sides get some."""
    low, high = int(index["doc"].min()), int(index["doc"].max())
    if val_fraction == 0 or low == high:
        return 0
    return min(max(int(val_fraction * 2.0**64), low + 1), high)


def shuffle(index, threshold, drop_duplicates, building):
    """Writes the records in sorted order to `order-train` and `order-val`; returns the number of duplicates dropped.

    Sorts one range of keys after the other, so memory stays bounded.
    """
    duplicates = 0
    borders = np.linspace(0, 2.0**64, 1 + -(-len(index) // SORT_ROWS)).tolist()
    with open(building / "order-train", "wb") as train, open(building / "order-val", "wb") as val:
        for low, high in pairwise(map(int, borders)):
            rows = index[(index["key"] >= np.uint64(low)) & (index["key"] <= np.uint64(high - 1))]
            rows = rows[np.lexsort((rows["piece"], rows["doc"], rows["key"]))]
            if drop_duplicates and len(rows):
                again = np.append(False, (rows["key"][1:] == rows["key"][:-1]) & (rows["doc"][1:] == rows["doc"][:-1]))
                duplicates += int(np.sum(again & (rows["piece"] == 0)))
                rows = rows[~again]
            held_out = rows["doc"] < np.uint64(threshold)
            train.write(rows[~held_out])
            val.write(rows[held_out])
    return duplicates


def cut_into_shards(order_file, shard_tokens):
    """Yields (first row, rows) per shard: as many documents as `shard_tokens` (and SORT_ROWS) allow, at least one."""
    rows = os.path.getsize(order_file) // RECORD.itemsize
    order = np.memmap(order_file, RECORD, "r") if rows else ()
    first = 0
    while first < rows:
        ends = np.cumsum(order["tokens"][first:first + SORT_ROWS] + np.int64(1))
        fitting = max(1, int(np.searchsorted(ends, shard_tokens, side="right")))
        yield first, fitting
        first += fitting


def write_shard(task):
    """Gathers one shard into the temporary folder; returns (name, its manifest entry)."""
    building, tokenizer, split, number, first, rows = task
    name = f"{split}_{number:06d}.bin"
    order = np.memmap(building / f"order-{split}", RECORD, "r", first * RECORD.itemsize, rows)
    sizes = order["tokens"] + np.int64(1)
    places = np.cumsum(sizes) - sizes
    ids = np.full(int(sizes.sum()), tokenizer["bos_id"], np.uint16)
    width = np.uint8 if tokenizer["name"] == "bytes" else np.uint16
    reading = np.lexsort((order["start"], order["worker"]))  # ascending through the files, for the disk's sake
    for worker in np.unique(order["worker"]).tolist():
        found = np.memmap(building / f"ids-{worker}", width, "r")
        mine = reading[order["worker"][reading] == worker]
        for place, start, size in zip(places[mine].tolist(), order["start"][mine].tolist(), sizes[mine].tolist()):
            ids[place + 1:place + size] = found[start:start + size - 1]
    header = np.zeros(256, "<i4")
    header[:6] = MAGIC, VERSION, len(ids), tokenizer["vocab_size"], tokenizer["bos_id"], ids.itemsize
    header[8:16] = np.frombuffer(bytes.fromhex(tokenizer["sha256"]), "<i4")
    ids = ids.astype("<u2", copy=False)
    digest = hashlib.sha256(header)
    digest.update(ids)
    _write_synced(building / name, header, ids)
    return name, {"sha256": digest.hexdigest(), "size": header.nbytes + ids.nbytes, "tokens": len(ids),
                  "documents": rows, "text_bytes": int(order["bytes"].sum(dtype=np.int64))}


# -----------------------------------------------------------------------------
# The whole job


def describe_job(files, inputs, options):
    """What decides the result, for the manifest: a second run with the same description has nothing to do."""
    listing = hashlib.sha256()
    for f in files:
        listing.update(f"{f.name}\0{f.size}\0{f.mtime_ns}\n".encode(errors="surrogateescape"))
    names = sorted({Path(i).resolve().name for i in inputs})
    sources = {"inputs": names[:20], "files": len(files), "bytes": sum(f.size for f in files),
               "names_sizes_mtimes_sha256": listing.hexdigest()}
    return {"script": "text.py", "layout": LAYOUT, "options": options, "sources": sources}


def check_options(options):
    """Raises InputError for a value out of range."""
    for name, fine, rule in (
            ("tokenizer", options["tokenizer"] in ("gpt2", "bytes"), "gpt2 or bytes"),
            ("val_fraction", 0 <= options["val_fraction"] < 1, "at least 0 and below 1"),
            ("max_doc_tokens", options["max_doc_tokens"] == 0 or options["max_doc_tokens"] >= 16, "0 (off) or 16 up"),
            ("shard_tokens", 1 <= options["shard_tokens"] < 2**31, "1 up to 2147483647")):
        if not fine:
            raise InputError(f"--{name}={options[name]}: must be {rule}")
    try:
        with warnings.catch_warnings(action="ignore"):  # of sets that may mean something else some day
            re.compile(options["exclude"])
    except (re.error, RecursionError, OverflowError) as e:
        raise InputError(f"--exclude={options['exclude']}: not a regular expression ({e})") from None


def build_shards(inputs, out_dir, *, tokenizer, vocab_dir=None, val_fraction=0.005, max_doc_tokens=0, seed=0,
                 stream=False, processes=None, shard_tokens=100_000_000, text_column="text", exclude="",
                 drop_duplicates=False):
    """Tokenises `inputs` (files and folders) into shards in `out_dir`; returns the manifest it wrote there.

    Replaces the shards of an earlier run. Until all is done nothing but a temporary folder is written, and no run
    leaves that behind. Raises InputError (one line that says what to do), LookupError when GPT-2's vocabulary is not
    at hand, OSError when `out_dir` cannot be written. The result does not depend on `processes` (default: all cores).
    """
    options = dict(tokenizer=tokenizer, val_fraction=val_fraction, max_doc_tokens=max_doc_tokens, seed=seed,
                   stream=stream, shard_tokens=shard_tokens, text_column=text_column, exclude=exclude,
                   drop_duplicates=drop_duplicates)
    check_options(options)
    files = find_files(inputs, exclude)
    tokenizer_json = gpt2_tokenizer_json(vocab_dir) if tokenizer == "gpt2" else bytes_tokenizer_json()
    spec = json.loads(tokenizer_json)
    about = {"name": tokenizer, "sha256": hashlib.sha256(tokenizer_json).hexdigest(),
             "vocab_size": len(spec["ranks"]) + len(spec["special_tokens"]), "bos_id": spec["bos_id"]}
    processes = processes or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    with _temporary_folder(Path(out_dir)) as building:
        _write_synced(building / "tokenizer.json", tokenizer_json)
        with _workers(processes, files, building, options) as pool:
            counts = _tokenise(pool, 2 * processes + 2, files, building, options)
            index = np.memmap(building / "index", RECORD, "r")
            threshold = choose_threshold(index, val_fraction)
            counts["duplicates_dropped"] = shuffle(index, threshold, drop_duplicates, building)
            tasks = [(building, about, split, number, *span) for split in ("train", "val")
                     for number, span in enumerate(cut_into_shards(building / f"order-{split}", shard_tokens))]
            written = _in_parallel(pool, write_shard, tasks, MAX_GATHERERS)
            entries = dict(tqdm(written, "writing shards", len(tasks), leave=False, disable=None))
        made_by = describe_job(files, inputs, options) | {"counts": counts}
        manifest = {"format": 1, "tokenizer": about, "files": entries, "made_by": made_by}
        _publish(building, Path(out_dir), manifest)
    return manifest


@contextlib.contextmanager
def _temporary_folder(out_dir):
    """A folder inside `out_dir` that is gone afterwards; so is `out_dir` when it was made here and stays empty."""
    made = [p for p in (out_dir, *out_dir.parents) if not p.exists()]
    building = None
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for old in out_dir.glob(".building-*"):  # left by a run that was killed outright
            if not old.is_symlink() and time.time() - max(p.lstat().st_mtime for p in (old, *old.glob("*"))) > 3600:
                shutil.rmtree(old, ignore_errors=True)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=out_dir))
        yield building
    finally:
        if building is not None:
            shutil.rmtree(building, ignore_errors=True)
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


@contextlib.contextmanager
def _workers(processes, files, building, options):
    """A pool of started workers, or None when the work is small enough for this process."""
    if processes == 1 or sum(f.size for f in files) <= TASK_BYTES:
        _start_worker(building, options)
        yield None
        return
    before = {*multiprocessing.active_children()}
    pool = futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_worker,
                                       (building, options))
    try:
        yield pool
    except BaseException:
        for process in {*multiprocessing.active_children()} - before:
            process.terminate()  # else they would finish what is queued, which may take seconds
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _signals_held():
    """While workers start: nothing interrupts that, and they never see Ctrl-C, which reaches the whole group."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _in_parallel(pool, function, tasks, window):
    """Yields function(task) for all tasks, in order of completion, with at most `window` of them under way."""
    if pool is None:
        yield from map(function, tasks)
        return
    pending = set()
    for task in tasks:
        with _signals_held():
            pending.add(pool.submit(function, task))
        if len(pending) >= window:
            done, pending = futures.wait(pending, return_when=futures.FIRST_COMPLETED)
            yield from (future.result() for future in done)
    yield from (future.result() for future in futures.as_completed(pending))


def _tokenise(pool, window, files, building, options):
    """Runs all tokenising tasks, with a progress bar; writes the records to `index` and returns the counts."""
    skipped, documents, text_bytes, tokens = {}, 0, 0, 0
    tasks = plan_tasks(files, options["text_column"], options["val_fraction"], skipped)
    start = time.perf_counter()
    with open(building / "index", "wb") as index, tqdm(
            total=sum(f.size for f in files), disable=None, leave=False, desc="tokenising",
            bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:
        for size, records, *more, damaged in _in_parallel(pool, _run_worker, tasks, window):
            index.write(records)
            documents, text_bytes = documents + more[0], text_bytes + more[1]
            tokens += int(records["tokens"].sum()) + len(records)
            for reason, (count, example) in damaged.items():
                before = skipped.get(reason, (0, example))
                skipped[reason] = (before[0] + count, min(before[1], example))
            mb = text_bytes / 1e6
            speed = mb / (time.perf_counter() - start)
            bar.set_postfix_str(f"{mb:.0f} MB, {speed:.1f} MB/s, {tokens / 1e6:.1f}M tokens", refresh=False)
            bar.update(size)
    if not documents:
        raise InputError(f"no usable text found in {len(files)} file(s), the first being {files[0].path}"
                         + "".join(f"; {line}" for line in tell_skipped(skipped)))
    return {"documents": documents, "text_bytes": text_bytes, "skipped": {k: list(v) for k, v in skipped.items()}}


def tell_skipped(skipped):
    """One line a reason: what was skipped, how often, and an example."""
    return [f"{count} x {reason} ({example})" for reason, (count, example) in sorted(skipped.items())]


def _write_synced(path, *parts):
    with open(path, "wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def _publish(building, out_dir, manifest):
    """Moves the finished files into `out_dir`; the manifest goes first and comes last, so it never tells a lie."""
    (out_dir / "manifest.json").unlink(missing_ok=True)
    for old in out_dir.glob("*.bin"):
        if OUR_NAMES.fullmatch(old.name) and old.name not in manifest["files"]:
            old.unlink()
    _write_synced(building / "manifest.json", (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
    for name in (*manifest["files"], "tokenizer.json", "manifest.json"):
        os.replace(building / name, out_dir / name)


# -----------------------------------------------------------------------------
# Command line


def one_line(message):
    """The message as a line that a terminal only shows, whatever a file or a flag put into it."""
    line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(message).split()))
    return line if len(line) <= 1000 else f"{line[:600]} ... {line[-300:]}"


def fail(message):
    """Prints one line to stderr and ends with exit code 2."""
    print(f"text.py: {one_line(message)}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv=None):
    """The command line as a namespace; a mistake ends in `fail`."""
    parser = argparse.ArgumentParser(
        prog="text.py", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__, allow_abbrev=False)
    parser.error = fail
    add = parser.add_argument
    add("inputs", nargs="*", metavar="PATH",
        help="files and folders to read; a text file is one document (above 8 MiB, or when it is the only input, it is "
             "cut at paragraph ends into several), .jsonl and .parquet hold one document a row; "
             "default: the sources and documentation of this machine's Python library, identical ones once")
    add("--out", type=Path, help="folder to write to; default: data/<name of the input>/, data/local/ without input")
    add("--tokenizer", choices=("gpt2", "bytes"),
        help="default: gpt2 when its vocabulary is at hand, else bytes (256 byte values, needs nothing)")
    add("--vocab_dir", type=Path, help="folder with GPT-2's vocab.bpe and encoder.json; default: tiktoken's cache")
    add("--val_fraction", type=float, default=0.005,
        help="share of the documents held out, chosen by their sha256; given two documents, at least one is held out "
             "and one is not; 0: none (default: %(default)s)")
    add("--max_doc_tokens", type=int,
        help="longer documents become pieces of at most so many tokens, each a document of its own that ends at a "
             "paragraph end (else at a line, sentence or word end); nothing is lost; 0: off (default: 0, without input 1024)")
    add("--stream", action="store_true",
        help=f"shuffle chunks, not documents: long documents are cut as by --max_doc_tokens (when that is 0, at "
             f"{CHUNK_TOKENS} tokens), each chunk starts with the begin-of-document id, and the chunks of a document "
             f"are spread at even distances over all shards, so that neighbouring batches never come from one source "
             f"file and the loss shows no pattern from file order. Without it, whole documents are shuffled")
    add("--seed", type=int, default=0, help="seed of the shuffle (default: %(default)s)")
    add("--processes", type=int, help="worker processes; does not change the result; default: all cores")
    add("--shard_tokens", type=int, default=100_000_000, help="tokens in a shard, at most (default: %(default)s)")
    add("--text_column", default="text", help="column of .jsonl and .parquet to read (default: %(default)s)")
    add("--exclude", default="", metavar="REGEX", help="leave out files whose path contains this regular expression")
    add("--drop_duplicates", action="store_true", help="keep only one of identical documents")
    add("--force", action="store_true", help="build even if the result is there, or beside shards of another origin")
    argv = sys.argv[1:] if argv is None else argv
    if empty := [arg for arg in argv if re.fullmatch("--.*=--", arg, re.S)]:  # argparse may read it as a list
        fail(f"{empty[0]} has no value")
    args = parser.parse_args(argv)
    if args.processes is not None and args.processes < 1:
        fail(f"--processes={args.processes}: must be at least 1")
    return args


def choose_tokenizer(args):
    """(name, why) of the tokenizer to use; fails when gpt2 was asked for and is not at hand."""
    if args.tokenizer == "bytes":
        return "bytes", "as asked for"
    try:
        import tiktoken  # noqa: F401

        gpt2_tokenizer_json(args.vocab_dir)
        return "gpt2", f"vocabulary from {args.vocab_dir or 'the cache of tiktoken'}"
    except ImportError:
        why, remedy = "tiktoken is not installed", "pip install tiktoken"
    except LookupError as e:
        why, remedy = str(e), ("pass --vocab_dir=FOLDER with GPT-2's vocab.bpe and encoder.json, or let tiktoken fetch "
                               "them once: python -c \"import tiktoken; tiktoken.get_encoding('gpt2')\"")
    if args.tokenizer == "gpt2" or args.vocab_dir:
        fail(f"--tokenizer=gpt2: {why}; {remedy}, or use --tokenizer=bytes")
    return "bytes", f"gpt2 is not at hand: {why}; to change that, {remedy}"


def check_out_dir(out_dir, job, force):
    """The manifest in `out_dir` if it already holds what `job` describes, else None; fails on other people's shards."""
    try:
        if not (out_dir / "manifest.json").is_file():  # reading a pipe would wait for its writer
            raise FileNotFoundError
        with open(out_dir / "manifest.json", "rb") as file:
            old = json.loads(file.read(MANIFEST_BYTES))
        names, sizes = {*old["files"].keys()}, {name: entry["size"] for name, entry in old["files"].items()}
        same = {key: old["made_by"].get(key) for key in job} == job
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        old, names, same = None, {p.name for p in out_dir.glob("*.bin")}, False
    if force:
        return None
    if (old is None and names) or any(not OUR_NAMES.fullmatch(name) for name in names):
        fail(f"--out={out_dir}: holds shards of another origin ({min(names)}); choose another folder, or --force")
    complete = same and (out_dir / "tokenizer.json").is_file() and all(
        (out_dir / name).is_file() and (out_dir / name).stat().st_size == size for name, size in sizes.items())
    return old if complete else None


def summarize(manifest, out_dir, seconds):
    """Prints what was made from what, how fast, and what to type next."""
    counts, files = manifest["made_by"]["counts"], manifest["files"]
    tokens = {split: sum(e["tokens"] for n, e in files.items() if n.startswith(split)) for split in ("train", "val")}
    pieces = sum(e["documents"] for e in files.values())
    held_out = sum(e["documents"] for n, e in files.items() if n.startswith("val"))
    for line in tell_skipped(counts["skipped"]):
        print(f"skipped or repaired: {line}")
    print(f"{counts['documents']:,} documents, {counts['text_bytes'] / 1e6:.1f} MB of text"
          + (f", {counts['duplicates_dropped']:,} duplicates dropped" if counts["duplicates_dropped"] else "")
          + f", in {seconds:.1f} s ({counts['text_bytes'] / 1e6 / seconds:.1f} MB/s)")
    print(f"{tokens['train']:,} training tokens and {tokens['val']:,} validation tokens ({held_out:,} of {pieces:,} "
          f"{'documents' if pieces <= counts['documents'] else 'pieces'}), tokenizer {manifest['tokenizer']['name']}")
    shown = Path(os.path.relpath(out_dir)) if out_dir.resolve().is_relative_to(Path.cwd()) else out_dir
    print(f"wrote {shown}/: {', '.join(sorted(files)[:4])}{', ...' if len(files) > 4 else ''}, tokenizer.json, "
          f"manifest.json ({len(files)} shards, {sum(e['size'] for e in files.values()) / 1e6:.1f} MB)")
    if tokens["val"]:
        patterns = f"--train_files={shown}/train_*.bin --val_files={shown}/val_*.bin"
        print(f"next: python train_gpt.py --preset=tiny {patterns}")
    else:
        print("no validation shard: " + ("--val_fraction=0" if manifest["made_by"]["options"]["val_fraction"] == 0
                                         else "one document cannot be divided; give more text"))


def main():
    start = time.perf_counter()
    args = parse_args()
    inputs = args.inputs
    if not inputs:  # always there, so that the project has real text to train on without any download
        inputs, args.exclude = [sysconfig.get_path("stdlib")], args.exclude or BROKEN_ON_PURPOSE
        args.drop_duplicates, args.out = True, args.out or HERE / "local"
    stems = [re.sub(r"(\.(jsonl|gz|xz|zst|parquet|txt|md|rst|py|html))+$", "", Path(i).resolve().name) for i in inputs]
    out_dir = args.out or HERE / ("_".join(dict.fromkeys(stems))[:80] or "text")
    if not args.out and out_dir in (Path(i).resolve() for i in inputs):
        out_dir = out_dir.with_name(out_dir.name + "_shards")
    tokenizer, why = choose_tokenizer(args)
    max_doc_tokens = args.max_doc_tokens if args.max_doc_tokens is not None else 0 if args.inputs else 1024
    options = dict(tokenizer=tokenizer, val_fraction=args.val_fraction, max_doc_tokens=max_doc_tokens,
                   seed=args.seed, stream=args.stream, shard_tokens=args.shard_tokens, text_column=args.text_column,
                   exclude=args.exclude, drop_duplicates=args.drop_duplicates)
    check_options(options)
    job = describe_job(find_files(inputs, args.exclude), inputs, options)
    if check_out_dir(out_dir, job, args.force):
        print(f"{out_dir} already holds this result: nothing to do (--force builds it again)")
        return
    print(f"tokenizer: {tokenizer} ({why})")
    manifest = build_shards(inputs, out_dir, vocab_dir=args.vocab_dir, processes=args.processes, **options)
    summarize(manifest, out_dir, time.perf_counter() - start)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the temporary folder goes too
    try:
        main()
    except (InputError, LookupError) as e:
        fail(e)
    except futures.BrokenExecutor:
        fail("a worker process was killed, perhaps for memory; use fewer with --processes=N")
    except BrokenPipeError:  # nobody reads the summary (`| head`); the shards are in place by then
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as e:
        fail(f"cannot write {e.filename or 'the shards'}: {e.strerror or e}; free some space or choose another --out")
    except KeyboardInterrupt:
        print("text.py: interrupted; start it again to build the shards", file=sys.stderr)
        raise SystemExit(130) from None
