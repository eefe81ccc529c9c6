"""The AdamW update against torch's AdamW, torchao's 8-bit form, and the statistics of stochastic rounding."""

import pytest
import torch

from nanotrain.ops.adamw import adamw_update, rounding_noise, stochastically_rounded
from nanotrain.ops.moments import BLOCK_SIZE, AdamWStep, dequantise, new_moments, points, quantise, rounding_key

HYPER = {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1}
SHAPE = (24, 256)


def draw(seed: int, std: float = 1.0, shape=SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def run(weights: torch.dtype, states: torch.dtype, steps: int = 8, std: float = 1e-3) -> torch.Tensor:
    parameter = draw(0, 0.02).to(weights)
    moments = new_moments(parameter, states)
    for step in range(1, steps + 1):
        numbers = AdamWStep(learning_rate=1e-3, step=step, key=(5, step), **HYPER)
        adamw_update(parameter, draw(step, std).to(weights), moments, numbers)
    return parameter


def torch_adamw(steps: int = 8, std: float = 1e-3) -> torch.Tensor:
    parameter = torch.nn.Parameter(draw(0, 0.02).double())
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, steps + 1):
        parameter.grad = draw(step, std).double()
        optimizer.step()
    return parameter.detach()


def test_fp32_equals_torch_in_double_precision():
    torch.testing.assert_close(run(torch.float32, torch.float32).double(), torch_adamw(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("states", "share"), [(torch.bfloat16, 0.01), (torch.uint8, 0.02)])
def test_narrow_states_follow_torch(states, share):
    """Eight steps of about 1e-3 each: the path may differ by a few per cent of its length."""
    expected, start = torch_adamw(), draw(0, 0.02).double()
    difference = run(torch.float32, states).double() - expected
    assert difference.norm() < share * (expected - start).norm()


@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16, torch.uint8])
def test_bf16_weights_follow_torch_on_average(states):
    """One weight is off by up to a bf16 step (1.2e-4 near 0.02), 6144 of them together by next to nothing."""
    difference = run(torch.bfloat16, states).double() - torch_adamw()
    assert difference.abs().max() < 2e-3
    assert abs(difference.mean()) < 1e-5


def test_codes_are_the_librarys():
    library = pytest.importorskip("torchao.optim.quant_utils")
    for signed in (True, False):
        torch.testing.assert_close(torch.tensor(points(signed)), torch.tensor(library.create_dynamic_map(signed)))
        values = draw(3, shape=(64, BLOCK_SIZE)) ** 5
        values = values if signed else values.square()
        normed, scale = library.scale_tensor(values, BLOCK_SIZE)
        expected = library.quantize_8bit_with_qmap(normed, torch.tensor(points(signed)))
        codes, our_scale = quantise(values, signed=signed)
        torch.testing.assert_close(our_scale, scale)
        raised = (expected == 0) & (codes == 1) if not signed else torch.zeros_like(codes, dtype=torch.bool)
        assert ((codes == expected) | raised).float().mean() > 0.9999  # a value on a border may fall to either side


def test_eight_bit_steps_equal_the_librarys(monkeypatch):
    optim = pytest.importorskip("torchao.optim")
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: function
    )  # its update in plain PyTorch: no compiler needed
    parameter = torch.nn.Parameter(draw(0, 0.02))
    optimizer = optim.AdamW8bit([parameter], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 9):
        parameter.grad = draw(step, 1e-3)
        optimizer.step()
    got = run(torch.float32, torch.uint8)
    far = (got - parameter.detach()).abs() > 1e-5  # where a code differs
    assert far.float().mean() < 0.01
    assert (got - parameter.detach()).norm() < 0.002 * (got - draw(0, 0.02)).norm()


def test_every_code_survives_a_round_trip():
    scale = torch.tensor([0.37])
    for signed in (True, False):
        codes = torch.arange(256, dtype=torch.uint8)[None]
        values = dequantise(codes, scale, signed=signed)
        again, new_scale = quantise(values, signed=signed)
        assert again.equal(codes) and new_scale.item() == pytest.approx(0.37)


def test_a_second_moment_above_zero_stays_above_zero():
    values = torch.full((1, BLOCK_SIZE), 1e-12)
    values[0, 0] = 1.0
    values[0, 1] = 0.0
    back = dequantise(*quantise(values, signed=False), signed=False)
    assert back[0, 1] == 0 and (back[0, 2:] > 0).all()


def test_tiny_gradients_are_not_lost_below_a_floor_of_the_scale():
    """Second moments of a 12B lie near 1e-14; a floor of 1e-12 under the scale, as the library has, would flatten them."""
    values = draw(1, shape=(2, BLOCK_SIZE)).square() * 1e-16
    back = dequantise(*quantise(values, signed=False), signed=False)
    assert (back - values).abs().max() < 0.01 * values.max()


def test_stochastic_rounding_is_unbiased_and_repeatable():
    value = torch.full((200_000,), 1.0 + 0.3 * 2**-7)
    rounded = stochastically_rounded(value, (3, 4))
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert float(rounded.double().mean()) == pytest.approx(float(value[0]), abs=4 * 2**-7 * (0.21 / 200_000) ** 0.5)
    assert rounded.equal(stochastically_rounded(value, (3, 4)))
    assert not rounded.equal(stochastically_rounded(value, (3, 5)))
    exact = draw(2).bfloat16()
    assert stochastically_rounded(exact.float(), (1, 2)).equal(exact)


def test_noise_is_even_and_not_correlated_between_keys():
    keys = (rounding_key("a.weight", 1), rounding_key("a.weight", 2), rounding_key("b.weight", 1))
    noises = [rounding_noise(65536 * 4, key, torch.device("cpu")).double() for key in keys]
    for noise in noises:
        counts = torch.histc(noise, 64, 0, 65536)
        assert float(((counts - 4096) ** 2 / 4096).sum()) < 110  # chi square with 63 degrees of freedom, 1 in 5000
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(float(torch.corrcoef(torch.stack([noises[a], noises[b]]))[0, 1])) < 0.01
    assert abs(float(torch.corrcoef(torch.stack([noises[0][1:], noises[0][:-1]]))[0, 1])) < 0.01


def test_nothing_is_written_where_it_is_not_allowed():
    parameter = draw(0).bfloat16()
    moments = new_moments(parameter, torch.uint8)
    before = [tensor.clone() for tensor in (parameter, moments.average, moments.square, moments.average_scale)]
    numbers = AdamWStep(learning_rate=1e-3, step=1, key=(1, 1), **HYPER)
    adamw_update(parameter, torch.full_like(parameter, float("nan")), moments, numbers, torch.tensor(False))
    after = (parameter, moments.average, moments.square, moments.average_scale)
    assert all(a.equal(b) for a, b in zip(before, after, strict=True))


def test_small_and_odd_tensors_keep_fp32_states():
    assert new_moments(torch.zeros(300), torch.uint8).average.dtype == torch.float32
    assert new_moments(torch.zeros(4097), torch.uint8).average.dtype == torch.float32
    assert new_moments(torch.zeros(16, 256), torch.uint8).average.dtype == torch.uint8
