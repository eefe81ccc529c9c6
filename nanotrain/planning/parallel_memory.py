"""Memory of one rank of a model spread by Megatron-Core, counted from the configuration.

Weights, gradients and optimizer states are exact up to Megatron's padding of its buffers. Activations are what the
backward passes of megatron-core 0.19's hybrid layers keep with Transformer Engine and mamba-ssm.
"""

import math
from dataclasses import dataclass

from nanotrain.config.engine import EngineConfig, Precision
from nanotrain.config.megatron import Recompute
from nanotrain.config.model import ATTENTION, MAMBA, MLP, ModelConfig
from nanotrain.config.training import TrainingConfig
from nanotrain.planning.layout import Layout, fp8_layers
from nanotrain.planning.parameters import FP32_TENSORS, mixer_shapes
from nanotrain.planning.pipeline_stages import padded_vocab_size, stage_layers
from nanotrain.planning.training_memory import LOGITS_PER_CHUNK


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one tensor-parallel rank of one pipeline stage; all data- and context-parallel ranks have the same."""

    layers: range
    num_parameters: int
    weights: int
    """In bf16, or fp32 where the precision is; FP8 layers hold two FP8 copies, one a direction of the product."""
    gradients: int
    """Megatron accumulates and reduces them in fp32."""
    optimizer_states: int
    """fp32 master weights (where weights are narrower) and both moments, this rank's part of them."""
    activations: int
    """Of all micro-batches that wait for their backward pass at the fullest moment."""
    workspace: int
    """Of the loss on the last stage, and of the layer that needs most while it is recomputed or differentiated."""

    @property
    def total(self) -> int:
        """All of it at once; the CUDA context, NCCL's buffers and fragmentation come on top."""
        return self.weights + self.gradients + self.optimizer_states + self.activations + self.workspace


def memory_per_stage(
    model: ModelConfig, training: TrainingConfig, engine: EngineConfig, layout: Layout
) -> list[RankMemory]:
    """Return the memory of a rank of each pipeline stage.

    Args:
        model: the architecture.
        training: micro-batch, sequence length and global batch.
        engine: precision (auto counts as bf16) and `engine.megatron`.
        layout: of `check_layout`.
    """
    return [
        _stage_memory(model, training, engine, layout, stage)
        for stage in range(len(stage_layers(model.num_hidden_layers, engine.megatron)))
    ]


