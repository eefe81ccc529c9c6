"""Initial values, as Megatron-LM draws them for the published 12B.

Every tensor has its own generator, keyed by (seed, name): a tensor's values depend neither on the other tensors nor
on the device, and a sharded or meta-built model can draw any of them alone.
"""

import hashlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from nanotrain.config.model import ModelConfig

_OUTPUT_SIDE = ("out_proj.weight", "o_proj.weight", "down_proj.weight")


def copy_into(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter that is whole on this rank."""
    parameter.copy_(value)


def init_weights(
    model: nn.Module,
    config: ModelConfig,
    seed: int,
    assign: Callable[[Tensor, Tensor], None] = copy_into,
) -> None:
    """Set every parameter in place.

    Linear weights and embeddings are normal with `initializer_range`; matrices that write to the residual stream are
    divided by sqrt(number of layers), one residual addition a layer. A is uniform in [1, 16], dt log-uniform in
    [dt_init_min, dt_init_max], the convolution uniform in +-1 / sqrt(kernel).

    Tensors are drawn on the CPU, as many at a time as torch has threads, and copied to where and what the model is:
    beside the model itself only those few exist in fp32.

    Args:
        model: a model whose parameters have storage (not meta).
        config: its architecture.
        seed: any integer.
        assign: (parameter, whole value) sets it; a divided parameter takes its rows.
    """

    def fill(named: tuple[str, nn.Parameter]) -> None:
        name, parameter = named
        with torch.no_grad():
            assign(parameter, initial_value(name, tuple(parameter.shape), config, seed))

    # One generator draws one number after the other, so a large model needs several of them at once.
    with ThreadPoolExecutor(min(torch.get_num_threads(), 16)) as pool:
        for _ in pool.map(fill, model.named_parameters()):
            pass


def initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """Return the initial value of one tensor, fp32 on the CPU."""
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
    if name.endswith(("norm.weight", "norm_f.weight", ".D")):
        return torch.ones(shape)
    if name.endswith(".A_log"):
        return torch.empty(shape).uniform_(1.0, 16.0, generator=generator).log()
    if name.endswith(".dt_bias"):
        low, high = math.log(config.dt_init_min), math.log(config.dt_init_max)
        dt = torch.empty(shape, dtype=torch.float64).uniform_(low, high, generator=generator).exp()
        dt = dt.clamp(min=config.dt_init_floor)
        return (dt + torch.log(-torch.expm1(-dt))).float()  # the inverse of softplus
    if ".conv1d." in name:
        bound = 1.0 / math.sqrt(config.conv_kernel)
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    std = config.initializer_range
    if name.endswith(_OUTPUT_SIDE):
        std /= math.sqrt(config.num_hidden_layers)
    return torch.empty(shape).normal_(0.0, std, generator=generator)
