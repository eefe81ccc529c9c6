"""What a stage may ask of an engine. The engine owns everything distributed and everything normalised."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nanotrain.checkpoint.hf_folder import iterate_tensors
from nanotrain.checkpoint.provenance import Provenance
from nanotrain.config.model import ModelConfig
from nanotrain.losses.base import LossFn
from nanotrain.model.batch import MicroBatch
from nanotrain.model.head import HeadWeight
from nanotrain.model.hybrid import HybridModel


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, over all micro-batches and ranks."""

    loss: float
    """Sum of losses over sum of denominators; not finite in a step skipped for it."""
    grad_norm: float
    """Global L2 norm before clipping."""
    num_tokens: int
    """Sum of the denominators: what counted in the loss."""
    skipped: bool
    """The loss or the gradient was not finite, or the loss above `max_loss`; weights and optimizer are as before the step. With the optimizer in the
    backward pass, a gradient may be found so after the layers above it were updated (engines/optimizer_in_backward.py)."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The loss's own metrics, each sum over count."""


StateWriter = Callable[[Path], None]
"""Writes a snapshot into an existing empty folder that all ranks see. Every rank calls its own with the same folder; it
may run in another thread while training goes on, and then uses no group that training uses."""


class Engine(ABC):
    """Runs one model. Ranks call the methods in the same order; what a method returns is the same on all of them."""

    dp_rank: int
    dp_size: int
    num_devices: int
    """All ranks, of every kind of parallelism."""
    communication_seconds: float | None = None
    """Of the last `train_step` on this rank, waiting for collectives and for slower ranks in them; what overlaps with
    computing does not count. None where that is not measured."""
    device: torch.device
    model_config: ModelConfig

    @abstractmethod
    def train_step(
        self,
        microbatches: Sequence[MicroBatch],
        loss_fn: LossFn,
        learning_rate: float,
        max_loss: float = math.inf,
    ) -> StepResult:
        """Do exactly one optimizer step on sum of losses / sum of denominators.

        Args:
            microbatches: this rank's, equally many on every rank.
            loss_fn: called inside the root module's forward.
            learning_rate: of this step.
            max_loss: a greater loss is treated like one that is not finite: the update is left out. Not with the
                optimizer in the backward pass (config/training.py refuses it).
        """

    @abstractmethod
    def evaluate(self, microbatches: Iterable[MicroBatch], loss_fn: LossFn) -> dict[str, float]:
        """Return `loss` (sum over denominator; 0 if nothing counts), `num_tokens`, and the loss's metrics; no gradient.

        Args:
            microbatches: this rank's, equally many on every rank.
            loss_fn: as in `train_step`.
        """

    @abstractmethod
    def hidden_states(self, microbatches: Sequence[MicroBatch]) -> list[Tensor | None]:
        """Return the last hidden states [B, S, D] of each micro-batch, without gradient: online teacher, reference.

        With pipeline stages only the last one has them, the others get None.
        """

    @abstractmethod
    def head(self) -> AbstractContextManager[HeadWeight | None]:
        """Yield the output matrix, without gradient; whole, or this rank's vocabulary shard, while open.

        With pipeline stages only the last one has it, the others get None.
        """

    @abstractmethod
    def logprobs(self, batch: MicroBatch) -> Tensor:
        """Return the log-probability of each label [B, S], 0 where labels are ignored, without gradient."""

    @abstractmethod
    def inference_model(self) -> AbstractContextManager[HybridModel]:
        """Yield the model in eval mode, for the sampler and for pruning's capture."""

    @abstractmethod
    def init_weights(self, seed: int) -> None:
        """Draw all weights (model/initialization.py); a model built on the meta device has none before."""

    @abstractmethod
    def load_hf(self, folder: Path) -> None:
        """Load the weights of a checkpoint folder of the same architecture."""

    @abstractmethod
    def save_hf(
        self,
        folder: Path,
        *,
        dtype: torch.dtype | None = None,
        tokenizer_from: Path | None = None,
        provenance: Provenance | None = None,
    ) -> None:
        """Write a checkpoint folder; arguments as in checkpoint.hf_folder.save_model."""

    def first_difference(self, folder: Path) -> str | None:
        """Return the name of a tensor of a checkpoint folder that is not this engine's, bit for bit; None = all are.

        All ranks read the folder, and get the same answer.
        """
        with self.inference_model() as model:
            trained = model.state_dict()
            for name, tensor in iterate_tensors(folder):
                if not trained[name].cpu().equal(tensor):
                    return name
        return None

    @abstractmethod
    def snapshot_state(self) -> StateWriter:
        """Copy weights, optimizer and random states to host memory and return what writes them; for resume only.

        One at a time: the writer is through before the next snapshot, which may use its memory again. On a GPU the copies
        may still be under way; the engine holds its next update until nothing is read from weights and states any more
        (checkpoint/host_snapshot.py).
        """

    def save_state(self, folder: Path) -> None:
        """Write weights, optimizer and random states into an existing empty folder and return when it is done."""
        self.snapshot_state()(folder)

    @abstractmethod
    def load_state(self, folder: Path) -> None:
        """Read what a `StateWriter` wrote; on another number of ranks too, where the engine says so."""
