"""The contract between losses and engines: sums and counts; the engine divides, once."""

from typing import NamedTuple, Protocol

from torch import Tensor

from nanotrain.model.batch import MicroBatch
from nanotrain.model.head import OutputHead


class LossOutput(NamedTuple):
    """`loss_sum` [] is summed over the micro-batch, not averaged; metrics are (sum, count) pairs.

    A NamedTuple because the output hooks of FSDP2 and ZeRO-3 see inside tuples but not inside dataclasses.
    """

    loss_sum: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]]


class LossFn(Protocol):
    """A loss. Called inside the forward of the engine's root module, where the output matrix is whole."""

    def denominator(self, batch: MicroBatch) -> Tensor:
        """Return [] int64, the number of tokens (pairs, completions) of `batch` that count."""
        ...

    def __call__(self, head: OutputHead, batch: MicroBatch) -> LossOutput:
        """Return the loss summed over what `denominator` counts."""
        ...
