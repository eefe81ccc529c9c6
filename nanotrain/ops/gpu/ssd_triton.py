"""The SSD scan in five Triton kernels; what passes between them is the states, in x's dtype.

Forward: one program per head walks along the chunks with the state in registers and writes the state before each chunk;
then all chunks' outputs are computed at once. Backward: the states again, their gradients by the same walk in reverse,
and three kernels for the paths of a gradient (reading the state, adding to it, within the chunk). Their programs serve
all heads of a group, so that the gradients of B and C are summed in registers. Three, because the tiles of one that does
everything do not fit into registers: it spilled a kilobyte a thread.

The head width need not be a power of two: it is cut into two parts that are (80 = 64 + 16), instead of being padded.
Math and names as in ops/ssd.py; s is the running sum of dt * A within a chunk.
"""

import triton
import triton.language as tl


@triton.jit
def _chunk_decays(
    dt_ptr, index_ptr, a, at, length, first, HAS_INDEX: tl.constexpr, Q: tl.constexpr
):  # fmt: skip
    """Return dt, s, the sum over the chunk, and which positions continue from before it and reach its end."""
    dt = tl.load(dt_ptr + at, mask=at < length, other=0.0)
    log_decay = dt * a
    s = tl.cumsum(log_decay, axis=0)
    total = tl.sum(log_decay, axis=0)
    if HAS_INDEX:
        index = tl.load(index_ptr + tl.minimum(at, length - 1))
        last = tl.load(index_ptr + tl.minimum(first + Q, length) - 1)
        previous = tl.load(index_ptr + tl.maximum(first - 1, 0))
        from_start = tl.where(index == previous, tl.exp(s), 0.0)
        to_end = tl.where(index == last, tl.exp(total - s), 0.0)
        through = tl.where(last == previous, tl.exp(total), 0.0)
    else:
        index = tl.zeros((Q,), dtype=tl.int32)
        from_start = tl.exp(s)
        to_end = tl.exp(total - s)
        through = tl.exp(total)
    return dt, s, index, from_start, to_end, through


@triton.jit
def _decay_matrix(s, index, HAS_INDEX: tl.constexpr, Q: tl.constexpr):
    """Return exp(s_i - s_j) [i, j] where position i reads position j, else 0."""
    row, column = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    reads = row >= column
    if HAS_INDEX:
        reads = reads & (index[:, None] == index[None, :])
    return tl.where(reads, tl.exp(tl.minimum(s[:, None] - s[None, :], 0.0)), 0.0)


