"""Chunked state space dual (SSD) scan of Mamba-2: in plain PyTorch, or by the kernel that ops/backends.py chose.

Per head: S_t = exp(dt_t A) S_{t-1} + dt_t x_t (outer) B_t and y_t = S_t C_t + D x_t, with B and C shared by the heads
of a group. Within a chunk of L positions the recurrence is a masked matrix product; states pass from chunk to chunk
(Dao and Gu 2024, "Transformers are SSMs", section 6). dt is never clamped.

Layout: everything runs as [B, c, G, R, P, L] (chunks c, groups G, heads per group R). L is innermost because all
factors that vary along the sequence (dt and decays) then multiply contiguous rows, and B and C need not be repeated
for the heads of their group.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanotrain.ops.backends import kernel_for
from nanotrain.ops.segments import segment_indices

KERNEL_STATE_SIZES = (16, 32, 64, 128, 256)


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    chunk_size: int,
    segment_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over whole sequences; fp32 inside (fp64 when x is), whatever autocast says.

    A GPU kernel keeps states and decays in fp32 and multiplies in x's dtype.

    Args:
        x: [B, S, H, P].
        dt: [B, S, H], positive (after softplus); where it is 0 the position changes no state.
        A: [H], negative.
        B: [B, S, G, N]; head h reads group h // (H / G).
        C: [B, S, G, N].
        D: [H].
        chunk_size: positions per chunk; changes speed, not the result. S need not be a multiple.
        segment_ids: [B, S]; the state starts from zero where the id changes.
        initial_state: [B, H, P, N], the state before the first position; it belongs to the first document.

    Returns:
        y [B, S, H, P] in x's dtype, and the state after the last position [B, H, P, N] in the inner dtype.
    """
    kernel = kernel_for("ssd", x)
    if kernel is not None and x.shape[-1] >= 16 and B.shape[-1] in KERNEL_STATE_SIZES:
        return kernel(x, dt, A, B, C, D, chunk_size=chunk_size, segment_ids=segment_ids, initial_state=initial_state)
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return _scan(
            x, dt.to(dtype), A.to(dtype), B.to(dtype), C.to(dtype), D.to(dtype), chunk_size, segment_ids, initial_state
        )


