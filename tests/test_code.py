"""data/code.py: the shards are those of the text in the wheels, the same on every machine; a bad wheel leaves nothing.

Proves: what is kept, cut off and left out, each with its count; near-duplicates go, validation first; whole packages
are held out; neither the order of files nor the locale, the hash seed or the number of processes changes a byte;
hostile and damaged wheels, wrong hashes and failing downloads get one line and leave nothing; pip's own settings
decide where the wheels come from; the shipped list and vocabulary are sound.
Against: tiny wheels that the tests make, and a slice of the real list whose sha256 is written down here.
Run: python -m pytest tests/test_code.py (one test downloads 0.6 MB with pip and skips if it cannot)
"""
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "data" / "code.py"
sys.path[:0] = [str(ROOT / "data")]
import text  # noqa: E402

spec = importlib.util.spec_from_file_location("data_code", SCRIPT)  # `import code` is the standard library's
code = importlib.util.module_from_spec(spec)
spec.loader.exec_module(code)


def source(seed, lines=60):
    """Python source of so many lines, unlike that of every other seed."""
    rng = random.Random(seed)
    return "".join(f"def name_{rng.randrange(10**6)}(value):  # word {rng.randrange(10**6)}\n" for _ in range(lines))


def make_wheel(folder, name, files, version="1.0"):
    """The path of a new wheel with these files (name -> text or bytes), which pip takes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    files = dict(files) | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": ""}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for file, content in files.items():
            wheel.writestr(zipfile.ZipInfo(file), content)
    return path


def line_of(path, marks=""):
    """The line of a list that pins a wheel; marks as in "; validation"."""
    name, version = path.name.split("-")[:2]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{name.replace('_', '-')}=={version} --hash=sha256:{digest}  # MIT{marks}\n"


@pytest.fixture
def world(tmp_path):
    """A folder with two wheels, the list of them, and the tokenizer of single bytes."""
    wheels = tmp_path / "wheels"
    train = make_wheel(wheels, "alpha", {f"alpha/m{i}.py": source(i) for i in range(8)})
    val = make_wheel(wheels, "beta-two", {f"beta/m{i}.py": source(100 + i) for i in range(4)})
    (tmp_path / "list.txt").write_text("# comment\n\n" + line_of(val, "; validation") + line_of(train))
    (tmp_path / "tokenizer.json").write_bytes(text.bytes_tokenizer_json())
    return tmp_path


def make(world, *flags, wheels=True, out="out"):
    """Runs the script in this process; the folder it wrote."""
    code.main([f"--list={world / 'list.txt'}", f"--tokenizer={world / 'tokenizer.json'}", f"--out={world / out}",
               *[f"--wheels={world / 'wheels'}"] * wheels, "--processes=1", *flags])
    return world / out


def refused(call, capsys):
    """The one line on stderr of a call that must end with exit code 2."""
    capsys.readouterr()
    with pytest.raises((SystemExit, text.InputError)) as end:
        call()
    if isinstance(end.value, SystemExit):
        assert end.value.code == 2
        line, = capsys.readouterr().err.splitlines()
        return line
    return str(end.value)


def documents(folder, side):
    """The documents of the shards of one side, sorted."""
    found = []
    for path in sorted(folder.glob(f"{side}_*.bin")):
        raw = np.fromfile(path, "<u2", offset=1024)
        found += [bytes(part[1:].astype(np.uint8)).decode() for part in np.split(raw, np.flatnonzero(raw == 256)[1:])]
    return sorted(found)


def counts_of(folder, name):
    return json.loads((folder / "manifest.json").read_text())["made_by"]["read"][name]


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def rest_of(world):
    """What is in the folder beside the input."""
    return sorted(path.name for path in world.iterdir() if path.name not in ("wheels", "list.txt", "tokenizer.json"))


# -----------------------------------------------------------------------------
# What becomes of the files


def test_the_shards_hold_the_text_and_whole_packages_are_held_out(world, capsys):
    out = make(world, "--max_doc_tokens=0", "--tokens")
    assert documents(out, "train") == sorted(source(i) for i in range(8))
    assert documents(out, "val") == sorted(source(100 + i) for i in range(4))
    manifest = json.loads((out / "manifest.json").read_text())
    assert [(package["name"], package["validation"]) for package in manifest["made_by"]["packages"]] == [
        ("alpha", False), ("beta-two", True)]
    printed = capsys.readouterr().out
    for name, entry in manifest["files"].items():
        assert f"{entry['sha256']}  {name}\n" in printed and digests(out)[name] == entry["sha256"]
    size = sum(len(source(i)) for i in range(8))
    assert counts_of(out, "alpha") == {"documents": 8, "bytes": size, "tokens": size,
                                       "dropped": {"metadata of the wheel": 3}}
    make(world, "--max_doc_tokens=0", "--tokens")
    assert "already holds this result" in capsys.readouterr().out
    assert rest_of(world) == ["out"]


PLANTED = {  # file -> (content, why it is left out)
    "a/logo.svg": ("<svg/>" * 99, "another kind of file"), "a/LICENSE.txt": (source(1), "licence text"),
    "a/font-copying-gpl.txt": (source(2), "licence text"), "a/NOTICE.md": (source(3), "licence text"),
    "a/long.py": (source(4, 30_000), "longer than 1 MiB"), "a/latin.py": (b"# caf\xe9\n" * 60, "not UTF-8"),
    "a/pb2.py": ("# Generated by the protocol compiler.\n" + source(5), "generated"),
    "a/sdk.py": ("# header\n\n# Code generated, DO NOT EDIT\n" + source(6), "generated"),
    "a/gpl.py": ("# GNU General Public License\n" + source(7), "names a copyleft licence"),
    "a/doc.py": ('"""Under the LGPL."""\n' + source(8), "names a copyleft licence"),
    "a/__init__.py": ("from .x import y\n" * 5, "shorter than 200 characters"),
    "a/table.py": ("DATA = [\n" + "1, 2, 3, 4, 5, 6, 7,\n" * 60 + "]\n", "mostly data"),
    "a/min.py": ("a = 1; " * 400 + "\n", "mostly data"), "a/greek.rst": ("λόγος καὶ ἔργον\n" * 60, "mostly data"),
    "a/nul.py": (source(9) + "\0", "mostly data")}


def test_each_file_that_is_left_out_is_counted_under_its_reason(world):
    files = {name: content for name, (content, _) in PLANTED.items()}
    kept = {"a/readme.md": source(20), "a/guide.RST": source(21), "a/license.py": source(22), "a/n.txt": source(23)}
    wheel = make_wheel(world / "wheels", "gamma", files | kept)
    with open(world / "list.txt", "a") as listing:
        listing.write(line_of(wheel))
    out = make(world, "--max_doc_tokens=0")
    expected = {"metadata of the wheel": 3}
    for _, why in PLANTED.values():
        expected[why] = expected.get(why, 0) + 1
    assert counts_of(out, "gamma")["dropped"] == expected
    assert counts_of(out, "gamma")["documents"] == 4 and set(kept.values()) < set(documents(out, "train"))


@pytest.mark.parametrize("head, kept", [
    ("# Copyright 2020 Somebody\n#\n# Licensed under the Apache License\n\n", ""), ("#!/usr/bin/env python\n", None),
    ("# -*- coding: utf-8 -*-\n# (c) X\n# License: BSD\n", ""), ("# what this module does\n", None),
    ("# what it does\n\n    # and licence\n", ""), ("\ufeff# the license\n", ""), ("\r\n# the copyright\r\n", "")])
def test_comments_at_the_head_that_name_a_licence_are_cut_off(head, kept):
    document, why = code.clean((head + source(1)).encode())
    assert (document, why) == ((head if kept is None else kept) + source(1), "")


def test_line_ends_of_windows_make_no_difference():
    assert code.clean(source(1).replace("\n", "\r\n").encode()) == code.clean(source(1).encode())


def changed(document, share, seed=0):
    """The document with this share of its lines replaced, at the end."""
    lines = document.splitlines(keepends=True)
    cut = round(len(lines) * (1 - share))
    return "".join(lines[:cut]) + source(f"{document[:50]}{seed}", len(lines) - cut)


def test_near_duplicates_of_what_was_kept_are_dropped():
    long = source(1, 400)
    for share, dropped in ((0, True), (0.1, True), (0.4, True), (0.6, False), (1, False)):
        seen = code.Seen()
        assert seen.add(long) and seen.add(changed(long, share)) != dropped, share
    seen = code.Seen()
    assert seen.add("x = 1\n") and not seen.add("\n  x = 1\n\n") and seen.add("y = 1\n")   # too short for three lines


def test_a_copy_of_validation_text_never_is_in_the_training_text(world):
    wheel = make_wheel(world / "wheels", "aaa", {"copy.py": changed(source(100), 0.1), "own.py": source(50)})
    with open(world / "list.txt", "a") as listing:
        listing.write(line_of(wheel))
    out = make(world, "--max_doc_tokens=0")
    assert counts_of(out, "aaa") == {"documents": 1, "bytes": len(source(50)), "dropped": {
        "metadata of the wheel": 3, "near-duplicate": 1}}
    assert source(100) in documents(out, "val") and source(50) in documents(out, "train")


def test_no_package_is_more_than_its_share(world):
    length = len(source(0))
    out = make(world, "--max_doc_tokens=0", f"--max_package_bytes={3 * length + length // 2}")
    found = counts_of(out, "alpha")
    assert found["documents"] == 3 and found["dropped"]["beyond the most of a package"] == 5
    chosen = sorted((hashlib.sha256(f"alpha/m{i}.py".encode()).digest(), source(i)) for i in range(8))[:3]
    assert documents(out, "train") == sorted(document for _, document in chosen)


def test_packages_and_slices_are_chosen_by_name_and_mark(world, capsys):
    wheel = make_wheel(world / "wheels", "gamma", {"g.py": source(30, 400)})
    listing = (world / "list.txt").read_text().replace("; validation", "; validation; cpu")
    (world / "list.txt").write_text(listing + line_of(wheel, "; cpu"))
    assert documents(make(world, "--slice=cpu", "--max_doc_tokens=0"), "train") == [source(30, 400)]
    assert len(documents(make(world, "--packages=alpha,beta-two", "--max_doc_tokens=0", out="two"), "train")) == 8
    for flags, words in ((["--packages=alpha"], "both training and validation packages are needed"),
                         (["--packages=alpha,delta"], "'delta' is not in")):
        assert words in refused(lambda flags=flags: make(world, *flags, out="three"), capsys)
    assert "name a folder for them with --out" in refused(lambda: code.parse_args(["--packages=alpha"]), capsys)


def test_documents_for_the_tokenizer(world, capsys):
    target = world / "a" / "texts"
    make(world, f"--text_only={target}")
    assert "wrote 12 documents" in capsys.readouterr().out
    lines = (target / "train" / "alpha.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["text"] for line in lines) == sorted(source(i) for i in range(8))
    assert [path.name for path in (target / "validation").iterdir()] == ["beta-two.jsonl"]
    assert rest_of(world) == ["a"] and "it exists" in refused(lambda: make(world, f"--text_only={target}"), capsys)


# -----------------------------------------------------------------------------
# The same everywhere


def test_neither_order_nor_locale_nor_processes_change_a_byte(world):
    first = make(world)
    again = world / "again"
    again.mkdir()
    shutil.copy(world / "tokenizer.json", again)
    for path in sorted((world / "wheels").iterdir(), reverse=True):
        shutil.copy(path, again / f"another_name_of_{path.name}")
    lines = (world / "list.txt").read_text().splitlines()[::-1]
    (again / "list.txt").write_text("\n".join(lines) + "\n")
    environment = os.environ | {"PYTHONHASHSEED": "77", "LC_ALL": "tr_TR.UTF-8", "TZ": "Asia/Tokyo", "HOME": "/nowhere"}
    command = [sys.executable, SCRIPT, "--list=list.txt", "--wheels=.", "--out=a b [c]/out", "--processes=2",
               "--tokenizer=tokenizer.json"]
    done = subprocess.run(command, cwd=again, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert digests(again / "a b [c]" / "out") == digests(first)


def test_the_order_of_the_files_in_a_wheel_does_not_matter(world):
    first = digests(make(world))
    wheel = make_wheel(world / "wheels", "alpha", {f"alpha/m{i}.py": source(i) for i in reversed(range(8))})
    lines = (world / "list.txt").read_text().splitlines(keepends=True)
    (world / "list.txt").write_text("".join(line for line in lines if "beta" in line) + line_of(wheel))
    again = digests(make(world, out="again"))
    assert first["manifest.json"] != again["manifest.json"]          # it names the wheels
    assert [first[name] for name in first if name.endswith(".bin")] == [
        again[name] for name in again if name.endswith(".bin")]


SLICE = ["flask", "fastapi", "tox"]  # 0.6 MB; flask is a validation package
SLICE_SHA256 = {"train_000000.bin": "0daa26f2e8b40eb0b03a01d820d5c229cda4dfbb53ee57480fc122f2a7c1250a",
                "val_000000.bin": "13994ed78a9e22355026d2a64ca5867ccd9b753418df5ab54e44dbb55a02c098"}


def test_a_slice_of_the_real_packages_has_the_bytes_that_it_has_everywhere(tmp_path, monkeypatch):
    pytest.importorskip("tiktoken")
    monkeypatch.setattr(code, "HERE", tmp_path)
    try:
        code.main([f"--packages={','.join(SLICE)}", f"--out={tmp_path / 'out'}", "--processes=1"])
    except text.InputError as e:
        if "pip cannot download" not in str(e):
            raise
        pytest.skip(f"no package index: {e}")
    found = digests(tmp_path / "out")
    assert {name: found[name] for name in SLICE_SHA256} == SLICE_SHA256


def test_the_shipped_list_and_vocabulary(capsys):
    packages = code.read_list(code.LIST)
    assert {package.licence for package in packages} <= {"MIT", "BSD-2-Clause", "BSD-3-Clause", "Apache-2.0", "ISC"}
    assert set().union(*(package.marks for package in packages)) == {"validation", "cpu"}
    lines = [line for line in code.LIST.read_text().splitlines() if not line.startswith("#")]
    assert lines == sorted(lines) and len(lines) == len(packages) > 100
    for name in ("", "cpu"):
        track = json.loads((ROOT / "records" / f"track_0_{name or 'code'}" / "track.json").read_text())
        folder = code.parse_args([f"--slice={name}"]).out
        assert f"--train_files=data/{folder.name}/train_*.bin" in track["flags"]
        assert all(re.fullmatch("[0-9a-f]{64}", shard["sha256"]) for side in ("train_data", "val_data")
                   for shard in track[side].values())
    vocabulary = code.TOKENIZER.read_bytes()
    assert hashlib.sha256(vocabulary).hexdigest().startswith("d7e02fe29b3f5c24") and len(vocabulary) < 500_000
    spec = json.loads(vocabulary)
    assert len(spec["ranks"]) + len(spec["special_tokens"]) == 32_768 and spec["bos_id"] == 32_759


def test_the_standard_module_of_the_same_name_is_still_found():
    program = (f"import sys; sys.path.insert(0, {str(ROOT / 'data')!r}); import pdb, code\n"
               "print(code.InteractiveConsole)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "<class 'code.InteractiveConsole'>\n", "")


# -----------------------------------------------------------------------------
# Hostile wheels


def entry(name, content=b"x" * 300, **changes):
    """Writes a wheel with one odd file."""
    def write(path):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
            info = zipfile.ZipInfo(name)
            for field, value in changes.items():
                setattr(info, field, value)
            wheel.writestr(info, content)
    return write


def patched(old, new, name="m.py", content=b"y = 1\n" * 200):
    """Writes a wheel in whose bytes something is replaced."""
    def write(path):
        entry(name, content)(path)
        raw = path.read_bytes()
        assert old(raw) in raw
        path.write_bytes(raw.replace(old(raw), new(raw)))
    return write


def many_files(path):
    with zipfile.ZipFile(path, "w") as wheel:
        for i in range(50_001):
            wheel.writestr(zipfile.ZipInfo(f"{i}"), b"")


def hidden_files(path):
    """More files than the end of the file says."""
    many_files(path)
    raw = path.read_bytes()
    path.write_bytes(raw[:-14] + struct.pack("<HH", 5, 5) + raw[-10:])


def bomb(path):
    """A file that unpacks to more than all files together may, as the directory says."""
    entry("m.py", b"y = 1\n" * 200)(path)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"PK\x01\x02")
    raw[at + 24:at + 28] = struct.pack("<I", (1 << 30) + 1)
    path.write_bytes(raw)


def quiet_bomb(path):
    """A file that unpacks to more than the directory says."""
    entry("m.py", b"y = 1\n" * 1_000_000)(path)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"PK\x01\x02")
    raw[at + 24:at + 28] = struct.pack("<I", 1200)
    path.write_bytes(raw)


def cut_short(path):
    entry("m.py", os.urandom(5000))(path)
    path.write_bytes(path.read_bytes()[:-40])


def broken_content(path):
    entry("m.py", source(1).encode())(path)
    raw = bytearray(path.read_bytes())
    raw[60:80] = bytes(20)
    path.write_bytes(raw)


def two_of_a_name(path):
    with pytest.warns(UserWarning), zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("m.py", source(1))
        wheel.writestr("m.py", source(2))


def encrypted(path):
    entry("m.py", source(1).encode())(path)
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(raw)


def zip64(path):
    entry("m.py", source(1).encode())(path)
    raw = path.read_bytes()
    at = raw.index(b"PK\x05\x06")
    path.write_bytes(raw[:at] + b"PK\x06\x07" + bytes(16) + raw[at:])


def large_directory(path):
    entry("m.py", source(1).encode())(path)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"PK\x05\x06")
    raw[at + 12:at + 16] = struct.pack("<I", 1 << 25)
    path.write_bytes(raw)


@pytest.mark.parametrize("write, words", [
    (entry("../../etc/x.py"), "outside of its folder ('../../etc/x.py')"),
    (entry("/etc/x.py"), "outside of its folder"),
    (entry("a/../../x.py"), "outside of its folder"), (entry("c:/x.py"), "outside of its folder"),
    (patched(lambda raw: b"a/b.py", lambda raw: b"a\\b.py", "a/b.py"), "outside of its folder"),
    (entry("link.py", b"/etc/passwd", external_attr=0o120777 << 16), "a link ('link.py')"),
    (many_files, "more than 50,000"), (hidden_files, "more than 50,000"), (bomb, "more than 1,073,741,824"),
    (quiet_bomb, "damaged"), (cut_short, "cut short"), (broken_content, "damaged"), (two_of_a_name, "with one name"),
    (encrypted, "an encrypted file"), (zip64, "more than 50,000 files, or says so"),
    (large_directory, "more than 50,000 files, or says so"),
    (lambda path: path.write_bytes(b"not a zip at all" * 50), "not a wheel"),
    (lambda path: path.write_bytes(b""), "not a wheel")
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_hostile_wheel_gets_one_line_and_leaves_nothing(write, words, world, capsys):
    path = world / "wheels" / "evil-1.0-py3-none-any.whl"
    write(path)
    with open(world / "list.txt", "a") as listing:
        listing.write(line_of(path))
    message = refused(lambda: make(world), capsys)
    assert words in message and path.name in message, message
    assert rest_of(world) == [] and "\n" not in message


def test_a_hostile_wheel_from_the_command_line(world):
    path = world / "wheels" / "evil-1.0-py3-none-any.whl"
    entry("../x.py")(path)
    with open(world / "list.txt", "a") as listing:
        listing.write(line_of(path))
    done = subprocess.run([sys.executable, SCRIPT, "--list=list.txt", "--wheels=wheels", "--out=out",
                           "--tokenizer=tokenizer.json"], cwd=world, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("code.py: ")
    assert rest_of(world) == []


# -----------------------------------------------------------------------------
# Wheels that are missing, and downloads


def missing(world):
    next((world / "wheels").glob("alpha*")).unlink()


def another_version(world):
    missing(world)
    make_wheel(world / "wheels", "alpha", {"a.py": source(1)}, version="2.0")


def another_content(world):
    missing(world)
    make_wheel(world / "wheels", "alpha", {"a.py": source(1)})


@pytest.mark.parametrize("change, words", [
    (missing, "is not there; 1 of 2 are missing"), (another_version, "alpha-2.0-py3-none-any.whl has another sha256"),
    (another_content, "alpha-1.0-py3-none-any.whl has another sha256"),
    (lambda world: shutil.rmtree(world / "wheels"), "2 of 2 are missing")])
def test_a_wheel_that_is_not_in_the_folder(change, words, world, capsys):
    change(world)
    message = refused(lambda: make(world), capsys)
    assert words in message and "1.0 with sha256" in message and rest_of(world) == []


@pytest.fixture
def index(world, monkeypatch):
    """The user's pip takes packages from a folder; the folder. What it brings goes to `data/wheels`."""
    folder = world / "wheels"
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(code, "HERE", world / "data")
    return folder


