"""Full-vocabulary forward KL from two sets of hidden states and output matrices, without the [B, S, V] logits.

The gradient by the student's logits is softmax(student) - softmax(teacher): known as soon as both chunks of logits are,
so it is accumulated in the forward pass, as in linear_cross_entropy. The teacher gets no gradient.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanotrain.ops.backends import kernel_for
from nanotrain.ops.gradient_scaling import scale_gradients
from nanotrain.ops.vocab_chunks import (
    accumulate_weight_gradient,
    accumulation_dtype,
    all_reduce_max,
    all_reduce_sum,
    default_chunk_tokens,
    product_dtype,
    scatter_rows,
    select_rows,
    weight_gradient_dtype,
    widened,
)
from nanotrain.ops.vocab_shard import VocabShard


def linear_kl_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    vocab_shard: VocabShard | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return the sum over masked positions of T^2 KL(softmax(teacher / T) || softmax(student / T)).

    The factor T^2 keeps the size of the gradient independent of the temperature (Hinton et al., arXiv:1503.02531).
    The published recovery of Nemotron Nano 2 is forward KL on the whole vocabulary, no cross-entropy (paper section 4.3).
    Dtypes as for `linear_cross_entropy`; first order only.

    Args:
        student_hidden: [..., D].
        student_weight: [V, D], or this rank's rows of it.
        teacher_hidden: [..., D_teacher].
        teacher_weight: [V, D_teacher], or the same rows of it.
        mask: [...] bool, the positions that count.
        temperature: T > 0, for both.
        vocab_shard: where this rank's rows lie; as for `linear_cross_entropy`.
        chunk_tokens: tokens whose logits exist at a time; None = chosen by V and device.

    Returns:
        [] fp32, or fp64 for fp64 inputs.
    """
    assert student_weight.shape[0] == teacher_weight.shape[0], "student and teacher must have the same vocabulary rows"
    assert temperature > 0
    grad_enabled = torch.is_grad_enabled()  # see linear_cross_entropy for why here
    wanted = (grad_enabled and student_hidden.requires_grad, grad_enabled and student_weight.requires_grad)
    # Two chunks of logits exist at a time, hence half the length.
    chunk = chunk_tokens or max(default_chunk_tokens(student_weight) // 2, 1)
    teacher = _Teacher(teacher_hidden.detach(), teacher_weight.detach())
    args = (student_hidden, student_weight, teacher, mask, temperature, vocab_shard, chunk, wanted)
    if any(wanted):
        return _LinearKLDivergence.apply(*args)
    return _loss_and_gradients(*args).loss_sum


def linear_kl_divergence_ref(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Return what `linear_kl_divergence` returns, from the full logits."""

    def log_probabilities(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        return F.log_softmax(logits.to(accumulation_dtype(logits.dtype)) / temperature, dim=-1)

    student = log_probabilities(student_hidden, student_weight)
    teacher = log_probabilities(teacher_hidden.detach(), teacher_weight.detach())
    divergence = (teacher.exp() * (teacher - student)).sum(-1)
    return (divergence * mask).sum() * temperature**2


class _Teacher(NamedTuple):
    hidden: Tensor
    weight: Tensor


class _Result(NamedTuple):
    loss_sum: Tensor
    grad_hidden: Tensor | None
    grad_weight: Tensor | None


def kl_divergence_chunk_ref(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    vocab_shard: VocabShard | None,
    gradient_wanted: bool,
) -> tuple[Tensor, Tensor]:
    """Return KL [C] of one chunk and the gradient of T^2 KL by the student's logits [C, V]; one MAX and one SUM over ranks.

    Maxima are taken off before anything is multiplied: a common offset of the logits would otherwise cost digits.

    Args:
        student_logits: [C, V], or this rank's columns; may be overwritten, as may the teacher's.
        teacher_logits: [C, V].
        temperature: divides both.
        vocab_shard: where the columns lie.
        gradient_wanted: False = the second result means nothing.

    Returns:
        The divergences, and the gradient in the accumulation dtype or that of the logits.
    """
    student_logits, teacher_logits = widened(student_logits), widened(teacher_logits).to(widened(student_logits).dtype)
    if temperature != 1.0:
        student_logits.div_(temperature)
        teacher_logits.div_(temperature)
    maxima = all_reduce_max(torch.stack([student_logits.amax(-1), teacher_logits.amax(-1)]), vocab_shard)
    student_logits.sub_(maxima[0, :, None])
    teacher_logits.sub_(maxima[1, :, None])
    difference = teacher_logits - student_logits
    student, teacher = student_logits.exp_(), teacher_logits.exp_()
    sums = torch.stack([student.sum(-1), teacher.sum(-1), torch.linalg.vecdot(teacher, difference)])
    student_sums, teacher_sums, cross_sums = all_reduce_sum(sums, vocab_shard).unbind()
    divergence = cross_sums / teacher_sums - teacher_sums.log() + student_sums.log()
    if gradient_wanted:
        student.div_(student_sums[:, None]).sub_(teacher.div_(teacher_sums[:, None]))
        # d(T^2 KL)/dlogits = T (softmax(student / T) - softmax(teacher / T))
        if temperature != 1.0:
            student.mul_(temperature)
    return divergence, student


def _kl_divergence_chunk(student_logits: Tensor, teacher_logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    chunk = kernel_for("kl_divergence", student_logits, teacher_logits) or kl_divergence_chunk_ref
    return chunk(student_logits, teacher_logits, *args)


def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    teacher: _Teacher,
    mask: Tensor,
    temperature: float,
    vocab_shard: VocabShard | None,
    chunk_tokens: int,
    wanted: tuple[bool, bool],
) -> _Result:
    """Return the loss and, where wanted, its gradients by the student's hidden states and weight."""
    dtype, teacher_dtype = product_dtype(hidden, weight), product_dtype(*teacher)
    kept_hidden = select_rows(hidden, mask).to(dtype)
    kept_teacher = select_rows(teacher.hidden, mask).to(teacher_dtype)
    matrix = weight.to(dtype)
    transposed, teacher_transposed = matrix.t(), teacher.weight.to(teacher_dtype).t()
    loss_sum = torch.zeros((), dtype=accumulation_dtype(dtype), device=hidden.device)
    grad_hidden = torch.empty_like(kept_hidden) if wanted[0] else None
    grad_weight = torch.empty_like(weight, dtype=weight_gradient_dtype(weight, dtype)) if wanted[1] else None
    if grad_weight is not None and not len(kept_hidden):
        grad_weight.zero_()
    for i in range(0, len(kept_hidden), chunk_tokens):
        chunk = slice(i, i + chunk_tokens)
        divergence, grad_logits = _kl_divergence_chunk(
            kept_hidden[chunk] @ transposed,
            kept_teacher[chunk] @ teacher_transposed,
            temperature,
            vocab_shard,
            any(wanted),
        )
        loss_sum += divergence.sum()
        grad_logits = grad_logits.to(dtype)
        if grad_hidden is not None:
            torch.mm(grad_logits, matrix, out=grad_hidden[chunk])
        if grad_weight is not None:
            accumulate_weight_gradient(grad_weight, grad_logits, kept_hidden[chunk], first=i == 0)
        del grad_logits  # or three chunks would exist while the next two are made
    if grad_hidden is not None:
        grad_hidden = scatter_rows(grad_hidden, mask).to(hidden.dtype)
    loss_sum = loss_sum * temperature**2
    return _Result(loss_sum, grad_hidden, grad_weight if grad_weight is None else grad_weight.to(weight.dtype))


class _LinearKLDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        result = _loss_and_gradients(*args)
        ctx.gradients = [result.grad_hidden, result.grad_weight]
        return result.loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert ctx.gradients, "linear losses go backward once: their gradients are scaled in place"
        gradients, ctx.gradients = ctx.gradients, []
        return (*scale_gradients(gradients, grad_output), None, None, None, None, None, None)
