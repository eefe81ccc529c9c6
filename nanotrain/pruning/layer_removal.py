"""Depth pruning by logit error: remove, one after the other, the layer whose absence changes the logits least.

Two ideas make the exact criterion cheap:

- One sweep over a micro-batch scores every candidate. While the residual stream walks up the layers, each candidate's
  suffix is run from where its own input would have been; nothing but the current prefix is stored.
- Logits are never formed. Both models share the output matrix W, so that the squared error of a token's logits is
  d G d^T with d the difference of the final hidden states and G = W^T W, a [D, D] matrix.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nanotrain.config.errors import UserError
from nanotrain.config.model import ATTENTION
from nanotrain.model.batch import MicroBatch
from nanotrain.model.hybrid import HybridModel
from nanotrain.planning.patterns import count_layers
from nanotrain.pruning.forward import embed, final_norm, run_layers
from nanotrain.runtime.progress import Progress

logger = logging.getLogger("nanotrain")

ROWS_PER_CHUNK = 8192
"""Rows of the output matrix, or tokens, that are widened to fp64 at a time."""


@dataclass(frozen=True)
class LayerRemoval:
    """One removed layer."""

    layer: int
    """Index in the parent."""
    kind: str
    """Its letter."""
    mse: float | None
    """Mean squared error of the logits once it and all earlier ones are gone; None when chosen at random."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class DepthTargets:
    """How many layers go, and how many of them have to be attention.

    Depths are nested: the model with fewer layers lacks all layers that the deeper one lacks. So the attention layers
    that are too many go before the first (largest) depth is reached.
    """

    num_layers: int
    """Of the parent."""
    depths: tuple[int, ...]
    """Wanted numbers of layers, largest first."""
    surplus_attention: int | None
    """Attention layers to remove in all; None = as many as the importance says."""

    @property
    def num_removals(self) -> int:
        return self.num_layers - self.depths[-1]

    @classmethod
    def from_search(
        cls, pattern: str, depths: Sequence[int], num_attention_layers: int, path: str = "stage.search"
    ) -> "DepthTargets":
        """Check the wanted depths against the parent's layers.

        Args:
            pattern: the parent's layers.
            depths: wanted numbers of layers; empty = the parent's.
            num_attention_layers: attention layers that stay; -1 = any number.
            path: key path for messages.

        Raises:
            UserError: a depth or the number of attention layers cannot be reached.
        """
        wanted = tuple(sorted(set(depths), reverse=True)) or (len(pattern),)
        if wanted[0] > len(pattern) or wanted[-1] < 1:
            raise UserError(
                f"`{path}.num_layers` ({list(depths)}) must lie between 1 and the parent's {len(pattern)} layers."
            )
        if num_attention_layers < 0:
            return cls(len(pattern), wanted, None)
        present = count_layers(pattern).attention
        surplus = present - num_attention_layers
        if surplus < 0:
            raise UserError(
                f"`{path}.num_attention_layers` ({num_attention_layers}) exceeds the {present} attention layers of the"
                " parent; pruning cannot add layers."
            )
        if surplus > len(pattern) - wanted[0]:
            raise UserError(
                f"`{path}.num_attention_layers` ({num_attention_layers}) asks to remove {surplus} attention layers but"
                f" `{path}.num_layers` ({wanted[0]}) removes only {len(pattern) - wanted[0]} of {len(pattern)} layers;"
                f" lower num_layers to at most {len(pattern) - surplus}."
            )
        if wanted[-1] < num_attention_layers:
            raise UserError(
                f"`{path}.num_layers` ({wanted[-1]}) is below `{path}.num_attention_layers` ({num_attention_layers});"
                " raise the one or lower the other."
            )
        return cls(len(pattern), wanted, surplus)

    def removable(self, pattern: str, removed: Sequence[int]) -> list[int]:
        """Return the parent's layers that may be removed next, after `removed`."""
        remaining = [layer for layer in range(len(pattern)) if layer not in removed]
        if self.surplus_attention is None:
            return remaining
        surplus = self.surplus_attention - sum(pattern[layer] == ATTENTION for layer in removed)
        slots = self.num_layers - self.depths[0] - len(removed)
        attention = [layer for layer in remaining if pattern[layer] == ATTENTION]
        others = [layer for layer in remaining if pattern[layer] != ATTENTION]
        if surplus == 0:
            return others
        return attention if surplus == slots else attention + others

    def kept_layers(self, removed: Sequence[int]) -> dict[int, tuple[int, ...]]:
        """Return depth -> kept layers, given all removed layers in their order."""
        assert len(removed) == self.num_removals
        result = {}
        for depth in self.depths:
            gone = set(removed[: self.num_layers - depth])
            result[depth] = tuple(layer for layer in range(self.num_layers) if layer not in gone)
        return result


