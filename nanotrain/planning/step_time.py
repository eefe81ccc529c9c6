"""Seconds of an optimizer step on Hopper GPUs, from operations, bytes and what single kernels were measured at.

Products run at a measured rate; what lies between them (scan, norms, casts, convolution) is a measured time per layer that
scales with its width and with the memory's bandwidth. Communication counts where nothing hides it. Figures are of one H200
(docs/benchmarks/one_gpu_h200_202611.md: the profile, and the peer's layers alone), for models of a billion parameters and more:
smaller ones wait for kernel launches, which are not counted.
"""

from dataclasses import dataclass

from nanotrain.config.engine import FP8_PRECISIONS, EngineConfig, EngineKind, Precision
from nanotrain.config.megatron import MegatronConfig, Recompute
from nanotrain.config.model import ATTENTION, MAMBA, MLP, ModelConfig
from nanotrain.config.parallel import DataParallel
from nanotrain.config.training import TrainingConfig
from nanotrain.planning.flops import TRAINING_OVER_FORWARD
from nanotrain.planning.layout import Layout, data_parallel_size, fp8_layers
from nanotrain.planning.parameters import count_parameters, embedding_parameters, mixer_parameters


@dataclass(frozen=True)
class Card:
    """A GPU: bytes a second of its memory (reads and writes of a copy) and of its links (NCCL's bus bandwidth)."""

    name: str
    memory_bandwidth: float
    bus_bandwidth: float = 340e9
    """329 to 361 GB/s were measured for an all-reduce of 1 GiB over NVLink, without multicast."""


H200 = Card("H200", 4.2e12)
H100 = Card("H100", 3.0e12)

PRODUCTS = {False: 700e12, True: 1170e12}
"""Operations a second of matrix products in bf16, and in FP8 blockwise."""
ATTENTION_CORE = 450e12
BETWEEN = {
    False: {MAMBA: 5.3e-3, MLP: 1.0e-3, ATTENTION: 0.6e-3},
    True: {MAMBA: 7.0e-3, MLP: 2.5e-3, ATTENTION: 1.6e-3},
}
"""Seconds a layer of the 12B spends between its products for 8,192 tokens, forward and backward on an H200; FP8 adds casts."""
TOKENS, HEAD_BETWEEN = 8192, 5e-3
WIDTHS = {MAMBA: 10240, MLP: 20480, ATTENTION: 5120}
UPDATE_BYTES, ACCUMULATE_BYTES, COPY_SHARE = 44, 10, 0.8
"""A parameter: norm, clip, zero and AdamW over fp32 states; adding a micro-batch's gradient; and the share of the copy's
bandwidth that AdamW was measured at."""
QUANTISE_BYTES = 4
"""A parameter: a gathered bf16 weight is read and written in FP8 by rows and by columns, for each use under FSDP2."""
BACKWARD_SHARE = 2 / 3


@dataclass(frozen=True)
class StepTime:
    """Seconds of one rank; the sum is the step."""

    compute: float
    """Forward and backward passes of all micro-batches, with what is recomputed and waiting in the pipeline."""
    communication: float
    """Between ranks, as far as it is not hidden behind computation."""
    update: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.compute + self.communication + self.update


def step_time(
    model: ModelConfig, training: TrainingConfig, engine: EngineConfig, world_size: int, card: Card
) -> StepTime | None:
    """Estimate a step; None where nothing was measured to estimate it from (fp32 products, DeepSpeed).

    Args:
        model: the architecture.
        training: batch sizes and sequence length; the batch divides over the ranks.
        engine: kind torch or megatron, precision (auto counts as bf16), layout, recomputation.
        world_size: ranks.
        card: what they run on.
    """
    if engine.precision is Precision.fp32 or engine.kind is EngineKind.deepspeed:
        return None
    layout = _layout(engine, world_size)
    micro_batches = training.global_batch_size // (layout.data * training.micro_batch_size)
    tokens = training.micro_batch_size * training.sequence_length
    passed = micro_batch_seconds(model, engine, tokens, training.sequence_length, card) / (
        layout.tensor * layout.context * layout.pipeline
    )
    waiting = (micro_batches + layout.pipeline - 1) / micro_batches
    parameters = count_parameters(model) / (layout.tensor * layout.pipeline)
    shards = layout.data * layout.context if _divides_states(engine) else 1
    bandwidth = COPY_SHARE * card.memory_bandwidth
    exchanged = _between_ranks(model, engine, layout, tokens) / card.bus_bandwidth * micro_batches
    reduced = _data_parallel_seconds(model, engine, layout, passed, card)
    return StepTime(
        compute=passed * micro_batches * waiting + micro_batches * ACCUMULATE_BYTES * parameters / bandwidth,
        communication=exchanged * waiting + reduced,
        update=UPDATE_BYTES * parameters / shards / bandwidth,
    )


