import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotrain.ops.causal_conv1d import causal_conv1d, causal_conv1d_ref
from tests.ops.comparison import random_segments, worst_error

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 12), st.integers(1, 5), st.integers(1, 5), st.booleans(), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_equals_its_twin(
    dtype: torch.dtype, batch: int, length: int, channels: int, kernel: int, packed: bool, state: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    segments = random_segments(batch, length, 3, generator) if packed else None
    shapes = [(batch, length, channels), (channels, 1, kernel), (channels,)]
    shapes += [(batch, kernel - 1, channels)] if state and kernel > 1 else []
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]

    def call(function):
        return lambda x, w, b, s=None: function(x, w, b, segment_ids=segments, initial_state=s)

    assert worst_error(call(causal_conv1d), call(causal_conv1d_ref), inputs, dtype) < TOLERANCE[dtype]


def test_equals_torch_conv1d() -> None:
    x, weight, bias = torch.randn(2, 19, 6), torch.randn(6, 1, 4), torch.randn(6)
    padded = F.pad(x.transpose(1, 2), (3, 0))
    expected = F.silu(F.conv1d(padded, weight, bias, groups=6)).transpose(1, 2)
    torch.testing.assert_close(causal_conv1d(x, weight, bias), expected)


def test_documents_alone_and_packed_agree_also_when_shorter_than_the_kernel() -> None:
    weight, bias = torch.randn(5, 1, 4).double(), torch.randn(5).double()
    documents = [torch.randn(1, n, 5).double() for n in (1, 2, 7, 1, 3)]
    ids = torch.cat([torch.full((1, d.shape[1]), i % 2) for i, d in enumerate(documents)], dim=1)
    packed = causal_conv1d(torch.cat(documents, dim=1), weight, bias, segment_ids=ids)
    torch.testing.assert_close(packed, torch.cat([causal_conv1d(d, weight, bias) for d in documents], dim=1))


def test_gradients_by_finite_differences() -> None:
    shapes = ((2, 6, 3), (3, 1, 4), (3,), (2, 3, 3))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    ids = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0]])
    assert torch.autograd.gradcheck(lambda x, w, b, s: causal_conv1d(x, w, b, segment_ids=ids, initial_state=s), inputs)
