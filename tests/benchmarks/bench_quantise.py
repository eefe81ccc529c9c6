"""FP8 tiles in both directions: our kernel's launches beside Transformer Engine's quantiser, equal bits first and then times.

python -m tests.benchmarks.bench_quantise OUT.jsonl      (one GPU, under a minute)

A form is called some times in a row on rotating inputs, whose outputs all stay, so that the L2 cache helps none of them;
one such row per form and round. A launch that fails, or is off, is a row of its own.
"""

import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nanotrain.ops.fp8 import Quantized
from nanotrain.ops.gpu.compile_ahead import compiling_only
from nanotrain.ops.gpu.fp8_tiles_triton import PLAIN, SQUARED_RELU, SQUARED_RELU_GRADIENT, Launch, quantise_tiles
from nanotrain.ops.gpu.transformer_engine_products import BlockwiseProducts
from tests.benchmarks.measure import write

Form = Callable[[Tensor, Tensor], Quantized]

DEVICE, ROWS, CALLS, ROUNDS = "cuda", 8192, 20, 9
NAMES = {PLAIN: "plain", SQUARED_RELU: "squared relu", SQUARED_RELU_GRADIENT: "gradient"}
CASES = [(PLAIN, width) for width in (1024, 5120, 10240, 20480, 22656)]
CASES += [(kind, 20480) for kind in (SQUARED_RELU, SQUARED_RELU_GRADIENT)]
LAUNCHES = [
    Launch(*numbers)
    for numbers in (
        (8, 8, None, False, 8),
        (8, 8, None, False, 1),
        (8, 8, 80, False, 8),
        (8, 8, 80, True, 8),
        (4, 8, 168, False, 8),
        (4, 8, 168, False, 1),
        (4, 8, 168, False, 64),
        (4, 16, 168, False, 8),
        (4, 16, 168, False, 2),
        (4, 16, 128, True, 8),
        (4, 8, 128, True, 8),
        (16, 8, None, False, 8),
    )
]
CACHES = 10 * 50 * 2**20
"""Bytes of the inputs that take turns: many times an H200's L2 cache."""


def values(width: int, seed: int) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(ROWS, width, device=DEVICE, generator=generator, dtype=torch.bfloat16)


def ours(kind: int, launch: Launch) -> Form:
    return lambda x, grad: quantise_tiles(x, grad if kind == SQUARED_RELU_GRADIENT else None, kind=kind, launch=launch)


def launches(kind: int) -> list[Launch]:
    return [launch for launch in LAUNCHES if kind == PLAIN or not launch.packed]


def expected(te: BlockwiseProducts, kind: int, x: Tensor, grad: Tensor) -> Quantized:
    """Transformer Engine's tiles, of the fp32 result where ours has the function inside."""
    if kind == PLAIN:
        return te._quantize(x, 1, True)
    positive = x.float().clamp_(min=0.0)
    return te._quantize(positive.square_() if kind == SQUARED_RELU else positive.mul_(2.0).mul_(grad), 1, True)


def unequal(fast: Quantized, slow: Quantized) -> list[str]:
    names = ("rows", "row_scales", "columns", "column_scales")
    return [name for name in names if not torch.equal(getattr(fast, name), getattr(slow, name))]


def check(te: BlockwiseProducts, out: Path) -> set[tuple[int, Launch]]:
    """Write which launches fail or give other bits than Transformer Engine; return those that do neither."""
    x, grad = values(1024, 0), values(1024, 1)
    x *= torch.exp(2 * torch.randn(ROWS, 1, device=DEVICE)).bfloat16()
    x[3], x[:, 5], x[7, :9], x[120] = 0.0, 0.0, torch.inf, 1e-39
    try:
        with compiling_only():
            for kind in NAMES:
                for launch in launches(kind):
                    ours(kind, launch)(x, grad)
    except Exception as error:  # the launch itself will fail again, and be a row then
        write(out, {"compiling": repr(error)[:300]})
    sound = set()
    for kind, name in NAMES.items():
        slow = expected(te, kind, x, grad)
        for launch in launches(kind):
            try:
                off = unequal(ours(kind, launch)(x, grad), slow)
            except Exception as error:
                off = [repr(error)[:300]]
            if off:
                write(out, {"case": name, "launch": tuple(launch), "off": off})
            else:
                sound.add((kind, launch))
    return sound


def milliseconds(form: Form, inputs: list[tuple[Tensor, Tensor]]) -> float:
    """One call's time, of CALLS that the device starts only when the host has queued them all."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(4_000_000)
    start.record()
    kept = [form(*inputs[index % len(inputs)]) for index in range(CALLS)]
    end.record()
    end.synchronize()
    del kept
    return start.elapsed_time(end) / CALLS


def time_case(te: BlockwiseProducts, kind: int, width: int, sound: set[tuple[int, Launch]], out: Path) -> None:
    streams = 3 if kind == SQUARED_RELU_GRADIENT else 2
    gigabytes = 2e-9 * ROWS * width * streams
    count = max(2, min(CALLS, math.ceil(CACHES / (2 * ROWS * width))))
    inputs = []
    for seed in range(count):
        x = values(width, seed)
        inputs.append((x, values(width, CALLS + seed) if streams == 3 else x))
    forms: dict[str, Form] = {"te": lambda x, grad: te._quantize(x, 1, True)} if kind == PLAIN else {}
    forms |= {str(tuple(launch)): ours(kind, launch) for launch in LAUNCHES if (kind, launch) in sound}
    times: dict[str, list[float]] = {name: [] for name in forms}
    order = list(forms)
    for round_ in range(ROUNDS + 1):
        order = [*order[1:], order[0]]
        for name in order:
            taken = milliseconds(forms[name], inputs)
            if round_ > 0:
                times[name].append(taken)
    for name, taken in times.items():
        median = statistics.median(taken)
        row = {"ms": median, "min_ms": min(taken), "max_ms": max(taken), "tb_s": gigabytes / median}
        write(out, {"case": NAMES[kind], "width": width, "form": name, **{k: round(v, 4) for k, v in row.items()}})


def main() -> None:
    out = Path(sys.argv[1])
    write(out, {"device": torch.cuda.get_device_name(), "rows": ROWS, "calls": CALLS, "rounds": ROUNDS})
    te = BlockwiseProducts()
    sound = check(te, out)
    for kind, width in CASES:
        time_case(te, kind, width, sound, out)


if __name__ == "__main__":
    main()