def micro_batch_seconds(
    model: ModelConfig, engine: EngineConfig, tokens: int, length: int, card: Card, *, backward: bool = True
) -> float:
    """Return the seconds of one GPU for a forward pass of `tokens`, and for its backward pass.

    Args:
        model: the architecture.
        engine: precision and recomputation.
        tokens: of the micro-batch.
        length: of a sequence.
        card: what it runs on.
        backward: False = the forward pass of a model that does not train, without the head (an online teacher).
    """
    in_fp8, slower = fp8_layers(model, engine), H200.memory_bandwidth / card.memory_bandwidth
    mixers = mixer_parameters(model)
    widths = {
        MAMBA: model.mamba_inner_size,
        MLP: model.intermediate_size,
        ATTENTION: model.num_attention_heads * model.head_dim,
    }
    core = TRAINING_OVER_FORWARD * 4 * widths[ATTENTION] * (length + 1) / 2 / ATTENTION_CORE
    layers = 0.0
    again = 0.0
    for layer, kind in enumerate(model.hybrid_layer_pattern):
        fp8 = layer in in_fp8
        between = slower * BETWEEN[fp8][kind] * widths[kind] / WIDTHS[kind] / TOKENS
        attention = core if kind == ATTENTION else 0.0
        one = 2 * TRAINING_OVER_FORWARD * mixers[kind] / PRODUCTS[fp8] + between + attention
        layers += one
        again += _recomputed(engine, kind) * (1 - BACKWARD_SHARE) * one
        if fp8 and engine.data_parallel is DataParallel.fsdp2:  # `between` has one of the copies
            uses = 1 + _recomputed(engine, kind)
            again += uses * QUANTISE_BYTES * mixers[kind] / (COPY_SHARE * card.memory_bandwidth) / tokens
    if not backward:
        return tokens * (1 - BACKWARD_SHARE) * layers
    head = 2 * TRAINING_OVER_FORWARD * model.vocab_size * model.hidden_size / PRODUCTS[False]
    return tokens * (layers + again + head + slower * HEAD_BETWEEN / TOKENS)


def _recomputed(engine: EngineConfig, kind: str) -> bool:
    if engine.kind is EngineKind.megatron:
        return engine.megatron.recompute is Recompute.full
    return kind in engine.activation_checkpointing.layer_kinds()


def _layout(engine: EngineConfig, world_size: int) -> Layout:
    megatron = engine.megatron if engine.kind is EngineKind.megatron else MegatronConfig()
    sizes = (megatron.tensor_parallel, megatron.pipeline_parallel, megatron.context_parallel)
    return Layout(*sizes, data_parallel_size(megatron, world_size))


def _divides_states(engine: EngineConfig) -> bool:
    if engine.kind is EngineKind.megatron:
        return engine.megatron.distributed_optimizer
    return engine.data_parallel is DataParallel.fsdp2


def _between_ranks(model: ModelConfig, engine: EngineConfig, layout: Layout, tokens: int) -> float:
    """Return bytes a rank exchanges within a micro-batch under tensor and context parallelism, none of them hidden.

    A layer gathers and scatters its tokens in both directions, sequence parallelism gathers its input once more for the
    weight's gradient, recomputation repeats the forward pair. Mamba-2 exchanges heads for positions around its scan.
    """
    layers = model.num_hidden_layers / layout.pipeline
    again = engine.kind is EngineKind.megatron and engine.megatron.recompute is Recompute.full
    times = 4 + engine.megatron.sequence_parallel + 2 * again
    share = (layout.tensor - 1) / layout.tensor
    gathered = (layers * times + 4) * share * tokens / layout.context * model.hidden_size * 2
    mamba = model.hybrid_layer_pattern.count(MAMBA) / layout.pipeline
    values = tokens / layout.context * (model.in_proj_size + model.mamba_inner_size) / layout.tensor
    swapped = mamba * (3 if again else 2) * 2 * values * (layout.context - 1) / layout.context
    return gathered + swapped


def _data_parallel_seconds(
    model: ModelConfig, engine: EngineConfig, layout: Layout, passed: float, card: Card
) -> float:
    """Return seconds a step for gradients and weights between data-parallel ranks that the passes do not hide.

    Args:
        model: sizes.
        engine: how weights and gradients are divided.
        layout: the ranks.
        passed: seconds of one micro-batch, behind whose backward pass gradients are reduced.
        card: whose links count.
    """
    sharing = layout.data * layout.context
    per_byte = (sharing - 1) / sharing / card.bus_bandwidth
    parameters = count_parameters(model) / (layout.tensor * layout.pipeline)
    if engine.kind is EngineKind.torch and engine.data_parallel is DataParallel.fsdp2:
        outer = embedding_parameters(model)  # in fp32, gathered before and reduced after everything else
        inner = parameters - outer
        return 8 * outer * per_byte + max(0.0, (2 + 2 + 4) * inner * per_byte - passed)
    if not _divides_states(engine):
        return max(0.0, 2 * 4 * parameters * per_byte - BACKWARD_SHARE * passed)
    gathered = 1 if engine.precision in FP8_PRECISIONS and engine.megatron.fp8_parameters else 2
    return gathered * parameters * per_byte + max(0.0, 4 * parameters * per_byte - BACKWARD_SHARE * passed)
