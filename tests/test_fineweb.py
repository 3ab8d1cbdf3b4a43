"""data/fineweb.py against a small local server that behaves like the hub and misbehaves on request.

Proves: what is fetched is byte-identical, checked and pinned in manifest.json; a broken transfer is continued, not
begun again; damaged or foreign answers never get a shard's name; errors are one line with exit code 2; a second run
downloads nothing; the vocabulary is found wherever it may be, and without it the shards still train. No test needs a
network. Run from the project root: python -m pytest tests/test_fineweb.py
"""

import contextlib
import errno
import functools
import hashlib
import http.server
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
import requests
from huggingface_hub import constants

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "data" / "fineweb.py"
GPT2_BPE = ROOT.parent / "shared" / "data" / "gpt2_bpe"
sys.path.insert(0, str(ROOT / "data"))

import fineweb  # noqa: E402

REPO = "/datasets/kjj0/fineweb10B-gpt2/resolve/main/"
VAL, ONE, TWO = "fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"
ACCENTS = os.fsdecode("\u00e9t\u00e9".encode())  # as Python has this name in the locale of the tests
NOWHERE = "http://127.0.0.1:9"  # a port where nothing listens


@functools.cache
def shard(seed, tokens=300_000, **words):
    """Bytes of a shard as published (all header words after the third zero), or with the given words set."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, tokens
    for word, value in words.items():
        header[int(word.removeprefix("w"))] = value
    ids = np.random.default_rng(seed).integers(0, 50256, tokens).astype("<u2")
    ids[::1000] = 50256
    return header.tobytes() + ids.tobytes()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


class Hub(http.server.ThreadingHTTPServer):
    """Serves `files` (path -> bytes) with ranges; `plans` (path -> list of moods) are used up, one a request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.plans, self.hashes, self.ranges = {}, {}, {}, True
        self.asked, self.sent, self.tokens = [], {}, []
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # a client that hangs up is part of the tests

    def ask_count(self, name):
        return sum(path.endswith(name) for path, _ in self.asked)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        hub, wish = self.server, self.headers.get("Range")
        path = urllib.parse.unquote(self.path.partition("?")[0])
        hub.asked.append((path, wish))
        hub.tokens.append((path, self.headers.get("Authorization")))
        mood = (hub.plans.get(path) or ["ok"]).pop(0) if hub.plans.get(path) else "ok"
        if mood.isdigit() or path not in hub.files:
            return self.answer(int(mood) if mood.isdigit() else 404, b"no")
        if mood.startswith("redirect "):
            return self.answer(302, b"", {"Location": mood.split()[1]} | (
                {"X-Linked-ETag": f'"{hub.hashes[path]}"'} if path in hub.hashes else {}))
        data, start = hub.files[path], 0
        if wish and hub.ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", wish)[1])
            if start >= len(data):
                return self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        headers = {"ETag": f'"{hub.hashes[path]}"'} if path in hub.hashes else {}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if mood == "endless":  # no length said, and more than the shard's header promises
            headers["Transfer-Encoding"] = "chunked"
        stop = {"cut": (start + len(data)) // 2, "hang": (start + len(data)) // 2}.get(mood, len(data))
        self.answer(206 if start else 200, data[start:stop], headers, length=len(data) - start, mood=mood)

    def answer(self, status, body, headers=None, length=None, mood="ok"):
        headers = headers or {}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if mood == "endless":
            self.end_headers()
            try:
                for at in list(range(0, len(body), 500)) + [0] * 5000:  # short chunks, then 2.5 MB too many
                    self.wfile.write(b"%x\r\n" % len(body[at:at + 500]) + body[at:at + 500] + b"\r\n")
                self.wfile.write(b"0\r\n\r\n")
            except OSError:
                pass
            return
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        self.server.sent[self.path] = self.server.sent.get(self.path, 0) + len(body)
        if mood == "hang":
            self.wfile.flush()
            time.sleep(20)
        if mood in ("cut", "hang"):
            self.close_connection = True


@pytest.fixture
def hub():
    server = Hub()
    for seed, name in enumerate((VAL, ONE, TWO)):
        server.files[REPO + name] = shard(seed)
        server.hashes[REPO + name] = sha256(server.files[REPO + name])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def only_this_machine(monkeypatch, tmp_path):
    """Nothing but 127.0.0.1 can be reached, no token or cache of the user is seen, waits are short (in process)."""
    for name in [name for name in os.environ if name.upper().startswith("HF_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name, value in {"http_proxy": NOWHERE, "https_proxy": NOWHERE, "no_proxy": "127.0.0.1",
                        "HF_HOME": str(tmp_path), "TIKTOKEN_CACHE_DIR": str(tmp_path / "tiktoken")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)
    if "text" in sys.modules:
        sys.modules["text"].gpt2_tokenizer_json.cache_clear()
    monkeypatch.setattr(fineweb, "RETRY_WAITS", (0.01,) * 4)
    monkeypatch.setattr(fineweb.shutil, "which", lambda name: None)  # no GPU: what is printed depends on it


def call(tmp_path, endpoint, *arguments, code=0, process=False, **env):
    """Run the script into tmp_path/out with HF_ENDPOINT=endpoint: its exit code (checked), stdout and stderr.

    process: as a user does, in a process of its own (half a second each); otherwise its main() in this one.
    """
    arguments = [f"--out={tmp_path}/out", *arguments]
    if process:
        result = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60,
                                env={**os.environ, "HF_ENDPOINT": endpoint, **env})
    else:
        result = subprocess.CompletedProcess(arguments, 0)
        with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr, \
                pytest.MonkeyPatch.context() as patch:
            patch.setattr(constants, "ENDPOINT", endpoint)
            template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            for name, value in env.items():
                patch.setenv(name, value)
            try:
                fineweb.main(arguments)
            except SystemExit as stop:
                result.returncode = stop.code
        result.stdout, result.stderr = stdout.getvalue(), stderr.getvalue()
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    if code == 2:
        assert len(result.stderr.splitlines()) == 1, result.stderr
    return result


def next_flags(stdout, program="python"):
    """The flags of the printed command, as a shell reads them."""
    line = stdout.splitlines()[-1]
    assert line.startswith(f"next: {program} "), stdout
    words = shlex.split(line.removeprefix(f"next: {program} "))
    script = words.pop(0)
    assert Path(script).resolve() == ROOT / "train_gpt.py"
    return dict(word.removeprefix("--").split("=", 1) for word in words)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def put_tokenizer(tmp_path):
    """A tokenizer.json is not this test's subject: skip its search by making the file look complete."""
    if not GPT2_BPE.exists():
        return
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "tokenizer.json").write_bytes(canonical_tokenizer())