def remove_layers(
    model: HybridModel, batches: Sequence[MicroBatch], targets: DepthTargets, progress: Progress
) -> list[LayerRemoval]:
    """Choose the layers to remove, in order: smallest mean squared error of the logits first, rescored every time.

    Args:
        model: the parent.
        batches: calibration data; every position counts, labels are not used.
        progress: each scored micro-batch is recorded, so that a restart repeats at most one.

    Returns:
        One entry a removed layer, in the order of removal.
    """
    pattern = model.config.hybrid_layer_pattern
    removals: list[LayerRemoval] = []
    if not targets.num_removals:
        return removals
    gram = output_gram(model.output_weight())
    num_logits = sum(batch.input_ids.numel() for batch in batches) * model.config.vocab_size
    bar = tqdm(total=targets.num_removals * len(batches), desc="layer removal", unit="batch", dynamic_ncols=True)
    for step in range(targets.num_removals):
        removed = [removal.layer for removal in removals]
        candidates = sorted(targets.removable(pattern, removed))
        totals = dict.fromkeys(candidates, 0.0)
        for number, batch in enumerate(batches):
            key = f"layers/{step}/{number}"
            if key not in progress:
                errors = squared_logit_errors(model, batch, removed, candidates, gram)
                progress.record(key, {str(layer): error for layer, error in errors.items()})
            for layer in candidates:
                totals[layer] += progress[key][str(layer)]
            bar.update()
        best = min(candidates, key=lambda layer: (totals[layer], layer))
        removals.append(LayerRemoval(best, pattern[best], totals[best] / num_logits))
        logger.info("removed layer %d (%s), logit mse %.4g", best, pattern[best], removals[-1].mse)
    bar.close()
    return removals


def output_gram(weight: Tensor) -> Tensor:
    """Return W^T W in fp64, [D, D], for an output matrix W [V, D]."""
    gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    for rows in weight.detach().split(ROWS_PER_CHUNK):
        wide = rows.double()
        gram += wide.T @ wide
    return gram


@torch.no_grad()
def squared_logit_errors(
    model: HybridModel, batch: MicroBatch, removed: Sequence[int], candidates: Sequence[int], gram: Tensor
) -> dict[int, float]:
    """Return, for each candidate layer, the summed squared error of the logits when it is gone too.

    Args:
        model: the original model; the error is against all of its layers.
        removed: layers that are gone already.
        candidates: layers to score, none of them in `removed`.
        gram: `output_gram` of the model's output matrix.
    """
    batch = batch.to(gram.device)
    remaining = [layer for layer in range(model.config.num_hidden_layers) if layer not in removed]
    hidden = embed(model, batch)
    original = final_norm(model, run_layers(model, hidden, range(model.config.num_hidden_layers), batch))
    errors: dict[int, float] = {}
    for position, layer in enumerate(remaining):
        if layer in candidates:
            without = final_norm(model, run_layers(model, hidden, remaining[position + 1 :], batch))
            errors[layer] = _squared_error(without, original, gram)
        if len(errors) == len(candidates):
            break
        hidden = run_layers(model, hidden, [layer], batch)
    return errors


def _squared_error(hidden: Tensor, original: Tensor, gram: Tensor) -> float:
    total = 0.0
    for one, other in zip(
        hidden.flatten(0, 1).split(ROWS_PER_CHUNK), original.flatten(0, 1).split(ROWS_PER_CHUNK), strict=True
    ):
        difference = one.double() - other.double()
        total += ((difference @ gram) * difference).sum().item()
    return max(total, 0.0)