@triton.jit
def walk_states(
    value_ptr, inner_ptr, dt_ptr, a_ptr, index_ptr, initial_ptr, states_ptr, final_ptr,
    length, num_chunks, heads_per_group, num_heads,
    stride_value_b, stride_value_s, stride_inner_b, stride_inner_s,
    HAS_INDEX: tl.constexpr, HAS_INITIAL: tl.constexpr, REVERSE: tl.constexpr,
    Q: tl.constexpr, N: tl.constexpr, P: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
):  # fmt: skip
    """Carry [N, P] along the chunks of one head and write it at each.

    Forward: value = x, inner = B; what is written is the state before each chunk. In reverse: value = the gradient of y,
    inner = C; what is written is the gradient of the state after each chunk.
    """
    head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    value_ptr += batch * stride_value_b + head * P
    inner_ptr += batch * stride_inner_b + (head // heads_per_group) * N
    dt_ptr += (batch * num_heads + head) * length
    index_ptr += batch * length
    a = tl.load(a_ptr + head)
    n, p0, p1 = tl.arange(0, N), tl.arange(0, P0), P0 + tl.arange(0, P1)
    inside0, inside1 = (n[:, None] < N) & (p0[None, :] < P), (n[:, None] < N) & (p1[None, :] < P)
    tile0, tile1 = n[:, None] * P + p0[None, :], n[:, None] * P + p1[None, :]
    state0 = tl.zeros((N, P0), dtype=tl.float32)
    state1 = tl.zeros((N, P1), dtype=tl.float32)
    whole = (batch * num_heads + head) * N * P
    if HAS_INITIAL:
        state0 = tl.load(initial_ptr + whole + tile0, mask=inside0, other=0.0).to(tl.float32)
        state1 = tl.load(initial_ptr + whole + tile1, mask=inside1, other=0.0).to(tl.float32)
    for step in range(num_chunks):
        chunk = num_chunks - 1 - step if REVERSE else step
        first = chunk * Q
        at = first + tl.arange(0, Q)
        valid = at[:, None] < length
        rows = at[:, None].to(tl.int64)
        inner = tl.load(inner_ptr + rows * stride_inner_s + n[None, :], mask=valid, other=0.0)
        value0 = tl.load(value_ptr + rows * stride_value_s + p0[None, :], mask=valid & (p0[None, :] < P), other=0.0)
        value1 = tl.load(value_ptr + rows * stride_value_s + p1[None, :], mask=valid & (p1[None, :] < P), other=0.0)
        dt, s, index, from_start, to_end, through = _chunk_decays(dt_ptr, index_ptr, a, at, length, first, HAS_INDEX, Q)
        out = states_ptr + ((batch * num_chunks + chunk) * num_heads + head) * N * P
        tl.store(out + tile0, state0.to(states_ptr.dtype.element_ty), mask=inside0)
        tl.store(out + tile1, state1.to(states_ptr.dtype.element_ty), mask=inside1)
        weight = from_start if REVERSE else to_end * dt
        dtype = inner.dtype
        transposed = tl.trans(inner)
        state0 = state0 * through + tl.dot(transposed, (value0 * weight[:, None]).to(dtype))
        state1 = state1 * through + tl.dot(transposed, (value1 * weight[:, None]).to(dtype))
    tl.store(final_ptr + whole + tile0, state0, mask=inside0)
    tl.store(final_ptr + whole + tile1, state1, mask=inside1)


@triton.jit
def chunk_outputs(
    x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, index_ptr, states_ptr, y_ptr,
    length, num_chunks, heads_per_group, num_heads,
    stride_x_b, stride_x_s, stride_b_b, stride_b_s, stride_c_b, stride_c_s,
    HAS_INDEX: tl.constexpr, HEADS: tl.constexpr,
    Q: tl.constexpr, N: tl.constexpr, P: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
):  # fmt: skip
    """Write y of one chunk for HEADS heads of one group."""
    chunk, part, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_head = part * HEADS
    group = first_head // heads_per_group
    first = chunk * Q
    at = first + tl.arange(0, Q)
    rows = at[:, None].to(tl.int64)
    valid = at[:, None] < length
    n, p0, p1 = tl.arange(0, N), tl.arange(0, P0), P0 + tl.arange(0, P1)
    inside0, inside1 = valid & (p0[None, :] < P), valid & (p1[None, :] < P)
    b = tl.load(b_ptr + batch * stride_b_b + rows * stride_b_s + group * N + n[None, :], mask=valid, other=0.0)
    c = tl.load(c_ptr + batch * stride_c_b + rows * stride_c_s + group * N + n[None, :], mask=valid, other=0.0)
    dtype = b.dtype
    scores = tl.dot(c, tl.trans(b))
    index_ptr += batch * length
    for i in range(HEADS):
        head = first_head + i
        x_at = x_ptr + batch * stride_x_b + rows * stride_x_s + head * P
        x0 = tl.load(x_at + p0[None, :], mask=inside0, other=0.0)
        x1 = tl.load(x_at + p1[None, :], mask=inside1, other=0.0)
        state_at = states_ptr + ((batch * num_chunks + chunk) * num_heads + head) * N * P
        state0 = tl.load(state_at + n[:, None] * P + p0[None, :], mask=p0[None, :] < P, other=0.0)
        state1 = tl.load(state_at + n[:, None] * P + p1[None, :], mask=p1[None, :] < P, other=0.0)
        dt, s, index, from_start, to_end, through = _chunk_decays(
            dt_ptr + (batch * num_heads + head) * length, index_ptr, tl.load(a_ptr + head), at, length, first,
            HAS_INDEX, Q,
        )  # fmt: skip
        weights = (scores * _decay_matrix(s, index, HAS_INDEX, Q) * dt[None, :]).to(dtype)
        d = tl.load(d_ptr + head)
        y0 = tl.dot(c, state0) * from_start[:, None] + x0 * d
        y1 = tl.dot(c, state1) * from_start[:, None] + x1 * d
        y0 += tl.dot(weights, x0)
        y1 += tl.dot(weights, x1)
        y_at = y_ptr + ((batch * length + rows) * num_heads + head) * P
        tl.store(y_at + p0[None, :], y0.to(y_ptr.dtype.element_ty), mask=inside0)
        tl.store(y_at + p1[None, :], y1.to(y_ptr.dtype.element_ty), mask=inside1)


@triton.jit
def gradients_of_reading(
    dt_ptr, a_ptr, c_ptr, index_ptr, states_ptr, grad_states_ptr, grad_y_ptr, grad_c_ptr, grad_s_ptr, grad_total_ptr,
    length, num_chunks, num_heads, stride_c_b, stride_c_s,
    HAS_INDEX: tl.constexpr, HEADS: tl.constexpr,
    Q: tl.constexpr, N: tl.constexpr, P: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
):  # fmt: skip
    """Write the gradients through y_i = exp(s_i) C_i state: of C summed over a group, of s, and of the chunk's decay."""
    chunk, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = chunk * Q
    at = first + tl.arange(0, Q)
    rows = at[:, None].to(tl.int64)
    valid = at[:, None] < length
    n, p0, p1 = tl.arange(0, N), tl.arange(0, P0), P0 + tl.arange(0, P1)
    inside0, inside1 = valid & (p0[None, :] < P), valid & (p1[None, :] < P)
    tile0, tile1 = n[:, None] * P + p0[None, :], n[:, None] * P + p1[None, :]
    c = tl.load(c_ptr + batch * stride_c_b + rows * stride_c_s + group * N + n[None, :], mask=valid, other=0.0)
    index_ptr += batch * length
    grad_c = tl.zeros((Q, N), dtype=tl.float32)
    for i in range(HEADS):
        head = group * HEADS + i
        y_at = grad_y_ptr + ((batch * length + rows) * num_heads + head) * P
        gy0 = tl.load(y_at + p0[None, :], mask=inside0, other=0.0)
        gy1 = tl.load(y_at + p1[None, :], mask=inside1, other=0.0)
        state_at = ((batch * num_chunks + chunk) * num_heads + head) * N * P
        st0 = tl.load(states_ptr + state_at + tile0, mask=p0[None, :] < P, other=0.0)
        st1 = tl.load(states_ptr + state_at + tile1, mask=p1[None, :] < P, other=0.0)
        per_head = (batch * num_heads + head) * length
        dt, s, index, from_start, to_end, through = _chunk_decays(
            dt_ptr + per_head, index_ptr, tl.load(a_ptr + head), at, length, first, HAS_INDEX, Q
        )
        out_of = (tl.dot(gy0, tl.trans(st0)) + tl.dot(gy1, tl.trans(st1))) * from_start[:, None]
        grad_c += out_of
        tl.store(grad_s_ptr + per_head + at, tl.sum(out_of * c, axis=1), mask=at < length)
        gs0 = tl.load(grad_states_ptr + state_at + tile0, mask=p0[None, :] < P, other=0.0)
        gs1 = tl.load(grad_states_ptr + state_at + tile1, mask=p1[None, :] < P, other=0.0)
        carried = tl.sum(gs0.to(tl.float32) * st0.to(tl.float32)) + tl.sum(gs1.to(tl.float32) * st1.to(tl.float32))
        tl.store(grad_total_ptr + (batch * num_chunks + chunk) * num_heads + head, through * carried)
    num_groups = num_heads // HEADS
    tl.store(grad_c_ptr + ((batch * length + rows) * num_groups + group) * N + n[None, :], grad_c, mask=valid)


@triton.jit
def gradients_of_adding(
    x_ptr, dt_ptr, a_ptr, b_ptr, index_ptr, grad_states_ptr, grad_b_ptr, grad_x_ptr, grad_dt_ptr,
    length, num_chunks, num_heads, stride_x_b, stride_x_s, stride_b_b, stride_b_s,
    HAS_INDEX: tl.constexpr, HEADS: tl.constexpr,
    Q: tl.constexpr, N: tl.constexpr, P: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
):  # fmt: skip
    """Write the gradients through state += exp(s_end - s_j) dt_j x_j B_j: of x, of dt, and of B summed over a group."""
    chunk, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = chunk * Q
    at = first + tl.arange(0, Q)
    rows = at[:, None].to(tl.int64)
    valid = at[:, None] < length
    n, p0, p1 = tl.arange(0, N), tl.arange(0, P0), P0 + tl.arange(0, P1)
    inside0, inside1 = valid & (p0[None, :] < P), valid & (p1[None, :] < P)
    tile0, tile1 = n[:, None] * P + p0[None, :], n[:, None] * P + p1[None, :]
    b = tl.load(b_ptr + batch * stride_b_b + rows * stride_b_s + group * N + n[None, :], mask=valid, other=0.0)
    index_ptr += batch * length
    grad_b = tl.zeros((Q, N), dtype=tl.float32)
    for i in range(HEADS):
        head = group * HEADS + i
        x_at = x_ptr + batch * stride_x_b + rows * stride_x_s + head * P
        x0 = tl.load(x_at + p0[None, :], mask=inside0, other=0.0)
        x1 = tl.load(x_at + p1[None, :], mask=inside1, other=0.0)
        state_at = grad_states_ptr + ((batch * num_chunks + chunk) * num_heads + head) * N * P
        gs0 = tl.load(state_at + tile0, mask=p0[None, :] < P, other=0.0)
        gs1 = tl.load(state_at + tile1, mask=p1[None, :] < P, other=0.0)
        per_head = (batch * num_heads + head) * length
        dt, s, index, from_start, to_end, through = _chunk_decays(
            dt_ptr + per_head, index_ptr, tl.load(a_ptr + head), at, length, first, HAS_INDEX, Q
        )
        into0 = tl.dot(b, gs0) * to_end[:, None]
        into1 = tl.dot(b, gs1) * to_end[:, None]
        tl.store(grad_dt_ptr + per_head + at, tl.sum(into0 * x0, axis=1) + tl.sum(into1 * x1, axis=1), mask=at < length)
        out = grad_x_ptr + ((batch * length + rows) * num_heads + head) * P
        tl.store(out + p0[None, :], into0.to(grad_x_ptr.dtype.element_ty), mask=inside0)
        tl.store(out + p1[None, :], into1.to(grad_x_ptr.dtype.element_ty), mask=inside1)
        scale = (dt * to_end)[:, None]
        grad_b += tl.dot((x0 * scale).to(b.dtype), tl.trans(gs0)) + tl.dot((x1 * scale).to(b.dtype), tl.trans(gs1))
    num_groups = num_heads // HEADS
    tl.store(grad_b_ptr + ((batch * length + rows) * num_groups + group) * N + n[None, :], grad_b, mask=valid)


@triton.jit
def gradients_within(
    x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, index_ptr, grad_y_ptr,
    added_x_ptr, added_dt_ptr, added_b_ptr, read_s_ptr, read_total_ptr, read_c_ptr,
    grad_x_ptr, grad_dt_ptr, grad_a_ptr, grad_b_ptr, grad_c_ptr, grad_d_ptr,
    length, num_chunks, num_heads,
    stride_x_b, stride_x_s, stride_b_b, stride_b_s, stride_c_b, stride_c_s,
    stride_gx_b, stride_gx_s, stride_gb_b, stride_gb_s, stride_gc_b, stride_gc_s,
    HAS_INDEX: tl.constexpr, HEADS: tl.constexpr,
    Q: tl.constexpr, N: tl.constexpr, P: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
):  # fmt: skip
    """Add the gradients through y_i += sum_j scores_ij exp(s_i - s_j) dt_j x_j to the other two paths', and write all.

    Those of A and D are written per chunk.
    """
    chunk, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = chunk * Q
    at = first + tl.arange(0, Q)
    rows = at[:, None].to(tl.int64)
    valid = at[:, None] < length
    n, p0, p1 = tl.arange(0, N), tl.arange(0, P0), P0 + tl.arange(0, P1)
    inside0, inside1 = valid & (p0[None, :] < P), valid & (p1[None, :] < P)
    b = tl.load(b_ptr + batch * stride_b_b + rows * stride_b_s + group * N + n[None, :], mask=valid, other=0.0)
    c = tl.load(c_ptr + batch * stride_c_b + rows * stride_c_s + group * N + n[None, :], mask=valid, other=0.0)
    scores = tl.dot(c, tl.trans(b))
    index_ptr += batch * length
    grad_scores = tl.zeros((Q, Q), dtype=tl.float32)
    for i in range(HEADS):
        head = group * HEADS + i
        x_at = x_ptr + batch * stride_x_b + rows * stride_x_s + head * P
        x0 = tl.load(x_at + p0[None, :], mask=inside0, other=0.0)
        x1 = tl.load(x_at + p1[None, :], mask=inside1, other=0.0)
        y_at = ((batch * length + rows) * num_heads + head) * P
        gy0 = tl.load(grad_y_ptr + y_at + p0[None, :], mask=inside0, other=0.0)
        gy1 = tl.load(grad_y_ptr + y_at + p1[None, :], mask=inside1, other=0.0)
        per_head = (batch * num_heads + head) * length
        a, d = tl.load(a_ptr + head), tl.load(d_ptr + head)
        dt, s, index, from_start, to_end, through = _chunk_decays(
            dt_ptr + per_head, index_ptr, a, at, length, first, HAS_INDEX, Q
        )
        decay = _decay_matrix(s, index, HAS_INDEX, Q)
        transposed = tl.trans((scores * decay).to(b.dtype))
        gx0 = tl.dot(transposed, gy0) + tl.load(added_x_ptr + y_at + p0[None, :], mask=inside0, other=0.0)
        gx1 = tl.dot(transposed, gy1) + tl.load(added_x_ptr + y_at + p1[None, :], mask=inside1, other=0.0)
        out = grad_x_ptr + batch * stride_gx_b + rows * stride_gx_s + head * P
        tl.store(out + p0[None, :], (gx0 * dt[:, None] + gy0 * d).to(grad_x_ptr.dtype.element_ty), mask=inside0)
        tl.store(out + p1[None, :], (gx1 * dt[:, None] + gy1 * d).to(grad_x_ptr.dtype.element_ty), mask=inside1)
        grad_weights = (tl.dot(gy0, tl.trans(x0)) + tl.dot(gy1, tl.trans(x1))) * decay
        grad_scores += grad_weights * dt[None, :]
        per_dt = grad_weights * scores
        grad_dt = tl.sum(per_dt, axis=0)
        grad_s = tl.sum(per_dt * dt[None, :], axis=1) - grad_dt * dt
        added = tl.load(added_dt_ptr + per_head + at, mask=at < length, other=0.0)
        grad_s += tl.load(read_s_ptr + per_head + at, mask=at < length, other=0.0) - added * dt
        partial = (batch * num_chunks + chunk) * num_heads + head
        grad_total = tl.load(read_total_ptr + partial) + tl.sum(added * dt, axis=0)
        grad_log_decay = tl.cumsum(grad_s, axis=0, reverse=True) + grad_total
        tl.store(grad_dt_ptr + per_head + at, grad_dt + added + a * grad_log_decay, mask=at < length)
        tl.store(grad_a_ptr + partial, tl.sum(grad_log_decay * dt, axis=0))
        products = tl.sum(gy0.to(tl.float32) * x0.to(tl.float32)) + tl.sum(gy1.to(tl.float32) * x1.to(tl.float32))
        tl.store(grad_d_ptr + partial, products)
    narrow = grad_scores.to(b.dtype)
    whole = ((batch * length + rows) * (num_heads // HEADS) + group) * N + n[None, :]
    grad_c = tl.load(read_c_ptr + whole, mask=valid, other=0.0) + tl.dot(narrow, b)
    out = grad_c_ptr + batch * stride_gc_b + rows * stride_gc_s + group * N + n[None, :]
    tl.store(out, grad_c.to(grad_c_ptr.dtype.element_ty), mask=valid)
    grad_b = tl.load(added_b_ptr + whole, mask=valid, other=0.0) + tl.dot(tl.trans(narrow), c)
    out = grad_b_ptr + batch * stride_gb_b + rows * stride_gb_s + group * N + n[None, :]
    tl.store(out, grad_b.to(grad_b_ptr.dtype.element_ty), mask=valid)
