"""What the chunked losses over a vocabulary share: dtypes, the length of a chunk, and one softmax over all ranks."""

import torch
from torch import Tensor

from nanotrain.ops.vocab_shard import VocabShard

CPU_LOGITS_PER_CHUNK = 2**22
"""16 MiB of fp32: 512 tokens at V = 8192, the flat optimum of 128 ... 1024 on two Zen 4 threads."""
GPU_LOGITS_PER_CHUNK = 2**27
"""512 MiB of fp32: 1024 tokens at V = 131072."""


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


def logits_of(hidden: Tensor, transposed_weight: Tensor) -> Tensor:
    """Return hidden [C, D] @ transposed_weight [D, V] in the accumulation dtype, as a tensor that may be overwritten."""
    logits = hidden @ transposed_weight
    return logits.to(accumulation_dtype(logits.dtype))


def all_reduce_max(values: Tensor, vocab_shard: VocabShard | None) -> Tensor:
    """Return the element-wise maximum over the ranks of the shard; `values` itself without one."""
    return values if vocab_shard is None else vocab_shard.all_reduce_max(values)


def all_reduce_sum(values: Tensor, vocab_shard: VocabShard | None) -> Tensor:
    """Return the element-wise sum over the ranks of the shard; `values` itself without one."""
    return values if vocab_shard is None else vocab_shard.all_reduce_sum(values)


def accumulate_weight_gradient(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """Add grad_logits.T @ hidden to `total` [V, D] in the dtype of `total`.

    bf16 products are added to an fp32 total: summing chunks in bf16 loses all but the first few of them.
    """
    if total.dtype == hidden.dtype:
        total.addmm_(grad_logits.t(), hidden)
    else:
        total.add_(grad_logits.t() @ hidden)


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
