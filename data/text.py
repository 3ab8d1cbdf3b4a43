"""Turns your own text into training shards: `train_*.bin`, `val_*.bin`, `tokenizer.json`, `manifest.json`.

    python data/text.py                             # the Python library on this machine -> data/local/
    python data/text.py my_folder/ more.jsonl.gz    # your files -> data/my_folder_more/

    python data/text.py my_package/ --join=folder --max_doc_tokens=65536 --needles=500      # long documents

It reads .txt .md .rst .py .html (as they are, tags included), .jsonl and .json (one object a line), all of these also
as .gz .xz .zst, and .parquet. A folder is read with everything in it, links included, except hidden files and folders,
__pycache__, node_modules, site-packages. Each file it finds is counted once: as read, or as left out for a reason.
The last line it prints is the command that trains on the result. Needs numpy, tqdm, and tiktoken for gpt2.

How it works, with memory that does not grow with the input: workers tokenise fixed pieces of the input (groups of
files, byte ranges, blocks of lines, row groups) into a temporary folder. For each document they note a short record
with a sort key made from the document's sha256 and the seed. Sorting the records by key is the shuffle, so the number
of processes and the order of the files cannot change the result. Then each shard is gathered on its own.
Validation text is chosen by sha256 too, so copies of a document are never on both sides.
The temporary folder needs about as much disk as the result. A gathering process holds one shard in memory.
"""

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C during the imports needs no traceback

import argparse
import base64
import binascii
import codecs
import concurrent.futures as futures
import contextlib
import errno
import functools
import glob
import hashlib
import importlib
import io
import json
import lzma
import multiprocessing
import re
import shlex
import shutil
import stat
import sys
import sysconfig
import tempfile
import time
import warnings
import zlib
from collections import Counter, defaultdict, namedtuple
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
LAYOUT = 2  # raise it when the same input and options would give other shards
TASK_BYTES = 4 << 20  # input one task reads; a block of decompressed lines has this size too
DOC_BYTES = 8 << 20  # a longer text file counts as several documents, so that no file has to fit in memory
WINDOW = 1 << 16  # bytes searched for a paragraph end when a long text file is cut
JSON_BYTES = 1 << 24  # largest manifest.json or tokenizer.json
VOCAB_BYTES = 1 << 22  # largest file of GPT-2's vocabulary
LINE_BYTES = 1 << 25  # a longer line of .jsonl is left out: as objects it can take 24 times as much
JOIN_BYTES = 1 << 18  # --join: longest document that is made of several files
LONG_VAL_TOKENS = 1 << 20  # --join: validation tokens in the command for training, at most
LONG_STEPS, LONG_BATCH_TOKENS = 150, 131_072  # of the preset long of train_gpt_long.py
FIRST_NEEDLE = 1 << 24  # more than the pieces of a document
NEEDLE_TOKENS = 65_536  # --needles: longest document, when --max_doc_tokens does not say
CHUNK_TOKENS = 1024  # --stream: longest chunk, when --max_doc_tokens does not say
SORT_ROWS = 4_000_000  # document records handled at a time
MAX_GATHERERS = 8  # processes that each hold one shard in memory
TEXT_ENDINGS = (".txt", ".md", ".rst", ".py", ".html")
LINE_ENDINGS = (".jsonl", ".json")
PACKED_ENDINGS = (".gz", ".xz", ".zst")
SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "dist-packages"}
BROKEN_ON_PURPOSE = r"/tests?/(.*/)?(\w*data\d*/|cjkencodings/|bad\w*\.py|\w+_testcases)"  # in the standard library
OUR_NAMES = re.compile(r"(train|val)_\d{6}\.bin")
ANOTHER_KIND = "file of another kind"  # in reasons, with an ending
OUR_OTHER_NAMES = ("tokenizer.json", "manifest.json")

# What the tiny preset of train_gpt.py reads; a test compares these with the script.
PACK_TOKENS = 512  # batches are made of packs of this size, filled with documents; the longest piece it reads of one
TINY_STEPS = 330
TINY_VAL_TOKENS = 65_536  # the validation shards must hold more than this
MAX_EPOCHS = 4  # reading text more often teaches little (Muennighoff et al. 2023)
MIN_STEPS = 10  # a shorter run is not worth starting
MIN_TOKENS = 10_000  # less text than this is refused
MIN_VAL_SHARE, MAX_VAL_SHARE = 0.005, 0.1  # of the text, when --val_fraction does not say

MAGIC, VERSION = 20240520, 1
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def gpt4_pattern(digits, joined=False):
    """GPT-4's pattern with at most `digits` digits in a piece. joined: words with one space between are one piece."""
    words = r"[^\r\n\p{L}\p{N}]?+\p{L}++" + r"(?: \p{L}++)*+" * joined
    return (r"'(?:[sdmtSDMT]|[lL]{2}|[vV][eE]|[rR][eE])|" + words + rf"|\p{{N}}{{1,{digits}}}"
            r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s")


# How a tokenizer may split text, as in sample.py. Other patterns are refused: a hostile one could run for ever.
PATTERNS = ("", GPT2_PATTERN, *(gpt4_pattern(digits, joined) for joined in (False, True) for digits in (1, 2, 3)))
GPT2_TOKENIZER_SHA256 = "2fc5cf1fe8570ed8946bc342c02ae0f0f1324b740b3a7599419e46842c18e802"
# tiktoken names the files in its cache after the address they came from.
ENCODER_JSON_URL = b"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json"
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"

# One row a document (or piece of one). doc: first 8 bytes of its sha256; worker, start, tokens: where its ids are;
# val: it comes from the files of --val.
RECORD = np.dtype([("key", "<u8"), ("doc", "<u8"), ("start", "<u8"), ("worker", "<u4"), ("piece", "<u4"),
                   ("tokens", "<u4"), ("bytes", "<u4"), ("val", "u1")])
Source = namedtuple("Source", "path name size mtime_ns kind")


class InputError(ValueError):
    """A mistake of the user's. Its one line names the thing, the value and the remedy."""


def one_line(message):
    """The message as one printable line, whatever a file name or a flag put into it."""
    line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(message).split()))
    return line if len(line) <= 1000 else f"{line[:600]} ... {line[-300:]}"


def note(counts, reason, example, count=1):
    """Adds to the count of `reason`; keeps the alphabetically first example, so that timing cannot change it."""
    before, first = counts.get(reason, (0, example))
    counts[reason] = (before + count, min(first, example))


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
        data = _read_small(path, VOCAB_BYTES)
    except OSError as e:
        raise LookupError(f"{path} cannot be read ({e.strerror})") from None
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise LookupError(f"{path} is not GPT-2's: its sha256 is {found}, expected {sha256}")
    return data


def _read_small(path, limit):
    """The first `limit` bytes of a regular file; a pipe is refused, since reading it would wait for its writer."""
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "not a plain file" if path.exists() else "no such file")
    with open(path, "rb") as file:
        return file.read(limit)


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


def tokenizer_file_json(path):
    """The bytes of the user's tokenizer.json, or of the one in a folder; InputError with one reason if it is unfit."""
    def need(good, problem):
        if not good:
            raise InputError(f"--tokenizer={path}: {problem}; a tokenizer.json of this project has name, pattern, "
                             "ranks, special_tokens and bos_id (gpt2 and bytes are built in)")
    file = Path(path, "tokenizer.json") if Path(path).is_dir() else Path(path)
    try:
        data = _read_small(file, JSON_BYTES)
        spec = json.loads(data)
    except OSError as e:
        what = "a folder, and its tokenizer.json" if file != Path(path) else "not gpt2, not bytes, and as a file it"
        raise InputError(f"--tokenizer={path}: {what} cannot be read ({e.strerror}); name a tokenizer.json") from None
    except (ValueError, RecursionError):
        need(False, "not JSON")
    types = {"name": str, "pattern": str, "ranks": list, "special_tokens": dict, "bos_id": int}
    for field, kind in types.items():
        need(isinstance(spec, dict) and type(spec.get(field)) is kind, f"{field} is missing or not a {kind.__name__}")
    need(spec["pattern"] in PATTERNS, "its pattern is not one of those allowed, which data/tokenizer.py uses")
    try:
        tokens = [base64.b64decode(rank, validate=True) for rank in spec["ranks"]]
    except (TypeError, ValueError, binascii.Error):
        need(False, "a rank is not base64")
    every_byte = [bytes([b]) for b in range(256)]
    need(len(set(tokens)) == len(tokens) and b"" not in tokens, "a token is empty or there twice")
    need({*every_byte} <= {*tokens}, "some of the 256 single bytes have no token")
    need(spec["pattern"] or tokens == every_byte, "without a pattern its ranks must be the 256 bytes in order")
    ids = [*spec["special_tokens"].values()]
    need(all(type(i) is int for i in ids) and sorted(ids) == [*range(len(tokens), len(tokens) + len(ids))],
         "the ids of special_tokens do not follow on the ranks")
    need(spec["bos_id"] in ids, "bos_id is not the id of a special token")
    return data


