"""One chunk of cross-entropy or KL in two passes over its logits, which the gradient overwrites: no fp32 copy, no extra buffer.

Per row, the first kernel leaves maximum and sums, which ranks that share a vocabulary combine; the second writes the gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanotrain.ops.vocab_chunks import all_reduce_max, all_reduce_sum, local_labels
from nanotrain.ops.vocab_shard import VocabShard

_BLOCK = 4096
_LOWEST = tl.constexpr(-1e30)  # finite, so that the difference of two of them is


@triton.jit
def _row_statistics(logits_ptr, maxima_ptr, sums_ptr, width: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    maxima = tl.full((BLOCK,), _LOWEST, tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + row * width + columns, mask=columns < width, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(maxima, x)
        sums = sums * tl.exp(maxima - higher) + tl.exp(x - higher)
        maxima = higher
    maximum = tl.max(maxima, axis=0)
    tl.store(maxima_ptr + row, maximum)
    tl.store(sums_ptr + row, tl.sum(sums * tl.exp(maxima - maximum), axis=0))


@triton.jit
def _softmax_gradient(logits_ptr, maxima_ptr, sums_ptr, labels_ptr, width: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(logits_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    p = tl.exp(x - tl.load(maxima_ptr + row)) / tl.load(sums_ptr + row)
    tl.store(logits_ptr + row * width + columns, p - (columns == tl.load(labels_ptr + row)).to(tl.float32), mask=inside)


@triton.jit
def _cross_entropy_rows(logits_ptr, maxima_ptr, sums_ptr, labels_ptr, width: tl.constexpr, BLOCK: tl.constexpr):
    """Both of the above for a whole vocabulary: the second pass finds the row in the L2 cache."""
    row = tl.program_id(0).to(tl.int64)
    maxima = tl.full((BLOCK,), _LOWEST, tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + row * width + columns, mask=columns < width, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(maxima, x)
        sums = sums * tl.exp(maxima - higher) + tl.exp(x - higher)
        maxima = higher
    maximum = tl.max(maxima, axis=0)
    total = tl.sum(sums * tl.exp(maxima - maximum), axis=0)
    tl.store(maxima_ptr + row, maximum)
    tl.store(sums_ptr + row, total)
    scale = 1.0 / total
    label = tl.load(labels_ptr + row)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        x = tl.load(logits_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.exp(x - maximum) * scale - (columns == label).to(tl.float32)
        tl.store(logits_ptr + row * width + columns, gradient, mask=inside)


@triton.jit
def _pair_statistics(
    student_ptr, teacher_ptr, out_ptr, rows, inverse_temperature, width: tl.constexpr, BLOCK: tl.constexpr
):
    """Leave per row: maxima of student and teacher, sums of both exponentials, sum of exp(teacher) (teacher - student)."""
    row = tl.program_id(0).to(tl.int64)
    high_s = tl.full((BLOCK,), _LOWEST, tl.float32)
    high_t = tl.full((BLOCK,), _LOWEST, tl.float32)
    sum_s = tl.zeros((BLOCK,), tl.float32)
    sum_t = tl.zeros((BLOCK,), tl.float32)
    cross = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        s = tl.load(student_ptr + row * width + columns, mask=inside, other=_LOWEST).to(tl.float32)
        t = tl.load(teacher_ptr + row * width + columns, mask=inside, other=_LOWEST).to(tl.float32)
        s = tl.where(inside, s * inverse_temperature, s)
        t = tl.where(inside, t * inverse_temperature, t)
        new_s, new_t = tl.maximum(high_s, s), tl.maximum(high_t, t)
        down_s, down_t = high_s - new_s, high_t - new_t
        weight = tl.where(inside, tl.exp(t - new_t), 0.0)
        # A shift of both maxima shifts every earlier difference alike.
        cross = tl.exp(down_t) * (cross + sum_t * (down_t - down_s)) + weight * ((t - new_t) - (s - new_s))
        sum_s = sum_s * tl.exp(down_s) + tl.where(inside, tl.exp(s - new_s), 0.0)
        sum_t = sum_t * tl.exp(down_t) + weight
        high_s, high_t = new_s, new_t
    max_s, max_t = tl.max(high_s, axis=0), tl.max(high_t, axis=0)
    down_s, down_t = high_s - max_s, high_t - max_t
    total = tl.exp(down_t) * (cross + sum_t * (down_t - down_s))
    tl.store(out_ptr + row, max_s)
    tl.store(out_ptr + rows + row, max_t)
    tl.store(out_ptr + 2 * rows + row, tl.sum(sum_s * tl.exp(down_s), axis=0))
    tl.store(out_ptr + 3 * rows + row, tl.sum(sum_t * tl.exp(down_t), axis=0))
    tl.store(out_ptr + 4 * rows + row, tl.sum(total, axis=0))


@triton.jit
def _pair_gradient(
    student_ptr,
    teacher_ptr,
    statistics_ptr,
    rows,
    inverse_temperature,
    temperature,
    width: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    at = row * width + columns
    s = tl.load(student_ptr + at, mask=inside, other=0.0).to(tl.float32) * inverse_temperature
    t = tl.load(teacher_ptr + at, mask=inside, other=0.0).to(tl.float32) * inverse_temperature
    p_s = tl.exp(s - tl.load(statistics_ptr + row)) / tl.load(statistics_ptr + 2 * rows + row)
    p_t = tl.exp(t - tl.load(statistics_ptr + rows + row)) / tl.load(statistics_ptr + 3 * rows + row)
    tl.store(student_ptr + at, (p_s - p_t) * temperature, mask=inside)


def cross_entropy_chunk(
    logits: Tensor, labels: Tensor, vocab_shard: VocabShard | None, gradient_wanted: bool
) -> tuple[Tensor, Tensor]:
    """See ops.linear_cross_entropy.cross_entropy_chunk_ref."""
    rows, width = logits.shape
    local, is_local = local_labels(labels, width, vocab_shard)
    label_logits = logits.gather(1, local[:, None])[:, 0].float()
    statistics = torch.empty(2, rows, dtype=torch.float32, device=logits.device)
    local_maxima, sums = statistics.unbind()
    if vocab_shard is None and gradient_wanted:
        _cross_entropy_rows[(rows,)](logits, local_maxima, sums, local, width, BLOCK=2 * _BLOCK, num_warps=16)
        return sums.log() + local_maxima - label_logits, logits
    _row_statistics[(rows,)](logits, local_maxima, sums, width, BLOCK=_BLOCK, num_warps=8)
    maxima = all_reduce_max(local_maxima.clone(), vocab_shard)
    label_logits = label_logits - maxima
    if is_local is not None:
        label_logits, local = label_logits * is_local, local.where(is_local, -1)
    reduced = all_reduce_sum(torch.stack([sums * (local_maxima - maxima).exp(), label_logits]), vocab_shard)
    if gradient_wanted:
        grid = (rows, triton.cdiv(width, _BLOCK))
        _softmax_gradient[grid](logits, maxima, reduced[0], local, width, BLOCK=_BLOCK, num_warps=8)
    return reduced[0].log() - reduced[1], logits


def kl_divergence_chunk(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    vocab_shard: VocabShard | None,
    gradient_wanted: bool,
) -> tuple[Tensor, Tensor]:
    """See ops.kl_divergence.kl_divergence_chunk_ref."""
    rows, width = student_logits.shape
    statistics = torch.empty(5, rows, dtype=torch.float32, device=student_logits.device)
    _pair_statistics[(rows,)](
        student_logits, teacher_logits, statistics, rows, 1.0 / temperature, width, BLOCK=_BLOCK // 2, num_warps=8
    )
    if vocab_shard is not None:
        maxima = all_reduce_max(statistics[:2].clone(), vocab_shard)
        down_s, down_t = (statistics[:2] - maxima).unbind()
        sum_s, sum_t, cross = statistics[2:].unbind()
        cross = down_t.exp() * (cross + sum_t * (down_t - down_s))
        sums = all_reduce_sum(torch.stack([sum_s * down_s.exp(), sum_t * down_t.exp(), cross]), vocab_shard)
        statistics = torch.cat([maxima, sums])
    _, _, sum_s, sum_t, cross = statistics.unbind()
    if gradient_wanted:
        grid = (rows, triton.cdiv(width, _BLOCK))
        _pair_gradient[grid](
            student_logits, teacher_logits, statistics, rows, 1.0 / temperature, temperature, width,
            BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    return cross / sum_t - sum_t.log() + sum_s.log(), student_logits
