"""Every reader of the project against files and command lines that were damaged, or made to harm.

A seeded mutator changes sound input (flipped bits, cuts, other types, huge numbers, deep nesting, keys that come twice,
NaN, control characters, bad UTF-8, very long strings), and hypothesis makes up whole objects. Each input must end in a
correct read or in the refusal that the script prints as one line with exit code 2: no other exception, no more than
SECONDS, no more than MEMORY bytes, no file written, no code run, no connection opened. "Correct" is what each `read`
below asserts of what it got. Files of gigabytes are refused unread, and pipes are not waited for. Inputs that once
broke a reader stand in FOUND, one by one; at the end some go through each script as a process.

Run: python -m pytest tests/test_hostile.py; with more inputs: HOSTILE_COUNT=50000 HOSTILE_SEED=1 python -m pytest ...
"""
import argparse
import base64
import codecs
import contextlib
import gzip
import hashlib
import importlib
import io
import itertools
import json
import os
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (BOS, ROOT, SMALL_STAGES, VOCAB, as_flags, make_data, make_text, small_flags, tokenizer_json,
                      write_shard)
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

sys.path[:0] = [str(ROOT / "data"), str(ROOT / "records")]

import fineweb  # noqa: E402
import sample  # noqa: E402
import text  # noqa: E402
import train_gpt  # noqa: E402

COUNT, SEED = int(os.environ.get("HOSTILE_COUNT", 300)), os.environ.get("HOSTILE_SEED", "0")
# for one input: at most so many seconds of CPU time, bytes more, and characters of a refusal
SECONDS, MEMORY, LINE = 10, 1 << 30, 1200
WAITING = 60                             # seconds in all, which other programs may slow down; a pipe has no end
HELD = 4 << 30                              # what an allocation may ask for before the machine that tests is in danger


def optional(path):
    """The module of a file of the project, or None where it is not there yet."""
    return importlib.import_module(Path(path).stem) if (ROOT / path).is_file() else None


evaluate, gpt2, evals, tokenizer_script = map(optional, ("evaluate.py", "gpt2.py", "data/evals.py", "data/tokenizer.py"))
runs, records = map(optional, ("records/runs.py", "records/records.py"))

# two files are called chat.py, so neither is imported by its name
chat, chat_data, chat_sft, chat_rl = (sample.import_script(ROOT / path, needs=("parse_args",))
                                      for path in ("chat.py", "data/chat.py", "chat_sft.py", "chat_rl.py"))
CPU = train_gpt.Machine(torch.device("cpu"), 0, 1, "cpu")

# -----------------------------------------------------------------------------
# What a reader may not do

SEEN = None                                 # a list while a reader is watched
HARMFUL = re.compile(r"(exec|compile|marshal\.loads|pickle\.find_class|import|code\.__new__|ctypes\.\w+|socket\.\w+|"
                     r"os\.(system|exec|spawn|posix_spawn|fork|forkpty|mkdir|remove|rename|rmdir|link|symlink|truncate|"
                     r"chmod|chown|utime|putenv)|subprocess\.Popen|shutil\.\w+|tempfile\.\w+|webbrowser\.open)")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def audit(event, args):
    """Notes what the interpreter reports while a reader is watched; such a hook cannot be taken out again."""
    if SEEN is not None and (HARMFUL.fullmatch(event) or event == "open" and args[2] & WRITING):
        SEEN.append(f"{event} {str(args[0])[:200]}")


sys.addaudithook(audit)


class Slow(BaseException):
    """An input took more than SECONDS of CPU time, or more than WAITING."""


def too_slow(*_):
    raise Slow


