#!/usr/bin/env bash
# Submits a recipe to a SLURM cluster: one job an entry, each started when the one before has succeeded.
# Usage: bash launch/slurm.sh RECIPE [key=value ...] [--dry-run]      --dry-run prints the job scripts
# Nodes, GPUs and time: cluster=<file of configs/cluster>, or <entry>.cluster.nodes=16 and so on.
# The environment must lie on a file system that the nodes share; launch/environment.sh lists the variables that choose it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment
exec "$VENV/bin/python" -m nanotrain submit "$@"
