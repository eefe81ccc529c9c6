"""The SSD scan in Triton kernels; what passes between them is the states, in x's dtype.

Forward: one program per head walks along the chunks with the state in registers and writes the state before each chunk;
then all chunks' outputs are computed at once. Backward: the states again, their gradients by the same walk in reverse,
and three kernels for the paths of a gradient (reading the state, adding to it, within the chunk). Their programs serve
all heads of a group, so that the gradients of B and C are summed in registers. Three, because the tiles of one that does
everything do not fit into registers: it spilled a kilobyte a thread.

The head width need not be a power of two: it is cut into two parts that are (80 = 64 + 16), instead of being padded.
Math and names as in ops/ssd.py; s is the running sum of dt * A within a chunk. dt, s and what is per position and head
are [B, H, chunks x Q], padded with dt = 0. Addresses are a 64-bit base and 32-bit offsets, for the sake of registers.
"""

import triton
import triton.language as tl


@triton.jit
def running_sums(dt_ptr, a_ptr, s_ptr, num_chunks, num_heads, Q: tl.constexpr, BLOCK: tl.constexpr):
    """Write s, the sum of dt * A up to and including each position of a chunk."""
    row = tl.program_id(0)
    chunk = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    at = row.to(tl.int64) * num_chunks * Q + chunk * Q + tl.arange(0, Q)[None, :]
    dt = tl.load(dt_ptr + at, mask=chunk < num_chunks, other=0.0)
    s = tl.cumsum(dt * tl.load(a_ptr + row % num_heads), axis=1)
    tl.store(s_ptr + at, s, mask=chunk < num_chunks)


