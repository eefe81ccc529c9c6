"""Transformer Engine's quantisers and products against the emulation that CI tests."""

from threading import Thread

import pytest
import torch

from nanotrain.config.engine import Fp8Gemm, Precision
from nanotrain.config.errors import UserError
from nanotrain.ops.backends import load_fp8_products
from nanotrain.ops.fp8 import EmulatedProducts, quantize_tiles_ref, squared_relu_quantised_ref
from nanotrain.ops.linear import RoundedProducts, WeightCopy, linear
from nanotrain.ops.squared_relu_mlp import fuses_squared_relu, squared_relu_mlp, squared_relu_mlp_ref


def products(precision: Precision, gemm: Fp8Gemm = Fp8Gemm.auto):
    try:
        return load_fp8_products(precision, torch.device("cuda", 0), gemm)
    except UserError as error:
        pytest.skip(str(error))


def matrix(rows: int, columns: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * torch.exp(2 * torch.randn(rows, 1, generator=generator))
    x[3, :128] = 0.0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blockwise_quantisers_equal_the_emulation_bit_for_bit(dtype):
    ours, slow = products(Precision.fp8_blockwise), EmulatedProducts()
    x, weight = matrix(256, 384, 0, dtype), matrix(384, 256, 1, dtype)
    pairs = [
        (ours.quantize_activation(x.cuda(), columns=True), slow.quantize_activation(x, columns=True)),
        (ours.quantize_weight(weight.cuda()), slow.quantize_weight(weight)),
    ]
    for fast, expected in pairs:
        for name in ("rows", "columns"):
            assert torch.equal(getattr(fast, name).cpu().view(torch.uint8), getattr(expected, name))
        for name in ("row_scales", "column_scales"):
            mine, other = getattr(fast, name).cpu(), getattr(expected, name)
            assert mine.shape == other.shape
            if "weight" not in name:
                used = other != 0  # padding holds anything
                assert torch.equal(mine[used], other[used])


@pytest.mark.parametrize("gemm", [Fp8Gemm.te, Fp8Gemm.wgmma, Fp8Gemm.deep_gemm])
def test_blockwise_products_equal_the_emulation_but_for_rounding(gemm):
    ours, slow = products(Precision.fp8_blockwise, gemm), EmulatedProducts()
    x, weight, grad = (
        matrix(*shape, seed, torch.float32) for shape, seed in (((256, 384), 2), ((128, 384), 3), ((256, 128), 4))
    )
    fast = [ours.quantize_activation(x.cuda(), columns=True), ours.quantize_weight(weight.cuda())]
    fast.append(ours.quantize_gradient(grad.cuda()))
    exact = [slow.quantize_activation(x, columns=True), slow.quantize_weight(weight), slow.quantize_gradient(grad)]
    for dtype, tolerance in ((torch.float32, 2e-3), (torch.bfloat16, 4e-3)):
        for name, (a, b) in {"output": (0, 1), "input_gradient": (2, 1), "weight_gradient": (2, 0)}.items():
            if dtype == torch.float32 and name != "weight_gradient":
                continue  # only a weight's gradient is asked for in fp32
            got = getattr(ours, name)(fast[a], fast[b], dtype).cpu().double()
            expected = getattr(slow, name)(exact[a], exact[b], torch.float64)
            assert float((got - expected).norm() / expected.norm()) < tolerance, name


@pytest.mark.parametrize(
    ("rows", "columns", "depth"),
    [(128, 128, 128), (256, 384, 1024), (1152, 640, 2048), (384, 4480, 640), (5120, 5120, 8192), (2560, 5120, 32768)],
)
def test_products_for_hopper_have_the_bits_of_transformer_engine(rows, columns, depth):
    """Again and again: a race would not show every time. Both kinds of scales, and sizes that are no whole tile of results."""
    te, ours = products(Precision.fp8_blockwise, Fp8Gemm.te), products(Precision.fp8_blockwise, Fp8Gemm.wgmma)
    ours._fewest_gradients = 0  # also those that are left to Transformer Engine because it is faster
    generator = torch.Generator("cuda").manual_seed(rows + columns + depth)

    def spread(height: int, width: int) -> torch.Tensor:
        x = torch.randn(height, width, generator=generator, device="cuda")
        return (x * torch.exp(2 * torch.randn(height, 1, generator=generator, device="cuda"))).bfloat16()

    x, grad = spread(depth, columns), spread(depth, rows)  # tokens go along the reduction of a weight's gradient
    tiles = te.quantize_gradient(grad), te.quantize_gradient(x)
    expected = {kind: te.weight_gradient(*tiles, kind) for kind in (torch.bfloat16, torch.float32)}
    for _ in range(5):
        for kind, wanted in expected.items():
            assert torch.equal(ours.weight_gradient(*tiles, kind), wanted)
    x, weight, grad = spread(rows, depth), spread(columns, depth), spread(rows, columns)
    copy = te.quantize_weight(weight)
    pairs = [(te.quantize_activation(x, columns=False), "output"), (te.quantize_gradient(grad), "input_gradient")]
    for matrix, name in pairs:
        wanted = getattr(te, name)(matrix, copy, torch.bfloat16)
        for _ in range(5):
            assert torch.equal(getattr(ours, name)(matrix, copy, torch.bfloat16), wanted), name


def test_products_for_hopper_run_in_a_thread_that_has_used_no_gpu_yet():
    ours = products(Precision.fp8_blockwise, Fp8Gemm.wgmma)
    x = ours.quantize_gradient(matrix(256, 256, 9, torch.bfloat16).cuda())
    weight = ours.quantize_weight(matrix(256, 256, 10, torch.bfloat16).cuda())
    # The result's memory is in the cache: to take it from there makes no context.
    torch.empty(256, 256, dtype=torch.bfloat16, device="cuda")
    found = []
    thread = Thread(target=lambda: found.append(ours.output(x, weight, torch.bfloat16)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], ours.output(x, weight, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_squared_relu_equals_the_emulation_bit_for_bit(dtype):
    ours = products(Precision.fp8_blockwise)
    x, grad = matrix(256, 384, 7, dtype), matrix(256, 384, 8, dtype)
    for other in (None, grad):
        fast = ours.squared_relu_quantised(x.cuda(), None if other is None else other.cuda())
        expected = squared_relu_quantised_ref(x, other)
        for name in ("rows", "row_scales", "columns", "column_scales"):
            assert torch.equal(getattr(fast, name).cpu(), getattr(expected, name)), name


@pytest.mark.parametrize(
    "numbers", [(4, 8, 168, False, 8), (4, 16, None, False, 1), (4, 16, 128, True, 2), (8, 8, 80, True, 8)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_launch_of_tiles_equals_the_emulation_bit_for_bit(numbers, dtype):
    products(Precision.fp8_blockwise)  # or skip
    from nanotrain.ops.gpu.fp8_tiles_triton import PLAIN, Launch, quantise_tiles

    x = matrix(384, 256, 9, dtype)
    x[5, :7], x[6] = torch.inf, 1e-39
    fast, expected = quantise_tiles(x.cuda(), kind=PLAIN, launch=Launch(*numbers)), quantize_tiles_ref(x)
    for name in ("rows", "row_scales", "columns", "column_scales"):
        assert torch.equal(getattr(fast, name).cpu(), getattr(expected, name)), name


@pytest.mark.parametrize("gemm", [Fp8Gemm.te, Fp8Gemm.wgmma, Fp8Gemm.deep_gemm])
def test_fused_mlp_is_as_near_fp64_as_the_ops_apart(use, gemm):
    use("squared_relu", "triton")
    chosen = products(Precision.fp8_blockwise, gemm)
    copies = WeightCopy(chosen), WeightCopy(chosen)
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(2, 150, 256, generator=generator).bfloat16().cuda().requires_grad_()
    weights = [(torch.randn(*s, generator=generator) / 16).cuda().requires_grad_() for s in ((512, 256), (256, 512))]
    grad = torch.randn(2, 150, 256, generator=generator).bfloat16().cuda()
    wide = [t.detach().double().requires_grad_() for t in (x, *weights)]
    exact = torch.relu(wide[0] @ wide[1].t()).square() @ wide[2].t()
    expected = [exact, *torch.autograd.grad(exact, wide, grad.double())]
    assert fuses_squared_relu(x, *copies)
    errors = []
    for form in (squared_relu_mlp, squared_relu_mlp_ref):
        y = form(x, *weights, *copies)
        got = [y, *torch.autograd.grad(y, (x, *weights), grad)]
        errors.append(
            [float(((a.double() - e).norm() / e.norm()).detach()) for a, e in zip(got, expected, strict=True)]
        )
    assert all(fused < 1.05 * apart < 0.08 for fused, apart in zip(*errors, strict=True)), errors


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [256, 100])
@pytest.mark.parametrize(
    ("precision", "tolerance"), [(Precision.fp8_blockwise, 5e-2), (Precision.fp8_current, 7e-2), (Precision.bf16, 6e-3)]
)
def test_linear_near_fp64(precision, tolerance, tokens, weight_dtype):
    chosen = RoundedProducts() if precision is Precision.bf16 else products(precision)
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(2, tokens // 2, 256, generator=generator).cuda().requires_grad_()
    weight = (torch.randn(384, 256, generator=generator) / 16).to(weight_dtype).cuda().requires_grad_()
    grad = torch.randn(2, tokens // 2, 384, generator=generator).cuda()
    y = linear(x, weight, WeightCopy(chosen))
    got = [y, *torch.autograd.grad(y, (x, weight), grad.bfloat16())]
    assert [t.dtype for t in got] == [torch.bfloat16, torch.float32, weight_dtype]
    xd, wd = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = [xd @ wd.t(), *torch.autograd.grad(xd @ wd.t(), (xd, wd), grad.double())]
    for ours, exact in zip(got, expected, strict=True):
        assert float(((ours.double() - exact).norm() / exact.norm()).detach()) < tolerance
