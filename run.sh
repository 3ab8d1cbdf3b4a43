#!/usr/bin/env bash
# Set up, get data, train a model and print its text: one command on a fresh machine. See ./run.sh --help.
# Needs Python 3.11 or newer, and bash 3.2 (as on macOS) or newer.
set -euo pipefail
unset CDPATH # with it, cd may go to another folder and print its name
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

usage() {
  cat <<'TEXT'
Train a small GPT on this machine and read its text.

usage: ./run.sh [options]

Makes a virtual environment in .venv, prepares data, trains, and prints a sample. Steps that are done already
are skipped, and a training that was stopped goes on. Without a GPU it trains the preset "tiny" on Python's standard
library, which takes a few minutes. With GPUs it downloads FineWeb shards (about 2 GB) and trains the preset "single"
on one GPU, or "speedrun" on several.

options:
  --prompt=TEXT   beginning of the sample, or with --chat the question to answer
  --chat          teach the model to spell, to count letters and to say who it is, then talk to it in the terminal;
                  the teaching takes a few minutes more
  --retrain       train again, even if there is a trained model
  --cpu           train the preset "tiny" on the CPU, even if there is a GPU
  --setup         only make the virtual environment
  --help          show this help
TEXT
}

say() { printf '[%s] %s\n' "$1" "$2"; }

fail() { # fail MESSAGE [EXIT_CODE]
  printf 'run.sh: %s\n' "$1" >&2
  exit "${2:-2}"
}

took() { # took START: prints the time since START, an earlier value of SECONDS
  local s=$((SECONDS - $1))
  if ((s < 60)); then echo "$s s"; else echo "$((s / 60)) min $((s % 60)) s"; fi
}

run() { # run PHASE COMMAND...: runs the command; if it fails, run.sh ends with its exit code
  local phase=$1 code=0
  shift
  "$@" || code=$?
  ((code == 0)) || fail "$phase failed with exit code $code: $*" "$code"
}

last_lines() { tail -n 15 | cut -c 1-300 >&2; }

# -----------------------------------------------------------------------------
# Environment

