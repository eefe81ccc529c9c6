"""Causal grouped-query attention without position embedding."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nanotrain.ops.backends import kernel_for
from nanotrain.ops.segments import segment_indices


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, segment_ids: Tensor | None = None, num_cached: Tensor | None = None
) -> Tensor:
    """Return causal softmax attention with scale 1 / sqrt(Dh).

    Args:
        q: [B, S, Hq, Dh].
        k: [B, T, Hkv, Dh]; T = S without a cache. Query head h reads key head h // (Hq / Hkv).
        v: [B, T, Hkv, Dh].
        segment_ids: [B, S]; a query sees keys of its own document only. Not together with `num_cached`.
        num_cached: [B], keys that come before the first query of each row; query s sees keys 0 ... num_cached + s,
            and keys behind that are free space of a cache.

    Returns:
        [B, S, Hq, Dh].
    """
    assert segment_ids is None or num_cached is None, "a cache holds one document a row"
    if num_cached is not None and q.shape[1] == 1:
        return _attention_one_query(q, k, v, num_cached)
    kernel = kernel_for("attention", q)
    if kernel is not None and num_cached is None and q.dtype != torch.float32 and q.shape[-1] % 8 == 0:
        return kernel(q, k, v, segment_ids)
    heads_per_group = q.shape[2] // k.shape[2]
    if heads_per_group > 1:
        k, v = (x.repeat_interleave(heads_per_group, dim=2) for x in (k, v))
    mask = None
    if segment_ids is not None or num_cached is not None:
        mask = _visible(q.shape[1], k.shape[1], q.device, segment_ids, num_cached)[:, None]
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=mask is None
    )
    return y.transpose(1, 2)


def _attention_one_query(q: Tensor, k: Tensor, v: Tensor, num_cached: Tensor) -> Tensor:
    """Decode: the query heads of a group become the query positions of one head, so that no key is copied."""
    visible = torch.arange(k.shape[1], device=q.device) <= num_cached[:, None]
    y = F.scaled_dot_product_attention(
        q[:, 0].unflatten(1, (k.shape[2], -1)), k.transpose(1, 2), v.transpose(1, 2), attn_mask=visible[:, None, None]
    )
    return y.flatten(1, 2)[:, None]


def _visible(
    num_queries: int, num_keys: int, device: torch.device, segment_ids: Tensor | None, num_cached: Tensor | None
) -> Tensor:
    """Return [B or 1, S, T] bool: which keys a query may see."""
    query, key = torch.arange(num_queries, device=device), torch.arange(num_keys, device=device)
    if num_cached is not None:
        return key <= num_cached[:, None, None] + query[None, :, None]
    visible = (key <= query[:, None])[None]
    if segment_ids is not None:
        index = segment_indices(segment_ids)
        visible = visible & (index[:, :, None] == index[:, None, :])
    return visible


def attention_ref(
    q: Tensor, k: Tensor, v: Tensor, *, segment_ids: Tensor | None = None, num_cached: Tensor | None = None
) -> Tensor:
    """Slow twin of `attention`: fp64, one query and head at a time."""
    batch, num_queries, num_heads, head_dim = q.shape
    rows = []
    for b in range(batch):
        for s in range(num_queries):
            last = s if num_cached is None else int(num_cached[b]) + s
            first = 0
            if segment_ids is not None:
                while first < s and bool((segment_ids[b, first:s] != segment_ids[b, first + 1 : s + 1]).any()):
                    first += 1
            for h in range(num_heads):
                group = h * k.shape[2] // num_heads
                keys, values = (x[b, first : last + 1, group].double() for x in (k, v))
                rows.append(torch.softmax(keys @ q[b, s, h].double() / math.sqrt(head_dim), dim=0) @ values)
    return torch.stack(rows).reshape(q.shape).to(q.dtype)
