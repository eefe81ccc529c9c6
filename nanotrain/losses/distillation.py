"""Distillation from a teacher's full distribution: forward KL on the logits, no cross-entropy (paper section 4.3)."""

from torch import Tensor

from nanotrain.losses.base import LossOutput
from nanotrain.model.batch import IGNORE_INDEX, MicroBatch
from nanotrain.model.head import HeadWeight, OutputHead
from nanotrain.ops.kl_divergence import linear_kl_divergence


class ForwardKL:
    """Sum over labelled tokens of KL(teacher || student), in nats.

    The teacher's hidden states come with the batch (training/teacher.py fills them in before the step), because a loss
    must not call another engine.

    Args:
        teacher_head: None on pipeline stages before the last, which never compute the loss.
        temperature: divides both sides' logits.
    """

    def __init__(self, teacher_head: HeadWeight | None, temperature: float = 1.0) -> None:
        self._teacher_head = teacher_head
        self._temperature = temperature

    def denominator(self, batch: MicroBatch) -> Tensor:
        """Return [] int64, the number of labelled tokens."""
        return (batch.labels != IGNORE_INDEX).sum()

    def __call__(self, head: OutputHead, batch: MicroBatch) -> LossOutput:
        """Return the summed divergence of `batch`; no metrics beyond it."""
        assert batch.teacher_hidden_states is not None, "wrap the loader in TeacherLoader"
        assert self._teacher_head is not None, "only the last pipeline stage computes the loss"
        loss_sum = linear_kl_divergence(
            head.hidden_states,
            head.weight,
            batch.teacher_hidden_states,
            self._teacher_head.weight,
            batch.labels != IGNORE_INDEX,
            temperature=self._temperature,
            vocab_shard=head.vocab_shard,
        )
        return LossOutput(loss_sum, {})
