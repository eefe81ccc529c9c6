"""Our Triton kernels in Triton's interpreter, so that a machine without a GPU tests their arithmetic too.

A process of its own runs them: the interpreter is chosen when Triton is imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels are written in Triton")
ROOT = Path(__file__).parents[2]

PRELUDE = """
import torch
import triton.runtime.interpreter as interpreter
from tests.ops.comparison import worst_error

patch = interpreter._patch_lang_tensor  # Triton 3.6 cannot turn its scalars into indices under NumPy 2
def patched(tensor, scope):
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
interpreter._patch_lang_tensor = patched
generator = torch.Generator().manual_seed(1)
def randn(*shape):
    return torch.randn(*shape, generator=generator)
"""

CASES = {
    "norms": """
from nanotrain.ops.gpu.gated_norm_triton import grouped_gated_rms_norm
from nanotrain.ops.gpu.rms_norm_triton import rms_norm
from nanotrain.ops.gpu.squared_relu_triton import squared_relu
from nanotrain.ops.rms_norm import grouped_gated_rms_norm_ref, rms_norm_ref
from nanotrain.ops.squared_relu import squared_relu_ref
def gated(function):
    return lambda y, z, w: function(y, z[..., 8:], w, 1e-5, 2)
pairs = [
    (gated(grouped_gated_rms_norm), gated(grouped_gated_rms_norm_ref), [randn(2, 3, 40), randn(2, 3, 48), randn(40)]),
    (lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: rms_norm_ref(x, w, 1e-5), [randn(2, 3, 40), randn(40)]),
    (lambda x, w: rms_norm(x, w, 1e-5, branch=True), lambda x, w: (rms_norm_ref(x, w, 1e-5), x), [randn(2, 3, 40), randn(40)]),
    (squared_relu, squared_relu_ref, [randn(3, 5, 7)]),
]
for fast, slow, inputs in pairs:
    error = worst_error(fast, slow, inputs, torch.float32)
    assert error < 2e-6, error
""",
    "pairs": """
from nanotrain.ops.gpu import ssd_pairs_triton
from nanotrain.ops.gpu.head_tiles import can_be_copied
from nanotrain.ops.gpu.ssd_decays_triton import gradients_of_decays
from nanotrain.ops.segments import segment_indices
from tests.ops.comparison import random_segments, relative_error
launches = [ssd_pairs_triton.Launch(tile=16, warps=4, stages=2, registers=None, copied=copied) for copied in (False, True)]
halves = torch.zeros(1, 3, 8 * 80 + 8, dtype=torch.bfloat16)
assert can_be_copied(128, halves[..., 8:].view(1, 3, 8, 80)) and not can_be_copied(32, halves[..., 8:].view(1, 3, 8, 80))
for other in (halves.float()[..., 8:].view(1, 3, 8, 80), halves[..., 4:-4].view(1, 3, 8, 80), halves[..., 8:].view(1, 3, 20, 32)):
    assert not can_be_copied(128, other)
