"""Memory that one GPU needs to train: counted from the configuration, checked against measured peaks.

What is counted per token is what the backward pass of nanotrain/model keeps with the GPU kernels of nanotrain/ops; without
them (plain torch for scan, norms and attention) more is kept.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from nanotrain.config.engine import FP8_PRECISIONS, ActivationCheckpointingConfig, EngineConfig, Precision
from nanotrain.config.model import ATTENTION, MAMBA, MLP, ModelConfig
from nanotrain.config.training import OptimizerConfig, ParameterDtype, StateDtype, TrainingConfig
from nanotrain.planning.parameters import count_parameters, mixer_shapes

STATE_BYTES = {StateDtype.fp32: 8.0, StateDtype.bf16: 4.0, StateDtype.int8: 2.0 + 8.0 / 256}
"""Both moments of a parameter; int8 has a scale of four bytes for 256 values."""
LOGITS_PER_CHUNK = 13 * 2**25


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes."""

    weights: int
    weight_copies: int
    """Of the matrices of the layers in bf16 or FP8 (by rows and by columns), kept over a step."""
    optimizer_states: int
    gradients: int
    """Of all weights; of the largest one when the optimizer runs in the backward pass."""
    activations: int
    """Kept between forward and backward of one micro-batch."""
    workspace: int
    """Of the loss, and of the backward pass of the layer that needs most."""
    accumulates: bool
    """Whether the gradients of one micro-batch are still there while the next one runs."""

    @property
    def peak(self) -> int:
        """The most that exists at a time: within a micro-batch activations go while gradients come."""
        lasting = self.weights + self.weight_copies + self.optimizer_states
        passing = self.activations + self.workspace
        return lasting + (passing + self.gradients if self.accumulates else max(passing, self.gradients))


def training_memory(model: ModelConfig, training: TrainingConfig, engine: EngineConfig) -> TrainingMemory:
    """Estimate the bytes of one optimizer step on one GPU.

    Args:
        model: sizes.
        training: micro-batch, sequence length, optimizer.
        engine: precision (auto counts as bf16) and activation checkpointing.
    """
    optimizer = training.optimizer
    tokens = training.micro_batch_size * training.sequence_length
    weight_bytes = 2 if optimizer.parameter_dtype is ParameterDtype.bf16 else 4
    parameters = count_parameters(model)
    head = model.vocab_size * model.hidden_size
    largest = max(head, *(max(_matrices(model, kind), default=0) for kind in model.hybrid_layer_pattern))
    kept, transient = _activation_bytes(model, engine, weight_bytes)
    narrow_head = 0 if engine.precision is Precision.fp32 or weight_bytes == 2 else 2 * head
    logits = min(tokens * model.vocab_size, LOGITS_PER_CHUNK) * (4 if engine.precision is Precision.fp32 else 2)
    return TrainingMemory(
        weights=parameters * weight_bytes,
        weight_copies=_copy_bytes(model, engine, weight_bytes),
        optimizer_states=int(parameters * STATE_BYTES[optimizer.state_dtype]),
        gradients=(largest if optimizer.in_backward else parameters) * weight_bytes,
        activations=tokens * kept,
        accumulates=training.global_batch_size > training.micro_batch_size,
        workspace=max(head * weight_bytes + narrow_head + logits, head * weight_bytes + tokens * transient),
    )


def _matrices(model: ModelConfig, kind: str) -> list[int]:
    """Return the sizes of a layer's matrices."""
    return [math.prod(shape) for shape in mixer_shapes(model, kind).values() if len(shape) == 2]


def _layers_in_fp8(model: ModelConfig, engine: EngineConfig) -> range:
    if engine.precision not in FP8_PRECISIONS:
        return range(0)
    return range(engine.fp8_bf16_first_layers, model.num_hidden_layers - engine.fp8_bf16_last_layers)