def memory(name):
    """Bytes, by a line of /proc/self/status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name + ":"))


def peak():
    """The most bytes of memory since peak.base was last set."""
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - peak.base


def forget_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    peak.base = memory("VmRSS")


@pytest.fixture(autouse=True)
def held():
    """Gives no allocation more than HELD: it fails, and so does the test."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + HELD, limits[1]))
    forget_peak()
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture
def folder():
    """An empty folder, in memory if there is a file system for that: thousands of files are written one by one."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        yield Path(name)


@contextlib.contextmanager
def watched():
    """Yields a list that says afterwards what the block did that no reader may."""
    global SEEN
    SEEN = found = []
    timers = (signal.ITIMER_PROF, signal.SIGPROF, SECONDS), (signal.ITIMER_REAL, signal.SIGALRM, WAITING)
    handlers = [signal.signal(number, too_slow) for _, number, _ in timers]
    for timer, _, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield found
    finally:
        SEEN = None
        for (timer, number, _), handler in zip(timers, handlers):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)
        if (grown := peak()) > MEMORY:
            found.append(f"{grown >> 20} MiB of memory")
            forget_peak()


def judge(read, refusals, sentence=lambda error: " ".join(str(error).split())):
    """"read" or "refused", or what is wrong with how a reader ended."""
    try:
        with watched() as found, contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(
                io.StringIO()):
            outcome = "read"
            try:
                read()
            except refusals as error:
                outcome, line = "refused", sentence(error)
            except SystemExit as error:     # of a command line: --help, or a mistake
                outcome, line = ("read", "") if error.code == 0 else ("refused", err.getvalue().removesuffix("\n"))
                if error.code not in (0, 2):
                    return f"exit code {error.code}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        where = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in
                 traceback.extract_tb(error.__traceback__) if str(ROOT) in frame.filename][-1:]
        return f"{type(error).__name__} at {''.join(where)}: {str(error)[:100]!a}"
    if found:
        return f"{outcome}, but: {found[0]}"
    if outcome == "refused" and not (line.isprintable() and 10 < len(line) <= LINE):
        return f"a refusal of {len(line)} characters that is no printable line: {line[:100]!a}"
    return outcome


# -----------------------------------------------------------------------------
# Mutations

DEEP = [opening * depth + inner + closing * depth for opening, inner, closing in (("[", "", "]"), ('{"a":', "1", "}"))
        for depth in (300, 900, 960, 5000)]
ODD = ["null", "true", "false", "0", "-1", "1", "2", "3", "1.5", "-0.0", "1e-320", "1e308", "-1e308", "1e999", "NaN",
       "Infinity", "-Infinity", *(str(sign * 2 ** bits + more) for bits in (7, 15, 31, 32, 62, 63, 64)
                                  for sign in (1, -1) for more in (-1, 0)),
       "1" + "0" * 400, "9" * 5000, "256.0", '""', '"x"', r'"\u0000"', r'"\ud800"', r'"\u001b[31m"', r'"a\nb\r\tc"',
       r'"\u202e"', '"é漢😀"', '"../../x"', '"/etc/passwd"', '"/dev/zero"', '"%s%n{}"', '"=="', '"' + "A" * 100_000 + '"',
       '"' + r"\n" * 3000 + '"', "[]", "{}", "[[]]", '{"a":1}', "[1,2]", "[0.5]", '["x",null]', "[true,false]",
       "[" + "0," * 3000 + "0]", *DEEP, "[" * 100_000]


def choose_place(rng, value):
    """(list or dictionary, key) of some item, the nearer to the root the likelier; (None, None) if there is none."""
    holder, key = None, None
    while isinstance(value, (dict, list)) and value and (holder is None or rng.random() < 0.7):
        holder, key = value, rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value = holder[key]
    return holder, key


def change_json(rng, value, odd=()):
    """JSON text (bytes) of the value with one to three items replaced, doubled, renamed, moved, or gone."""
    value, raw = json.loads(json.dumps(value)), {}
    for number in range(rng.choice((1, 1, 2, 3))):
        (holder, key), kind, mark = choose_place(rng, value), rng.random(), f"@{number}@"
        if holder is None:
            break
        if kind < 0.6:
            raw[mark] = rng.choice([*ODD, *odd, json.dumps(rng.getrandbits(rng.randrange(1, 65)))])
            holder[key] = mark
        elif kind < 0.7:
            del holder[key]
        elif kind < 0.8 and isinstance(holder, dict):
            holder[rng.choice(["", "x", "__class__", "\ud800", key + " ", key.upper()])] = holder.pop(key)
        elif kind < 0.9 and isinstance(holder, dict):       # the key twice
            raw[f"@@{number}"] = f"{json.dumps(key)}: {rng.choice(ODD)}, {json.dumps(key)}"
            holder[f"@@{number}"] = holder.pop(key)
        else:
            holder[key] = json.loads(json.dumps(rng.choice([value, holder])))
    content = json.dumps(value)
    for mark, fragment in raw.items():
        content = content.replace(f'"{mark}"', fragment)
    content = content.encode()
    return change_bytes(rng, content) if rng.random() < 0.1 else content


def change_bytes(rng, content, low=0, high=None):
    """The content with a few bits flipped, cut short, with bytes put in, taken out, doubled or written over."""
    content, high = bytearray(content), len(content) if high is None else high
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at, size = rng.randrange(low, high + 1), rng.choice((1, 2, 4, 8, 100))
        junk = rng.choice((rng.randbytes(size), b"\xff" * size, b"\0" * size, b"\x80\xfe", b"9" * size, b'"', b"\n"))
        kind = rng.randrange(6)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            content[at:at] = junk
        elif kind == 3:
            del content[at:at + size]
        elif kind == 4:
            content[at:at] = content[at:at + size]
        else:
            content[at:at + len(junk)] = junk
        high = min(high, len(content))
    return bytes(content)


def change_text(rng, text, odd=()):
    """A word of a command line, changed; never with a zero byte, which no process can be given."""
    words = [*odd, "", "-", "--", "=", "--x", "0", "-1", "1.5", "nan", "inf", "1e999", "9" * 5000, str(2 ** 63), "1_0",
             "٣", "true", "../..", "/dev/null/x", "\udcff", "\x1b[31m", "a\nb", "é漢😀", "A" * 5000, "[" * 5000, "[[]]",
             "{}", ",", "1,", ",,", "%s", "*", "[!", "~", "None", "\u202e"]
    at, kind = rng.randrange(len(text) + 1), rng.randrange(5)
    name, equals, _ = text.partition("=")
    if kind < 2 and equals:
        return name + equals + rng.choice(words)
    if kind == 2:
        return text[:at] + rng.choice(words) + text[at:]
    if kind == 3:
        return text[:at]
    return text[:at] + chr(rng.choice((rng.randrange(1, 128), rng.randrange(128, 0xd800)))) + text[at + 1:]


def change_words(rng, words, odd=()):
    """A command line with one to three words changed, doubled, taken out or exchanged."""
    words = list(words)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, kind = rng.randrange(len(words) + 1), rng.randrange(6)
        if kind == 0 or at == len(words):
            words.insert(at, change_text(rng, rng.choice([*words, "--"]), odd))
        elif kind == 1:
            words.insert(rng.randrange(len(words)), words[at])
        elif kind == 2:
            del words[at]
        else:
            words[at] = change_text(rng, words[at], odd)
    return words


# -----------------------------------------------------------------------------
# Formats: sound input, how it is changed, who reads it, and what must be true of what was read

@dataclass
class Format:
    sound: object                           # input that must be read
    change: object                          # of (random numbers, sound): hostile input
    path: Path | None                       # the file that `read` reads
    read: object                            # reads it and asserts that what came out is sound
    refusals: object                        # the exceptions that the script prints as one line
    sentence: object = lambda error: " ".join(str(error).split())       # that line
    put: object = None                      # of input: lays it where `read` finds it; default: as the file

    def __post_init__(self):
        self.put = self.put or self.path.write_bytes


def shard_header(folder):
    """The training script's reader of shards."""
    path = folder / "train_000000.bin"
    write_shard(path, make_text(300, seed=1))
    cfg = train_gpt.parse_config(small_flags(folder))

    def read():
        shards, _ = train_gpt.open_shards(str(path), str(path))
        shard = shards[0]
        assert shard.num_tokens * shard.width + 1024 == path.stat().st_size and shard.width in (2, 4)
        assert 0 <= shard.bos_id < shard.vocab_size <= 256 ** shard.width
        train_gpt.resolve_config(cfg, CPU, shard)
        for ids, start, end in train_gpt.documents(shards):
            assert ids[start] == shard.bos_id and 0 <= start < end <= shard.num_tokens
        train_gpt.fill_pack([(shard.read(), 0, shard.num_tokens)], 512, shard.bos_id, shard.vocab_size)

    def change(rng, content):
        words = np.frombuffer(content, "<i4", 256).copy()
        for _ in range(rng.choice((1, 1, 2))):
            words[rng.choice((0, 1, 2, 3, 4, 5, rng.randrange(256)))] = rng.choice(
                (0, 1, -1, 2, 4, 8, 255, 256, 257, 2 ** 16, 2 ** 31 - 1, -2 ** 31, rng.randrange(-2 ** 31, 2 ** 31)))
        return change_bytes(rng, words.tobytes() + content[1024:], high=1100) if rng.random() < 0.3 else \
            words.tobytes() + content[1024:]
    return Format(path.read_bytes(), change, path, read, train_gpt.UserError, str)


def published_header(folder):
    """The reader of shards that data/fineweb.py fetches."""
    path, never = folder / "fineweb_train_000001.bin", fineweb.threading.Event()
    write_shard(path, make_text(300, seed=1), w3=0, w4=0, w5=0, sha256=bytes(32))
    form = shard_header(folder)

    def read():
        entry, problem = fineweb.look(path, None, (None, ""), False, never)
        if entry is None:
            raise fineweb.Refused(problem or "there is no such file")
        assert entry["size"] == path.stat().st_size == 1024 + 2 * entry["tokens"] and entry["documents"] >= 0
    return Format(path.read_bytes(), form.change, path, read, fineweb.Refused, fineweb.one_line)


def sound_manifest():
    entry = {"sha256": "0" * 64, "size": 1024, "tokens": 300, "documents": 9, "text_bytes": None}
    return {"format": 1, "files": {f"{name}_000000.bin": dict(entry) for name in ("train", "val")},
            "made_by": {"script": "text.py", "options": {"seed": 0}}, "tokenizer": {
                "name": "gpt2", "sha256": fineweb.GPT2_TOKENIZER_SHA256, "vocab_size": 50257, "bos_id": 50256}}