def test_pip_brings_what_is_not_there(index, world, capsys):
    out = make(world, wheels=False)
    here = world / "data" / "wheels"
    assert sorted(path.name for path in here.iterdir()) == sorted(path.name for path in index.iterdir())
    assert "downloading 2 of 2 wheels" in capsys.readouterr().out
    next(here.glob("alpha*")).unlink()
    assert digests(make(world, wheels=False, out="again")) == digests(out)
    assert "downloading 1 of 2 wheels" in capsys.readouterr().out
    shutil.rmtree(index)
    assert digests(make(world, wheels=False, out="third")) == digests(out)     # nothing is missing, so no pip
    assert "downloading" not in capsys.readouterr().out


def cut_wheel(world):
    path = next((world / "wheels").glob("alpha*"))
    path.write_bytes(path.read_bytes()[:-30])


@pytest.mark.parametrize("change, words", [
    (missing, "pip cannot download the wheels"), (another_version, "pip cannot download the wheels"),
    (another_content, "alpha 1.0 on the index has another sha256"), (cut_wheel, "has another sha256")])
def test_a_download_that_fails_gets_one_line_and_leaves_nothing(change, words, index, world, capsys):
    change(world)
    message = refused(lambda: make(world, wheels=False), capsys)
    assert words in message and "\n" not in message, message
    assert rest_of(world) == ["data"] and list((world / "data" / "wheels").iterdir()) == []