def _copy_bytes(model: ModelConfig, engine: EngineConfig, weight_bytes: int) -> int:
    """bf16 copies of fp32 weights, and two FP8 copies (one a direction of the product) of the layers in FP8."""
    if engine.precision is Precision.fp32:
        return 0
    in_fp8 = _layers_in_fp8(model, engine)
    copied = 0
    for layer, kind in enumerate(model.hybrid_layer_pattern):
        if layer in in_fp8 or weight_bytes == 4:
            copied += 2 * sum(_matrices(model, kind))
    return copied


def _activation_bytes(model: ModelConfig, engine: EngineConfig, weight_bytes: int) -> tuple[int, int]:
    """Return bytes a token: kept over all layers, and made for a moment by the layer that makes most."""
    in_fp8, checkpointed = _layers_in_fp8(model, engine), engine.activation_checkpointing.layer_kinds()
    residual = model.hidden_size * weight_bytes  # the residual stream has the embedding's dtype
    value = 4 if engine.precision is Precision.fp32 else 2
    kept, transient = 2 * residual, 0
    for layer, kind in enumerate(model.hybrid_layer_pattern):
        inner = _layer_bytes(model, kind, value, 1 if layer in in_fp8 else value)
        kept += residual if kind in checkpointed else residual + inner
        widest = {MAMBA: model.in_proj_size, ATTENTION: model.hidden_size, MLP: model.intermediate_size}[kind]
        transient = max(transient, 2 * widest * value + (inner if kind in checkpointed else 0))
    return kept, transient


def _layer_bytes(model: ModelConfig, kind: str, value: int, operand: int) -> int:
    """Return bytes a token that a layer keeps beside its input; operands of the products may be narrower than values."""
    hidden, inner = model.hidden_size, model.mamba_inner_size
    query = model.num_attention_heads * model.head_dim
    key_value = 2 * model.num_key_value_heads * model.head_dim
    if kind == MLP:
        return operand * (hidden + model.intermediate_size) + value * model.intermediate_size
    if kind == ATTENTION:  # in FP8 the output is kept twice
        operands = operand * (hidden + query) if operand < value else value * hidden
        return operands + value * (2 * query + key_value) + 4 * model.num_attention_heads
    states = inner * model.ssm_state_size / model.chunk_size  # one a chunk
    scan = value * (model.conv_channels + inner + states) + 16 * model.mamba_num_heads
    return round(operand * (hidden + inner) + value * model.in_proj_size + scan)


def smaller_configurations(
    training: TrainingConfig, engine: EngineConfig
) -> Iterator[tuple[str, TrainingConfig, EngineConfig]]:
    """Yield (overrides, training, engine) that need less memory, what changes least first, each on top of the last."""
    changes: list[str] = []
    if training.micro_batch_size > 1 and not training.optimizer.in_backward:
        changes.append("stage.training.micro_batch_size=1")
        training = replace(training, micro_batch_size=1)
        yield " ".join(changes), training, engine
    everything = ActivationCheckpointingConfig(mamba=True, mlp=True, attention=True)
    if engine.activation_checkpointing != everything:
        changes.append("engine.activation_checkpointing={mamba:true,mlp:true,attention:true}")
        engine = replace(engine, activation_checkpointing=everything)
        yield " ".join(changes), training, engine
    key = "stage.training.optimizer"
    steps: list[tuple[str, dict[str, object]]] = [
        (f"{key}.state_dtype=int8", {"state_dtype": StateDtype.int8}),
        (f"{key}.parameter_dtype=bf16", {"parameter_dtype": ParameterDtype.bf16}),
        (f"{key}.in_backward=true {key}.gradient_clip=0", {"in_backward": True, "gradient_clip": 0.0}),
    ]
    for override, values in steps:
        optimizer: OptimizerConfig = replace(training.optimizer, **values)
        if optimizer == training.optimizer or (engine.precision is Precision.fp32 and "parameter_dtype" in values):
            continue
        if optimizer.in_backward and training.global_batch_size > training.micro_batch_size:
            continue  # it cannot accumulate
        changes.append(override)
        training = replace(training, optimizer=optimizer)
        yield " ".join(changes), training, engine
