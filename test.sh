#!/usr/bin/env bash
# Set up and run every test: one command on a fresh machine. Arguments go to pytest:
#   ./test.sh                                  all tests
#   ./test.sh tests/test_commands.py -k help   some of them
set -euo pipefail
unset CDPATH # with it, cd may go to another folder and print its name
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
./run.sh --setup
# Several test processes import torch.compile. Its Python files are compiled here, while pip uses only one core.
PYTHONDONTWRITEBYTECODE="" .venv/bin/python -c "import torch._inductor.compile_fx" &
.venv/bin/python -m pip install --no-input --quiet --no-compile -r tests/requirements.txt
wait
# On two cores, two processes with one thread each are faster than one process with two threads. A third one works while
# the others wait. Loading the pytest plugins of other packages would cost each process seconds.
# The tests make files with names of many languages, whatever the locale is; what a locale may change has tests.
export OMP_NUM_THREADS=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTHONUTF8=1
# pytest cannot take a folder whose path has brackets as its argument, so it gets a name inside it
exec .venv/bin/python -m pytest -q -p xdist -n 3 -o testpaths=tests "$@"
