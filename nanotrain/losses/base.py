"""The contract between losses and engines: sums and counts; the engine divides, once."""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from nanotrain.model.batch import MicroBatch
from nanotrain.model.head import OutputHead


@dataclass
class LossOutput:
    """`loss_sum` [] is summed over the micro-batch, not averaged; metrics are (sum, count) pairs."""

    loss_sum: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class LossFn(Protocol):
    """A loss. Called inside the forward of the engine's root module, where the output matrix is whole."""

    def denominator(self, batch: MicroBatch) -> Tensor:
        """Return [] the number of tokens (pairs, completions) of `batch` that count."""
        ...

    def __call__(self, head: OutputHead, batch: MicroBatch) -> LossOutput:
        """Return the loss summed over what `denominator` counts."""
        ...
