"""The quickstart at a length for tests: every stage as it is, on little data, for few steps."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/quickstart/pipeline.yaml"
_BATCH = ["global_batch_size=4", "micro_batch_size=4", "schedule.warmup_steps=1", "schedule.decay_steps=2"]
_STEPS = {"pretrain": 8, "distill": 6, "sft": 6}

OVERRIDES = [
    "prepare.stage.corpus.max_bytes_per_category=150000",
    "prepare.stage.corpus.num_chat_rows=200",
    "prepare.stage.corpus.num_chat_validation_rows=20",
    *(f"{entry}.stage.training.{value}" for entry in _STEPS for value in _BATCH),
    *(f"{entry}.stage.training.steps={steps}" for entry, steps in _STEPS.items()),
    *(f"{entry}.stage.training.save_interval_seconds=0.3" for entry in _STEPS),
    *(f"{entry}.stage.training.evaluation_interval=0" for entry in _STEPS),
    *(f"{entry}.stage.training.sequence_length=64" for entry in ("pretrain", "distill")),
    "prune.stage.calibration_samples=8",
    "prune.stage.calibration_sequence_length=64",
    "prune.stage.search.num_layers=[12]",
    "prune.stage.search.hidden_size=[96]",
    "prune.stage.search.intermediate_size=[320]",
    "prune.stage.search.mamba_num_heads=[8]",
    "prune.stage.search.max_parameters_fraction=1.0",
    "evaluate.stage.num_prompts=4",
    "evaluate.stage.max_new_tokens=12",
    "evaluate.stage.sequence_length=64",
    "evaluate.stage.max_validation_tokens=2000",
    "evaluate.stage.thinking_budgets=[0,4]",
    "evaluate.stage.thinking_grace=4",
]


def start(output_dir: Path, *words: str) -> subprocess.Popen[str]:
    """Start the shortened quickstart in a process of its own."""
    command = [sys.executable, "-m", "nanotrain", "run", RECIPE, *OVERRIDES, f"output_dir='{output_dir}'", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def without_clocks(value: Any) -> Any:
    """Drop what differs between two equal runs: times, memory, speed, digests of files that hold them, and paths."""
    clocks = (
        "seconds",
        "memory",
        "tokens_per_second",
        "digest",
        "fingerprint",
        "time",
        "unix",
        "output_dir",
        "path",
        "attempt",
    )
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if not any(clock in key for clock in clocks)}
        return {key: without_clocks(item) for key, item in kept.items()}
    return [without_clocks(item) for item in value] if isinstance(value, list) else value
