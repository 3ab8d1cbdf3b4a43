"""No code comes in with data, and no name in a file decides where something is written.

The first part reads every Python file of the project as a syntax tree, so that comments, strings, aliases and renamed
imports make no difference, and looks for what loads code from data (pickle and its kin, eval, torch.load without
weights_only=True), hands text to a shell, or unpacks archives wholesale. ALLOWED lists the places where it is right,
with the reason. The second part plants hostile names and links (`..`, absolute, to elsewhere) in checkpoints, shards'
folders, manifests, archives and records, next to a file that must stay as it is. Needs no network.

Run: python -m pytest tests/test_security.py
"""
import ast
import hashlib
import importlib
import json
import os
import pickle
import re
import shutil
import sys
import zipfile
from dataclasses import asdict, replace
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (ALL_SCRIPTS, BOS, ROOT, VOCAB, make_data, make_text, only_folder, small_flags, tokenizer_json,
                      write_shard)
from safetensors.torch import save_file

import sample
import train_gpt

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "data")
    import fineweb
    import text
    evals = importlib.import_module("evals") if (ROOT / "data" / "evals.py").is_file() else None
    patch.syspath_prepend(ROOT / "records")
    runs = importlib.import_module("runs") if (ROOT / "records" / "runs.py").is_file() else None
    records = importlib.import_module("records") if runs else None

CPU = train_gpt.Machine(torch.device("cpu"), 0, 1, "cpu")

# -----------------------------------------------------------------------------
# What the source may not say

MODULES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle", "code",
           "codeop", "imp", "xmlrpc", "telnetlib", "torch.package", "torch.hub"}       # not even imported
NAMES = {"eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "builtins.compile",
         "builtins.__import__", "importlib.import_module", "runpy.run_path", "runpy.run_module", "os.system",
         "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "yaml.load", "yaml.load_all",
         "yaml.unsafe_load", "yaml.full_load", "yaml.Loader", "yaml.UnsafeLoader", "shutil.unpack_archive",
         "tempfile.mktemp", "numpy.lib.format.read_array", "pandas.read_pickle", "torch.jit.load", "torch.load",
         "torch.utils.model_zoo.load_url", "torch.utils.cpp_extension.load", "ssl._create_unverified_context",
         *(f"os.exec{kind}" for kind in "l le lp lpe v ve vp vpe".split()),
         *(f"os.spawn{kind}" for kind in "l le lp lpe v ve vp vpe".split()),
         *(f"torch.distributed.{name}" for name in "all_gather_object gather_object broadcast_object_list "
           "scatter_object_list send_object_list recv_object_list".split())}                  # pickle between ranks
METHODS = {"extractall", "extract", "exec_module", "load_module"}       # of objects whose class nobody knows here
KEYWORDS = {"shell": False, "allow_pickle": False, "weights_only": True, "trust_remote_code": False, "verify": True}

# (files, what) -> why it is right there
ALLOWED = {
    ("sample.py", "exec_module"): "the training script beside sample.py, or the one that --script names",
    ("data/code.py", "exec_module"): "the standard library's module of the same name, see its top",
    ("records/flags.py", "exec_module"): "the training script that the user compares, which runs right afterwards",
    ("data/text.py", "importlib.import_module"): "_optional: zstandard, pyarrow, by constant names",
    ("dev/cap_memory.py", "runpy.run_path"): "the script that the command line names",
    ("contained.py", "compile"): "a model's program, only with --allow_code, in a process that can do no harm",
    ("contained.py", "exec"): "as above",
    ("evaluate.py", "torch.distributed.all_gather_object"): "results of the ranks of one run, never from a file",
    ("train_*.py", "torch.distributed.all_gather_object"): "what the ranks of one run agree on, as above",
    ("dev/track_*.py", "torch.distributed.broadcast_object_list"): "frozen records: as they ran",
    ("dev/track_*.py", "torch.distributed.all_gather_object"): "frozen records: as they ran",
    ("records/track_*.py", "torch.distributed.all_gather_object"): "frozen records: as they ran",
}
LOADERS = re.compile(r"pickle|_pickle|marshal|shelve")      # tests may make hostile pickles, and may not load them
IN_TESTS = {"compile", "exec", "importlib.import_module", "runpy.run_path"}
LOADING = {"load", "loads", "Unpickler", "open"}