def manifest(folder):
    """manifest.json in an output folder of data/fineweb.py and data/text.py, or in that of a source."""
    out = folder / "out"
    out.mkdir()
    for name in ("train", "val"):
        (out / f"{name}_000000.bin").write_bytes(bytes(1024))
    (out / "tokenizer.json").write_bytes(b"")
    job = {"script": "text.py", "options": {"seed": 0}}

    def read():
        known = json.loads(json.dumps(fineweb.read_manifest(out)))
        assert known["format"] == 1 and all(type(entry[name]) is int and entry[name] >= 0 for entry in
                                            known["files"].values() for name in ("size", "tokens"))
        assert not any("/" in name for name in known["files"])
        pins = fineweb.source_pins(fineweb.Folder(out))
        assert all(isinstance(sha256, str) for sha256, _ in pins.values())
        text.check_out_dir(out, job, False)
    content = json.dumps(sound_manifest()).encode()
    return Format(content, lambda rng, _: change_json(rng, sound_manifest(), ['{"sha256":"x","size":1,"tokens":"x"}']),
                  out / "manifest.json", read, fineweb.Refused, fineweb.one_line)


def checkpoint(folder):
    """(checkpoint folder, its meta.json as an object) of a small model."""
    cfg = replace(train_gpt.PRESETS["tiny"], vocab_size=VOCAB, bos_id=BOS, attention="plain", compile=False,
                  model_dim=32, head_dim=16, mlp_dim=16, gate_dim=4, bigram_rows=16, bigram_signs=8,
                  final_windows=(16, 32))
    path = folder / "run" / "checkpoint" / "step_000007"
    path.mkdir(parents=True)
    save_file(train_gpt.GPT(cfg).state_dict(), path / "model.safetensors")
    (path / "tokenizer.json").write_bytes(tokenizer_json())
    (path.parent / "latest").write_text(path.name)
    source = hashlib.sha256((ROOT / "train_gpt.py").read_bytes()).hexdigest()
    meta = {"format": 1, "script": "train_gpt", "source_sha256": source, "config": asdict(cfg), "step": 7, "stage": 1,
            "sources": {"train_gpt.py": source}, "val_loss": 1.5, "tokenizer_sha256": hashlib.sha256(tokenizer_json()).hexdigest()}
    (path / "meta.json").write_text(json.dumps(meta))
    return path, json.loads(json.dumps(meta))


def generate(model, tokenizer):
    """What a model that could be loaded is for: two tokens after a prompt."""
    engine = sample.Engine(model, tokenizer.vocab_size, sample.Draw(), max_tokens=8)
    made = list(engine.steps([[tokenizer.bos_id, *tokenizer.encode("é")]], [(0, 0)], 2))
    assert len(made) == 2 and all(0 <= token < tokenizer.vocab_size for (token,), _ in made)


def meta_json(folder):
    """meta.json of a checkpoint, up to the first tokens of its model."""
    (path, meta), reads = checkpoint(folder), itertools.count()

    def read():
        model, tokenizer, said = sample.load_checkpoint(path, "cpu")
        assert model.cfg.vocab_size >= tokenizer.vocab_size and said["script"] == "train_gpt"
        if next(reads) % 4 == 0:            # it takes longer than all the rest
            generate(model, tokenizer)

    odd = [json.dumps(meta["config"]["layers"] * 500), json.dumps(meta["config"]["stages"] * 2), '"os"', '"fp32"', "96"]
    return Format(json.dumps(meta).encode(), lambda rng, _: change_json(rng, meta, odd), path / "meta.json",
                  read, sample.UserError)


def training_data(folder):
    """(a command line, the config of it with everything filled in, what it reads) of a run in that folder."""
    argv = small_flags(make_data(folder / "data", train_tokens=16_000, val_tokens=2000), num_iterations=4)
    cfg, data = train_gpt.load_data(train_gpt.parse_config(argv), CPU)
    return argv, cfg, data


def resumed_meta(folder):
    """meta.json of a checkpoint that --resume names, up to the first batch after it."""
    path, meta = checkpoint(folder)
    argv, cfg, data = training_data(folder)
    cfg, identity = replace(cfg, resume=str(path)), train_gpt.run_identity(cfg, data)
    (path / "optimizer.safetensors").write_bytes(b"x")
    (path.parent.parent / "run.json").write_text("{}")
    meta |= {"files": {name: train_gpt.file_sha256(path / name) for name in train_gpt.FILES}, "identity": identity,
             "step": 2, "loader_position": [0, 3], "history": [[0, 0.0, 5.5]], "train_time": 1.5, "tokens_seen": 3000}
    odd = ["[0,0]", "[1,99]", "[-1,0]", "[0,-1]", f"[0,{2 ** 70}]", "[[0,0.0,5.5],[1]]", '{"x":"y"}']

    def read():
        source, said, _ = train_gpt.find_checkpoint(cfg, identity)
        assert source == path and 0 <= said["step"] and all(len(tuple(point)) == 3 for point in said["history"])
        position = train_gpt.LoaderPosition(*said["loader_position"])
        if said["step"] < cfg.total_steps:
            next(train_gpt.training_batches(cfg, data.train, 0, 1, 1, said["step"], position))
    del meta["config"]                      # nobody looks at it
    return Format(json.dumps(meta).encode(), lambda rng, _: change_json(rng, meta, odd), path / "meta.json", read,
                  train_gpt.UserError, str)


def initial_meta(folder):
    """meta.json of a checkpoint that --init_from names, up to the windows that its model was trained with."""
    path, meta = checkpoint(folder)
    cfg = train_gpt.parse_config(["--preset=tiny", f"--init_from={folder / 'run'}"])

    def read():
        windows = train_gpt.windows_before(cfg)
        assert windows and all(type(window) is int and 1 <= window <= train_gpt.MAX_TOKENS for window in windows)
    return Format(json.dumps(meta).encode(), lambda rng, _: change_json(rng, meta), path / "meta.json", read,
                  train_gpt.UserError, str)


def initial_weights(folder):
    """model.safetensors of a checkpoint that --init_from names."""
    path, meta = checkpoint(folder)
    cfg = replace(train_gpt.config_from_dict(meta["config"]), init_from=str(path))
    model = train_gpt.GPT(cfg)
    optimizer = train_gpt.Optimizer(model)

    def read():
        train_gpt.initialize(model, optimizer, CPU)
        assert not any(param.isnan().any() for param in model.parameters())
    return safetensors(path / "model.safetensors", read, train_gpt.UserError, str)


def encoder_json(folder):
    """encoder.json of GPT-2 in the folder that --vocab_dir names; here the vocabulary has only single bytes."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = [*map(chr, visible), *(chr(256 + i) for i in range(len(hidden)))]         # how the file spells bytes
    sound = {letter: i for i, letter in enumerate(letters)}
    ranks = [base64.b64encode(bytes([byte])).decode() for byte in [*visible, *hidden]]
    words = {"name": "gpt2", "pattern": text.GPT2_PATTERN, "ranks": ranks, "special_tokens": {"<|endoftext|>": 50256},
             "bos_id": 50256}
    content = json.dumps(words, sort_keys=True, separators=(",", ":")).encode() + b"\n"

    def read():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_gpt, "GPT2_TOKENIZER_SHA256", hashlib.sha256(content).hexdigest())
            assert train_gpt.gpt2_tokenizer(str(folder)) == content
    return Format(json.dumps(sound).encode(), lambda rng, _: change_json(rng, sound), folder / "encoder.json", read,
                  train_gpt.UserError, str)


def safetensors(path, read, refusals, sentence):
    """The format of a safetensors file, of which mostly the header is changed."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:8 + size])
    odd = [json.dumps(name) for name in "F64 F16 BF16 I64 I32 U8 BOOL F8_E4M3 F4 C64 f32".split()] + [
        "[257,32]", "[32,257]", "[8224]", "[0]", "[18446744073709551615,2]", "[4294967296,4294967296]", "[0,4]"]

    def change(rng, content):
        kind = rng.random()
        if kind < 0.2:
            return change_bytes(rng, content, high=rng.choice((8 + size, None)))
        text = change_json(rng, header, odd)
        length = len(text) if kind < 0.9 else rng.choice((0, 1, size, 2 ** 31, 2 ** 63, 2 ** 64 - 1, 100_000_001))
        return struct.pack("<Q", length) + text + content[8 + size:]
    return Format(content, change, path, read, refusals, sentence)