@functools.cache
def canonical_tokenizer():
    """tokenizer.json of GPT-2 by the format's definition, made here without the project's own code."""
    import base64

    bytes_of = {}
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    for number, byte in enumerate(printable + [b for b in range(256) if b not in printable]):
        bytes_of[chr(byte) if number < len(printable) else chr(256 + number - len(printable))] = byte
    vocabulary = json.loads((GPT2_BPE / "encoder.json").read_text(encoding="utf-8"))
    ranks = [bytes(bytes_of[c] for c in word) for word, _ in sorted(vocabulary.items(), key=lambda kv: kv[1])[:50256]]
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    whole = {"name": "gpt2", "pattern": pattern, "ranks": [base64.b64encode(rank).decode() for rank in ranks],
             "special_tokens": {"<|endoftext|>": 50256}, "bos_id": 50256}
    return (json.dumps(whole, ensure_ascii=True, sort_keys=True, separators=(",", ":")) + "\n").encode("ascii")


needs_vocabulary = pytest.mark.skipif(not GPT2_BPE.exists(), reason="shared/data/gpt2_bpe is absent")
needs_text = pytest.mark.skipif(not (ROOT / "data" / "text.py").exists(), reason="data/text.py is absent")


# -----------------------------------------------------------------------------
# The common road


def test_fetches_pins_and_then_has_nothing_to_do(hub, tmp_path):
    put_tokenizer(tmp_path)
    first = call(tmp_path, hub.address, "2", process=True)
    out = tmp_path / "out"
    for name in (VAL, ONE, TWO):
        assert (out / name).read_bytes() == hub.files[REPO + name]
    manifest = json.loads((out / "manifest.json").read_text())
    data = hub.files[REPO + ONE]
    assert manifest["files"][ONE] == {"sha256": sha256(data), "size": len(data), "tokens": 300_000, "documents": 300,
                                      "text_bytes": None}
    assert sorted(manifest["files"]) == [ONE, TWO, VAL] and manifest["format"] == 1
    assert manifest["tokenizer"] == {"name": "gpt2", "sha256": fineweb.GPT2_TOKENIZER_SHA256, "vocab_size": 50257,
                                     "bos_id": 50256}
    assert re.search(r"3 files, 0\.00 GB, 900,000 tokens in .*out: [\d.]+ s, [\d.]+ MB/s", first.stdout)
    assert "\nnext: " in first.stdout
    assert not [name for name in names_in(out) if name.startswith(".")]

    hub.asked.clear()
    second = call(tmp_path, hub.address, "2", process=True)
    assert "nothing to do" in second.stdout
    assert [path for path, _ in hub.asked if path.startswith(REPO)] == []

    os.remove(out / TWO)
    call(tmp_path, hub.address, "2")
    assert [path for path, _ in hub.asked if path.startswith(REPO)] == [REPO + TWO]


def test_verify_finds_one_flipped_byte_and_fetches_only_that_file(hub, tmp_path):
    put_tokenizer(tmp_path)
    call(tmp_path, hub.address, "2")
    path = tmp_path / "out" / ONE
    data = bytearray(path.read_bytes())
    data[200_001] ^= 1
    path.write_bytes(data)
    hub.asked.clear()
    assert "nothing to do" in call(tmp_path, hub.address, "2").stdout  # size and header are still right
    result = call(tmp_path, hub.address, "2", "--verify")
    assert f"{ONE} has sha256 {sha256(data)}, but" in result.stdout
    assert [asked for asked, _ in hub.asked if asked.startswith(REPO)] == [REPO + ONE]
    assert path.read_bytes() == hub.files[REPO + ONE]


@pytest.mark.parametrize("damage", ["truncated", "header"])
def test_second_run_replaces_a_broken_file(hub, tmp_path, damage):
    put_tokenizer(tmp_path)
    call(tmp_path, hub.address, "1")
    path = tmp_path / "out" / ONE
    path.write_bytes(path.read_bytes()[:-2] if damage == "truncated" else b"x" + path.read_bytes()[1:])
    hub.asked.clear()
    assert "downloading it again" in call(tmp_path, hub.address, "1").stdout
    assert path.read_bytes() == hub.files[REPO + ONE] and hub.ask_count(VAL) == 0


