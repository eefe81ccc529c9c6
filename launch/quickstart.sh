#!/usr/bin/env bash
# Real text to a pretrained, pruned, distilled, fine-tuned and exported model, with a report; two CPU cores, no account.
# Usage: bash launch/quickstart.sh [override ...]      for example: output_dir=runs/mine pretrain.stage.training.steps=50
# launch/environment.sh lists the variables that choose Python, environment and PyTorch.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment core
cd "$ROOT"
exec "$VENV/bin/nanotrain" run recipes/quickstart/pipeline.yaml "$@"