def safetensors_header(folder):
    """model.safetensors of a checkpoint."""
    path, meta = checkpoint(folder)
    path = path / "model.safetensors"
    model = sample.build_model(train_gpt, meta, "fp32", path.stat().st_size)

    def read():
        sample.load_weights(model, path, "")
        assert all(tensor.shape == model.state_dict()[name].shape for name, tensor in model.state_dict().items())
    return safetensors(path, read, sample.UserError, str)


def resumed_state(folder):
    """optimizer.safetensors of a checkpoint that --resume names."""
    path, meta = checkpoint(folder)
    model = train_gpt.GPT(train_gpt.config_from_dict(meta["config"]))
    optimizer = train_gpt.Optimizer(model)
    state = train_gpt.run_state(model, optimizer, CPU)
    save_file({name: tensor for name, tensor in state.items() if name not in model.state_dict()} | {
        "train_losses": torch.ones(7, 3, dtype=torch.float64)}, path / "optimizer.safetensors")

    def read():
        with torch.random.fork_rng(devices=[]):
            losses = train_gpt.restore_state(path, {"files": dict.fromkeys(train_gpt.FILES)}, model, optimizer, CPU)
        assert all(len(point) == 3 for point in losses)
    return safetensors(path / "optimizer.safetensors", read, train_gpt.UserError, str)


def tokenizer(folder):
    """tokenizer.json beside a checkpoint and beside shards, named by its hash in both."""
    path, meta = checkpoint(folder)
    file, state = path / "tokenizer.json", {}
    shard = train_gpt.read_header(write_shard(folder / "train_000000.bin", [BOS], w3=259, w4=258))
    merges = json.loads(tokenizer_json([*(bytes([i]) for i in range(256)), b"th", b"the"]))
    sound = merges | {"pattern": text.GPT2_PATTERN}

    def put(content):
        state["meta"] = meta | {"tokenizer_sha256": hashlib.sha256(content).hexdigest()}
        file.write_bytes(content)
        (folder / "tokenizer.json").write_bytes(content)
        state["shard"] = replace(shard, tokenizer=state["meta"]["tokenizer_sha256"])

    def read():
        found = sample.read_tokenizer(path, state["meta"])
        for prompt in ("the 漢 9 's\n\n", " " * 300):
            ids = found.encode(prompt)
            assert b"".join(found.ranks[token] for token in ids) == prompt.encode()
        assert type(found.bos_id) is int and len(found.ranks) <= found.bos_id < found.vocab_size
        train_gpt.prefix_tokens(json.loads(train_gpt.read_tokenizer(state["shard"])), 259)
    odd = [json.dumps(pattern) for pattern in ("(", "(a+)+$", "(?=(a+))*", r"(\w+\s*)+:", "(?<", r"\p{Nope}", "x*", "",
                                               "a{1000}" * 50, r"(a|a)*\1b")]
    return Format(json.dumps(sound).encode(), lambda rng, _: change_json(rng, sound, odd), file, read,
                  (sample.UserError, train_gpt.UserError), put=put)


def latest_file(folder):
    """The file that names the newest checkpoint of a run."""
    path, _ = checkpoint(folder)
    (folder / "run" / "elsewhere").mkdir()

    def read():
        assert sample.find_checkpoint(folder).parent == sample.resolve_checkpoint(folder / "run").parent == path.parent
    names = [b"../elsewhere", b"..", b".", b"/tmp", b"step_000007/../../elsewhere", b"step_000007/", b"\0", b"~"]
    return Format(b"step_000007", lambda rng, content: rng.choice(names) if rng.random() < 0.3 else change_bytes(
        rng, content), path.parent / "latest", read, sample.UserError)


# -----------------------------------------------------------------------------
# Formats: runs and records

RULE = "=" * 100 + "\n"


def sound_run(seed):
    """run.json of a finished run."""
    points = [{"step": step, "train_time_ms": 100 * step, "val_loss": loss, "tokens": 1500}
              for step, loss in ((0, 5.5), (2, 4.5 - seed / 100), (4, 3.9 - seed / 100))]
    stages = [{"until": 0.5, "batch_tokens": 512}, {"until": 1.0, "batch_tokens": 1024}]
    config = {"num_iterations": 4, "stages": stages, "val_tokens": 1500, "kernels": False, "seed": seed,
              "val_files": "data/val_*.bin"}
    return {"status": "finished", "script": "train_x.py", "argv": [f"--seed={seed}", "--lr=1"], "config": config,
            "source_sha256": hashlib.sha256(b"x = 1\n").hexdigest(), "seed": seed, "device": "cpu, 1 threads",
            "versions": {"torch": "2.13.0", "python": "3.11"}, "world_size": 1, "gpu": "",
            "started": "2026-11-21 10:00:00", "val_losses": points, "train_time_ms": 400, "compile_seconds": 0.0,
            "recompiles": 0, "tokens_seen": 3072,
            "peak_memory_gib": 0.0, "data": {"val_000000.bin": 4000}, "data_sha256": {"val_000000.bin": "0" * 64}}


def sound_log(run):
    """log.txt of that run."""
    lines = ["text: a run"]
    for step in range(5):
        average = f"train_time:{100 * step}ms step_avg:{100 * step / max(step, 1):.2f}ms"
        lines += [f"step:{step}/4 train_loss:5.0000 {average}"] * bool(step)
        lines += [f"step:{step}/4 val_loss:{point['val_loss']:.6f} {average}"
                  for point in run["val_losses"] if point["step"] == step]
    return "x = 1\n\n" + RULE + "versions\n" + RULE + "\n".join(lines) + "\n"