def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    chunk_size: int,
    segment_ids: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, length, num_heads, _ = x.shape
    num_groups, dtype = B.shape[2], dt.dtype
    chunk = min(chunk_size, length)
    padding = -length % chunk
    index = None if segment_ids is None else segment_indices(segment_ids)
    wide = x.to(dtype)
    x_in, B_in, C_in, dt_in = wide, B, C, dt
    if padding:  # dt = 0 leaves the state as it is
        x_in, B_in, C_in = (F.pad(t, (0, 0, 0, 0, 0, padding)) for t in (wide, B, C))
        dt_in = F.pad(dt, (0, 0, 0, padding))
        index = None if index is None else torch.cat([index, index[:, -1:].expand(-1, padding)], dim=1)
    heads = (num_groups, num_heads // num_groups)
    xs = x_in.unflatten(1, (-1, chunk)).unflatten(3, heads).permute(0, 1, 3, 4, 5, 2).contiguous()  # [b c G R P L]
    dts = dt_in.unflatten(1, (-1, chunk)).unflatten(3, heads).permute(0, 1, 3, 4, 2).contiguous()  # [b c G R L]
    Bs, Cs = (t.unflatten(1, (-1, chunk)).transpose(2, 3).contiguous() for t in (B_in, C_in))  # [b c G L N]
    borders = _Borders.of(index, chunk, x.device)

    decay_from_start = (dts * A.view(*heads, 1)).cumsum(-1)  # log of the decay from the chunk's start to each position
    xdt = xs * dts[..., None, :]
    within = _WithinChunks.apply(xdt, Cs @ Bs.transpose(-1, -2), decay_from_start, borders.hidden)

    to_end = (decay_from_start[..., -1:] - decay_from_start).exp()
    from_start = decay_from_start.exp()
    if borders.reaches_end is not None and borders.reached_from_start is not None:
        to_end, from_start = to_end * borders.reaches_end, from_start * borders.reached_from_start
    added = (xdt * to_end[..., None, :]).flatten(3, 4) @ Bs  # [b c G RP N]
    before, final_state = _pass_states(added, from_start[..., -1], initial_state)
    across = (before @ Cs.transpose(-1, -2)).unflatten(3, (heads[1], -1))  # [b c G R P L]
    y = torch.addcmul(within, across, from_start[..., None, :])
    y = y.permute(0, 1, 5, 2, 3, 4).reshape(batch, length + padding, num_heads, -1)[:, :length]
    return torch.addcmul(y, wide, D[:, None]).to(x.dtype), final_state.reshape(batch, num_heads, -1, B.shape[-1])


class _Borders:
    """Document borders as seen from the chunks; broadcast over [b c G R ...]."""

    def __init__(self, hidden: Tensor, reaches_end: Tensor | None, reached_from_start: Tensor | None) -> None:
        self.hidden = hidden
        """[L, L] or [b c 1 1 L L] bool: position i (row) must not read position j (column)."""
        self.reaches_end = reaches_end
        """[b c 1 1 L], 1 where a position and the chunk's last one share a document."""
        self.reached_from_start = reached_from_start
        """[b c 1 1 L], 1 where a position continues the document that the chunk before ended with."""

    @classmethod
    def of(cls, index: Tensor | None, chunk: int, device: torch.device) -> "_Borders":
        """Args: index [B, c x L], running document numbers, or None for one document a row."""
        future = torch.ones(chunk, chunk, dtype=torch.bool, device=device).triu(1)
        if index is None:
            return cls(future, None, None)
        own = index.unflatten(1, (-1, chunk))
        previous = torch.cat([own[:, :1, 0], own[:, :-1, -1]], dim=1)  # a row starts inside its first document
        hidden = future | (own[..., :, None] != own[..., None, :])
        reaches_end, reached = own == own[..., -1:], own == previous[..., None]
        return cls(hidden[:, :, None, None], reaches_end[:, :, None, None], reached[:, :, None, None])


class _WithinChunks(torch.autograd.Function):
    """y = xdt @ (scores * decay)^T per head; its own backward saves half of autograd's passes over [L, L].

    xdt [b c G R P L], scores [b c G L L] (C_i . B_j), decay_from_start [b c G R L], hidden as in _Borders.
    """

    @staticmethod
    def forward(ctx: Any, xdt: Tensor, scores: Tensor, decay_from_start: Tensor, hidden: Tensor) -> Tensor:
        decay = decay_from_start[..., :, None] - decay_from_start[..., None, :]
        decay.masked_fill_(hidden, -torch.inf).exp_()
        weights = decay * scores[:, :, :, None]
        ctx.save_for_backward(xdt, scores, decay, weights)
        return xdt @ weights.transpose(-1, -2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        xdt, scores, decay, weights = ctx.saved_tensors
        (grad_y,) = grad_outputs
        grad_xdt = grad_y @ weights
        grad_weights = grad_y.transpose(-1, -2) @ xdt
        grad_scores_by_head = grad_weights.mul_(decay)
        grad_scores = grad_scores_by_head.sum(3)
        grad_log = grad_scores_by_head.mul_(scores[:, :, :, None])  # with respect to the log of the decay
        return grad_xdt, grad_scores, grad_log.sum(-1) - grad_log.sum(-2), None


def _pass_states(added: Tensor, decay: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Carry states from chunk to chunk.

    Args:
        added: [b c G RP N], what each chunk adds to the state.
        decay: [b c G R], what is left of the state after each chunk.
        initial_state: [B, H, P, N] or None.

    Returns:
        The state before each chunk [b c G RP N], and the one after the last [b G RP N].
    """
    batch, num_chunks, groups, width, size = added.shape
    factor = decay.repeat_interleave(width // decay.shape[-1], dim=-1)[..., None]
    state = added.new_zeros(batch, groups, width, size)
    if initial_state is not None:
        state = initial_state.to(added.dtype).reshape(state.shape)
    before = []
    for i in range(num_chunks):
        before.append(state)
        state = torch.addcmul(added[:, i], state, factor[:, i])
    return torch.stack(before, dim=1), state


def ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One position of the recurrence, for decoding.

    Args:
        x: [B, H, P].
        dt: [B, H].
        A: [H], negative.
        B: [B, G, N].
        C: [B, G, N].
        D: [H].
        state: [B, H, P, N] fp32 (or fp64).

    Returns:
        y [B, H, P] in x's dtype and the new state.
    """
    heads = (B.shape[1], x.shape[1] // B.shape[1])
    dtype = state.dtype
    with torch.autocast(x.device.type, enabled=False):
        dt = dt.to(dtype)
        xdt = (x.to(dtype) * dt[..., None]).unflatten(1, heads).flatten(2, 3)  # [B, G, RP]
        added = xdt[..., None] * B.to(dtype)[:, :, None]
        factor = (dt * A.to(dtype)).exp()[..., None, None]
        new_state = torch.addcmul(added.view(state.shape), state, factor)
        y = (new_state.view(added.shape) @ C.to(dtype)[..., None]).view(x.shape)
        return torch.addcmul(y, x.to(dtype), D.to(dtype)[:, None]).to(x.dtype), new_state


def ssd_scan_ref(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    chunk_size: int = 0,
    segment_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Slow twin of `ssd_scan`: fp64, position by position, as the recurrence is written; chunk_size has no meaning."""
    del chunk_size
    batch, length, num_heads, head_dim = x.shape
    repeat = num_heads // B.shape[2]
    xd, dtd, Ad, Dd = x.double(), dt.double(), A.double(), D.double()
    Bd, Cd = B.double().repeat_interleave(repeat, dim=2), C.double().repeat_interleave(repeat, dim=2)
    state = xd.new_zeros(batch, num_heads, head_dim, B.shape[-1])
    if initial_state is not None:
        state = initial_state.double()
    outputs = []
    for t in range(length):
        if segment_ids is not None and t > 0:
            state = state * (segment_ids[:, t] == segment_ids[:, t - 1]).double()[:, None, None, None]
        decay = torch.exp(dtd[:, t] * Ad)[..., None, None]
        state = decay * state + (dtd[:, t, :, None] * xd[:, t])[..., None] * Bd[:, t, :, None]
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, Cd[:, t]) + Dd[:, None] * xd[:, t])
    return torch.stack(outputs, dim=1).to(x.dtype), state.to(torch.promote_types(x.dtype, torch.float32))
