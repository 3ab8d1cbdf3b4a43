"""What several test files share: small shards made on the spot, a configuration that trains in a second, and processes.

Nothing here is a test. The shard writer follows the format's description, not the scripts that write shards, so that it
can also write damaged and foreign ones.
"""
import base64
import contextlib
import hashlib
import importlib.util
import json
import multiprocessing.forkserver
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # such small products are slower with more
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job; what it starts would not know Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

ALL_SCRIPTS = sorted((path.stem for path in ROOT.glob("train_*.py")), key=lambda name: (name != "train_gpt", name))
# those with tables of stages and layers; the plain script has tests of its own in test_simple.py
SCRIPTS = [name for name in ALL_SCRIPTS if "class Stage:" in (ROOT / f"{name}.py").read_text(encoding="utf-8")]
BOS, VOCAB = 256, 257
WORDS = "the a old new cat dog house river stone sees finds keeps under over near and then slowly never again".split()

# Windows shorter than documents, documents longer than max_doc_tokens, every loss term, tied and untied steps.
SMALL_STAGES = [[1 / 3, 512, 96, 16, 32, 1.0, [[1, 0.5, 0.25], [1, 0.5, 0]], [0.25, 0.25]],
                [1.0, 1024, 120, 16, 64, 1.4, [[1, 0.5, 0], [1, 0, 0]], [0.25, 0]]]
# A row of each kind; test_model.py has the layers of all presets, too.
SMALL_LAYERS = [{"ve": 0, "xsa": True}, {"attention": False, "skip": 0},
                {"window": "long", "ve": 1, "attn_input": 1, "gate": True, "mudd": True}]
SMALL = {"preset": "tiny", "stages": SMALL_STAGES, "layers": SMALL_LAYERS, "final_windows": (16, 64), "model_dim": 48,
         "head_dim": 12, "mlp_dim": 96, "gate_dim": 8, "bigram_rows": 509, "bigram_signs": 32, "pack_tokens": 128,
         "val_tokens": 1500, "val_stream_tokens": 512, "num_iterations": 20, "val_every": 10, "device": "cpu"}


def tokenizer_json(ranks=None):
    """The file tokenizer.json of a tokenizer whose token i has the bytes ranks[i]; by default that of single bytes."""
    ranks = [bytes([i]) for i in range(256)] if ranks is None else ranks
    content = {"name": "bytes", "pattern": "", "ranks": [base64.b64encode(rank).decode() for rank in ranks],
               "special_tokens": {"<|bos|>": len(ranks)}, "bos_id": len(ranks)}
    return (json.dumps(content, ensure_ascii=True, sort_keys=True, separators=(",", ":")) + "\n").encode()


def write_shard(path, tokens, **words):
    """Writes a shard of byte tokens; w0=..., w1=... set header words and sha256=... the words 8 to 15 instead."""
    header = np.zeros(256, "<i4")
    header[:6] = 20240520, 1, len(tokens), VOCAB, BOS, 2
    header[8:16] = np.frombuffer(words.pop("sha256", hashlib.sha256(tokenizer_json()).digest()), "<i4")
    for word, value in words.items():
        header[int(word.removeprefix("w"))] = value
    Path(path).write_bytes(header.tobytes() + np.asarray(tokens).astype("<u4" if header[5] == 4 else "<u2").tobytes())
    return str(path)


def make_text(num_tokens, seed, longest=60):
    """About num_tokens tokens of documents of 1 to `longest` words, each document beginning with BOS."""
    rng, tokens = np.random.default_rng(seed), []
    while len(tokens) < num_tokens:
        tokens += [BOS, *" ".join(rng.choice(WORDS, rng.integers(1, longest + 1))).encode()]
    return np.array(tokens, np.uint16)


