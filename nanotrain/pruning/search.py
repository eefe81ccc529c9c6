"""Candidate architectures: a grid, cut by budgets, ranked by size, the best of the largest chosen by held-out loss."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanotrain.config.errors import UserError
from nanotrain.config.model import MAMBA, MLP, ModelConfig
from nanotrain.config.stage import PruneSearchConfig
from nanotrain.planning.memory import inference_memory_bytes
from nanotrain.planning.parameters import count_parameters

_WIDTHS = {"hidden_size": None, "intermediate_size": MLP, "mamba_num_heads": MAMBA}
"""Width axis of the grid -> the kind of layer that it is about; None = all."""


@dataclass(frozen=True)
class Candidate:
    """One architecture of the grid and what it costs."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    mamba_num_heads: int
    parameters: int
    memory_bytes: int
    """Weights, KV cache and Mamba states at the search's context length, batch 1, bf16."""
    fits: bool
    """Within all budgets."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Scored:
    """A candidate and its held-out loss without training."""

    candidate: Candidate
    held_out: float

    def to_json(self, chosen: Candidate) -> dict[str, Any]:
        """Return JSON values; a loss that is not finite is null."""
        held_out = self.held_out if math.isfinite(self.held_out) else None
        return {**self.candidate.to_json(), "held_out": held_out, "chosen": self.candidate == chosen}


def validate_widths(search: PruneSearchConfig, parent: ModelConfig, path: str = "stage.search") -> None:
    """Raise UserError unless every width of the grid can be cut out of the parent.

    Depths are checked by `layer_removal.DepthTargets.from_search`.
    """
    for name, kind in _WIDTHS.items():
        wanted, size = search.__dict__[name], parent.__dict__[name]
        if any(value > size for value in wanted):
            raise UserError(
                f"`{path}.{name}` ({max(wanted)}) exceeds the parent's {size}; pruning cannot widen, use {size}."
            )
        if kind is not None and kind not in parent.hybrid_layer_pattern and any(value != size for value in wanted):
            raise UserError(
                f"`{path}.{name}` ({list(wanted)}) would do nothing: the parent ({parent.hybrid_layer_pattern}) has no"
                f" {kind!r} layer; remove the key."
            )
    for heads in search.mamba_num_heads:
        if heads % parent.n_groups:
            below, above = heads // parent.n_groups * parent.n_groups, (heads // parent.n_groups + 1) * parent.n_groups
            ways = f"{above}" if below == 0 else f"{below} or {above}"
            raise UserError(
                f"`{path}.mamba_num_heads` ({heads}) must be divisible by the parent's `n_groups` ({parent.n_groups}),"
                f" because every group keeps the same number of heads; use {ways}."
            )


def enumerate_candidates(
    search: PruneSearchConfig, parent: ModelConfig, patterns: Mapping[int, str]
) -> list[Candidate]:
    """Return every candidate of the grid, largest first.

    Size is memory when there is a memory budget (as published: sorted by estimated memory), else parameters.

    Args:
        patterns: depth -> layer string of the model with so many layers.
    """
    candidates = [
        _cost(search, parent, pattern, dict(zip(_WIDTHS, widths, strict=True)))
        for pattern in patterns.values()
        for widths in itertools.product(*_axes(search, parent, pattern))
    ]
    return sorted(candidates, key=lambda one: _order(search, one))


def _axes(search: PruneSearchConfig, parent: ModelConfig, pattern: str) -> Iterator[list[int]]:
    """Yield the distinct sizes of each width; one that no layer of `pattern` uses stays the parent's."""
    for name, kind in _WIDTHS.items():
        used = kind is None or kind in pattern
        yield sorted(set(search.__dict__[name])) if used and search.__dict__[name] else [parent.__dict__[name]]


def _cost(search: PruneSearchConfig, parent: ModelConfig, pattern: str, widths: Mapping[str, int]) -> Candidate:
    config = dataclasses.replace(parent, hybrid_layer_pattern=pattern, **widths)
    parameters = count_parameters(config)
    memory_bytes = inference_memory_bytes(config, search.context_length, batch_size=1)
    fits = parameters <= search.max_parameters_fraction * count_parameters(parent) and (
        search.max_memory_bytes == 0 or memory_bytes <= search.max_memory_bytes
    )
    return Candidate(len(pattern), **widths, parameters=parameters, memory_bytes=memory_bytes, fits=fits)


def _size(search: PruneSearchConfig, candidate: Candidate) -> int:
    return candidate.memory_bytes if search.max_memory_bytes else candidate.parameters


def _order(search: PruneSearchConfig, one: Candidate) -> tuple[int, ...]:
    """Largest first; equal sizes by more layers, then wider, so that the order never depends on the recipe's."""
    widths = (one.num_layers, one.hidden_size, one.intermediate_size, one.mamba_num_heads)
    return (-_size(search, one), *(-width for width in widths))


def shortlist(
    candidates: Sequence[Candidate], search: PruneSearchConfig, parent: ModelConfig, path: str = "stage.search"
) -> list[Candidate]:
    """Return the `top_candidates` largest that fit.

    Args:
        candidates: as `enumerate_candidates` gave them, largest first.

    Raises:
        UserError: none fits.
    """
    fitting = [candidate for candidate in candidates if candidate.fits]
    if fitting:
        return fitting[: search.top_candidates]
    smallest = min(candidates, key=lambda one: (one.parameters, one.memory_bytes))
    allowed = math.floor(search.max_parameters_fraction * count_parameters(parent))
    budgets = f"`max_parameters_fraction` ({search.max_parameters_fraction}: {allowed:,} parameters)"
    if search.max_memory_bytes:
        budgets += f" and `max_memory_bytes` ({search.max_memory_bytes:,})"
    raise UserError(
        f"No candidate of `{path}` fits {budgets}; the smallest ({smallest.num_layers} layers, hidden"
        f" {smallest.hidden_size}, intermediate {smallest.intermediate_size}, {smallest.mamba_num_heads} Mamba heads)"
        f" has {smallest.parameters:,} parameters and needs {smallest.memory_bytes:,} bytes at a context of"
        f" {search.context_length}; raise the budget or list smaller sizes."
    )


def choose(candidates: Sequence[Candidate], held_out: Callable[[Candidate], float]) -> tuple[Candidate, list[Scored]]:
    """Score each candidate and return the one with the lowest held-out loss, the first of equals, with all scores.

    A loss that is not finite counts as the worst.
    """
    scored = [Scored(candidate, held_out(candidate)) for candidate in candidates]
    best = min(scored, key=lambda one: one.held_out if math.isfinite(one.held_out) else math.inf)
    return best.candidate, scored
