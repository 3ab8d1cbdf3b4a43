"""data/text.py on random folders of all kinds of files: each file is counted once, and the last line can be followed.

Proves: for any folder the counts of the summary add up to the files in it; what is printed is one printable line each;
the last one is a command that trains, or says what is missing, and a refusal is one line that leaves nothing behind.
Against: os.walk, and an independent count of the packs that a run reads; the printed command is run by the trainer.
Run: python -m pytest tests/test_folders.py; FOLDER_COUNT=200 takes that many folders, larger ones, too (minutes)
"""

import gzip
import io
import json
import lzma
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_text import run_here

import train_gpt

ROOT = Path(__file__).resolve().parents[1]

FOLDER_COUNT = int(os.environ.get("FOLDER_COUNT", "30"))
LONG_RUN = FOLDER_COUNT > 30
REMEDIES = ("give", "choose", "known kinds", "leave out", "reads it", "name", "--max_doc_tokens", "no usable text")
WORDS = "the a old new cat dog house river stone sees finds keeps under over near and then slowly never again".split()
FOREIGN = {"latin-1": "Größe für Häuser, déjà vu près des châteaux. ", "cp1251": "Это просто текст о погоде и реке. ",
           "gb18030": "我们在这里看到一条河, 他是我的人。", "shift_jis": "これはとてもながいかわのはなしでした。",
           "utf-16": "wide words of a river and a stone. ", "utf-16-le": "wide words without a mark. "}


