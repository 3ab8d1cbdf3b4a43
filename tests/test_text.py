"""data/text.py: what goes in comes out, in an order that only content and seed decide.

Proves: each kind of input decodes back to its text; every file is counted as read or as left out for a reason; header,
manifest and tokenizer.json are as described in the documentation; the result is the same for 1, 2 and 3 processes and
any order of files; validation is chosen by hash; pieces end at paragraph ends and lose nothing; --stream spreads the
pieces of a file; the printed command fits the text; user mistakes get one line and leave no file.
Against: the bytes written by the test itself, an independent reading of the shard format, tiktoken.
Run: python -m pytest tests/test_text.py (GPT-2 cases need ../shared/data/gpt2_bpe and skip without it)
"""

import base64
import contextlib
import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import random
import re
import resource
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "data" / "text.py"
VOCAB = ROOT / "../shared/data/gpt2_bpe"
sys.path.insert(0, str(ROOT / "data"))
import text  # noqa: E402

needs_gpt2 = pytest.mark.skipif(not VOCAB.is_dir(), reason="GPT-2's vocabulary is not in ../shared/data/gpt2_bpe")
TEXTS = ["One line.", "Größe, 東京, 😀\n\nsecond paragraph\r\n", "  indented\n\ttabs <|endoftext|> is text\n" * 30]


def run(*args, **more):
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], **{
        "capture_output": True, "text": True, "cwd": ROOT} | more)


def run_here(*args, cwd=ROOT):
    """What `run` does and returns, in this process."""
    handler, output, errors, code = signal.getsignal(signal.SIGTERM), io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        patch.setattr(sys, "argv", [str(SCRIPT), *map(str, args)])
        patch.chdir(cwd)
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as end:
            code = end.code
    signal.signal(signal.SIGTERM, handler)
    return SimpleNamespace(returncode=code, stdout=output.getvalue(), stderr=errors.getvalue())


def read_shard(path):
    """(header words, ids) of a shard, after checking its length."""
    data = Path(path).read_bytes()
    words = np.frombuffer(data[:1024], "<i4")
    assert len(data) == 1024 + int(words[2]) * int(words[5])
    return words, np.frombuffer(data[1024:], {2: "<u2", 4: "<u4"}[int(words[5])])


def decode(folder, split):
    """The texts in the shards of one split, in order, decoded with nothing but tokenizer.json."""
    spec = json.loads((folder / "tokenizer.json").read_text())
    tokens = [base64.b64decode(rank) for rank in spec["ranks"]]
    texts = []
    for path in sorted(folder.glob(f"{split}_*.bin")):
        _, ids = read_shard(path)
        starts = np.flatnonzero(ids == spec["bos_id"])
        assert starts[0] == 0
        texts += [b"".join(tokens[i] for i in part[1:]).decode() for part in np.split(ids, starts[1:])]
    return texts


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def build(inputs, out, **options):
    return text.build_shards([inputs] if isinstance(inputs, Path) else inputs, out,
                             **{"tokenizer": "bytes", "val_fraction": 0, "processes": 1} | options)


def left_out(manifest):
    """reason -> number of files that were not read"""
    return {reason: count for reason, (count, _) in manifest["made_by"]["counts"]["files"]["left_out"].items()}


def inside(manifest):
    """reason -> number of lines, rows or files that were skipped or repaired"""
    return {reason: count for reason, (count, _) in manifest["made_by"]["counts"]["skipped"].items()}


def words(rng, count):
    return " ".join(rng.choice(["shard", "token", "loss", "step"]) + str(rng.randrange(999)) for _ in range(count))


def write_files(folder, count, size=60, seed=1):
    """`count` text files of about `size` words in some subfolders; returns their texts."""
    rng = random.Random(seed)
    texts = [f"{i}: {words(rng, rng.randrange(1, size))}\n" for i in range(count)]
    for i, content in enumerate(texts):
        path = folder / f"d{i % 5}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return texts


def write_rows(path, texts, column="text"):
    rows = [{column: t, "n": i} for i, t in enumerate(texts)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif path.suffix == ".zst":
        path.write_bytes(pytest.importorskip("zstandard").compress(lines))
    else:
        path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(lines))


# -----------------------------------------------------------------------------
# Round trips


@pytest.mark.parametrize("ending", [".txt", ".md", ".rst", ".py", ".HTML"])
def test_text_files_come_back(tmp_path, ending):
    folder = tmp_path / "in" / "deep"
    folder.mkdir(parents=True)
    for i, content in enumerate(TEXTS):
        (folder / f"{i}{ending}").write_bytes(content.encode())
    (folder / "photo.jpg").write_bytes(b"\xff\xd8")
    (folder / ".hidden.txt").write_text("not this")
    manifest = build(folder.parent, tmp_path / "out")
    assert sorted(decode(tmp_path / "out", "train")) == sorted(TEXTS)
    assert manifest["made_by"]["counts"]["text_bytes"] == sum(len(t.encode()) for t in TEXTS)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("block", [10, 1 << 20])
def test_rows_come_back(tmp_path, monkeypatch, ending, block):
    monkeypatch.setattr(text, "TASK_BYTES", block)  # 10: borders fall inside lines
    texts = TEXTS + [f"row {i}" for i in range(20)]
    write_rows(tmp_path / f"rows{ending}", texts, column="body")
    build(tmp_path / f"rows{ending}", tmp_path / "out", text_column="body")
    assert sorted(decode(tmp_path / "out", "train")) == sorted(texts)


@needs_gpt2
def test_gpt2_ids_are_tiktokens(tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    spec = json.loads(text.gpt2_tokenizer_json(VOCAB))
    ranks = {base64.b64decode(rank): i for i, rank in enumerate(spec["ranks"])}
    gpt2 = tiktoken.Encoding("gpt2", pat_str=spec["pattern"], mergeable_ranks=ranks, special_tokens={})
    assert gpt2.encode_ordinary("Hello world") == [15496, 995]
    blanks = " " * 1_500_000 + "x"  # more than tiktoken takes at once
    write_rows(tmp_path / "rows.jsonl", [*TEXTS, blanks])
    build(tmp_path / "rows.jsonl", tmp_path / "out", tokenizer="gpt2", vocab_dir=VOCAB)
    assert sorted(decode(tmp_path / "out", "train")) == sorted([*TEXTS, blanks])
    _, ids = read_shard(tmp_path / "out" / "train_000000.bin")
    parts = {tuple(part[1:]) for part in np.split(ids, np.flatnonzero(ids == 50256)[1:])}
    assert parts >= {tuple(gpt2.encode_ordinary(t)) for t in TEXTS}


def test_long_text_file_becomes_documents_in_one_order_of_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "DOC_BYTES", 1000)
    rng = random.Random(0)
    content = "\n\n".join(words(rng, rng.randrange(1, 90)) for _ in range(200)) + "\n" + "ä" * 70_000
    (tmp_path / "a.txt").write_text(content)
    (tmp_path / "b.txt").write_text("b")
    build([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "out")
    parts = [t for t in decode(tmp_path / "out", "train") if t != "b"]
    assert len(parts) > 50 and sum(map(len, parts)) == len(content)
    for part in parts:
        assert part in content and (part.endswith("\n") or "ä" in part)
    assert sum(part.endswith("\n\n") for part in parts) > 50  # all but the one before the line of a single letter


def test_repairs_and_skips_are_counted(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "latin.txt").write_bytes("Das Fr\u00fchst\u00fcck ist fertig, sagt der Wirt.".encode("latin-1"))
    (folder / "utf16.txt").write_bytes("wide".encode("utf-16"))
    (folder / "noise.txt").write_bytes(random.Random(0).randbytes(5000).replace(b"\0", b""))
    (folder / "bom.txt").write_bytes(b"\xef\xbb\xbfmarked")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "x.jsonl").write_bytes(b'{"text": "good"}\n{"text": 5}\n{"other": 1}\nnot json\n\n["text"]\n'
                                     b'{"text": "half \\ud83d pair"}\n{"text": " "}')
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "kept"}\n' * 2000, 0)[:-5000])
    manifest = build(folder, tmp_path / "out")
    texts = decode(tmp_path / "out", "train")
    assert {"Das Fr\ufffdhst\ufffdck ist fertig, sagt der Wirt.", "marked", "good", "half \ufffd pair"} <= {*texts}
    assert left_out(manifest) == {
        "file in another encoding (it looks like utf-16; --encoding=utf-16 reads it)": 1, "file that is not text": 1,
        "file that holds no document": 1}
    assert inside(manifest) == {
        "file not in UTF-8, read with replacement characters": 1,  # two letters do not tell which encoding it is
        "empty document": 2, "line that is not JSON": 2, "line without the column 'text'": 2,
        "line whose column 'text' is not text": 1, "file with compression damage, its rest lost": 1}
    assert manifest["made_by"]["counts"]["files"]["found"] == 7 and manifest["made_by"]["counts"]["files"]["read"] == 4


