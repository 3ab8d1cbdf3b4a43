"""Runs programs that a model wrote, so that their accidents harm nothing. evaluate.py --allow_code uses it.

It is against accidents, not against hostile code: a program that wants to break out may find a way. Run programs of a
model that you do not trust in a virtual machine.

A program runs in a fresh interpreter without site packages, in a process group of its own, in an empty folder of its
own, with an empty environment and without input. Limited are its processor time, its time, memory, the size of a file
and of the output, and processes: it can start none. It can write only in its folder, open no socket, send no signal and
load no C library. An attempt is refused, and the program counts as failed, even if it catches the error.

The interpreter itself refuses these (an audit hook). Where Linux lets it, namespaces do so once more: there is no
network, no other process, and no file that can be written but in the folder. A program started by root runs as a user
without rights, if that user can read Python's library.
"""
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

try:
    import resource
except ImportError:                      # Windows
    resource = None

@dataclass(frozen=True)
class Limits:
    """Of one program."""
    cpu_seconds: int = 5
    seconds: float = 15.0                # of the clock; more, because a busy machine is slow
    memory: int = 512 << 20              # bytes of address space
    file_bytes: int = 1 << 20            # of each file, so also of the output
    folder_bytes: int = 16 << 20         # of all files, where a namespace can be had

@dataclass(frozen=True)
class Outcome:
    """What became of a program. reason: why it failed, in one line; output: its first OUTPUT_CHARACTERS."""
    passed: bool
    reason: str
    output: str

OUTPUT_CHARACTERS = 10_000
DENIED = ("os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.exec", "os.system", "os.startfile", "pty.spawn",
          "subprocess.Popen", "os.kill", "os.killpg", "signal.pthread_kill", "socket.", "ctypes.", "resource.",
          "syslog.", "webbrowser.", "urllib.", "http.", "ftplib.", "smtplib.", "sys.addaudithook")
CHANGING = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.chown", "os.link",
            "os.symlink", "os.utime", "os.setxattr", "os.removexattr", "shutil.", "tempfile.")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# -----------------------------------------------------------------------------
# Outside

def run(program: str, limits: Limits = Limits()) -> Outcome:
    """Runs a program until it ends, or is ended by a limit. It passed if it reached its end without an exception."""
    folder = Path(tempfile.mkdtemp(prefix="contained-"))
    try:
        user = unprivileged_user()
        if user:
            os.chown(folder, user, user)
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as source:
            source.write(program.encode("utf-8", "replace"))
            source.seek(0)
            reading, writing = os.pipe()
            words = [sys.executable, "-I", "-S", "-B", "-X", "utf8", os.path.abspath(__file__), str(folder), str(user),
                     str(writing), *map(str, (limits.cpu_seconds, limits.memory, limits.file_bytes,
                                              limits.folder_bytes))]
            try:
                process = subprocess.Popen(words, stdin=source, stdout=output, stderr=subprocess.STDOUT, cwd=folder,
                                           env={}, start_new_session=True, pass_fds=[writing])
            finally:
                os.close(writing)
            report = wait(process, reading, limits.seconds)
            output.seek(0)
            text = output.read(4 * OUTPUT_CHARACTERS).decode(errors="replace")[:OUTPUT_CHARACTERS]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    reason = " ".join(report.split())[:300]
    return Outcome(reason == "passed", "" if reason == "passed" else reason, text)

def wait(process: subprocess.Popen, reading: int, seconds: float) -> str:
    """What the program's interpreter reports at the end. Afterwards no process of its group is left."""
    reason = ""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        reason = "it took too much time"
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    with open(reading, "rb") as file:
        os.set_blocking(reading, False)  # a process that got away may still hold the other end
        report = (file.read(4096) or b"").decode(errors="replace")
    if reason or report:
        return reason or report
    code = process.returncode
    if code in (-signal.SIGXCPU, 128 + signal.SIGXCPU, -signal.SIGKILL, 128 + signal.SIGKILL):
        return "it was ended: too much processor time or memory"
    return f"it ended without reaching its end, with code {code}"

