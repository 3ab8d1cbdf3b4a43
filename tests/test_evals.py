"""data/evals.py: the questions arrive whole from every kind of source, or not at all, and a zip cannot misbehave.

Against: small sets written here, as folders in each layout, as a zip, and behind a local HTTP server that can also
break off; and evaluate.py, which must find what was fetched. Run: python -m pytest tests/test_evals.py
"""
import hashlib
import http.server
import json
import lzma
import os
import shlex
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data" / "eval"
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import evals  # noqa: E402

ACCENTS = os.fsdecode("\u00e9t\u00e9".encode())   # as Python has this name in the locale of the tests
URIS = ["commonsense_reasoning/copa.jsonl", "world_knowledge/arc_easy.jsonl"]
YAML = "icl_tasks:\n" + "".join(f"-\n  label: x\n  dataset_uri: {uri}\n" for uri in URIS)
ROWS = b'{"query": "q", "choices": ["a", "b"], "gold": 0}\n' * 3
BUNDLE = {"core.yaml": YAML.encode(), "eval_meta_data.csv": b"Eval Task\n"} | {f"eval_data/{uri}": ROWS for uri in URIS}
HELLASWAG = {"hellaswag_val.jsonl": b'{"ctx": "c", "endings": ["a", "b", "c", "d"], "label": 1}\n'}
RESULT = {f"core/{name}": content for name, content in BUNDLE.items()} | HELLASWAG


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_zip(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, content in files.items():
            bundle.writestr(name, content)


def prefixed(prefix, files=BUNDLE):
    return {prefix + name: content for name, content in files.items()}


def packed(files):
    return {f"{name}.xz" if name.endswith(".jsonl") else name:
            lzma.compress(content) if name.endswith(".jsonl") else content for name, content in files.items()}


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def fetch(tmp_path, capsys):
    """Function of a source that runs the command line and returns (the files made, stdout)."""
    def run(source, *flags):
        evals.main([f"--from={source}", f"--out={tmp_path / 'out'}", *flags])
        return files_in(tmp_path / "out"), capsys.readouterr().out
    return run


@pytest.fixture
def refused(fetch, tmp_path, capsys):
    """Function that expects exit code 2, one line with all words, and nothing made."""
    def check(source, *words):
        with pytest.raises(SystemExit) as stopped:
            fetch(source)
        out, err = capsys.readouterr()
        assert (stopped.value.code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("evals.py: ") and [word for word in words if word not in err] == [], err
        assert not (tmp_path / "out").exists()
    return check


@pytest.fixture
def server(tmp_path):
    """An HTTP server of tmp_path/web: (address, the paths asked for, the names that it breaks off, how often)."""
    asked, broken = [], {}

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "web")

        def do_GET(self):
            asked.append(self.path)
            name = self.path.lstrip("/")
            if broken.get(name, 0) > 0:
                broken[name] -= 1
                content = (tmp_path / "web" / name).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[:len(content) // 2])
                self.close_connection = True
                return
            super().do_GET()

        def log_message(self, *args):
            pass
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", asked, broken
        httpd.shutdown()


# -----------------------------------------------------------------------------
# What arrives

@pytest.mark.parametrize("root", ["", "core/", "eval_bundle/"])
@pytest.mark.parametrize("pack", [dict, packed])
def test_a_folder_in_any_layout(tmp_path, fetch, root, pack):
    made, _ = fetch(write(tmp_path / "in", pack(prefixed(root) | HELLASWAG)))
    manifest = json.loads(made.pop("manifest.json"))
    assert made == pack(RESULT)
    assert manifest["files"]["core/eval_meta_data.csv"] == {
        "sha256": hashlib.sha256(BUNDLE["eval_meta_data.csv"]).hexdigest(), "size": 10}
    assert {name: entry.get("items") for name, entry in manifest["files"].items() if ".jsonl" in name} == {
        name: 1 if "hellaswag" in name else 3 for name in pack(RESULT) if ".jsonl" in name}
    assert (manifest["format"], manifest["missing"]) == (1, [])


@pytest.mark.parametrize("root", ["", "eval_bundle/"])
def test_a_zip_from_a_web_server_that_breaks_off_once(tmp_path, fetch, server, root, monkeypatch):
    monkeypatch.setattr(evals, "RETRY_WAITS", (0, 0))
    address, asked, broken = server
    write_zip(tmp_path / "web" / "eval_bundle.zip", prefixed(root))
    write(tmp_path / "web", HELLASWAG)
    broken |= {"eval_bundle.zip": 1, "hellaswag_val.jsonl": 1}
    made, _ = fetch(address)
    assert {name: content for name, content in made.items() if name != "manifest.json"} == RESULT
    assert asked.count("/eval_bundle.zip") == asked.count("/hellaswag_val.jsonl") == 2


def test_the_published_addresses_are_asked_by_default(tmp_path, server, monkeypatch, capsys):
    address, asked, _ = server
    write_zip(tmp_path / "web" / "eval_bundle.zip", prefixed("eval_bundle/"))
    write(tmp_path / "web", HELLASWAG)
    assert evals.PUBLISHED["eval_bundle.zip"].startswith("https://karpathy-public.s3.us-west-2.amazonaws.com/")
    monkeypatch.setattr(evals, "PUBLISHED", {name: f"{address}/{name}" for name in evals.PUBLISHED})
    evals.main([f"--out={tmp_path / 'out'}"])
    assert asked == ["/eval_bundle.zip", "/hellaswag_val.jsonl", "/gsm8k/test.jsonl", "/gsm8k/train.jsonl"]
    assert RESULT.items() <= files_in(tmp_path / "out").items()


def test_a_second_run_fetches_only_when_something_is_wrong(tmp_path, fetch, server):
    address, asked, _ = server
    write(tmp_path / "web", prefixed("core/") | HELLASWAG)
    first, _ = fetch(address)
    count = len(asked)
    fetch(address)
    assert len(asked) == count
    (tmp_path / "out" / "core" / "eval_data" / URIS[0]).write_bytes(b"{}\n")
    again, _ = fetch(address)
    assert again == first and len(asked) > count
    count = len(asked)
    fetch(address, "--force")
    assert len(asked) > count


def test_a_missing_task_is_named_and_fetched_once_it_is_there(tmp_path, fetch):
    source = write(tmp_path / "in", prefixed("core/") | HELLASWAG)
    (source / "core" / "eval_data" / URIS[0]).unlink()
    made, out = fetch(source)
    assert f"missing at the source: {URIS[0]}" in out and f"core/eval_data/{URIS[0]}" not in made
    write(source, packed({f"core/eval_data/{URIS[0]}": ROWS}))
    made, out = fetch(source)
    assert "missing at" not in out and f"core/eval_data/{URIS[0]}.xz" in made


def test_a_file_that_comes_packed_replaces_the_plain_one(tmp_path, fetch):
    fetch(write(tmp_path / "plain", prefixed("core/") | HELLASWAG))
    made, _ = fetch(write(tmp_path / "packed", packed(prefixed("core/") | HELLASWAG)), "--force")
    assert made.keys() == packed(RESULT).keys() | {"manifest.json"}


def test_files_of_the_chat_tasks_are_taken_if_they_are_there(tmp_path, fetch):
    source = write(tmp_path / "in", prefixed("core/") | HELLASWAG)
    made, out = fetch(source)
    assert "chat tasks, without a file: gsm8k/test.jsonl, mmlu/test.jsonl, words_alpha.txt, gsm8k/train.jsonl; docs/" in out
    files = packed({f"gsm8k/{part}.jsonl": ROWS for part in ("test", "train")}) | {
        "mmlu/test.jsonl": ROWS, "words_alpha.txt.xz": lzma.compress(b"a\n")}
    write(source, files | {"gsm8k/other.jsonl": ROWS})
    _, again = fetch(source)
    assert again == out                  # nothing is fetched until --force
    made, out = fetch(source, "--force")
    assert made == RESULT | files | {"manifest.json": made["manifest.json"]} and "chat tasks" not in out
    items = json.loads(made["manifest.json"])["files"]
    assert items["gsm8k/test.jsonl.xz"]["items"] == items["mmlu/test.jsonl"]["items"] == ROWS.count(b"\n")
    write(source, {"words_alpha.txt": b"a\n"})
    made, _ = fetch(source, "--force")
    assert "words_alpha.txt" in made and "words_alpha.txt.xz" not in made


def test_only_hellaswag_is_a_source_too(tmp_path, fetch):
    made, out = fetch(write(tmp_path / "in", HELLASWAG))
    assert made.keys() == {"hellaswag_val.jsonl", "manifest.json"} and "core.yaml or eval_bundle.zip" in out


# -----------------------------------------------------------------------------
# Paths, modes and locales

@pytest.mark.parametrize("name", ["a [b]  c", "it's", "bell\x1b[31m", "new\nline", "-x", ACCENTS], ids=ascii)
def test_odd_paths_work_and_the_printed_command_is_quoted(tmp_path, name, capsys):
    source, out = write(tmp_path / f"from {name}", HELLASWAG), tmp_path / name
    evals.main([f"--from={source}", f"--out={out}"])
    lines = capsys.readouterr().out.splitlines()
    assert (out / "hellaswag_val.jsonl").is_file() and all(line.isprintable() for line in lines)
    words = shlex.split(lines[-1])
    assert words[:2] == ["next:", "python"] and Path(words[2]).resolve() == ROOT / "evaluate.py"
    assert words[3:] == ["--tasks=hellaswag", f"--evals={evals.printable(out)}"]


def test_tilde_is_the_home_folder(tmp_path, monkeypatch, fetch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in", HELLASWAG)
    assert "hellaswag_val.jsonl" in fetch("~/in")[0]
    evals.main(["--from=~/in", "--out=~/other/place"])
    assert (tmp_path / "other" / "place" / "manifest.json").is_file() and not (tmp_path / "~").exists()


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_and_folders_have_the_mode_that_the_umask_asks_for(tmp_path, fetch, umask):
    source = write(tmp_path / "in", prefixed("core/") | HELLASWAG)
    before = os.umask(umask)
    try:
        fetch(source)
    finally:
        os.umask(before)
    for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_a_locale_without_the_letters_of_a_path_does_not_end_the_run(tmp_path):
    source = write(tmp_path / ACCENTS, HELLASWAG)
    done = subprocess.run([sys.executable, ROOT / "data" / "evals.py", f"--from={source}", f"--out={source}2"],
                          capture_output=True, text=True, env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0",
                                                               "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "") and "\nnext: " in done.stdout


@pytest.mark.parametrize("flag", ["--from=", "--out=", "--force=x", "--form=x", "x"])
def test_a_bad_flag_is_refused(flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        evals.main([flag])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("evals.py: ") and error.count("\n") == 1


# -----------------------------------------------------------------------------
# What is refused

def test_a_zip_writes_only_where_it_should(tmp_path, fetch):
    write_zip(tmp_path / "in" / "eval_bundle.zip", prefixed("eval_bundle/") | {
        "../evil": b"x", "/evil": b"x", "eval_bundle/eval_data/../../../evil": b"x", "eval_bundle/other.jsonl": b"x"})
    made, _ = fetch(write(tmp_path / "in", HELLASWAG))
    assert made.keys() == RESULT.keys() | {"manifest.json"}
    assert [path for path in tmp_path.rglob("*") if "evil" in path.name or "other" in path.name] == []


@pytest.mark.parametrize("uri", ["../../evil.jsonl", "/etc/passwd", "a/b/c.jsonl", "a/..jsonl", "a\\b.jsonl", "a/b.py"])
def test_a_task_list_that_names_odd_places_is_refused(tmp_path, refused, uri):
    source = write(tmp_path / "in", {"core.yaml": f"dataset_uri: {uri}\n".encode()})
    refused(source, "core.yaml names the data file", "which is not of the form category/task.jsonl")


def test_a_zip_that_unpacks_to_too_much_is_refused(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(evals, "MAX_FILE", 10_000)
    write_zip(tmp_path / "in" / "eval_bundle.zip", BUNDLE | {f"eval_data/{URIS[1]}": b" " * 10_001})
    refused(tmp_path / "in", f"eval_bundle.zip: eval_data/{URIS[1]} has more than 10000 bytes")


def test_an_xz_that_unpacks_to_too_much_is_refused(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(evals, "MAX_FILE", 10_000)
    source = write(tmp_path / "in", packed({"hellaswag_val.jsonl": b"{}\n" * 10_000}))
    refused(source, "hellaswag_val.jsonl.xz is damaged", "more than 10000 bytes")


def damaged_zip(folder):
    write_zip(folder / "eval_bundle.zip", BUNDLE)
    content = bytearray((folder / "eval_bundle.zip").read_bytes())
    at = content.index(b"eval_data/") + 60                          # in the compressed bytes of the first task
    content[at:at + 8] = b"\xff" * 8
    (folder / "eval_bundle.zip").write_bytes(content)


@pytest.mark.parametrize("make, words", [
    (lambda folder: write(folder, {"eval_bundle.zip": b"not a zip"}), "eval_bundle.zip is not a zip file or"),
    (damaged_zip, "eval_bundle.zip is not a zip file or is damaged"),
    (lambda folder: write_zip(folder / "eval_bundle.zip", {"x/y/core.yaml": b""}), "eval_bundle.zip has no core.yaml"),
    (lambda folder: write(folder, {"core.yaml": b"\xff\xfe"}), "core.yaml is not UTF-8 text"),
    (lambda folder: write(folder, {"core.yaml": b"tasks: none"}), "core.yaml names 0 data files"),
    (lambda folder: write(folder, {"hellaswag_val.jsonl": b"{}\n<html>"}), "hellaswag_val.jsonl is damaged at item 1"),
    (lambda folder: write(folder, {"hellaswag_val.jsonl": b"[]\n"}), "damaged at item 0 (not an object)"),
    (lambda folder: write(folder, {"hellaswag_val.jsonl": b""}), "hellaswag_val.jsonl is empty"),
    (lambda folder: write(folder, {"hellaswag_val.jsonl.xz": lzma.compress(b"{}\n")[:-9]}), "damaged at item"),
    (lambda folder: folder.mkdir(), "neither core.yaml nor eval_bundle.zip nor hellaswag_val.jsonl"),
], ids=range(10))
def test_a_damaged_source_is_refused(tmp_path, refused, make, words):
    make(tmp_path / "in")
    refused(tmp_path / "in", words)


def test_a_source_that_does_not_exist_is_refused(tmp_path, refused):
    refused(tmp_path / "nowhere", "--from=", "neither a folder nor an http(s) address")


def test_no_network_is_one_line(refused, monkeypatch):
    monkeypatch.setattr(evals, "RETRY_WAITS", (0, 0))
    refused("http://127.0.0.1:1", "cannot download core/core.yaml from http://127.0.0.1:1", "--from=DIR_OR_URL")


def test_a_refused_fetch_leaves_the_old_files(tmp_path, fetch, capsys):
    before, _ = fetch(write(tmp_path / "in", prefixed("core/") | HELLASWAG))
    with pytest.raises(SystemExit):
        fetch(write(tmp_path / "bad", prefixed("core/") | {"hellaswag_val.jsonl": b"<html>"}), "--force")
    assert files_in(tmp_path / "out") == before


@pytest.mark.skipif(not SHARED.exists(), reason="no development data beside the project")
def test_the_development_copies_arrive_where_evaluate_looks(tmp_path, fetch):
    import evaluate
    made, out = fetch(SHARED)
    assert "missing at the source: reading_comprehension/coqa.jsonl\n" in out
    missing = [task.label for task in evaluate.TASKS if evaluate.task_file(tmp_path / "out", task) is None]
    assert missing == ["coqa"] and evaluate.task_file(tmp_path / "out", evaluate.HELLASWAG)
    files = json.loads(made["manifest.json"])["files"]
    assert files["hellaswag_val.jsonl.xz"]["items"] == 10_042
    assert files["core/eval_data/reading_comprehension/squad.jsonl.xz"]["items"] == 10_570