find_python() { # prints the command of the first Python that is new enough
  local name version seen=""
  for name in python3 python3.14 python3.13 python3.12 python3.11 python; do
    # Run it: version managers install commands that exist but only print "not found".
    version=$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    if ((${version%%.*} == 3 && ${version#*.} >= 11)); then
      echo "$name"
      return
    fi
    seen="${seen:+$seen, }$name is $version"
  done
  fail "needs Python 3.11 or newer (${seen:-there is none}); install it from python.org, then run this again"
}

make_venv() { # make_venv [--clear]
  local python output code=0
  python=$(find_python)
  output=$("$python" -m venv "$@" .venv 2>&1) || code=$?
  ((code != 0)) || return 0
  case $output in
    *ensurepip* | *"No module named venv"*)
      fail "$python cannot make a virtual environment; on Debian, Ubuntu: sudo apt install $python-venv, then again" ;;
  esac
  printf '%s\n' "$output" | last_lines
  fail "setup failed with exit code $code: $python -m venv .venv" "$code"
}

setup() { # installs requirements.txt into .venv, unless its stamp names this folder and these requirements
  local start=$SECONDS code=0 stamp=.venv/minutegpt.stamp want have
  want="$PWD $(cksum <requirements.txt)"
  have=$(cat "$stamp" 2>/dev/null || true)
  if [[ $have == "$want" ]] && .venv/bin/python -c "" 2>/dev/null; then
    say setup ".venv is up to date"
    return
  fi
  if [[ -L .venv && ${have% * *} != "$PWD" ]]; then # the environment of another folder: used, but never changed
    .venv/bin/python -c "" 2>/dev/null || fail ".venv links to an environment that does not work; remove it: rm .venv"
    say setup ".venv is a link; the environment there is used as it is"
    return
  fi
  # An environment contains its own path. If it was moved, or its Python is gone, it is made again.
  # Without our stamp it may belong to the user: packages are added, but it is never cleared.
  if [[ -n $have && ${have% * *} != "$PWD" ]] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    make_venv ${have:+--clear}
  fi
  rm -f "$stamp"
  say setup "installing the packages into .venv; PyTorch is large, so this can take some minutes"
  .venv/bin/python -m pip install --no-input --no-compile -r requirements.txt >.venv/pip.log 2>&1 || code=$?
  if ((code != 0)); then
    last_lines <.venv/pip.log
    fail "setup failed with exit code $code: pip install -r requirements.txt (more lines in .venv/pip.log)" "$code"
  fi
  # pip would compile thousands of files that are never imported. This compiles only what the scripts import.
  PYTHONDONTWRITEBYTECODE="" .venv/bin/python -c "import torch.distributed.run, safetensors.torch, tiktoken, requests, \
huggingface_hub, matplotlib.figure, matplotlib.backends.backend_svg; \
torch.cuda.is_available() and __import__('torch._inductor.compile_fx')" >>.venv/pip.log 2>&1 || true
  printf '%s\n' "$want" >"$stamp"
  say setup ".venv is ready ($(took "$start")); to work in it by hand: source .venv/bin/activate"
}

# -----------------------------------------------------------------------------
# Data, training, sample

find_gpus() { # sets gpus to the number that PyTorch can use
  nvidia-smi -L >/dev/null 2>&1 || return 0
  gpus=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null) || gpus=0
  if ((!gpus)); then
    say setup "nvidia-smi finds a GPU, but PyTorch cannot use it (driver too old?): going on with the CPU"
  fi
}

prepare_fineweb() { # fails if the hub cannot be reached
  local start=$SECONDS code=0
  .venv/bin/python data/fineweb.py 9 || code=$?
  ((code == 0 || code == 2)) || fail "data failed with exit code $code: data/fineweb.py 9" "$code"
  ((code == 0)) || return 1
  say data "FineWeb is in data/fineweb10B ($(took "$start")); more of it: .venv/bin/python data/fineweb.py --help"
}

prepare_local() {
  local start=$SECONDS
  # Documents are cut into pieces of the length that the tiny preset reads of a document.
  run data .venv/bin/python data/text.py --tokenizer=bytes --max_doc_tokens=512 --out=data/local --brief
  say data "data/local is Python's standard library ($(took "$start")); your own text: data/text.py --help"
}

run_after() { # run_after FILE SCRIPT: the first run of the script after the time in FILE, if it has a checkpoint
  local folder time
  time=$(cat "$1" 2>/dev/null) || return 0
  for folder in logs/*_"$2"_??????; do # their names begin with date and time, too
    [[ $folder > $time ]] || continue
    [[ ! -d $folder/checkpoint ]] || echo "$folder"
    return
  done
}

resume() { # resume PHASE FOLDER COMMAND...: goes on with a run; returns 1 if the script refuses that before it begins
  local phase=$1 folder=$2 code=0
  shift 2
  touch "$started"
  say "$phase" "going on with $folder, which was stopped; ./run.sh --retrain begins a new run"
  "$@" "--resume=$folder" || code=$?
  ((code != 0)) || return 0
  # torchrun turns the 2 of a refused run into a 1. A run that began has written to its run.json.
  if ((code > 2)) || [[ $folder/run.json -nt $started ]]; then
    fail "$phase failed with exit code $code: $* --resume=$folder" "$code"
  fi
  say "$phase" "$folder cannot go on, the line above says why; training from the beginning"
  return 1
}

train() { # train PRESET COMMAND...: trains, or goes on with a stopped run, unless an earlier call came to the end
  local preset=$1 start=$SECONDS finished=logs/finished_$1 started=logs/started_$1 stopped=""
  shift
  checkpoint=$(cat "$finished" 2>/dev/null || true) # a global variable, for the sample
  ((retrain)) || stopped=$(run_after "$started" train_gpt)
  if ((!retrain)) && [[ -z $stopped && -n $checkpoint && -d $checkpoint ]]; then
    say train "nothing to train, ${checkpoint%/*} has the $preset model; ./run.sh --retrain trains again"
    return
  fi
  if [[ -z $stopped ]] || ! resume train "$stopped" "$@"; then
    mkdir -p logs
    date +logs/%Y-%m-%d_%H-%M-%S >"$started"
    say train "$(printf '%q ' "$@")" # quoted as a shell needs it
    run train "$@"
  fi
  stopped=$(run_after "$started" train_gpt)
  [[ -n $stopped ]] || fail "train failed: no logs/*/checkpoint afterwards" 1
  checkpoint=$stopped/checkpoint
  printf '%s\n' "$checkpoint" >"$finished"
  rm -f "$started"
  say train "the $preset model is trained ($(took "$start")); its log, curve and checkpoint: ${checkpoint%/*}"
}

sample() {
  local start=$SECONDS
  run sample .venv/bin/python sample.py "--checkpoint=$checkpoint" ${prompt:+"--prompt=$prompt"}
  say sample "that was the model's text ($(took "$start")); give it a beginning: ./run.sh --prompt='The old house'"
}

teach() { # teach PRESET TOKENIZER: teaches $checkpoint to chat, unless that was done; sets the global variable taught
  local start=$SECONDS finished=logs/finished_chat_$1 started=logs/started_chat_$1 base="" stopped=""
  taught=""
  if ((!retrain)) && [[ -f $finished ]]; then
    { read -r base && read -r taught; } <"$finished" || true
  fi
  if [[ $base == "$checkpoint" && -n $taught && -d $taught ]]; then
    say teach "nothing to teach, ${taught%/*} has the chat model; ./run.sh --chat --retrain trains both again"
    return
  fi
  # More spelling than questions: copying a word letter by letter is the harder task.
  run data .venv/bin/python data/chat.py identity:1800 spelling:4500 spellingbee:3000 --turns=4 \
    "--tokenizer=$2" --out=data/chat
  set -- .venv/bin/python chat_sft.py "--checkpoint=$checkpoint" --data=data/chat --lr=0.8 ${device:+"--device=$device"}
  ((retrain)) || stopped=$(run_after "$started" chat_sft)
  if [[ -z $stopped ]] || ! resume teach "$stopped" "$@"; then
    date +logs/%Y-%m-%d_%H-%M-%S >"$started"
    run teach "$@"
  fi
  stopped=$(run_after "$started" chat_sft)
  [[ -n $stopped ]] || fail "teach failed: no logs/*/checkpoint afterwards" 1
  taught=$stopped/checkpoint
  printf '%s\n' "$checkpoint" "$taught" >"$finished"
  rm -f "$started"
  say teach "the model has learned to chat ($(took "$start")); its log, curve and checkpoint: ${taught%/*}"
}

talk() {
  say chat "talk to it again: .venv/bin/python chat.py --checkpoint=$taught; /help lists its commands"
  run chat .venv/bin/python chat.py "--checkpoint=$taught" ${prompt:+"--prompt=$prompt"} ${device:+"--device=$device"}
}

# Waiting threads of OpenMP keep a core busy. For so short a time they leave it to other programs, and a quiet machine
# is as fast (dev/LOG.md, 2026-11-29).
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-5000}

