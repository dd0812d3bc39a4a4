#!/usr/bin/env bash
# Set up and run all that CI runs: ruff, mypy and pytest. Options go to pytest:
#   ./run_tests.sh -k attention
set -euo pipefail
cd "$(dirname "$0")"
source ./environment.sh
use_environment requirements-test.txt test
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy & # on one core while another compiles
mypy=$!
build_kernels
wait "$mypy"

# Two at a time, of one thread each: most tests are too small for more, and threads would wait for each other.
OMP_NUM_THREADS=1 "$PYTHON" -m pytest --numprocesses 2 --dist worksteal "$@"
