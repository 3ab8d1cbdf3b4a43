"""Every reader of the project against files and command lines that were damaged, or made to harm.

A seeded mutator changes sound input (flipped bits, cuts, other types, huge numbers, deep nesting, keys that come twice,
NaN, control characters, bad UTF-8, very long strings), and hypothesis makes up whole objects. Each of COUNT inputs a
format must end in a correct read or in the refusal that the script prints as one line with exit code 2: no other
exception, no more than SECONDS, no more than MEMORY bytes, no file written, no code run, no connection opened. "Correct"
is checked by what each `read` below does with what it got. Files that claim or have gigabytes are refused unread. At the
end some inputs go through each script as a process. Inputs that once broke a reader stand in FOUND, one by one.

Run: python -m pytest tests/test_hostile.py; with more inputs: HOSTILE_COUNT=50000 HOSTILE_SEED=1 python -m pytest ...
"""
import argparse
import base64
import contextlib
import hashlib
import importlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BOS, ROOT, SMALL_STAGES, VOCAB, as_flags, make_text, small_flags, tokenizer_json, write_shard
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

sys.path[:0] = [str(ROOT / "data"), str(ROOT / "records")]

import fineweb  # noqa: E402
import sample  # noqa: E402
import text  # noqa: E402
import train_gpt  # noqa: E402

COUNT, SEED = int(os.environ.get("HOSTILE_COUNT", 2000)), os.environ.get("HOSTILE_SEED", "0")
SECONDS, MEMORY, LINE = 5, 1 << 30, 1200    # for one input: at most so long, so many bytes more, and such a refusal
HELD = 4 << 30                              # what an allocation may ask for before the machine that tests is in danger


def optional(name):
    """A module of the project, or None where it is not there yet."""
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


evaluate, gpt2, evals, runs, records = map(optional, ("evaluate", "gpt2", "evals", "runs", "records"))

# -----------------------------------------------------------------------------
# What a reader may not do

SEEN = None                                 # a list while a reader is watched
HARMFUL = re.compile(r"(exec|compile|marshal\.loads|pickle\.find_class|import|code\.__new__|ctypes\.\w+|os\.(system|exec|"
                     r"spawn|posix_spawn|fork|forkpty|startfile|mkdir|remove|rename|rmdir|link|symlink|truncate|chmod|"
                     r"chown|utime|putenv)|subprocess\.Popen|socket\.\w+|shutil\.\w+|tempfile\.\w+|webbrowser\.open)")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def audit(event, args):
    """Notes what the interpreter reports while a reader is watched; such a hook cannot be taken out again."""
    if SEEN is not None and (HARMFUL.fullmatch(event) or event == "open" and args[2] & WRITING):
        SEEN.append(f"{event} {str(args[0])[:200]}")


sys.addaudithook(audit)


class Slow(BaseException):
    """An input took more than SECONDS."""


def too_slow(*_):
    raise Slow


@contextlib.contextmanager
def watched():
    """Yields a list that says afterwards what the block did that no reader may."""
    global SEEN
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")                     # the peak begins here
    before, found = memory("VmRSS"), []
    handler = signal.signal(signal.SIGALRM, too_slow)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    SEEN = found
    try:
        yield found
    finally:
        SEEN = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if (grown := memory("VmHWM") - before) > MEMORY:
            found.append(f"{grown >> 20} MiB of memory")


