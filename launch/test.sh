#!/usr/bin/env bash
# Runs the tests, except those marked slow or gpu, in two processes.
# Usage: bash launch/test.sh [argument of pytest ...]      for example: tests/ops -k scan
# launch/environment.sh lists the variables that choose Python, environment and PyTorch.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment dev
cd "$ROOT"
export OMP_NUM_THREADS=1 # two test processes share the cores; more threads only wait for each other
exec "$VENV/bin/python" -m pytest -n 2 --dist loadgroup -m "not slow and not gpu" "$@"