def unprivileged_user() -> int:
    """The id of a user without rights and other processes, if this is root and the user can read Python; else 0."""
    if os.name != "posix" or os.geteuid() != 0:
        return 0
    library = Path(os.__file__).resolve()
    readable = library.stat().st_mode & 0o004 and all(folder.stat().st_mode & 0o001 for folder in library.parents)
    return 61_184 + os.getpid() % 4000 if readable else 0

def fault() -> str:
    """Why programs cannot run here; "" if they can."""
    if resource is None:
        return "this system cannot limit programs"
    outcome = run("import collections, math, re, typing\nassert math.prod([2, 3]) == 6")
    return outcome.reason

# -----------------------------------------------------------------------------
# Inside

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 1 << 17, 1 << 27, 1 << 28, 1 << 29, 1 << 30
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 2, 4, 1 << 14, 1 << 18
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38

def enter_namespaces(folder: str, folder_bytes: int):
    """Leaves the network, the other processes and all files that can be written, as far as Linux lets it."""
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC):
        return
    with contextlib.suppress(OSError):
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            Path("/proc/self", name).write_text(text)
    child = os.fork()                    # the first process of the new namespace; when it ends, all others do
    if child:
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)                 # ended by a signal: as shells say it
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    read_only = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY)
    libc.syscall(MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, read_only, ctypes.sizeof(read_only))
    libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", MS_NOSUID | MS_NODEV, f"size={folder_bytes},mode=777".encode())
    libc.mount(b"tmpfs", b"/proc", b"tmpfs", MS_NOSUID | MS_NODEV, b"size=4096,mode=555")
    os.chdir(folder)
    libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())      # no rights in the namespace

def set_limits(cpu_seconds: int, memory: int, file_bytes: int):
    """Sets the limits of this process, which it cannot raise again."""
    values = {"CPU": cpu_seconds, "AS": memory, "DATA": memory, "FSIZE": file_bytes, "NPROC": 1, "NOFILE": 64,
              "CORE": 0}
    for name, value in values.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is not None:
            with contextlib.suppress(ValueError, OSError):          # a lower limit is there already
                resource.setrlimit(kind, (value, value))

def guard(folder: str) -> list[str]:
    """Makes the interpreter refuse what could do harm outside the folder; the list that refused events go to."""
    refused = []
    inside = os.path.realpath(folder) + os.sep

    def is_inside(path) -> bool:
        path = os.fsdecode(path)
        return (os.path.realpath(path) + os.sep).startswith(inside)

    def hook(event, arguments):
        if event == "open":
            path, _, flags = arguments
            named = isinstance(path, (str, bytes))
            allowed = not named or is_inside(path) or not (
                flags & WRITING or os.path.realpath(os.fsdecode(path)).startswith("/proc"))
        elif event.startswith(CHANGING):
            allowed = all(is_inside(path) for path in arguments if isinstance(path, (str, bytes)))
        else:
            allowed = not event.startswith(DENIED)
        if not allowed:
            refused.append(event)
            raise PermissionError(f"{event} is not allowed here")
    sys.addaudithook(hook)
    return refused

def execute(program: str, refused: list[str]) -> str:
    """Runs the program in this interpreter: "passed", or why it failed."""
    try:
        exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
        sys.stdout.flush()
    except BaseException as error:
        try:
            return f"{type(error).__name__}: {error}"
        except BaseException:            # the program's own exception, whose text fails
            return type(error).__name__
    return f"PermissionError: {refused[0]} is not allowed here" if refused else "passed"

def inside(words: list[str]):
    """The process of one program: takes away what it must not have, runs it, and reports."""
    folder, (user, report, cpu_seconds, memory, file_bytes, folder_bytes) = words[0], map(int, words[1:])
    program = sys.stdin.buffer.read().decode()
    if user:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    if sys.platform == "linux":
        enter_namespaces(folder, folder_bytes)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.environ.clear()
    set_limits(cpu_seconds, memory, file_bytes)
    sys.argv = ["program.py"]
    outcome = execute(program, guard(folder))
    os.write(report, outcome.encode(errors="replace")[:4096])
    os._exit(0)                          # whatever threads the program has left

if __name__ == "__main__":
    if sys.argv[2:]:
        inside(sys.argv[1:])
    print(__doc__.strip())