def memory(name):
    """Bytes, by a line of /proc/self/status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name + ":"))


@pytest.fixture(autouse=True)
def held():
    """Takes more than HELD from nobody: allocations beyond fail, and so does the test."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + HELD, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


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
       "Infinity", "-Infinity", *(str(sign * 2 ** bits + more) for bits in (7, 15, 31, 32, 62, 63, 64) for sign in (1, -1)
                                  for more in (-1, 0)),
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
        junk = rng.choice((rng.randbytes(size), b"\xff" * size, b"\0" * size, b"\x80\xfe\xc0", b"9" * size, b'"', b"\n"))
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
    words = [*odd, "", "-", "--", "=", "--x", "0", "-1", "1.5", "nan", "inf", "1e999", "9" * 5000, str(2 ** 63), "1_0", "٣",
             "true", "../..", "/dev/null/x", "\udcff", "\x1b[31m", "a\nb", "é漢😀", "A" * 5000, "[" * 5000, "[[]]", "{}",
             ",", "1,", ",,", "%s", "*", "[!", "~", "None", "\u202e"]
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
    put: object                             # of input: lays it where `read` finds it
    read: object                            # reads it and asserts that what came out is sound
    refusals: tuple                         # the exceptions that the script prints as one line
    sentence: object = lambda error: " ".join(str(error).split())       # that line


def put_file(path):
    """Function that writes bytes to the path, in place."""
    def put(content):
        path.write_bytes(content)
    return put


def shard_header(folder):
    """The training script's reader of shards."""
    path = folder / "train_000000.bin"
    write_shard(path, make_text(300, seed=1))
    cfg, machine = train_gpt.parse_config(small_flags(folder)), train_gpt.Machine(torch.device("cpu"), 0, 1, "cpu")

    def read():
        shards, _ = train_gpt.open_shards(str(path), str(path))
        shard = shards[0]
        assert shard.num_tokens * shard.width + 1024 == path.stat().st_size and shard.width in (2, 4)
        assert 0 <= shard.bos_id < shard.vocab_size <= 256 ** shard.width
        train_gpt.resolve_config(cfg, machine, shard)
        for ids, start, end in train_gpt.documents(shards):
            assert ids[start] == shard.bos_id and 0 <= start < end <= shard.num_tokens
        train_gpt.fill_slot([(shard.read(), 0, shard.num_tokens)], 512, shard.bos_id, shard.vocab_size)

    def change(rng, content):
        words = np.frombuffer(content, "<i4", 256).copy()
        for _ in range(rng.choice((1, 1, 2))):
            words[rng.choice((0, 1, 2, 3, 4, 5, rng.randrange(256)))] = rng.choice(
                (0, 1, -1, 2, 4, 8, 255, 256, 257, 2 ** 16, 2 ** 31 - 1, -2 ** 31, rng.randrange(-2 ** 31, 2 ** 31)))
        return change_bytes(rng, words.tobytes() + content[1024:], high=1100) if rng.random() < 0.3 else \
            words.tobytes() + content[1024:]
    return Format(path.read_bytes(), change, put_file(path), read, train_gpt.UserError, str)


def published_header(folder):
    """The reader of shards that data/fineweb.py fetches."""
    path, never = folder / "fineweb_train_000001.bin", fineweb.threading.Event()
    write_shard(path, make_text(300, seed=1), w3=0, w4=0, w5=0, sha256=bytes(32))
    form = shard_header(folder)

    def read():
        entry = fineweb.measure(path, path.name, never)
        assert entry["size"] == path.stat().st_size == 1024 + 2 * entry["tokens"] and entry["documents"] >= 0
    return replace(form, sound=path.read_bytes(), put=put_file(path), read=read, refusals=fineweb.Refused,
                   sentence=fineweb.one_line)


def sound_manifest():
    entry = {"sha256": "0" * 64, "size": 1024, "tokens": 300, "documents": 9, "text_bytes": None}
    return {"format": 1, "files": {f"{name}_000000.bin": dict(entry) for name in ("train", "val")},
            "made_by": {"script": "text.py", "options": {"seed": 0}}, "tokenizer": {
                "name": "gpt2", "sha256": fineweb.GPT2_TOKENIZER_SHA256, "vocab_size": 50257, "bos_id": 50256}}


def manifest(folder):
    """manifest.json in an output folder of data/fineweb.py and data/text.py, or in that of a source."""
    shutil.rmtree(folder / "out", ignore_errors=True)
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
                  put_file(out / "manifest.json"), read, fineweb.Refused, fineweb.one_line)


