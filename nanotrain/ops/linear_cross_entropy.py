"""Cross-entropy straight from hidden states and the output matrix, without the [B, S, V] logits.

The one idea: the gradient of cross-entropy is known as soon as a chunk of logits is, so both gradients are accumulated in
the forward pass, a few hundred tokens at a time, and backward only scales them. Positions without a label cost nothing.
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
    local_labels,
    product_dtype,
    put_rows,
    select_rows,
    take_rows,
    weight_gradient_dtype,
    widened,
)
from nanotrain.ops.vocab_shard import VocabShard

IGNORE_INDEX = -100


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_shard: VocabShard | None = None,
    chunk_tokens: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    positions: Tensor | None = None,
) -> Tensor:
    """Return the sum over labelled positions of -log softmax(hidden @ weight.T)[label].

    Under autocast the products run in autocast's dtype; softmax, the sum and the accumulation of the weight's gradient
    run in fp32 (fp64 for fp64 inputs). Gradients come back in the dtypes of `hidden` and `weight`; first order only.

    Args:
        hidden: [..., D], after the final norm.
        weight: [V, D], or this rank's rows of it.
        labels: [...] int64, global ids; `ignore_index` = no loss.
        vocab_shard: where this rank's rows lie. All ranks must pass the same hidden states and labels; every rank gets
            the whole loss, the gradient of its own rows, and its *partial* gradient of `hidden`, which the engine sums.
        chunk_tokens: tokens whose logits exist at a time; None = chosen by V and device.
        ignore_index: the label that means none.
        positions: [T] int64, rising: where in the flattened `labels` one counts; None = looked up, which waits for the device.

    Returns:
        [] fp32, or fp64 for fp64 inputs.
    """
    # Read here: inside an autograd.Function grad mode is off, and needs_input_grad is true even under no_grad.
    grad_enabled = torch.is_grad_enabled()
    wanted = (grad_enabled and hidden.requires_grad, grad_enabled and weight.requires_grad)
    if positions is None:
        positions = (labels != ignore_index).flatten().nonzero()[:, 0]
    args = (hidden, weight, labels, positions, vocab_shard, chunk_tokens or default_chunk_tokens(weight), wanted)
    if any(wanted):
        return _LinearCrossEntropy.apply(*args)
    return _loss_and_gradients(*args).loss_sum


def linear_cross_entropy_ref(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Return what `linear_cross_entropy` returns, from the full logits."""
    logits = F.linear(hidden, weight)
    logits = logits.to(accumulation_dtype(logits.dtype))
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction="sum")


