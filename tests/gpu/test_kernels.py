"""Every kernel against the slow twin of its op: outputs and gradients, fp32 and bf16, whole rows and packed documents."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanotrain.ops import backends
from nanotrain.ops.attention import attention, attention_ref
from nanotrain.ops.causal_conv1d import causal_conv1d, causal_conv1d_ref
from nanotrain.ops.mamba_core import mamba_core, mamba_core_ref
from nanotrain.ops.mamba_layout import MambaParameters, MambaSizes
from nanotrain.ops.rms_norm import (
    branch_rms_norm,
    grouped_gated_rms_norm,
    grouped_gated_rms_norm_ref,
    rms_norm,
    rms_norm_ref,
)
from nanotrain.ops.squared_relu import squared_relu, squared_relu_ref
from nanotrain.ops.ssd import ssd_scan, ssd_scan_ref
from tests.ops.comparison import random_segments, worst_error

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
SCAN_TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 6e-2}
"""The scan multiplies fp32 in TF32, whose mantissa has 10 bits."""


def draws(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def documents(batch: int, length: int) -> Tensor:
    return random_segments(batch, length, 40, torch.Generator().manual_seed(1))


def on_gpu(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Run on copies on the GPU and bring the outputs back; gradients follow the copies."""

    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        outputs = function(*(t.cuda() for t in leaves))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(o.cpu() for o in outputs)

    return run


def kernels_of(op: str) -> list[str]:
    return list(backends.KERNELS[op])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", kernels_of("ssd"))
def test_ssd(use, name, dtype, packed):
    use("ssd", name)
    randn = draws(0)
    batch, length, heads, width, groups, size = 2, 300, 4, 80, 2, 128
    dt = F.softplus(randn(batch, length, heads) - 2)
    A = -torch.exp(torch.rand(heads, generator=torch.Generator().manual_seed(2)) * 2.8)
    inner = [randn(batch, length, groups, size) / 4 for _ in range(2)]
    inputs = [randn(batch, length, heads, width), dt, A, *inner, randn(heads)]
    ids = documents(batch, length) if packed else None
    gpu_ids = None if ids is None else ids.cuda()
    error = worst_error(
        on_gpu(lambda *a: ssd_scan(*a, chunk_size=128, segment_ids=gpu_ids)),
        lambda *a: ssd_scan_ref(*a, segment_ids=ids),
        inputs,
        dtype,
    )
    assert error < SCAN_TOLERANCE[dtype]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", kernels_of("mamba_core"))
def test_mamba_core(use, name, dtype, packed):
    use("mamba_core", name)
    sizes = MambaSizes(num_heads=8, head_dim=80, num_groups=2, state_size=128, chunk_size=128, epsilon=1e-5)
    channels, randn = sizes.widths[1], draws(9)
    taps = [randn(channels, 1, 4) / 3, randn(channels) / 8]
    rest = [randn(8) - 2, torch.rand(8, generator=torch.Generator().manual_seed(3)), randn(8), randn(sizes.inner)]
    ids = documents(2, 300) if packed else None
    gpu_ids = None if ids is None else ids.cuda()
    error = worst_error(
        on_gpu(lambda z, *p: mamba_core(z, MambaParameters(*p), sizes, gpu_ids)),
        lambda z, *p: mamba_core_ref(z, MambaParameters(*p), sizes, ids),
        [randn(2, 300, sum(sizes.widths)) / 2, *taps, *rest],
        dtype,
    )
    assert error < SCAN_TOLERANCE[dtype]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", kernels_of("causal_conv1d"))
def test_causal_conv1d(use, name, dtype, packed):
    use("causal_conv1d", name)
    randn = draws(1)
    ids = documents(2, 90) if packed else None
    gpu_ids = None if ids is None else ids.cuda()
    error = worst_error(
        on_gpu(lambda x, w, b: causal_conv1d(x[..., 8:40], w, b, segment_ids=gpu_ids)),
        lambda x, w, b: causal_conv1d_ref(x[..., 8:40], w, b, segment_ids=ids),
        [randn(2, 90, 48), randn(32, 1, 4), randn(32)],
        dtype,
    )
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", kernels_of("gated_rms_norm"))
def test_gated_rms_norm(use, name, dtype):
    use("gated_rms_norm", name)
    randn = draws(2)
    error = worst_error(
        on_gpu(lambda y, z, w: grouped_gated_rms_norm(y, z[..., 32:], w, 1e-5, 4)),
        lambda y, z, w: grouped_gated_rms_norm_ref(y, z[..., 32:], w, 1e-5, 4),
        [randn(2, 37, 320), randn(2, 37, 352), randn(320)],
        dtype,
    )
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [96, 5120])
@pytest.mark.parametrize("name", kernels_of("rms_norm"))
def test_rms_norm(use, name, width, dtype):
    use("rms_norm", name)
    randn = draws(3)
    error = worst_error(
        on_gpu(lambda x, w: rms_norm(x, w, 1e-5)),
        lambda x, w: rms_norm_ref(x, w, 1e-5),
        [randn(2, 301, width), randn(width)],
        dtype,
    )
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", kernels_of("rms_norm"))
def test_branch_rms_norm(use, name, dtype):
    use("rms_norm", name)
    randn = draws(3)
    error = worst_error(
        on_gpu(lambda x, w: branch_rms_norm(x, w, 1e-5)),
        lambda x, w: (rms_norm_ref(x, w, 1e-5), x),
        [randn(2, 301, 5120), randn(5120)],
        dtype,
    )
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", kernels_of("squared_relu"))
def test_squared_relu(use, name, dtype):
    use("squared_relu", name)
    error = worst_error(on_gpu(squared_relu), squared_relu_ref, [draws(4)(3, 17, 333)], dtype)
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", kernels_of("attention"))
def test_attention(use, name, dtype, packed):
    use("attention", name)
    randn = draws(5)
    ids = documents(2, 140) if packed else None
    gpu_ids = None if ids is None else ids.cuda()
    error = worst_error(
        on_gpu(lambda q, k, v: attention(q, k, v, segment_ids=gpu_ids)),
        lambda q, k, v: attention_ref(q, k, v, segment_ids=ids),
        [randn(2, 140, 10, 128), randn(2, 140, 2, 128), randn(2, 140, 2, 128)],
        dtype,
    )
    assert error < TOLERANCE[dtype]
