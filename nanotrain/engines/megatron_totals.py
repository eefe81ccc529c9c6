"""Losses, metrics and counts of a step, summed over the ranks that share it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nanotrain.losses.base import LossOutput


@dataclass(frozen=True)
class Ranks:
    """The groups over which sums go.

    Attributes:
        sharing: ranks of one stage that have other micro-batches or positions.
        stages: pipeline stages of one such rank.
        last_stage: global rank of the last of them, the only one that computes losses.
    """

    sharing: dist.ProcessGroup
    stages: dist.ProcessGroup
    last_stage: int


class Totals:
    """Sums over all micro-batches and ranks: [count, loss, (sum, count) of each metric]."""

    def __init__(self, values: list[float], names: list[str]) -> None:
        self.num_tokens = int(values[0])
        self.loss = values[1] / max(self.num_tokens, 1)
        pairs = zip(values[2::2], values[3::2], strict=True)
        self.metrics = {name: total / count for name, (total, count) in zip(names, pairs, strict=True) if count}


def reduce_totals(outputs: Sequence[LossOutput | Tensor], count: int, device: torch.device, ranks: Ranks) -> Totals:
    """Sum losses, metrics and counts over data- and context-parallel ranks; the same on every stage."""
    sums = [torch.zeros((), dtype=torch.float64, device=device)]
    names: list[str] = []
    for output in outputs:
        assert isinstance(output, LossOutput)
        if not names:
            names = list(output.metrics)
            sums += [torch.zeros_like(sums[0]) for _ in range(2 * len(names))]
        values = [output.loss_sum, *(value for name in names for value in output.metrics[name])]
        sums = [total + value for total, value in zip(sums, values, strict=True)]
    counted = torch.tensor(count, dtype=torch.float64, device=device)
    vector = torch.stack([counted, *sums])
    dist.all_reduce(vector, group=ranks.sharing)
    if ranks.stages.size() > 1:
        box = [names]
        dist.broadcast_object_list(box, src=ranks.last_stage, group=ranks.stages)
        names = box[0]
        vector = vector if dist.get_rank() == ranks.last_stage else vector.new_empty(2 + 2 * len(names))
        dist.broadcast(vector, src=ranks.last_stage, group=ranks.stages)
    return Totals(vector.tolist(), names)


def detached(output: LossOutput | Tensor) -> LossOutput | Tensor:
    """Return what a micro-batch came to, without its graph."""
    if isinstance(output, LossOutput):
        metrics = {name: (total.detach(), count.detach()) for name, (total, count) in output.metrics.items()}
        return LossOutput(output.loss_sum.detach(), metrics)
    return output.detach()