def checkpoint(folder):
    """(checkpoint folder, its meta.json as an object) of a small model."""
    cfg = replace(train_gpt.PRESETS["tiny"], vocab_size=VOCAB, bos_id=BOS, attention="plain", compile=False, model_dim=32,
                  head_dim=16, mlp_dim=16, gate_dim=4, bigram_rows=16, bigram_signs=8, final_windows=(16, 32))
    path = folder / "run" / "checkpoint" / "step_000007"
    path.mkdir(parents=True)
    save_file(train_gpt.GPT(cfg).state_dict(), path / "model.safetensors")
    (path / "tokenizer.json").write_bytes(tokenizer_json())
    (path.parent / "latest").write_text(path.name)
    source = hashlib.sha256((ROOT / "train_gpt.py").read_bytes()).hexdigest()
    meta = {"format": 1, "script": "train_gpt", "source_sha256": source, "config": asdict(cfg), "step": 7, "stage": 1,
            "val_loss": 1.5, "tokenizer_sha256": hashlib.sha256(tokenizer_json()).hexdigest()}
    (path / "meta.json").write_text(json.dumps(meta))
    return path, json.loads(json.dumps(meta))


def generate(model, tokenizer):
    """What a model that could be loaded is for: two tokens after a prompt."""
    engine = sample.Engine(model, tokenizer.vocab_size, sample.Draw(), max_tokens=8)
    made = list(engine.steps([[tokenizer.bos_id, *tokenizer.encode("é")]], [(0, 0)], 2))
    assert len(made) == 2 and all(0 <= token < tokenizer.vocab_size for (token,), _ in made)


def meta_json(folder):
    """meta.json of a checkpoint, up to the first tokens of its model."""
    path, meta = checkpoint(folder)

    def read():
        model, tokenizer, said = sample.load_checkpoint(path, "cpu")
        assert model.cfg.vocab_size >= tokenizer.vocab_size and said["script"] == "train_gpt"
        generate(model, tokenizer)

    odd = [json.dumps(meta["config"]["layers"] * 500), json.dumps(meta["config"]["stages"] * 2), '"os"', '"fp32"', "96"]
    return Format(json.dumps(meta).encode(), lambda rng, _: change_json(rng, meta, odd), put_file(path / "meta.json"),
                  read, sample.UserError)


def safetensors_header(folder):
    """The header of model.safetensors."""
    path, meta = checkpoint(folder)
    path, content = path / "model.safetensors", (path / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:8 + size])
    model = sample.build_model(train_gpt, meta, "fp32", len(content))
    odd = [json.dumps(name) for name in "F64 F16 BF16 I64 I32 U8 BOOL F8_E4M3 F4 C64 f32".split()] + [
        "[257,32]", "[32,257]", "[8224]", "[0]", "[18446744073709551615,2]", "[4294967296,4294967296]", "[0,4]", "[4,0]"]

    def read():
        sample.load_weights(model, path, "")
        assert all(tensor.shape == model.state_dict()[name].shape for name, tensor in model.state_dict().items())

    def change(rng, content):
        kind = rng.random()
        if kind < 0.2:
            return change_bytes(rng, content, high=rng.choice((8 + size, None)))
        text = change_json(rng, header, odd)
        length = len(text) if kind < 0.9 else rng.choice((0, 1, size, 2 ** 31, 2 ** 63, 2 ** 64 - 1, 100_000_001))
        return struct.pack("<Q", length) + text + content[8 + size:]
    return Format(content, change, put_file(path), read, sample.UserError)