# -----------------------------------------------------------------------------
# What is found


@pytest.mark.parametrize("make", [
    lambda folder, outside: (folder / "link").symlink_to(outside),
    lambda folder, outside: (folder / "linked.txt").symlink_to(outside / "far.txt"),
])
def test_links_are_followed_and_loops_end(tmp_path, make):
    folder, outside = tmp_path / "in", tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    outside.mkdir()
    (folder / "sub" / "a.txt").write_text("near")
    (outside / "far.txt").write_text("far")
    make(folder, outside)
    (folder / ".cache" / "data").mkdir(parents=True)
    (folder / ".cache" / "data" / "b.txt").write_text("cached")
    (folder / "named").symlink_to(".cache/data")  # hidden, and named all the same
    (folder / ".link").symlink_to(outside)
    (folder / "sub" / "up").symlink_to("..")
    (folder / "a_again").symlink_to("sub")
    (folder / "loop").symlink_to("loop")
    (folder / "gone.md").symlink_to("nowhere")
    manifest = build(folder, tmp_path / "out")
    assert sorted(decode(tmp_path / "out", "train")) == ["cached", "far", "near"]
    assert left_out(manifest) == {"link that leads nowhere": 2, "file in a folder named .cache": 1}
    folders = {reason: count for reason, (count, _) in manifest["made_by"]["counts"]["folders_left_out"].items()}
    assert folders == {"folder that is read elsewhere, as a link or as --val": 2,
                       "link to a folder, hidden or in a folder that is left out": 1}
    names = [source.name for source in text.find_files([folder])]
    assert "in/sub/a.txt" in names  # and not in/a_again/a.txt


def test_a_closed_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "in" / "closed").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("open")
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", closed)
    manifest = build(tmp_path / "in", tmp_path / "out")
    assert manifest["made_by"]["counts"]["folders_left_out"] == {
        "folder that cannot be read": [1, "in/closed: Permission denied"]}
    with pytest.raises(text.InputError, match="cannot be read .closed: Permission denied"):
        text.find_files([tmp_path / "in" / "closed"])


