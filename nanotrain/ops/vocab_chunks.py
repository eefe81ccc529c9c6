"""What the chunked losses over a vocabulary share: dtypes, the length of a chunk, and one softmax over all ranks."""

import torch
from torch import Tensor

from nanotrain.ops.vocab_shard import VocabShard

CPU_LOGITS_PER_CHUNK = 2**22
"""16 MiB of fp32: 512 tokens at V = 8192, the flat optimum of 128 ... 1024 on two Zen 4 threads."""
GPU_LOGITS_PER_CHUNK = 13 * 2**25
"""832 MiB of bf16: 3328 tokens at V = 131072, whose products fill an H200's multiprocessors evenly and whose three passes
over the weight's gradient cost little (docs/benchmarks/memory_h200_202611.md)."""


def default_chunk_tokens(weight: Tensor) -> int:
    """Return how many tokens' logits over `weight` [V, D] should exist at a time."""
    budget = CPU_LOGITS_PER_CHUNK if weight.device.type == "cpu" else GPU_LOGITS_PER_CHUNK
    return max(budget // weight.shape[0], 16)


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype in which hidden @ weight.T runs: autocast's where it is on, else that of the operands."""
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return torch.promote_types(hidden.dtype, weight.dtype)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of softmax, sums and gradient accumulators for products in `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(logits: Tensor) -> Tensor:
    """Return `logits` in the accumulation dtype; what it returns may be overwritten."""
    return logits.to(accumulation_dtype(logits.dtype))


def local_labels(labels: Tensor, rows: int, vocab_shard: VocabShard | None) -> tuple[Tensor, Tensor | None]:
    """Return the row of this rank's weight for each of `labels` [C], clamped into range, and whether it is there.

    The second is None when all rows are here.
    """
    if vocab_shard is None:
        return labels, None
    local = labels - vocab_shard.first_row
    return local.clamp(0, rows - 1), (local >= 0) & (local < rows)


def all_reduce_max(values: Tensor, vocab_shard: VocabShard | None) -> Tensor:
    """Return the element-wise maximum over the ranks of the shard; `values` itself without one."""
    return values if vocab_shard is None else vocab_shard.all_reduce_max(values)


def all_reduce_sum(values: Tensor, vocab_shard: VocabShard | None) -> Tensor:
    """Return the element-wise sum over the ranks of the shard; `values` itself without one."""
    return values if vocab_shard is None else vocab_shard.all_reduce_sum(values)


def weight_gradient_dtype(weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the gradient of `weight` is summed over chunks, for products in `dtype`.

    On the CPU, where chunks are many, that is fp32. A GPU adds its few chunks within the product, which sums in fp32 and
    rounds once a chunk: a bf16 weight needs no fp32 copy of its gradient there.
    """
    if weight.is_cuda and weight.dtype == dtype:
        return dtype
    return accumulation_dtype(dtype)


def accumulate_weight_gradient(total: Tensor, grad_logits: Tensor, hidden: Tensor, *, first: bool) -> None:
    """Add grad_logits.T @ hidden to `total` [V, D] in the dtype of `total`; the first chunk overwrites it."""
    if total.dtype == hidden.dtype:
        if first:
            torch.mm(grad_logits.t(), hidden, out=total)
        else:
            total.addmm_(grad_logits.t(), hidden)
    elif total.is_cuda:  # the product itself adds to fp32
        torch.addmm(total, grad_logits.t(), hidden, beta=0 if first else 1, out_dtype=total.dtype, out=total)
    else:
        product = grad_logits.t() @ hidden
        total.copy_(product) if first else total.add_(product)


def select_rows(tensor: Tensor, mask: Tensor) -> Tensor:
    """Return the rows of `tensor` [..., D] where `mask` [...] holds, [T, D]; a view when all rows do."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if bool(mask.all()) else flat[mask.reshape(-1)]


def scatter_rows(rows: Tensor, mask: Tensor) -> Tensor:
    """Undo `select_rows`: return [..., D] with `rows` [T, D] where `mask` [...] holds and 0 elsewhere."""
    flat = mask.reshape(-1)
    if rows.shape[0] != flat.numel():
        whole = rows.new_zeros(flat.numel(), rows.shape[-1])
        whole[flat] = rows
        rows = whole
    return rows.view(*mask.shape, rows.shape[-1])


def take_rows(tensor: Tensor, positions: Tensor) -> Tensor:
    """Return the rows of `tensor` [..., D] at `positions` [T] of its flattened rows; a view when they are all of them.

    Unlike a mask, positions tell how many rows come out without waiting for the device.
    """
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if len(positions) == len(flat) else flat.index_select(0, positions)


def put_rows(rows: Tensor, positions: Tensor, shape: torch.Size) -> Tensor:
    """Undo `take_rows`: return [*shape, D] with `rows` [T, D] at `positions` and 0 elsewhere."""
    if len(positions) != shape.numel():
        whole = rows.new_zeros(shape.numel(), rows.shape[-1])
        rows = whole.index_copy_(0, positions, rows)
    return rows.view(*shape, rows.shape[-1])
