"""What a loss sees of a model: the last hidden states and the output matrix, never the logits."""

from dataclasses import dataclass

from torch import Tensor

from nanotrain.ops.vocab_shard import VocabShard


@dataclass(frozen=True)
class HeadWeight:
    """An engine's output matrix while its `head()` is open: [V, D], or this rank's rows of it."""

    weight: Tensor
    vocab_shard: VocabShard | None = None


@dataclass(frozen=True)
class OutputHead:
    """Hidden states after the final norm and the output matrix.

    Attributes:
        hidden_states: [B, S, D].
        weight: [V, D], or this rank's rows of it when `vocab_shard` is given.
        vocab_shard: where the rows lie; None = all of them.
    """

    hidden_states: Tensor
    weight: Tensor
    vocab_shard: VocabShard | None = None