def test_every_file_left_out_is_counted_by_reason(tmp_path):
    folder = tmp_path / "in"
    for name in ("a.txt", ".hidden.txt", ".git/x.txt", ".git/deep/y", "node_modules/z.py", "t.csv", "u.CSV",
                 "photo.jpg", "no_ending", "v.1234", "drafts/w.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("some text")
    os.mkfifo(folder / "pipe.txt")
    (folder / "config.json").write_text('{\n "a": 1\n}\n')
    (folder / "lines.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    manifest = build([folder, folder / "a.txt"], tmp_path / "out", exclude="drafts/")
    assert left_out(manifest) == {
        "hidden file": 1, "file in a folder named .git": 2, "file in a folder named node_modules": 1,
        "file of another kind .csv": 2, "file of another kind .jpg": 1, "file of another kind (no usual ending)": 2,
        "pipe, socket or device": 1,
        "JSON file that is not one object a line; convert it to .jsonl": 1, "file that --exclude leaves out": 1,
        "file that is there twice, as a link or named again": 1}
    assert sorted(decode(tmp_path / "out", "train")) == ["one", "some text", "two"]
    told = text.tell(manifest["made_by"]["counts"]["files"]["left_out"])
    assert told[0] == "5 x file of another kind ((no usual ending) 2, .csv 2, .jpg 1)" and len(told) == 8
    again = build(folder, folder, exclude="drafts/")  # into the folder itself, twice: it does not read what it wrote
    assert build(folder, folder, exclude="drafts/")["made_by"]["sources"] == again["made_by"]["sources"]


def test_the_name_given_decides_the_kind(tmp_path):
    """A content-addressed cache holds files under their hash, and links with names to them."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0a1b").write_text('{"text": "cached"}\n')
    (tmp_path / "blobs" / "2c3d").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "rows.jsonl").symlink_to("blobs/0a1b")
    (tmp_path / "story.txt.gz").symlink_to("blobs/2c3d")
    (tmp_path / "plain.txt").write_text("plain")
    (tmp_path / "nameless").symlink_to("plain.txt")
    inputs = [tmp_path / name for name in ("rows.jsonl", "story.txt.gz", "nameless")]
    build(inputs, tmp_path / "out")
    assert sorted(decode(tmp_path / "out", "train")) == ["cached", "packed", "plain"]
    assert text.default_out_dir(inputs).name == "rows_story_nameless"


@pytest.mark.parametrize("ending, pack", [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", None)])
def test_packed_text_and_lines(tmp_path, monkeypatch, ending, pack):
    pack = pack or pytest.importorskip("zstandard").compress
    monkeypatch.setattr(text, "DOC_BYTES", 1000)
    monkeypatch.setattr(text, "WINDOW", 200)
    long = "\n\n".join(f"paragraph {i} of a long text" for i in range(200))
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / f"short.txt{ending}").write_bytes(pack("Größe".encode()))
    (folder / f"long.md{ending}").write_bytes(pack(long.encode()))
    (folder / f"rows.json{ending}").write_bytes(pack(b'{"text": "row"}\nnot json\n'))
    (folder / f"not_packed.txt{ending}").write_text("plain")
    (folder / f"empty.txt{ending}").write_bytes(b"")
    (folder / f"cut.txt{ending}").write_bytes(pack(words(random.Random(0), 30_000).encode())[:-20])
    (folder / f"two.txt{ending}").write_bytes(pack(b"first, ") + pack(b"second"))
    manifest = build(folder, tmp_path / "out")
    texts = decode(tmp_path / "out", "train")
    parts = [t for t in texts if "paragraph" in t]
    assert {"Größe", "row", "plain", "first, second"} <= {*texts}
    assert "".join(t for t in texts if "shard" in t)  # of the one that was cut, all before the damage
    assert len(parts) > 3 and sum(map(len, parts)) == len(long) and all(part in long for part in parts)
    assert left_out(manifest) == {"file that holds no document": 1}
    assert inside(manifest) == {"line that is not JSON": 1, "file with compression damage, its rest lost": 1}


def test_packed_files_that_cannot_be_opened_are_counted(tmp_path, monkeypatch):
    """Such a file ended the whole job with a message about the disk."""
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    (tmp_path / "b.txt").write_text("b")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(text, "Unpacked", refuse)
    manifest = build([tmp_path / "a.jsonl.gz", tmp_path / "b.txt"], tmp_path / "out")
    assert left_out(manifest) == {"file that cannot be read": 1}


def test_columns_of_parquet(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder, texts = tmp_path / "in", pa.array(["one", None, "two"])
    folder.mkdir()
    bad_utf8 = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 5], "<i4")), pa.py_buffer(b"caf\xe9!"))
    columns = {"dictionary": texts.dictionary_encode(), "view": texts.cast(pa.string_view()), "null": pa.nulls(3),
               "large": texts.cast(pa.large_string()), "binary": texts.cast(pa.binary()), "numbers": pa.array([1]),
               "bad": bad_utf8}
    for name, column in columns.items():
        pq.write_table(pa.table({"text": column}), folder / f"{name}.parquet")
    pq.write_table(pa.table({"body": texts}), folder / "other.parquet")
    (folder / "damaged.parquet").write_bytes(b"PAR1")
    manifest = build(folder, tmp_path / "out")
    assert sorted(decode(tmp_path / "out", "train")) == ["caf\ufffd!"] + 4 * ["one"] + 4 * ["two"]
    assert left_out(manifest) == {
        "file of damaged parquet": 1, "file that holds no document": 1,
        "file whose column 'text' is not text; choose with --text_column": 1,
        "file without the column 'text'; choose with --text_column": 1}
    assert inside(manifest) == {"row whose column 'text' is null": 7}


# -----------------------------------------------------------------------------
# Encodings and separators

SAMPLES = {
    "cp1252": "Größe für Häuser, déjà vu près des châteaux, «ça va»?", "cp1251": "Это просто текст о погоде и о реке.",
    "koi8_r": "Это просто текст о погоде и о реке.", "cp1253": "Αυτό είναι ένα κείμενο για τον καιρό και το ποτάμι.",
    "cp1250": "Żółta łódź płynie, że aż miło; příliš žluťoučký kůň.", "gb18030": "我们在这里看到一条河，他是我的人，这不大。",
    "big5": "我們在這裡看到一條河，他是我的人，這不大。", "shift_jis": "これはとてもながいかわのはなしでした。川の水が好き。",
    "euc_jp": "これはとてもながいかわのはなしでした。川の水が好き。", "euc_kr": "이것은 강에 대한 이야기다. 나는 물을 보고 하늘을 본다.",
    "utf-16": "wide words", "utf-16-le": "wide words without a mark", "utf-16-be": "wide words without a mark",
    "utf-32": "wider words"}


@pytest.mark.parametrize("encoding", ["cp1251", "gb18030", "utf-16"])
def test_lines_in_another_encoding(tmp_path, encoding):
    row = json.dumps({"text": SAMPLES[encoding]}, ensure_ascii=False) + "\n"
    (tmp_path / "rows.jsonl").write_bytes((row * 20).encode(encoding))
    (tmp_path / "a.txt").write_text("a")
    inputs = [tmp_path / "rows.jsonl", tmp_path / "a.txt"]
    manifest = build(inputs, tmp_path / "out")
    assert any(f"--encoding={encoding} reads it" in reason for reason in {**left_out(manifest), **inside(manifest)})
    manifest = build(inputs, tmp_path / "out", encoding=encoding)
    assert sorted(decode(tmp_path / "out", "train")) == ["a"] + [SAMPLES[encoding]] * 20 and not left_out(manifest)


@pytest.mark.parametrize("encoding", SAMPLES)
def test_another_encoding_is_named_and_the_named_option_reads_it(tmp_path, encoding):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "old.txt").write_bytes(SAMPLES[encoding].encode(encoding))
    (folder / "new.txt").write_text("plain UTF-8, Größe")
    manifest = build(folder, tmp_path / "out")
    reason, = {**left_out(manifest), **inside(manifest)}
    named = re.search("--encoding=(\\S+) reads it", reason).group(1)
    assert named == encoding
    manifest = build(folder, tmp_path / "out", encoding=named)
    assert sorted(decode(tmp_path / "out", "train")) == sorted([SAMPLES[encoding], "plain UTF-8, Größe"])
    assert not left_out(manifest)


def test_a_long_file_in_utf_16_is_cut_into_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "DOC_BYTES", 1000)
    content = "\n\n".join(f"paragraph {i}, größer" for i in range(9000))
    (tmp_path / "a.txt").write_bytes(content.encode("utf-16"))
    build(tmp_path / "a.txt", tmp_path / "out", encoding="utf-16")
    parts = decode(tmp_path / "out", "train")
    assert len(parts) > 3 and sum(map(len, parts)) == len(content) and all(part in content for part in parts)


def test_zero_bytes_are_judged_by_their_share(tmp_path):
    """One of them dropped a valid file of 800 kB."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "few.txt").write_text("word " * 100 + "\0 rest")
    (folder / "many.txt").write_bytes(b"ab\0" * 500)
    manifest = build(folder, tmp_path / "out")
    assert decode(tmp_path / "out", "train") == ["word " * 100 + "\0 rest"]
    assert inside(manifest) == {"file with NUL bytes, which were kept": 1} and left_out(manifest) == {
        "file that is not text": 1}


def test_noise_stays_out_with_an_encoding_that_knows_all_bytes(tmp_path):
    (tmp_path / "noise.txt").write_bytes(random.Random(0).randbytes(5000))
    (tmp_path / "a.txt").write_text("a")
    manifest = build([tmp_path / "noise.txt", tmp_path / "a.txt"], tmp_path / "out", encoding="latin-1")
    assert left_out(manifest) == {"file that is not text": 1}


def test_separators_are_found_and_divide_on_request(tmp_path, monkeypatch):
    stories = [f"Story {i}.\n\nIt has <|endoftext|> inside." for i in range(60)]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(stories) + "\n<|endoftext|>\n")
    manifest = build(tmp_path / "a.txt", tmp_path / "out")
    assert [reason for reason in inside(manifest) if "--split='<|endoftext|>'" in reason]
    monkeypatch.setattr(text, "DOC_BYTES", 100)  # separators lie on both sides of a cut
    manifest = build(tmp_path / "a.txt", tmp_path / "out", split="\n<|endoftext|>\n")
    assert sorted(decode(tmp_path / "out", "train")) == sorted(stories) and not inside(manifest)
    (tmp_path / "b.txt").write_text("one\n\n---\ntwo\n---\n")
    build(tmp_path / "b.txt", tmp_path / "out", split="---\n")
    assert sorted(decode(tmp_path / "out", "train")) == ["one", "two"]


# -----------------------------------------------------------------------------
# Formats


@pytest.mark.parametrize("tokenizer", ["bytes", pytest.param("gpt2", marks=needs_gpt2)])
def test_header_and_manifest(tmp_path, tokenizer):
    write_files(tmp_path / "in", 40)
    out = tmp_path / "out"
    vocab_dir = VOCAB if tokenizer == "gpt2" else None
    manifest = build(tmp_path / "in", out, tokenizer=tokenizer, vocab_dir=vocab_dir, val_fraction=0.3, shard_tokens=600)
    vocab_size, bos_id = {"bytes": (257, 256), "gpt2": (50257, 50256)}[tokenizer]
    sha256 = hashlib.sha256((out / "tokenizer.json").read_bytes()).hexdigest()
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert manifest["tokenizer"] == {"name": tokenizer, "sha256": sha256, "vocab_size": vocab_size, "bos_id": bos_id}
    assert {p.name for p in out.iterdir()} == {*manifest["files"], "tokenizer.json", "manifest.json"}
    assert len(manifest["files"]) >= 3
    for name, entry in manifest["files"].items():
        header, ids = read_shard(out / name)
        assert header[:6].tolist() == [20240520, 1, entry["tokens"], vocab_size, bos_id, 2]
        assert header[8:16].tobytes().hex() == sha256 and not header[6:8].any() and not header[16:].any()
        assert entry["sha256"] == hashlib.sha256((out / name).read_bytes()).hexdigest()
        assert entry["size"] == (out / name).stat().st_size
        assert entry["documents"] == np.sum(ids == bos_id) and ids.max() == bos_id
        assert len(ids) <= 600 or entry["documents"] == 1
    texts = decode(out, "train") + decode(out, "val")
    assert sum(e["text_bytes"] for e in manifest["files"].values()) == sum(len(t.encode()) for t in texts)


@needs_gpt2
def test_gpt2_constant_and_vocabulary_places(tmp_path, monkeypatch):
    data = text.gpt2_tokenizer_json(VOCAB)
    spec = json.loads(data)
    assert hashlib.sha256(data).hexdigest() == text.GPT2_TOKENIZER_SHA256
    assert data == (json.dumps(spec, ensure_ascii=True, sort_keys=True, separators=(",", ":")) + "\n").encode()
    assert len(spec["ranks"]) == 50256 and base64.b64decode(spec["ranks"][15496]) == b"Hello"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    text.gpt2_tokenizer_json.cache_clear()
    with pytest.raises(LookupError, match="not in tiktoken's cache"):
        text.gpt2_tokenizer_json()
    (tmp_path / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6").write_bytes((VOCAB / "encoder.json").read_bytes())
    assert text.gpt2_tokenizer_json() == data


def test_bytes_tokenizer_is_the_bytes():
    spec = json.loads(text.bytes_tokenizer_json())
    assert [base64.b64decode(r) for r in spec["ranks"]] == [bytes([b]) for b in range(256)]
    assert spec["bos_id"] == 256 and spec["special_tokens"] == {"<|bos|>": 256}


def small_bpe(**changes):
    """A tokenizer.json with the single bytes, two merges and a special token."""
    ranks = [base64.b64encode(token).decode() for token in [*(bytes([b]) for b in range(256)), b"th", b"the"]]
    return {"name": "small", "pattern": text.GPT2_PATTERN, "ranks": ranks, "special_tokens": {"<|bos|>": 258},
            "bos_id": 258} | changes


def test_a_tokenizer_of_ones_own(tmp_path):
    pytest.importorskip("tiktoken")
    (tmp_path / "tok.json").write_text(json.dumps(small_bpe()))
    write_rows(tmp_path / "rows.jsonl", [*TEXTS, "the other"])
    manifest = build(tmp_path / "rows.jsonl", tmp_path / "out", tokenizer=str(tmp_path / "tok.json"))
    assert sorted(decode(tmp_path / "out", "train")) == sorted([*TEXTS, "the other"])
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "tok.json").read_bytes()
    assert {key: manifest["tokenizer"][key] for key in ("name", "vocab_size", "bos_id")} == {
        "name": "small", "vocab_size": 259, "bos_id": 258}
    _, ids = read_shard(tmp_path / "out" / "train_000000.bin")
    assert 257 in ids.tolist()
    other = build(tmp_path / "rows.jsonl", tmp_path / "out", tokenizer="bytes")
    assert other["made_by"]["tokenizer_sha256"] != manifest["made_by"]["tokenizer_sha256"]


def test_the_folder_of_a_tokenizer_stands_for_it(tmp_path, refuses):
    pytest.importorskip("tiktoken")
    write_files(tmp_path / "in", 20, size=300)
    (tmp_path / "tok").mkdir()
    refuses([tmp_path / "in", f"--tokenizer={tmp_path}/tok"], ["/tok: a folder, and its tokenizer.json cannot be read"])
    (tmp_path / "tok" / "tokenizer.json").write_text(json.dumps(small_bpe()))
    done = run_here(tmp_path / "in", f"--out={tmp_path}/out", f"--tokenizer={tmp_path}/tok")
    assert done.returncode == 0 and "tokenizer small" in done.stdout, done
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "tok" / "tokenizer.json").read_bytes()


