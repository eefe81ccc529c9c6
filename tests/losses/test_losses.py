"""Losses over an OutputHead against PyTorch's own, from whole logits in double precision."""

import pytest
import torch
import torch.nn.functional as F

from nanotrain.losses.distillation import ForwardKL
from nanotrain.losses.language_modeling import CrossEntropy
from nanotrain.model.batch import IGNORE_INDEX, MicroBatch
from nanotrain.model.head import HeadWeight, OutputHead

BATCH, LENGTH, WIDTH, TEACHER_WIDTH, VOCABULARY = 3, 7, 5, 6, 11


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def batch(ignored: float = 0.3, teacher: bool = False) -> MicroBatch:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
    labels[torch.rand(BATCH, LENGTH, generator=generator) < ignored] = IGNORE_INDEX
    hidden = randn(BATCH, LENGTH, TEACHER_WIDTH, seed=3) if teacher else None
    return MicroBatch(torch.zeros_like(labels), labels, None, hidden)


def head() -> OutputHead:
    return OutputHead(
        randn(BATCH, LENGTH, WIDTH, seed=1).requires_grad_(), randn(VOCABULARY, WIDTH, seed=2).requires_grad_()
    )


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, head: OutputHead) -> None:
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    wanted = torch.autograd.grad(theirs, (head.hidden_states, head.weight))
    for gradient, expected in zip(torch.autograd.grad(ours, (head.hidden_states, head.weight)), wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-13)


def test_cross_entropy_is_the_sum_over_labelled_tokens():
    own, data = head(), batch()
    output = CrossEntropy()(own, data)
    logits = own.hidden_states @ own.weight.t()
    expected = F.cross_entropy(logits.flatten(0, 1), data.labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    assert_same(output.loss_sum, expected, own)
    assert int(CrossEntropy().denominator(data)) == int((data.labels >= 0).sum())


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_forward_kl_is_torchs_kl_div_at_the_temperature(temperature):
    own, data = head(), batch(teacher=True)
    teacher_weight = randn(VOCABULARY, TEACHER_WIDTH, seed=4)
    loss = ForwardKL(HeadWeight(teacher_weight), temperature)
    assert data.teacher_hidden_states is not None
    student = F.log_softmax(own.hidden_states @ own.weight.t() / temperature, -1)
    teacher = F.log_softmax(data.teacher_hidden_states @ teacher_weight.t() / temperature, -1)
    per_token = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    expected = (per_token * (data.labels != IGNORE_INDEX)).sum() * temperature**2
    assert_same(loss(own, data).loss_sum, expected, own)
    assert int(loss.denominator(data)) == int((data.labels != IGNORE_INDEX).sum())


@pytest.mark.parametrize("loss", [CrossEntropy(), ForwardKL(HeadWeight(randn(VOCABULARY, TEACHER_WIDTH, seed=4)))])
def test_a_batch_without_labels_adds_nothing(loss):
    own, data = head(), batch(ignored=1.0, teacher=True)
    output = loss(own, data)
    assert int(loss.denominator(data)) == 0 and output.loss_sum.item() == 0
    for gradient in torch.autograd.grad(output.loss_sum, (own.hidden_states, own.weight)):
        assert not gradient.any()
