"""What the Megatron engine refuses, one sentence each: nothing that is asked for is ignored."""

from dataclasses import replace
from importlib.util import find_spec

import torch

from nanotrain.config.engine import FP8_PRECISIONS, EngineConfig, Precision
from nanotrain.config.errors import UserError
from nanotrain.config.model import MAMBA, ModelConfig
from nanotrain.config.training import OptimizerConfig, ParameterDtype, StateDtype, TrainingConfig
from nanotrain.ops.backends import AUTO, MAMBA_INSTALL, TE_INSTALL
from nanotrain.planning.layout import data_parallel_size
from nanotrain.runtime.distributed import World
from nanotrain.runtime.logging import log_once

INSTALL = "pip install megatron-core==0.19.2"
OWN_KERNELS = ("cross_entropy", "kl_divergence", "gradient_scaling")
"""Ops of this package that run beside Megatron's layers."""


def require_megatron() -> None:
    """Raise UserError when megatron-core is not installed."""
    if find_spec("megatron") is None or find_spec("megatron.core") is None:
        raise UserError(f"`engine.kind` (megatron) needs megatron-core, which is not installed; run `{INSTALL}`.")


def require_device(device: torch.device, allowed: set[str]) -> None:
    """Raise UserError when the device, or a library for it, is missing."""
    if device.type not in allowed:
        raise UserError(
            f"`engine.kind` (megatron) needs a GPU and the engine runs on {device.type}; use engine=torch there."
        )
    if device.type != "cuda":
        return
    for module, name, install in (
        ("transformer_engine", "Transformer Engine", TE_INSTALL),
        ("mamba_ssm", "mamba-ssm", MAMBA_INSTALL),
        ("causal_conv1d", "causal-conv1d", MAMBA_INSTALL),
    ):
        if find_spec(module) is None:
            raise UserError(f"`engine.kind` (megatron) needs {name}, which is not installed; run `{install}`.")


def require_supported(engine: EngineConfig, model: ModelConfig, optimizer: OptimizerConfig | None) -> None:
    """Raise UserError for a setting that this engine has no counterpart of."""
    for op, kernel in ((op, kernel.value) for op, kernel in vars(engine.kernels).items()):
        if kernel != AUTO and op not in OWN_KERNELS:
            raise UserError(
                f"`engine.kernels.{op}` ({kernel}) would be ignored: with engine=megatron the layers of Megatron-Core bring"
                " their own kernels; remove it."
            )
    if engine.activation_checkpointing.layer_kinds():
        raise UserError(
            "`engine.activation_checkpointing` belongs to the torch engine and would be ignored; set"
            " `engine.megatron.recompute` to selective or full."
        )
    if engine.precision is Precision.fp8_current:
        raise UserError(
            "`engine.precision` (fp8_current) is not available with engine=megatron; use fp8_blockwise, as published."
        )
    megatron = engine.megatron
    if engine.precision in FP8_PRECISIONS and megatron.fp8_parameters and not megatron.distributed_optimizer:
        raise UserError(
            "`engine.megatron.fp8_parameters` (true) gathers weights for the distributed optimizer, which is switched off;"
            " set `engine.megatron.fp8_parameters` to false or `distributed_optimizer` to true."
        )
    if model.tie_word_embeddings:
        raise UserError(
            "`tie_word_embeddings` (true) is not available with engine=megatron, whose pipeline stages do not share one"
            " matrix here; train a tied model with engine=torch."
        )
    if optimizer is not None:
        _require_optimizer(optimizer)


def _require_optimizer(optimizer: OptimizerConfig) -> None:
    path = "stage.training.optimizer"
    for name, only in (("state_dtype", StateDtype.fp32), ("parameter_dtype", ParameterDtype.fp32)):
        value = getattr(optimizer, name)
        if value is not only:
            raise UserError(
                f"`{path}.{name}` ({value.value}) is not available with engine=megatron, which keeps fp32 states and fp32"
                f" master weights and spreads them over ranks; set it to {only.value}."
            )
    if optimizer.in_backward:
        raise UserError(
            f"`{path}.in_backward` (true) is not available with engine=megatron, which reduces gradients over ranks before"
            " it updates; set it to false."
        )


def require_addressable(
    engine: EngineConfig, model: ModelConfig, training: TrainingConfig, device: torch.device
) -> None:
    """Raise UserError where mamba-ssm's kernels would count past the largest 32-bit index (an illegal memory access)."""
    ranks = engine.megatron.tensor_parallel * engine.megatron.context_parallel
    tokens = training.micro_batch_size * training.sequence_length
    values = tokens * -(-model.in_proj_size // ranks)
    if device.type == "cuda" and MAMBA in model.hybrid_layer_pattern and values >= 2**31:
        raise UserError(
            f"`stage.training.micro_batch_size` ({training.micro_batch_size}) x `sequence_length`"
            f" ({training.sequence_length}) gives a rank {values:,} values of Mamba-2's projections, more than mamba-ssm"
            f" addresses ({2**31 - 1:,}); spread them over {-(-tokens * model.in_proj_size // 2**31)} or more ranks by"
            " `engine.megatron.tensor_parallel` x `context_parallel`, or shorten the sequences."
        )


def choose_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the dtype of parameters and activations; `auto` = bf16 on a GPU.

    Raises:
        UserError: fp32 on a GPU, or FP8 without one.
    """
    if device.type != "cuda":
        if precision in FP8_PRECISIONS:
            raise UserError(
                f"`engine.precision` ({precision.value}) needs a GPU with FP8 and the engine runs on {device.type}; use fp32."
            )
        return torch.bfloat16 if precision is Precision.bf16 else torch.float32
    if precision is Precision.fp32:
        raise UserError(
            "`engine.precision` (fp32) is not available with engine=megatron on a GPU, where its attention multiplies in"
            " bf16; use bf16 or fp8_blockwise."
        )
    return torch.bfloat16


def require_saveable(engine: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> None:
    """Raise UserError where megatron-core 0.19 would train but cannot write the state to resume from."""
    if engine.megatron.distributed_optimizer or dtype is torch.float32 or MAMBA not in model.hybrid_layer_pattern:
        return
    raise UserError(
        "`engine.megatron.distributed_optimizer` (false) cannot save a state in"
        f" {str(dtype).removeprefix('torch.')}: Mamba-2 layers keep some parameters in fp32, and Megatron-Core's undivided"
        " optimizer finds no state of those; set it to true."
    )


def own_stages(config: EngineConfig, model: ModelConfig, training: TrainingConfig | None) -> EngineConfig:
    """Split a teacher evenly where `pipeline_layers` is written for the other number of layers of its student."""
    megatron, num_layers = config.megatron, model.num_hidden_layers
    if training is not None or not megatron.pipeline_layers or sum(megatron.pipeline_layers) == num_layers:
        return config
    log_once(
        f"engine megatron: `pipeline_layers` ({megatron.pipeline_layers}) are the trained model's; the {num_layers} layers"
        " of the teacher are split evenly"
    )
    return replace(config, megatron=replace(megatron, pipeline_layers=[]))


def smallest_batch(config: EngineConfig, world: World) -> TrainingConfig:
    """Return a batch that every layout splits, for the check of a model that does not train."""
    megatron = config.megatron
    data = max(data_parallel_size(megatron, world.size), 1)
    length = 32 * megatron.context_parallel * megatron.tensor_parallel  # FP8 wants multiples of 16
    return TrainingConfig(
        steps=1, global_batch_size=data, micro_batch_size=1, sequence_length=length, learning_rate=1.0
    )