def make_data(folder, train_tokens=40_000, val_tokens=4_000):
    """A folder of two training shards, a validation shard and their tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(2):
        write_shard(folder / f"train_{i:06d}.bin", make_text(train_tokens // 2, seed=i))
    write_shard(folder / "val_000000.bin", make_text(val_tokens, seed=9))
    (folder / "tokenizer.json").write_bytes(tokenizer_json())
    return folder


def as_flags(values):
    """`--name=value` for each item: lists as JSON tables, tuples with commas, as a user would type them."""
    def text(value):
        if isinstance(value, list):
            return json.dumps([asdict(row) if is_dataclass(row) else row for row in value])
        if isinstance(value, tuple):
            return ",".join(map(str, value))
        return str(value).lower() if isinstance(value, bool) else str(value)
    return [f"--{name}={text(value)}" for name, value in values.items()]


def small_flags(data, **changes):
    """The command line of a run that takes a second on a CPU."""
    return as_flags(SMALL | {"train_files": f"{data}/train_*.bin", "val_files": f"{data}/val_*.bin"} | changes)


def assert_close(found, wanted, tolerance=1e-4):
    """Every entry differs by at most tolerance x (1 + its size). torch.testing loads modules for seconds."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    worst = ((found - wanted).abs() / (1 + wanted.abs())).max().item()
    assert worst <= tolerance, worst


def stream(*lengths):
    """Documents of random tokens, one after the other."""
    import torch
    rng = np.random.default_rng(0)
    return torch.cat([torch.tensor([BOS, *rng.integers(0, 256, length - 1)]) for length in lengths])


def only_folder(logs):
    """The folder of the one run under `logs`."""
    folders = list(Path(logs).iterdir())
    assert len(folders) == 1, folders
    return folders[0]


# Files that take long, the longest first: with two processes the last ones to end are short.
LONG = ["test_hostile.py", "test_records.py", "test_checkpoint.py", "test_metric.py", "test_simple.py",
        "test_decode.py", "test_ranks.py", "test_evaluate.py", "test_published.py", "test_folders.py",
        "test_moe.py", "test_text.py", "test_tour.py", "test_tables.py", "test_train.py",
        "test_chat_rl.py", "test_long.py", "test_ladder.py", "test_chat_sft.py", "test_chat.py"]


def pytest_collection_modifyitems(items):
    """The long files come first, each as a whole."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests stay in one process, which makes what they share once; files are begun in the order above."""
    from xdist.scheduler import LoadFileScheduling
    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


USUAL_HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


