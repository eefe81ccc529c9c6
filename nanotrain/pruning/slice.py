"""Apply a pruning plan to tensors. Pure: a state dict and a plan in, a smaller state dict out; meta tensors work too.

Every tensor of the parent is a grid whose axes are widths of the architecture (hidden channels, neurons, heads, ...).
`_axes` states for each tensor which widths its axes are; slicing then keeps the plan's indices on every axis.

RMSNorm weights are sliced, not rescaled, as in Minitron and NVIDIA's ModelOpt: the norm then averages over the kept
channels only, which leaves its output's scale as it was when dropped channels are about as large as kept ones. When
they were exactly zero, the outputs of the norm shrink by sqrt(kept / all), and only a rescale of its weight by the
inverse would be exact; the same holds for the gated norm of a Mamba-2 layer, whose groups lose whole heads.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nanotrain.config.errors import UserError
from nanotrain.config.model import ATTENTION, MAMBA, MLP, ModelConfig
from nanotrain.planning.parameters import tensor_shapes
from nanotrain.pruning.plan import PruningPlan

Kept = Sequence[int] | None
"""Indices kept along one axis; None = the whole axis."""


def slice_state_dict(
    state_dict: Mapping[str, Tensor], config: ModelConfig, plan: PruningPlan
) -> tuple[dict[str, Tensor], ModelConfig]:
    """Cut a model down to what `plan` keeps.

    Args:
        state_dict: all tensors of the parent, in NemotronH's names; dtypes and devices are kept.
        config: the parent's architecture.
        plan: what to keep.

    Returns:
        Fresh tensors under the names of the smaller model (layers renumbered from 0), and its architecture.

    Raises:
        UserError: the plan does not fit the architecture, or the tensors are not those of the architecture.
    """
    plan.validate(config)
    _check_tensors(state_dict, config)
    new_index = {layer: index for index, layer in enumerate(plan.layers)}
    result: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        parts = name.split(".")
        if parts[:2] == ["backbone", "layers"]:
            layer = int(parts[2])
            if layer not in new_index:
                continue
            axes = _layer_axes(".".join(parts[3:]), layer, config, plan)
            name = ".".join([*parts[:2], str(new_index[layer]), *parts[3:]])
        else:
            axes = (plan.hidden,) if tensor.dim() == 1 else (None, plan.hidden)
        result[name] = _keep(tensor, axes)
    return result, plan.pruned_config(config)


def _check_tensors(state_dict: Mapping[str, Tensor], config: ModelConfig) -> None:
    shapes = tensor_shapes(config)
    if config.tie_word_embeddings and "lm_head.weight" in state_dict:
        shapes["lm_head.weight"] = shapes["backbone.embeddings.weight"]
    missing = sorted(shapes.keys() - state_dict.keys())
    unknown = sorted(state_dict.keys() - shapes.keys())
    if missing or unknown:
        what = f"lacks {missing[0]!r}" if missing else f"has {unknown[0]!r}"
        raise UserError(
            f"The checkpoint {what}, which does not fit its config ({len(missing)} tensors missing, {len(unknown)}"
            " unknown); export it again from the run that made it."
        )
    for name, shape in shapes.items():
        if tuple(state_dict[name].shape) != shape:
            raise UserError(
                f"Tensor {name!r} has shape {tuple(state_dict[name].shape)} but the config asks for {shape};"
                " config.json and weights are not of one checkpoint."
            )


def _layer_axes(name: str, layer: int, config: ModelConfig, plan: PruningPlan) -> tuple[Kept, ...]:
    """Return the kept indices for each axis of a layer's tensor; `name` starts after the layer's number."""
    if name == "norm.weight":
        return (plan.hidden,)
    mixer = name.removeprefix("mixer.")
    kind = config.hybrid_layer_pattern[layer]
    if kind == MAMBA:
        return _mamba_axes(mixer, config, plan.mamba_heads[layer], plan.hidden)
    if kind == MLP:
        return {"up_proj.weight": (plan.ffn[layer], plan.hidden), "down_proj.weight": (plan.hidden, plan.ffn[layer])}[
            mixer
        ]
    assert kind == ATTENTION, kind
    return (plan.hidden, None) if mixer == "o_proj.weight" else (None, plan.hidden)


def _mamba_axes(mixer: str, config: ModelConfig, heads: Sequence[int], hidden: Sequence[int]) -> tuple[Kept, ...]:
    """Return the kept indices of a Mamba-2 tensor: in_proj's rows are z, x, B, C, dt; conv1d's channels x, B, C."""
    width = config.mamba_head_dim
    inner = [head * width + channel for head in heads for channel in range(width)]
    first_bc, end_bc = config.mamba_inner_size, config.conv_channels
    convolution = [*inner, *range(first_bc, end_bc)]
    first_dt = config.mamba_inner_size + config.conv_channels
    rows = [*inner, *(config.mamba_inner_size + channel for channel in convolution), *(first_dt + h for h in heads)]
    return {
        "in_proj.weight": (rows, hidden),
        "conv1d.weight": (convolution, None, None),
        "conv1d.bias": (convolution,),
        "A_log": (heads,),
        "D": (heads,),
        "dt_bias": (heads,),
        "norm.weight": (inner,),
        "out_proj.weight": (hidden, inner),
    }[mixer]


def _keep(tensor: Tensor, axes: Sequence[Kept]) -> Tensor:
    """Return a fresh tensor with the kept indices of every axis."""
    result = tensor
    for axis, kept in enumerate(axes):
        if kept is not None and len(kept) < tensor.shape[axis]:
            result = result.index_select(axis, torch.tensor(kept, dtype=torch.int64, device=tensor.device))
    return result.clone() if result is tensor else result