# -----------------------------------------------------------------------------
# Mistakes


GOOD = "a==1 --hash=sha256:" + "0" * 64 + "  # MIT"


@pytest.mark.parametrize("content, words", [
    (b"\xff", "not UTF-8"), (b"a==1\n", "line 1: 'a==1' is not"), (f"{GOOD}\n{GOOD}\n".encode(), "a is there twice"),
    (GOOD.replace("a==", "../a==").encode(), "is not"), (GOOD.replace("==1", "==$(x)").encode(), "is not"),
    (GOOD.replace("  # MIT", "").encode(), "is not"), (GOOD.replace("0000 ", "000 ").encode(), "is not"),
    (b"", "both training and validation packages are needed")])
def test_a_list_that_is_none(content, words, world, capsys):
    (world / "list.txt").write_bytes(content)
    message = refused(lambda: make(world), capsys)
    assert words in message and rest_of(world) == []


@pytest.mark.parametrize("flags, words", [
    (["--processes=0"], "at least 1"), (["--max_package_bytes=0"], "at least 1"), (["--out="], "the path is empty"),
    (["--slice=gpu"], "invalid choice"), (["--max_doc_tokens=3"], "must be 0 (off) or 16 up"),
    (["--nothing"], "--help"),
    (["--tokenizer=nowhere"], "cannot be read"), (["--list=nowhere"], "cannot be read"), (["x"], "unrecognized"),
    (["--out=\u202e"], "cannot be typed"), (["--wheels=--"], "has no value")])
def test_a_flag_that_makes_no_sense(flags, words, world, capsys):
    message = refused(lambda: make(world, *flags), capsys)
    assert words in message and rest_of(world) == []


def test_shards_of_another_origin_are_left_alone(world, capsys):
    (world / "out").mkdir()
    (world / "out" / "train_000000.bin").write_bytes(b"mine")
    assert "holds shards of another origin (train_000000.bin)" in refused(lambda: make(world), capsys)
    assert (world / "out" / "train_000000.bin").read_bytes() == b"mine" and rest_of(world) == ["out"]


def test_too_little_text_is_refused(world, capsys):
    wheels = [make_wheel(world / "wheels", name, {"m.py": source(name, 10)}) for name in ("x", "y")]
    (world / "list.txt").write_text(line_of(wheels[0]) + line_of(wheels[1], "; validation"))
    assert "too little to train on" in refused(lambda: make(world), capsys) and rest_of(world) == []
