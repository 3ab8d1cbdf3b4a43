#!/usr/bin/env bash
# Set up and run every test: one command on a fresh machine. Further arguments go to pytest:
#   ./test.sh                                  all tests
#   ./test.sh tests/test_commands.py -k help   some of them
set -euo pipefail
unset CDPATH # or cd may go elsewhere, and print where
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
./run.sh --setup
# several processes import torch.compile: what that is gets compiled while pip is busy, which uses one core
PYTHONDONTWRITEBYTECODE="" .venv/bin/python -c "import torch._inductor.compile_fx" &
.venv/bin/python -m pip install --no-input --quiet --no-compile -r tests/requirements.txt
wait
# Two processes of one thread are faster on two cores than one of two; a third works while those wait for something.
# Plugins that come with other packages would cost each of them seconds.
export OMP_NUM_THREADS=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
exec .venv/bin/python -m pytest -q -p xdist -n 3 "$@"
