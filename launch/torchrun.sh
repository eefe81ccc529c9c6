#!/usr/bin/env bash
# Runs a recipe on several ranks of this machine, and again from the newest saved state when a rank dies.
# Usage: bash launch/torchrun.sh [--ranks N] [--restarts N] RECIPE [override ...]
#   --ranks N      ranks on this machine (default: its GPUs, or 1)
#   --restarts N   give up after so many failures (default: 3)
# Exit codes are those of `nanotrain run`: 0 done, 2 a mistake, 75 stopped by a signal with the work saved.
# Several machines: start it on each with
#   NANOTRAIN_NODES=2 NANOTRAIN_NODE_RANK=<0, 1, ...> NANOTRAIN_RENDEZVOUS=<first machine>:29500 NANOTRAIN_RUN_ID=<any word>
# and an output_dir that all of them see. They wait for each other NANOTRAIN_JOIN_SECONDS (600). PYTHON=... uses an environment that is there already; otherwise
# launch/environment.sh lists the variables that choose Python, environment and PyTorch.
set -euo pipefail
if [[ -n ${PYTHON:-} ]]; then
  python=$PYTHON
else
  source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
  make_environment core
  python=$VENV/bin/python
fi
options=()
while [[ ${1:-} == --ranks || ${1:-} == --restarts ]]; do
  options+=("$1" "${2:?$1 needs a number}")
  shift 2
done
exec "$python" -m nanotrain.runtime.torchrun "${options[@]}" -- run "$@"
