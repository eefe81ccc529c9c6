"""The emulated quantiser against a table of all E4M3 numbers, and FP8 linears against fp64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotrain.config.engine import Device, EngineConfig, Precision
from nanotrain.config.errors import UserError
from nanotrain.config.model import ModelConfig
from nanotrain.engines.precision import apply_precision
from nanotrain.model.hybrid import HybridModel
from nanotrain.ops import squared_relu_mlp as squared_relu_mlp_module
from nanotrain.ops.fp8 import (
    EmulatedProducts,
    dequantize_ref,
    power_of_two_scale_ref,
    quantize_blocks_ref,
    quantize_tiles_ref,
)
from nanotrain.ops.linear import RoundedProducts, WeightCopy, linear, linear_ref, linears
from nanotrain.ops.squared_relu import squared_relu_ref
from nanotrain.ops.squared_relu_mlp import fuses_squared_relu, squared_relu_mlp, squared_relu_mlp_ref


def e4m3_numbers() -> list[float]:
    """All finite E4M3 numbers >= 0 from the definition: 1 sign, 4 exponent bits (bias 7), 3 mantissa bits, no infinity."""
    numbers = [mantissa / 8 * 2.0**-6 for mantissa in range(8)]
    for exponent in range(1, 16):
        for mantissa in range(8):
            if (exponent, mantissa) != (15, 7):  # the one pattern that means NaN
                numbers.append((1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return numbers


NUMBERS = e4m3_numbers()


def nearest(value: float) -> float:
    """Nearest E4M3 number, ties to the even mantissa, saturating."""
    magnitude = min(abs(value), NUMBERS[-1])
    best = min(range(len(NUMBERS)), key=lambda i: (abs(NUMBERS[i] - magnitude), i % 2))
    return math.copysign(NUMBERS[best], value)


def test_the_largest_number_is_448():
    assert NUMBERS[-1] == 448.0
    assert len(NUMBERS) == 127


@settings(max_examples=200, deadline=None)
@given(st.floats(min_value=2.0**-100, max_value=2.0**120, width=32))
def test_scale_is_the_largest_power_of_two_that_fits(amax):
    scale = power_of_two_scale_ref(torch.tensor([amax])).item()
    assert math.frexp(scale)[0] == 0.5  # a power of two
    assert amax * scale <= 448.0 * (1 + 2.0**-23) < 2 * amax * scale * (1 + 2.0**-22)


def test_scale_of_odd_tiles():
    odd = torch.tensor([0.0, float("inf"), float("nan"), 2.0**-149])
    assert power_of_two_scale_ref(odd).tolist() == [1.0, 1.0, 1.0, 2.0**127]


@pytest.mark.parametrize("spread", [0.0, 4.0])
def test_tiles_equal_the_brute_force(spread):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(128, 256, generator=generator) * torch.exp(spread * torch.randn(128, 1, generator=generator))
    x[5, 128:] = 0.0
    quantized = quantize_tiles_ref(x)
    for row, block in ((0, 0), (5, 1), (77, 1)):
        tile = x[row, 128 * block : 128 * block + 128].tolist()
        amax = max(map(abs, tile))
        scale = 1.0 if amax == 0 else 2.0 ** math.floor(math.log2(448.0 / amax))
        expected = [nearest(value * scale) for value in tile]
        stored = quantized.rows[row, 128 * block : 128 * block + 128].view(torch.float8_e4m3fn).float()
        assert stored.tolist() == expected
        assert quantized.row_scales[block, row].item() == 1.0 / scale
    for column in (0, 200):
        tile = x[:, column].tolist()
        scale = 2.0 ** math.floor(math.log2(448.0 / max(map(abs, tile))))
        stored = quantized.columns[column].view(torch.float8_e4m3fn).float()
        assert stored.tolist() == [nearest(value * scale) for value in tile]
        assert quantized.column_scales[0, column].item() == 1.0 / scale


def test_blocks_share_one_scale_and_both_directions_hold_the_same_values():
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(4))
    weight[:128, :128] *= 1000
    quantized = quantize_blocks_ref(weight)
    assert quantized.row_scales.shape == (2, 4)  # 3 blocks along K, padded to 4
    assert quantized.column_scales.shape == (3, 4)
    rows = dequantize_ref(quantized.rows, quantized.row_scales, blocks=True)
    columns = dequantize_ref(quantized.columns, quantized.column_scales, blocks=True)
    assert torch.equal(rows, columns.t())
    for i, j in ((0, 0), (1, 2)):
        block = weight[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
        scale = 2.0 ** math.floor(math.log2(448.0 / block.abs().max().item()))
        assert quantized.row_scales[i, j].item() == 1 / scale
        assert rows[128 * i, 128 * j].item() == nearest(block[0, 0].item() * scale) / scale


def test_error_of_a_value_is_at_most_half_a_unit():
    """Three mantissa bits: at most 1/16 of the value, or half the smallest step of the tile's scale."""
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(5))
    quantized = quantize_tiles_ref(x)
    error = (dequantize_ref(quantized.rows, quantized.row_scales, blocks=False) - x.double()).abs()
    step = quantized.row_scales[0, :128].double()[:, None] * 2.0**-9
    assert bool((error <= torch.maximum(x.double().abs() / 16, step / 2)).all())


