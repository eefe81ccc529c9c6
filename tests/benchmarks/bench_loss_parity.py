"""Trains one hybrid on the same tokens in several precisions and optimizer forms, and compares the losses.

    python -m tests.benchmarks.bench_loss_parity OUT.jsonl DATA [--tokens 20e6] [--seconds 500] [--only NAME ...] [--tiny]

DATA is what tests/benchmarks/parity_tokens.py writes. 106M parameters outside the embeddings; 16 sequences of 2,048 tokens a step, the same in every run; WSD schedule. A run that
would not end within the time left is not started. The loss every ten steps and the held-out loss are written as they come.
"""

import argparse
import gc
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from nanotrain.config.engine import EngineConfig, Precision
from nanotrain.config.model import ModelConfig
from nanotrain.config.training import OptimizerConfig, ParameterDtype, ScheduleConfig, StateDtype, TrainingConfig
from nanotrain.engines import build_engine
from nanotrain.losses.language_modeling import CrossEntropy
from nanotrain.model.batch import MicroBatch
from nanotrain.model.hybrid import HybridModel
from nanotrain.optim.lr_schedule import learning_rate
from nanotrain.planning.parameters import count_non_embedding_parameters
from tests.benchmarks.measure import write
from tests.benchmarks.parity_tokens import unpack

MODEL = ModelConfig(
    hybrid_layer_pattern="M-M-M*-M-M*-M-", vocab_size=16384, hidden_size=1024, intermediate_size=4096,
    num_attention_heads=16, num_key_value_heads=4, head_dim=64, mamba_num_heads=128, mamba_head_dim=16,
    ssm_state_size=128, n_groups=8,
)  # fmt: skip
NARROW = OptimizerConfig(state_dtype=StateDtype.int8, parameter_dtype=ParameterDtype.bf16)
RUNS: dict[str, tuple[Precision, OptimizerConfig, int]] = {
    "bf16, fp32 AdamW": (Precision.bf16, OptimizerConfig(), 1),
    "fp8 blockwise, fp32 AdamW": (Precision.fp8_blockwise, OptimizerConfig(), 1),
    "fp8 current, fp32 AdamW": (Precision.fp8_current, OptimizerConfig(), 1),
    "bf16, bf16 states": (Precision.bf16, OptimizerConfig(state_dtype=StateDtype.bf16), 1),
    "bf16, int8 states, bf16 weights": (Precision.bf16, NARROW, 1),
    "fp8 blockwise, int8 states, bf16 weights": (Precision.fp8_blockwise, NARROW, 1),
    "bf16, fp32 AdamW, other initial weights": (Precision.bf16, OptimizerConfig(), 2),
}


def batch_of(rows: np.ndarray) -> MicroBatch:
    ids = torch.from_numpy(rows.astype(np.int64))
    return MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def run(name: str, model_config: ModelConfig, training: TrainingConfig, data: dict[str, np.ndarray], out: Path) -> None:
    precision, _, seed = RUNS[name]
    started = time.perf_counter()
    with torch.device("meta"):
        model = HybridModel(model_config)
    engine = build_engine(EngineConfig(precision=precision), model, training)
    engine.init_weights(seed)
    order = np.concatenate([np.random.default_rng(e).permutation(len(data["train"])) for e in range(20)])
    rows = training.global_batch_size
    losses = []
    for step in range(training.steps):
        batch = batch_of(data["train"][order[step * rows : (step + 1) * rows]])
        result = engine.train_step([batch], CrossEntropy(), learning_rate(step, training))
        losses.append(result.loss)
        if step == 5:
            warm = time.perf_counter()
        if step % 10 == 9:  # a run that is cut off leaves its curve
            print(f"{name}: step {step + 1} loss {np.mean(losses[-10:]):.4f}", flush=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - warm
    held_out = engine.evaluate(
        [batch_of(data["validation"][i : i + rows]) for i in range(0, len(data["validation"]), rows)], CrossEntropy()
    )
    write(out, {
        "run": name, "held_out": held_out["loss"], "held_out_tokens": held_out["num_tokens"],
        "train_last_50": float(np.mean(losses[-50:])), "tokens": training.steps * training.tokens_per_step,
        "tokens_per_second": (training.steps - 6) * training.tokens_per_step / seconds,
        "seconds": time.perf_counter() - started, "epochs": training.steps * rows / len(data["train"]),
        "curve": [round(float(np.mean(losses[i : i + 10])), 4) for i in range(0, len(losses), 10)],
    })  # fmt: skip


def use_published_launch_parameters() -> None:
    """Run the scan's kernels with the launch parameters of the published shape: tuning this one takes 90 seconds."""
    from nanotrain.ops.gpu import tuned_configs

    for key, row in list(tuned_configs._TABLE.items()):
        if " P 80 " in key:
            tuned_configs._TABLE.setdefault(key.replace(" P 80 ", f" P {MODEL.mamba_head_dim} "), row)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tokens", type=float, default=20e6)
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--only", nargs="*", default=list(RUNS))
    parser.add_argument("--tiny", action="store_true", help="check the script without a GPU")
    arguments = parser.parse_args()
    started, model, rows, length = time.perf_counter(), MODEL, 16, 2048
    if arguments.tiny:
        model = replace(
            model, hybrid_layer_pattern="M-*-M-", hidden_size=64, intermediate_size=128, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=16, n_groups=2,
        )  # fmt: skip
        rows, length = 2, 64
        for name, (precision, optimizer, seed) in RUNS.items():
            RUNS[name] = (Precision.bf16 if precision is not Precision.bf16 else precision, optimizer, seed)
    if torch.cuda.is_available():
        use_published_launch_parameters()
    data = {split: all_rows[:, : length + 1] for split, all_rows in unpack(arguments.data).items()}
    if arguments.tiny:
        data["validation"] = data["validation"][:4]
    steps = int(arguments.tokens) // (rows * length)
    write(arguments.out, {
        "non_embedding_parameters": count_non_embedding_parameters(model), "steps": steps,
        "train_tokens": int(data["train"].shape[0]) * length,
    })  # fmt: skip
    longest = 0.0
    for name in arguments.only:
        if time.perf_counter() - started + longest > arguments.seconds:
            write(arguments.out, {"run": name, "not_started": "no time left"})
            continue
        training = TrainingConfig(
            steps=steps, global_batch_size=rows, micro_batch_size=rows, sequence_length=length, learning_rate=1.5e-3,
            schedule=ScheduleConfig(warmup_steps=steps // 20, decay_steps=steps // 4, min_learning_rate=1.5e-5),
            optimizer=RUNS[name][1],
        )  # fmt: skip
        before = time.perf_counter()
        run(name, model, training, data, arguments.out)
        longest = max(longest, time.perf_counter() - before) if longest else 1.0  # the first one also tunes kernels
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