def _stage_memory(
    model: ModelConfig, training: TrainingConfig, engine: EngineConfig, layout: Layout, stage: int
) -> RankMemory:
    layers = stage_layers(model.num_hidden_layers, engine.megatron)[stage]
    value = 4 if engine.precision is Precision.fp32 else 2
    narrow, narrow_fp8, wide = _parameters(model, engine, layers, layout.tensor)
    total = narrow + narrow_fp8 + wide
    masters = 0 if value == 4 else 4 * (narrow + narrow_fp8)
    states = masters + 8 * total
    if engine.megatron.distributed_optimizer:
        states = -(-states // (layout.data * layout.context))
    fp8_bytes = 2 if engine.megatron.fp8_parameters else 4  # in bf16 with two FP8 copies of the step, else those alone
    micro_batches = training.global_batch_size // (layout.data * training.micro_batch_size)
    kept, transient = _activation_bytes(model, engine, layers, layout.tensor)
    tokens = training.micro_batch_size * training.sequence_length // layout.context
    return RankMemory(
        layers=layers,
        num_parameters=total,
        weights=value * narrow + fp8_bytes * narrow_fp8 + 4 * wide,
        gradients=4 * total,
        optimizer_states=states,
        activations=round(kept * tokens) * min(layout.pipeline - stage, micro_batches),
        workspace=max(
            round(transient * tokens),
            _loss_bytes(model, tokens, value, layout.tensor) if layers.stop == model.num_hidden_layers else 0,
        ),
    )


def _parameters(model: ModelConfig, engine: EngineConfig, layers: range, tensor: int) -> tuple[int, int, int]:
    """Return a rank's values in the narrow dtype, in FP8 (matrices of FP8 layers), and always in fp32."""
    in_fp8 = fp8_layers(model, engine)
    narrow = narrow_fp8 = wide = 0
    for layer in layers:
        narrow += model.hidden_size
        for name, shape in mixer_shapes(model, model.hybrid_layer_pattern[layer]).items():
            size = math.prod(shape) // tensor
            if name in FP32_TENSORS:
                wide += size
            elif len(shape) == 2 and layer in in_fp8:
                narrow_fp8 += size
            else:
                narrow += size
    rows = padded_vocab_size(model.vocab_size, tensor) // tensor
    if layers.start == 0:
        narrow += rows * model.hidden_size
    if layers.stop == model.num_hidden_layers:
        narrow += rows * model.hidden_size + model.hidden_size
    return narrow, narrow_fp8, wide


def _loss_bytes(model: ModelConfig, tokens: int, value: int, tensor: int) -> int:
    """Gradients of this rank's rows of the head and of the hidden states, both made in the forward pass, and a chunk."""
    rows = padded_vocab_size(model.vocab_size, tensor) // tensor
    chunk = min(tokens * rows, LOGITS_PER_CHUNK) * value
    return rows * model.hidden_size * value + tokens * model.hidden_size * value + chunk


def _activation_bytes(model: ModelConfig, engine: EngineConfig, layers: range, tensor: int) -> tuple[float, float]:
    """Return bytes a token of a rank: kept by a stage, and made for a moment by the layer that makes most."""
    value = 4 if engine.precision is Precision.fp32 else 2
    between = tensor if engine.megatron.sequence_parallel else 1  # what splits the tokens between the layers
    residual = model.hidden_size * value / between
    in_fp8 = fp8_layers(model, engine)
    kept = residual if layers.start == 0 else 0.0
    if layers.stop == model.num_hidden_layers:  # the last norm's input, and its output gathered for the head
        kept += residual + model.hidden_size * value
    transient = 0.0
    for layer in layers:
        kind = model.hybrid_layer_pattern[layer]
        inner = _layer_bytes(model, kind, value, 1 if layer in in_fp8 else value, (between, tensor))
        widest = {MAMBA: model.in_proj_size, ATTENTION: model.hidden_size, MLP: model.intermediate_size}[kind]
        again = inner if engine.megatron.recompute is Recompute.full else 0.0
        kept += residual + (inner - again)
        backward = 2 * widest * value + (
            _scan_bytes(model, value, engine.megatron.context_parallel) if kind == MAMBA else 0
        )
        transient = max(transient, backward / tensor + again)
    return kept, transient


def _scan_bytes(model: ModelConfig, value: int, context: int) -> float:
    """Return bytes a token that Mamba-2's backward pass makes beside gradients: states of chunks in fp32, and theirs.

    Under context parallelism heads are exchanged for positions, and the gradient of the projection exists once more.
    """
    states = 2 * 4 * model.mamba_inner_size * model.ssm_state_size / model.chunk_size
    return states + (model.in_proj_size * value if context > 1 else 0)


def _layer_bytes(model: ModelConfig, kind: str, value: int, operand: int, split: tuple[int, int]) -> float:
    """Return bytes a token of a rank that a layer keeps beside its input.

    Operands of the products (the normed input, and what the last projection takes) may be narrower than other values.
    Selective recomputation makes attention again, whose flash kernel keeps next to nothing of its own.

    Args:
        model: sizes of the whole layer.
        kind: of the layer.
        value: bytes.
        operand: bytes.
        split: ranks that share the tokens between the layers, and the heads and rows within them.
    """
    between, tensor = split
    query = model.num_attention_heads * model.head_dim
    key_value = 2 * model.num_key_value_heads * model.head_dim
    if kind == MLP:
        inside = (operand + value) * model.intermediate_size
    elif kind == ATTENTION:
        output = value * query + (operand * query if operand < value else 0)
        inside = value * (query + key_value) + output + 4 * model.num_attention_heads
    else:  # the fused scan keeps its input, its output and the norms
        scan = value * (model.in_proj_size + model.mamba_inner_size) + 4 * model.n_groups
        inside = scan + operand * model.mamba_inner_size
    return operand * model.hidden_size / between + inside / tensor
