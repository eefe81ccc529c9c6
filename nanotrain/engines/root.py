"""The module that engines wrap: the loss runs inside its forward (docs/decisions/0001).

Only there do FSDP2 and ZeRO-3 have the output matrix gathered and its gradient reduced.
"""

from collections.abc import Callable

from torch import Tensor, nn

from nanotrain.losses.base import LossFn, LossOutput
from nanotrain.model.batch import MicroBatch
from nanotrain.model.head import OutputHead
from nanotrain.model.hybrid import HybridModel


class TrainingRoot(nn.Module):
    """A model and the call of a loss on it."""

    def __init__(self, model: HybridModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: MicroBatch, loss_fn: LossFn | Callable[..., Tensor] | None = None) -> LossOutput | Tensor:
        """Return the loss of `batch`, or its last hidden states [B, S, D] when no loss is given.

        Whatever else needs the whole output matrix is called in the place of a loss.
        """
        hidden_states = self.model.hidden_states(batch.input_ids, batch.segment_ids)
        if loss_fn is None:
            return hidden_states
        return loss_fn(OutputHead(hidden_states, self.model.output_weight()), batch)