main() {
  prompt="" checkpoint="" device="" retrain=0 gpus=0 setup_only=0 chat=0 again=./run.sh
  local option preset=tiny tokenizer=bytes
  for option in "$@"; do
    case $option in
      --prompt=?*) prompt=${option#--prompt=} ;;
      --chat) chat=1 ;;
      --retrain) retrain=1 ;;
      --cpu) device=cpu ;;
      --setup) setup_only=1 ;;
      --help | -h)
        usage
        return ;;
      --prompt*) fail "$option: give the text as --prompt='The old house'" ;;
      *) fail "unknown option $option; ./run.sh --help lists the options" ;;
    esac
    [[ $option == --retrain ]] || again+=" $(printf '%q' "$option")" # that would begin a new run
  done
  trap 'fail "stopped; $again goes on with what is missing" 130' INT

  setup
  ((!setup_only)) || return 0
  [[ -n $device ]] || find_gpus
  if ((gpus)) && prepare_fineweb; then
    tokenizer=gpt2
    [[ ! -f data/fineweb10B/tokenizer.json ]] || tokenizer=data/fineweb10B/tokenizer.json
    if ((gpus == 1)); then
      preset=single
      train single .venv/bin/python train_gpt.py --preset=single
    else
      preset=speedrun
      train speedrun .venv/bin/torchrun --standalone --nproc_per_node=gpu train_gpt.py --preset=speedrun
    fi
  else
    ((!gpus)) || say data "no long run without FineWeb: the tiny preset on one GPU, on Python's standard library"
    prepare_local
    train tiny .venv/bin/python train_gpt.py --preset=tiny \
      --train_files='data/local/train_*.bin' --val_files='data/local/val_*.bin' ${device:+"--device=$device"}
  fi
  if ((chat)); then
    teach "$preset" "$tokenizer"
    talk
  else
    sample
  fi
}

main "$@"