@pytest.mark.parametrize("tokens", [128, 200])
@pytest.mark.parametrize(("products", "tolerance"), [(EmulatedProducts(), 5e-2), (RoundedProducts(), 6e-3)])
def test_linear_near_fp64(products, tolerance, tokens):
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(2, tokens // 2, 256, generator=generator).requires_grad_()
    weight = (torch.randn(384, 256, generator=generator) / 16).requires_grad_()
    grad = torch.randn(2, tokens // 2, 384, generator=generator)
    y = linear(x, weight, WeightCopy(products))
    assert y.dtype == torch.bfloat16
    got = [y, *torch.autograd.grad(y, (x, weight), grad.bfloat16())]
    assert [t.dtype for t in got[1:]] == [x.dtype, weight.dtype]
    xd, wd = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = [xd @ wd.t(), *torch.autograd.grad(xd @ wd.t(), (xd, wd), grad.double())]
    for ours, exact in zip(got, expected, strict=True):
        assert float(((ours.double() - exact).norm() / exact.norm()).detach()) < tolerance


@pytest.mark.parametrize("form", [squared_relu_mlp, squared_relu_mlp_ref])
def test_mlp_near_fp64(form):
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(2, 70, 128, generator=generator).requires_grad_()
    up, down = ((torch.randn(*shape, generator=generator) / 16).requires_grad_() for shape in ((256, 128), (128, 256)))
    grad = torch.randn(2, 70, 128, generator=generator)
    products = EmulatedProducts(fused=True)
    y = form(x, up, down, WeightCopy(products), WeightCopy(products))
    got = [y, *torch.autograd.grad(y, (x, up, down), grad.bfloat16())]
    wide = [t.detach().double().requires_grad_() for t in (x, up, down)]
    exact = squared_relu_ref(wide[0] @ wide[1].t()) @ wide[2].t()
    expected = [exact, *torch.autograd.grad(exact, wide, grad.double())]
    for ours, theirs in zip(got, expected, strict=True):
        assert float(((ours.double() - theirs).norm() / theirs.norm()).detach()) < 8e-2


def test_only_copies_of_one_library_that_quantises_squared_relu_fuse(monkeypatch):
    x = torch.zeros(1)
    fused, plain = EmulatedProducts(fused=True), EmulatedProducts()
    pairs = [(WeightCopy(a), WeightCopy(b)) for a, b in ((fused, fused), (plain, plain), (fused, plain))]
    assert not any(fuses_squared_relu(x, *pair) for pair in pairs)  # no kernel was chosen
    monkeypatch.setattr(squared_relu_mlp_module, "kernel_for", lambda op, *tensors: len)
    assert [fuses_squared_relu(x, *pair) for pair in [*pairs, (None, None)]] == [True, False, False, False]


@pytest.mark.parametrize("tokens", [128, 70])
def test_products_of_one_input_quantise_it_once_and_equal_those_alone(tokens):
    class Counting(EmulatedProducts):
        made = 0

        def quantize_activation(self, x, *, columns):
            self.made += 1
            return super().quantize_activation(x, columns=columns)

    generator = torch.Generator().manual_seed(9)
    x = torch.randn(2, tokens // 2, 128, generator=generator).requires_grad_()
    weights = [(torch.randn(rows, 128, generator=generator) / 16).requires_grad_() for rows in (256, 128, 128)]
    grads = [torch.randn(2, tokens // 2, len(w), generator=generator).bfloat16() for w in weights]
    products, other = Counting(), EmulatedProducts()
    together = linears(x, weights, [WeightCopy(products) for _ in weights])
    assert products.made == 1
    alone = [linear(x, w, WeightCopy(other)) for w in weights]
    assert all(a.equal(b) for a, b in zip(together, alone, strict=True))
    got = torch.autograd.grad(together, (x, *weights), grads)
    parts = [torch.autograd.grad(y, (x, w), grad) for y, w, grad in zip(alone, weights, grads, strict=True)]
    assert got[0].equal(parts[0][0] + parts[1][0] + parts[2][0])
    assert all(a.equal(b[1]) for a, b in zip(got[1:], parts, strict=True))


def test_products_of_several_libraries_or_none_are_made_one_by_one():
    x, weights = torch.randn(128, 128), [torch.randn(128, 128) for _ in range(3)]
    copies = [WeightCopy(EmulatedProducts()), None, WeightCopy(RoundedProducts())]
    together = linears(x, weights, copies)
    assert all(y.equal(linear(x, w, copy)) for y, w, copy in zip(together, weights, copies, strict=True))


def test_linear_without_a_copy_is_exact():
    x, weight = torch.randn(2, 3, 5).double(), torch.randn(4, 5).double()
    torch.testing.assert_close(linear(x, weight), linear_ref(x, weight), rtol=1e-13, atol=1e-13)


def test_a_copy_serves_until_the_weight_changes():
    class Counting(EmulatedProducts):
        made = 0

        def quantize_weight(self, weight):
            self.made += 1
            return super().quantize_weight(weight)

    products = Counting()
    weight = torch.nn.Parameter(torch.randn(128, 128))
    cached = WeightCopy(products)
    x = torch.randn(128, 128)
    for _ in range(3):  # micro-batches
        linear(x, weight, cached).sum().backward()
    assert products.made == 1
    for made, (optimizer, fused) in enumerate([(torch.optim.SGD, False), (torch.optim.AdamW, True)], start=2):
        optimizer([weight], lr=0.1, fused=fused).step()
        if fused:
            cached.drop()
        after = linear(x, weight, cached)
        assert products.made == made
        assert torch.equal(after, linear(x, weight.detach().clone(), WeightCopy(EmulatedProducts())))


WIDE = ModelConfig(
    hybrid_layer_pattern="M-*-M-",
    vocab_size=64,
    hidden_size=128,
    intermediate_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    mamba_num_heads=8,
    mamba_head_dim=31,
    ssm_state_size=64,
    n_groups=2,
    chunk_size=16,
)


def test_sizes_and_devices_that_fp8_cannot_take_are_named():
    model = HybridModel(WIDE)
    config = EngineConfig(device=Device.cpu, precision=Precision.fp8_blockwise, fp8_bf16_last_layers=0)
    with pytest.raises(UserError, match=r"multiples of 128.*layer 4's mixer.in_proj maps 128 to 760"):
        apply_precision(model, config, torch.device("cpu"), torch.bfloat16)
    config.fp8_bf16_last_layers = 2  # layers 2 and 3 fit
    with pytest.raises(UserError, match=r"needs a GPU with FP8"):
        apply_precision(model, config, torch.device("cpu"), torch.bfloat16)
    config.fp8_bf16_last_layers = 4
    with pytest.raises(UserError, match=r"leaves none of the 6 layers"):
        apply_precision(model, config, torch.device("cpu"), torch.bfloat16)
