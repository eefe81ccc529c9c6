"""Arithmetic on layer strings such as `M-M*-`: one letter a layer, each layer one residual block with one mixer."""

from collections.abc import Collection
from typing import NamedTuple

from nanotrain.config.model import ATTENTION, MAMBA, MLP


class LayerCounts(NamedTuple):
    """Layers of each kind."""

    mamba: int
    attention: int
    mlp: int


def count_layers(pattern: str) -> LayerCounts:
    """Count the layers of each kind."""
    return LayerCounts(pattern.count(MAMBA), pattern.count(ATTENTION), pattern.count(MLP))


def layers_of_kind(pattern: str, kind: str) -> list[int]:
    """Return the 0-based indices of the layers whose letter is `kind`."""
    return [index for index, letter in enumerate(pattern) if letter == kind]


def without_layers(pattern: str, removed: Collection[int]) -> str:
    """Return the pattern that is left when the layers at the 0-based indices `removed` are taken out."""
    assert all(0 <= index < len(pattern) for index in removed), (pattern, removed)
    return "".join(letter for index, letter in enumerate(pattern) if index not in removed)