def test_a_large_vocabulary_takes_four_bytes_an_id(tmp_path):
    pytest.importorskip("tiktoken")
    more = [base64.b64encode(f"{i:06d}".encode()).decode() for i in range(70_000)]
    spec = small_bpe(ranks=small_bpe()["ranks"] + more, special_tokens={"<|bos|>": 70_258}, bos_id=70_258)
    (tmp_path / "tok.json").write_text(json.dumps(spec))
    write_rows(tmp_path / "rows.jsonl", TEXTS)
    build(tmp_path / "rows.jsonl", tmp_path / "out", tokenizer=tmp_path / "tok.json")
    header, _ = read_shard(tmp_path / "out" / "train_000000.bin")
    assert header[5] == 4 and sorted(decode(tmp_path / "out", "train")) == sorted(TEXTS)


@pytest.mark.parametrize("changes, problem", [
    ({"pattern": "(a|a)*b"}, "pattern is not one of those allowed"), ({"pattern": ""}, "must be the 256 bytes"),
    ({"ranks": ["?"]}, "not base64"), ({"ranks": small_bpe()["ranks"][1:]}, "single bytes have no token"),
    ({"ranks": small_bpe()["ranks"] + ["dGhl"]}, "there twice"), ({"bos_id": 7}, "bos_id is not"),
    ({"bos_id": "7"}, "bos_id is missing or not a int"), ({"special_tokens": {"a": 5}}, "do not follow"),
    ({"name": None}, "name is missing"), (None, "not JSON")])
def test_tokenizers_that_cannot_be_used(tmp_path, changes, problem):
    (tmp_path / "tok.json").write_text("{" if changes is None else json.dumps(small_bpe(**changes)))
    with pytest.raises(text.InputError, match=problem) as error:
        text.load_tokenizer(tmp_path / "tok.json")
    assert str(error.value).startswith(f"--tokenizer={tmp_path}/tok.json: ")


# -----------------------------------------------------------------------------
# Order


def test_same_result_for_any_processes_and_listing_order(tmp_path, monkeypatch):
    texts = write_files(tmp_path / "in", 300)
    write_rows(tmp_path / "in" / "rows.jsonl", texts[:50] + [t.upper() for t in texts])
    write_rows(tmp_path / "in" / "rows.jsonl.gz", [t.title() for t in texts])
    monkeypatch.setattr(text, "TASK_BYTES", 5000)  # small enough for a pool and some twenty tasks
    results = []
    for processes in (1, 2, 3):
        if processes == 3:  # and files come in another order
            walk = os.walk
            monkeypatch.setattr(os, "walk", lambda root: ((d, s.reverse() or s, n[::-1]) for d, s, n in walk(root)))
        build(tmp_path / "in", tmp_path / f"out{processes}", processes=processes, val_fraction=0.1, shard_tokens=20_000)
        results.append(digests(tmp_path / f"out{processes}"))
    assert results[0] == results[1] == results[2] and len(results[0]) > 5
    apart = [tmp_path / "in" / name for name in sorted(os.listdir(tmp_path / "in"))]
    for out, inputs in (("apart", apart), ("turned", apart[::-1])):
        build(inputs, tmp_path / out, val_fraction=0.1, shard_tokens=20_000)
    assert digests(tmp_path / "apart") == digests(tmp_path / "turned")  # the manifest too
    results[0].pop("manifest.json")
    assert results[0].items() <= digests(tmp_path / "apart").items()


def test_seed_decides_the_order_and_not_the_split(tmp_path, monkeypatch):
    texts = write_files(tmp_path / "in", 200)
    for seed in (0, 1):
        build(tmp_path / "in", tmp_path / str(seed), seed=seed, val_fraction=0.2)
    monkeypatch.setattr(text, "SORT_ROWS", 7)  # many ranges of keys, each sorted alone
    build(tmp_path / "in", tmp_path / "ranges", val_fraction=0.2)
    monkeypatch.undo()
    trains = [decode(tmp_path / out, "train") for out in ("0", "1", "ranges")]
    assert trains[0] != trains[1] and sorted(trains[0]) == sorted(trains[1]) and trains[0] == trains[2]
    assert trains[0] != sorted(trains[0]) and trains[0] != [t for t in texts if t in trains[0]]
    neighbours = sum(abs(int(a.split(":")[0]) - int(b.split(":")[0])) == 1 for a, b in zip(trains[0], trains[0][1:]))
    assert neighbours < 10  # 2 * 160 / 200 expected of a shuffle, 160 without


def test_validation_is_chosen_by_hash(tmp_path):
    texts = write_files(tmp_path / "in", 200)
    build(tmp_path / "in", tmp_path / "a", val_fraction=0.2)
    expected = {t for t in texts if int.from_bytes(hashlib.sha256(t.encode()).digest()[:8], "little") < 0.2 * 2**64}
    train, val = decode(tmp_path / "a", "train"), decode(tmp_path / "a", "val")
    assert {*val} == expected and 20 < len(val) < 60 and not {*train} & {*val}
    write_rows(tmp_path / "more.jsonl", texts + write_files(tmp_path / "other", 100, seed=2))
    build(tmp_path / "more.jsonl", tmp_path / "b", val_fraction=0.2, seed=5, stream=True, max_doc_tokens=64)
    train, val = "".join(decode(tmp_path / "b", "train")), "".join(decode(tmp_path / "b", "val"))
    for t in texts:  # every document stays on its side: the first piece shows which
        assert (t[:16] in val) >= (t in expected) and (t[:16] in train) >= (t not in expected)


