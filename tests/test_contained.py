"""contained.py: a program of a model does no harm outside, is scored as failed if it tries, and ends in time.

Proves: sound programs pass and faulty ones fail with a reason; planted programs (endless loop, fork bomb, 10 GB of
memory, 1 GB of output, writing outside the folder, reading the environment, killing the parent, a socket) are each
contained; nothing is left behind. The tests hold for root and for others, with namespaces or without.
Run: python -m pytest tests/test_contained.py
"""
import os
import socket
import tempfile
import time
from pathlib import Path

import pytest

import contained

FAST = contained.Limits(cpu_seconds=2, seconds=8)


def fails(program, *words, limits=FAST):
    """Runs a program that must fail in time, with one of the words in the reason."""
    begin = time.monotonic()
    outcome = contained.run(program, limits)
    assert not outcome.passed and time.monotonic() - begin < limits.seconds + 8
    assert any(word in outcome.reason for word in words), outcome
    return outcome


@pytest.fixture(autouse=True)
def nothing_left(tmp_path, monkeypatch):
    """The folders of the programs are in tmp_path, and are gone in the end."""
    folder = tmp_path / "programs"
    folder.mkdir()
    if os.geteuid() == 0:                # a user without rights must reach it
        for path in (folder, *folder.parents):
            if path.stat().st_uid == 0 and path != Path("/"):
                path.chmod(path.stat().st_mode | 0o011)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []


def test_sound_programs_pass_and_others_fail():
    assert contained.fault() == ""
    outcome = contained.run("print('héllo')\nopen('note', 'w').write('x' * 100)\nassert open('note').read()[0] == 'x'")
    assert outcome == contained.Outcome(True, "", "héllo\n")
    fails("assert 1 == 2, 'no'", "AssertionError: no")
    fails("def f(:", "SyntaxError")
    fails("raise SystemExit(0)", "SystemExit")
    fails("import os; os._exit(0)", "without reaching its end")
    fails("input()", "EOFError")
    fails("import numpy", "ModuleNotFoundError")


def test_an_endless_loop_ends():
    fails("while True: pass", "too much", limits=contained.Limits(cpu_seconds=1, seconds=20))
    fails("import time\nwhile True:\n    try: time.sleep(9)\n    except BaseException: pass", "too much time",
          limits=contained.Limits(seconds=0.5))


@pytest.mark.parametrize("start", ["os.fork()", "subprocess.Popen([sys.executable, '-c', '1'])", "os.system('true')"])
def test_a_fork_bomb_starts_no_process(start):
    fails(f"import os, subprocess, sys\nwhile True:\n    try: {start}\n    except Exception: break", "not allowed")


def test_limits_hold_without_the_hook(monkeypatch, tmp_path):
    """Processes are limited also where the interpreter refuses nothing. Root itself has no limit, others have."""
    script = tmp_path / "contained.py"
    script.write_text(Path(contained.__file__).read_text().replace("sys.addaudithook(hook)", "pass"))
    script.chmod(0o644)
    monkeypatch.setattr(contained, "__file__", str(script))
    if os.geteuid() == 0 and not contained.unprivileged_user():
        pytest.skip("root, whose Python no other user can read")
    fails("import os\nwhile True: os.fork()", "BlockingIOError")


def test_memory_is_limited():
    fails("x = bytearray(10 << 30)", "MemoryError")
    fails("x = []\nwhile True: x.append(bytearray(1 << 20))", "MemoryError", "too much",
          limits=contained.Limits(memory=64 << 20))


def test_output_and_files_are_limited():
    outcome = fails("for _ in range(1024): print('x' * (1 << 20))", "OSError")
    assert len(outcome.output) == contained.OUTPUT_CHARACTERS
    fails("with open('large', 'wb') as file:\n    for _ in range(1024): file.write(bytes(1 << 20))", "OSError")


@pytest.mark.parametrize("program", ["open({!r}, 'w').write('x')", "import os; os.remove({!r})",
                                     "import os; os.rename({!r}, 'mine')",
                                     "import os\ntry: os.remove({!r})\nexcept OSError: pass",
                                     "import shutil; shutil.rmtree(__import__('os').path.dirname({!r}))"])
def test_nothing_outside_its_folder_changes(program, tmp_path):
    outside = tmp_path / "outside" / "file"
    outside.parent.mkdir()
    outside.parent.chmod(0o777)
    outside.write_text("mine")
    outside.chmod(0o666)
    fails(program.format(str(outside)), "not allowed", "Permission", "Read-only")
    assert outside.read_text() == "mine"


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SECRET", "abc")
    fails("import os; print(os.environ['SECRET'])", "KeyError")
    outcome = contained.run("import os; print(sorted(os.environ))", FAST)
    assert outcome.passed and outcome.output == "[]\n"
    fails(f"print(open('/proc/{os.getpid()}/environ').read())", "not allowed", "No such file")


def test_its_parent_survives():
    fails("import os, signal; os.kill(os.getppid(), signal.SIGKILL)", "not allowed")
    fails(f"import os, signal\ntry: os.kill({os.getpid()}, signal.SIGKILL)\nexcept OSError: pass", "not allowed")


def test_no_socket_opens():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        port = server.getsockname()[1]
        fails(f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)", "not allowed")
        with pytest.raises(TimeoutError):
            server.accept()


def test_other_ways_out_are_closed():
    fails("import ctypes; ctypes.CDLL(None)", "not allowed")
    fails("import resource; resource.setrlimit(resource.RLIMIT_CPU, (9, 9))", "not allowed")
