"""The one form in which tokens reach a model or a loss."""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class MicroBatch:
    """Tokens of one forward pass on one rank; shapes [B, S].

    Labels are already shifted: `labels[b, t]` is the token that should follow `input_ids[b, t]`, or IGNORE_INDEX.
    `segment_ids` do not decrease along S; where they change a new document begins, and attention, convolution and
    SSM state start afresh. None means one document per row.
    """

    input_ids: Tensor
    labels: Tensor
    segment_ids: Tensor | None = None
    teacher_hidden_states: Tensor | None = None
    """[B, S, D of the teacher], computed before the step when a loss has a teacher."""

    label_positions: Tensor | None = None
    """[T] int64, where in the flattened labels one counts; `to` fills it in before the labels leave the CPU."""

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the batch on `device`.

        The positions of its labels are counted first where that waits for no device, so that a loss need not.
        """

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        positions = self.label_positions
        if positions is None and self.labels.device.type == "cpu" and device.type != "cpu":
            positions = (self.labels != IGNORE_INDEX).flatten().nonzero()[:, 0]
        return MicroBatch(
            self.input_ids.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            move(self.segment_ids),
            move(self.teacher_hidden_states),
            move(positions),
        )
