"""AdamW with the published grouping of weight decay (Megatron-LM's default, which trained the models)."""

from collections.abc import Iterable

import torch
from torch import nn

from nanotrain.config.training import OptimizerConfig


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies: not to 1-D parameters (norms, A_log, D, dt_bias), nor to biases."""
    return parameter.ndim > 1 and not name.endswith(".bias")


def build_adamw(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, learning_rate: float
) -> torch.optim.AdamW:
    """Return AdamW over the parameters that require a gradient, in a decayed and an undecayed group.

    States have the dtype of their parameter (fp32). The fused kernel is used on CPU and CUDA: one pass over memory.
    """
    decayed, undecayed = [], []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            (decayed if is_decayed(name, parameter) else undecayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )
