#!/usr/bin/env bash
# The run on several GPUs of one machine: what every engine must agree on, and what it is measured at.
# Usage: bash launch/test_multi_gpu.sh [--gpus N] [--cpu] [--out FOLDER] PART ...
#   PART         agree (engines against one GPU), faults (resharding, saves, kills), speed (throughput and scaling),
#                long (131,072 tokens under context parallelism), distill (12B -> 9B)
#   --gpus N     ranks (default: the GPUs of this machine)
#   --cpu        rehearse the same code on CPU ranks with tiny shapes (default ranks: 2)
#   --only WORDS agree, faults: the cases whose names have one of these words (commas between them)
#   --out FOLDER where PART.jsonl goes, a line per measurement (default: multi_gpu_results)
# PYTHON=python3 uses an environment that is there already. Exit code 1: a check failed; the other parts still ran.
set -euo pipefail
gpus='' out=multi_gpu_results device=() only=()
while [[ ${1:-} == --* ]]; do
  case $1 in
    --gpus) gpus=${2:?--gpus needs a number} && shift 2 ;;
    --out) out=${2:?--out needs a folder} && shift 2 ;;
    --cpu) device=(--cpu) && shift ;;
    --help) sed -n '2,/^set /{/^set /!p}' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//' && exit ;;
    --only) only=(--only "${2:?--only needs words}") && shift 2 ;;
    *) echo "test_multi_gpu.sh: $1 is not an option; see the head of the script." >&2 && exit 2 ;;
  esac
done
if (($# == 0)); then
  echo "test_multi_gpu.sh: name a part: agree, faults, speed, long, distill." >&2
  exit 2
fi
for part; do
  if [[ ! " agree faults speed long distill " == *" $part "* ]]; then
    echo "test_multi_gpu.sh: '$part' is not a part; use agree, faults, speed, long or distill." >&2
    exit 2
  fi
  if ((${#only[@]})) && [[ $part != agree && $part != faults ]]; then
    echo "test_multi_gpu.sh: --only chooses cases of agree and faults; '$part' would ignore it." >&2
    exit 2
  fi
done
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
enter_environment dev
if [[ -z $gpus ]]; then
  gpus=2
  ((${#device[@]})) || gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
fi
mkdir -p "$out"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1
# NVLink multicast stays off: a program that dies while using it can take the GPUs of the host with it.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
# The ranks are on one machine, which need not have a network or know its own name.
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
status=0
for part; do
  if [[ $part == agree || $part == faults ]]; then # these start their ranks: again after a crash, or on fewer of them
    "$PYTHON" -m "tests.multi_gpu.$part" --gpus "$gpus" --out "$out/$part.jsonl" "${device[@]}" "${only[@]}" || status=1
    continue
  fi
  # A case that ends its rank (out of memory, a hang) must not take the measurements after it along. Without the variable
  # ranks that start again find the addresses of the ones before them in torchrun's store, and wait for those.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  "$PYTHON" -m torch.distributed.run --standalone --local-addr 127.0.0.1 --max-restarts 8 \
    --nproc-per-node "$gpus" -m "tests.multi_gpu.$part" --out "$out/$part.jsonl" "${device[@]}" || status=1
done
exit $status