def load_tokenizer(tokenizer, vocab_dir=None):
    """tokenizer.json (bytes) of "gpt2", "bytes" or a path; raises LookupError or InputError if it cannot be had."""
    if tokenizer == "bytes":
        return bytes_tokenizer_json()
    return gpt2_tokenizer_json(vocab_dir) if tokenizer == "gpt2" else tokenizer_file_json(tokenizer)


class Encoder:
    """Text to ids by a tokenizer.json; `width` is the smallest numpy type for ids without the begin-of-document id."""

    def __init__(self, tokenizer_json):
        spec = json.loads(tokenizer_json)
        tokens = [base64.b64decode(rank) for rank in spec["ranks"]]
        self.token_bytes = np.array([len(token) for token in tokens])
        self.width = text_id_type(len(tokens) + len(spec["special_tokens"]))
        self.bpe = None
        if spec["pattern"]:
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


def text_id_type(vocab_size):
    """The smallest type for the ids of text; the vocabulary has at least one special id, which text never has."""
    return np.uint8 if vocab_size <= 257 else np.uint16 if vocab_size <= 65_536 else np.uint32


# -----------------------------------------------------------------------------
# Finding the input


class Finder:
    """Walks the input and puts each file into exactly one of `found` and `left_out`.

    found: real path -> Source; left_out, folders: reason -> (count, example) of files and of folders not entered.
    """

    def __init__(self, exclude="", own_folder=None):
        self.exclude = re.compile(exclude) if exclude else None
        self.own_folder = own_folder and os.path.realpath(own_folder)
        self.found, self.left_out, self.folders = {}, {}, {}
        self.entered, self.taken = set(), set()

    def add(self, given):
        """Adds a file or folder that the user named; InputError if it does not exist."""
        if not str(given):
            raise InputError("an input path is empty; name a file or a folder")
        path = Path.cwd() / given
        try:
            is_folder = stat.S_ISDIR(os.stat(path).st_mode)
        except (OSError, ValueError) as e:
            why = "no such file or folder" if isinstance(e, FileNotFoundError) else getattr(e, "strerror", None) or e
            raise InputError(f"{given}: {why}; check the path") from None
        if is_folder:
            self.walk(path, label(given))
        else:
            self.add_file(path, label(given))

    def walk(self, root, root_name):
        """Adds all files below `root`. Links to folders come last, so that files are named after their real place."""
        folders, links = [(root, root_name, "")], []
        while folders or links:
            path, name, reason = folders.pop() if folders else links.pop(0)
            for entry in self.entries(path, name, reason):
                inner = f"{name}/{entry.name}"
                skipped = entry.name in SKIPPED_FOLDERS or entry.name.startswith(".")
                if not _is_folder(entry):
                    if reason or entry.name.startswith("."):
                        note(self.left_out, reason or "hidden file", inner)
                    else:
                        self.add_file(Path(entry.path), inner)
                elif not entry.is_symlink():
                    why = reason or (f"file in a folder named {entry.name}" if skipped else "")
                    folders.append((entry.path, inner, why))
                elif reason or skipped:
                    note(self.folders, "link to a folder, hidden or in a folder that is left out", inner)
                else:
                    links.append((entry.path, inner, ""))

    def entries(self, path, name, reason):
        """What is in a folder, sorted by name; nothing, with a note, if it was read already or cannot be read.

        reason: why its files are left out, or ""; such a folder may still be read through a link that is not hidden.
        """
        real = os.path.realpath(path)
        if not reason and real in self.entered:
            note(self.folders, "folder that is read elsewhere, as a link or as --val", name)
            return []
        if not reason:
            self.entered.add(real)
        try:
            with os.scandir(path) as listing:
                return sorted(listing, key=lambda entry: entry.name)
        except OSError as e:
            note(self.folders, "folder that cannot be read", f"{name}: {e.strerror}")
            return []

    def add_file(self, path, name):
        """Adds one file that is not hidden."""
        try:
            status, real = os.stat(path), os.path.realpath(path)
        except OSError as e:
            reason = "link that leads nowhere" if os.path.islink(path) else "file that cannot be read"
            return note(self.left_out, reason, f"{name}: {e.strerror}")
        if not stat.S_ISREG(status.st_mode):
            return note(self.left_out, "pipe, socket or device", name)
        folder, real_name = os.path.split(real)
        if folder == self.own_folder and (OUR_NAMES.fullmatch(real_name) or real_name in OUR_OTHER_NAMES):
            return note(self.left_out, "file that an earlier run wrote", name)
        if self.exclude and self.exclude.search(name):
            return note(self.left_out, "file that --exclude leaves out", name)
        kind = kind_of(path.name) or kind_of(real_name)  # the real file of a link may be named after a hash
        if kind is None:
            return note(self.left_out, f"{ANOTHER_KIND} {_ending(path.name)}", name)
        if real in self.found:
            if self.found[real].path not in self.taken:  # else it is validation text inside the input folder
                note(self.left_out, "file that is there twice, as a link or named again", name)
            return None
        if kind == "json":
            if not _is_json_lines(path):
                return note(self.left_out, "JSON file that is not one object a line; convert it to .jsonl", name)
            kind = "jsonl"
        self.found[real] = Source(path, name, status.st_size, status.st_mtime_ns, kind)

    def take(self, inputs):
        """The files found since the last call, sorted by name; InputError if there are none."""
        sources = sorted((source for source in self.found.values() if source.path not in self.taken),
                         key=lambda source: source[1:])
        if not sources:
            reasons = "; ".join(tell(self.left_out) + tell(self.folders)) or "empty"
            raise InputError(f"{', '.join(map(str, inputs))}: no file to read ({reasons}); known kinds are "
                             f"{' '.join(TEXT_ENDINGS)} {' '.join(LINE_ENDINGS)} (also as {' '.join(PACKED_ENDINGS)}), "
                             ".parquet")
        self.taken |= {source.path for source in sources}
        return sources


def find_files(inputs, exclude=""):
    """The Sources under `inputs` (files and folders), sorted by name, each file once.

    exclude: regular expression; files whose name, from the input folder's name on, contains it are left out.
    Raises InputError for a missing path or when nothing is left.
    """
    finder = Finder(exclude)
    for given in inputs:
        finder.add(given)
    return finder.take(inputs)


def label(given):
    """The name of an input as its user sees it: that of a link, not of what it leads to."""
    name = Path(given).name
    return Path(given).resolve().name if name in ("", "..") else name


def kind_of(name):
    """"text", "jsonl", "json", "packed text", "packed lines", "parquet", or None for a name of another kind."""
    stem, ending = os.path.splitext(name.lower())
    packed = ending in PACKED_ENDINGS
    if packed:
        ending = os.path.splitext(stem)[1]
    if ending in TEXT_ENDINGS:
        return "packed text" if packed else "text"
    if ending in LINE_ENDINGS:
        return "packed lines" if packed else ending[1:]
    return "parquet" if ending == ".parquet" and not packed else None


def _ending(name):
    """The ending to name in the summary; odd ones share a name, so that it stays short."""
    ending = os.path.splitext(name)[1].lower()
    return ending if re.fullmatch(r"\.[a-z][a-z0-9]{0,9}", ending) else "(no usual ending)"


def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _is_json_lines(path):
    """Whether the first line is an object; a file that cannot be read counts as such, and is named when it is read."""
    try:
        with open(path, "rb") as file:
            return isinstance(json.loads(file.readline(LINE_BYTES)), dict)
    except OSError:
        return True
    except (ValueError, RecursionError):
        return False


# -----------------------------------------------------------------------------
# Planning the work


def plan_tasks(files, text_column, encoding="", split="", join="", needles=0):
    """Yields (size, units): what one worker reads at a time; `size` counts bytes on disk, for the progress bar.

    join, needles: the options of these names. InputError if there are no joined documents to hide needles in.
    Units: ("joined", files (path, size), numbers of the needle documents made of it), ("text" | "jsonl", path, nominal
    start, nominal end), ("block", path, bytes of text), ("lines", path, bytes),
    ("parquet", path, row group), ("damage", path, reason, detail, count = 1). Packed files, and those in UTF-16 or
    UTF-32, are unpacked here, one after the other.
    """
    units, gathered = [], 0
    groups = join_files(files, encoding) if join else []
    if needles and not groups:
        raise InputError(f"--needles={needles}: no text files to hide needles in (.txt .md .rst .py .html, of at most "
                         f"{JOIN_BYTES} bytes); add some")
    for number, group in enumerate(groups):
        yield sum(f.size for f in group), [("joined", tuple((f.path, f.size) for f in group),
                                            tuple(range(number, needles, len(groups))))]
    joined = {f.path for group in groups for f in group}
    for f in files:
        if f.path in joined:
            continue
        if f.kind in ("text", "jsonl") and not _wide_encoding_of(f.path, encoding):
            size = DOC_BYTES if f.kind == "text" else TASK_BYTES
            for start in range(0, max(f.size, 1), size):
                end = min(start + size, f.size)
                units.append((f.kind, f.path, start, end))
                gathered += end - start
                if gathered >= TASK_BYTES:
                    yield gathered, units
                    units, gathered = [], 0
        else:
            plan = _plan_parquet(f, text_column) if f.kind == "parquet" else _plan_unpacking(f, encoding, split)
            yield from ((read, [unit]) for read, unit in plan)
    if units:
        yield gathered, units


