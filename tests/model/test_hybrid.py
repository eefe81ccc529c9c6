"""Packing, dtypes, names and sizes of the model."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanotrain.config.model import ModelConfig
from nanotrain.model import mixers
from nanotrain.model.hybrid import HybridModel
from nanotrain.ops import mamba_core
from nanotrain.planning.parameters import FP32_TENSORS, count_parameters, tensor_shapes
from tests.model.architectures import random_config, random_model, random_tokens

DOCUMENTS = (1, 7, 2, 19, 3, 12)


def loss_and_gradients(model: HybridModel, batches: list[tuple[Tensor, Tensor | None, Tensor]]) -> tuple[Tensor, list]:
    """Return the summed next-token loss of (ids, segment_ids, labels) and its gradients."""
    total = torch.zeros((), dtype=torch.float64)
    for ids, segments, labels in batches:
        total = total + F.cross_entropy(model(ids, segments).flatten(0, 1), labels.flatten(), reduction="sum")
    return total, list(torch.autograd.grad(total, list(model.parameters())))


def packing_error(model: HybridModel) -> float:
    """Relative difference of loss and gradients between packed documents and the same documents alone."""
    documents = [random_tokens(model.config, 1, n + 1, seed=n) for n in DOCUMENTS]
    alone = [(d[:, :-1], None, d[:, 1:]) for d in documents]
    # Ids repeat, so that two documents of one id stand in one row, but never side by side.
    segments = torch.cat([torch.full((1, n), i % 2) for i, n in enumerate(DOCUMENTS)], dim=1)
    packed = (torch.cat([a[0] for a in alone], 1), segments, torch.cat([a[2] for a in alone], 1))
    loss, gradients = loss_and_gradients(model, [packed])
    expected_loss, expected = loss_and_gradients(model, alone)
    errors = [
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in zip(gradients, expected, strict=True)
    ]
    return max(float(((loss - expected_loss).abs() / expected_loss).detach()), *errors)


@pytest.mark.parametrize("seed", [0, 1, 6, 7, 8, 10, 12])
def test_packed_documents_equal_documents_alone(seed: int) -> None:
    assert packing_error(random_model(random_config(seed), seed, torch.float64)) < 1e-10


def forget_segments(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(*args, **kwargs | {"segment_ids": None})


@pytest.mark.parametrize(
    ("module", "op"), [(mamba_core, "causal_conv1d"), (mamba_core, "ssd_scan"), (mixers, "attention")]
)
def test_each_reset_is_needed(module: ModuleType, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(random_config(7), 7, torch.float64)
    assert packing_error(model) < 1e-10
    monkeypatch.setattr(module, op, forget_segments(getattr(module, op)))
    assert packing_error(model) > 1e-3


@pytest.mark.parametrize("seed", range(12))
def test_names_and_shapes_are_nemotron_hs(seed: int) -> None:
    config = random_config(seed)
    with torch.device("meta"):
        model = HybridModel(config)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == tensor_shapes(config)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config)
    assert "lm_head.weight" in model.state_dict()


def test_a_meta_model_becomes_real_and_equals_one_built_at_once() -> None:
    for seed in (3, 7):
        config = random_config(seed)
        config.tie_word_embeddings = seed == 7
        with torch.device("meta"):
            late = HybridModel(config)
        late.to_empty(device="cpu")
        late.init_weights(11)
        built = HybridModel(config)
        built.init_weights(11)
        assert (late.lm_head.weight is late.backbone.embeddings.weight) == config.tie_word_embeddings
        for name, tensor in built.state_dict().items():
            assert torch.equal(tensor, late.state_dict()[name]), name


def test_casting_leaves_decay_and_skip_in_fp32() -> None:
    config = random_config(7)
    model = random_model(config, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for cast in (model.bfloat16, lambda: model.to(torch.float16), lambda: model.half().bfloat16()):
        cast()
        for name, parameter in model.named_parameters():
            if name.rsplit(".", maxsplit=1)[-1] in FP32_TENSORS:
                assert torch.equal(parameter, before[name]), name
            else:
                assert parameter.dtype in (torch.bfloat16, torch.float16)
    assert {p.dtype for p in model.double().parameters()} == {torch.float64}


def test_bf16_weights_and_bf16_autocast_stay_near_fp32() -> None:
    config = random_config(7)
    model = random_model(config, 2)
    ids = random_tokens(config, 2, 21)
    expected = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(ids).float().flatten(0, 1), ids.flatten())
    reference = F.cross_entropy(expected.flatten(0, 1), ids.flatten())
    assert abs((loss - reference).item()) < 0.1
    loss.backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters()
    )
    narrow = model.bfloat16()(ids)
    assert narrow.dtype == torch.bfloat16
    assert ((narrow.float() - expected).abs().mean() / expected.abs().mean()).item() < 0.05


def test_hidden_states_times_output_weight_are_the_logits() -> None:
    config = random_config(7)
    model = random_model(config, 4)
    ids = random_tokens(config, 2, 9)
    assert torch.equal(F.linear(model.hidden_states(ids), model.output_weight()), model(ids))
    assert model.output_weight().shape == (config.vocab_size, config.hidden_size)


def test_every_parameter_gets_a_gradient() -> None:
    config: ModelConfig = random_config(7)
    model = random_model(config, 4)
    model(random_tokens(config, 2, 9)).square().mean().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in model.parameters())
