"""The Megatron engine's stock layers (Transformer Engine, mamba-ssm) against the torch engine, alone and as two ranks on one GPU."""

from dataclasses import replace

import pytest
import torch

from nanotrain.config.engine import EngineConfig, EngineKind, Precision
from nanotrain.config.megatron import MegatronConfig
from nanotrain.config.model import ModelConfig
from nanotrain.config.training import OptimizerConfig, TrainingConfig
from nanotrain.engines.base import Engine
from nanotrain.losses.language_modeling import CrossEntropy
from nanotrain.model.batch import MicroBatch
from nanotrain.model.hybrid import build_meta_model
from tests.ranks import run_ranks

for package in ("megatron.core", "transformer_engine", "mamba_ssm", "causal_conv1d"):
    pytest.importorskip(package, reason=f"{package} is not installed")

MODEL = ModelConfig(
    hybrid_layer_pattern="M-*M-",
    vocab_size=8192,
    hidden_size=1024,
    intermediate_size=4096,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=128,
    mamba_num_heads=128,
    mamba_head_dim=80,
    ssm_state_size=128,
    n_groups=8,
)
LENGTH, NUM_STEPS = 1024, 4
LAYOUTS = {
    "tp2": MegatronConfig(tensor_parallel=2),
    "tp2_sp": MegatronConfig(tensor_parallel=2, sequence_parallel=True),
    "cp2": MegatronConfig(context_parallel=2),
    "dp2": MegatronConfig(),
}
TOLERANCE = {Precision.bf16: (2e-3, 2e-2), Precision.fp8_blockwise: (5e-3, 5e-2)}
"""Relative, of loss and gradient norm: bf16 keeps 8 bits, E4M3 4, and Megatron's residual stream is bf16, ours fp32."""


def config(precision: Precision, megatron: MegatronConfig | None) -> EngineConfig:
    base = EngineConfig(precision=precision)
    if precision is Precision.fp8_blockwise:
        base = replace(base, fp8_bf16_first_layers=1, fp8_bf16_last_layers=1)
    return base if megatron is None else replace(base, kind=EngineKind.megatron, megatron=megatron)


def steps(engine: Engine, *, packed: bool) -> list[tuple[float, float]]:
    """Return (loss, gradient norm) of a few steps on two micro-batches of two rows."""
    found = []
    for step in range(NUM_STEPS):
        generator = torch.Generator().manual_seed(step % 2)
        batches = []
        for _ in range(2):
            ids = torch.randint(0, MODEL.vocab_size, (2, LENGTH + 1), generator=generator)
            border = torch.randint(1, LENGTH, (2, 1), generator=generator)
            documents = (torch.arange(LENGTH) >= border).int() if packed else None
            batches.append(MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), documents))
        each = len(batches) // engine.dp_size
        result = engine.train_step(batches[engine.dp_rank * each :][:each], CrossEntropy(), 1e-3)
        assert not result.skipped
        found.append((result.loss, result.grad_norm))
    return found


def build(precision: Precision, megatron: MegatronConfig | None) -> Engine:
    from nanotrain.engines.torch_engine import TorchEngine

    training = TrainingConfig(
        steps=NUM_STEPS, global_batch_size=4, micro_batch_size=2, sequence_length=LENGTH, learning_rate=1e-3,
        optimizer=OptimizerConfig(),
    )  # fmt: skip
    if megatron is None:
        engine: Engine = TorchEngine(config(precision, None), build_meta_model(MODEL), training)
    else:
        from nanotrain.engines.megatron_engine import MegatronEngine

        engine = MegatronEngine(config(precision, megatron), build_meta_model(MODEL), training)
    engine.init_weights(1)
    return engine


def run_layouts(precision: Precision, layouts: dict[str, MegatronConfig], packed: bool):
    """Return layout -> steps, on one rank."""
    from megatron.core import parallel_state

    found = {}
    for name, layout in layouts.items():
        found[name] = steps(build(precision, layout), packed=packed and layout.context_parallel == 1)
        parallel_state.destroy_model_parallel()
    return found


def compare(found, expected, precision: Precision) -> None:
    loss, grad_norm = TOLERANCE[precision]
    for name, values in found.items():
        print(name, precision.value, values)
        for got, wanted in zip(values, expected[name], strict=True):
            assert got[0] == pytest.approx(wanted[0], rel=loss), name
            assert got[1] == pytest.approx(wanted[1], rel=grad_norm), name


@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp8_blockwise])
def test_stock_layers_train_like_the_torch_engine(precision):
    layouts = {"one": MegatronConfig(), "packed": MegatronConfig()}
    expected = {name: steps(build(precision, None), packed=name == "packed") for name in layouts}
    print("torch engine", precision.value, expected)
    found = {name: run_layouts(precision, {name: layout}, name == "packed")[name] for name, layout in layouts.items()}
    compare(found, expected, precision)


@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp8_blockwise])
def test_two_ranks_on_one_gpu_train_like_the_torch_engine(precision):
    plain, packed = (steps(build(precision, None), packed=flag) for flag in (False, True))
    expected = {name: packed if layout.context_parallel == 1 else plain for name, layout in LAYOUTS.items()}
    for found in run_ranks(run_layouts, 2, precision, LAYOUTS, True):
        compare(found, expected, precision)


def test_mamba_ssm_starts_with_the_shipped_launch_parameters():
    """Megatron's mixer calls mamba-ssm itself; untuned, its first step on a fresh machine times variants for over a minute."""
    from megatron.core import parallel_state

    from nanotrain.ops.gpu.tuned_configs import tuners

    build(Precision.bf16, MegatronConfig())
    parallel_state.destroy_model_parallel()
    left = {name: len(tuner.configs) for name, tuner in tuners().items()}
    assert left["_chunk_scan_fwd_kernel"] == left["_chunk_state_fwd_kernel"] == 1, left
