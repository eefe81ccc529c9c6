"""The chunked scan against the recurrence as it is written, in fp64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanotrain.ops.ssd import ssd_scan, ssd_scan_ref, ssd_step
from tests.ops.comparison import random_segments, relative_error, worst_error

TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5, torch.bfloat16: 6e-2}


def make_inputs(shape: tuple[int, int, int, int, int, int], seed: int, dt_shift: float = -2.0) -> list[Tensor]:
    """x, dt, A, B, C, D for (batch, length, groups, heads per group, head width, state size)."""
    batch, length, groups, per_group, width, size = shape
    heads = groups * per_group
    generator = torch.Generator().manual_seed(seed)

    def randn(*dims: int) -> Tensor:
        return torch.randn(*dims, generator=generator)

    dt = F.softplus(randn(batch, length, heads) + dt_shift)
    A = -torch.exp(torch.rand(heads, generator=generator) * 2.8)
    inner = (randn(batch, length, groups, size), randn(batch, length, groups, size))
    return [randn(batch, length, heads, width), dt, A, *inner, randn(heads)]


SHAPES = st.tuples(
    st.integers(1, 2), st.integers(1, 21), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)
)


@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=20, deadline=None)
@given(SHAPES, st.integers(1, 9), st.booleans(), st.booleans(), st.integers(0, 99))
def test_equals_the_recurrence(
    dtype: torch.dtype, shape: tuple[int, int, int, int, int, int], chunk: int, packed: bool, state: bool, seed: int
) -> None:
    inputs = make_inputs(shape, seed)
    batch, length, groups, per_group, width, size = shape
    generator = torch.Generator().manual_seed(seed)
    segments = random_segments(batch, length, 4, generator) if packed else None
    if state:
        inputs.append(torch.randn(batch, groups * per_group, width, size, generator=generator))

    def call(function, **fixed):
        return lambda *a: function(*a[:6], segment_ids=segments, initial_state=a[6] if state else None, **fixed)

    error = worst_error(call(ssd_scan, chunk_size=chunk), call(ssd_scan_ref), inputs, dtype)
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("dt_shift", [-25.0, -12.0, -6.0, 3.0])
def test_dt_is_never_clamped(dt_shift: float) -> None:
    """From steps that hardly count to steps that forget everything; relative to the size of y itself."""
    inputs = make_inputs((2, 150, 2, 2, 4, 8), 3, dt_shift)
    inputs[-1] = torch.zeros(4)  # without the skip connection, which would hide a small y
    y, state = ssd_scan(*inputs, chunk_size=32)
    expected, expected_state = ssd_scan_ref(*(t.double() for t in inputs))
    assert float((y - expected).abs().max() / expected.abs().max()) < 2e-5
    assert float((state - expected_state).abs().max() / expected_state.abs().max()) < 2e-5


def test_a_chunk_is_only_a_matter_of_speed() -> None:
    inputs = [t.double() for t in make_inputs((2, 37, 2, 2, 3, 5), 0)]
    results = [ssd_scan(*inputs, chunk_size=chunk)[0] for chunk in (1, 5, 16, 37, 64)]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-11, atol=1e-11)


def test_a_scan_in_two_pieces_continues_from_the_state() -> None:
    x, dt, A, B, C, D = (t.double() for t in make_inputs((2, 23, 2, 2, 3, 5), 1))
    whole, final = ssd_scan(x, dt, A, B, C, D, chunk_size=8)
    first, state = ssd_scan(x[:, :9], dt[:, :9], A, B[:, :9], C[:, :9], D, chunk_size=8)
    second, last = ssd_scan(x[:, 9:], dt[:, 9:], A, B[:, 9:], C[:, 9:], D, chunk_size=8, initial_state=state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    torch.testing.assert_close(last, final)


def test_steps_equal_the_scan() -> None:
    x, dt, A, B, C, D = make_inputs((3, 11, 2, 3, 4, 5), 2)
    expected, final = ssd_scan_ref(x, dt, A, B, C, D)
    state = torch.zeros_like(final)
    for t in range(x.shape[1]):
        y, state = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, state)
        assert relative_error(y, expected[:, t]) < 1e-5
    assert relative_error(state, final) < 1e-5


def test_packed_documents_equal_documents_alone_and_a_reused_id_does_not_join_them() -> None:
    x, dt, A, B, C, D = (t.double() for t in make_inputs((1, 20, 2, 2, 3, 4), 5))
    borders = [0, 1, 6, 7, 16, 20]
    ids = torch.cat([torch.full((1, e - b), i % 2) for i, (b, e) in enumerate(itertools.pairwise(borders))], 1)
    packed, final = ssd_scan(x, dt, A, B, C, D, chunk_size=8, segment_ids=ids)
    parts = [
        ssd_scan(x[:, b:e], dt[:, b:e], A, B[:, b:e], C[:, b:e], D, chunk_size=8)
        for b, e in itertools.pairwise(borders)
    ]
    torch.testing.assert_close(packed, torch.cat([y for y, _ in parts], dim=1))
    torch.testing.assert_close(final, parts[-1][1])


def test_autocast_leaves_the_scan_in_fp32() -> None:
    inputs = make_inputs((1, 40, 2, 2, 4, 8), 6)
    expected, expected_state = ssd_scan(*inputs, chunk_size=16)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = ssd_scan(*inputs, chunk_size=16)
    assert torch.equal(y, expected)
    assert torch.equal(state, expected_state)
    narrow = [t.bfloat16() if i in (0, 3, 4) else t for i, t in enumerate(inputs)]
    y, state = ssd_scan(*narrow, chunk_size=16)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)


def test_gradients_by_finite_differences() -> None:
    inputs = [t.double().requires_grad_() for t in make_inputs((1, 7, 1, 2, 2, 2), 8, dt_shift=0.0)]
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 2]])
    assert torch.autograd.gradcheck(lambda *a: ssd_scan(*a, chunk_size=3, segment_ids=ids), inputs)
