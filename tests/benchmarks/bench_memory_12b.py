"""The whole 12B on one GPU: forward, backward and optimizer over all parameters; peak memory and tokens/s by configuration.

    python -m tests.benchmarks.bench_memory_12b OUT.jsonl [--draw] [--tiny] [--only NAME ...]

8,192 random tokens a step. With --draw the first configuration draws its weights as a run does (timed); otherwise they are random
values made on the GPU. Every configuration is written as soon as it is done. The last two show what happens when it does not fit.
"""

import argparse
import gc
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import OmegaConf

from nanotrain.config.engine import ActivationCheckpointingConfig, EngineConfig, Precision
from nanotrain.config.errors import UserError
from nanotrain.config.model import ModelConfig
from nanotrain.config.training import OptimizerConfig, ParameterDtype, StateDtype, TrainingConfig
from nanotrain.engines import build_engine
from nanotrain.engines.torch_engine import TorchEngine
from nanotrain.losses.language_modeling import CrossEntropy
from nanotrain.model.batch import MicroBatch
from nanotrain.model.hybrid import HybridModel
from nanotrain.planning.flops import training_flops_per_token
from nanotrain.planning.training_memory import training_memory
from tests.benchmarks.measure import write

GIB = 2**30
BF16 = ParameterDtype.bf16
FP8 = EngineConfig(precision=Precision.fp8_blockwise)
MLP = ActivationCheckpointingConfig(mlp=True)
ALL = ActivationCheckpointingConfig(mamba=True, mlp=True, attention=True)


def optimizer(states: StateDtype, **changes) -> OptimizerConfig:
    return OptimizerConfig(**({"parameter_dtype": BF16, "state_dtype": states} | changes))


INT8 = optimizer(StateDtype.int8)
IN_BACKWARD = optimizer(StateDtype.int8, in_backward=True, gradient_clip=0.0)
CASES: dict[str, tuple[EngineConfig, OptimizerConfig, int]] = {
    "fp8 blockwise, int8 states": (FP8, INT8, 1),
    "fp8 blockwise, int8 states, in backward": (FP8, IN_BACKWARD, 1),
    "fp8 blockwise, int8 states, in backward, MLP checkpointed": (replace(FP8, activation_checkpointing=MLP), IN_BACKWARD, 1),
    "fp8 blockwise, int8 states, in backward, all checkpointed": (replace(FP8, activation_checkpointing=ALL), IN_BACKWARD, 1),
    "fp8 blockwise, int8 states, in backward, all checkpointed, 4 x 8192": (
        replace(FP8, activation_checkpointing=ALL), IN_BACKWARD, 4,
    ),
    "bf16, int8 states": (EngineConfig(precision=Precision.bf16), INT8, 1),
    "fp8 blockwise, bf16 states": (FP8, optimizer(StateDtype.bf16), 1),
    "fp32 weights and states": (FP8, OptimizerConfig(), 1),
}  # fmt: skip


def published_12b() -> ModelConfig:
    file = Path(__file__).parents[2] / "configs" / "model" / "nemotron_nano_12b_v2.yaml"
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(file)))
    assert isinstance(config, ModelConfig)
    return config


@torch.no_grad()
def random_weights(model: HybridModel) -> None:
    for name, parameter in model.named_parameters():
        if parameter.numel() > 1_000_000:
            parameter.normal_(0.0, 0.0125)
        elif name.endswith(("norm.weight", "norm_f.weight", ".D")):
            parameter.fill_(1.0)
        elif name.endswith(".dt_bias"):
            parameter.fill_(-4.6)
        elif name.endswith(".A_log"):
            parameter.uniform_(0.0, 2.77)
        else:
            parameter.uniform_(-0.5, 0.5)


def measure(name: str, model_config: ModelConfig, out: Path, steps: int, tokens: int, draw: bool) -> None:
    engine_config, optimizer_config, rows = CASES[name]
    training = TrainingConfig(
        steps=steps, global_batch_size=rows, micro_batch_size=rows, sequence_length=tokens, learning_rate=1e-5,
        optimizer=optimizer_config,
    )  # fmt: skip
    record = {"case": name, "planned_gib": training_memory(model_config, training, engine_config).peak / GIB}
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    with torch.device("meta"):
        model = HybridModel(model_config)
    engine = build_engine(engine_config, model, training)
    assert isinstance(engine, TorchEngine)
    record["seconds_build"] = time.perf_counter() - started
    started = time.perf_counter()
    engine.init_weights(1) if draw else random_weights(model)
    if cuda:
        torch.cuda.synchronize()
        record["static_gib"] = torch.cuda.memory_allocated() / GIB
    record["seconds_weights"] = time.perf_counter() - started
    generator = torch.Generator().manual_seed(0)
    times, losses = [], []
    for _ in range(steps):
        ids = torch.randint(0, model_config.vocab_size, (rows, tokens + 1), generator=generator)
        started = time.perf_counter()
        result = engine.train_step([MicroBatch(ids[:, :-1], ids[:, 1:].contiguous())], CrossEntropy(), 1e-5)
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        losses.append(result.loss)
        assert not result.skipped, result
    warm = times[2:]
    seconds = statistics.median(warm)
    flops = training_flops_per_token(model_config, tokens) * rows * tokens
    record |= {
        "first_step_seconds": times[0], "median_ms": seconds * 1e3, "min_ms": min(warm) * 1e3, "max_ms": max(warm) * 1e3,
        "tokens_per_second": rows * tokens / seconds, "model_tflops": flops / seconds / 1e12, "loss": losses[::3],
        "grad_norm": result.grad_norm,
    }  # fmt: skip
    if cuda:
        record["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        record["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    write(out, record)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="check the script without a GPU")
    parser.add_argument("--only", nargs="*", default=list(CASES))
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--draw", action="store_true", help="draw the first configuration's weights as a run does")
    arguments = parser.parse_args()
    config, tokens = published_12b(), 8192
    if arguments.tiny:
        config = replace(
            config, hybrid_layer_pattern="M-*-M-", vocab_size=512, hidden_size=64, intermediate_size=128,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, mamba_num_heads=8, mamba_head_dim=16,
            ssm_state_size=16, n_groups=2,
        )  # fmt: skip
        tokens = 64
        for name, (engine, chosen, rows) in CASES.items():
            CASES[name] = (replace(engine, precision=Precision.bf16), chosen, rows)
    for index, name in enumerate(arguments.only):
        try:
            measure(name, config, arguments.out, arguments.steps, tokens, draw=arguments.draw and index == 0)
        except UserError as error:
            write(arguments.out, {"case": name, "refused": str(error)})
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