def prose(rng, size):
    """About `size` bytes of words, lines and paragraphs."""
    line = " ".join(rng.choices(WORDS, k=min(2000, 1 + size // 5)))
    parts = [line[i:i + 70] for i in range(0, max(len(line), 1), 70)]
    content = "".join(part + rng.choice(["\n", "\n", "\n\n", ". "]) for part in parts)
    return (content * (1 + size // len(content)))[:max(size, 1)]


def json_lines(rng, size):
    rows, left = [], size
    while left > 0:
        rows.append(json.dumps({"text": prose(rng, rng.randrange(1, 900)), "n": left}))
        left -= len(rows[-1])
    return "\n".join(rows).encode()


def damaged_lines(rng, size):
    return json_lines(rng, size) + b'\n{"text": 5}\n{"other": 1}\nnot json\n["text"]\n{"text": "half \\ud83d"}\n{"te'


def parquet(rng, size):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [prose(rng, rng.randrange(1, 500)) for _ in range(1 + size // 300)]
    texts[0] = rng.choice([None, texts[0]])
    column = pa.array(texts, pa.string())
    column = rng.choice([lambda: column, column.dictionary_encode, lambda: column.cast(pa.string_view()),
                         lambda: column.cast(pa.large_string()), lambda: pa.nulls(len(texts)),
                         lambda: pa.array(range(len(texts)))])()
    sink = io.BytesIO()
    pq.write_table(pa.table({rng.choice(["text", "text", "text", "body"]): column}), sink, row_group_size=50)
    content = sink.getvalue()
    return content if rng.random() < 0.8 else content[:len(content) // 2]


def cut(content):
    return content[:2 * len(content) // 3]


def with_zeros(rng, size):
    content = bytearray(prose(rng, size).encode())
    for _ in range(rng.choice([1, 1 + size // 3])):
        content[rng.randrange(len(content))] = 0
    return bytes(content)


def foreign(rng, size):
    encoding = rng.choice(sorted(FOREIGN))
    return (FOREIGN[encoding] * (1 + size // 40)).encode(encoding, "replace")


def stories(rng, size):
    return "\n<|endoftext|>\n".join(prose(rng, 300) for _ in range(1 + size // 300)).encode()


def plain(rng, size):
    return prose(rng, size).encode()


CONTENTS = {  # ending -> makers of content
    ".txt": (plain, plain, plain, plain, foreign, with_zeros, stories, lambda rng, size: rng.randbytes(size),
             lambda rng, size: b"", lambda rng, size: b" \n" * min(size, 50)),
    ".md": (plain,), ".py": (plain,), ".HTML": (plain,), ".rst": (plain, foreign),
    ".jsonl": (json_lines, damaged_lines), ".json": (json_lines, lambda rng, size: b'{\n "text": "x"\n}\n'),
    ".jsonl.gz": (lambda rng, size: gzip.compress(json_lines(rng, size)), lambda rng, size: cut(
        gzip.compress(json_lines(rng, size))), lambda rng, size: b"not packed"),
    ".json.gz": (lambda rng, size: gzip.compress(damaged_lines(rng, size)),),
    ".txt.gz": (lambda rng, size: gzip.compress(plain(rng, size)), lambda rng, size: gzip.compress(foreign(rng, size))),
    ".txt.xz": (lambda rng, size: lzma.compress(plain(rng, size)), lambda rng, size: b"\xfd7zXZ\0damage"),
    ".parquet": (parquet,), ".csv": (plain,), ".jpg": (lambda rng, size: rng.randbytes(min(size, 100)),), "": (plain,),
}
NAMES = ["plain", "with blank", "[a-z]*", "quote's \"x\"", "$(touch x)", "-dash", "new\nline", "\33[31mred", "Größe",
         "東京", os.fsdecode(b"caf\xe9"), "~", "a" * 100]


def make_folder(root, seed):
    """Files of all kinds below root/<odd name>; (the folder, how many files a user counts in it)."""
    rng = random.Random(seed)
    folder = root / rng.choice(NAMES)
    many = rng.random() < 0.1
    number = rng.randrange(200, 2000 if LONG_RUN else 300) if many else rng.randrange(1, 40)
    largest = 2_000 if many else 3_000_000 if LONG_RUN else 100_000
    places = [folder, folder / "sub", folder / rng.choice(NAMES), folder / ".git", folder / "node_modules" / "x",
              folder / "deep" / "er"]
    only_one_kind = rng.random() < 0.3
    for i in range(number):
        place = folder if only_one_kind else rng.choices(places, (8, 3, 3, 1, 1, 3))[0]
        place.mkdir(parents=True, exist_ok=True)
        ending = ".txt" if only_one_kind else rng.choice(sorted(CONTENTS))
        make = plain if only_one_kind else rng.choice(CONTENTS[ending])
        size = int(10 ** rng.uniform(0, np.log10(largest)))
        hidden = "." if rng.random() < 0.03 else ""
        (place / f"{hidden}{rng.choice(NAMES)}{i}{ending}").write_bytes(make(rng, size))
    folder.mkdir(exist_ok=True)
    expected = 0
    if not only_one_kind:
        expected += make_links(rng, root, folder)
    return folder, expected + sum(len(files) for _, _, files in os.walk(folder))


def make_links(rng, root, folder):
    """Links, pipes and closed folders; how many files they lead to outside of `folder`."""
    outside = 0
    if rng.random() < 0.5:
        (root / "elsewhere").mkdir()
        (root / "elsewhere" / "far.txt").write_bytes(plain(rng, 2000))
        (folder / "link").symlink_to(root / "elsewhere")
        (root / "elsewhere" / "back").symlink_to(folder)
        outside = 1
    if rng.random() < 0.5:
        (root / "blobs").mkdir()
        (root / "blobs" / "0a1b2c").write_bytes(json_lines(rng, 3000))
        (folder / "cached.jsonl").symlink_to(root / "blobs" / "0a1b2c")
        (folder / "again.jsonl").symlink_to(root / "blobs" / "0a1b2c")
    for name, target in (("loop", "loop"), ("loop.txt", "loop.txt"), ("nowhere.md", "gone"), ("self", ".")):
        if rng.random() < 0.3:
            (folder / name).symlink_to(target)
    if rng.random() < 0.3:
        os.mkfifo(folder / "pipe.txt")
    if rng.random() < 0.3:
        (folder / "closed").mkdir()
        (folder / "closed").chmod(0)
    return outside


def make_flags(rng, root):
    """Options that change what is read and how it is divided."""
    flags = []
    for chance, choices in ((0.3, ["--max_doc_tokens=0", "--max_doc_tokens=64", "--max_doc_tokens=2000"]),
                            (0.2, ["--encoding=cp1251", "--encoding=utf-16", "--encoding=gb18030"]),
                            (0.2, ["--split=<|endoftext|>", "--split=\\n\\n"]), (0.2, ["--stream"]),
                            (0.2, ["--drop_duplicates"]), (0.1, ["--exclude=deep"]),
                            (0.2, ["--val_fraction=0", "--val_fraction=0.3", "--val=own.txt"])):
        if rng.random() < chance:
            flags.append(rng.choice(choices))
    if "--val=own.txt" in flags:
        (root / "own.txt").write_bytes(plain(rng, rng.choice([30, 3000, 100_000])))
    return flags


def lengths_of_documents(paths, bos_id):
    for path in paths:
        ids = np.frombuffer(path.read_bytes(), "<u2", offset=1024)
        yield from np.diff(np.append(np.flatnonzero(ids == bos_id), len(ids))).tolist()


def steps_that_fit(paths, bos_id, epochs):
    """How many steps of the tiny preset the training text is enough for, read `epochs` times in the given order."""
    packs = filled = 0
    for length in [*lengths_of_documents(paths, bos_id)] * epochs:
        filled += min(length, 512)
        if filled >= 512:
            packs, filled = packs + 1, 0
    return max(n for n in range(331) if 2 * round(n / 3) + 4 * (n - round(n / 3)) <= packs)


def parse_command(line, folder):
    """Flags of a printed command, split as a shell splits it; the shell agrees."""
    command = line.removeprefix("next: ")
    words = shlex.split(command)
    shell = subprocess.run(["sh", "-c", f"printf '%s\\0' {command}"], capture_output=True, cwd=folder)
    assert [os.fsdecode(word) for word in shell.stdout.split(b"\0")[:-1]] == words
    assert words[0] == "python" and words[2] == "--preset=tiny"
    assert (folder / words[1]).resolve() == ROOT / "train_gpt.py"
    return dict(word.removeprefix("--").split("=", 1) for word in words[3:])


def check_command(line, folder, out):
    """The printed command names shards that hold enough for all of its steps and its validation."""
    flags = parse_command(line, folder)
    assert flags.keys() <= {"train_files", "val_files", "val_tokens", "epochs", "num_iterations"}
    manifest = json.loads((out / "manifest.json").read_text())
    found = {}
    for split in ("train", "val"):
        found[split] = sorted(folder.glob(flags[f"{split}_files"]) if not flags[f"{split}_files"].startswith("/")
                              else Path("/").glob(flags[f"{split}_files"][1:]))
        assert [path.name for path in found[split]] == sorted(n for n in manifest["files"] if n.startswith(split))
    val_tokens = sum(manifest["files"][path.name]["tokens"] for path in found["val"])
    assert val_tokens > int(flags.get("val_tokens", 65_536))
    steps, epochs = int(flags.get("num_iterations", 330)), int(flags.get("epochs", 1))
    assert steps >= 10 and epochs <= 4
    assert steps_that_fit(found["train"], manifest["tokenizer"]["bos_id"], epochs) >= steps


def make_case(root, seed):
    """(folder, files in it, command line, current folder, output folder)"""
    root.mkdir()
    folder, expected = make_folder(root, seed)
    rng = random.Random(f"flags {seed}")
    out = root / rng.choice(["out", "out [1] of 'mine'", "größe"])
    flags = make_flags(rng, root)
    return SimpleNamespace(root=root, out=out, expected=expected + ("--val=own.txt" in flags), words=[
        folder.relative_to(root) if not folder.name.startswith(("-", "~")) else folder, f"--out={out.name}",
        "--tokenizer=bytes", "--processes=1", *flags])


@pytest.mark.parametrize("seed", range(FOLDER_COUNT))
def test_random_folder(seed, tmp_path):
    case = make_case(tmp_path / "case", seed)
    before = sorted(case.root.rglob("*"))
    done = run_here(*case.words, cwd=case.root)
    lines = (done.stdout + done.stderr).splitlines()
    assert all(line.isprintable() for line in lines), lines
    if done.returncode:
        assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("text.py: "), done
        assert any(word in lines[0] for word in REMEDIES), lines
        assert sorted(case.root.rglob("*")) == before
        return
    files = json.loads((case.out / "manifest.json").read_text())["made_by"]["counts"]["files"]
    assert files["found"] == case.expected == files["read"] + sum(count for count, _ in files["left_out"].values())
    assert re.search(rf"^{files['found']:,} files? found, {files['read']:,} read", done.stdout, re.M)
    told = [int(count) for count in re.findall(r"^  left out: (\d+) x ", done.stdout, re.M)]
    assert sum(told) == files["found"] - files["read"]
    if lines[-1].startswith("next: "):
        check_command(lines[-1], case.root, case.out)
    else:
        assert lines[-1].startswith("no next command: ") and any(word in lines[-1] for word in REMEDIES), lines


@pytest.mark.parametrize("number", range(10 if LONG_RUN else 2))
def test_the_printed_command_trains(number, tmp_path, fast_run):
    """One step, of the first folders whose text is enough."""
    for seed in range(100 * number, 100 * number + 100):
        case = make_case(tmp_path / str(seed), seed)
        line = (run_here(*case.words, cwd=case.root).stdout.splitlines() or [""])[-1]
        if line.startswith("next: "):
            break
    script, *flags = shlex.split(line.removeprefix("next: python "))
    values = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    _, shards = train_gpt.open_shards(*(str(case.root / values[f"{side}_files"]) for side in ("train", "val")))
    assert 0 < int(values["val_tokens"]) < sum(shard.num_tokens for shard in shards)
    # a validation of all these tokens takes longer than all else
    done = fast_run([sys.executable, str((case.root / script).resolve()), *flags, "--stop_after=1", "--val_every=0",
                     "--val_tokens=1000", f"--out_dir={tmp_path / 'logs'}"], cwd=case.root, text=True, timeout=300)
    assert done.returncode == 0, (line, done.stdout, done.stderr)
    run, = (tmp_path / "logs").iterdir()
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