def tokenizer(folder):
    """tokenizer.json beside a checkpoint and beside shards, named by its hash in both."""
    path, meta = checkpoint(folder)
    file, shard, state = path / "tokenizer.json", folder / "train_000000.bin", {}
    merges = json.loads(tokenizer_json([*(bytes([i]) for i in range(256)), b"th", b"the"]))
    sound = merges | {"pattern": r"'s| ?\p{L}+| ?\p{N}+|\s+"}

    def put(content):
        state["meta"] = meta | {"tokenizer_sha256": hashlib.sha256(content).hexdigest()}
        file.write_bytes(content)
        (folder / "tokenizer.json").write_bytes(content)
        state["shard"] = train_gpt.Shard(str(shard), 9, 259, 258, 2, state["meta"]["tokenizer_sha256"])

    def read():
        found = sample.read_tokenizer(path, state["meta"])
        for prompt in ("the 漢 9 's\n\n", " " * 300, "a" * 5000):
            ids = found.encode(prompt)
            assert all(0 <= token < len(found.ranks) for token in ids), ids
            if not found.encoding:          # a pattern need not take in everything
                assert b"".join(map(found.token_bytes, ids)) == prompt.encode()
        assert type(found.bos_id) is int and len(found.ranks) <= found.bos_id < found.vocab_size
        train_gpt.prefix_tokens(json.loads(train_gpt.read_tokenizer(state["shard"])), 259)
    odd = [json.dumps(pattern) for pattern in ("(", "(a+)+$", "(?=(a+))*", r"(\w+\s*)+:", "(?<", r"\p{Nope}", "a{1000}" * 50,
                                               "x*", "", r"(a|a)*\1b")]
    return Format(json.dumps(sound).encode(), lambda rng, _: change_json(rng, sound, odd), put, read,
                  (sample.UserError, train_gpt.UserError))


def latest_file(folder):
    """The file that names the newest checkpoint of a run."""
    path, _ = checkpoint(folder)
    (folder / "run" / "elsewhere").mkdir()

    def read():
        assert sample.find_checkpoint(folder).parent == sample.resolve_checkpoint(folder / "run").parent == path.parent
    names = [b"../elsewhere", b"..", b".", b"/tmp", b"step_000007/../../elsewhere", b"step_000007/", b"\0", b"~", b"C:\\"]
    return Format(b"step_000007", lambda rng, content: rng.choice(names) if rng.random() < 0.3 else change_bytes(
        rng, content), put_file(path.parent / "latest"), read, sample.UserError)


FORMATS = {"shard header": shard_header, "published shard header": published_header, "manifest.json": manifest,
           "meta.json": meta_json, "safetensors header": safetensors_header, "tokenizer.json": tokenizer,
           "latest": latest_file}


def faults_of(form, inputs):
    """(how often each outcome came, fault -> the first input that led to it)"""
    counts, faults = Counter(), {}
    form.put(form.sound)
    first = judge(form.read, form.refusals, form.sentence)      # also imports what is imported late
    first = judge(form.read, form.refusals, form.sentence)
    assert first == "read", first
    for content in inputs:
        form.put(content)
        outcome = judge(form.read, form.refusals, form.sentence)
        counts[outcome if outcome in ("read", "refused") else "faults"] += 1
        if outcome not in ("read", "refused"):
            faults.setdefault(re.sub(r"\d\d+", "N", outcome.partition(": ")[0]), (outcome, content))
    return counts, faults


def report(faults):
    """One line a fault, with the input."""
    return "\n" + "\n".join(f"{outcome}\n    {content[:300]!r}{'...' * (len(content) > 300)}"
                            for outcome, content in faults.values())


@pytest.mark.parametrize("name", FORMATS)
def test_mutated(name, tmp_path, record_property):
    """COUNT changed inputs of each format."""
    form, rng = FORMATS[name](tmp_path), random.Random(f"{SEED} {name}")
    counts, faults = faults_of(form, (form.change(rng, form.sound) for _ in range(COUNT)))
    record_property("counts", dict(counts))
    print(f"{name}: {dict(counts)}")
    assert not faults, report(faults)
    assert counts["read"] and counts["refused"] and sum(counts.values()) == COUNT