def write_archive(folder, kind):
    """A track with a record of two runs, or a comparison of two pairs; (its folder, its ledger)."""
    folder = folder / "track_9_test" / "2026-11-21_X"
    arms = {"train_x": "train_x.py"} if kind == "record" else {"A": "A/train_x.py", "B": "B/train_x.py"}
    entries = [{"folder": f"{arm}_seed{seed}", "arm": arm, "seed": seed, "status": "finished", "counted": True,
                "why": ""} for seed in range(2) for arm in arms]
    for script in arms.values():
        (folder / script).parent.mkdir(parents=True, exist_ok=True)
        (folder / script).write_text("x = 1\n")
    for entry in entries:
        info, path = sound_run(entry["seed"]), folder / entry["folder"]
        path.mkdir()
        (path / "run.json").write_text(json.dumps(info))
        (path / "log.txt").write_text(sound_log(info))
        entry["sha256"] = records.log_hashes(path)
    track = {"title": "Test", "target": 3.0, "p": 0.01, "val_tokens": 1500, "ranks": 1, "hardware": "cpu", "text": "x",
             "val_data": {"val_000000.bin": {"sha256": "0" * 64, "tokens": 4000}}, "commands": ["x"], "exempt": {}}
    (folder.parent / "track.json").write_text(json.dumps(track))
    ledger = {"format": 1, "kind": kind, "claim": "reference", "runs": entries, "p": 0.01, "looks": [2],
              "arms": {arm: {"script": script, "flags": ["--lr=1"]} for arm, script in arms.items()}}
    (folder / "runs.json").write_text(json.dumps(ledger))
    parts = runs.regions(runs.read_record(folder))
    (folder / "README.md").write_text(runs.fill("# X\n\n" + "\n\n".join(map(runs.marked, parts)) + "\n", parts))
    return folder, ledger


def archive(name, kind="record"):
    """Function of a folder: the format of one file of a record or comparison."""
    def make(folder):
        folder, ledger = write_archive(folder, kind)
        first = folder / ledger["runs"][0]["folder"]
        path = {"track.json": folder.parent, "runs.json": folder}.get(name, first) / name
        content = path.read_bytes()

        def put(hostile):
            path.write_bytes(hostile)
            if path.parent == first:            # what a liar would do, too
                ledger["runs"][0]["sha256"] = {file.name: hashlib.sha256(file.read_bytes()).hexdigest()
                                               for file in (first / "run.json", first / "log.txt")}
                (folder / "runs.json").write_text(json.dumps(ledger))

        def read():
            problems, found = records.check_record(folder, guard=False), runs.collect([folder])
            assert runs.arms_table(found, 3.0) and runs.runs_table(found)
            if kind == "comparison":
                runs.verdict_text(runs.read_record(folder))
            if problems:
                raise runs.UserError(problems[0])

        def change_log(rng, content):
            words = re.split(rb"(\d+(?:\.\d+)?)", content)
            for at in rng.sample(range(1, len(words), 2), rng.choice((0, 1, 2))):
                words[at] = rng.choice((b"0", b"-1", b"nan", b"1e999", b"9" * 15, b"9" * 5000, b"", b"1.005", b"\xd9"))
            return change_bytes(rng, b"".join(words)) if rng.random() < 0.7 else b"".join(words)
        change = change_log if name == "log.txt" else lambda rng, content: change_json(rng, json.loads(content))
        return Format(content, change, path, read, runs.UserError, str, put)
    return make


# -----------------------------------------------------------------------------
# Formats: questions, and weights from elsewhere

def questions(folder):
    """A file of questions for evaluate.py, up to the streams of tokens that a model would get."""
    path = folder / "hellaswag_val.jsonl"
    rows = [{"ctx": "The dog", "endings": [" runs.", " is blue.", " was", " x"], "label": i % 4} for i in range(3)]
    sound = "".join(json.dumps(row) + "\n" for row in rows).encode()
    args, words = argparse.Namespace(evals=folder, max_items=0), sample.Tokenizer(json.loads(tokenizer_json()))

    def read():
        items = evaluate.read_items(args, [evaluate.HELLASWAG], True)
        texts = sorted({text for item in items for prompt in [*item.prompts, item.before] for text in prompt})
        encoded = evaluate.encode_all(words, texts, 1)
        documents = [evaluate.cut(document, 512) for item in items
                     for document in evaluate.item_documents(item, encoded, np.array([BOS], np.int32))]
        for stream in evaluate.pack(documents, 512):
            evaluate.fill(stream, 512, BOS)
        assert evaluate.judge(items, np.ones((len(documents), 3)))

    def change(rng, _):
        lines = [json.dumps(row).encode() for row in rows]
        at = rng.randrange(3)
        lines[at] = change_json(rng, rows[at])
        return b"\n".join(lines) + b"\n" * rng.randrange(3)
    return Format(sound, change, path, read, sample.UserError)


def evals_manifest(folder):
    """manifest.json of data/evals.py."""
    (folder / "hellaswag_val.jsonl").write_bytes(b"{}\n")
    sound = {"format": 1, "missing": [], "made_by": {}, "files": {"hellaswag_val.jsonl": {
        "sha256": hashlib.sha256(b"{}\n").hexdigest(), "size": 3, "items": 1}}}

    def read():
        found = evals.intact(folder)
        if found is None:
            raise evals.Refused("everything is fetched again")
        sum(entry.get("items", 0) for entry in found["files"].values())     # as main does
    return Format(json.dumps(sound).encode(), lambda rng, _: change_json(rng, sound), folder / "manifest.json", read,
                  evals.Refused)


def published_gpt2(name, folder):
    """config.json or model.safetensors of published weights."""
    sound = {"vocab_size": 60, "n_positions": 32, "n_layer": 1, "n_head": 2, "n_embd": 8, "layer_norm_epsilon": 1e-5,
             "bos_token_id": 59, "model_type": "gpt2", "activation_function": "gelu_new"}
    model = gpt2.GPT2(gpt2.Config(60, 32, 1, 2, 8, 1e-5, 59))
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    save_file({name: (tensor.T if name.endswith(turned) else tensor).contiguous()
               for name, tensor in model.state_dict().items()}, folder / "model.safetensors")

    def read():
        made = gpt2.read_weights(folder, gpt2.read_config(folder), torch.float32)
        made(torch.tensor([made.cfg.bos_id, 1, 2], dtype=torch.int32))
    (folder / "config.json").write_text(json.dumps(sound))
    judged = gpt2.UserError, lambda error: str(sample.UserError(error))             # which is what the scripts print
    return safetensors(folder / name, read, *judged) if name != "config.json" else Format(
        json.dumps(sound).encode(), lambda rng, _: change_json(rng, sound), folder / name, read, *judged)


# -----------------------------------------------------------------------------
# Formats: command lines

def commands(words, parse, refusals, odd=(), sentence=lambda error: " ".join(str(error).split())):
    """Function of a folder: the format of a script's command lines; `words` is a sound one."""
    def make(folder):
        state = []
        return Format(words, lambda rng, words: change_words(rng, words, odd), None, lambda: parse(state[-1]), refusals,
                      sentence, lambda argv: state.append(argv))
    return make


TEXT = make_text(70_000, seed=1)
SHARD = SimpleNamespace(num_tokens=len(TEXT), bos_id=BOS, read=lambda: TEXT)


def parse_training(argv):
    """A command line of the training script, and whether the text is enough for its steps."""
    cfg = train_gpt.parse_config(argv)
    train_gpt.check_tokens(cfg, [SHARD], train_gpt.num_steps(cfg))


def parse_text(argv):
    args = text.parse_args(argv)
    names = "tokenizer val_fraction max_doc_tokens shard_tokens exclude".split()
    given = {name: getattr(args, name) or 0 for name in names}
    text.check_options(given | {"tokenizer": "bytes", "exclude": args.exclude})