def join_files(files, encoding=""):
    """Lists of text files that become one document each: of one folder of the input, with all that is below it.

    A list has at most JOIN_BYTES, so a large folder gives several. Larger files and those in UTF-16 or UTF-32 are in
    no list.
    """
    folders = defaultdict(list)
    for f in files:
        if f.kind == "text" and f.size <= JOIN_BYTES and not _wide_encoding_of(f.path, encoding):
            folders["/".join(f.name.split("/")[:-1][:2])].append(f)
    groups = []
    for found in folders.values():
        size = JOIN_BYTES + 1
        for f in found:
            if (size := size + f.size) > JOIN_BYTES:
                groups.append([])
                size = f.size
            groups[-1].append(f)
    return groups


def _wide_encoding_of(path, encoding):
    """UTF-16 or UTF-32 if the file looks like that and `encoding` (--encoding) allows it, else ""."""
    if not _is_wide(encoding):
        return ""
    try:
        with open(path, "rb") as file:
            return guess_wide_encoding(file.read(WINDOW))
    except OSError:
        return ""


def _is_wide(encoding):
    return bool(re.match(r"utf_?(16|32)", encoding.lower().replace("-", "_")))


def _plan_parquet(source, column):
    """Yields (bytes, unit) for each row group; a file that cannot be used is one unit of damage."""
    path = source.path
    pa, pq = _optional("pyarrow", path), _optional("pyarrow.parquet", path)
    try:
        with pq.ParquetFile(path) as file:
            schema, groups = file.schema_arrow, file.num_row_groups
    except (pa.ArrowException, OSError, ValueError) as e:
        yield 0, ("damage", path, "file of damaged parquet", str(e).splitlines()[0])
        return
    if column not in schema.names:
        has = ", ".join(schema.names[:20])
        yield 0, ("damage", path, f"file without the column {column!r}; choose with --text_column", f"it has {has}")
    elif not _holds_text(pa.types, schema.field(column).type):
        kind = schema.field(column).type
        yield 0, ("damage", path, f"file whose column {column!r} is not text; choose with --text_column", str(kind))
    else:
        for group in range(groups):
            yield source.size // groups, ("parquet", path, group)


def _holds_text(types, kind):
    if types.is_dictionary(kind):
        kind = kind.value_type
    names = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
    return any(getattr(types, f"is_{name}", lambda kind: False)(kind) for name in names)


def _plan_unpacking(source, encoding, split):
    """Yields (packed bytes read, unit) for the blocks of a file that is packed, or in UTF-16 or UTF-32."""
    path, at, too_long = source.path, 0, {}
    kind = "lines" if source.kind in ("packed lines", "jsonl") else "block"
    try:
        with open(path, "rb") as file:
            unpacked = Unpacked(file, path, _is_wide(encoding))
            stream = io.BufferedReader(unpacked, WINDOW)
            if kind == "lines":
                blocks = _line_blocks(stream, path, too_long)
            else:
                blocks = _text_blocks(stream, split)
            for block in blocks:
                yield file.tell() - at, (kind, path, block)
                at = file.tell()
    except OSError as e:
        yield 0, ("damage", path, "file that cannot be read", e.strerror or str(e))
        return
    if unpacked.damage:
        yield 0, ("damage", path, "file with compression damage, its rest lost", unpacked.damage)
    for reason, (count, _) in too_long.items():
        yield 0, ("damage", path, reason, "", count)


def _line_blocks(stream, path, too_long):
    """Yields blocks of whole lines; a line over LINE_BYTES is left out and noted in `too_long`."""
    while block := stream.read(TASK_BYTES):
        yield _whole_lines(block, stream, path, too_long)


def _text_blocks(stream, split):
    """Yields blocks of a text, each of DOC_BYTES and up to the separator or paragraph end that follows."""
    block = b""
    while piece := stream.read(DOC_BYTES):
        block += piece
        while len(block) >= DOC_BYTES + WINDOW:
            cut = DOC_BYTES + _first_cut(block[DOC_BYTES:DOC_BYTES + WINDOW], split)
            yield block[:cut]
            block = block[cut:]
    if block:
        yield block


def _whole_lines(block, file, path, skipped):
    """The block with the rest of its last line, after which the file then stands; without a line over LINE_BYTES."""
    rest = b"" if block.endswith(b"\n") else file.readline(LINE_BYTES)
    if len(rest) < LINE_BYTES or rest.endswith(b"\n"):
        return block + rest
    while (more := file.readline(LINE_BYTES)) and not more.endswith(b"\n"):
        pass
    note(skipped, f"line of more than {LINE_BYTES >> 20} MiB", path.name)
    return block[:block.rfind(b"\n") + 1]


