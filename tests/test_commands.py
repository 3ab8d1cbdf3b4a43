"""run.sh, test.sh and .ci/run: options, phases, what a second run does, and what happens when something is missing.

The scripts are copied into a folder with spaces in its name and run with a PATH that holds only a few system commands
and stand-ins: a `python3` that makes a stand-in environment, whose `python` and `torchrun` write down how they were
called and leave the files the real ones would. What each stand-in answers is set by files in the `answers` folder.

At the end, --help of every Python script of the project.

Run: python -m pytest tests/test_commands.py
"""
import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

BASH = shutil.which("bash")
SYSTEM_COMMANDS = ("bash", "cat", "chmod", "cksum", "cp", "cut", "dirname", "env", "mkdir", "rm", "sleep", "tail",
                   "touch")
SAMPLE = "sample.py --checkpoint=logs/2026-01-01_10-00-00_train_gpt_aaaaaa/checkpoint"
TRAIN_TINY = "train_gpt.py --preset=tiny --train_files=data/local/train_*.bin --val_files=data/local/val_*.bin"
TRAIN_SINGLE = "python: train_gpt.py --preset=single"
TRAIN_SPEEDRUN = "torchrun: --standalone --nproc_per_node=gpu train_gpt.py --preset=speedrun"
INSTALL = ["python: -m pip install --no-input --no-compile -r requirements.txt",
           "python: -c import torch.distributed.run, safetensors.torch, tiktoken, requests, huggingface_hub, "
           "matplotlib.figure, matplotlib.backends.backend_svg; "
           "torch.cuda.is_available() and __import__('torch._inductor.compile_fx')"]
DATA_CHAT = "data/chat.py identity:1800 spelling:4500 spellingbee:3000 --turns=4 --tokenizer=bytes --out=data/chat"
TEACH = "chat_sft.py --checkpoint=logs/2026-01-01_10-00-00_train_gpt_aaaaaa/checkpoint --data=data/chat --lr=0.8"
CHAT = "chat.py --checkpoint=logs/2026-01-09_10-00-00_chat_sft_aaaaaa/checkpoint"
DATA_LOCAL = "data/text.py --tokenizer=bytes --max_doc_tokens=512 --out=data/local --brief"

# One stand-in for every command: it looks at its own name and at its arguments.
STAND_IN = r"""#!@BASH@
home="@HOME@"
answer() { cat "$home/answers/$1" 2>/dev/null || echo "$2"; }   # answer NAME DEFAULT
name=${0##*/}
case "$name: $*" in
  *"version_info"*) answer version 3.12; exit 0 ;;
  *"-c import torch; print"*) answer torch_gpus 0; exit 0 ;;
  *": -c ") exit 0 ;;
  "date: "*) echo "logs/2026-01-0$(answer day 1)_09-00-00"; exit 0 ;;
  "nvidia-smi: -L") exit "$(answer nvidia_smi 1)" ;;
esac
[[ $* == "-m pip --version" ]] && exit 0
printf '%s\n' "$name: $*" >>"$home/calls"
case "$*" in
  "-m venv"*)
    if [[ -e "$home/answers/venv_output" ]]; then answer venv_output; exit 1; fi
    mkdir -p .venv/bin
    for made in python torchrun; do cp "$0" ".venv/bin/$made"; done ;;
  "-m pip install"*) echo "noise from pip"; exit "$(answer pip 0)" ;;
  "-c import"*) echo "noise"; exit 1 ;;                       # of a package that is not there
  data/fineweb.py*) exit "$(answer fineweb 0)" ;;
  data/text.py*) exit "$(answer text 0)" ;;
  *train_gpt.py*)
    if [[ $* == *--resume=* ]]; then
      code=$(answer resume 0)
      [[ $code == 2 ]] || { sleep 1; run=$*; echo >"${run##*--resume=}/run.json"; }
      exit "$code"
    fi
    run="logs/2026-01-0$(answer day 1)_10-00-00_train_gpt_aaaaaa"
    if [[ -e "$home/answers/train_seconds" ]]; then
      mkdir -p "$run/$(answer stopped_with .)"
      sleep "$(answer train_seconds)"
    fi
    code=$(answer train 0)
    ((code != 0)) || mkdir -p "$run/checkpoint"
    exit "$code" ;;
  chat_sft.py*)
    code=$(answer teach 0)
    [[ $* == *--resume=* || ! -e "$home/answers/teach_stopped" ]] || code=130
    ((code != 0 && code != 130)) || mkdir -p logs/2026-01-09_10-00-00_chat_sft_aaaaaa/checkpoint
    exit "$code" ;;
  chat.py*) echo "Hello! I am minutegpt." ;;
  sample.py*) echo "Once there was a model." ;;
esac
"""