@triton.jit
def gradients_of_decays(
    dt_ptr, a_ptr, grad_s_ptr, grad_total_ptr, grad_dt_ptr, grad_a_ptr, num_chunks, num_heads,
    Q: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add A times the gradient of dt * A to dt's gradient, in place, and write A's per block of chunks."""
    row = tl.program_id(0)
    chunk = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    inside = chunk < num_chunks
    base = row.to(tl.int64) * num_chunks
    at = base * Q + chunk * Q + tl.arange(0, Q)[None, :]
    grad_s = tl.load(grad_s_ptr + at, mask=inside, other=0.0)
    total = tl.load(grad_total_ptr + base + chunk, mask=inside, other=0.0)
    # position t moves s at t and behind it, and what is left of the state after the chunk
    grad = tl.sum(grad_s, axis=1)[:, None] - tl.cumsum(grad_s, axis=1) + grad_s + total
    grad_dt = tl.load(grad_dt_ptr + at, mask=inside, other=0.0) + tl.load(a_ptr + row % num_heads) * grad
    tl.store(grad_dt_ptr + at, grad_dt, mask=inside)
    dt = tl.load(dt_ptr + at, mask=inside, other=0.0)
    tl.store(grad_a_ptr + row * tl.num_programs(1) + tl.program_id(1), tl.sum(grad * dt))


@triton.jit
def _decays(dt_ptr, s_ptr, index_ptr, length, first, HAS_INDEX: tl.constexpr, Q: tl.constexpr):
    """Return dt, s, document indices, and decays from the chunk's start, to its end and through it.

    A decay is 0 where a document's border lies on its way.
    """
    i = tl.arange(0, Q)
    dt, s, total = tl.load(dt_ptr + i), tl.load(s_ptr + i), tl.load(s_ptr + Q - 1)
    from_start, to_end, through = tl.exp(s), tl.exp(total - s), tl.exp(total)
    index = i
    if HAS_INDEX:
        index = tl.load(index_ptr + tl.minimum(first + i, length - 1))
        last = tl.load(index_ptr + tl.minimum(first + Q, length) - 1)
        previous = tl.load(index_ptr + tl.maximum(first - 1, 0))
        from_start = tl.where(index == previous, from_start, 0.0)
        to_end = tl.where(index == last, to_end, 0.0)
        through = tl.where(last == previous, through, 0.0)
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
    value_ptr, inner_ptr, dt_ptr, s_ptr, index_ptr, initial_ptr, states_ptr, final_ptr,
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
    dt_ptr += (batch * num_heads + head) * num_chunks * Q
    s_ptr += (batch * num_heads + head) * num_chunks * Q
    index_ptr += batch * length
    i, n, p0, p1 = tl.arange(0, Q)[:, None], tl.arange(0, N), tl.arange(0, P0), P0 + tl.arange(0, P1)
    tile0, tile1 = n[:, None] * P + p0[None, :], n[:, None] * P + p1[None, :]
    inside1 = p1[None, :] < P
    state0 = tl.zeros((N, P0), dtype=tl.float32)
    state1 = tl.zeros((N, P1), dtype=tl.float32)
    whole = (batch * num_heads + head) * N * P
    if HAS_INITIAL:
        state0 = tl.load(initial_ptr + whole + tile0)
        state1 = tl.load(initial_ptr + whole + tile1, mask=inside1, other=0.0)
    for step in range(num_chunks):
        chunk = num_chunks - 1 - step if REVERSE else step
        first = chunk * Q
        valid = first + i < length
        inner_at = inner_ptr + first.to(tl.int64) * stride_inner_s
        value_at = value_ptr + first.to(tl.int64) * stride_value_s
        inner = tl.load(inner_at + i * stride_inner_s + n[None, :], mask=valid, other=0.0)
        value0 = tl.load(value_at + i * stride_value_s + p0[None, :], mask=valid, other=0.0)
        value1 = tl.load(value_at + i * stride_value_s + p1[None, :], mask=valid & inside1, other=0.0)
        dt, s, index, from_start, to_end, through = _decays(
            dt_ptr + first, s_ptr + first, index_ptr, length, first, HAS_INDEX, Q
        )
        out = states_ptr + ((batch * num_chunks + chunk) * num_heads + head) * N * P
        tl.store(out + tile0, state0.to(states_ptr.dtype.element_ty))
        tl.store(out + tile1, state1.to(states_ptr.dtype.element_ty), mask=inside1)
        weight = from_start if REVERSE else to_end * dt
        transposed = tl.trans(inner)
        state0 = state0 * through + tl.dot(transposed, (value0 * weight[:, None]).to(inner.dtype))
        state1 = state1 * through + tl.dot(transposed, (value1 * weight[:, None]).to(inner.dtype))
    tl.store(final_ptr + whole + tile0, state0)
    tl.store(final_ptr + whole + tile1, state1, mask=inside1)


@triton.jit
def chunk_outputs(
    x_ptr, dt_ptr, s_ptr, b_ptr, c_ptr, d_ptr, index_ptr, states_ptr, y_ptr,
    length, num_chunks, heads_per_group, num_heads, stride_x_b, stride_x_s, stride_b_b, stride_b_s, stride_c_b, stride_c_s,
    HAS_INDEX: tl.constexpr, HEADS: tl.constexpr,
    Q: tl.constexpr, N: tl.constexpr, P: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
):  # fmt: skip
    """Write y of one chunk for HEADS heads of one group."""
    chunk, part, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_head = part * HEADS
    group = first_head // heads_per_group
    first = chunk * Q
    first64 = first.to(tl.int64)
    i, n, p0, p1 = tl.arange(0, Q)[:, None], tl.arange(0, N), tl.arange(0, P0), P0 + tl.arange(0, P1)
    valid, inside1 = first + i < length, p1[None, :] < P
    b_at = b_ptr + batch * stride_b_b + first64 * stride_b_s + group * N
    c_at = c_ptr + batch * stride_c_b + first64 * stride_c_s + group * N
    b = tl.load(b_at + i * stride_b_s + n[None, :], mask=valid, other=0.0)
    c = tl.load(c_at + i * stride_c_s + n[None, :], mask=valid, other=0.0)
    scores = tl.dot(c, tl.trans(b))
    index_ptr += batch * length
    for k in range(HEADS):
        head = first_head + k
        x_at = x_ptr + batch * stride_x_b + first64 * stride_x_s + head * P
        x0 = tl.load(x_at + i * stride_x_s + p0[None, :], mask=valid, other=0.0)
        x1 = tl.load(x_at + i * stride_x_s + p1[None, :], mask=valid & inside1, other=0.0)
        state_at = states_ptr + ((batch * num_chunks + chunk) * num_heads + head) * N * P
        state0 = tl.load(state_at + n[:, None] * P + p0[None, :])
        state1 = tl.load(state_at + n[:, None] * P + p1[None, :], mask=inside1, other=0.0)
        per_head = ((batch * num_heads + head) * num_chunks + chunk) * Q
        dt, s, index, from_start, to_end, through = _decays(
            dt_ptr + per_head, s_ptr + per_head, index_ptr, length, first, HAS_INDEX, Q
        )
        weights = (scores * _decay_matrix(s, index, HAS_INDEX, Q) * dt[None, :]).to(b.dtype)
        d = tl.load(d_ptr + head)
        y0 = tl.dot(c, state0) * from_start[:, None] + x0 * d
        y1 = tl.dot(c, state1) * from_start[:, None] + x1 * d
        y0 += tl.dot(weights, x0)
        y1 += tl.dot(weights, x1)
        y_at = y_ptr + ((batch * length + first64) * num_heads + head) * P
        tl.store(y_at + i * (num_heads * P) + p0[None, :], y0.to(y_ptr.dtype.element_ty), mask=valid)
        tl.store(y_at + i * (num_heads * P) + p1[None, :], y1.to(y_ptr.dtype.element_ty), mask=valid & inside1)


@triton.jit
def gradients_of_reading(
    dt_ptr, s_ptr, c_ptr, index_ptr, states_ptr, grad_states_ptr, grad_y_ptr, grad_c_ptr, grad_s_ptr, grad_total_ptr,
    length, num_chunks, num_heads, stride_c_b, stride_c_s,
    HAS_INDEX: tl.constexpr, HEADS: tl.constexpr,
    Q: tl.constexpr, N: tl.constexpr, P: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
):  # fmt: skip
    """Write the gradients through y_i = exp(s_i) C_i state: of C summed over a group, of s, and of the chunk's decay."""
    chunk, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = chunk * Q
    first64 = first.to(tl.int64)
    i, n, p0, p1 = tl.arange(0, Q)[:, None], tl.arange(0, N), tl.arange(0, P0), P0 + tl.arange(0, P1)
    valid, inside1 = first + i < length, p1[None, :] < P
    tile0, tile1 = n[:, None] * P + p0[None, :], n[:, None] * P + p1[None, :]
    c_at = c_ptr + batch * stride_c_b + first64 * stride_c_s + group * N
    c = tl.load(c_at + i * stride_c_s + n[None, :], mask=valid, other=0.0)
    index_ptr += batch * length
    grad_c = tl.zeros((Q, N), dtype=tl.float32)
    for k in range(HEADS):
        head = group * HEADS + k
        y_at = grad_y_ptr + ((batch * length + first64) * num_heads + head) * P
        gy0 = tl.load(y_at + i * (num_heads * P) + p0[None, :], mask=valid, other=0.0)
        gy1 = tl.load(y_at + i * (num_heads * P) + p1[None, :], mask=valid & inside1, other=0.0)
        state_at = ((batch * num_chunks + chunk) * num_heads + head) * N * P
        st0 = tl.load(states_ptr + state_at + tile0)
        st1 = tl.load(states_ptr + state_at + tile1, mask=inside1, other=0.0)
        row = (batch * num_heads + head) * num_chunks + chunk
        dt, s, index, from_start, to_end, through = _decays(
            dt_ptr + row * Q, s_ptr + row * Q, index_ptr, length, first, HAS_INDEX, Q
        )
        out_of = (tl.dot(gy0, tl.trans(st0)) + tl.dot(gy1, tl.trans(st1))) * from_start[:, None]
        grad_c += out_of
        tl.store(grad_s_ptr + row * Q + tl.arange(0, Q), tl.sum(out_of * c, axis=1))
        gs0 = tl.load(grad_states_ptr + state_at + tile0)
        gs1 = tl.load(grad_states_ptr + state_at + tile1, mask=inside1, other=0.0)
        carried = tl.sum(gs0.to(tl.float32) * st0.to(tl.float32)) + tl.sum(gs1.to(tl.float32) * st1.to(tl.float32))
        tl.store(grad_total_ptr + row, through * carried)
    num_groups = num_heads // HEADS
    out = grad_c_ptr + ((batch * length + first64) * num_groups + group) * N
    tl.store(out + i * (num_groups * N) + n[None, :], grad_c, mask=valid)


@triton.jit
def gradients_of_adding(
    x_ptr, dt_ptr, s_ptr, b_ptr, index_ptr, grad_states_ptr, grad_b_ptr, grad_x_ptr, grad_dt_ptr,
    length, num_chunks, num_heads, stride_x_b, stride_x_s, stride_b_b, stride_b_s,
    HAS_INDEX: tl.constexpr, HEADS: tl.constexpr,
    Q: tl.constexpr, N: tl.constexpr, P: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
):  # fmt: skip
    """Write the gradients through state += exp(s_end - s_j) dt_j x_j B_j: of x, of dt, and of B summed over a group."""
    chunk, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = chunk * Q
    first64 = first.to(tl.int64)
    i, n, p0, p1 = tl.arange(0, Q)[:, None], tl.arange(0, N), tl.arange(0, P0), P0 + tl.arange(0, P1)
    valid, inside1 = first + i < length, p1[None, :] < P
    tile0, tile1 = n[:, None] * P + p0[None, :], n[:, None] * P + p1[None, :]
    b_at = b_ptr + batch * stride_b_b + first64 * stride_b_s + group * N
    b = tl.load(b_at + i * stride_b_s + n[None, :], mask=valid, other=0.0)
    index_ptr += batch * length
    grad_b = tl.zeros((Q, N), dtype=tl.float32)
    for k in range(HEADS):
        head = group * HEADS + k
        x_at = x_ptr + batch * stride_x_b + first64 * stride_x_s + head * P
        x0 = tl.load(x_at + i * stride_x_s + p0[None, :], mask=valid, other=0.0)
        x1 = tl.load(x_at + i * stride_x_s + p1[None, :], mask=valid & inside1, other=0.0)
        state_at = grad_states_ptr + ((batch * num_chunks + chunk) * num_heads + head) * N * P
        gs0 = tl.load(state_at + tile0)
        gs1 = tl.load(state_at + tile1, mask=inside1, other=0.0)
        row = ((batch * num_heads + head) * num_chunks + chunk) * Q
        dt, s, index, from_start, to_end, through = _decays(
            dt_ptr + row, s_ptr + row, index_ptr, length, first, HAS_INDEX, Q
        )
        into0 = tl.dot(b, gs0) * to_end[:, None]
        into1 = tl.dot(b, gs1) * to_end[:, None]
        tl.store(grad_dt_ptr + row + tl.arange(0, Q), tl.sum(into0 * x0, axis=1) + tl.sum(into1 * x1, axis=1))
        out = grad_x_ptr + ((batch * length + first64) * num_heads + head) * P
        tl.store(out + i * (num_heads * P) + p0[None, :], into0.to(grad_x_ptr.dtype.element_ty), mask=valid)
        tl.store(out + i * (num_heads * P) + p1[None, :], into1.to(grad_x_ptr.dtype.element_ty), mask=valid & inside1)
        scale = (dt * to_end)[:, None]
        grad_b += tl.dot((x0 * scale).to(b.dtype), tl.trans(gs0)) + tl.dot((x1 * scale).to(b.dtype), tl.trans(gs1))
    num_groups = num_heads // HEADS
    out = grad_b_ptr + ((batch * length + first64) * num_groups + group) * N
    tl.store(out + i * (num_groups * N) + n[None, :], grad_b, mask=valid)


@triton.jit
def gradients_within(
    x_ptr, dt_ptr, s_ptr, b_ptr, c_ptr, d_ptr, index_ptr, grad_y_ptr,
    added_x_ptr, added_dt_ptr, added_b_ptr, read_c_ptr,
    grad_x_ptr, grad_dt_ptr, grad_s_ptr, grad_total_ptr, grad_b_ptr, grad_c_ptr, grad_d_ptr,
    length, num_chunks, num_heads,
    stride_x_b, stride_x_s, stride_b_b, stride_b_s, stride_c_b, stride_c_s,
    stride_gx_b, stride_gx_s, stride_gb_b, stride_gb_s, stride_gc_b, stride_gc_s,
    HAS_INDEX: tl.constexpr, HEADS: tl.constexpr,
    Q: tl.constexpr, N: tl.constexpr, P: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
):  # fmt: skip
    """Add the gradients through y_i += sum_j scores_ij exp(s_i - s_j) dt_j x_j to the other two paths', and write all.

    grad_s and grad_total hold the reading path's and are added to; D's gradient is written per chunk.
    """
    chunk, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = chunk * Q
    first64 = first.to(tl.int64)
    i, n, p0, p1 = tl.arange(0, Q)[:, None], tl.arange(0, N), tl.arange(0, P0), P0 + tl.arange(0, P1)
    valid, inside1 = first + i < length, p1[None, :] < P
    b_at = b_ptr + batch * stride_b_b + first64 * stride_b_s + group * N
    c_at = c_ptr + batch * stride_c_b + first64 * stride_c_s + group * N
    b = tl.load(b_at + i * stride_b_s + n[None, :], mask=valid, other=0.0)
    c = tl.load(c_at + i * stride_c_s + n[None, :], mask=valid, other=0.0)
    scores = tl.dot(c, tl.trans(b))
    index_ptr += batch * length
    grad_scores = tl.zeros((Q, Q), dtype=tl.float32)
    for k in range(HEADS):
        head = group * HEADS + k
        x_at = x_ptr + batch * stride_x_b + first64 * stride_x_s + head * P
        x0 = tl.load(x_at + i * stride_x_s + p0[None, :], mask=valid, other=0.0)
        x1 = tl.load(x_at + i * stride_x_s + p1[None, :], mask=valid & inside1, other=0.0)
        y_at = ((batch * length + first64) * num_heads + head) * P
        gy0 = tl.load(grad_y_ptr + y_at + i * (num_heads * P) + p0[None, :], mask=valid, other=0.0)
        gy1 = tl.load(grad_y_ptr + y_at + i * (num_heads * P) + p1[None, :], mask=valid & inside1, other=0.0)
        row = (batch * num_heads + head) * num_chunks + chunk
        d = tl.load(d_ptr + head)
        dt, s, index, from_start, to_end, through = _decays(
            dt_ptr + row * Q, s_ptr + row * Q, index_ptr, length, first, HAS_INDEX, Q
        )
        decay = _decay_matrix(s, index, HAS_INDEX, Q)
        transposed = tl.trans((scores * decay).to(b.dtype))
        added_at = added_x_ptr + y_at + i * (num_heads * P)
        gx0 = tl.dot(transposed, gy0) + tl.load(added_at + p0[None, :], mask=valid, other=0.0)
        gx1 = tl.dot(transposed, gy1) + tl.load(added_at + p1[None, :], mask=valid & inside1, other=0.0)
        out = grad_x_ptr + batch * stride_gx_b + first64 * stride_gx_s + head * P + i * stride_gx_s
        gx0 = (gx0 * dt[:, None] + gy0 * d).to(grad_x_ptr.dtype.element_ty)
        gx1 = (gx1 * dt[:, None] + gy1 * d).to(grad_x_ptr.dtype.element_ty)
        tl.store(out + p0[None, :], gx0, mask=valid)
        tl.store(out + p1[None, :], gx1, mask=valid & inside1)
        products = tl.sum(gy0.to(tl.float32) * x0.to(tl.float32)) + tl.sum(gy1.to(tl.float32) * x1.to(tl.float32))
        tl.store(grad_d_ptr + row, products)

        grad_weights = (tl.dot(gy0, tl.trans(x0)) + tl.dot(gy1, tl.trans(x1))) * decay
        grad_scores += grad_weights * dt[None, :]
        per_dt = grad_weights * scores
        grad_dt = tl.sum(per_dt, axis=0)
        per_position = row * Q + tl.arange(0, Q)
        added = tl.load(added_dt_ptr + per_position)
        tl.store(grad_dt_ptr + per_position, grad_dt + added)
        grad_s = tl.load(grad_s_ptr + per_position) - (grad_dt + added) * dt
        tl.store(grad_s_ptr + per_position, grad_s + tl.sum(per_dt * dt[None, :], axis=1))
        tl.store(grad_total_ptr + row, tl.load(grad_total_ptr + row) + tl.sum(added * dt, axis=0))
    narrow = grad_scores.to(b.dtype)
    num_groups = num_heads // HEADS
    whole = ((batch * length + first64) * num_groups + group) * N + i * (num_groups * N) + n[None, :]
    grad_c = tl.load(read_c_ptr + whole, mask=valid, other=0.0) + tl.dot(narrow, b)
    out = grad_c_ptr + batch * stride_gc_b + first64 * stride_gc_s + group * N + i * stride_gc_s
    tl.store(out + n[None, :], grad_c.to(grad_c_ptr.dtype.element_ty), mask=valid)
    grad_b = tl.load(added_b_ptr + whole, mask=valid, other=0.0) + tl.dot(tl.trans(narrow), c)
    out = grad_b_ptr + batch * stride_gb_b + first64 * stride_gb_s + group * N + i * stride_gb_s
    tl.store(out + n[None, :], grad_b.to(grad_b_ptr.dtype.element_ty), mask=valid)