def parse_records(argv):
    """records.main(), whose commands do nothing but check what they got."""
    def nothing(args, rest=()):
        return 0
    with pytest.MonkeyPatch.context() as patch:
        for name in ("summarize", "check", "replay", "board", "new"):
            patch.setattr(records, name, nothing)
        patch.setattr(records, "compare", lambda args, rest: sys.modules["comparison"].comparison_plan(args, rest) and 0)
        patch.setattr(records, "plot", lambda runs, out: [])
        patch.setattr(records, "collect", lambda runs: [])
        patch.setattr(records.signal, "signal", nothing)
        patch.setattr(sys, "argv", ["records.py", *argv])
        sys.exit(records.main())


SOUND_TRAINING = as_flags({"preset": "tiny", "stages": SMALL_STAGES, "layers": [*map(asdict, train_gpt.TINY_LAYERS)],
                           "pack_tokens": 128, "lr": 1.1, "momentum": (0.8, 0.9), "val_tokens": 1500,
                           "num_iterations": 20, "compile": False, "out_dir": "x"})
COMMANDS = {
    "train_gpt.py": commands(SOUND_TRAINING, parse_training, train_gpt.UserError, [
        json.dumps(SMALL_STAGES * 2), "[[1e308,512,96,16,32,1.0,[[1,0,0],[1,0,0]],[0,0]]]", "2147483648"], str),
    "sample.py": commands(["--prompt=The", "--num_samples=2", "--temperature=0.5", "--top_k=3", "--stop=x", "--seed=1",
                           "--json", "--device=cpu"], sample.parse_args, sample.UserError),
    "data/text.py": commands(["a.txt", "--out=x", "--tokenizer=bytes", "--val_fraction=0.1", "--max_doc_tokens=100",
                              "--shard_tokens=1000", "--exclude=a+", "--processes=2"], parse_text, text.InputError,
                             sentence=lambda error: text.one_line(error)),
    "data/tokenizer.py": commands(["a.txt", "--vocab_size=4096", "--superbpe=3000", "--digits=1", "--out=x", "--hf",
                                   "--max_chars=1000"], tokenizer_script.parse_args, ()),
    "data/fineweb.py": commands(["3", "--variant=edu", "--jobs=2", "--out=x", "--verify"], fineweb.parse_arguments, ()),
    "chat.py": commands(["--checkpoint=x", "--prompt=Hello", "--temperature=0.5", "--top_k=3", "--seed=1", "--device=cpu"],
                        chat.parse_args, sample.UserError),
    "chat_sft.py": commands(["--checkpoint=x", "--data=y", "--epochs=2", "--lr=0.5", "--warmup=3", "--device=cpu"],
                            chat_sft.parse_args, sample.UserError),
    "chat_rl.py": commands(["--task=spellingbee", "--letters=13-16", "--steps=3", "--kl=0.5", "--std", "--samples=4"],
                           chat_rl.parse_args, sample.UserError),
    "data/chat.py": commands(["spelling:10", "a.jsonl=0.5", "--tokenizer=bytes", "--out=x", "--max_tokens=100",
                              "--val_fraction=0.1", "--show=2"], chat_data.parse_args, ()),
}
FORMATS = {"shard header": shard_header, "published shard header": published_header, "manifest.json": manifest,
           "meta.json": meta_json, "safetensors header": safetensors_header, "tokenizer.json": tokenizer,
           "meta.json to resume": resumed_meta, "meta.json to begin with": initial_meta, "encoder.json": encoder_json,
           "weights to begin with": initial_weights, "optimizer.safetensors": resumed_state, "latest": latest_file}
if evaluate:
    COMMANDS["evaluate.py"] = commands(["--tasks=val,core", "--max_items=20", "--stream_tokens=1280", "--device=cpu"],
                                       evaluate.parse_args, sample.UserError)
    COMMANDS["data/evals.py"] = commands(["--from=x", "--out=y", "--force"], evals.parse_args, ())
    FORMATS |= {"questions": questions, "manifest.json of questions": evals_manifest}
    FORMATS |= {name: partial(published_gpt2, name) for name in ("config.json", "model.safetensors")}
if records:
    for number, words in enumerate((["compare", __file__, "--b_flags=--lr=2", "--n=3", "--p=0.01", "--lr=1"],
                                    ["summarize", "a", "b", "--target=3.2"], ["replay", "a", "--n=2", "--seed=4"])):
        COMMANDS[f"records.py {words[0]}"] = commands(words, parse_records, ())
    FORMATS |= {"run.json": archive("run.json"), "log.txt": archive("log.txt"), "runs.json": archive("runs.json"),
                "track.json": archive("track.json"), "run.json of a comparison": archive("run.json", "comparison"),
                "runs.json of a comparison": archive("runs.json", "comparison")}
WHOLE = ("shard header", "manifest.json", "meta.json", "safetensors header", "tokenizer.json", "run.json", "log.txt")


def faults_of(form, inputs):
    """(how often each outcome came, fault -> the first input that led to it); a slow input ends it."""
    counts, faults = Counter(), {}
    for name in ("utf_8", "utf_16", "utf_16_le", "utf_16_be", "utf_32", "utf_32_le", "utf_32_be"):
        codecs.lookup(name)                 # json guesses them; each is imported at its first use
    form.put(form.sound)
    with contextlib.suppress(SystemExit):   # of a command line
        form.read()                         # not watched: what is imported late may take its time
    assert (outcome := judge(form.read, form.refusals, form.sentence)) == "read", outcome
    for content in inputs:
        form.put(content)
        outcome = judge(form.read, form.refusals, form.sentence)
        counts[outcome if outcome in ("read", "refused") else "faults"] += 1
        if outcome not in ("read", "refused"):
            faults.setdefault(re.sub(r"\d\d+", "N", outcome.partition(": ")[0]), (outcome, content))
        if "Slow" in outcome:
            break
    return counts, faults


def report(faults):
    """One line a fault, with the input."""
    return "\n" + "\n".join(f"{outcome}\n    {content[:300]!r}{'...' * (len(content) > 300)}"
                            for outcome, content in faults.values())


# -----------------------------------------------------------------------------
# Tests

@pytest.mark.parametrize("name", [*FORMATS, *COMMANDS])
def test_changed(name, folder, record_property):
    """COUNT changed inputs of each format that strangers send, half of that of others, a quarter of a command."""
    form, rng = (FORMATS | COMMANDS)[name](folder), random.Random(f"{SEED} {name}")
    count = COUNT // (1 if name in WHOLE else 2 if name in FORMATS else 4)
    counts, faults = faults_of(form, (form.change(rng, form.sound) for _ in range(count)))
    record_property("counts", dict(counts))
    print(f"{name}: {dict(counts)}")
    assert not faults, report(faults)
    assert counts["read"] and counts["refused"] and sum(counts.values()) == count


# ASCII, Latin, and of the rest what is odd; for st.text hypothesis would first make tables of all, which takes 4 s
LETTERS = [*map(chr, range(0x180)), *"\u0301\u0661\u200b\u2028\u202e\u6f22\ufeff\uffff\U0001f600\U0010ffff"]
WORDS = st.lists(st.sampled_from(LETTERS), max_size=20).map("".join)
JUNK = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | WORDS, lambda inner: (
    st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4)), max_leaves=8)


def like(value):
    """A strategy of values of the same structure, parts of which are replaced by anything, or left out."""
    if isinstance(value, dict):
        inner = {key: like(item) for key, item in value.items()}
        return st.fixed_dictionaries(inner) | st.fixed_dictionaries({}, optional=inner) | JUNK
    if isinstance(value, list) and value:
        return st.tuples(*map(like, value[:12])).map(list) | st.lists(like(value[0]), max_size=3) | JUNK
    return st.just(value) | st.just(value) | st.just(value) | JUNK


