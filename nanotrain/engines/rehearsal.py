"""Compiles the kernels of a step before its first one: a layer of each kind is walked through without running any kernel.

Left to the first step, kernels would be compiled one after the other as they are met; here all cores compile at once.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from nanotrain.losses.base import LossFn
from nanotrain.model.batch import MicroBatch
from nanotrain.model.head import OutputHead
from nanotrain.model.hybrid import HybridModel
from nanotrain.model.linear import Linear
from nanotrain.ops.backends import compiling_only, kernel_for
from nanotrain.optim.low_precision_adamw import LowPrecisionAdamW


def rehearse(
    model: HybridModel,
    batch: MicroBatch,
    loss_fn: LossFn,
    optimizer: torch.optim.Optimizer,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Compile what a step on batches like `batch` runs; no parameter, gradient or state changes.

    Args:
        model: on a GPU; without one there is nothing to compile.
        batch: on the model's device.
        loss_fn: the step's.
        optimizer: over the model's parameters.
        autocast: of the step.
    """
    if batch.input_ids.device.type != "cuda":
        return
    with compiling_only():
        with autocast():
            x = model.backbone.embeddings(batch.input_ids)
            seen: set[tuple[object, ...]] = set()
            for kind, block in zip(model.config.hybrid_layer_pattern, model.backbone.layers, strict=True):
                copies = [m.weight_copy for m in block.modules() if isinstance(m, Linear)]
                form = (kind, *(None if copy is None else type(copy.products) for copy in copies))
                if form not in seen:
                    seen.add(form)
                    x = block(x, batch.segment_ids)
            head = OutputHead(model.backbone.norm_f(x), model.output_weight())
            total = loss_fn(head, batch).loss_sum
        # No `backward`: it would call the hooks of an optimizer in the backward pass.
        torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        if isinstance(optimizer, LowPrecisionAdamW):
            allowed = torch.ones((), dtype=torch.bool, device=batch.input_ids.device)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if kernel_for("adamw", parameter) is not None:
                        optimizer.update(parameter, torch.empty_like(parameter), allowed)
                        optimizer.update(parameter, torch.empty_like(parameter))
