import torch

from nanotrain.ops import gradient_scaling


def test_gradients_are_scaled_in_place():
    gradients = [torch.ones(3), None, torch.ones(2, dtype=torch.bfloat16)]
    storage = gradients[0].data_ptr()
    scaled = gradient_scaling.scale_gradients(gradients, torch.tensor(0.5))
    assert scaled[0].data_ptr() == storage and scaled[0].tolist() == [0.5] * 3 and scaled[1] is None
    assert scaled[2].dtype == torch.bfloat16 and scaled[2].tolist() == [0.5] * 2


def test_a_narrow_gradient_is_rounded_once(monkeypatch):
    """The factor itself is not: 1 / 7789 is 0.28% larger in bf16, and every gradient behind the head would be."""
    monkeypatch.setattr(gradient_scaling, "_SCALED_AT_ONCE", 7)
    values = torch.randn(5, 9, generator=torch.Generator().manual_seed(1)).bfloat16()
    factor = torch.tensor(1 / 7789)
    gradient = values.clone()
    storage = gradient.data_ptr()
    (scaled,) = gradient_scaling.scale_gradients([gradient], factor)
    assert scaled is not None and scaled.data_ptr() == storage
    assert scaled.equal((values.double() / 7789).bfloat16())
    assert not scaled.equal(values * factor.bfloat16())
