"""Memory of a rank: against plain sums, the known one-GPU count, and how each kind of splitting must change it."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from nanotrain.config.engine import EngineConfig, EngineKind, Precision
from nanotrain.config.megatron import MegatronConfig, Recompute
from nanotrain.config.model import ModelConfig
from nanotrain.config.training import TrainingConfig
from nanotrain.planning.layout import Layout, check_layout
from nanotrain.planning.parallel_memory import RankMemory, memory_per_stage
from nanotrain.planning.parameters import count_parameters

TRAINING = TrainingConfig(steps=1, global_batch_size=736, micro_batch_size=1, sequence_length=8192, learning_rate=1e-4)


def stages(
    model: ModelConfig, world_size: int, precision: Precision = Precision.bf16, **megatron: object
) -> tuple[Layout, list[RankMemory]]:
    engine = EngineConfig(kind=EngineKind.megatron, precision=precision, megatron=MegatronConfig(**megatron))
    layout = check_layout(model, TRAINING, engine, world_size)
    return layout, memory_per_stage(model, TRAINING, engine, layout)


def test_one_rank_holds_18_bytes_a_parameter(published: Callable[[str], ModelConfig]) -> None:
    """bf16 weights, fp32 gradients, masters and two moments; A_log, D and dt_bias have no master beside themselves."""
    model = published("12b")
    wide = 3 * 128 * 28
    _, (rank,) = stages(model, 1)
    assert rank.num_parameters == count_parameters(model)
    assert rank.weights + rank.gradients + rank.optimizer_states == 18 * count_parameters(model) - 2 * wide
    _, (single,) = stages(model, 1, Precision.fp32)
    assert single.weights + single.gradients + single.optimizer_states == 16 * count_parameters(model)


def test_splitting_divides_what_it_splits(published: Callable[[str], ModelConfig]) -> None:
    model = published("12b")
    _, (one,) = stages(model, 1)
    _, (two,) = stages(model, 2, tensor_parallel=2)
    norms = 63 * 5120
    assert two.num_parameters == (one.num_parameters - norms) // 2 + norms
    _, (with_sp,) = stages(model, 2, tensor_parallel=2, sequence_parallel=True)
    gathered = 8192 * 5120 * 2  # the head's input, which is whole on every rank
    assert with_sp.activations - gathered == (one.activations - gathered) // 2
    assert one.activations > two.activations > with_sp.activations
    _, (context,) = stages(model, 4, context_parallel=4)
    assert context.activations == one.activations // 4
    assert context.weights == one.weights
    assert context.optimizer_states == -(-one.optimizer_states // 4)
    _, (data,) = stages(model, 4)
    assert (data.activations, data.optimizer_states) == (one.activations, context.optimizer_states)
    _, (whole,) = stages(model, 4, distributed_optimizer=False)
    assert whole.optimizer_states == one.optimizer_states


def test_earlier_stages_hold_more_micro_batches(published: Callable[[str], ModelConfig]) -> None:
    pattern = replace(published("12b"), hybrid_layer_pattern="M-" * 8)
    layout, four = stages(pattern, 4, pipeline_parallel=4)
    assert layout == Layout(1, 4, 1, 1)
    middle = four[2].activations // 2
    assert four[1].activations == 3 * middle
    assert four[0].activations == 4 * (middle + 8192 * 5120 * 2)  # and the embedding's output
    few = memory_per_stage(
        pattern,
        replace(TRAINING, global_batch_size=2),
        EngineConfig(kind=EngineKind.megatron, precision=Precision.bf16, megatron=MegatronConfig(pipeline_parallel=4)),
        layout,
    )
    assert few[0].activations == four[0].activations // 2  # two micro-batches are all there are
    assert sum(stage.num_parameters for stage in four) == count_parameters(pattern)


@pytest.mark.parametrize("size", ["12b", "9b"])
def test_recomputation_and_fp8_keep_less(published: Callable[[str], ModelConfig], size: str) -> None:
    model = published(size)
    _, (kept,) = stages(model, 1)
    _, (again,) = stages(model, 1, recompute=Recompute.full)
    residuals = (model.num_hidden_layers + 3) * model.hidden_size * 2 * 8192
    assert again.activations == residuals
    assert kept.activations > 8 * again.activations
    _, (first, _) = stages(model, 2, pipeline_parallel=2)
    _, (first_again, _) = stages(model, 2, pipeline_parallel=2, recompute=Recompute.full)
    assert first_again.workspace > first.workspace  # one layer is made again; on the last stage the loss needs more
    _, (fp8,) = stages(model, 1, Precision.fp8_blockwise)
    assert fp8.activations < kept.activations
    assert fp8.weights == kept.weights
    _, (gathered_wide,) = stages(model, 1, Precision.fp8_blockwise, fp8_parameters=False)
    assert fp8.weights < gathered_wide.weights < 2 * fp8.weights


def test_the_published_layouts_fit_80_gb(published: Callable[[str], ModelConfig]) -> None:
    _, large = stages(
        published("12b"), 1024, Precision.fp8_blockwise, tensor_parallel=8, sequence_parallel=True, pipeline_parallel=4
    )
    assert max(stage.total for stage in large) < 10 * 2**30
    _, (node,) = stages(published("12b"), 8, Precision.fp8_blockwise, tensor_parallel=4, sequence_parallel=True)
    assert node.total < 50 * 2**30


def test_long_rows_under_context_parallelism_need_what_two_gpus_measured(
    published: Callable[[str], ModelConfig],
) -> None:
    """31 layers of the 12B, one row of 131,072 tokens, two H200: 76.4 GiB last between steps, a step adds 40.8 (docs/benchmarks)."""
    model = published("12b")
    model = replace(model, hybrid_layer_pattern=model.hybrid_layer_pattern[:31])
    training = replace(TRAINING, global_batch_size=1, sequence_length=131072)
    megatron = MegatronConfig(context_parallel=2, recompute=Recompute.full)
    engine = EngineConfig(kind=EngineKind.megatron, precision=Precision.fp8_blockwise, megatron=megatron)
    (rank,) = memory_per_stage(model, training, engine, check_layout(model, training, engine, 2))
    lasting = rank.weights + rank.gradients + rank.optimizer_states
    assert lasting == pytest.approx(76.352 * 2**30, rel=0.01)
    assert rank.activations + rank.workspace == pytest.approx(40.777 * 2**30, rel=0.02)
