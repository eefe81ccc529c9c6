"""Parts of a 12B layer alone, form against form, each form checked first: FP8 products, quantisers, the Mamba-2 core.

    python -m tests.benchmarks.bench_parts_12b OUT.jsonl [--tokens 8192] [--chunks 128 256] [--skip PART ...]

Parts: gemm, widths, mlp, core; tiles have bench_quantise. Milliseconds are medians of interleaved rounds on random data, weights
quantised once.
"""

import argparse
import time
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from nanotrain.config.engine import Fp8Gemm, Precision
from nanotrain.ops import backends
from nanotrain.ops.backends import choose_kernels, load_fp8_products
from nanotrain.ops.linear import QuantizedProducts, WeightCopy
from nanotrain.ops.squared_relu_mlp import squared_relu_mlp, squared_relu_mlp_ref
from tests.benchmarks.bench_one_gpu import REDUCED, our_core
from tests.benchmarks.measure import interleaved, write

DEVICE = torch.device("cuda", 0)
SHAPES = {
    "in_proj": (22656, 5120),
    "out_proj": (5120, 10240),
    "up": (20480, 5120),
    "down": (5120, 20480),
    "q": (5120, 5120),
}
"""[N, K] of the layers' weights."""


def _widths() -> list[tuple[str, int, int]]:
    found = []
    for tensor in (1, 2, 4):
        for model, hidden, whole in (("9B", 4480, 15680), ("12B", 5120, 20480)):
            width = whole // tensor
            padded = -(-width // 128) * 128
            for rows in sorted({width, padded}):
                name = f"{model} / {tensor}{', padded' if rows > width else ''}"
                found += [(name, rows, hidden), (name, hidden, rows)]
    return found


WIDTHS = _widths()
"""(name, N, K) of the MLP's two matrices on one of so many tensor-parallel ranks."""


def difference(a: Tensor, b: Tensor) -> float:
    """Return ||a - b|| / ||b||."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def compare_products(tokens: int, out: Path) -> None:
    """The kernels of the three products on the same quantised operands, Transformer Engine's bits and fp64 beside them."""
    wanted = [gemm for gemm in Fp8Gemm if gemm is not Fp8Gemm.auto]
    if find_spec("deep_gemm") is None:
        wanted.remove(Fp8Gemm.deep_gemm)
    forms = {gemm.value: load_fp8_products(Precision.fp8_blockwise, DEVICE, gemm) for gemm in wanted}
    for name, (n, k) in SHAPES.items():
        write(out, {"part": "gemm", "shape": name, **_products_of(forms, tokens, n, k)})


def _products_of(forms: dict[str, QuantizedProducts], tokens: int, n: int, k: int) -> dict[str, object]:
    te, kind = forms["te"], torch.bfloat16
    x, grad = (torch.randn(tokens, width, device=DEVICE, dtype=kind) for width in (k, n))
    weight = torch.randn(n, k, device=DEVICE, dtype=kind) / k**0.5
    qx, qw, qg = te.quantize_activation(x, columns=True), te.quantize_weight(weight), te.quantize_gradient(grad)
    exact = (
        x[:512].double() @ weight.double().T,
        grad[:512].double() @ weight.double(),
        grad.T[:512].double() @ x.double(),
    )
    found, calls, expected = {}, {}, None
    for name, products in forms.items():
        three = {
            "output": partial(products.output, qx, qw, kind),
            "input gradient": partial(products.input_gradient, qg, qw, kind),
            "weight gradient": partial(products.weight_gradient, qg, qx, kind),
        }
        results = [product() for product in three.values()]
        expected = results if expected is None else expected
        found[f"{name} equals te"] = [torch.equal(a, b) for a, b in zip(results, expected, strict=True)]
        found[f"{name} off fp64"] = [difference(a[:512], e) for a, e in zip(results, exact, strict=True)]
        calls |= {f"{name} {product}": call for product, call in three.items()}
    return found | {form: t["median_ms"] for form, t in interleaved(calls, 9).items()}


def compare_widths(tokens: int, out: Path) -> None:
    """The 9B's MLP under tensor parallelism, whose rows are no multiple of a block of 128, beside the next multiple and the 12B's.

    Transformer Engine's three products each, as operations a second.
    """
    te, kind = load_fp8_products(Precision.fp8_blockwise, DEVICE, Fp8Gemm.te), torch.bfloat16
    for name, n, k in WIDTHS:
        x, grad = (torch.randn(tokens, width, device=DEVICE, dtype=kind) for width in (k, n))
        weight = torch.randn(n, k, device=DEVICE, dtype=kind) / k**0.5
        qx, qw, qg = te.quantize_activation(x, columns=True), te.quantize_weight(weight), te.quantize_gradient(grad)
        forms = {
            "output": partial(te.output, qx, qw, kind),
            "input gradient": partial(te.input_gradient, qg, qw, kind),
            "weight gradient": partial(te.weight_gradient, qg, qx, kind),
            "quantised weight": partial(te.quantize_weight, weight),
        }
        times = {form: t["median_ms"] for form, t in interleaved(forms, 9).items()}
        rates = {f"{form}_tflops": 2e-9 * tokens * n * k / ms for form, ms in list(times.items())[:3]}
        write(out, {"part": "widths", "shape": name, "rows": n, "columns": k, **times, **rates})


def compare_mlps(tokens: int, out: Path) -> None:
    """An MLP layer with squared ReLU quantised in its own pass, or as three ops."""
    choose_kernels({"squared_relu": "triton"}, DEVICE)
    products = load_fp8_products(Precision.fp8_blockwise, DEVICE)
    copies = [WeightCopy(products) for _ in range(2)]
    x = torch.randn(tokens, 5120, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    up, down = (
        (torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16) / k**0.5).requires_grad_()
        for n, k in (SHAPES["up"], SHAPES["down"])
    )
    grad = torch.randn(tokens, 5120, device=DEVICE, dtype=torch.bfloat16)

    def step(form):
        y = form(x, up, down, *copies)
        return (y, *torch.autograd.grad(y, (x, up, down), grad))

    apart = [difference(a, b) for a, b in zip(step(squared_relu_mlp), step(squared_relu_mlp_ref), strict=True)]
    times = interleaved({"fused": lambda: step(squared_relu_mlp), "apart": lambda: step(squared_relu_mlp_ref)}, 9)
    write(out, {"part": "mlp", "difference": apart, **times})


def compare_cores(tokens: int, chunks: list[int], out: Path) -> None:
    """Conv, scan, gate and norm as one op or each by its own kernel, by chunk size; forward and backward."""
    shape = (1, tokens, REDUCED.in_proj_size)
    zxBCdt = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    grad = torch.randn(1, tokens, REDUCED.mamba_inner_size, device=DEVICE, dtype=torch.bfloat16)
    forms, first, results = {}, {}, {}
    for chunk in chunks:
        for name, kernels in (("apart", {"mamba_core": "torch"}), ("fused", {})):
            core = our_core(replace(REDUCED, chunk_size=chunk), kernels, DEVICE)

            def step(core=core):
                zxBCdt.grad = None
                y = core(zxBCdt)
                y.backward(grad)
                return y.detach(), zxBCdt.grad

            start = time.perf_counter()
            results[f"{name} {chunk}"] = [t.clone() for t in step()]
            torch.cuda.synchronize()
            first[f"{name} {chunk}"] = time.perf_counter() - start
            forms[f"{name} {chunk}"] = step
    reference = results[f"apart {chunks[0]}"]
    apart = {name: [difference(a, b) for a, b in zip(got, reference, strict=True)] for name, got in results.items()}
    times = interleaved(forms, 9)
    write(out, {"part": "core", "first_s": first, "difference": apart, **times})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--chunks", type=int, nargs="*", default=[128, 256])
    parser.add_argument("--skip", nargs="*", default=[])
    options = parser.parse_args()
    torch.manual_seed(1)
    parts = {
        "gemm": lambda: compare_products(options.tokens, options.out),
        "widths": lambda: compare_widths(options.tokens, options.out),
        "mlp": lambda: compare_mlps(options.tokens, options.out),
        "core": lambda: compare_cores(options.tokens, options.chunks, options.out),
    }
    for name, part in parts.items():
        if name in options.skip:
            continue
        backends._chosen.clear()
        start = time.perf_counter()
        try:
            part()
        except Exception as error:  # a form that fails must not lose the others' numbers
            write(options.out, {"part": name, "failed": f"{type(error).__name__}: {error}"[:600]})
        print(f"-- {name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
