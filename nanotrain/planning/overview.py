"""What a training entry comes to before it runs, in words: tokens, parameters, operations, layout, memory of each rank."""

from nanotrain.config.engine import EngineConfig, EngineKind
from nanotrain.config.model import ModelConfig
from nanotrain.config.parallel import DataParallel
from nanotrain.config.training import TrainingConfig
from nanotrain.planning.flops import training_flops_per_token
from nanotrain.planning.fsdp2_memory import fsdp2_memory
from nanotrain.planning.layout import check_layout
from nanotrain.planning.parallel_memory import RankMemory, memory_per_stage
from nanotrain.planning.parameters import count_parameters
from nanotrain.planning.step_time import H100, H200, step_time
from nanotrain.planning.training_memory import training_memory

_GIB = 2**30
_TIMED_PARAMETERS = 1_000_000_000
"""Smaller models wait for kernel launches, which the estimate of a step's time leaves out."""
_COLUMNS = ("stage", "layers", "parameters", "weights", "gradients", "optimizer", "activations", "workspace", "total")


def overview(
    model: ModelConfig, training: TrainingConfig, engine: EngineConfig, world_size: int, training_path: str
) -> list[str]:
    """Return lines of text.

    Args:
        model: the architecture.
        training: the budget.
        engine: its kind decides how ranks share the work.
        world_size: ranks.
        training_path: key of `training`, for messages.

    Raises:
        UserError: the ranks cannot share the model or the batch like this.
    """
    tokens = training.steps * training.tokens_per_step
    operations = training_flops_per_token(model, training.sequence_length)
    lines = [
        f"model    {count_parameters(model):,} parameters, {model.num_hidden_layers} layers",
        f"steps    {training.steps:,} x {training.global_batch_size} sequences x {training.sequence_length:,}"
        f" = {tokens:.4g} tokens, {training.tokens_per_step:,} a step",
        f"compute  {operations:.4g} FLOPs a token, {operations * training.tokens_per_step:.4g} a step,"
        f" {operations * tokens:.4g} in all (forward x 3, nothing recomputed)",
    ]
    if engine.kind is not EngineKind.megatron:
        lines += _time(model, training, engine, world_size)
        if engine.data_parallel is DataParallel.fsdp2 and world_size > 1:
            divided = fsdp2_memory(model, training, engine, world_size)
            return [*lines, f"memory   {divided.peak / _GIB:.1f} GiB on each of {world_size} GPUs (FSDP2)"]
        memory = training_memory(model, training, engine)
        return [*lines, f"memory   {memory.peak / _GIB:.1f} GiB on one GPU that holds the whole model"]
    layout = check_layout(model, training, engine, world_size, training_path=training_path)
    micro_batches = training.global_batch_size // (layout.data * training.micro_batch_size)
    lines.append(
        f"layout   {layout.world_size} ranks = tensor {layout.tensor} x pipeline {layout.pipeline} x context"
        f" {layout.context} x data {layout.data}; {micro_batches} micro-batches of {training.micro_batch_size} a step"
    )
    if layout.pipeline > 1:
        waiting = (layout.pipeline - 1) / (micro_batches + layout.pipeline - 1)
        lines.append(f"pipeline {waiting:.1%} of a step is waiting, were all stages equally long")
    lines += _time(model, training, engine, world_size)
    lines.append("memory   of a rank of each stage in GiB, without CUDA's context and NCCL's buffers:")
    return [*lines, *_table(memory_per_stage(model, training, engine, layout))]


def _time(model: ModelConfig, training: TrainingConfig, engine: EngineConfig, world_size: int) -> list[str]:
    """Return a line a card; none where the estimate would have nothing to stand on."""
    if count_parameters(model) < _TIMED_PARAMETERS:
        return []
    lines = []
    for card in (H100, H200):
        step = step_time(model, training, engine, world_size, card)
        if step is not None:
            lines.append(
                f"time     about {step.total:.3g} s a step on {world_size} {card.name}, communication {step.communication:.2g}"
                f" and update {step.update:.2g} of them: {training.tokens_per_step / step.total / world_size:,.0f} tokens/s a GPU"
            )
    return lines


def _table(stages: list[RankMemory]) -> list[str]:
    rows = [_COLUMNS]
    for number, stage in enumerate(stages):
        parts = (
            stage.weights,
            stage.gradients,
            stage.optimizer_states,
            stage.activations,
            stage.workspace,
            stage.total,
        )
        layers = f"{stage.layers.start}-{stage.layers.stop - 1}"
        rows.append((str(number), layers, f"{stage.num_parameters:,}", *(f"{part / _GIB:.2f}" for part in parts)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    return ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
