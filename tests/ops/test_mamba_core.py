"""The core of a Mamba-2 mixer against the slow twins of its parts."""

import torch

from nanotrain.ops.mamba_core import mamba_core, mamba_core_ref
from nanotrain.ops.mamba_layout import MambaParameters, MambaSizes, split_heads
from tests.ops.comparison import random_segments, worst_error

SIZES = MambaSizes(num_heads=4, head_dim=6, num_groups=2, state_size=5, chunk_size=8, epsilon=1e-5)


def inputs(generator: torch.Generator) -> list[torch.Tensor]:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    channels = SIZES.widths[1]
    wide = [randn(2, 21, sum(SIZES.widths)), randn(channels, 1, 4) / 2, randn(channels) / 8, randn(4) - 2]
    return [*wide, torch.rand(4, generator=generator), randn(4), randn(SIZES.inner)]


def test_equals_its_slow_twin_for_whole_rows_and_packed_documents():
    generator = torch.Generator().manual_seed(3)
    leaves = inputs(generator)
    for ids in (None, random_segments(2, 21, 5, generator)):
        error = worst_error(
            lambda z, *p, ids=ids: mamba_core(z, MambaParameters(*p), SIZES, ids),
            lambda z, *p, ids=ids: mamba_core_ref(z, MambaParameters(*p), SIZES, ids),
            leaves,
            torch.float64,
        )
        assert error < 1e-12


def test_channels_lie_as_nemotron_h_has_them():
    assert SIZES.widths == (24, 24 + 2 * 2 * 5, 4)
    x, B, C = split_heads(torch.arange(44).expand(1, 1, 44), SIZES)
    assert x[0, 0, 1].tolist() == list(range(6, 12))
    assert B[0, 0, 1].tolist() == list(range(29, 34)) and C[0, 0, 0].tolist() == list(range(34, 39))