def test_files_put_there_by_hand_are_taken_over(hub, tmp_path):
    put_tokenizer(tmp_path)
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    (out / VAL).write_bytes(hub.files[REPO + VAL])
    (out / ONE).write_bytes(hub.files[REPO + ONE][:-4])
    call(tmp_path, hub.address, "1")
    assert hub.ask_count(VAL) == 0 and hub.ask_count(ONE) == 1
    assert json.loads((out / "manifest.json").read_text())["files"][VAL]["sha256"] == sha256(hub.files[REPO + VAL])


# -----------------------------------------------------------------------------
# Broken transfers


def test_cut_download_is_continued_within_a_run(hub, tmp_path):
    put_tokenizer(tmp_path)
    hub.plans[REPO + VAL] = ["cut"]
    call(tmp_path, hub.address, "0")
    size = len(hub.files[REPO + VAL])
    (_, first), (_, second) = [asked for asked in hub.asked if asked[0].endswith(VAL)]
    begun = int(re.fullmatch(r"bytes=(\d+)-", second)[1])
    assert first is None and size // 2 - 70_000 <= begun <= size // 2
    assert hub.sent[REPO + VAL] <= size + 70_000  # both halves once, but for the last block and the overlap
    assert (tmp_path / "out" / VAL).read_bytes() == hub.files[REPO + VAL]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_stopped_run_leaves_only_a_part_and_the_next_one_continues_it(hub, tmp_path, sent):
    put_tokenizer(tmp_path)
    hub.plans[REPO + VAL] = ["hang"]
    out, size = tmp_path / "out", len(hub.files[REPO + VAL])
    process = subprocess.Popen([sys.executable, str(SCRIPT), f"--out={out}", "0"], stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "HF_ENDPOINT": hub.address}, stdout=subprocess.DEVNULL,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    part, patience = out / f".{VAL}.part", time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > size // 4):
        assert time.monotonic() < patience and process.poll() is None
        time.sleep(0.02)
    began = time.monotonic()
    process.send_signal(sent)
    stderr = process.communicate(timeout=15)[1]
    assert process.returncode == 130 and stderr.splitlines() == ["fineweb.py: stopped; the same command continues"]
    assert time.monotonic() - began < 15  # a silent server does not hold it up
    assert VAL not in names_in(out) and "manifest.json" not in names_in(out)
    hub.sent.clear()
    call(tmp_path, hub.address, "0")
    assert hub.sent[REPO + VAL] < 0.8 * size
    assert (out / VAL).read_bytes() == hub.files[REPO + VAL] and not part.exists()


def begun(tmp_path, data, name=VAL):
    """Leave a partial file as an earlier run would."""
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / f".{name}.part").write_bytes(data)


@pytest.mark.parametrize("case", ["server ignores ranges", "another file's beginning", "other bytes before the overlap",
                                  "complete already", "longer than the file", "garbage"])
def test_partial_file_of_any_kind_ends_in_the_right_file(hub, tmp_path, case):
    put_tokenizer(tmp_path)
    right = hub.files[REPO + VAL]
    hub.ranges = case != "server ignores ranges"
    if case == "another file's beginning":
        hub.hashes.clear()  # must be seen without them
    begun(tmp_path, {"another file's beginning": shard(77)[:100_000], "complete already": right,
                     "other bytes before the overlap": b"".join([right[:5000], b"\0" * 200, right[5200:90_000]]),
                     "longer than the file": right + b"\0" * 5000, "garbage": b"?" * 50_000}.get(case, right[:90_000]))
    call(tmp_path, hub.address, "0")
    assert (tmp_path / "out" / VAL).read_bytes() == right
    assert not (tmp_path / "out" / f".{VAL}.part").exists()
    if case == "complete already":
        assert hub.sent[REPO + VAL] <= 2048


def test_server_errors_are_tried_again_and_then_named(hub, tmp_path):
    put_tokenizer(tmp_path)
    hub.plans[REPO + VAL] = ["500", "503"]
    call(tmp_path, hub.address, "0")
    assert hub.ask_count(VAL) == 3 and VAL in names_in(tmp_path / "out")


def test_tries_are_bounded(hub):
    hub.plans[REPO + VAL] = ["500"] * 50
    source = fineweb.given_source(hub.address + REPO)
    with pytest.raises(fineweb.Refused, match="gave up after 5 tries.*answers 500"):
        fineweb.small_file(source, VAL)
    assert hub.ask_count(VAL) == 5


# -----------------------------------------------------------------------------
# Answers that must never become a shard


def with_header(data, **words):
    header = np.frombuffer(data[:1024], dtype="<i4").copy()
    for word, value in words.items():
        header[int(word[1:])] = value
    return header.tobytes() + data[1024:]