def test_few_documents_still_give_both_sides(tmp_path):
    (tmp_path / "one.txt").write_text("\n\n".join(f"paragraph {i} " + "x" * 200 for i in range(500)))
    build(tmp_path / "one.txt", tmp_path / "a", val_fraction=0.005, max_doc_tokens=512)
    train, val = decode(tmp_path / "a", "train"), decode(tmp_path / "a", "val")
    assert train and val and sum(map(len, train + val)) == (tmp_path / "one.txt").stat().st_size
    write_rows(tmp_path / "two.jsonl", ["first", "second", "second"])
    for fraction in (0.001, 0.999):
        manifest = build(tmp_path / "two.jsonl", tmp_path / "b", val_fraction=fraction)
        assert {*manifest["files"]} == {"train_000000.bin", "val_000000.bin"}
        assert not {*decode(tmp_path / "b", "train")} & {*decode(tmp_path / "b", "val")}
    write_rows(tmp_path / "same.jsonl", ["same", "same"])
    manifest = build(tmp_path / "same.jsonl", tmp_path / "b", val_fraction=0.5)
    assert {*manifest["files"]} == {"train_000000.bin"} and not (tmp_path / "b" / "val_000000.bin").exists()


def test_duplicates_are_dropped_on_request(tmp_path):
    write_rows(tmp_path / "x.jsonl", ["a", "b", "a", "a " * 50, "a " * 50])
    manifest = build(tmp_path / "x.jsonl", tmp_path / "all", max_doc_tokens=16)
    assert manifest["made_by"]["counts"]["duplicates_dropped"] == 0
    once = build(tmp_path / "x.jsonl", tmp_path / "once", max_doc_tokens=16, drop_duplicates=True)
    assert once["made_by"]["counts"]["duplicates_dropped"] == 2
    assert len("".join(decode(tmp_path / "all", "train"))) == 3 + 200
    assert len("".join(decode(tmp_path / "once", "train"))) == 2 + 100


def test_validation_text_of_ones_own(tmp_path):
    texts = write_files(tmp_path / "in", 30)
    (tmp_path / "in" / "val.txt").write_text("held out")
    (tmp_path / "in" / "copy.md").write_text("held out")
    manifest = build(tmp_path / "in", tmp_path / "out", val=tmp_path / "in" / "val.txt", val_fraction=0.5)
    assert decode(tmp_path / "out", "val") == ["held out"]
    assert sorted(decode(tmp_path / "out", "train")) == sorted(texts)
    counts = manifest["made_by"]["counts"]
    assert counts["copies_of_validation_dropped"] == 1 and counts["files"] == {"found": 32, "read": 32, "left_out": {}}
    manifest = build(tmp_path / "in", tmp_path / "out", val=tmp_path / "in" / "d1")
    assert len(decode(tmp_path / "out", "val")) == 6 and manifest["made_by"]["counts"]["files"]["read"] == 32
    with pytest.raises(text.InputError, match="no_such.txt"):
        build(tmp_path / "in", tmp_path / "out", val=tmp_path / "no_such.txt")


@pytest.mark.parametrize("sizes, by_piece", [
    ([3000] * 1000, False),             # many documents: 2.2 % of them hold 65,537 tokens
    ([1_000_000], True),                # one document
    ([1_000_000, 20], True),            # the small one alone would not do
    ([40_000] * 12, False),             # a tenth is less than the tiny preset validates on, and gives what there is
    ([400] * 100_000, False)])          # half a percent is enough
