#!/usr/bin/env bash
# Runs the tests that need one GPU, in eight processes (TEST_PROCESSES), because most of the time goes into compiling kernels:
# 127 s in twelve on one H200 with 16 cores, 188 s in fourteen on two with 32.
# Usage: bash launch/test_gpu.sh [argument of pytest ...]      PYTHON=python3 uses an environment that is there already
# Tests of two ranks use NCCL where there are two GPUs; ranks that share one are replicas over gloo, all else is refused.
# A kernel library that is not installed skips its tests, by name: pip install --no-build-isolation -e '.[gpu]'
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
enter_environment dev
export OMP_NUM_THREADS=1 # the slow twins run on the CPU: the processes share its cores
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1 # as in test_multi_gpu.sh
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "$PYTHON" -m pytest -m gpu -rs -n "${TEST_PROCESSES:-8}" --dist worksteal tests/gpu "$@"