# the strategy for the hundreds of fields of encoder.json would take longer than the rest; a hash decides what is one
MADE_UP = {name: make for name, make in FORMATS.items() if ".json" in name and name != "encoder.json"}


@pytest.mark.parametrize("name", MADE_UP)
def test_made_up(name, folder):
    """Objects that hypothesis composes of a format's fields and of anything."""
    form = MADE_UP[name](folder)
    faults_of(form, ())

    @seed(0)
    @settings(max_examples=COUNT // 20, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(like(json.loads(form.sound)))
    def check(value):
        form.put(json.dumps(value).encode())
        assert (outcome := judge(form.read, form.refusals, form.sentence)) in ("read", "refused"), outcome
    check()


@pytest.mark.parametrize("name", ("shard header", "published shard header"))
def test_made_up_shards(name, folder):
    """Shards of any header words and length: `read` asserts that an accepted one is what its header says."""
    form, outcomes = FORMATS[name](folder), Counter()
    faults_of(form, ())
    words, small = st.integers(-2 ** 31, 2 ** 31 - 1), st.integers(0, 300)
    odd = st.dictionaries(st.sampled_from((0, 1, 2, 2, 3, 4, 5, 8, 77)), words | small, max_size=3)

    @seed(0)
    @settings(max_examples=COUNT // 8, deadline=None, database=None)
    @given(odd, st.integers(0, 1400), st.booleans())
    def check(changes, length, fitting):
        header = np.frombuffer(form.sound, "<i4", 256).copy()
        header[2] = length // 2 if fitting else header[2]
        for word, value in changes.items():
            header[word] = value
        form.put(header.tobytes() + form.sound[1024:1024 + 2 * (length // 2 if fitting else 200)])
        outcomes[outcome := judge(form.read, form.refusals, form.sentence)] += 1
        assert outcome in ("read", "refused"), outcome
    check()
    assert outcomes["read"] and outcomes["refused"]


@pytest.mark.parametrize("name", COMMANDS)
def test_made_up_commands(name, folder):
    """Command lines of any words that a process can be given."""
    form = COMMANDS[name](folder)
    faults_of(form, ())
    names = st.sampled_from([word.partition("=")[0] for word in form.sound])
    letters = LETTERS[1:] + [*map(chr, range(0xdc80, 0xdd00))]      # the latter is how bytes that are no text are held
    values = st.lists(st.sampled_from(letters), max_size=12).map("".join) | JUNK.map(json.dumps)

    @seed(0)
    @settings(max_examples=COUNT // 20, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(st.lists(st.sampled_from(form.sound) | values | st.builds("{}={}".format, names, values), max_size=6))
    def check(argv):
        form.put([word.replace("\0", "") for word in argv])
        assert (outcome := judge(form.read, form.refusals, form.sentence)) in ("read", "refused"), (outcome, argv)
    check()


SMALL_FILES = [name for name in FORMATS if "shard" not in name]


@pytest.mark.parametrize("name", SMALL_FILES)
def test_gigabytes_are_refused_unread(name, folder):
    """A file with a sound beginning and gigabytes of zeros, which take no space on the disk."""
    form = FORMATS[name](folder)
    faults_of(form, ())
    os.truncate(form.path, 5 << 28)
    outcome, grown = judge(form.read, form.refusals, form.sentence), peak()
    assert outcome == "refused" and grown < 300 << 20, (outcome, grown)


def test_shards_of_gigabytes_are_not_read_into_memory(folder):
    tokens = (3 << 30) // 2 - 512
    path = write_shard(folder / "train_000000.bin", [BOS], w2=tokens)
    os.truncate(path, 1024 + 2 * tokens)
    assert train_gpt.read_header(path).read().size == tokens and peak() < 300 << 20


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "optimizer.safetensors"])    # see find_fault
def test_what_is_not_a_file_is_not_waited_for(name, folder):
    """A pipe without a writer, a device without an end, a folder, and a link that leads nowhere."""
    form = FORMATS[name](folder)
    faults_of(form, ())
    links = [lambda path, target=target: path.symlink_to(target) for target in ("/dev/zero", "gone")]
    for make in (os.mkfifo, Path.mkdir, *links):
        form.path.unlink() if form.path.is_symlink() or not form.path.is_dir() else form.path.rmdir()
        make(form.path)
        assert (outcome := judge(form.read, form.refusals, form.sentence)) in ("read", "refused"), outcome


# -----------------------------------------------------------------------------
# What was found: the smallest input of each fault that was mended

def with_json(**changes):
    """Function of sound JSON that gives it with changes; a__b=... changes field b of field a."""
    def change(content):
        value = json.loads(content)
        for name, new in changes.items():
            *folders, last = name.split("__")
            holder = value
            for key in folders:
                holder = holder[int(key) if isinstance(holder, list) else key]
            holder[last] = new
        return json.dumps(value).encode()
    return change


def with_words(**words):
    """Function of a sound shard that gives it with other header words."""
    def change(content):
        header = np.frombuffer(content, "<i4", 256).copy()
        for word, value in words.items():
            header[int(word[1:])] = value
        return header.tobytes() + content[1024:]
    return change


def with_header(**changes):
    """Function of sound weights that gives them with changes to the header."""
    def change(content):
        size = struct.unpack("<Q", content[:8])[0]
        header = with_json(**changes)(content[8:8 + size])
        return struct.pack("<Q", len(header)) + header + content[8 + size:]
    return change


FOUND = [
    # a begin-of-document id outside the vocabulary, a vocabulary below zero or beyond the width: accepted
    ("shard header", with_words(w4=0)), ("shard header", with_words(w3=-5)), ("shard header", with_words(w3=70_000)),
    # RecursionError in three readers; a name with folders, a size that is no number: accepted, and a TypeError later
    ("manifest.json", lambda _: b"[" * 100_000),
    ("manifest.json", lambda content: content.replace(b"train_000000.bin", b"train_/../../x")),
    ("manifest.json", with_json(tokenizer__sha256="\33[31m", tokenizer__name="\33[31m" + "A" * 10_000)),
    ("manifest.json", lambda content: content.replace(b'"tokens": 300', b'"tokens": "x"')),
    # OverflowError in set_stage, numbers and windows that no tensor holds, gigabytes for weights of kilobytes
    ("meta.json", with_json(config__stages__1__long=10 ** 400)), ("meta.json", with_json(config__lr=10 ** 400)),
    ("meta.json", with_json(config__final_windows=[16, 2 ** 40])),
    ("meta.json", with_json(config__bigram_rows=2 ** 24)),
    ("meta.json", with_json(config__bos_id={"x" * 90: 10_000 * [0]})),
    # a line of 100,000 letters; truth values and whole numbers as weights
    ("safetensors header", with_header(**{"x" * 100_000: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})),
    # a pattern that tiktoken ends the process for, an id that is no whole number
    ("tokenizer.json", with_json(pattern=r"(a|a)*\1b")), ("tokenizer.json", with_json(bos_id=258.0)),
    # OverflowError in round; streams of terabytes; two lines that change the colour of the terminal
    ("train_gpt.py", lambda words: [*words, "--stages=[[1e308,512,96,16,32,1,[[1,0,0],[1,0,0]],[0,0]]]"]),
    ("train_gpt.py", lambda words: [*words, f"--val_stream_tokens={2 ** 40}"]),
    ("train_gpt.py", lambda words: [*words, "--preset=a\nb\33[31m"]),
    # RecursionError in gpt2_tokenizer, TypeError in windows_before
    ("encoder.json", lambda _: b"[" * 100_000), ("meta.json to begin with", with_json(stage="x")),
    ("meta.json to begin with", with_json(stage=2)),
    # argparse reads --name=-- as an empty list
    ("sample.py", lambda words: [*words, "--num_samples=--"]),
    ("data/text.py", lambda words: [*words, "--processes=--"]),
    ("data/tokenizer.py", lambda words: [*words, "--digits=--"]),
    ("data/fineweb.py", lambda words: [*words, "--jobs=--"]),
    ("data/fineweb.py", lambda words: [*words, "--variant=--"]),
    ("data/fineweb.py", lambda words: [*words, "--x\n\33[31m"]),
    ("data/evals.py", lambda words: [*words, "--from=--"]),
    *((f"records.py {name}", lambda words, flag=flag: [*words, flag]) for name, flag in (
        ("compare", "--p=--"), ("compare", "--b_flags=--"), ("summarize", "--target=--"), ("replay", "--ranks=--"))),
]


@pytest.mark.parametrize("case", range(len(FOUND)))
def test_found(case, folder):
    """Each refused with one line."""
    name, change = FOUND[case]
    form = (FORMATS | COMMANDS)[name](folder)
    faults_of(form, ())
    form.put(change(form.sound))
    assert judge(form.read, form.refusals, form.sentence) == "refused"


def test_steps_are_not_counted_one_by_one(folder):
    """It took for ever to add up the tokens of 2^60 steps."""
    form = COMMANDS["train_gpt.py"](folder)
    form.put([*form.sound, f"--num_iterations={2 ** 60}"])
    assert judge(form.read, form.refusals, str) in ("read", "refused")


def test_a_list_of_names_in_a_manifest_is_none(folder):
    (folder / "manifest.json").write_text(json.dumps({"files": [1, 2], "made_by": {}}))
    assert judge(lambda: text.check_out_dir(folder, {}, False), ()) == "read"


def test_a_tokenizer_of_shards_without_ranks_is_named(folder):
    """Its hash may fit all the same; the KeyError came after the first validation."""
    short = b'{"ranks":["A"],"special_tokens":{},"bos_id":256}'
    for content in (b"{}", b"[]", short, b"[" * 100_000, tokenizer_json([b"a"])):
        (folder / "tokenizer.json").write_bytes(content)
        path = write_shard(folder / "train_000000.bin", [BOS], sha256=hashlib.sha256(content).digest())
        shard = train_gpt.read_header(path)
        assert judge(lambda: train_gpt.read_tokenizer(shard), train_gpt.UserError) == "refused"


@pytest.mark.parametrize("pattern", [sample.GPT2_PATTERN, sample.gpt4_pattern(2), sample.gpt4_pattern(2, joined=True)])
def test_blanks_that_overflow_the_pattern(pattern):
    """Three million of them and a letter made tiktoken panic."""
    words = json.loads(tokenizer_json()) | {"pattern": pattern}
    assert len(sample.Tokenizer(words).encode(" " * 3_000_000 + "x")) == 3_000_001


@pytest.mark.parametrize("ending", (".jsonl", ".jsonl.gz"))
def test_a_line_without_end_is_left_out(ending, folder, monkeypatch):
    """A packed line can unfold to any length: it is passed over in pieces, and what follows it is read."""
    monkeypatch.setattr(text, "LINE_BYTES", 1000)
    monkeypatch.setattr(text, "TASK_BYTES", 500)
    rows = [json.dumps({"text": letter * size}) for letter, size in (("a", 20), ("b", 5000), ("c", 30), ("d", 980))]
    path, skipped = folder / f"x{ending}", {}
    (gzip.open if ending.endswith("gz") else open)(path, "wb").writelines(row.encode() + b"\n" for row in rows)
    found = [document for _, units in text.plan_tasks(text.find_files([path]), "text")
             for unit in units for _, document in text.read_documents(unit, "text", skipped)]
    assert found == ["a" * 20, "c" * 30, "d" * 980] and [count for count, _ in skipped.values()] == [1], skipped


# -----------------------------------------------------------------------------
# The same through the scripts, as processes

LOADS_TORCH = ("train_gpt.py", "sample.py", "evaluate.py")

def test_processes(folder, fast_run):
    """Exit code 2, one line, nothing written: some inputs of each script, on both cores."""
    path, _ = checkpoint(folder)
    (folder / "train_000000.bin").write_bytes(with_words(w3=-5)(shard_header(folder).sound))
    (folder / "val_000000.bin").write_bytes((folder / "train_000000.bin").read_bytes())
    (path / "meta.json").write_bytes(b"[" * 100_000)
    (folder / "manifest.json").write_bytes(b"[" * 100_000)
    here, shards = f"--out_dir={folder / 'logs'}", small_flags(folder)
    commands = [
        ["train_gpt.py", here, *shards], ["train_gpt.py", here, f"--stages={'[' * 100_000}", "--lr=\33[31m\n"],
        ["sample.py", f"--checkpoint={path}"], ["sample.py", "--num_samples=--"], ["sample.py", "--prompt=\udcff"],
        ["data/text.py", "--exclude=(", str(path / "meta.json"), f"--out={folder / 'o'}"],
        ["data/text.py", str(path / "meta.json"), f"--out={folder / 'o'}"],
        ["data/fineweb.py", "0", f"--from={folder / 'run'}", f"--out={folder}"], ["data/fineweb.py", "9" * 5000],
        ["sample.py", f"--checkpoint={'A' * 5000}"], ["data/fineweb.py", f"--from={folder}", f"--out={'A' * 5000}"]]
    if evaluate:
        commands += [["evaluate.py", "--tasks=val", f"--checkpoint={path}"],
                     ["data/evals.py", "--from=/dev/null", f"--out={folder / 'o'}"]]
    if records:
        (folder / "run.json").write_bytes(b"[" * 100_000)
        commands += [["records/records.py", "summarize", str(folder)], ["records/records.py", "replay", str(folder)]]
    before = sorted((str(file), file.stat().st_size) for file in folder.rglob("*"))

    def run(words):
        command = [sys.executable, str(ROOT / words[0]), *words[1:]]
        start = fast_run if words[0] in LOADS_TORCH else subprocess.run
        done = start(command, capture_output=True, timeout=60, cwd=folder, env=os.environ | {
            "PYTHONDONTWRITEBYTECODE": "1", "MPLCONFIGDIR": str(folder)})
        line, start = done.stderr.decode(), Path(words[0]).name + ": "
        good = line.startswith(start) and len(line) < LINE and line[:-1].isprintable() and line[-1] == "\n"
        return None if good and done.returncode == 2 and not done.stdout else (words[0], str(words[1:])[:200], done)
    with ThreadPoolExecutor(2) as pool:
        bad = [fault for fault in pool.map(run, commands) if fault]
    assert not bad, bad
    assert sorted((str(file), file.stat().st_size) for file in folder.rglob("*")) == before
