"""Next-token cross-entropy."""

from torch import Tensor

from nanotrain.losses.base import LossOutput
from nanotrain.model.batch import IGNORE_INDEX, MicroBatch
from nanotrain.model.head import OutputHead
from nanotrain.ops.linear_cross_entropy import linear_cross_entropy


class CrossEntropy:
    """Sum over labelled tokens of -log p(label), in nats."""

    def denominator(self, batch: MicroBatch) -> Tensor:
        """Return [] int64, the number of labelled tokens."""
        return (batch.labels != IGNORE_INDEX).sum()

    def __call__(self, head: OutputHead, batch: MicroBatch) -> LossOutput:
        """Return the summed loss of `batch`; no metrics beyond it."""
        loss_sum = linear_cross_entropy(
            head.hidden_states,
            head.weight,
            batch.labels,
            vocab_shard=head.vocab_shard,
            ignore_index=IGNORE_INDEX,
            positions=batch.label_positions,
        )
        return LossOutput(loss_sum, {})