@torch.no_grad()
def token_log_probabilities(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_shard: VocabShard | None = None,
    chunk_tokens: int | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Return log softmax(hidden @ weight.T)[label] of every position, 0 where there is no label; no gradient.

    Arguments as for `linear_cross_entropy`.

    Returns:
        [...] in the shape of `labels`, fp32 (fp64 for fp64 inputs).
    """
    dtype = product_dtype(hidden, weight)
    mask = labels != ignore_index
    kept_hidden, kept_labels = select_rows(hidden, mask).to(dtype), labels[mask]
    transposed = weight.to(dtype).t()
    chunk = chunk_tokens or default_chunk_tokens(weight)
    losses = [
        _cross_entropy_chunk(kept_hidden[i : i + chunk] @ transposed, kept_labels[i : i + chunk], vocab_shard, False)[0]
        for i in range(0, len(kept_labels), chunk)
    ]
    out = torch.zeros(labels.shape, dtype=accumulation_dtype(dtype), device=hidden.device)
    if losses:
        out[mask] = -torch.cat(losses)
    return out


@torch.no_grad()
def token_log_probabilities_ref(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Return what `token_log_probabilities` returns, from the full logits."""
    logits = F.linear(hidden, weight)
    logits = logits.to(accumulation_dtype(logits.dtype))
    mask = labels != ignore_index
    picked = logits.log_softmax(-1).gather(-1, labels.where(mask, 0)[..., None])[..., 0]
    return picked.where(mask, 0.0)


def cross_entropy_chunk_ref(
    logits: Tensor, labels: Tensor, vocab_shard: VocabShard | None, gradient_wanted: bool
) -> tuple[Tensor, Tensor]:
    """Return the losses [C] of one chunk and their gradient by its logits [C, V]; one MAX and one SUM over ranks.

    Args:
        logits: [C, V], or this rank's columns; may be overwritten.
        labels: [C], global ids.
        vocab_shard: where the columns lie.
        gradient_wanted: False = the second result means nothing.

    Returns:
        Losses over the whole vocabulary, and the gradient in the accumulation dtype or that of the logits.
    """
    logits = widened(logits)
    local, is_local = local_labels(labels, logits.shape[1], vocab_shard)
    local = local[:, None]
    label_logits = logits.gather(1, local)
    maxima = all_reduce_max(logits.amax(-1, keepdim=True), vocab_shard)
    label_logits = label_logits - maxima
    if is_local is not None:
        label_logits = label_logits * is_local[:, None]
    exponentials = logits.sub_(maxima).exp_()
    sums, label_logits = all_reduce_sum(torch.stack([exponentials.sum(-1), label_logits[:, 0]]), vocab_shard).unbind()
    losses = sums.log() - label_logits
    if not gradient_wanted:
        return losses, exponentials
    gradient = exponentials.div_(sums[:, None])
    ones = torch.ones_like(local, dtype=gradient.dtype)
    return losses, gradient.scatter_add_(1, local, -ones if is_local is None else -ones * is_local[:, None])


def _cross_entropy_chunk(
    logits: Tensor, labels: Tensor, vocab_shard: VocabShard | None, gradient_wanted: bool
) -> tuple[Tensor, Tensor]:
    chunk = kernel_for("cross_entropy", logits) or cross_entropy_chunk_ref
    return chunk(logits, labels, vocab_shard, gradient_wanted)


class _Result(NamedTuple):
    loss_sum: Tensor
    grad_hidden: Tensor | None
    grad_weight: Tensor | None


def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    positions: Tensor,
    vocab_shard: VocabShard | None,
    chunk_tokens: int,
    wanted: tuple[bool, bool],
) -> _Result:
    """Return the loss and, where wanted, its gradients by hidden states and weight."""
    dtype = product_dtype(hidden, weight)
    kept_hidden, kept_labels = take_rows(hidden, positions).to(dtype), labels.flatten().index_select(0, positions)
    matrix = weight.to(dtype)
    transposed = matrix.t()
    loss_sum = torch.zeros((), dtype=accumulation_dtype(dtype), device=hidden.device)
    grad_hidden = torch.empty_like(kept_hidden) if wanted[0] else None
    grad_weight = torch.empty_like(weight, dtype=weight_gradient_dtype(weight, dtype)) if wanted[1] else None
    if grad_weight is not None and not len(kept_labels):
        grad_weight.zero_()
    for i in range(0, len(kept_labels), chunk_tokens):
        chunk = slice(i, i + chunk_tokens)
        losses, grad_logits = _cross_entropy_chunk(
            kept_hidden[chunk] @ transposed, kept_labels[chunk], vocab_shard, any(wanted)
        )
        loss_sum += losses.sum()
        grad_logits = grad_logits.to(dtype)
        if grad_hidden is not None:
            torch.mm(grad_logits, matrix, out=grad_hidden[chunk])
        if grad_weight is not None:
            accumulate_weight_gradient(grad_weight, grad_logits, kept_hidden[chunk], first=i == 0)
        del grad_logits  # or two chunks would exist while the next one is made
    if grad_hidden is not None:
        grad_hidden = put_rows(grad_hidden, positions, labels.shape).to(hidden.dtype)
    return _Result(loss_sum, grad_hidden, grad_weight if grad_weight is None else grad_weight.to(weight.dtype))


class _LinearCrossEntropy(torch.autograd.Function):
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
        return (*scale_gradients(gradients, grad_output), None, None, None, None, None)