WRONG = {
    "wrong magic": (lambda d: with_header(d, w0=7), "is not a token shard"),
    "a web page": (lambda d: b"<html>log in please</html>", "is not a token shard"),
    "wrong version": (lambda d: with_header(d, w1=2), "is not a token shard"),
    "truncated at the source": (lambda d: d[:-1000], "its header promises 601024"),
    "too long at the source": (lambda d: d + b"\0\0", "has 601026 bytes at the source"),
    "bytes tokenizer": (lambda d: with_header(d, w3=257, w4=256), "another tokenizer than gpt2"),
    "foreign ids": (lambda d: d[:-2] + b"\xff\xff", "holds token id 65535"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_file_is_refused(hub, tmp_path, case):
    change, message = WRONG[case]
    hub.files[REPO + VAL] = change(hub.files[REPO + VAL])
    hub.hashes.clear()
    result = call(tmp_path, hub.address, "0", code=2)
    assert message in result.stderr and VAL in result.stderr
    assert names_in(tmp_path / "out") == []


def test_no_more_bytes_are_written_than_the_header_promises(hub, tmp_path, monkeypatch):
    hub.plans[REPO + VAL] = ["endless"]
    written = []

    class Bar(fineweb.Progress):
        def arrived(self, name, size, new_bytes):
            written.append(size)
            super().arrived(name, size, new_bytes)

    source, stop = fineweb.given_source(hub.address + REPO), threading.Event()
    with pytest.raises(fineweb.Refused, match="sends more than the promised 601024 bytes"):
        fineweb.download(VAL, tmp_path, source, {}, Bar([VAL], tmp_path), stop)
    assert max(written) <= 601_024 and names_in(tmp_path) == []


def test_wrong_hash_is_refused_and_both_are_named(hub, tmp_path):
    hub.hashes[REPO + VAL] = "ab" * 32
    result = call(tmp_path, hub.address, "0", code=2)
    assert "ab" * 32 in result.stderr and sha256(hub.files[REPO + VAL]) in result.stderr
    assert names_in(tmp_path / "out") == []


def test_pinned_hash_wins_over_a_changed_hub(hub, tmp_path):
    put_tokenizer(tmp_path)
    call(tmp_path, hub.address, "0")
    old, new = sha256(hub.files[REPO + VAL]), shard(99)
    hub.files[REPO + VAL], hub.hashes[REPO + VAL] = new, sha256(new)
    os.remove(tmp_path / "out" / VAL)
    result = call(tmp_path, hub.address, "0", code=2)
    assert old in result.stderr and sha256(new) in result.stderr and "manifest.json" in result.stderr
    assert VAL not in names_in(tmp_path / "out")


def test_redirect_keeps_the_hubs_hash_and_not_the_token(hub, tmp_path):
    """As on the hub: the hash stands on the redirect, the storage host's own ETag is something else."""
    put_tokenizer(tmp_path)
    storage = Hub()
    threading.Thread(target=storage.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    storage.files["/blob"], storage.hashes["/blob"] = hub.files[REPO + VAL], "cd" * 32
    hub.plans[REPO + VAL] = [f"redirect {storage.address}/blob"]
    call(tmp_path, hub.address, "0", HF_TOKEN="hf_secret")
    assert hub.tokens[0] == (REPO + VAL, "Bearer hf_secret") and storage.tokens == [("/blob", None)]
    for said in (None, "ef" * 32):
        os.remove(tmp_path / "out" / VAL)
        os.remove(tmp_path / "out" / "manifest.json")
        hub.hashes = {REPO + VAL: said} if said else {}
        hub.plans[REPO + VAL] = [f"redirect {storage.address}/blob"]
        result = call(tmp_path, hub.address, "0", code=2 if said else 0)
    assert "ef" * 32 in result.stderr
    storage.shutdown()
    storage.server_close()


# -----------------------------------------------------------------------------
# Errors a user meets


def test_no_network_is_one_line_soon(tmp_path):
    began = time.monotonic()
    result = call(tmp_path, NOWHERE, "9", code=2, process=True)
    assert time.monotonic() - began < 15
    assert f"cannot reach {NOWHERE} (Connection refused)" in result.stderr
    assert "python data/text.py" in result.stderr and "--from=" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("status, message", [("404", "not found (404)"), ("403", "HF_TOKEN"), ("401", "HF_TOKEN")])
def test_refusals_are_named_at_once(hub, tmp_path, status, message):
    hub.plans[REPO + VAL] = [status] * 9
    result = call(tmp_path, hub.address, "0", code=2)
    assert message in result.stderr and VAL in result.stderr and hub.ask_count(VAL) == 1


@pytest.mark.parametrize("arguments, message", [
    (["104"], "N=104 is out of range: 0 to 103"), (["100", "--variant=edu"], "0 to 99"), (["-1"], "-1"),
    (["nine"], "nine"), (["1", "--jobs=0"], "--jobs=0"), (["1", "--variant=1T"], "1T"), (["1", "--frmo=x"], "--frmo"),
    (["1", "--from=/no/such/folder"], "/no/such/folder"), (["1", "--from=ftp://x/y"], "ftp://x/y"),
    (["1", "--tokenize", "--variant=100B"], "use --variant=10B or edu"), (["1", "--from="], "--from= has no value"),
    (["1", "--vocab_dir="], "--vocab_dir= has no value"), (["1", "--from=~/nothing"], "--from=~/nothing is neither"),
    (["1", "--tokenizer=bytes"], "--tokenizer=bytes needs --tokenize"),
    (["1", "--tokenize", "--tokenizer=bytes", "--vocab_dir=x"], "--vocab_dir=x is for gpt2"),
    (["1", "--tokenize", "--tokenizer=/no/file"], "--tokenizer=/no/file: no such file; name gpt2, bytes, or a"),
    (["1", "--from=a\x1b[31m\nb"], "--from=a?[31m b is neither"),
])
def test_bad_command_line(capsys, tmp_path, arguments, message):
    with pytest.raises(SystemExit) as stop:
        fineweb.main([f"--out={tmp_path / 'out'}", *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_full_disk_is_named(hub, tmp_path, monkeypatch, capsys):
    arguments = [f"--out={tmp_path}/out", f"--from={hub.address}{REPO}", "2", "--jobs=1"]
    usage = fineweb.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:  # known beforehand: three files of 0.6 MB do not fit
        patch.setattr(fineweb.shutil, "disk_usage", lambda path: usage._replace(free=1_500_000))
        with pytest.raises(SystemExit):
            fineweb.main(arguments)
    assert "no space" in capsys.readouterr().err and not (tmp_path / "out").exists()

    def fsync(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:  # found out while writing
        patch.setattr(fineweb.os, "fsync", fsync)
        with pytest.raises(SystemExit):
            fineweb.main(arguments)
    assert "no space left for fineweb_val_000000.bin" in capsys.readouterr().err
    assert VAL not in names_in(tmp_path / "out")


def test_folder_of_another_tokenizer_and_damaged_manifest(hub, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text(
        '{"format": 1, "files": {}, "made_by": {}, "tokenizer": {"name": "bytes", "sha256": "0"}}')
    assert "bytes, not gpt2" in call(tmp_path, hub.address, "0", code=2).stderr
    (out / "manifest.json").write_text('{"format": 1, "fil')
    assert "is damaged" in call(tmp_path, hub.address, "0", code=2).stderr


def test_offline_switch_of_the_hub_library_is_obeyed_but_complete_files_are_fine(hub, tmp_path, monkeypatch):
    put_tokenizer(tmp_path)
    call(tmp_path, hub.address, "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "nothing to do" in call(tmp_path, hub.address, "0").stdout or not GPT2_BPE.exists()
    hub.asked.clear()
    assert "HF_HUB_OFFLINE" in call(tmp_path, hub.address, "1", code=2).stderr and not hub.asked


def test_two_runs_do_not_share_a_folder(hub, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "out").mkdir()
    handle = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    begun(tmp_path, b"")  # the other run's
    assert "another run" in call(tmp_path, hub.address, "0", code=2).stderr
    assert names_in(tmp_path / "out") == [f".{VAL}.part"]
    os.close(handle)


# -----------------------------------------------------------------------------
# Other sources, tokenizer, tokenising


def test_from_folder_takes_its_shards_and_tokenizer_without_a_network(hub, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    ours = with_header(shard(5), w3=50257, w4=50256, w5=2)
    for name, data in ((VAL, hub.files[REPO + VAL]), (ONE, ours)):
        (folder / name).write_bytes(data)
    if GPT2_BPE.exists():
        (folder / "tokenizer.json").write_bytes(canonical_tokenizer())
    result = call(tmp_path, NOWHERE, "1", f"--from={folder}")
    assert (tmp_path / "out" / ONE).read_bytes() == ours
    assert ("warning: no tokenizer.json" in result.stderr) != GPT2_BPE.exists()
    assert "tokenizer.json" in names_in(tmp_path / "out") or not GPT2_BPE.exists()
    result = call(tmp_path, NOWHERE, "2", f"--from={folder}", code=2)
    assert TWO in result.stderr and "no such file" in result.stderr


def test_from_address_with_a_manifest_checks_its_hashes(hub, tmp_path):
    put_tokenizer(tmp_path)
    hub.files["/copy/" + VAL] = hub.files[REPO + VAL]
    hub.files["/copy/manifest.json"] = json.dumps({"files": {VAL: {"sha256": "12" * 32}}}).encode()
    assert "12" * 32 in call(tmp_path, NOWHERE, "0", f"--from={hub.address}/copy/", code=2).stderr
    del hub.files["/copy/manifest.json"]
    call(tmp_path, NOWHERE, "0", f"--from={hub.address}/copy")
    assert (tmp_path / "out" / VAL).read_bytes() == hub.files[REPO + VAL]


def test_other_variants_ask_for_their_own_files(hub, tmp_path):
    put_tokenizer(tmp_path)
    for repo, prefix in (("fineweb100B-gpt2", "fineweb"), ("finewebedu10B-gpt2", "finewebedu")):
        for name in (f"{prefix}_val_000000.bin", f"{prefix}_train_000001.bin"):
            hub.files[f"/datasets/kjj0/{repo}/resolve/main/{name}"] = shard(3)
    call(tmp_path, hub.address, "1", "--variant=100B")
    result = call(tmp_path, hub.address, "1", "--variant=edu")
    assert "finewebedu_train_000001.bin" in names_in(tmp_path / "out")
    assert next_flags(result.stdout)["val_files"] == f"{tmp_path}/out/finewebedu_val_*.bin"


@pytest.fixture
def disk(hub, tmp_path):
    """A folder of published shards without a tokenizer.json, as users of the public speedrun have."""
    folder = tmp_path / "disk"
    folder.mkdir()
    for name in (VAL, ONE):
        (folder / name).write_bytes(hub.files[REPO + name])
    return folder


def test_without_a_vocabulary_the_shards_are_put_in_place_and_one_line_says_what_works(disk, tmp_path):
    result = call(tmp_path, NOWHERE, "1", f"--from={disk}")
    assert names_in(tmp_path / "out") == sorted([VAL, ONE, "manifest.json"])
    line, = result.stderr.splitlines()
    for words in ("fineweb.py: warning: no tokenizer.json for ", "not in tiktoken's cache", "Connection refused",
                  "The shards are complete.", "train_gpt.py trains --preset=tiny", "sample.py", "evaluate.py",
                  "run this command again with --vocab_dir=FOLDER or with a network"):
        assert words in line, line
    flags = next_flags(result.stdout)
    assert flags == {"preset": "tiny", "train_files": f"{tmp_path}/out/fineweb_train_*.bin",
                     "val_files": f"{tmp_path}/out/fineweb_val_*.bin"}


def test_a_wrong_tokenizer_in_the_folder_is_named(disk, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    assert "is another tokenizer's: remove it; " in call(tmp_path, NOWHERE, "1", f"--from={disk}").stderr


@needs_vocabulary
@needs_text
def test_the_tokenizer_can_be_added_later(disk, tmp_path):
    call(tmp_path, NOWHERE, "1", f"--from={disk}")
    result = call(tmp_path, NOWHERE, "1", f"--from={disk}", f"--vocab_dir={GPT2_BPE}")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == canonical_tokenizer()
    assert not result.stderr and "nothing to do" in result.stdout


@needs_vocabulary
@needs_text
@pytest.mark.parametrize("place", ["TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR", "temporary files"])
def test_the_vocabulary_is_found_in_the_cache_of_tiktoken(disk, tmp_path, monkeypatch, place):
    folder = tmp_path / "cache"
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    if place == "temporary files":
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        folder = tmp_path / "data-gym-cache"
    else:
        monkeypatch.setenv(place, str(folder))
    folder.mkdir()
    address = b"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json"
    (folder / hashlib.sha1(address).hexdigest()).write_bytes((GPT2_BPE / "encoder.json").read_bytes())
    assert not call(tmp_path, NOWHERE, "1", f"--from={disk}").stderr
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == canonical_tokenizer()


@needs_text
@pytest.mark.parametrize("more", [(), ("--tokenize",)])
def test_a_wrong_vocab_dir_is_refused_before_anything_is_downloaded(hub, tmp_path, more):
    (tmp_path / "empty").mkdir()
    result = call(tmp_path, hub.address, "1", f"--vocab_dir={tmp_path}/empty", *more, code=2)
    assert f"--vocab_dir={tmp_path}/empty: {tmp_path}/empty/vocab.bpe cannot be read" in result.stderr
    assert "name a folder with GPT-2's encoder.json and vocab.bpe" in result.stderr
    assert not hub.asked and not (tmp_path / "out").exists()


def test_tokenize_without_a_vocabulary_names_the_remedy(hub, tmp_path):
    result = call(tmp_path, hub.address, "1", "--tokenize", code=2)
    assert "GPT-2's vocabulary was not found (" in result.stderr and "pass --vocab_dir=FOLDER" in result.stderr
    assert not (tmp_path / "out").exists()


# -----------------------------------------------------------------------------
# Paths, proxies, locales, and the printed command


@pytest.mark.parametrize("name", ["a [b] c", "two  blanks", "it's", "back\\slash", "st*r", "-x", "~", ACCENTS,
                                  "bell\a\x1b[31m", "new\nline", os.fsdecode(b"not-utf8-\xff")], ids=ascii)
def test_odd_paths_work_and_the_printed_command_finds_the_shards(disk, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    source, out = tmp_path / f"from {name}", tmp_path / name
    disk.rename(source)
    result = call(tmp_path, NOWHERE, "1", f"--from={source}", f"--out={out}")
    assert {VAL, ONE} <= {*names_in(out)}
    assert all(line.isprintable() for line in (result.stdout + result.stderr).splitlines())
    sys.path.insert(0, str(ROOT))
    import train_gpt
    flags = next_flags(result.stdout)
    found = train_gpt.open_shards(flags["train_files"], flags["val_files"])
    assert [[Path(shard.path).resolve() for shard in shards] for shards in found] == [[out / ONE], [out / VAL]]


def test_tilde_is_the_home_folder_in_every_path(disk, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    call(tmp_path, NOWHERE, "0", "--from=~/disk", "--out=~/new/place")
    assert VAL in names_in(tmp_path / "new" / "place") and not (tmp_path / "~").exists()
    assert "--vocab_dir=" + str(tmp_path / "voc") in call(
        tmp_path, NOWHERE, "0", "--from=~/disk", "--vocab_dir=~/voc", code=2).stderr
    assert "are the same folder" in call(tmp_path, NOWHERE, "0", "--from=~/disk", "--out=disk", code=2).stderr


def test_a_failed_run_removes_the_folders_that_it_made(tmp_path):
    (tmp_path / "mine").mkdir()
    for out in ("new/place", "mine"):
        call(tmp_path, NOWHERE, "0", f"--out={tmp_path / out}", code=2)
    assert names_in(tmp_path) == ["mine"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_that_the_umask_asks_for(hub, tmp_path, umask):
    before = os.umask(umask)
    try:
        if GPT2_BPE.exists():
            call(tmp_path, hub.address, "1", f"--vocab_dir={GPT2_BPE}")
        else:
            call(tmp_path, hub.address, "1")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert {VAL, ONE, "manifest.json"} <= modes.keys() and {*modes.values()} == {0o666 & ~umask}, modes


@pytest.mark.parametrize("proxy, words", [
    ("socks5://me:secret@127.0.0.1:9", "the proxy socks5://127.0.0.1 is a SOCKS proxy, which needs the Python package "
                                       "PySocks: pip install pysocks, or unset HTTPS_PROXY"),
    ("gopher://me:secret@127.0.0.1:9", "the proxy gopher://127.0.0.1 is not the address of an http proxy"),
    ("http://:80", "is not the address of an http proxy"), ("http://[", "is not the address of an http proxy"),
])
def test_a_proxy_that_cannot_work_is_one_line(tmp_path, monkeypatch, proxy, words):
    def without_the_package(*args, **kwargs):
        raise requests.exceptions.InvalidSchema("Missing dependencies for SOCKS support.")

    monkeypatch.setattr(requests.adapters, "SOCKSProxyManager", without_the_package)
    result = call(tmp_path, "http://hub.invalid", "0", http_proxy=proxy, code=2)
    assert words in result.stderr and "secret" not in result.stderr


def test_a_missing_certificate_file_is_one_line(tmp_path):
    result = call(tmp_path, "https://127.0.0.1:9", "0", REQUESTS_CA_BUNDLE="/no/such/file", code=2)
    assert "/no/such/file" in result.stderr and "check REQUESTS_CA_BUNDLE" in result.stderr


def test_a_locale_without_the_letters_of_a_path_does_not_end_the_run(disk, tmp_path):
    result = call(tmp_path, NOWHERE, "1", f"--from={disk}", f"--out={tmp_path}/{ACCENTS}", process=True, LC_ALL="C",
                  PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii:strict")
    assert "next: python" in result.stdout and VAL in names_in(tmp_path / ACCENTS)


def result_of(prefix="fineweb_", train=900_000_000, val=100_000_000, has_tokenizer=True):
    entries = {f"{prefix}{split}_000000.bin": {"tokens": tokens}
               for split, tokens in (("train", train), ("val", val)) if tokens}
    return fineweb.Result(entries, 1, prefix, has_tokenizer)


@pytest.mark.parametrize("changes, gpus, flags", [
    ({}, True, {}), ({}, False, {"preset": "tiny"}), ({"has_tokenizer": False}, True, {"preset": "tiny"}),
    ({"val": 3_600_000}, True, {"val_tokens": "3599360"}), ({"val": 3_600_000}, False, {"preset": "tiny"}),
    ({"val": 65_536}, False, {"preset": "tiny", "val_tokens": "64512"}),
    ({"val": 500}, False, {"preset": "tiny", "val_tokens": "499"}),
    ({"train": 200_000_000}, True, {"epochs": "5"}), ({"train": 200_000_000}, False, {"preset": "tiny"}),
])
def test_the_printed_command_fits_machine_and_shards(monkeypatch, changes, gpus, flags):
    monkeypatch.setattr(fineweb.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if gpus else None)
    monkeypatch.chdir(ROOT)
    lines = fineweb.next_lines(ROOT / "data" / "fineweb10B", result_of(**changes))
    program = "python" if "preset" in flags else "torchrun --standalone --nproc_per_node=gpu"
    found = next_flags("\n".join(lines), program)
    if "preset" in flags:
        assert found.pop("train_files") == "data/fineweb10B/fineweb_train_*.bin" and found.pop("val_files")
    assert found == flags


@pytest.mark.parametrize("changes, words", [({"train": 0}, "there is no training shard; give N=1 or more"),
                                            ({"val": 0}, "there is no validation shard")])
def test_shards_that_cannot_train_get_no_command(changes, words):
    line, = fineweb.next_lines(ROOT, result_of(**changes))
    assert line.startswith("no next command: ") and words in line


@needs_vocabulary
def test_tokenizer_constant_is_the_hash_of_the_canonical_file():
    assert sha256(canonical_tokenizer()) == fineweb.GPT2_TOKENIZER_SHA256


@needs_vocabulary
@needs_text
@pytest.mark.parametrize("sound", [True, False])
def test_tokenizer_from_the_hubs_vocabulary(hub, tmp_path, sound):
    for theirs, ours in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
        data = (GPT2_BPE / ours).read_bytes()
        hub.files["/openai-community/gpt2/resolve/main/" + theirs] = data if sound else data[:-1]
    result = call(tmp_path, hub.address, "0")
    assert ("tokenizer.json" in names_in(tmp_path / "out")) == sound == (not result.stderr)
    if sound:
        assert (tmp_path / "out" / "tokenizer.json").read_bytes() == canonical_tokenizer()


@needs_vocabulary
@needs_text
@pytest.mark.parametrize("kind", ["folder", "hub"])
def test_tokenize_makes_shards_from_parquet(hub, tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    documents = [f"Document {i} says hello to the world, {'and again ' * (i % 7)}." for i in range(400)]
    (tmp_path / "src").mkdir()
    for i in range(2):
        table = pyarrow.table({"text": documents[i::2]})
        pyarrow.parquet.write_table(table, tmp_path / "src" / f"{i:03d}_00000.parquet")
    for theirs, ours in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
        hub.files["/openai-community/gpt2/resolve/main/" + theirs] = (GPT2_BPE / ours).read_bytes()
    for path in (tmp_path / "src").iterdir():
        hub.files[f"/datasets/HuggingFaceFW/fineweb/resolve/main/sample/10BT/{path.name}"] = path.read_bytes()
    arguments = ["2", "--tokenize"] + ([f"--from={tmp_path / 'src'}"] if kind == "folder" else [])
    result = call(tmp_path, hub.address, *arguments, process=True)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert sum(entry["documents"] for entry in manifest["files"].values()) == 400
    assert {name.split("_")[0] for name in manifest["files"]} == {"train", "val"}
    for name, entry in manifest["files"].items():
        data = (tmp_path / "out" / name).read_bytes()
        assert sha256(data) == entry["sha256"] and fineweb.promised_bytes(data[:1024], name) == len(data)
    assert next_flags(result.stdout)["train_files"] == f"{tmp_path}/out/train_*.bin"
    assert (tmp_path / "out" / "tokenizer.json").exists()
    hub.asked.clear()
    assert "nothing to do" in call(tmp_path, hub.address, *arguments).stdout and not hub.asked


# -----------------------------------------------------------------------------
# --tokenize with another tokenizer


@pytest.fixture
def parquet(tmp_path):
    """A folder with a parquet file of 60 short documents."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    folder = tmp_path / "src"
    folder.mkdir()
    table = pyarrow.table({"text": [f"Document {i} says hello to the world." for i in range(60)]})
    pyarrow.parquet.write_table(table, folder / "000_00000.parquet")
    return folder


@needs_text
def test_tokenize_with_bytes_needs_no_vocabulary_and_is_recognised_later(parquet, tmp_path):
    arguments = ["1", "--tokenize", "--tokenizer=bytes", f"--from={parquet}"]
    call(tmp_path, NOWHERE, *arguments)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["tokenizer"]["name"] == manifest["made_by"]["fineweb"]["tokenizer"] == "bytes"
    assert "nothing to do" in call(tmp_path, NOWHERE, *arguments, "--verify").stdout
    result = call(tmp_path, NOWHERE, "1", "--tokenize", f"--from={parquet}", code=2)
    assert "holds shards of the tokenizer bytes, not gpt2; choose another --out" in result.stderr
    assert "tokenizer bytes, not gpt2" in call(tmp_path, NOWHERE, "1", code=2).stderr


@needs_text
@pytest.mark.parametrize("vocab_size, width", [(300, 2), (70_000, 4)])
def test_tokenize_hands_a_tokenizer_file_on_and_checks_its_shards(parquet, tmp_path, monkeypatch, vocab_size, width):
    import text

    spec = {"name": "mine", "pattern": "", "ranks": [], "special_tokens": {}, "bos_id": vocab_size - 1}
    (tmp_path / "my.json").write_text(json.dumps(spec))
    calls = []

    def build_shards(inputs, out_dir, *, tokenizer, vocab_dir):
        calls.append((inputs, tokenizer, vocab_dir))
        files = {}
        for split in ("train", "val"):
            header = np.zeros(256, "<i4")
            header[:6] = 20240520, 1, 10, vocab_size, vocab_size - 1, width
            header[8:16] = np.frombuffer(bytes.fromhex("ab" * 32), "<i4")
            data = header.tobytes() + np.full(10, vocab_size - 1, f"<u{width}").tobytes()
            (out_dir / f"{split}_000000.bin").write_bytes(data)
            files[f"{split}_000000.bin"] = {"sha256": sha256(data), "size": len(data), "tokens": 10, "documents": 10}
        about = {"name": "mine", "sha256": "ab" * 32, "vocab_size": vocab_size, "bos_id": vocab_size - 1}
        return {"format": 1, "tokenizer": about, "files": files, "made_by": {}}

    monkeypatch.setattr(text, "build_shards", build_shards)
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = ["1", "--tokenize", "--tokenizer=~/my.json", f"--from={parquet}"]
    assert next_flags(call(tmp_path, NOWHERE, *arguments).stdout)["val_tokens"] == "9"
    assert calls == [([parquet / "000_00000.parquet"], str(tmp_path / "my.json"), None)]
    assert "nothing to do" in call(tmp_path, NOWHERE, *arguments, "--verify").stdout and len(calls) == 1
    path = tmp_path / "out" / "train_000000.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    call(tmp_path, NOWHERE, *arguments, "--verify")
    assert len(calls) == 2
    (tmp_path / "my.json").write_text(json.dumps(spec | {"name": "other"}))
    assert "choose another --out" in call(tmp_path, NOWHERE, *arguments, code=2).stderr


@pytest.mark.parametrize("content, words", [
    ("{", "not a tokenizer.json of this project"), ("[]", "it lacks bos_id, name"),
    ('{"name": "x"}', "it lacks bos_id, pattern, ranks, special_tokens")])
def test_a_wrong_tokenizer_file_is_refused(parquet, tmp_path, content, words):
    (tmp_path / "my.json").write_text(content)
    result = call(tmp_path, NOWHERE, "1", "--tokenize", f"--tokenizer={tmp_path}/my.json", f"--from={parquet}", code=2)
    assert words in result.stderr and not (tmp_path / "out").exists()


def test_tokenize_replaces_no_shards_of_another_origin(parquet, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "train_000000.bin").write_bytes(shard(1))
    result = call(tmp_path, NOWHERE, "1", "--tokenize", "--tokenizer=bytes", f"--from={parquet}", code=2)
    assert "holds shards of another origin, which would be replaced; choose another --out" in result.stderr
    assert (out / "train_000000.bin").read_bytes() == shard(1)