@pytest.fixture(autouse=True)
def usual_signal_handlers():
    """What trained in this process left its handlers behind, and the next test may send itself a Ctrl-C."""
    for number, handler in USUAL_HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Sound shards that tests only read."""
    return make_data(tmp_path_factory.mktemp("data"), train_tokens=200_000)


@pytest.fixture(scope="session")
def script():
    """The training script under test. A file that tests all of them has a fixture of this name, with parameters."""
    return importlib.import_module("train_gpt")


@pytest.fixture
def small_config(data, script):
    """Function of changed fields that returns the small configuration, resolved for the shards of `data`."""
    def config(**changes):
        cfg = script.parse_config(small_flags(data, **changes))
        machine = script.Machine(script.torch.device("cpu"), 0, 1, "cpu")
        return script.resolve_config(cfg, machine, script.open_shards(cfg.train_files, cfg.val_files)[0][0])
    return config


@pytest.fixture
def run_main(script, monkeypatch, capsys):
    """Function of command line arguments that calls main(), and returns exit code, output and errors.

    module: another script than the one under test.
    """
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_svg", None)  # no curve: it takes as long as the steps

    def run(*argv, module=script):
        monkeypatch.setattr(sys, "argv", [module.__file__, *argv])
        capsys.readouterr()
        code = module.main()
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)
    return run


@pytest.fixture
def edited(script, tmp_path):
    """Function of pairs (old, new) that imports a copy of the script, my_idea.py, with these texts replaced."""
    def make(*edits):
        text = Path(script.__file__).read_text(encoding="utf-8")
        for old, new in edits:
            assert text.count(old) == 1, (old, text.count(old))
            text = text.replace(old, new)
        path = tmp_path / "my_idea.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("my_idea", path)
        sys.modules["my_idea"] = module = importlib.util.module_from_spec(spec)     # dataclasses look their module up
        spec.loader.exec_module(module)
        return module
    yield make
    sys.modules.pop("my_idea", None)


@pytest.fixture
def refused(script, run_main, tmp_path):
    """Function that expects a command line to be refused: exit code 2, one line with all the words, nothing made."""
    def check(*argv, words=()):
        logs = tmp_path / "refused_logs"
        done = run_main(*([] if any(arg.startswith("--out_dir") for arg in argv) else [f"--out_dir={logs}"]), *argv)
        assert done.code == 2, done
        assert re.fullmatch(rf"{script.__name__}\.py: [^\n]+\n", done.err), done.err
        for word in words:
            assert str(word) in done.err, (word, done.err)
        assert not logs.exists()
        return done.err
    return check


# -----------------------------------------------------------------------------
# Processes, forked from a server that has PyTorch loaded already

def call_with_output(output, environment, function, arguments, errors=None):
    """In the new process: sets its environment, sends what it prints to a file or two, and calls the function."""
    os.environ.update(environment)
    for number, path in ((1, output), (2, errors or output)):
        with open(path, "ab") as file:
            os.dup2(file.fileno(), number)
    sys.exit(function(*arguments))


def main_of(argv):
    """What `python train_gpt.py argv` does, but for the curve, which takes as long as the steps."""
    import train_gpt
    sys.modules["matplotlib.backends.backend_svg"] = None
    sys.argv = ["train_gpt.py", *argv]
    return train_gpt.main()


def run_python(words, source=os.devnull, folder="."):
    """What `python words` does in that folder with that input, but for the curve; the project's modules load anew."""
    os.chdir(folder)
    os.dup2(os.open(source, os.O_RDONLY), 0)
    sys.stdin = open(0, closefd=False)
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    sys.modules["matplotlib"] = None
    for name in ("sample", "train_gpt", "triton_kernels"):  # those preloaded may not be those beside the script
        sys.modules.pop(name, None)
    ours = [ROOT, *(ROOT / folder for folder in ("tests", "data", "records", "dev"))]       # test modules add some
    sys.path[:] = [path for path in sys.path if Path(path) not in ours]                     # a lone script is alone
    sys.argv = words = [str(word) for word in words]
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


@pytest.fixture(scope="session")
def forkserver():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.nn.attention.flex_attention", "safetensors.torch", "pytest",
                                    "torch.distributed.run", "train_gpt", "sample"])
    multiprocessing.forkserver.ensure_running()     # now, while the project's root is the current folder
    return context


@pytest.fixture
def fast_run(forkserver):
    """What stands in for subprocess.run([sys.executable, ...]): the process has PyTorch loaded from the beginning."""
    def run(command, input="", timeout=60, cwd=".", env=None, text=False, **_):
        assert command[0] == sys.executable
        with tempfile.TemporaryDirectory() as folder:
            source, output, errors = (Path(folder, name) for name in ("source", "output", "errors"))
            source.write_text(input)
            process = forkserver.Process(target=call_with_output, args=(
                output, dict(env or {}), run_python, (command[1:], source, cwd), errors))
            process.output = errors
            process.start()
            try:
                code, = join([process], timeout)
            finally:
                process.kill()
            read = Path.read_text if text else Path.read_bytes
            return subprocess.CompletedProcess(command, code, read(output), read(errors))
    return run


@contextlib.contextmanager
def rank_starter(forkserver, folder):
    """Gives a function that starts function(*arguments) as the ranks of one run, as torchrun would: their processes."""
    started = []

    def start(world_size, function, *arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(world_size):
            environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            output = folder / f"output_{len(started)}"
            process = forkserver.Process(target=call_with_output, args=(output, environment, function, arguments))
            process.output = output
            process.start()
            started.append(process)
        return started[-world_size:]
    try:
        yield start
    finally:
        for process in started:
            process.kill()


@pytest.fixture
def start_ranks(forkserver, tmp_path):
    with rank_starter(forkserver, tmp_path) as start:
        yield start


def join(processes, seconds=60):
    """Waits for the processes; returns their exit codes, with what they printed if they did not end in time."""
    for process in processes:
        process.join(seconds)
        assert process.exitcode is not None, "still running: " + process.output.read_text()
    return [process.exitcode for process in processes]
