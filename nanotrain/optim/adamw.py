"""AdamW with the published grouping of weight decay (Megatron-LM's default, which trained the models)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from nanotrain.config.training import OptimizerConfig, ParameterDtype, StateDtype
from nanotrain.optim.low_precision_adamw import LowPrecisionAdamW

STATE_DTYPES = {StateDtype.fp32: torch.float32, StateDtype.bf16: torch.bfloat16, StateDtype.int8: torch.uint8}


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies: not to 1-D parameters (norms, A_log, D, dt_bias), nor to biases."""
    return parameter.ndim > 1 and not name.endswith(".bias")


def decay_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return the groups of an optimizer: `params`, a list of (name, parameter), and `weight_decay`."""
    decayed, undecayed = [], []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            (decayed if is_decayed(name, parameter) else undecayed).append((name, parameter))
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_adamw(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, learning_rate: float
) -> torch.optim.AdamW | LowPrecisionAdamW:
    """Return AdamW over the parameters that require a gradient, in a decayed and an undecayed group.

    In single precision throughout that is torch's fused AdamW: one pass over memory on CPU and CUDA. Everything else,
    and updates in the backward pass, is `LowPrecisionAdamW`.

    Args:
        named_parameters: already in `config.parameter_dtype`.
        config: betas, dtypes.
        learning_rate: until a step states its own.
    """
    groups = decay_groups(named_parameters, config)
    betas = (config.beta1, config.beta2)
    single = config.state_dtype is StateDtype.fp32 and config.parameter_dtype is ParameterDtype.fp32
    if single and not config.in_backward:
        for group in groups:
            group["params"] = [parameter for _, parameter in group["params"]]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=config.epsilon, fused=True)
    return LowPrecisionAdamW(
        groups, lr=learning_rate, betas=betas, eps=config.epsilon, state_dtype=STATE_DTYPES[config.state_dtype]
    )
