#!/usr/bin/env bash
# Submits a pipeline to SLURM: one job a stage, each after the one before it, requeued until it is through. docs/slurm.md.
# Usage: bash launch/slurm.sh RECIPE [override ...] [--dry-run]     for example:
#   bash launch/slurm.sh recipes/quickstart/pipeline.yaml cluster=one_node cluster.partition=main --dry-run
# PYTHON=... uses an environment that is there already; otherwise launch/environment.sh lists the variables that choose
# Python, environment and PyTorch. All nodes must see the checkout, the environment and the output folder.
set -euo pipefail
if [[ -n ${PYTHON:-} ]]; then
  python=$PYTHON
else
  source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
  make_environment core
  python=$VENV/bin/python
fi
exec "$python" -m nanotrain submit "$@"