def test_share_of_validation(sizes, by_piece):
    rng = np.random.default_rng(0)
    docs = np.repeat(rng.integers(0, 2**64, len(sizes), np.uint64), [-(-size // 500) for size in sizes])
    index = np.zeros(len(docs), text.RECORD)
    index["doc"], index["tokens"] = docs, min(499, sizes[0] - 1)
    index["piece"] = np.concatenate([np.arange(-(-size // 500)) for size in sizes])
    found_by_piece, threshold = text.choose_validation(index, None)
    held_out = index[text.side(index, found_by_piece) < np.uint64(threshold)]
    tokens, total = int(held_out["tokens"].sum()) + len(held_out), int(index["tokens"].sum()) + len(index)
    assert found_by_piece == by_piece
    assert min(65_537, 0.05 * total) <= tokens <= max(1.2 * 65_537, 0.006 * total, 0.2 * total if total < 1e6 else 0)


# -----------------------------------------------------------------------------
# Pieces and chunks


@pytest.mark.parametrize("tokenizer", ["bytes", pytest.param("gpt2", marks=needs_gpt2)])
def test_pieces_end_at_paragraph_ends_and_lose_nothing(tokenizer):
    encoder = text.Encoder(text.gpt2_tokenizer_json(VOCAB) if tokenizer == "gpt2" else text.bytes_tokenizer_json())
    rng = random.Random(3)
    content = "\n\n".join(words(rng, rng.randrange(1, 20)) for _ in range(60))
    content += "\n" + "long line. " * 300 + "漢" * 400
    raw, limit = content.encode(), 400
    ids = encoder.encode(raw, content)
    ends = encoder.ends(ids)
    assert ends[-1] == len(raw)
    cuts = text.cut_tokens(raw, ends, limit)
    assert cuts[-1] == len(ids) and all(0 < b - a <= limit for a, b in zip([0, *cuts], cuts))
    pieces = [raw[a:b].decode() for a, b in zip([0, *ends[np.array(cuts) - 1]], ends[np.array(cuts) - 1])]
    assert "".join(pieces) == content
    prose = [p for p in pieces if "long" not in p and "漢" not in p]
    assert len(prose) > 5 and all(p.endswith("\n\n") for p in prose[:-1])
    sentences = [p for p in pieces if "long" in p and "漢" not in p]
    assert len(sentences) > 1 and all(p.endswith(".") for p in sentences[:-1])


def test_max_doc_tokens_counts_the_begin_id(tmp_path):
    write_rows(tmp_path / "x.jsonl", ["a" * 99, "b" * 100, "c" * 250])
    build(tmp_path / "x.jsonl", tmp_path / "out", max_doc_tokens=100)
    assert sorted(map(len, decode(tmp_path / "out", "train"))) == [1, 52, 99, 99, 99, 99]


def test_stream_never_leaves_a_file_beside_itself(tmp_path):
    """Ten files, each of one letter: whole documents make long runs of a letter, a stream none beyond one chunk."""
    folder = tmp_path / "in"
    folder.mkdir()
    for letter in "abcdefghij":
        (folder / f"{letter}.txt").write_text((letter * 60 + "\n\n") * 400)
    build(folder, tmp_path / "whole")
    build(folder, tmp_path / "stream", stream=True, shard_tokens=100_000)
    whole, stream = ("".join(decode(tmp_path / out, "train")).split() for out in ("whole", "stream"))
    assert sorted(whole) == sorted(stream) and len(stream) == 4000
    longest = [max(len([*run]) for _, run in itertools.groupby(lines)) for lines in (whole, stream)]
    assert longest == [400, 16]  # 16 paragraphs of 62 bytes fill a chunk of 1023
    batches = [[{*lines[i:i + 400]} for i in range(0, 4000, 400)] for lines in (whole, stream)]
    assert max(map(len, batches[0])) <= 2 and min(map(len, batches[1])) == 10
    assert max(map(len, decode(tmp_path / "stream", "train"))) < 1024
    assert len(list((tmp_path / "stream").glob("train_*"))) == 3


# -----------------------------------------------------------------------------
# The command that is printed


def test_figures_of_the_tiny_preset_are_those_of_the_script():
    import train_gpt
    cfg = train_gpt.PRESETS["tiny"]
    ends = [0, *(round(stage.until * cfg.num_iterations) for stage in cfg.stages)]
    packs = sum((end - start) * stage.batch_tokens // text.PACK_TOKENS
                for stage, start, end in zip(cfg.stages, ends, ends[1:]))
    assert (text.TINY_STEPS, text.TINY_VAL_TOKENS) == (cfg.num_iterations, cfg.val_tokens)
    assert text.packs_of_steps(cfg.num_iterations) == packs == 1100
    assert {stage.max_doc_tokens for stage in cfg.stages} == {text.PACK_TOKENS}


def test_a_run_fits_the_text():
    assert text.fit_run(1100) == (330, 1) and text.fit_run(5000) == (330, 1)
    assert text.fit_run(1099) == (330, 2) and text.fit_run(400) == (330, 3)
    for packs in range(1100):
        steps, epochs = text.fit_run(packs)
        assert text.packs_of_steps(steps) <= epochs * packs and 1 <= epochs <= 4
        assert steps == 330 or epochs == 4
    assert text.fit_run(8)[0] < text.MIN_STEPS <= text.fit_run(10)[0]


@pytest.mark.parametrize("max_doc_tokens, packs", [(512, 2), (0, 1)])
def test_packs_are_counted_as_the_trainer_fills_them(tmp_path, max_doc_tokens, packs):
    """1,000 and 50 bytes: whole, the first 512 of each are read; as pieces of 511 and 489, 1 + 1 of them fill two."""
    write_rows(tmp_path / "rows.jsonl", ["x" * 1000, "y" * 50])
    manifest = build(tmp_path / "rows.jsonl", tmp_path / "out", max_doc_tokens=max_doc_tokens)
    assert text.count_packs(tmp_path / "out", manifest, 768) == packs
    assert text.count_packs(tmp_path / "out", manifest, 1) == 1


def last_lines(tmp_path, *flags, content=""):
    """The end of what the command prints for one text file, and the folder of its result."""
    (tmp_path / "book.txt").write_text(content)
    done = run_here(tmp_path / "book.txt", f"--out={tmp_path}/out", "--tokenizer=bytes", "--processes=1", *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def varied(size):
    rng = random.Random(0)
    return "\n\n".join(words(rng, 40) for _ in range(size // 300))


def test_enough_text_needs_no_flags(tmp_path):
    line = last_lines(tmp_path, content=varied(1_000_000))[-1]
    assert re.fullmatch(r"next: python train_gpt.py --preset=tiny --train_files='\S+' --val_files='\S+'", line)


def test_less_text_is_read_several_times(tmp_path):
    lines = last_lines(tmp_path, content=varied(300_000))
    assert "reads the text 3 times" in lines[-2] and re.search(r" --val_tokens=[23]\d{4} --epochs=3$", lines[-1])
    lines = last_lines(tmp_path, "--seed=1", content=varied(30_000))
    assert "reads the text 4 times, in" in lines[-2] and re.search(r" --epochs=4 --num_iterations=\d\d$", lines[-1])


def test_what_is_missing_is_said_in_one_line(tmp_path, refuses):
    for flags, said in (
            (["--max_doc_tokens=0"], "no next command: a single document cannot be divided"),
            (["--val_fraction=0"], "no next command: there is no validation text; leave out --val_fraction=0"),
            ([f"--val={tmp_path / 'copy.txt'}"], "no next command: all training text is in the validation text")):
        (tmp_path / "copy.txt").write_text(varied(30_000))
        assert last_lines(tmp_path, *flags, content=varied(30_000))[-1].startswith(said)
    (tmp_path / "own.txt").write_text(varied(3000))
    line = last_lines(tmp_path, "--max_doc_tokens=0", f"--val={tmp_path / 'own.txt'}", content=varied(30_000))[-1]
    assert line.startswith("no next command: ") and line.endswith("--max_doc_tokens=512 makes it read all.")
    (tmp_path / "book.txt").write_text("too short")
    refuses([tmp_path / "book.txt", "--tokenizer=bytes"], ["10 tokens", "at least 10,000"])


@pytest.mark.parametrize("here, folder", [(".", "it's [[]1] out"), ("it's [1] out", "."),
                                          ("in/deep", "../../it's [[]1] out")])
def test_the_command_is_right_from_the_current_folder(tmp_path, monkeypatch, here, folder):
    out = tmp_path / "it's [1] out"
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "a.txt").write_text(varied(30_000))
    manifest = build(tmp_path / "a.txt", out, max_doc_tokens=512, val_fraction=None)
    monkeypatch.chdir(tmp_path / here)
    python, script, preset, train_files, *_ = shlex.split(text.next_step(out, manifest)[-1].removeprefix("next: "))
    assert python == "python" and Path(script).resolve() == ROOT / "train_gpt.py"
    assert train_files == f"--train_files={folder}/train_*.bin"
    found, = glob.glob(train_files.partition("=")[2])
    assert Path(found).samefile(out / "train_000000.bin")


# -----------------------------------------------------------------------------
# Command line


def test_command_says_what_to_type_next_and_then_that_nothing_is_to_do(tmp_path):
    write_files(tmp_path / "in", 20, size=300)
    first = run(tmp_path / "in", "--out", tmp_path / "out", "--tokenizer=bytes")
    assert first.returncode == 0 and first.stderr == ""
    last_line = first.stdout.splitlines()[-1]
    command, *words = shlex.split(last_line.removeprefix("next: python "))
    flags = dict(word.removeprefix("--").split("=", 1) for word in words)
    assert command == "train_gpt.py" and flags["preset"] == "tiny" and int(flags["val_tokens"]) > 0
    for split in ("train", "val"):       # relative where that is shorter
        assert (ROOT / flags[f"{split}_files"]).resolve() == (tmp_path / "out" / f"{split}_*.bin").resolve()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    again = run(tmp_path / "in", f"--out={tmp_path}/out", "--tokenizer=bytes", "--processes=2")
    assert again.returncode == 0 and "nothing to do" in again.stdout and again.stdout.splitlines()[-1] == last_line
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    (tmp_path / "in" / "new.md").write_text("news")
    build(tmp_path / "in", tmp_path / "out", shard_tokens=5000)
    assert len(list((tmp_path / "out").glob("train_*"))) > 2
    last = run(tmp_path / "in", f"--out={tmp_path}/out", "--tokenizer=bytes")
    assert "nothing to do" not in last.stdout and "21 documents" in last.stdout
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "train_000000.bin", "val_000000.bin", "tokenizer.json", "manifest.json"}  # older shards are gone


def test_brief_prints_one_line_and_the_manifest_has_the_counts(tmp_path):
    write_files(tmp_path / "in", 20, size=300)
    (tmp_path / "in" / "a.gif").write_text("x")
    flags = (tmp_path / "in", f"--out={tmp_path}/out", "--tokenizer=bytes", "--brief")
    first, again = run_here(*flags), run_here(*flags)
    assert re.fullmatch(r"20 documents: [\d,]+ training tokens and [\d,]+ validation tokens; \S+/manifest.json says "
                        r"what was left out\n", first.stdout), first
    assert left_out(json.loads((tmp_path / "out" / "manifest.json").read_text())) == {"file of another kind .gif": 1}
    assert re.fullmatch(r"\S+ already holds this result: nothing to do\n", again.stdout), again
    missing = run_here(tmp_path / "in", f"--out={tmp_path}/out", "--tokenizer=bytes", "--brief", "--val_fraction=0")
    assert missing.stdout.splitlines()[-1].startswith("no next command: there is no validation text")


def test_shards_of_another_tokenizer_or_text_are_not_replaced_without_a_word(tmp_path, refuses):
    write_files(tmp_path / "in", 20, size=300)
    write_files(tmp_path / "other", 20, size=300, seed=2)
    (tmp_path / "tok.json").write_text(json.dumps(small_bpe()))
    out = f"--out={tmp_path}/out"
    assert run_here(tmp_path / "in", out, f"--tokenizer={tmp_path}/tok.json").returncode == 0
    refuses([tmp_path / "in", out, "--tokenizer=bytes"], ["holds shards of the tokenizer small;", "--force replaces"])
    refuses([tmp_path / "other", out, f"--tokenizer={tmp_path}/tok.json"], ["holds shards made of in;", "--force"])
    done = run_here(tmp_path / "in", out, "--tokenizer=bytes", "--force")
    assert done.returncode == 0 and f"out/: of the tokenizer small\n" in done.stdout
    (tmp_path / "in" / "new.md").write_text("news")      # one's own text that grows needs no flag
    done = run_here(tmp_path / "in", out, "--tokenizer=bytes", "--seed=3")
    assert done.returncode == 0 and "out/: of other text, made with another --seed\n" in done.stdout
    assert "replaced" not in run_here(tmp_path / "in", out, "--tokenizer=bytes", "--seed=3", "--force").stdout
    done = run_here(tmp_path / "in", tmp_path / "other", out, "--tokenizer=bytes", f"--val={tmp_path}/other/d0")
    assert done.returncode == 0 and "out/: of other text, made with another --seed" in done.stdout
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest | {"made_by": {"script": "chat.py"}}))
    refuses([tmp_path / "in", out, "--tokenizer=bytes"], ["holds shards made by chat.py;"])
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest | {"made_by": {"script": "text.py"}}))
    done = run_here(tmp_path / "in", out, "--tokenizer=bytes")
    assert done.returncode == 0 and "out/: its manifest.json was damaged\n" in done.stdout


def test_a_vocabulary_is_not_replaced_by_that_of_shards(tmp_path, refuses):
    write_files(tmp_path / "in", 20, size=300)
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text(json.dumps(small_bpe()))
    out = f"--out={tmp_path}/tok"
    refuses([tmp_path / "in", out, "--tokenizer=bytes"], ["holds another tokenizer.json", "--force"])
    assert run_here(tmp_path / "in", out, f"--tokenizer={tmp_path}/tok").returncode == 0


def test_the_library_replaces_what_was_in_its_folder_and_says_so(tmp_path, monkeypatch, capsys):
    """So that run.sh never stops because data/text.py ran with other flags before."""
    write_files(tmp_path / "python3", 20, size=300)
    monkeypatch.setattr(text, "HERE", tmp_path)
    monkeypatch.setattr(text.sysconfig, "get_path", lambda _: str(tmp_path / "python3"))
    monkeypatch.setattr(sys, "argv", ["text.py", "--tokenizer=bytes"])
    (tmp_path / "tok.json").write_text(json.dumps(small_bpe()))
    build(tmp_path / "python3", tmp_path / "local", tokenizer=tmp_path / "tok.json")
    text.main()
    assert "local/: of the tokenizer small\n" in capsys.readouterr().out
    own = ["--tokenizer=bytes", f"--out={tmp_path}/local", f"{tmp_path}/python3/d0"]
    monkeypatch.setattr(sys, "argv", ["text.py", *own])
    with pytest.raises(SystemExit):
        text.main()
    assert "holds shards made of python3;" in capsys.readouterr().err


def test_without_input_the_python_library_is_read(tmp_path):
    """On a stand-in for the library; the real one takes seconds and is what run.sh starts with."""
    library = tmp_path / "python3"
    write_files(library, 30, size=100)
    (library / "test" / "tokenizedata").mkdir(parents=True)
    (library / "test" / "tokenizedata" / "bad.py").write_text("broken on purpose")
    (library / "site-packages").mkdir()
    (library / "site-packages" / "other.py").write_text("not the library")
    (library / "copy.py").write_text((library / "d0" / "0.txt").read_text())
    code = f"import sysconfig, runpy; sysconfig.get_path = lambda _: {str(library)!r}; " \
           f"import sys; sys.argv = ['text.py', '--tokenizer=bytes', '--out={tmp_path}/out']; " \
           f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    texts = decode(tmp_path / "out", "train") + decode(tmp_path / "out", "val")
    assert len(texts) >= 30 and not any("broken" in t or "not the library" in t for t in texts)
    assert len([t for t in texts if re.match(r"\d+: ", t)]) == 30  # the copy is dropped
    assert "1 x file that --exclude leaves out" in done.stdout and "dropped: 1 x duplicate" in done.stdout


def mistakes(tmp_path):
    """name -> (arguments, what the line must hold)"""
    write_files(tmp_path / "in", 3)
    write_rows(tmp_path / "rows.jsonl", ["x", "y"], column="body")
    (tmp_path / "a.docx").write_text("x")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_text("x")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "wrong").mkdir()
    for name in ("vocab.bpe", "encoder.json"):
        (tmp_path / "wrong" / name).write_text("{}")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "fineweb_val_000000.bin").write_text("x")
    hash_of_wrong = hashlib.sha256(b"{}").hexdigest()
    return {
        "path missing": (["nowhere"], ["nowhere", "no such file"]),
        "nothing usable": ([tmp_path / "blank.txt"], ["no usable text", "empty document"]),
        "unknown ending": ([tmp_path / "a.docx"], ["a.docx", ".jsonl"]),
        "unknown endings only": ([tmp_path / "pictures"], [".jpg", ".jsonl"]),
        "column absent in lines": ([tmp_path / "rows.jsonl"], ["'text'", "body, n"]),
        "column of numbers": ([tmp_path / "rows.jsonl", "--text_column=n"], ["'n'", "not text"]),
        "val_fraction": ([tmp_path / "in", "--val_fraction=1"], ["--val_fraction=1.0", "below 1"]),
        "max_doc_tokens": ([tmp_path / "in", "--max_doc_tokens=3"], ["--max_doc_tokens=3"]),
        "processes": ([tmp_path / "in", "--processes=0"], ["--processes=0"]),
        "unknown flag": ([tmp_path / "in", "--sed=1"], ["--sed=1"]),
        "value of a flag": ([tmp_path / "in", "--seed=x"], ["--seed", "'x'"]),
        "wrong vocabulary": ([tmp_path / "in", "--vocab_dir", tmp_path / "wrong"], ["vocab.bpe", hash_of_wrong]),
        "no vocabulary": ([tmp_path / "in", "--tokenizer=gpt2"], ["--vocab_dir", "tiktoken", "--tokenizer=bytes"]),
        "input is empty": ([""], ["path is empty"]),
        "out is empty": ([tmp_path / "in", "--out="], ["--out", "path is empty"]),
        "val missing": ([tmp_path / "in", "--tokenizer=bytes", "--val=nowhere"], ["nowhere", "no such file"]),
        "val twice": ([tmp_path / "in", "--val=a", "--val_fraction=0.1"], ["--val", "--val_fraction"]),
        "a link to itself": ([tmp_path / "loop"], ["loop", "symbolic links"]),
        "name too long": (["A" * 5000], ["too long"]),
        "encoding": ([tmp_path / "in", "--encoding=klingon"], ["--encoding=klingon", "gb18030"]),
        "encoding of no text": ([tmp_path / "in", "--encoding=base64"], ["--encoding=base64"]),
        "tokenizer missing": ([tmp_path / "in", "--tokenizer=gpt5"], ["--tokenizer=gpt5", "not gpt2, not bytes"]),
        "out that cannot be typed": ([tmp_path / "in", f"--out={tmp_path}/a\nb"], ["a b", "--out"]),
        "out is no folder": ([tmp_path / "in", "--tokenizer=bytes", f"--out={tmp_path}/a.docx/out"], ["a.docx"]),
        "foreign shards": ([tmp_path / "in", "--tokenizer=bytes", f"--out={tmp_path}/foreign"], ["fineweb_val"]),
    }


@pytest.fixture
def refuses(tmp_path, monkeypatch):
    """Function that runs the command: it ends with one line that holds `expected`, and leaves the folder as it was."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "no_cache"))

    def check(args, expected, run=run_here):
        before = sorted(tmp_path.rglob("*"))
        done = run(*args, *([] if any(str(a).startswith("--out") for a in args) else [f"--out={tmp_path}/new/out"]))
        assert done.returncode == 2, done
        assert done.stderr.count("\n") == 1 and done.stderr.startswith("text.py: "), done.stderr
        assert all(str(part) in done.stderr for part in expected), done.stderr
        assert sorted(tmp_path.rglob("*")) == before
    return check


def test_mistakes_get_one_line_and_leave_nothing(tmp_path, refuses):
    for args, expected in mistakes(tmp_path).values():
        refuses(args, expected)


def test_absent_column_of_parquet(tmp_path, refuses):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"content": ["x"], "url": ["y"]}), tmp_path / "t.parquet")
    refuses([tmp_path / "t.parquet"], ["t.parquet", "'text'", "content, url"], run)


def test_home_folder_in_paths(tmp_path, monkeypatch):
    """A shell leaves the ~ of --out=~/x as it is; a file that has such a name is itself."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    args = text.parse_args(["~/in", "--out=~/out", "--val=~/val", "--vocab_dir=~/vocab"])
    assert [*args.inputs, args.out, args.val, args.vocab_dir] == [tmp_path / n for n in ("in", "out", "val", "vocab")]
    (tmp_path / "~x").write_text("")
    assert text.parse_args(["~x"]).inputs == [Path("~x")]


@pytest.mark.parametrize("locale", [{"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
                                    {"PYTHONIOENCODING": "gbk"}])
def test_any_locale_and_names_that_no_terminal_may_see(tmp_path, locale):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in (b"\x1b[31mred\x07.txt", b"caf\xe9.csv", "größe 東京.txt".encode(), b"new\nline.jpg", b"\xff.txt"):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_text(varied(10_000))
    (folder / "\33[1mempty.txt").write_text("")
    done = run(folder, f"--out={tmp_path}/out", "--tokenizer=bytes", env=os.environ | locale, text=False)
    assert done.returncode == 0, done.stderr
    assert b"6 files found, 3 read" in done.stdout
    assert not set(done.stdout + done.stderr) & ({*range(32)} - {10} | {127})
    assert done.stdout.splitlines()[-1].startswith(b"next: ")
    json.loads((tmp_path / "out" / "manifest.json").read_text())


def test_files_follow_the_umask(tmp_path):
    write_files(tmp_path / "in", 3)
    before = os.umask(0o027)
    try:
        build(tmp_path / "in", tmp_path / "out", val_fraction=0.3)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("processes", [1, 2])
def test_disk_that_fills_up(tmp_path, processes):
    """A limit on file size stands in for a full disk: the same kind of error at the same places."""
    (tmp_path / "in").mkdir()
    for i in range(6):
        (tmp_path / "in" / f"{i}.txt").write_text("word " * 200_000)
    done = run(tmp_path / "in", f"--out={tmp_path}/out", "--tokenizer=bytes", f"--processes={processes}",
               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000)))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "File too large" in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_interruption_keeps_the_old_shards(tmp_path, processes):
    write_files(tmp_path / "in", 5)
    build(tmp_path / "in", tmp_path / "out")
    before = digests(tmp_path / "out")
    (tmp_path / "in" / "more.jsonl").write_text(f'{{"text": "{"x" * 400}"}}\n' * 150_000)
    command = [sys.executable, SCRIPT, tmp_path / "in", f"--out={tmp_path}/out", "--tokenizer=bytes"]
    with subprocess.Popen([*command, f"--processes={processes}"], stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True, start_new_session=True) as process:
        while process.poll() is None and not list(tmp_path.glob("out/.building-*/ids-*")):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, stderr = process.communicate()
    assert process.returncode == 130 and stderr.count("\n") == 1 and "interrupted" in stderr, stderr
    assert digests(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["text.py", "tokenizer.py", "chat.py", "code.py"])
def test_an_interruption_of_the_imports_shows_no_traceback(tmp_path, name):
    (tmp_path / "tqdm.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    done = subprocess.run([sys.executable, SCRIPT.with_name(name), tmp_path], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def long_answer(started):
    started.touch()
    return bytes(1 << 27)


def test_workers_end_while_one_of_them_answers(tmp_path):
    """An answer that is cut off would be waited for for ever; 0.4 s after the start it is on its way."""
    (tmp_path / "tokenizer.json").write_bytes(text.bytes_tokenizer_json())
    large = [SimpleNamespace(size=1 << 40)]
    with pytest.raises(KeyboardInterrupt), text._workers(
            2, large, tmp_path, {"max_doc_tokens": 0, "stream": False}) as pool:
        pool.submit(long_answer, tmp_path / "started")
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        time.sleep(0.4)
        raise KeyboardInterrupt


# -----------------------------------------------------------------------------
# Joined documents and needles

def write_packages(folder, packages=6, files=5):
    """A folder of packages with modules of different sizes; returns package -> texts in the order of their names."""
    rng, texts = random.Random(0), {}
    for p in range(packages):
        for f in range(files):
            path = folder / f"package{p}" / ("sub" if f % 2 else "") / f"m{f}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"# {p} {f}\n{words(rng, 300)}\n")
        found = sorted((folder / f"package{p}").rglob("*.py"), key=lambda path: str(path.relative_to(folder)))
        texts[f"package{p}"] = [path.read_text() for path in found]
    return texts


def test_join_makes_one_document_of_a_package(tmp_path, monkeypatch):
    source = tmp_path / "source"
    texts = write_packages(source)
    (source / "alone.txt").write_text("a file beside the packages\n")
    (source / "rows.jsonl").write_text('{"text": "a row"}\n{"text": "another row"}\n')
    (source / "package0" / "empty.py").write_text("\n")
    manifest = build(source, tmp_path / "out", join="folder")
    joined = ["\n\n\n".join(text.strip("\n") for text in found) + "\n" for found in texts.values()]
    wanted = [*joined, "a file beside the packages\n", "a row", "another row"]
    assert sorted(decode(tmp_path / "out", "train")) == sorted(wanted)
    counts = manifest["made_by"]["counts"]
    assert counts["documents"] == len(wanted) and counts["files"]["read"] == 32 and counts["files"]["found"] == 33
    assert left_out(manifest) == {"file that holds no document": 1}
    monkeypatch.setattr(text, "JOIN_BYTES", 6000)       # two files of a package
    build(source, tmp_path / "short", join="folder")
    found = [document for document in decode(tmp_path / "short", "train") if document.startswith("#")]
    assert len(found) == 6 * 3 and all(len(document) <= 6000 for document in found)
    assert sorted("\n\n\n".join(found).split()) == sorted("\n".join(joined).split())


def test_needles_stand_twice_in_documents_that_are_held_out_together(tmp_path):
    source = tmp_path / "source"
    write_packages(source)
    outs = [tmp_path / f"out{processes}" for processes in (1, 2)]
    for processes, out in enumerate(outs, 1):
        manifest = build(source, out, join="folder", needles=20, max_doc_tokens=4096, val_fraction=0.4,
                         processes=processes)
    assert digests(outs[0]) == digests(outs[1])         # the result does not depend on the processes
    assert manifest["made_by"]["counts"]["documents"] == 6 + 20
    sides = {}
    for split in ("train", "val"):
        hidden = [document for document in decode(outs[0], split) if "The secret number of the" in document]
        sides[split] = hidden
        for document in hidden:
            found = re.findall(r"\nThe secret number of the (\w+ \w+) is (\d{5})\.\n", document)
            assert len(found) == 2 * len(set(found)) == 2 * len({key for key, _ in found}) and len(document) < 4096
    assert len(sides["train"]) + len(sides["val"]) == 20 and sides["val"]
    originals = {split: " ".join(document for document in decode(outs[0], split) if "secret" not in document)
                 for split in ("train", "val")}
    for split, other in (("train", "val"), ("val", "train")):
        for document in sides[split]:
            lines = [line for line in document.split("\n") if "secret" not in line]
            piece = max(lines, key=len)[:60]            # documents are cut between lines
            assert piece in originals[split] and piece not in originals[other]


@pytest.mark.parametrize("words, named", [
    (["--join=file"], "--join=file"), (["--needles=3"], "--join=folder"), (["--join=folder", "--needles=-1"], "-1"),
    (["--join=folder", "--split=x"], "--split")])
def test_bad_values_of_join_and_needles(words, named, tmp_path):
    (tmp_path / "a.txt").write_text("some text\n" * 2000)
    done = run_here(tmp_path / "a.txt", f"--out={tmp_path}/out", "--tokenizer=bytes", *words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and named in done.stderr
    assert not (tmp_path / "out").exists()


def test_needles_need_text_files(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "word " * 5000}) + "\n")
    done = run_here(tmp_path / "a.jsonl", f"--out={tmp_path}/out", "--tokenizer=bytes", "--join=folder", "--needles=3")
    assert done.returncode == 2 and "--needles=3" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("train, val, words", [
    (30_000_000, 3_000_000, ["--val_tokens=1048576"]), (300_000, 5_000, ["--num_iterations=2", "--val_tokens=4992"]),
    (100_000, 5_000, None), (300_000, 100, None)])
def test_the_command_for_long_text_fits_it(train, val, words, tmp_path):
    """The numbers in it are those of the preset that it names."""
    import train_gpt_long
    preset = train_gpt_long.PRESETS["long"]
    assert (text.LONG_STEPS, text.LONG_BATCH_TOKENS) == (preset.num_iterations, preset.batch_tokens)
    manifest = {"files": {"train_000000.bin": {"tokens": train}, "val_000000.bin": {"tokens": val}},
                "made_by": {"options": {"join": "folder", "max_doc_tokens": 65_536}}}
    line, = text.next_step(tmp_path, manifest)
    assert line.startswith("next: " if words else "no next command: ")
    found = re.findall(r"--(?:num_iterations|val_tokens)=\d+", line)
    assert found == (words or []) and ("RUN" in line) == bool(words)
