import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotrain.ops.rms_norm import grouped_gated_rms_norm, grouped_gated_rms_norm_ref, rms_norm, rms_norm_ref
from tests.ops.comparison import worst_error

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(4, 40), st.sampled_from([1e-5, 1e-2]), st.integers(0, 99))
def test_rms_norm(dtype: torch.dtype, rows: int, width: int, eps: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(2, rows, width, generator=generator), torch.randn(width, generator=generator)]
    error = worst_error(lambda x, w: rms_norm(x, w, eps), lambda x, w: rms_norm_ref(x, w, eps), inputs, dtype)
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(4, 9), st.integers(0, 99))
def test_grouped_gated_rms_norm(dtype: torch.dtype, rows: int, groups: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = groups * width
    inputs = [torch.randn(2, rows, size, generator=generator) for _ in range(2)]
    inputs.append(torch.randn(size, generator=generator))
    error = worst_error(
        lambda y, z, w: grouped_gated_rms_norm(y, z, w, 1e-5, groups),
        lambda y, z, w: grouped_gated_rms_norm_ref(y, z, w, 1e-5, groups),
        inputs,
        dtype,
    )
    assert error < TOLERANCE[dtype]


def test_groups_do_not_see_each_other() -> None:
    y, z, weight = torch.randn(3, 8), torch.randn(3, 8), torch.ones(8)
    changed = y.clone()
    changed[:, 4:] *= 100
    before, after = (grouped_gated_rms_norm(t, z, weight, 1e-5, 2) for t in (y, changed))
    assert torch.equal(before[:, :4], after[:, :4])


def test_bf16_is_normalised_in_fp32() -> None:
    """200^2 summed over 4096 channels in bf16 would be far off; the result must be 1 to bf16's precision."""
    x = torch.full((1, 4096), 200.0, dtype=torch.bfloat16)
    assert torch.equal(rms_norm(x, torch.ones(4096, dtype=torch.bfloat16), 1e-5), torch.ones_like(x))