batch, length, groups, heads, width, chunk, chunks = 2, 75, 2, 6, 24, 32, 3
x, grad = randn(batch, length, heads, width), randn(batch, length, heads, width)
dt, rates = torch.rand(batch, heads, chunks * chunk, generator=generator), -torch.rand(heads, 1, generator=generator)
dt[..., length:] = 0.0
decay = (dt * rates).unflatten(-1, (chunks, chunk)).cumsum(-1)
dt = dt.unflatten(-1, (chunks, chunk))
for ids in (None, random_segments(batch, length, 9, generator)):
    index = torch.zeros(batch, length, dtype=torch.int32) if ids is None else segment_indices(ids)
    scores = torch.zeros(batch, chunks, groups, chunk, chunk)
    want_scores = torch.zeros_like(scores, dtype=torch.float64)
    want_decay, want_dt = torch.zeros(2, batch, heads, chunks, chunk, dtype=torch.float64)
    for b in range(batch):
        for t in range(length):
            for s in range(t - t % chunk, t + 1):
                if index[b, t] != index[b, s]:
                    continue
                c, i, j = t // chunk, t % chunk, s % chunk
                scores[b, c, :, i, j] = randn(groups)
                pair = (grad[b, t].double() * x[b, s]).sum(-1) * dt[b, :, c, j] * (decay[b, :, c, i] - decay[b, :, c, j]).double().exp()
                want_scores[b, c, :, i, j] = pair.view(groups, -1).sum(-1)
                weighted = pair * scores[b, c, :, i, j].repeat_interleave(heads // groups)
                want_decay[b, :, c, i] += weighted * (t > s)
                want_decay[b, :, c, j] -= weighted * (t > s)
                want_dt[b, :, c, j] += weighted / dt[b, :, c, j]
    none = torch.zeros(batch, heads, chunks, 1, chunk)
    own = torch.nn.functional.pad((x * grad).sum(-1).mT, (0, chunks * chunk - length)).view_as(dt)
    for launch, ssd_pairs_triton._BLOCK in zip(launches, (2, 16)):  # of three heads a group
        got = ssd_pairs_triton.pair_gradients(x, grad, dt, decay, scores, None if ids is None else index, launch)
        grad_dA, grad_dt = gradients_of_decays(dt, got.parts, none, none, none[..., 0, 0].contiguous())
        assert relative_error(got.scores, want_scores) < 1e-5 and relative_error(got.own, own) < 1e-5
        assert relative_error(grad_dA, want_decay.flip(-1).cumsum(-1).flip(-1)) < 1e-5
        assert relative_error(grad_dt, want_dt) < 1e-5
""",
    "states": """
from nanotrain.ops.gpu import ssd_states_triton
from nanotrain.ops.segments import segment_indices
from tests.ops.comparison import relative_error
ssd_states_triton._PART = 16
batch, length, groups, heads, width, size, chunk, chunks = 2, 75, 2, 6, 24, 32, 32, 3
wide, x, grad = randn(batch, length, 2 * groups * size + 5), randn(batch, length, heads, width), randn(batch, length, heads, width)
B, C = (wide[..., start : start + groups * size].unflatten(-1, (groups, size)) for start in (0, groups * size))
dt, rates = torch.rand(batch, heads, chunks * chunk, generator=generator), -torch.rand(heads, 1, generator=generator)
dt[..., length:] = 0.0
decay = (dt * rates).unflatten(-1, (chunks, chunk)).cumsum(-1)
dt = dt.unflatten(-1, (chunks, chunk))
places = torch.arange(length)
documents = torch.stack([(places >= 10).int() + (places >= 70).int(), (places >= 31).int() + (places >= 40).int()])
for ids in (None, documents):  # the first row has one over the second chunk, the second row a border at a chunk's end
    index = None if ids is None else segment_indices(ids)
    number = torch.zeros(batch, length, dtype=torch.int32) if index is None else index
    # A sequential recurrence in fp64 that autograd differentiates: `whole` stands for each chunk's decay.
    whole = decay[..., -1].double().requires_grad_()
    leaving = [torch.zeros(batch, heads, width, size, dtype=torch.float64).requires_grad_() for _ in range(chunks)]
    state, entered, output = torch.zeros(batch, heads, width, size, dtype=torch.float64), [], 0.0
    expand = lambda t: t.double().repeat_interleave(heads // groups, 1)
    for c in range(chunks):
        entered.append(state)
        last = min(c * chunk + chunk, length) - 1
        added = torch.zeros_like(state)
        for t in range(c * chunk, last + 1):
            i = t - c * chunk
            for b in range(batch):
                if c and number[b, t] == number[b, c * chunk - 1]:
                    read = torch.einsum("hpn,hn->hp", state[b], expand(C[b, t][None])[0]) * decay[b, :, c, i].double().exp()[:, None]
                    output = output + (read * grad[b, t]).sum()
                if number[b, t] == number[b, last]:
                    weight = dt[b, :, c, i] * (decay[b, :, c, -1] - decay[b, :, c, i]).exp()
                    added[b] += torch.einsum("hp,hn->hpn", x[b, t].double() * weight[:, None].double(), expand(B[b, t][None])[0])
        same = torch.tensor([c == 0 or bool(number[b, c * chunk - 1] == number[b, last]) for b in range(batch)])
        state = state * whole[:, :, c, None, None].exp() * same[:, None, None, None] + added + leaving[c]
    got = ssd_states_triton.states_before_chunks(x, dt, decay, B, index)
    assert relative_error(got, torch.stack(entered, 1)) < 1e-5
    output.backward()
    gradients, by_decay = ssd_states_triton.gradients_of_states(grad, decay, C, got, index)
    want = torch.stack([torch.zeros_like(g) if g.grad is None else g.grad for g in leaving], 1)
    assert relative_error(gradients, want) < 1e-5 and relative_error(by_decay, whole.grad) < 1e-5
    assert want[:, 0].abs().max() > 1 and whole.grad.abs().max() > 1 and not want[:, -1].any()
""",
    "scan": """
from nanotrain.ops.gpu import ssd_columns_triton, ssd_scan_triton, ssd_pairs_triton
from nanotrain.ops.gpu.ssd_columns_triton import gradient_of_B, gradient_of_C
from nanotrain.ops.gpu.ssd_decays_triton import gradients_of_decays
from nanotrain.ops.gpu.ssd_scan_triton import gradient_of_inputs, scan_outputs
from nanotrain.ops.gpu.ssd_states_triton import gradients_of_states, states_before_chunks
from nanotrain.ops.segments import segment_indices
from tests.ops.comparison import relative_error

def sequential(x, dt, dA, B, C, D, number):
    heads = x.shape[2]
    B, C = (t.repeat_interleave(heads // t.shape[2], 2) for t in (B, C))
    state, y = torch.zeros(*x.shape[::2], x.shape[3], B.shape[3], dtype=x.dtype), []
    for t in range(x.shape[1]):
        kept = dA[:, t].exp() * (number[:, t] == number[:, t - 1])[:, None] if t else dA[:, 0]
        state = state * kept[..., None, None] + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        y.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
    return torch.stack(y, 1) + D[:, None] * x

def check(batch, length, groups, heads, width, size, chunk, documents):
    chunks = -(-length // chunk)
    by_chunks = lambda t: torch.nn.functional.pad(t.mT, (0, chunks * chunk - length)).unflatten(-1, (chunks, chunk)).contiguous()
    wide = randn(batch, length, 2 * groups * size + 5)
    B, C = (wide[..., start : start + groups * size].unflatten(-1, (groups, size)) for start in (0, groups * size))
    x, grad, D = randn(batch, length, heads, width), randn(batch, length, heads, width), randn(heads)
    dt = torch.rand(batch, length, heads, generator=generator)
    dA = -dt * torch.rand(heads, generator=generator)
    for packed in (False, True):
        index = segment_indices(documents[:batch, :length]) if packed else None
        number = torch.zeros(batch, length) if index is None else index
        leaves = [t.double().requires_grad_() for t in (x, dt, dA, B, C, D)]
        y = sequential(*leaves, number)
        want = torch.autograd.grad(y, leaves, grad.double())
        steps, decay, seen = by_chunks(dt), by_chunks(dA).cumsum(-1), by_chunks(1.0 + number[..., None])[:, 0]
        seen = (seen[..., :, None] == seen[..., None, :]) & (seen[..., None] > 0)
        B4, C4 = (torch.nn.functional.pad(t.flatten(2), (0, 0, 0, chunks * chunk - length)).unflatten(2, (groups, size)).unflatten(1, (chunks, chunk)) for t in (B, C))
        scores = torch.einsum("bcign,bcjgn->bcgij", C4, B4) * seen[:, :, None]
        states = states_before_chunks(x, steps, decay, B, index)
        error = relative_error(scan_outputs(x, steps, decay, B, C, states, D, index), y)
        assert error < 2e-5, ("y", width, size, packed, error)
        grad_states, of_chunks = gradients_of_states(grad, decay, C, states, index)
        grad_x = torch.full((batch, length + 1, heads, width), 7.0)
        gradient_of_inputs(grad, steps, decay, B, C, grad_states, D, index, grad_x[:, :length])
        assert (grad_x[:, length] == 7.0).all()
        grad_B, of_B = gradient_of_B(x, B, grad_states, steps, decay, index)
        grad_C, of_C = gradient_of_C(grad, C, states, decay, index)
        pairs = ssd_pairs_triton.pair_gradients(x, grad, steps, decay, scores, index)
        grad_B += torch.einsum("bcgij,bcign->bcjgn", pairs.scores, C4).flatten(1, 2)[:, :length]
        grad_C += torch.einsum("bcgij,bcjgn->bcign", pairs.scores, B4).flatten(1, 2)[:, :length]
        grad_dA, grad_dt = (t.flatten(2)[..., :length].mT for t in gradients_of_decays(steps, pairs.parts, of_B, of_C, of_chunks))
        for name, got, wanted in zip(("x", "dt", "dA", "B", "C", "D"), (grad_x[:, :length], grad_dt, grad_dA, grad_B, grad_C, pairs.own.sum((0, 2, 3))), want, strict=True):
            error = relative_error(got, wanted)
            assert error < 2e-5 and wanted.abs().max() > 1, (name, width, size, packed, error)

places = torch.arange(300)
documents = torch.stack([(places >= 10).int() + (places >= 70).int(), (places >= 31).int() + (places >= 32).int() + (places >= 40).int()])
ssd_pairs_triton.LAUNCH = ssd_pairs_triton.LAUNCH._replace(tile=16)
check(2, 75, 2, 6, 8, 16, 32, documents)
ssd_scan_triton.SMALL_LAUNCH = ssd_scan_triton.Launch(rows=16, heads=4, warps=4, stages=1)
ssd_columns_triton.SMALL_LAUNCH = ssd_columns_triton.Launch(rows=16, columns=16, warps=4, stages=1)
check(2, 75, 2, 8, 24, 32, 32, documents)
ssd_scan_triton.SMALL_LAUNCH, ssd_columns_triton.SMALL_LAUNCH = ssd_scan_triton.LAUNCH, ssd_columns_triton.LAUNCH
ssd_pairs_triton.LAUNCH = ssd_pairs_triton.LAUNCH._replace(tile=64)
check(1, 230, 1, 2, 80, 128, 128, documents)
""",
    "mamba core": """
from tests.ops import mamba_libraries
mamba_libraries.install()
from nanotrain.ops.gpu import mamba_core_kernels
from nanotrain.ops.mamba_core import mamba_core_ref
from nanotrain.ops.mamba_layout import MambaParameters, MambaSizes
from tests.ops.comparison import random_segments
mamba_core_kernels.restrict_to_tuned = lambda *sizes: None  # it asks the GPU
sizes = MambaSizes(num_heads=4, head_dim=24, num_groups=2, state_size=16, chunk_size=32, epsilon=1e-5)
channels = sizes.widths[1]
inputs = [randn(2, 75, sum(sizes.widths)) / 2, randn(channels, 1, 4) / 3, randn(channels) / 8]
inputs += [randn(4) - 2, torch.rand(4, generator=generator), randn(4), randn(sizes.inner)]
for ids in (None, random_segments(2, 75, 12, generator)):
    fast = lambda z, *p: mamba_core_kernels.mamba_core(z, MambaParameters(*p), sizes, ids)
    slow = lambda z, *p: mamba_core_ref(z, MambaParameters(*p), sizes, ids)
    assert worst_error(fast, slow, inputs, torch.float32) < 1e-5
""",
    "fp8": """
import numpy
import triton.language as tl
from nanotrain.ops.fp8 import quantize_tiles_ref, squared_relu_quantised_ref, to_e4m3
from nanotrain.ops.gpu.fp8_tiles_triton import PLAIN, Launch, quantise_tiles
convert = interpreter._convert_float  # it rounds wrongly into the next exponent and below the normal numbers
def soundly(values, source, target, rounding):
    if {source, target} - {tl.float32, tl.bfloat16, tl.float8e4nv}:
        return convert(values, source, target, rounding)
    values = torch.from_numpy(values.view("int16").copy()).view(torch.bfloat16) if source == tl.bfloat16 else torch.from_numpy(values)
    if target == tl.float8e4nv:
        return to_e4m3(values.float()).numpy()
    return values.float().numpy() if target == tl.float32 else values.bfloat16().view(torch.int16).numpy().view("uint16")
interpreter._convert_float = soundly
builder = interpreter.InterpreterBuilder  # it takes the bits of bf16 for integers
def widened(operation):
    def run(self, *handles_and_function):
        *handles, function = handles_and_function
        if handles[0].dtype.scalar != tl.bfloat16:
            return operation(self, *handles_and_function)
        return self.cast_impl(operation(self, *(self.cast_impl(h, tl.float32) for h in handles), function), tl.bfloat16)
    return run
builder.binary_op, builder.unary_op = widened(builder.binary_op), widened(builder.unary_op)
builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, numpy.fmax)  # and here NaN does not win
for height, width, group, dtype in (
    (128, 128, 8, torch.float32), (256, 384, 1, torch.bfloat16), (384, 256, 2, torch.bfloat16), (384, 256, 2, torch.float32),
):
    x, grad = randn(height, width) * torch.exp(2 * randn(height, 1)), randn(height, width)
    x[3], x[:, 5], x[7, :9], x[9, 64] = 0.0, 0.0, torch.inf, -torch.inf
    x[20] *= 1e-38  # 448 / amax is no fp32 number
    x[21], x[22, 0], x[:, 30] = 1e-41, 448.0, x[:, 30] * 1e30
    x[23] = torch.linspace(1.74, 1.76, width)  # about where the power of two changes
    for row in range(24, 40):
        x[row] = x[row].clamp(-2, 2)
        x[row, ::128] = torch.tensor(2.0 ** (row - 30) * 1.75).nextafter(torch.tensor(torch.inf if row % 2 else 0.0))
    x, grad = x.to(dtype) + 0.0, grad.to(dtype)  # no -0, of which the twin keeps the sign
    launch = Launch(4, 8, None, dtype == torch.bfloat16, group)
    forms = [(quantise_tiles(x, kind=PLAIN, launch=launch), quantize_tiles_ref(x))]
    for other in (None, grad):
        forms.append((quantise_tiles(x, other, launch=launch), squared_relu_quantised_ref(x, other)))
    for kind, (fast, slow) in enumerate(forms):
        for name in ("rows", "row_scales", "columns", "column_scales"):
            assert torch.equal(getattr(fast, name), getattr(slow, name)), (height, width, dtype, kind, name)
x = randn(128, 128)
x[4, 9] = torch.nan  # like Transformer Engine: it is itself in FP8 and does not count as the largest
clean = x.nan_to_num(0.0)
x[5, 9] = clean[5, 9] = 5.0
for kind, slow in ((PLAIN, quantize_tiles_ref(clean)), (1, squared_relu_quantised_ref(clean, None))):
    fast = quantise_tiles(x, kind=kind)
    slow.rows[4, 9] = slow.columns[9, 4] = 0x7F
    for name in ("rows", "row_scales", "columns", "column_scales"):
        assert torch.equal(getattr(fast, name), getattr(slow, name)), (kind, name)
""",
    "losses": """
from nanotrain.ops.gpu.softmax_losses_triton import cross_entropy_chunk, kl_divergence_chunk
from nanotrain.ops.kl_divergence import kl_divergence_chunk_ref
from nanotrain.ops.linear_cross_entropy import cross_entropy_chunk_ref
from nanotrain.ops.vocab_shard import VocabShard
student, teacher = 3 * randn(3, 5000), 3 * randn(3, 5000) + 40
labels = torch.tensor([0, 4999, 77])
shard = VocabShard(-5, lambda t: t, lambda t: t)  # this rank's rows begin before label 0
for sharded in (None, shard):
    pairs = [(f(student.clone(), labels - 5, sharded, True) if sharded else f(student.clone(), labels, None, True))
             for f in (cross_entropy_chunk, cross_entropy_chunk_ref)]
    pairs += [f(student.clone(), teacher.clone(), 1.7, sharded, True)
              for f in (kl_divergence_chunk, kl_divergence_chunk_ref)]
    for fast, slow in (pairs[:2], pairs[2:]):
        torch.testing.assert_close(fast[0], slow[0], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(fast[1], slow[1], rtol=1e-5, atol=2e-7)
from nanotrain.ops.gpu.gradient_scaling_triton import scale_in_place
values = randn(3, 5000).half()  # the interpreter cuts bf16 off instead of rounding it
factor = torch.tensor(1 / 7789)
scaled = values.clone()
scale_in_place(scaled, factor)
assert scaled.equal((values.float() * factor).half()) and not scaled.equal(values * factor.half())
""",
    "adamw": """
from nanotrain.ops.adamw import adamw_update_ref
from nanotrain.ops.gpu.adamw_triton import adamw_update
from nanotrain.ops.moments import AdamWStep, new_moments
for weights, states, shape in (
    (torch.float32, torch.float32, (7, 13)), (torch.float32, torch.uint8, (20, 256)),
    (torch.bfloat16, torch.float32, (7, 13)), (torch.bfloat16, torch.uint8, (20, 256)),
):  # bf16 moments are left to a GPU: the interpreter cuts bf16 off instead of rounding it
    ours = (0.02 * randn(*shape)).to(weights)
    twin = ours.clone()
    moments = new_moments(ours, states), new_moments(twin, states)
    for step in (1, 2, 3):
        gradient = (1e-3 * randn(*shape) ** 5).to(weights)
        numbers = AdamWStep(1e-3, 0.9, 0.95, 1e-8, 0.1, step, (step * 12345, 987))
        adamw_update(ours, gradient, moments[0], numbers, torch.tensor(True))
        adamw_update_ref(twin, gradient, moments[1], numbers)
    unequal = (ours.float() - twin.float()).abs() > 1e-7
    assert unequal.float().mean() < 0.002, (weights, states, unequal.float().mean())
    before = ours.clone()
    adamw_update(ours, gradient, moments[0], numbers, torch.tensor(False))
    assert ours.equal(before)
""",
}


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_equal_their_slow_twins(name):
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", PRELUDE + CASES[name]]
    result = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