class Machine:
    """A project folder with the scripts in it, and the commands that the machine has."""

    def __init__(self, folder):
        self.folder, self.bin, self.project = folder, folder / "bin", folder / "a project with spaces"
        self.answers, self.environment = folder / "answers", {"PATH": str(self.bin), "HOME": str(folder)}
        for path in (self.bin, self.project / ".ci", self.answers):
            path.mkdir(parents=True)
        for script in ("run.sh", "test.sh", ".ci/run", "requirements.txt"):
            shutil.copy(ROOT / script, self.project / script)
        for command in SYSTEM_COMMANDS:
            (self.bin / command).symlink_to(shutil.which(command))
        self.add("python3", "nvidia-smi", "date")

    def add(self, *names):
        for name in names:
            path = self.bin / name
            path.write_text(STAND_IN.replace("@BASH@", BASH).replace("@HOME@", str(self.folder)))
            path.chmod(0o755)

    def answer(self, **values):
        """Sets what the stand-ins answer: exit codes, Python's version, the output of a failing venv."""
        for name, value in values.items():
            (self.answers / name).write_text(f"{value}\n")

    def start(self, *arguments, script="run.sh", cwd=None):
        """Runs a script of the project and returns the finished process; `.calls` lists what it called."""
        (self.folder / "calls").write_text("")
        done = subprocess.run([str(self.project / script), *arguments], cwd=cwd or self.folder, env=self.environment,
                              text=True, timeout=30, capture_output=True)
        done.calls = self.calls()
        return done

    def calls(self):
        """What the stand-ins were called with since the last start, one line a call."""
        return (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def phases(done):
    """The phase names of the lines that run.sh itself printed, each once, in order."""
    return list(dict.fromkeys(re.findall(r"^\[(\w+)\]", done.stdout, re.M)))


# -----------------------------------------------------------------------------
# Options

@pytest.mark.parametrize("script", ["run.sh", "test.sh", ".ci/run"])
def test_scripts_parse_and_are_executable(script):
    assert subprocess.run([BASH, "-n", ROOT / script], capture_output=True).stderr == b""
    assert os.access(ROOT / script, os.X_OK)


def test_help_lists_every_option_and_starts_nothing(machine):
    done = machine.start("--help")
    assert (done.returncode, done.stderr, done.calls) == (0, "", [])
    case_label = r"^      (--\w+)(?:=\?\*| \| -h)?\)"
    accepted = re.findall(case_label, (ROOT / "run.sh").read_text(), re.M)
    assert {"--help", "--prompt", "--retrain"} <= set(accepted)
    assert sorted(re.findall(r"^  (--\w+)", done.stdout, re.M)) == sorted(accepted)
    assert max(map(len, done.stdout.splitlines())) <= 120


@pytest.mark.parametrize("option", ["--frobnicate", "tiny", "--prompt", "--prompt="])
def test_an_option_it_does_not_know_stops_it_with_one_line(machine, option):
    done = machine.start("--retrain", option)
    assert (done.returncode, done.stdout, done.calls) == (2, "", [])
    assert done.stderr.startswith("run.sh: ") and option in done.stderr and done.stderr.count("\n") == 1


# -----------------------------------------------------------------------------
# Phases

def test_a_fresh_machine_without_a_gpu(machine):
    done = machine.start("--prompt=The old house")
    assert done.returncode == 0, done.stderr
    assert done.calls == ["python3: -m venv .venv", *INSTALL, f"python: {DATA_LOCAL}", f"python: {TRAIN_TINY}",
                          f"python: {SAMPLE} --prompt=The old house"]
    assert phases(done) == ["setup", "data", "train", "sample"]
    assert "Once there was a model." in done.stdout
    assert "noise" not in done.stdout + done.stderr
    assert "logs/2026-01-01_10-00-00_train_gpt_aaaaaa" in done.stdout
    for phase in phases(done):  # how long, and what to type next
        last = [line for line in done.stdout.splitlines() if line.startswith(f"[{phase}]")][-1]
        assert re.search(r"\(\d+ s\)", last), last


def test_a_second_run_does_nothing_again_but_the_sample(machine):
    machine.start()
    done = machine.start(cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.calls == [f"python: {DATA_LOCAL}", f"python: {SAMPLE}"]
    assert ".venv is up to date" in done.stdout
    assert "nothing to train" in done.stdout and "--retrain trains again" in done.stdout


def test_retrain_trains_again_and_the_newest_model_is_named(machine):
    machine.start()
    machine.answer(day=2)
    done = machine.start("--retrain")
    assert f"python: {TRAIN_TINY}" in done.calls and "logs/2026-01-02_10" in done.stdout
    assert "nothing to train, logs/2026-01-02_10" in machine.start().stdout


def test_a_model_that_was_deleted_is_trained_again(machine):
    machine.start()
    shutil.rmtree(machine.project / "logs/2026-01-01_10-00-00_train_gpt_aaaaaa")
    assert f"python: {TRAIN_TINY}" in machine.start().calls


def test_changed_requirements_are_installed_into_the_same_environment(machine):
    machine.start("--setup")
    with open(machine.project / "requirements.txt", "a") as file:
        file.write("one-more\n")
    assert machine.start("--setup").calls == INSTALL
    assert machine.start("--setup").calls == []


def test_a_moved_project_gets_a_new_environment(machine):
    machine.start("--setup")
    machine.project = machine.project.rename(machine.folder / "moved here")
    assert machine.start("--setup").calls[0] == "python3: -m venv --clear .venv"


def test_the_environment_of_another_folder_behind_a_link_is_used_and_not_changed(machine):
    machine.start("--setup")
    other = machine.project.rename(machine.folder / "other")
    machine.project = shutil.copytree(other, machine.folder / "project", ignore=shutil.ignore_patterns(".venv"))
    (machine.project / ".venv").symlink_to(other / ".venv")
    done = machine.start("--setup")
    assert (done.returncode, done.calls) == (0, []) and "is a link" in done.stdout
    (other / ".venv" / "bin" / "python").unlink()
    done = machine.start("--setup")
    assert (done.returncode, done.calls) == (2, []) and "remove it: rm .venv" in done.stderr


@pytest.mark.parametrize("gpus, calls", [(8, [TRAIN_SPEEDRUN]), (1, [TRAIN_SINGLE]), (0, [f"python: {TRAIN_TINY}"])])
def test_gpus_get_a_long_run_when_pytorch_can_use_them(machine, gpus, calls):
    machine.answer(nvidia_smi=0, torch_gpus=gpus)
    done = machine.start()
    assert done.returncode == 0, done.stderr
    assert [call for call in done.calls if "train_gpt.py" in call] == calls
    assert ("python: data/fineweb.py 9" in done.calls) == (gpus > 0)
    assert (f"python: {DATA_LOCAL}" in done.calls) == (gpus == 0)
    assert ("PyTorch cannot use it" in done.stdout) == (gpus == 0)


def test_a_tiny_model_does_not_pass_for_the_speedrun(machine):
    machine.start()
    machine.answer(nvidia_smi=0, torch_gpus=2, day=2)
    assert TRAIN_SPEEDRUN in machine.start().calls


def test_cpu_leaves_the_gpus_alone(machine):
    machine.answer(nvidia_smi=0, torch_gpus=2)
    done = machine.start("--cpu")
    assert [call for call in done.calls if "fineweb" in call or "torchrun" in call] == []
    assert f"python: {TRAIN_TINY} --device=cpu" in done.calls


def test_without_the_hub_the_gpu_trains_the_tiny_model_and_says_so(machine):
    machine.answer(nvidia_smi=0, torch_gpus=2, fineweb=2)
    done = machine.start()
    assert done.returncode == 0, done.stderr
    assert done.calls[3:] == ["python: data/fineweb.py 9", f"python: {DATA_LOCAL}", f"python: {TRAIN_TINY}",
                              f"python: {SAMPLE}"]
    assert len([line for line in done.stdout.splitlines() if "no long run without FineWeb" in line]) == 1


def test_chat_teaches_the_model_once_and_opens_the_chat(machine):
    machine.start()
    done = machine.start("--chat", "--prompt=Who are you?")
    assert done.returncode == 0, done.stderr
    assert done.calls == [f"python: {DATA_LOCAL}", f"python: {DATA_CHAT}", f"python: {TEACH}",
                          f"python: {CHAT} --prompt=Who are you?"]
    assert phases(done) == ["setup", "data", "train", "teach", "chat"] and "I am minutegpt." in done.stdout
    done = machine.start("--chat")
    assert done.calls == [f"python: {DATA_LOCAL}", f"python: {CHAT}"] and "nothing to teach" in done.stdout
    machine.answer(day=2)
    assert f"python: {TEACH.replace('01-01', '01-02')}" in machine.start("--chat", "--retrain").calls


def test_chat_on_a_gpu_uses_the_vocabulary_of_the_shards(machine):
    machine.answer(nvidia_smi=0, torch_gpus=2)
    assert f"python: {DATA_CHAT.replace('bytes', 'gpt2')}" in machine.start("--chat").calls
    (machine.project / "data" / "fineweb10B").mkdir(parents=True)
    (machine.project / "data" / "fineweb10B" / "tokenizer.json").write_text("")
    calls = machine.start("--chat", "--retrain").calls
    assert f"python: {DATA_CHAT.replace('bytes', 'data/fineweb10B/tokenizer.json')}" in calls


def test_a_failing_lesson_is_not_taken_for_a_finished_one(machine):
    machine.answer(teach=3)
    done = machine.start("--chat")
    assert (done.returncode, done.stderr[:47]) == (3, "run.sh: teach failed with exit code 3: .venv/bi")
    machine.answer(teach=0)
    assert f"python: {CHAT}" in machine.start("--chat").calls


# -----------------------------------------------------------------------------
# Failures

@pytest.mark.parametrize("name, phase, code", [("text", "data", 3), ("train", "train", 1), ("train", "train", 2)])
def test_a_failing_phase_ends_the_run_with_its_name_and_code(machine, name, phase, code):
    machine.answer(**{name: code})
    done = machine.start()
    assert done.returncode == code
    assert done.stderr.startswith(f"run.sh: {phase} failed with exit code {code}: ") and done.stderr.count("\n") == 1
    assert "sample.py" not in done.calls[-1]
    assert "nothing to train" not in machine.start().stdout


def test_fineweb_failing_for_another_reason_is_not_taken_for_a_missing_hub(machine):
    machine.answer(nvidia_smi=0, torch_gpus=2, fineweb=1)
    done = machine.start()
    assert done.returncode == 1 and "data failed with exit code 1" in done.stderr
    assert done.calls[-1] == "python: data/fineweb.py 9"


def interrupt(machine, *arguments):
    """Ctrl-C while run.sh trains; returns (exit code, stderr)."""
    machine.answer(train_seconds=20)
    (machine.folder / "calls").write_text("")
    process = subprocess.Popen([machine.project / "run.sh", *arguments], env=machine.environment, text=True,
                               start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not any(TRAIN_TINY in call for call in machine.calls()) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)  # the stand-in makes its folders
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all of them
    errors = process.communicate(timeout=15)[1]
    (machine.answers / "train_seconds").unlink()
    return process.returncode, errors


def test_ctrl_c_ends_with_one_line_and_code_130(machine):
    code, errors = interrupt(machine, "--retrain", "--cpu", "--prompt=The old house")
    assert (code, errors) == (130, "run.sh: stopped; ./run.sh --cpu --prompt=The\\ old\\ house goes on with what is "
                                   "missing\n")


@pytest.mark.parametrize("retrain", [(), ("--retrain",)])
def test_a_stopped_training_goes_on(machine, retrain):
    if retrain:
        machine.start()
        machine.answer(day=2)
    machine.answer(stopped_with="checkpoint")
    interrupt(machine, *retrain)
    run = f"logs/2026-01-0{2 if retrain else 1}_10-00-00_train_gpt_aaaaaa"
    machine.answer(day=3)
    done = machine.start()
    assert done.returncode == 0, done.stderr
    assert done.calls[-2:] == [f"python: {TRAIN_TINY} --resume={run}",
                               f"python: sample.py --checkpoint={run}/checkpoint"]
    assert len([line for line in done.stdout.splitlines() if "going on with" in line and run in line]) == 1
    assert f"nothing to train, {run} has" in machine.start().stdout


def test_a_stopped_training_that_cannot_go_on_begins_anew_and_says_so(machine):
    machine.answer(stopped_with="checkpoint")
    interrupt(machine)
    machine.answer(day=2, resume=2)
    done = machine.start()
    assert done.returncode == 0, done.stderr
    assert done.calls[-2:] == [f"python: {TRAIN_TINY}", f"python: {SAMPLE.replace('01-01', '01-02')}"]
    assert len([line for line in done.stdout.splitlines() if "cannot go on" in line]) == 1
    assert "nothing to train, logs/2026-01-02" in machine.start().stdout


def test_a_resumed_training_that_fails_ends_the_run_and_can_go_on_again(machine):
    machine.answer(stopped_with="checkpoint")
    interrupt(machine)
    machine.answer(day=2, resume=1)
    done = machine.start()
    assert done.returncode == 1 and done.stderr.startswith("run.sh: train failed with exit code 1: ")
    assert "--resume=logs/2026-01-01" in done.calls[-1]
    assert "--resume=logs/2026-01-01" in machine.start().calls[-1]
    assert f"python: {TRAIN_TINY}" in machine.start("--retrain").calls


def test_a_training_stopped_without_a_checkpoint_leaves_the_model_before_it(machine):
    machine.start()
    machine.answer(day=2)
    interrupt(machine, "--retrain")
    assert "nothing to train, logs/2026-01-01" in machine.start().stdout


def test_a_stopped_teaching_goes_on(machine):
    machine.answer(teach_stopped=1)
    assert machine.start("--chat").returncode == 130
    done = machine.start("--chat")
    assert done.returncode == 0, done.stderr
    run = "logs/2026-01-09_10-00-00_chat_sft_aaaaaa"
    assert done.calls[-2].startswith("python: chat_sft.py ") and done.calls[-2].endswith(f" --resume={run}")
    assert len([line for line in done.stdout.splitlines() if line.startswith(f"[teach] going on with {run}")]) == 1
    assert "nothing to teach" in machine.start("--chat").stdout
    assert "--resume" not in "".join(machine.start("--chat", "--retrain").calls)


def test_failing_pip_shows_its_last_lines_and_is_tried_again(machine):
    machine.answer(pip=1)
    done = machine.start()
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "noise from pip"
    assert done.stderr.splitlines()[-1].startswith("run.sh: setup failed with exit code 1: pip install")
    assert not any("data/" in call for call in done.calls)
    machine.answer(pip=0)
    assert machine.start("--setup").calls == INSTALL


def test_an_environment_that_was_half_changed_is_not_taken_for_up_to_date(machine):
    machine.start("--setup")
    shutil.copy(machine.project / "requirements.txt", machine.folder / "before")
    (machine.project / "requirements.txt").write_text("something-else\n")
    machine.answer(pip=1)
    machine.start("--setup")
    shutil.copy(machine.folder / "before", machine.project / "requirements.txt")
    assert len(machine.start("--setup").calls) == 1


def test_python_too_old(machine):
    machine.answer(version="3.10")
    done = machine.start()
    assert (done.returncode, done.calls) == (2, [])
    assert done.stderr.count("\n") == 1 and "3.11 or newer" in done.stderr and "python3 is 3.10" in done.stderr
    assert not (machine.project / ".venv").exists()


def test_no_python_at_all(machine):
    (machine.bin / "python3").unlink()
    done = machine.start()
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "there is none" in done.stderr


def test_a_newer_python_beside_an_old_one_is_found(machine):
    (machine.bin / "python3").write_text(f"#!{BASH}\necho 3.9\n")
    (machine.bin / "python3.13").write_text(f"#!{BASH}\necho 'python3.13: command not found' >&2\nexit 127\n")
    (machine.bin / "python3.13").chmod(0o755)
    machine.add("python3.12")
    done = machine.start("--setup")
    assert done.returncode == 0 and done.calls[0] == "python3.12: -m venv .venv"


def test_python_without_ensurepip_says_what_to_install(machine):
    machine.answer(venv_output="The virtual environment was not created: ensurepip is not available.")
    done = machine.start()
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "apt install python3-venv" in done.stderr


# -----------------------------------------------------------------------------
# test.sh and .ci/run

@pytest.mark.parametrize("script", ["test.sh", ".ci/run"])
def test_tests_run_in_the_environment_that_run_sh_makes(machine, script):
    arguments = () if script == ".ci/run" else ("tests/test_x.py", "-k", "a name")
    done = machine.start(*arguments, script=script)
    assert done.returncode == 0, done.stderr
    assert done.calls[:3] == ["python3: -m venv .venv", *INSTALL]
    assert sorted(done.calls[3:5]) == [                                 # at the same time
        "python: -c import torch._inductor.compile_fx",
        "python: -m pip install --no-input --quiet --no-compile -r tests/requirements.txt"]
    more = ["python: records/records.py check --all"] if script == ".ci/run" else []
    assert done.calls[5:] == [" ".join(("python: -m pytest -q -p xdist -n 3 -o testpaths=tests", *arguments)), *more]


# -----------------------------------------------------------------------------
# --help

HELPFUL = sorted(path.relative_to(ROOT).as_posix() for folder in (".", "data", "records", "dev")
                 for path in (ROOT / folder).glob("*.py"))


def test_the_list_of_scripts_is_complete():
    assert {"train_gpt.py", "train_gpt_medium.py", "sample.py", "evaluate.py", "gpt2.py", "triton_kernels.py",
            "data/text.py", "data/fineweb.py", "data/evals.py", "data/tokenizer.py", "records/records.py",
            "train_gpt_simple.py", "chat_sft.py", "chat.py", "data/chat.py"} <= set(HELPFUL)


@pytest.mark.parametrize("name", HELPFUL)
def test_help_says_what_a_script_does_and_does_nothing_else(name, fast_run, tmp_path):
    """Also where there is no GPU, no data and no network."""
    done = fast_run([sys.executable, str(ROOT / name), "--help"], cwd=tmp_path, text=True, env={
        "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "100"})
    assert (done.returncode, done.stderr) == (0, ""), done
    purpose = ast.get_docstring(ast.parse((ROOT / name).read_bytes()))
    first = " ".join(purpose.split()[:6])
    assert first in " ".join(done.stdout.split()), done.stdout
    assert not any(tmp_path.iterdir())
