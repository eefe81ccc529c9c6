"""Sizes, parameters and the layout of channels of a Mamba-2 mixer."""

from typing import NamedTuple

from torch import Tensor


class MambaSizes(NamedTuple):
    """H heads of P values, G groups with a state of N."""

    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int
    chunk_size: int
    """Positions the scan takes at a time; changes speed, not the result."""
    epsilon: float
    """Added to the mean square in the norm."""

    @property
    def inner(self) -> int:
        """H P."""
        return self.num_heads * self.head_dim

    @property
    def widths(self) -> tuple[int, int, int]:
        """Columns of z, xBC and dt."""
        return self.inner, self.inner + 2 * self.num_groups * self.state_size, self.num_heads


class MambaParameters(NamedTuple):
    """Of one mixer, without its projections."""

    conv_weight: Tensor
    """[H P + 2 G N, 1, K]"""
    conv_bias: Tensor
    """[H P + 2 G N]"""
    dt_bias: Tensor
    """[H]"""
    A_log: Tensor
    """[H]"""
    D: Tensor
    """[H]"""
    norm_weight: Tensor
    """[H P]"""


def split_heads(xBC: Tensor, sizes: MambaSizes) -> tuple[Tensor, Tensor, Tensor]:
    """Return views of xBC [B, S, H P + 2 G N]: x [B, S, H, P], B and C [B, S, G, N]."""
    size = sizes.num_groups * sizes.state_size
    x, B, C = xBC.split([sizes.inner, size, size], dim=-1)
    x = x.unflatten(-1, (sizes.num_heads, sizes.head_dim))
    return x, *(t.unflatten(-1, (sizes.num_groups, sizes.state_size)) for t in (B, C))  # pyright: ignore[reportReturnType]