class Unpacked(io.RawIOBase):
    """The content of a packed file as a stream that ends where damage begins; `damage` then says what it is.

    The first bytes tell the format, since a link may have any name; a file that is not packed comes as it is.
    wide: content that looks like UTF-16 or UTF-32 comes as UTF-8.
    """

    def __init__(self, file, path, wide=False):
        self.file, self.wide, self.decoder = file, wide, None
        self.packed, self.ready, self.damage = file.read(WINDOW // 4), b"", ""
        self.errors = [zlib.error, lzma.LZMAError]
        self.start = self.decompressor = None  # `start` makes a decompressor; those of the formats have equal methods
        if self.packed.startswith(b"\x1f\x8b"):
            self.start = functools.partial(zlib.decompressobj, 31)
        elif self.packed.startswith(b"\xfd7zXZ\0"):
            self.start = lzma.LZMADecompressor
        elif self.packed.startswith(b"\x28\xb5\x2f\xfd"):
            zstandard = _optional("zstandard", path)
            self.start = zstandard.ZstdDecompressor().decompressobj
            self.errors.append(zstandard.ZstdError)

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.ready and not self.damage:
            packed = self.packed or self.file.read(WINDOW // 4)
            self.packed = b""
            if not packed:
                self.damage = "it ends too early" if self.decompressor else ""
                break
            self.ready = self.recode(self.unpack(packed) if self.start else packed)
        size = min(len(buffer), len(self.ready))
        buffer[:size], self.ready = self.ready[:size], self.ready[size:]
        return size

    def unpack(self, packed):
        """What these bytes hold; several packed files may follow on each other."""
        try:
            self.decompressor = self.decompressor or self.start()
            content = self.decompressor.decompress(packed)
        except tuple(self.errors) as e:
            self.damage = str(e)
            return b""
        if self.decompressor.eof:
            self.packed, self.decompressor = self.decompressor.unused_data.lstrip(b"\0"), None
        return content

    def recode(self, content):
        if self.wide and content and not self.decoder:
            encoding = guess_wide_encoding(content)
            self.wide, self.decoder = bool(encoding), encoding and codecs.getincrementaldecoder(encoding)("replace")
        return self.decoder.decode(content).encode() if self.decoder else content


def _optional(package, path):
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.split(".")[0]
        raise InputError(f"{path.name}: reading it needs {name}; pip install {name}") from None


# -----------------------------------------------------------------------------
# Reading documents (in the workers)

CUTS = [re.compile(p) for p in (rb"\n(?:[ \t\r]*\n)+", rb"\n", rb"[.!?](?=\s)", rb"\S(?=\s)")]  # paragraph, line, ...
STRANGE = re.compile("[\0-\x08\x0e-\x1a\x1c-\x1f\x7f-\x9f\ufffd]")  # control and replacement characters
BETWEEN_TEXTS = re.compile(r"^<\|endoftext\|>[ \t\r]*$", re.M)
LETTERS = {  # frequent letters that tell what an old encoding is; each encoding reads the others' as rare ones
    "gb18030": "的一是了不在人有我他这", "big5": "的一是了不在人有我他這", "shift_jis": "のにはをたがでてとしいる",
    "euc_jp": "のにはをたがでてとしいる", "euc_kr": "이다는의에을가고하지", "cp1251": "оеаинтсрвл", "koi8_r": "оеаинтсрвл",
    "cp1253": "αοιεντσρκπ", "cp1250": "ąęłśżźćčěřšžůőű", "cp1252": "éèàçäöüßñáíóúêâôåøæ’“”"}


def read_documents(unit, column, skipped, encoding="", split=""):
    """Yields (UTF-8 bytes, str) of the documents of one unit; what cannot be used is noted in `skipped`.

    Reasons that begin with "file" are about the file, all others about one of its lines, rows or documents.
    encoding: how text that is not UTF-8 is read; split: what separates the documents of a text file.
    """
    kind, path, *place = unit
    try:
        if kind == "damage":
            note(skipped, place[0], f"{path.name}: {place[1]}".removesuffix(": "), *place[2:])
            return
        if kind == "parquet":
            texts = _read_row_group(path, *place, column, skipped)
        elif kind in ("jsonl", "lines"):
            block = place[0] if kind == "lines" else _read_lines(path, *place, skipped)
            texts = _parse_lines(path, block, column, skipped, encoding)
        else:
            raw = place[0] if kind == "block" else _read_text(path, *place, split)
            texts = _split_text(raw, path, skipped, encoding, split)
        for raw, text in texts:
            if raw.isspace() or not raw:
                note(skipped, "empty document", path.name)
            else:
                yield raw, text
    except OSError as e:
        note(skipped, "file that cannot be read", f"{path.name}: {e.strerror or e}")


def _read_text(path, start, end, split):
    """The bytes of a text file from the first cut after `start` to the first one after `end`; None if that is empty."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start, end = (_cut_near(file, at, size, split) for at in (start, end))
        file.seek(start)
        raw = file.read(end - start)
    return None if start == end and size else raw  # a paragraph longer than the range went to the unit before


def _cut_near(file, at, size, split):
    """The first place at or after byte `at` where a text file may be cut.

    It depends on file and position only, so the two workers that share a border agree on it.
    """
    if at <= 0 or at >= size:
        return min(max(at, 0), size)
    file.seek(at)
    return at + _first_cut(file.read(WINDOW), split)


def _first_cut(window, split=""):
    """Where the first separator or paragraph in `window` ends, else the first line, else where a character begins."""
    separator = [re.compile(re.escape(split.encode()))] if split else []
    for pattern in (*separator, *CUTS[:2]):
        if match := pattern.search(window):
            return match.end()
    return next((i for i, byte in enumerate(window) if byte & 0xC0 != 0x80), 0)


def _split_text(raw, path, skipped, encoding, split):
    """Yields the documents of a text file or of a part of it."""
    if raw is None:
        return
    raw = raw.removeprefix(codecs.BOM_UTF8)
    text = decode(raw, path.name, skipped, encoding)
    if text is None:
        return
    if split:
        yield from (_utf8(part.strip("\r\n")) for part in text.split(split) if part.strip())
        return
    if "<|endoftext|>" in text and BETWEEN_TEXTS.search(text):
        note(skipped, "file with <|endoftext|> lines, kept as text; --split='<|endoftext|>' makes each part a document",
             path.name)
    yield _utf8(text)


def decode(raw, name, skipped, encoding=""):
    """The text (str) of a file or of a part of it; None, with a note, if too much of it is not text."""
    try:
        text, repair = raw.decode(), "file with NUL bytes, which were kept"
        if "\0" not in text:
            return text
    except UnicodeDecodeError:
        text, repair = _decode_otherwise(raw, encoding)
    if 10 * len(STRANGE.findall(text)) > len(raw):
        advice = _advice(raw)
        note(skipped, f"file in another encoding{advice}" if advice else "file that is not text", name)
        return None
    note(skipped, repair, name)
    return text


def _decode_otherwise(raw, encoding):
    """(text, what to tell about it) of bytes that are not UTF-8."""
    if encoding and not _is_wide(encoding):  # UTF-16 and UTF-32 were decoded before the file was cut
        with contextlib.suppress(UnicodeError):
            return raw.decode(encoding), f"file not in UTF-8, read as {encoding}"
    return raw.decode(errors="replace"), f"file not in UTF-8{_advice(raw)}, read with replacement characters"


def _advice(raw):
    guess = guess_wide_encoding(raw[:WINDOW]) or guess_encoding(raw[:WINDOW])
    return f" (it looks like {guess}; --encoding={guess} reads it)" if guess else ""


def guess_wide_encoding(head):
    """UTF-16 or UTF-32 by a mark at the beginning or by the places of zero bytes; "" for everything else."""
    marks = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
             codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
    guess = next((name for mark, name in marks.items() if head.startswith(mark)), "")
    if not guess:
        even, odd = head[::2].count(0), head[1::2].count(0)
        if 4 * max(even, odd) < len(head) or 8 * min(even, odd) > max(even, odd):
            return ""
        guess = "utf-16-le" if odd > even else "utf-16-be"
    text = head[:len(head) // 4 * 4].decode(guess, "replace")
    strange = sum(not letter.isprintable() and not letter.isspace() or letter == "\ufffd" for letter in text[1:])
    return guess if 20 * strange <= len(text) else ""


def guess_encoding(raw):
    """The likely encoding of a text that is not UTF-8, one of LETTERS; "" if none fits."""
    best, guess = 0.2, ""
    for name, letters in LETTERS.items():
        try:
            text = raw.decode(name)
        except UnicodeDecodeError as e:
            if e.start < len(raw) - 4:  # else only a character at the end of the sample was cut
                continue
            text = raw[:e.start].decode(name)
        if any(letter < " " and not letter.isspace() and letter != "\x1b" for letter in text):
            continue
        foreign = [letter for letter in text if not letter.isascii()]
        frequent = sum(letter in letters for letter in foreign)
        if frequent >= 3 and frequent / len(foreign) > best:
            best, guess = frequent / len(foreign), name
    return guess


def _read_lines(path, start, end, skipped):
    """The whole lines that begin in [start, end)."""
    with open(path, "rb") as file:
        if start:
            file.seek(start - 1)
            while (before := file.readline(TASK_BYTES)) and not before.endswith(b"\n"):
                pass
        block = file.read(max(end - file.tell(), 0))
        return _whole_lines(block, file, path, skipped) if block else block


def _parse_lines(path, block, column, skipped, encoding):
    if b"\0" in block[:WINDOW] and guess_wide_encoding(block[:WINDOW]):  # its lines cannot be told apart
        note(skipped, f"file in another encoding{_advice(block)}", path.name)
        return
    for line in block.split(b"\n"):
        if not line or line.isspace():
            continue
        try:
            row = _parse_line(line, path.name, skipped, encoding)
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


def _parse_line(line, name, skipped, encoding):
    try:
        return json.loads(line)
    except UnicodeDecodeError:
        return json.loads(decode(line, name, skipped, encoding) or "")


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
                for text in _column_texts(pa, batch.column(0)):
                    if text is None:
                        note(skipped, f"row whose column {column!r} is null", path.name)
                    else:
                        yield _utf8(text)
    except (pa.ArrowException, ValueError) as e:
        note(skipped, "damaged row group, its rest lost", f"{path.name}: {str(e).splitlines()[0]}")


def _column_texts(pa, column):
    """The column as a list of str and None; bytes that are not UTF-8 become replacement characters."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        values = column.cast(pa.large_binary()).to_pylist()
    return [value.decode(errors="replace") if isinstance(value, bytes) else value for value in values]


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
        """(size, records, reports) of a task (size, units, whether it is validation text).

        A report, one a file or part of one: (path, texts, documents made of them, bytes of text, skipped).
        """
        size, units, val = task
        column, encoding, split = (self.options[name] for name in ("text_column", "encoding", "split"))
        parts, rows, reports = [], [], []
        for unit in units:
            if unit[0] == "joined":
                reports += self.add_joined(*unit[1:], parts, rows)
                continue
            documents, text_bytes, skipped = 0, 0, {}
            for raw, text in read_documents(unit, column, skipped, encoding, split):
                if self.stopped:
                    raise InterruptedError("the caller was interrupted")
                self.add(raw, text, parts, rows)
                documents += 1
                text_bytes += len(raw)
            reports.append((unit[1], documents, documents, text_bytes, skipped))
        return size, self.save(parts, rows, val), reports

    def add_joined(self, files, needles, parts, rows):
        """Appends the document that these files make and the needle documents made of it; returns reports."""
        texts, reports = [], []
        for path, size in files:
            skipped = {}
            found = list(read_documents(("text", path, 0, size), self.options["text_column"], skipped,
                                        self.options["encoding"]))
            made = (1 + len(needles)) * bool(found and not texts)
            reports.append((path, len(found), made, sum(len(raw) for raw, _ in found), skipped))
            texts += [text.strip("\n") for _, text in found]
        if not texts:
            return reports
        text = "\n\n\n".join(texts) + "\n"
        raw = text.encode()
        self.add(raw, text, parts, rows)
        doc, ids = rows[-1][0], self.encoder.encode(raw, text)
        limit = (self.limit or NEEDLE_TOKENS) - 1
        for number in needles:
            import needles as module

            rng = np.random.default_rng((self.options["seed"], number))
            hidden = module.training_document(ids, lambda text: self.encoder.encode(text.encode(), text), limit, rng)
            parts.append(hidden)
            # it is on the same side of the split as its document, and has a place of its own in the shuffle
            rows.append((doc, FIRST_NEEDLE + number, 1, int(self.encoder.token_bytes[hidden].sum())))
        return reports

    def add(self, raw, text, parts, rows):
        """Appends a document, or the pieces of a long one, to `parts` and `rows`."""
        doc = int.from_bytes(hashlib.sha256(raw).digest()[:8], "little")
        ids = self.encoder.encode(raw, text)
        if not self.limit or len(ids) < self.limit:  # the begin-of-document id counts
            parts.append(ids)
            rows.append((doc, 0, 1, len(raw)))
            return
        ends = self.encoder.ends(ids)
        cuts = cut_tokens(raw, ends, self.limit - 1)
        byte_ends = [0, *ends[np.array(cuts) - 1].tolist()]
        for piece, (a, b) in enumerate(pairwise([0, *cuts])):
            parts.append(ids[a:b])
            rows.append((doc, piece, len(cuts), byte_ends[piece + 1] - byte_ends[piece]))

    def save(self, parts, rows, val):
        """Writes the ids in shuffled order, so that a shard finds its part of them in one place; returns records."""
        records = np.zeros(len(parts), RECORD)
        if not parts:
            return records
        doc, piece, pieces, records["bytes"] = np.array(rows, np.uint64).T
        records["doc"], records["piece"], records["worker"], records["val"] = doc, piece, os.getpid(), val
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


class Tally:
    """Adds up the reports of the workers, so that each file ends in exactly one count."""

    def __init__(self):
        self.documents, self.made, self.text_bytes = Counter(), 0, 0
        self.reasons = defaultdict(dict)  # reason -> path -> (count, example)

    def add(self, path, documents, made, text_bytes, skipped):
        self.documents[path] += documents
        self.made += made
        self.text_bytes += text_bytes
        for reason, (count, example) in skipped.items():
            note(self.reasons[reason], path, example, count)

    def counts(self, sources, left_out):
        """(files left out, what was skipped or repaired within the files read), both reason -> (count, example).

        sources: the files that were to be read; left_out: those that were not, with the same meaning.
        """
        left_out, inside = dict(left_out), {}
        for source in sources:
            if not self.documents[source.path]:
                found = {reason: files[source.path] for reason, files in self.reasons.items() if source.path in files}
                whole = [reason for reason in sorted(found) if reason.startswith("file")]
                if whole:
                    note(left_out, whole[0], found[whole[0]][1])
                else:
                    why = ", ".join(sorted(found)) or "empty"
                    note(left_out, "file that holds no document", f"{source.name}: {why}")
        for reason, files in self.reasons.items():
            for path, (count, example) in files.items():
                of_the_file = reason.startswith("file")
                if self.documents[path] or not of_the_file:
                    note(inside, reason, example, 1 if of_the_file else count)
        return left_out, inside


# -----------------------------------------------------------------------------
# Shuffling and gathering


def choose_validation(index, val_fraction):
    """(whether pieces count as documents, threshold): what has its `side` below the threshold is held out.

    val_fraction: share of the documents; None: as much as the tiny preset needs, within MIN_VAL_SHARE and
    MAX_VAL_SHARE of the text. If whole documents cannot give about that much, pieces of them are held out. Two
    documents (or pieces) or more give both sides some; a single one gives (False, 0).
    """
    for by_piece in (False, True):
        low, high = _side_range(index, by_piece)
        if low == high or val_fraction == 0:
            continue
        threshold = int((MIN_VAL_SHARE if val_fraction is None else val_fraction) * 2.0**64)
        if val_fraction is None:
            wanted, held_out = _val_tokens_wanted(index, by_piece)
            threshold = max(threshold, (1 + int(np.searchsorted(held_out, wanted))) << 48)
        threshold = min(max(threshold, low + 1), high)
        if val_fraction is not None or by_piece:
            return by_piece, threshold
        if wanted / 2 <= held_out[(threshold - 1) >> 48] <= 2 * MAX_VAL_SHARE * held_out[-1]:
            return by_piece, threshold
    return False, 0


def side(rows, by_piece):
    """(N,) uint64: decides by content alone on which side of the split a document (or each piece of it) belongs."""
    return _mix(rows["doc"] ^ _mix(rows["piece"].astype(np.uint64) + np.uint64(1))) if by_piece else rows["doc"]


def _side_range(index, by_piece):
    ends = [(int(found.min()), int(found.max())) for found in (side(rows, by_piece) for rows in _in_blocks(index))]
    return min(low for low, _ in ends), max(high for _, high in ends)


def _val_tokens_wanted(index, by_piece):
    """(tokens to hold out, (65536,) the tokens that each threshold i + 1 << 48 would hold out)."""
    bins = np.zeros(1 << 16)
    for rows in _in_blocks(index):
        upper = (side(rows, by_piece) >> np.uint64(48)).astype(np.int64)
        bins += np.bincount(upper, rows["tokens"] + 1.0, len(bins))
    held_out = np.cumsum(bins)
    return min(TINY_VAL_TOKENS + 1, MAX_VAL_SHARE * held_out[-1]), held_out


def _in_blocks(index):
    return (index[first:first + SORT_ROWS] for first in range(0, len(index), SORT_ROWS))


def shuffle(index, val_fraction, drop_duplicates, building, has_val_files=False):
    """Writes the records in sorted order to `order-train` and `order-val`; returns what was dropped, as counts.

    Sorts one range of keys after the other, so memory stays bounded.
    """
    dropped = {"duplicates_dropped": 0, "copies_of_validation_dropped": 0}
    val_docs = np.unique(index["doc"][index["val"] == 1])
    by_piece, threshold = (False, 0) if has_val_files else choose_validation(index, val_fraction)
    borders = np.linspace(0, 2.0**64, 1 + -(-len(index) // SORT_ROWS)).tolist()
    with open(building / "order-train", "wb") as train, open(building / "order-val", "wb") as val:
        for low, high in pairwise(map(int, borders)):
            rows = index[(index["key"] >= np.uint64(low)) & (index["key"] <= np.uint64(high - 1))]
            rows = rows[np.lexsort((rows["piece"], 1 - rows["val"], rows["doc"], rows["key"]))]
            copies = (rows["val"] == 0) & np.isin(rows["doc"], val_docs)
            dropped["copies_of_validation_dropped"] += int(np.sum(copies & (rows["piece"] == 0)))
            rows = rows[~copies]
            if drop_duplicates and len(rows):
                again = np.append(False, (rows["key"][1:] == rows["key"][:-1]) & (rows["doc"][1:] == rows["doc"][:-1]))
                dropped["duplicates_dropped"] += int(np.sum(again & (rows["piece"] == 0)))
                rows = rows[~again]
            held_out = rows["val"] == 1 if has_val_files else side(rows, by_piece) < np.uint64(threshold)
            train.write(rows[~held_out])
            val.write(rows[held_out])
    return dropped


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
    shard_type = np.uint16 if tokenizer["vocab_size"] <= 65_536 else np.uint32
    ids = np.full(int(sizes.sum()), tokenizer["bos_id"], shard_type)
    reading = np.lexsort((order["start"], order["worker"]))  # ascending through the files, for the disk's sake
    for worker in np.unique(order["worker"]).tolist():
        found = np.memmap(building / f"ids-{worker}", text_id_type(tokenizer["vocab_size"]), "r")
        mine = reading[order["worker"][reading] == worker]
        for place, start, size in zip(places[mine].tolist(), order["start"][mine].tolist(), sizes[mine].tolist()):
            ids[place + 1:place + size] = found[start:start + size - 1]
    header = np.zeros(256, "<i4")
    header[:6] = MAGIC, VERSION, len(ids), tokenizer["vocab_size"], tokenizer["bos_id"], ids.itemsize
    header[8:16] = np.frombuffer(bytes.fromhex(tokenizer["sha256"]), "<i4")
    ids = ids.astype(f"<u{ids.itemsize}", copy=False)
    digest = hashlib.sha256(header)
    digest.update(ids)
    _write_synced(building / name, header, ids)
    return name, {"sha256": digest.hexdigest(), "size": header.nbytes + ids.nbytes, "tokens": len(ids),
                  "documents": rows, "text_bytes": int(order["bytes"].sum(dtype=np.int64))}


# -----------------------------------------------------------------------------
# The whole job

Job = namedtuple("Job", "files val_files left_out folders tokenizer_json options description")


def prepare(inputs, *, out_dir=None, val=None, tokenizer="gpt2", vocab_dir=None, **options):
    """The Job to make shards of `inputs`; see build_shards for the options. Reads names and sizes, writes nothing.

    Raises InputError (one line that says what to do) and LookupError when GPT-2's vocabulary is not at hand.
    """
    check_options(options)
    finder = Finder(options["exclude"], out_dir)
    if val:
        finder.add(val)
    val_files = finder.take([val]) if val else []
    for given in inputs:
        finder.add(given)
    files = finder.take(inputs)
    tokenizer_json = load_tokenizer(tokenizer, vocab_dir)
    options["tokenizer"] = json.loads(tokenizer_json)["name"]
    description = {"script": "text.py", "layout": LAYOUT, "options": options,
                   "tokenizer_sha256": hashlib.sha256(tokenizer_json).hexdigest(),
                   "sources": _describe(files, inputs),
                   "validation_sources": _describe(val_files, [val] if val else [])}
    return Job(files, val_files, finder.left_out, finder.folders, tokenizer_json, options, description)


def _describe(files, inputs):
    """What the manifest tells of the input; it changes when a file does."""
    listing = hashlib.sha256()
    for f in files:
        listing.update(f"{f.name}\0{f.size}\0{f.mtime_ns}\n".encode(errors="surrogateescape"))
    return {"inputs": sorted({one_line(label(given)) for given in inputs})[:20], "files": len(files),
            "bytes": sum(f.size for f in files), "names_sizes_mtimes_sha256": listing.hexdigest()}


def check_options(options):
    """Raises InputError for a value out of range."""
    val_fraction = options["val_fraction"]
    for name, fine, rule in (
            ("val_fraction", val_fraction is None or 0 <= val_fraction < 1, "at least 0 and below 1"),
            ("max_doc_tokens", options["max_doc_tokens"] == 0 or options["max_doc_tokens"] >= 16, "0 (off) or 16 up"),
            ("needles", 0 <= options.get("needles", 0) <= 10**6, "0 up to 1000000"),
            ("shard_tokens", 1 <= options["shard_tokens"] < 2**31, "1 up to 2147483647")):
        if not fine:
            raise InputError(f"--{name}={options[name]}: must be {rule}")
    if options.get("join", "") not in ("", "folder"):
        raise InputError(f"--join={options['join']}: must be folder")
    if options.get("needles") and not options.get("join"):
        raise InputError(f"--needles={options['needles']} hides needles in joined documents; add --join=folder")
    if options.get("join") and options.get("split"):
        raise InputError("--join and --split contradict each other; use one of them")
    try:
        with warnings.catch_warnings(action="ignore"):  # of sets that may mean something else some day
            re.compile(options["exclude"])
    except (re.error, RecursionError, OverflowError) as e:
        raise InputError(f"--exclude={options['exclude']}: not a regular expression ({e})") from None
    encoding = options.get("encoding", "")
    try:
        with contextlib.suppress(UnicodeError):  # a single byte is not valid in all encodings
            b"a".decode(encoding or "utf-8")
    except (LookupError, ValueError):
        raise InputError(f"--encoding={encoding}: unknown; the usual ones are utf-16, gb18030, big5, shift_jis, "
                         "euc_kr, cp1251, cp1252") from None


def build_shards(inputs, out_dir, *, processes=None, val_fraction=0.005, max_doc_tokens=0, seed=0, stream=False,
                 shard_tokens=100_000_000, text_column="text", encoding="", split="", exclude="",
                 drop_duplicates=False, **more):
    """Tokenises `inputs` (files and folders) into shards in `out_dir`; returns the manifest it wrote there.

    more: tokenizer ("gpt2", "bytes" or the path of a tokenizer.json), vocab_dir (GPT-2's vocab.bpe and encoder.json),
    val (a file or folder of validation text). The other options are those of the command line. Raises InputError,
    LookupError when GPT-2's vocabulary is not at hand, OSError when `out_dir` cannot be written.
    """
    return build(prepare(inputs, out_dir=out_dir, val_fraction=val_fraction, max_doc_tokens=max_doc_tokens, seed=seed,
                         stream=stream, shard_tokens=shard_tokens, text_column=text_column, encoding=encoding,
                         split=split, exclude=exclude, drop_duplicates=drop_duplicates, **more), out_dir, processes)


def build(job, out_dir, processes=None, min_tokens=0):
    """Writes the shards of a Job; returns the manifest. InputError if the text has fewer than `min_tokens` tokens.

    Replaces the shards of an earlier run. Until all is done nothing but a temporary folder is written, and no run
    leaves that behind. The result does not depend on `processes` (default: all cores).
    """
    spec, options = json.loads(job.tokenizer_json), job.options
    about = {"name": spec["name"], "sha256": hashlib.sha256(job.tokenizer_json).hexdigest(),
             "vocab_size": len(spec["ranks"]) + len(spec["special_tokens"]), "bos_id": spec["bos_id"]}
    processes = processes or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    with _temporary_folder(Path(out_dir)) as building:
        _write_synced(building / "tokenizer.json", job.tokenizer_json)
        with _workers(processes, [*job.files, *job.val_files], building, options) as pool:
            counts = _tokenise(pool, 2 * processes + 2, job, building)
            index = np.memmap(building / "index", RECORD, "r")
            counts |= shuffle(index, options["val_fraction"], options["drop_duplicates"], building, bool(job.val_files))
            _need_tokens(building, min_tokens)
            tasks = [(building, about, split, number, *span) for split in ("train", "val") for number, span in
                     enumerate(cut_into_shards(building / f"order-{split}", options["shard_tokens"]))]
            written = _in_parallel(pool, write_shard, tasks, MAX_GATHERERS)
            entries = dict(tqdm(written, "writing shards", len(tasks), leave=False, disable=None))
        manifest = {"format": 1, "tokenizer": about, "files": entries, "made_by": job.description | {"counts": counts}}
        _publish(building, Path(out_dir), manifest)
    return manifest


def _need_tokens(building, min_tokens):
    orders = [building / f"order-{split}" for split in ("train", "val")]
    found = [np.memmap(path, RECORD, "r") for path in orders if os.path.getsize(path)]
    tokens = sum(int(rows["tokens"].sum(dtype=np.int64)) + len(rows) for block in found for rows in _in_blocks(block))
    if tokens < min_tokens:
        raise InputError(f"the text has {tokens:,} tokens, which is too little to train on; give at least "
                         f"{min_tokens:,} (a byte is a token with --tokenizer=bytes, about 4 bytes with gpt2)")


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


def _tokenise(pool, window, job, building):
    """Runs all tokenising tasks, with a progress bar; writes the records to `index` and returns the counts."""
    tally, tokens, start = Tally(), 0, time.perf_counter()
    sources = [*job.files, *job.val_files]
    names = ("text_column", "encoding", "split")
    join, needles = job.options.get("join", ""), job.options.get("needles", 0)
    tasks = ((*task, val) for val, files in enumerate((job.files, job.val_files))
             for task in plan_tasks(files, *(job.options[name] for name in names), join, 0 if val else needles))
    with open(building / "index", "wb") as index, tqdm(
            total=sum(f.size for f in sources), disable=None, leave=False, desc="tokenising",
            bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:
        for size, records, reports in _in_parallel(pool, _run_worker, tasks, window):
            index.write(records)
            tokens += int(records["tokens"].sum()) + len(records)
            for report in reports:
                tally.add(*report)
            mb = tally.text_bytes / 1e6
            speed = mb / (time.perf_counter() - start)
            bar.set_postfix_str(f"{mb:.0f} MB, {speed:.1f} MB/s, {tokens / 1e6:.1f}M tokens", refresh=False)
            bar.update(size)
    left_out, skipped = tally.counts(sources, job.left_out)
    if not tokens:
        raise InputError(f"no usable text found in {len(sources)} file(s), the first being {sources[0].path}; "
                         + "; ".join(tell(left_out) + tell(skipped)))
    read = sum(tally.documents[f.path] > 0 for f in sources)
    found = read + sum(count for count, _ in left_out.values())
    return {"documents": tally.made, "text_bytes": tally.text_bytes,
            "files": {"found": found, "read": read, "left_out": _as_lists(left_out)},
            "folders_left_out": _as_lists(job.folders), "skipped": _as_lists(skipped)}


def _as_lists(counts):
    return {reason: [count, one_line(example)] for reason, (count, example) in counts.items()}


def tell(counts):
    """One line a reason: what was left out, how often, and an example; the kinds that are not read share a line."""
    kinds = {reason: count for reason, (count, _) in counts.items() if reason.startswith(ANOTHER_KIND)}
    by_count = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    listing = ", ".join(f"{reason.removeprefix(ANOTHER_KIND).strip()} {count}" for reason, count in by_count)
    lines = [f"{sum(kinds.values())} x {ANOTHER_KIND} ({listing})"] if kinds else []
    return lines + [one_line(f"{count} x {reason} ({example})") for reason, (count, example) in sorted(counts.items())
                    if reason not in kinds]


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
# The command that trains on the result


def next_step(out_dir, manifest):
    """The lines that end the summary: a command that trains to the end, or one line that says what is missing."""
    files, made_by = manifest["files"], manifest["made_by"]
    tokens = {split: sum(e["tokens"] for n, e in files.items() if n.startswith(split)) for split in ("train", "val")}
    if not tokens["val"] or not tokens["train"]:
        return [_why_one_side(tokens, made_by)]
    if made_by["options"].get("join"):
        fitting = min(tokens["val"] - 1, LONG_VAL_TOKENS) // 128 * 128
        steps = min(tokens["train"] // LONG_BATCH_TOKENS, LONG_STEPS)
        if not fitting or not steps:
            return [f"no next command: the preset long needs {LONG_BATCH_TOKENS:,} training tokens and 129 validation "
                    f"tokens at least, and there are {tokens['train']:,} and {tokens['val']:,}. Give more text."]
        fewer = f"--num_iterations={steps} " if steps < LONG_STEPS else ""
        return [f"next: python {shlex.quote(shown(HERE.parent / 'train_gpt_long.py'))} --preset=long --init_from=RUN "
                f"--train_files={_pattern(out_dir, 'train')} --val_files={_pattern(out_dir, 'val')} {fewer}"
                f"--val_tokens={fitting}    (RUN: the folder of a run with this tokenizer; docs/long.md)"]
    needed = packs_of_steps(TINY_STEPS)
    packs = count_packs(out_dir, manifest, needed)
    steps, epochs = fit_run(packs)
    advice = ("" if 0 < made_by["options"]["max_doc_tokens"] <= PACK_TOKENS else f" It reads the first {PACK_TOKENS} "
              f"tokens of a document: --max_doc_tokens={PACK_TOKENS} makes it read all.")
    if steps < MIN_STEPS:
        return [f"no next command: the tiny preset could read {packs * PACK_TOKENS:,} training tokens, which is too "
                f"little.{advice or ' Give more text.'}"]
    lines = []
    if packs < needed:
        times = f"{epochs} times" if steps == TINY_STEPS else f"{epochs} times, in {steps} steps"
        lines.append(f"The tiny preset reads {needed * PACK_TOKENS:,} training tokens. This text gives it "
                     f"{packs * PACK_TOKENS:,} (documents are cut where a pack of {PACK_TOKENS} tokens is full). "
                     f"So the command reads the text {times}.{advice}")
    flags = [f"--train_files={_pattern(out_dir, 'train')}", f"--val_files={_pattern(out_dir, 'val')}"]
    if tokens["val"] <= TINY_VAL_TOKENS:
        fitting = tokens["val"] - 1
        flags.append(f"--val_tokens={fitting // 512 * 512 or fitting}")
    flags += [f"--epochs={epochs}"] * (epochs > 1) + [f"--num_iterations={steps}"] * (steps < TINY_STEPS)
    script = shlex.quote(shown(HERE.parent / "train_gpt.py"))
    return [*lines, f"next: python {script} --preset=tiny {' '.join(flags)}"]


def _why_one_side(tokens, made_by):
    if not tokens["train"]:
        return "no next command: all training text is in the validation text, too; give other text to --val"
    if made_by["validation_sources"]["files"]:
        return "no next command: the files of --val hold no text; name others"
    if made_by["options"]["val_fraction"] == 0:
        return "no next command: there is no validation text; leave out --val_fraction=0 or name some with --val=FILE"
    return ("no next command: a single document cannot be divided into training and validation text; give more text, "
            "name validation text with --val=FILE, or leave out --max_doc_tokens")


def packs_of_steps(steps):
    """How many packs the tiny preset reads in this many steps."""
    small = round(steps / 3)  # steps of 1,024 tokens; the others have 2,048
    return 2 * small + 4 * (steps - small)


def count_packs(out_dir, manifest, limit):
    """How many packs the training shards fill, counted as the trainer fills them, up to `limit`.

    A pack takes whole documents, PACK_TOKENS of each at most; the rest of the one that fills it up is not read.
    """
    packs, room = 0, PACK_TOKENS
    for name in sorted(name for name in manifest["files"] if name.startswith("train")):
        for length in _document_lengths(out_dir / name, manifest["tokenizer"]):
            room -= min(length, PACK_TOKENS, room)
            if room == 0:
                packs, room = packs + 1, PACK_TOKENS
                if packs == limit:
                    return packs
    return packs


def _document_lengths(path, tokenizer, block=1 << 22):
    """Yields the tokens of each document of a shard, the begin-of-document id included."""
    ids = np.memmap(path, "<u2" if tokenizer["vocab_size"] <= 65_536 else "<u4", "r", offset=1024)
    start = 0
    for low in range(0, len(ids), block):
        for begin in (np.flatnonzero(ids[low:low + block] == tokenizer["bos_id"]) + low).tolist():
            if begin > start:
                yield begin - start
            start = begin
    yield len(ids) - start


def fit_run(packs):
    """(steps, epochs) of the longest run of the tiny preset that this many packs of training text are enough for."""
    needed = packs_of_steps(TINY_STEPS)
    if packs >= needed:
        return TINY_STEPS, 1
    an_epoch = packs - max(1, -(-packs // 20))  # documents in another order fill a few packs more or less
    epochs = min(-(-needed // max(an_epoch, 1)), MAX_EPOCHS)
    steps = max(n for n in range(TINY_STEPS + 1) if packs_of_steps(n) <= max(epochs * an_epoch, 0))
    return steps, epochs


def _pattern(out_dir, split):
    """The glob of the shards of one split, quoted for the shell."""
    return shlex.quote(f"{glob.escape(shown(out_dir))}/{split}_*.bin")


def shown(path):
    """A path as it is short to type from the current folder."""
    path = Path(path).resolve()
    relative = os.path.relpath(path, Path.cwd().resolve())
    relative = f"./{relative}" if relative.startswith("-") else relative
    return min(relative, str(path), key=len)


# -----------------------------------------------------------------------------
# Command line


def run_command(main, fail, interrupted, mistakes=(InputError,)):
    """Runs main() as the program that was started, also for the other scripts in this folder.

    What the user can put right ends in fail(line). interrupted: what the line after Ctrl-C says.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that temporary folders go too
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name may hold letters that this terminal cannot show
    try:
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # the imports are over
        main()
    except mistakes as e:
        fail(e)
    except ModuleNotFoundError as e:
        fail(f"the Python package {e.name} is missing; pip install -r requirements.txt")
    except futures.BrokenExecutor:
        fail("a worker process was killed, perhaps for memory; use fewer with --processes=N")
    except BrokenPipeError:  # nobody reads the summary (`| head`); the files are in place by then
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as e:
        remedy = "free some space or " if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        fail(f"cannot write {e.filename or 'the files'}: {e.strerror or e}; {remedy}choose another --out")
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted; {interrupted}", file=sys.stderr)
        raise SystemExit(130) from None


def fail(message):
    """Prints one line to stderr and ends with exit code 2."""
    print(f"text.py: {one_line(message)}", file=sys.stderr)
    raise SystemExit(2)


def path_argument(given):
    """A path from the command line; `~` is the home folder where the shell left it as it is, as in --out=~/x."""
    if not given:
        raise argparse.ArgumentTypeError("the path is empty; name a file or a folder")
    return Path(given if os.path.lexists(given) else os.path.expanduser(given))


def parse_args(argv=None):
    """The command line as a namespace; a mistake ends in `fail`."""
    parser = argparse.ArgumentParser(
        prog="text.py", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__, allow_abbrev=False)
    parser.error = fail
    add = parser.add_argument
    add("inputs", nargs="*", metavar="PATH", type=path_argument,
        help="files and folders to read. A text file is one document (above 8 MiB several, cut at paragraph ends); "
             ".jsonl and .parquet hold one document a row. Default: the sources and documentation of this machine's "
             "Python library, identical ones once")
    add("--out", type=path_argument,
        help="folder to write to; default: data/<name of the input>/, data/local/ without input")
    add("--val", type=path_argument, metavar="PATH",
        help="file or folder of validation text; default: a part of the input is held out")
    add("--val_fraction", type=float,
        help=f"share of the documents held out, chosen by their sha256; two documents or more give both sides some; "
             f"0: none; default: what the tiny preset validates on ({TINY_VAL_TOKENS:,} tokens), but at least "
             f"{MIN_VAL_SHARE:.1%} and about {MAX_VAL_SHARE:.0%} at most".replace("%", "%%"))
    add("--tokenizer", metavar="gpt2|bytes|PATH",
        help="PATH: a tokenizer.json in this project's format, or the folder that holds it; default: gpt2 when its "
             "vocabulary is at hand, else bytes (256 byte values, needs nothing)")
    add("--vocab_dir", type=path_argument,
        help="folder with GPT-2's vocab.bpe and encoder.json; default: tiktoken's cache")
    add("--max_doc_tokens", type=int, default=PACK_TOKENS,
        help="longer documents are split into pieces of at most this many tokens. Each piece becomes a document and "
             "ends at a paragraph end (else at a line, sentence or word end); nothing is lost. The tiny preset reads "
             "no more than the first 512 tokens of a document. 0: do not split (default: %(default)s)")
    add("--split", metavar="TEXT", default="",
        help="what separates the documents within a text file, such as '<|endoftext|>'; \\n in it is a line end")
    add("--join", default="", metavar="folder",
        help=f"folder: make one document of all text files of a folder and its subfolders, such as those of a Python "
             f"package, in the order of their names. Documents have at most {JOIN_BYTES >> 10} KiB, so a large folder "
             f"gives several. Use it with --max_doc_tokens=65536")
    add("--needles", type=int, default=0, metavar="N",
        help="also make N documents for training a model to look far back: parts of the joined documents in which "
             "made-up sentences stand twice (data/needles.py); needs --join (default: %(default)s)")
    add("--encoding", default="",
        help="how to read text files that are not UTF-8, such as utf-16, gb18030, cp1251, cp1252")
    add("--text_column", default="text", help="column of .jsonl and .parquet to read (default: %(default)s)")
    add("--exclude", default="", metavar="REGEX", help="leave out files whose path contains this regular expression")
    add("--drop_duplicates", action="store_true", help="keep only one of identical documents")
    add("--stream", action="store_true",
        help=f"spread the pieces of a document at even distances over all shards, so that neighbouring batches never "
             f"come from one source file (with --max_doc_tokens=0 the pieces have {CHUNK_TOKENS} tokens at most). "
             f"Without it, documents and pieces are shuffled")
    add("--seed", type=int, default=0, help="seed of the shuffle (default: %(default)s)")
    add("--shard_tokens", type=int, default=100_000_000, help="tokens in a shard, at most (default: %(default)s)")
    add("--processes", type=int, help="worker processes; does not change the result; default: all cores")
    add("--force", action="store_true",
        help="build even if the result is there, in place of shards of another tokenizer or text, or beside shards of "
             "another origin")
    add("--brief", action="store_true", help="print one line; manifest.json holds the other counts")
    argv = sys.argv[1:] if argv is None else argv
    if empty := [arg for arg in argv if re.fullmatch("--.*=--", arg, re.S)]:  # argparse may read it as a list
        fail(f"{empty[0]} has no value")
    args = parser.parse_args(argv)
    if args.processes is not None and args.processes < 1:
        fail(f"--processes={args.processes}: must be at least 1")
    if args.val and args.val_fraction is not None:
        fail("--val and --val_fraction contradict each other; leave one of them out")
    args.split = args.split.replace("\\n", "\n").replace("\\t", "\t")
    return args


def choose_tokenizer(args):
    """(tokenizer, why) to use; fails when one was asked for that is not at hand."""
    name, why = args.tokenizer, "as asked for"
    if name == "bytes":
        return name, why
    try:
        if name not in (None, "gpt2"):
            name = path_argument(name)
            if not json.loads(tokenizer_file_json(name))["pattern"]:
                return name, why
        import tiktoken  # noqa: F401

        if name in (None, "gpt2"):
            gpt2_tokenizer_json(args.vocab_dir)
            return "gpt2", f"vocabulary from {args.vocab_dir or 'the cache of tiktoken'}"
        return name, why
    except ImportError:
        why, remedy = "tiktoken is not installed", "pip install tiktoken"
    except LookupError as e:
        why, remedy = str(e), ("pass --vocab_dir=FOLDER with GPT-2's vocab.bpe and encoder.json, or let tiktoken fetch "
                               "them once: python -c \"import tiktoken; tiktoken.get_encoding('gpt2')\"")
    if args.tokenizer or args.vocab_dir:
        fail(f"--tokenizer={args.tokenizer or 'gpt2'}: {why}; {remedy}, or use --tokenizer=bytes")
    return "bytes", f"gpt2 is not at hand: {why}; to change that, {remedy}"


def check_out_dir(out_dir, job, force):
    """The manifest in `out_dir` if it already holds what `job` describes, else None; fails on other people's shards."""
    try:
        if not (out_dir / "manifest.json").is_file():  # reading a pipe would wait for its writer
            raise FileNotFoundError
        with open(out_dir / "manifest.json", "rb") as file:
            old = json.loads(file.read(JSON_BYTES))
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


def check_replaced(out_dir, job, force):
    """What to print about the files in `out_dir` that `job` replaces: one line, or "" if there is nothing to say.

    Without `force` it fails on those of another tokenizer, of inputs that are not given now, or of another script: a
    run may still need them.
    """
    try:
        manifest = json.loads(_read_small(out_dir / "manifest.json", JSON_BYTES))
        old, name, sha256 = manifest["made_by"], manifest["tokenizer"]["name"], manifest["tokenizer"]["sha256"]
        ours = old["script"] == job["script"]
        before = old["sources"]["inputs"] if ours else ()
        lost = [str(given) for given in before if given not in job["sources"]["inputs"]]
        text_changed = ours and any(old[side] != job[side] for side in ("sources", "validation_sources"))
        flags = [f"--{flag}" for flag in sorted({*old["options"], *job["options"]} if ours else ())
                 if old["options"].get(flag) != job["options"].get(flag)]
    except FileNotFoundError:
        with contextlib.suppress(OSError):
            found = hashlib.sha256(_read_small(out_dir / "tokenizer.json", JSON_BYTES)).hexdigest()
            if found != job["tokenizer_sha256"] and not force:
                fail(f"--out={out_dir}: holds another tokenizer.json; choose another folder, or --force replaces it")
        return ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"replaced the shards that were in {one_line(shown(out_dir))}/: its manifest.json was damaged"
    what = [f"of the tokenizer {name}"] * (sha256 != job["tokenizer_sha256"])
    what += [f"made of {', '.join(lost)}"] * bool(lost) + [f"made by {old['script']}"] * (not ours)
    if what and not force:
        fail(f"--out={out_dir}: holds shards {', '.join(what)}; choose another folder, or --force replaces them")
    what = what or ["of other text"] * text_changed + [f"made with another {', '.join(flags)}"] * bool(flags)
    return one_line(f"replaced the shards that were in {shown(out_dir)}/: {', '.join(what)}") if what else ""


def summarize(manifest, out_dir, seconds, brief):
    """Prints what was read and what was left out, what was made of it, and how fast; brief: one line."""
    counts, files = manifest["made_by"]["counts"], manifest["files"]
    tokens = {split: sum(e["tokens"] for n, e in files.items() if n.startswith(split)) for split in ("train", "val")}
    if brief:
        print(f"{_count(counts['documents'], 'document')}: {tokens['train']:,} training tokens and {tokens['val']:,} "
              f"validation tokens; {one_line(shown(out_dir / 'manifest.json'))} says what was left out")
        return
    pieces = sum(e["documents"] for e in files.values())
    held_out = sum(e["documents"] for n, e in files.items() if n.startswith("val"))
    found = counts["files"]
    print(f"{_count(found['found'], 'file')} found, {found['read']:,} read, "
          f"{found['found'] - found['read']:,} left out")
    for heading, reasons in (("left out", found["left_out"]), ("not entered", counts["folders_left_out"]),
                             ("skipped or repaired", counts["skipped"])):
        for line in tell(reasons):
            print(f"  {heading}: {line}")
    for key, what in (("duplicates_dropped", "duplicate"), ("copies_of_validation_dropped", "copy of a --val text")):
        if counts[key]:
            print(f"  dropped: {counts[key]} x {what}")
    print(f"{_count(counts['documents'], 'document')}, {counts['text_bytes'] / 1e6:.1f} MB of text, in {seconds:.1f} s "
          f"({counts['text_bytes'] / 1e6 / seconds:.1f} MB/s)")
    print(f"{tokens['train']:,} training tokens and {tokens['val']:,} validation tokens ({held_out:,} of "
          f"{_count(pieces, 'document' if pieces <= counts['documents'] else 'piece')}), tokenizer "
          f"{one_line(manifest['tokenizer']['name'])}")
    print(f"wrote {one_line(shown(out_dir))}/: {', '.join(sorted(files)[:4])}{', ...' if len(files) > 4 else ''}, "
          f"tokenizer.json, manifest.json ({len(files)} shards, {sum(e['size'] for e in files.values()) / 1e6:.1f} MB)")


def _count(number, noun):
    return f"{number:,} {noun}{'s' * (number != 1)}"


def default_out_dir(inputs):
    """data/<names of the inputs without their endings>, in letters that need no quotes in a shell."""
    endings = "|".join(ending[1:] for ending in (*TEXT_ENDINGS, *LINE_ENDINGS, *PACKED_ENDINGS, ".parquet"))
    stems = [re.sub(rf"(\.({endings}))+$", "", label(given), flags=re.I) for given in inputs]
    out_dir = HERE / (re.sub(r"[^\w.-]+|^[.-]+", "_", "_".join(dict.fromkeys(stems))[:80]) or "text")
    if out_dir in (Path(given).resolve() for given in inputs):
        out_dir = out_dir.with_name(out_dir.name + "_shards")
    return out_dir


def main():
    start = time.perf_counter()
    args = parse_args()
    inputs = args.inputs
    if not inputs:  # always there, so that the project has real text to train on without any download
        inputs, args.exclude = [Path(sysconfig.get_path("stdlib"))], args.exclude or BROKEN_ON_PURPOSE
        args.drop_duplicates, args.out = True, args.out or HERE / "local"
    out_dir = args.out or default_out_dir(inputs)
    if not shown(out_dir).isprintable():
        fail(f"--out={out_dir}: the name holds characters that cannot be typed; choose another folder")
    tokenizer, why = choose_tokenizer(args)
    names = ("val val_fraction max_doc_tokens seed stream shard_tokens text_column encoding split exclude "
             "drop_duplicates vocab_dir").split()
    names += ["join", "needles"] if args.join or args.needles else []       # other shards have manifests without them
    job = prepare(inputs, out_dir=out_dir, tokenizer=tokenizer, **{name: getattr(args, name) for name in names})
    manifest = check_out_dir(out_dir, job.description, args.force)
    if manifest:
        remedy = "" if args.brief else " (--force builds it again)"
        print(f"{one_line(shown(out_dir))} already holds this result: nothing to do{remedy}")
    else:
        library_again = not args.inputs and out_dir.resolve() == HERE / "local"  # run.sh makes it, in seconds
        replaced = check_replaced(out_dir, job.description, args.force or library_again)
        manifest = build(job, out_dir, args.processes, MIN_TOKENS)
        print(f"{replaced}\n" * bool(replaced), end="")
        if not args.brief:
            print(f"tokenizer: {one_line(tokenizer)} ({one_line(why)})")
        summarize(manifest, out_dir, time.perf_counter() - start, args.brief)
    lines = next_step(out_dir, manifest)
    if not args.brief or not lines[-1].startswith("next: "):
        print("\n".join(lines))


if __name__ == "__main__":
    run_command(main, fail, "start it again to build the shards", mistakes=(InputError, LookupError))