class Scan(ast.NodeVisitor):
    """Collects (line, what) of a syntax tree; names are followed through imports and simple assignments."""

    def __init__(self, tree, tests=False):
        self.names, self.found, self.calls, self.tests, self.arguments = {}, [], set(), tests, []
        nodes = list(ast.walk(tree))
        for node in nodes:                      # before anything is looked at: functions use what stands below them
            if isinstance(node, ast.Import):
                for name in node.names:
                    self.names[name.asname or name.name.split(".")[0]] = name.name if name.asname else \
                        name.name.split(".")[0]
            elif isinstance(node, ast.ImportFrom):
                for name in node.names:
                    self.names[name.asname or name.name] = f"{node.module}.{name.name}"
        aliases = [node for node in nodes if isinstance(node, ast.Assign)
                   and isinstance(node.value, (ast.Name, ast.Attribute, ast.Call))]
        for node in 3 * aliases:                # an alias of an alias
            value = self.full_name(node.value)
            for target in node.targets:
                if isinstance(target, ast.Name) and value:
                    self.names.setdefault(target.id, value)
        self.visit(tree)

    def full_name(self, node):
        """The name with its modules that an expression stands for, or ""; getattr with a constant is one, too."""
        if isinstance(node, ast.Name):
            plain = node.id if node.id in NAMES and not any(node.id in names for names in self.arguments) else ""
            return self.names.get(node.id, plain)
        if isinstance(node, ast.Attribute) and (base := self.full_name(node.value)):
            return f"{base}.{node.attr}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            words = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            if node.func.id == "getattr" and words and (base := self.full_name(node.args[0])):
                return f"{base}.{words[0]}"
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant) and self.full_name(
                node.func) in ("__import__", "builtins.__import__", "importlib.import_module"):
            return str(node.args[0].value)
        return ""

    def note(self, node, what):
        self.found.append((node.lineno, what))

    def judge(self, node, name):
        """Notes a name that may not be used, unless its call was looked at already."""
        if self.tests:
            module, _, function = name.rpartition(".")
            if LOADERS.fullmatch(module) and function in LOADING:
                self.note(node, name)
        elif any((name + ".").startswith(module + ".") for module in MODULES):
            self.note(node, name)
        if name in NAMES and not (self.tests and name in IN_TESTS):
            self.note(node, name)

    def visit_Import(self, node):
        for name in node.names:
            if not self.tests:
                self.judge(node, name.name)

    def visit_ImportFrom(self, node):
        for name in node.names:
            self.judge(node, f"{node.module}.{name.name}")

    def visit_FunctionDef(self, node):
        """An argument may have the name of a builtin function; what it is by default is looked at outside."""
        for part in [*getattr(node, "decorator_list", ()), *node.args.defaults, *filter(None, node.args.kw_defaults)]:
            self.visit(part)
        args = node.args
        self.arguments.append({arg.arg for arg in [*args.posonlyargs, *args.args, *args.kwonlyargs]})
        for part in node.body if isinstance(node.body, list) else [node.body]:
            self.visit(part)
        self.arguments.pop()

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Load) and id(node) not in self.calls:
            self.judge(node, self.full_name(node))

    def visit_Attribute(self, node):
        if id(node) not in self.calls:
            self.judge(node, self.full_name(node))
        self.generic_visit(node) if not self.full_name(node) else None

    def visit_Call(self, node):
        name, said = self.full_name(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        weights = said.get("weights_only")
        if name == "torch.load" and isinstance(weights, ast.Constant) and weights.value is True:
            self.calls.add(id(node.func))
        if name in ("importlib.import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
            self.judge(node, node.args[0].value)
            self.calls.add(id(node.func))
        if (whole := self.full_name(node)) and whole != name:           # getattr(torch, "load")
            self.judge(node, whole)
        if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS and not (
                self.tests and node.func.attr == "exec_module"):
            self.note(node, node.func.attr)
        for keyword, right in KEYWORDS.items():
            value = said.get(keyword)
            if value is not None and not (isinstance(value, ast.Constant) and value.value is right):
                self.note(node, f"{keyword}={ast.unparse(value)}")
        careful = name in ("torch.load", "numpy.load", "subprocess.run", "subprocess.Popen")
        if careful and None in said and not self.tests:
            self.note(node, f"{name}(**{ast.unparse(said[None])})")     # who knows what is in there
        self.generic_visit(node)


@cache
def scan(source, tests):
    """What Scan finds in the text of a Python file."""
    return Scan(ast.parse(source), tests).found


def violations(source, name="x.py"):
    """(line, what) of each violation in the text of a Python file that is not in ALLOWED."""
    found = scan(source, name.startswith("tests/"))
    return sorted({(line, what) for line, what in found
                   if not any(fnmatch(name, files) and what == allowed for files, allowed in ALLOWED)})


def sources():
    """The Python files of the project: all but what is hidden, made by a run, or data."""
    for folder, folders, files in os.walk(ROOT):
        inside = Path(folder).relative_to(ROOT).as_posix()
        left_out = {".": ("logs", "local_assets"), "data": folders}.get(inside, ())     # .venv has thousands of files
        folders[:] = sorted(name for name in folders if name[0] not in "._" and name not in left_out)
        yield from sorted((Path(inside) / name).as_posix() for name in files
                          if name.endswith(".py") and name[0] not in "._")


@pytest.mark.parametrize("name", [*sources()])
def test_source_loads_no_code_from_data(name):
    assert violations((ROOT / name).read_bytes(), name) == []


def test_the_scan_sees_every_script():
    names = {*sources()}
    assert {"train_gpt.py", "sample.py", "data/text.py", "data/fineweb.py", "tests/test_security.py"} <= names
    for files, allowed in ALLOWED:              # no reason for something that is not there any more
        found = {what for name in names if fnmatch(name, files) for _, what in scan((ROOT / name).read_bytes(), False)}
        assert allowed in found, (files, allowed)


@pytest.mark.parametrize("source", [
    "import pickle", "import pickle as p\np.load(f)", "from pickle import loads as read\nread(b)", "import os, marshal",
    "def f():\n    import shelve", "__import__('pickle').loads(b)", "import importlib\nimportlib.import_module('dill')",
    "from torch import load\nload(p)", "import torch\ntorch.load(p)", 
    "import torch as t\nt.load(p, weights_only=False)",
    "import torch\ntorch.load(p, weights_only=flag)", "import torch\ntorch.load(p, **options)",
    "import torch\nread = torch.load\nread(p, weights_only=True)", "import torch\ngetattr(torch, 'load')(p)",
    "import torch\nx = {'read': torch.load}", "import torch\nm = torch\nm.load(p)",
    "import torch\nmap(torch.load, paths)", "eval(text)", "e = eval\ne(text)", "exec(text)",
    "import builtins\nbuiltins.eval(t)",
    "exec(compile(text, '', 'exec'))", "import importlib\nimportlib.import_module(name)",
    "import runpy\nrunpy.run_path(p)",
    "import numpy as np\nnp.load(p, allow_pickle=True)", "from numpy import load\nload(p, allow_pickle=flag)",
    "import subprocess\nsubprocess.run(words, shell=True)", "from subprocess import Popen\nPopen(c, shell=x)",
    "import os\nos.system(c)", "from os import popen\npopen(c)", "import os\nos.execvp(c, [])",
    "import tarfile\ntarfile.open(p).extractall(d)",
    "import zipfile\nwith zipfile.ZipFile(p) as z:\n    z.extract(n, d)",
    "import shutil\nshutil.unpack_archive(p)", "import yaml\nyaml.load(t)", "from yaml import unsafe_load",
    "import torch.distributed as dist\ndist.broadcast_object_list(x)", "import requests\nrequests.get(u, verify=False)",
    "from torch import hub\nhub.load(x)", "def f(eval=eval):\n    return eval", 
    "read = lambda text, f=exec: f(text)", "import tempfile\ntempfile.mktemp()", "import torch\ntorch.jit.load(p)"])
def test_the_scan_finds(source):
    assert violations(source)


@pytest.mark.parametrize("source", [
    "# pickle.load(f), eval(x)", "'torch.load(p)'", '"""import pickle"""',
    "import torch\ntorch.load(p, weights_only=True)",
    "model.eval()", "import re\nre.compile('x')", "import torch\ntorch.compile(f)", "import numpy as np\nnp.load(p)",
    "import subprocess\nsubprocess.run(['ls'], shell=False)", "import yaml\nyaml.safe_load(t)",
    "import json\njson.load(f)",
    "from safetensors.torch import load_file\nload_file(p)", "self.load(p)", "def load(p):\n    return 1\nload(2)",
    "import importlib\nimportlib.import_module('json')", 
    "def f(compile):\n    return compile(1)", "code = 1\ncode.x()"])
def test_the_scan_lets_pass(source):
    assert violations(source) == []


def test_tests_may_write_pickles_and_not_read_them():
    assert violations("import pickle\npickle.dumps(1)", "tests/x.py") == []
    assert violations("import pickle as p\np.loads(b)", "tests/x.py") == [(2, "pickle.loads")]
    assert violations("from pickle import load", "tests/x.py") and violations("eval(x)", "tests/x.py")


# -----------------------------------------------------------------------------
# What a training run uses

# package of the standard library or of an installed one -> why a training script may import it
PACKAGES = {"torch": "the model", "numpy": "shards", "safetensors": "checkpoints", "matplotlib": "the curve",
            "triton_kernels": "the file beside the script", "prodigyopt": "only for --optimizer=prodigy"}
NETWORK = {"socket", "socketserver", "ssl", "http", "urllib", "ftplib", "smtplib", "imaplib", "poplib", "xmlrpc",
           "asyncio", "webbrowser", "wsgiref"}


def imported(path):
    """Names of the packages that a file imports anywhere in it, also inside functions."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "").partition(".")[0]


@pytest.mark.parametrize("name", [*(f"{script}.py" for script in ALL_SCRIPTS), "triton_kernels.py"])
def test_training_needs_few_packages_and_no_network(name):
    allowed = {"torch", "triton"} if name == "triton_kernels.py" else PACKAGES.keys()
    found = set(imported(ROOT / name))
    assert found - allowed - (sys.stdlib_module_names - NETWORK) == set()
    assert "torch" in found


SEEN = None                                     # a list while a training run is watched


def audit(event, args):
    """Notes connections, programs that are started and files that are written; such a hook cannot be taken out."""
    if SEEN is None:
        return
    if event.startswith(("socket.", "urllib.", "http.", "ftplib.", "smtplib.")) or event == "subprocess.Popen":
        SEEN.append((event, args))
    elif event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and isinstance(args[0], (str, Path)):
        SEEN.append((event, args))


@pytest.fixture
def seen():
    """What the audit hook notes during a test: (event, its arguments) each."""
    global SEEN
    SEEN = found = []
    yield found
    SEEN = None


@pytest.fixture(scope="session", autouse=True)
def hook():
    sys.addaudithook(audit)


def test_a_training_run_opens_no_connection_and_writes_in_its_folder_alone(data, run_main, tmp_path, seen):
    """Of other programs it asks git for the commit and nvidia-smi for the GPU."""
    done = run_main(*small_flags(data, num_iterations=2, out_dir=tmp_path / "logs"))
    assert done.code == 0, done
    events = list(seen)
    folder = only_folder(tmp_path / "logs")
    assert {args[0] for event, args in events if event == "subprocess.Popen"} <= {"git", "nvidia-smi"}
    assert not [(event, args) for event, args in events if event not in ("open", "subprocess.Popen")]
    written = [Path(args[0]) for event, args in events if event == "open" and "__pycache__" not in str(args[0])]
    assert [path for path in written if folder not in path.parents and path != Path(os.devnull)] == []
    assert folder / "log.txt" in written


def test_gpt2s_vocabulary_is_never_fetched(tmp_path, monkeypatch, seen):
    """It comes from a file, or not at all."""
    for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    path = write_shard(tmp_path / "train_000000.bin", [50256, 1, 2], w3=0, w4=0, w5=0, sha256=bytes(32))
    seen.clear()
    assert train_gpt.read_tokenizer(train_gpt.read_header(path)) == b""
    assert seen == [], "a connection was opened, a program started or a file written"


# -----------------------------------------------------------------------------
# Planted names and links

@pytest.fixture
def victim(tmp_path):
    """A file and a folder that nobody may touch, outside of the folder that is loaded."""
    (tmp_path / "home").mkdir()
    path = tmp_path / "home" / "victim"
    path.write_bytes(b"precious")
    before = path.stat().st_mtime_ns
    yield path
    assert path.read_bytes() == b"precious" and path.stat().st_mtime_ns == before
    assert [file.name for file in path.parent.iterdir()] == ["victim"]


@pytest.fixture
def checkpoint(tmp_path):
    """The folder of a sound checkpoint."""
    flags = dict(vocab_size=VOCAB, bos_id=BOS, attention="plain", compile=False, model_dim=32, head_dim=16, mlp_dim=16,
                 gate_dim=4, bigram_rows=16, bigram_signs=8)
    cfg = replace(train_gpt.PRESETS["tiny"], **flags)
    path = tmp_path / "logs" / "run" / "checkpoint" / "step_000001"
    path.mkdir(parents=True)
    save_file(train_gpt.GPT(cfg).state_dict(), path / "model.safetensors")
    (path / "tokenizer.json").write_bytes(tokenizer_json())
    (path.parent / "latest").write_text(path.name)
    (path / "meta.json").write_text(json.dumps({
        "format": 1, "script": "train_gpt", "source_sha256": train_gpt.file_sha256(ROOT / "train_gpt.py"),
        "sources": {"train_gpt.py": train_gpt.file_sha256(ROOT / "train_gpt.py")},
        "config": asdict(cfg), "step": 1, "stage": 0,
        "tokenizer_sha256": hashlib.sha256(tokenizer_json()).hexdigest()}))
    return path


class Spy:
    """Pickles to a call that leaves a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_a_sound_checkpoint_loads_and_writes_nothing(checkpoint, victim):
    before = sorted((str(path), path.stat().st_mtime_ns) for path in checkpoint.parents[2].rglob("*"))
    sample.load_checkpoint(sample.find_checkpoint(checkpoint.parents[2]), "cpu")
    assert sorted((str(path), path.stat().st_mtime_ns) for path in checkpoint.parents[2].rglob("*")) == before


@pytest.mark.parametrize("name", ("model.safetensors", "meta.json", "tokenizer.json"))
def test_no_file_of_a_checkpoint_runs_code(name, checkpoint, victim):
    """Neither a pickle nor a file that torch.save wrote, in the place of each file."""
    trace = victim.with_name("trace")
    for write in (lambda path: path.write_bytes(pickle.dumps(Spy(trace))), lambda path: torch.save(Spy(trace), path)):
        write(checkpoint / name)
        with pytest.raises(sample.UserError):
            sample.load_checkpoint(checkpoint, "cpu")


@pytest.mark.parametrize("script", ("../train_gpt", "/tmp/train_gpt", "train_evil", "os", "tests/conftest",
                                    "train_gpt.py", "train_gpt\0", ""))
def test_only_a_script_beside_sample_runs(script, checkpoint, victim):
    evil = f"from pathlib import Path\nPath({str(victim.with_name('trace'))!r}).touch()\n"
    for place in (checkpoint, checkpoint.parent.parent, victim.parents[1]):
        (place / "train_evil.py").write_text(evil)
        (place / "train_gpt.py").write_text(evil)
    meta = json.loads((checkpoint / "meta.json").read_text()) | {"script": script}
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(sample.UserError, match="made by the script"):
        sample.load_checkpoint(checkpoint, "cpu")


@pytest.mark.parametrize("name", ("model.safetensors", "meta.json", "tokenizer.json", "../latest"))
def test_links_in_a_checkpoint_are_refused(name, checkpoint, victim):
    path = (checkpoint / name).resolve()
    copy = victim.parents[1] / "copy"
    shutil.move(path, copy)
    path.symlink_to(copy)
    with pytest.raises(sample.UserError, match="is a link"):
        sample.load_checkpoint(sample.follow_latest(checkpoint.parent), "cpu")


@pytest.mark.parametrize("name", ("../elsewhere", "/ABSOLUTE", "link", "step_000001/../../elsewhere", ".", "..",
                                  "step_000001\\0"))
def test_latest_names_a_folder_beside_it(name, checkpoint, victim):
    elsewhere = checkpoint.parents[1] / "elsewhere"
    shutil.copytree(checkpoint, elsewhere)
    (checkpoint.parent / "link").symlink_to(elsewhere)
    (checkpoint.parent / "latest").write_text(name.replace("/ABSOLUTE", str(elsewhere)).replace("\\0", "\0"))
    for find in (lambda: sample.find_checkpoint(checkpoint.parents[2]), lambda: sample.resolve_checkpoint(
            checkpoint.parents[1])):
        with pytest.raises(sample.UserError, match="no folder beside it"):
            find()


@pytest.fixture
def published(tmp_path):
    """A folder with published shards, as --from takes it, and an empty one for --out."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    for name in ("val_000000", "train_000001"):
        write_shard(source / f"fineweb_{name}.bin", make_text(3000, seed=1), w3=0, w4=0, w5=0, sha256=bytes(32))
    (source / "tokenizer.json").write_bytes(b"{}")
    return source, out


@pytest.mark.parametrize("name", (".fineweb_val_000000.bin.part", "fineweb_val_000000.bin", ".manifest.json.tmp",
                                  "manifest.json", ".tokenizer.json.tmp", "tokenizer.json"))
def test_fetching_never_writes_through_a_link(name, published, victim, monkeypatch):
    source, out = published
    monkeypatch.setattr(fineweb, "gpt2_tokenizer", lambda scratch: (tokenizer_json(), None))
    (out / name).symlink_to(victim)
    monkeypatch.setattr(fineweb, "GPT2_TOKENIZER_SHA256", hashlib.sha256(tokenizer_json()).hexdigest())
    if name == "manifest.json":                     # the victim is no manifest, and is not mended
        with pytest.raises(SystemExit):
            fineweb.main(["1", f"--from={source}", f"--out={out}"])
        return
    fineweb.main(["1", f"--from={source}", f"--out={out}"])
    assert (out / "fineweb_val_000000.bin").read_bytes() == (source / "fineweb_val_000000.bin").read_bytes()
    assert not any(path.is_symlink() for path in out.iterdir())


def test_a_folder_for_parquet_files_is_no_link(tmp_path, victim):
    (tmp_path / "parquet").symlink_to(victim.parent)
    args = fineweb.parse_arguments(["1", "--tokenize", f"--out={tmp_path}"])
    with pytest.raises(fineweb.Refused, match="is a link"):
        fineweb.get_parquet(args, tmp_path, fineweb.VARIANTS["10B"])


@pytest.mark.parametrize("name", ("../home/victim", "ABSOLUTE", "train_/../../home/victim", "a\nb"))
def test_names_in_a_manifest_stay_names(name, published, victim):
    source, out = published
    name = name.replace("ABSOLUTE", str(victim))
    entry = {"sha256": "0" * 64, "size": 8, "tokens": 1, "documents": 1, "text_bytes": None}
    manifest = {"format": 1, "files": {name: entry}, "made_by": {}, "tokenizer": {
        "name": "gpt2", "sha256": fineweb.GPT2_TOKENIZER_SHA256}}
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(fineweb.Refused, match="damaged"):
        fineweb.read_manifest(out)
    with pytest.raises(SystemExit):
        text.check_out_dir(out, {}, False)
    (source / "manifest.json").write_text(json.dumps(manifest))         # from a source: nobody asks for such a name
    assert fineweb.source_pins(fineweb.Folder(source)).keys() == {name}


@pytest.mark.parametrize("name", ("train_000000.bin", "tokenizer.json", "manifest.json"))
def test_building_shards_replaces_links(name, tmp_path, victim):
    out = tmp_path / "shards"
    out.mkdir()
    (out / name).symlink_to(victim)
    (out / ".building-x").symlink_to(victim.parent)
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree\n" * 100)
    text.build_shards([tmp_path / "a.txt"], out, tokenizer="bytes", processes=1)
    assert (out / name).is_file() and not (out / name).is_symlink()


@pytest.mark.parametrize("uri", ("../../home/victim", "/etc/x.jsonl", "a/../../b.jsonl", "a/b/c.jsonl",
                                 "a\\..\\b.jsonl", "~/b.jsonl"))
def test_names_in_an_archive_of_questions_are_refused(uri, tmp_path, victim, capsys):
    if not evals:
        pytest.skip("data/evals.py is not there")
    source, out = tmp_path / "source", tmp_path / "evals"
    source.mkdir()
    with zipfile.ZipFile(source / "eval_bundle.zip", "w") as bundle:
        bundle.writestr("core.yaml", f"dataset_uri: {uri}\n")
        bundle.writestr(f"eval_data/{uri}", "{}\n")
        bundle.writestr("../home/victim", "overwritten")
    with pytest.raises(SystemExit):
        evals.main([f"--from={source}", f"--out={out}"])
    assert not out.exists() and "names the data file" in capsys.readouterr().err


def test_an_archive_that_unfolds_to_gigabytes_is_refused(tmp_path, monkeypatch):
    if not evals:
        pytest.skip("data/evals.py is not there")
    monkeypatch.setattr(evals, "MAX_FILE", 1 << 20)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as bundle:
        bundle.writestr("core.yaml", b" " * (2 << 20))
    with pytest.raises(evals.Refused, match="more than"):
        evals.unzip(tmp_path / "bomb.zip", tmp_path / "work")
    assert not any(path.stat().st_size > 2 << 20 for path in (tmp_path / "work").rglob("*"))


@pytest.mark.parametrize("change", ({"folder": "../home"}, {"folder": "/ABSOLUTE"}, {"folder": "link"},
                                    {"script": "../x.py"}, {"script": "/x.py"}, {"script": "a/../../x.py"}))
def test_names_in_a_record_are_refused(change, tmp_path, victim):
    if not runs:
        pytest.skip("records/ has no tool yet")
    record = tmp_path / "record"
    (record / "run").mkdir(parents=True)
    (record / "run" / "run.json").write_text("{}")
    (record / "link").symlink_to(victim.parent)
    folder = change.get("folder", "run").replace("/ABSOLUTE", str(victim.parent))
    arm = {"script": change.get("script", "x.py"), "flags": []}
    ledger = {"format": 1, "kind": "record", "arms": {"x": arm}, "runs": [
        {"folder": folder, "arm": "x", "seed": 0, "status": "finished", "counted": True, "why": ""}]}
    (record / "runs.json").write_text(json.dumps(ledger))
    with pytest.raises(runs.UserError, match="must be a folder|no file of the folder|not there"):
        runs.read_record(record)


@pytest.mark.parametrize("name", (".README.md.tmp", "README.md"))
def test_tables_are_never_written_through_a_link(name, tmp_path):
    if not runs:
        pytest.skip("records/ has no tool yet")
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / name).symlink_to(tmp_path / "victim")
    runs.write_text(tmp_path / "record" / "README.md", "tables")
    assert (tmp_path / "record" / "README.md").read_text() == "tables"
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.fixture(scope="module")
def few_data(tmp_path_factory):
    """The command line of a run of a few steps, its config with everything filled in, and what it reads."""
    argv = small_flags(make_data(tmp_path_factory.mktemp("few"), train_tokens=16_000, val_tokens=2000),
                       num_iterations=4)
    return train_gpt.load_data(train_gpt.parse_config(argv), CPU)


@pytest.fixture
def goes_on(checkpoint, few_data):
    """Function that opens the run folder of the checkpoint as --resume=PATH does."""
    cfg, data = few_data
    (checkpoint / "optimizer.safetensors").write_bytes(b"what a run needs to go on, unread here")
    meta = json.loads((checkpoint / "meta.json").read_text()) | {
        "files": {name: train_gpt.file_sha256(checkpoint / name) for name in train_gpt.FILES},
        "identity": train_gpt.run_identity(cfg, data), "loader_position": [0, 3], "history": [[0, 0.0, 5.5]],
        "train_time": 1.5, "tokens_seen": 512}
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    (checkpoint.parents[1] / "run.json").write_text("{}")

    def start():
        run = train_gpt.Run(replace(cfg, resume=str(checkpoint)), CPU, [], data, SimpleNamespace(model=None))
        assert run.origin == checkpoint
        run.log_file.close()
    return start


@pytest.mark.parametrize("name", ("log.txt", "train_gpt.py", ".run.json.tmp", "curve.svg", "checkpoint/.latest.tmp",
                                  "checkpoint/.step_000002.tmp"))
@pytest.mark.parametrize("make", (lambda path, victim: path.symlink_to(victim), lambda path, _: os.mkfifo(path)))
def test_a_run_that_goes_on_never_writes_through_a_link(name, make, goes_on, checkpoint, victim):
    """In a run folder that came from elsewhere; nor does it wait for the reader of a pipe."""
    make(checkpoint.parents[1] / name, victim)
    with pytest.raises(train_gpt.UserError, match=f"{name} is a link or no file"):
        goes_on()


def test_checkpoints_are_never_written_behind_a_link(goes_on, checkpoint, victim):
    """There, old ones would be removed."""
    shutil.copytree(checkpoint.parent, elsewhere := victim.parents[1] / "elsewhere")
    shutil.rmtree(checkpoint.parent)
    checkpoint.parent.symlink_to(elsewhere)
    with pytest.raises(train_gpt.UserError, match="checkpoint is a link"):
        goes_on()


@pytest.mark.parametrize("said", ("[1]", '{"resumed": "x"}', '{"resumed": 1}', "[" * 100_000, '{"started": []}'))
def test_a_run_goes_on_whatever_its_run_json_says(said, goes_on, checkpoint):
    path = checkpoint.parents[1] / "run.json"
    path.write_text(said)
    goes_on()
    assert [entry["step"] for entry in json.loads(path.read_text())["resumed"]] == [1]


def test_questions_are_never_put_behind_a_link(tmp_path, victim):
    (tmp_path / "source" / "core").mkdir(parents=True)
    (tmp_path / "source" / "core" / "core.yaml").write_text("dataset_uri: a/b.jsonl\n")
    (tmp_path / "source" / "hellaswag_val.jsonl").write_text("{}\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "core").symlink_to(victim.parent)
    with pytest.raises(evals.Refused, match="core is a link"):
        evals.fetch_all(fineweb.Folder(tmp_path / "source"), tmp_path / "out", {})


@pytest.mark.parametrize("target", ("/dev/zero", "pipe"))
def test_logs_without_end_are_not_copied(target, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    os.mkfifo(tmp_path / "run" / "pipe")
    (tmp_path / "run" / "log.txt").symlink_to(target)
    with pytest.raises(runs.UserError, match="not a plain file"):
        records.keep_run(tmp_path / "run", tmp_path / "kept")
    with pytest.raises(runs.UserError, match="not a file"):
        runs.sha256(tmp_path / "run" / "log.txt")
