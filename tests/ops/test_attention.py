import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotrain.ops.attention import attention, attention_ref
from tests.ops.comparison import random_segments, relative_error, worst_error

TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 5e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 9), st.integers(1, 2), st.integers(1, 3), st.integers(1, 6), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_equals_its_twin(
    dtype: torch.dtype, batch: int, length: int, groups: int, per_group: int, width: int, packed: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    segments = random_segments(batch, length, 3, generator) if packed else None
    heads = (groups * per_group, groups, groups)
    inputs = [torch.randn(batch, length, h, width, generator=generator) for h in heads]
    error = worst_error(
        lambda q, k, v: attention(q, k, v, segment_ids=segments),
        lambda q, k, v: attention_ref(q, k, v, segment_ids=segments),
        inputs,
        dtype,
    )
    assert error < TOLERANCE[dtype]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 2), st.integers(1, 3), st.integers(0, 99))
def test_queries_behind_cached_keys(batch: int, queries: int, groups: int, per_group: int, seed: int) -> None:
    """Rows of different lengths; the space behind a row's keys holds junk that nobody may read."""
    generator = torch.Generator().manual_seed(seed)
    cached = torch.randint(0, 6, (batch,), generator=generator)
    q = torch.randn(batch, queries, groups * per_group, 4, generator=generator)
    k, v = (torch.randn(batch, 6 + queries + 2, groups, 4, generator=generator) for _ in range(2))
    expected = attention_ref(q, k, v, num_cached=cached)
    for row in range(batch):
        for t in (k, v):
            t[row, int(cached[row]) + queries :] = 1e4
    assert relative_error(attention(q, k, v, num_cached=cached), expected) < 1e-5


def test_a_reused_id_does_not_join_two_documents() -> None:
    q, k, v = (torch.randn(1, 6, 2, 4) for _ in range(3))
    reused = attention(q, k, v, segment_ids=torch.tensor([[3, 3, 1, 1, 3, 3]]))
    distinct = attention(q, k, v, segment_ids=torch.tensor([[0, 0, 1, 1, 2, 2]]))
    assert torch.equal(reused, distinct)
