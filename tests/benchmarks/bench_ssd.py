"""Forward and backward of the chunked SSD scan on CPU against other pure-PyTorch formulations.

    OMP_NUM_THREADS=2 python tests/benchmarks/bench_ssd.py [--threads 2] [--repeats 30]

The others: transformers' own torch path, as installed; the einsum form of the Mamba-2 paper's listing 1 (four-operand
contractions, B and C repeated for the heads of a group); and this package's layout on plain autograd, without its own
backward. One round runs each once, in rotating order, so that a change of the machine's speed meets all alike; ratios
are taken within a round. Results are compared first. `--check` compares and times a single round.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

from nanotrain.ops import ssd

SHAPES = {  # batch, length, heads, head width, groups, state size, chunk
    "quickstart": (16, 256, 8, 32, 2, 32, 64),
    "quickstart, state 64": (16, 256, 8, 32, 2, 64, 64),
    "quickstart, chunk 128": (16, 256, 8, 32, 2, 32, 128),
    "one head group of the 12B": (1, 1024, 16, 80, 1, 128, 128),
}


def cumulative_differences(a: Tensor) -> Tensor:
    """[..., T] -> [..., T, T]: sums of a over (j, i], -inf above the diagonal."""
    length = a.shape[-1]
    rows = a[..., None].expand(*a.shape, length)
    below = torch.ones(length, length, dtype=torch.bool).tril(-1)
    sums = rows.masked_fill(~below, 0.0).cumsum(-2)
    return sums.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)


def einsum_form(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, chunk: int) -> Tensor:
    """The paper's listing: quadratic form in chunks, states by contraction, chunk recurrence as a small matrix."""
    batch, length, heads, width = x.shape
    repeat = heads // B.shape[2]
    xs = (x * dt[..., None]).reshape(batch, length // chunk, chunk, heads, width)
    Bs, Cs = (t.repeat_interleave(repeat, 2).reshape(batch, length // chunk, chunk, heads, -1) for t in (B, C))
    a = (dt * A).reshape(batch, length // chunk, chunk, heads).permute(0, 3, 1, 2)
    total = a.cumsum(-1)
    within = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", Cs, Bs, cumulative_differences(a).exp(), xs)
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", Bs, (total[..., -1:] - total).exp(), xs)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
    carry = cumulative_differences(F.pad(total[..., -1], (1, 0))).exp()
    states = torch.einsum("bhzc,bchpn->bzhpn", carry, states)[:, :-1]
    across = torch.einsum("bclhn,bchpn,bhcl->bclhp", Cs, states, total.exp())
    return (within + across).reshape(x.shape) + D[:, None] * x


def on_autograd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, chunk: int) -> Tensor:
    """Our layout, with the [L, L] part left to autograd."""

    class Plain:
        @staticmethod
        def apply(xdt: Tensor, scores: Tensor, log: Tensor, hidden: Tensor) -> Tensor:
            decay = (log[..., :, None] - log[..., None, :]).masked_fill(hidden, -torch.inf).exp()
            return xdt @ (decay * scores[:, :, :, None]).transpose(-1, -2)

    own, ssd._WithinChunks = ssd._WithinChunks, Plain
    try:
        return ssd.ssd_scan(x, dt, A, B, C, D, chunk_size=chunk)[0]
    finally:
        ssd._WithinChunks = own


FORMS: dict[str, Callable[..., Tensor]] = {
    "nanotrain": lambda *a: ssd.ssd_scan(*a[:6], chunk_size=a[6])[0],
    "transformers": lambda *a: mamba2_chunk_scan(*a[:5], a[6], D=a[5]),
    "einsum": einsum_form,
    "nanotrain on autograd": on_autograd,
}


def make_inputs(shape: tuple[int, ...]) -> list[Tensor]:
    batch, length, heads, width, groups, size, _ = shape
    generator = torch.Generator().manual_seed(0)

    def randn(*dims: int) -> Tensor:
        return torch.randn(*dims, generator=generator)

    dt = F.softplus(randn(batch, length, heads) - 4)
    A = -torch.empty(heads).uniform_(1, 16, generator=generator)
    inputs = [randn(batch, length, heads, width), dt, A]
    inputs += [randn(batch, length, groups, size), randn(batch, length, groups, size), torch.ones(heads)]
    return [t.requires_grad_() for t in inputs]


def run(form: Callable[..., Tensor], inputs: list[Tensor], chunk: int, grad: Tensor) -> tuple[float, list[Tensor]]:
    start = time.perf_counter()
    y = form(*inputs, chunk)
    gradients = torch.autograd.grad(y, inputs, grad)
    return time.perf_counter() - start, [y.detach(), *gradients]


def bench(name: str, shape: tuple[int, ...], repeats: int) -> None:
    inputs, chunk = make_inputs(shape), shape[-1]
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    results = {form: run(function, inputs, chunk, grad)[1] for form, function in FORMS.items()}
    for form, tensors in results.items():
        for ours, theirs in zip(results["nanotrain"], tensors, strict=True):
            error = float((ours - theirs).abs().max() / theirs.abs().max())
            assert error < 1e-4, f"{form} differs by {error:.1e}"
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    order = list(FORMS)
    for _ in range(repeats):
        order = [*order[1:], order[0]]
        for form in order:
            seconds[form].append(run(FORMS[form], inputs, chunk, grad)[0])
    print(f"\n{name}: batch, length, heads, width, groups, state, chunk = {shape}")
    for form, times in seconds.items():
        ratios = [ours / other for ours, other in zip(seconds["nanotrain"], times, strict=True)]
        numbers = [1e3 * f(times) for f in (min, statistics.median, max)]
        spread = [f(ratios) for f in (min, statistics.median, max)]
        print(
            f"| {form} | {numbers[0]:.1f} / {numbers[1]:.1f} / {numbers[2]:.1f} |"
            f" {spread[0]:.2f} / {spread[1]:.2f} / {spread[2]:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--check", action="store_true", help="one round of the first shape")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads; ms min / median / max; nanotrain / other, per round")
    for name, shape in list(SHAPES.items())[: 1 if options.check else None]:
        bench(name, shape, 1 if options.check else options.repeats)


if __name__ == "__main__":
    main()
