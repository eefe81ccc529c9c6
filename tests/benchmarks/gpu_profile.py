"""Where the time of a step goes on the GPU: kernels by kind, and the time in which no kernel runs."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

KINDS = (
    ("communication", r"nccl"),
    ("gathered and divided weights", r"split_with_sizes_copy|chunk_cat"),
    ("casts to FP8", r"quanti[sz]e|_cast_|block_scal"),
    ("FP8 products", r"fp8.*gemm|gemm.*fp8|fp8_product|e4m3|qqtst|deep_gemm|nvjet_qq"),
    ("bf16 products", r"gemm|nvjet|cutlass.*bf16"),
    ("attention", r"cudnn.*(sdpa|flash)|fmha|flash"),
    ("scan", r"_chunk_|_state_passing|_bmm_|ssd|^_(walk|pairs|scan|columns|decays)$"),
    ("convolution", r"causal_conv1d|conv1d"),
    ("norms and gates", r"norm|gate|^_forward$|^_backward$"),
    ("loss", r"cross_entropy|kl_div|softmax"),
    ("element-wise", r"elementwise|reduce|vectorized|fill|copy|memset|memcpy|cat"),
)
"""Kind and pattern of kernels' names, the first that fits; what fits none is counted as `other`."""


class Span(NamedTuple):
    """A kernel's time on the GPU, microseconds."""

    name: str
    start: float
    end: float


def kind_of(name: str) -> str:
    """Return the kind of a kernel by its name."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def summarize(spans: Sequence[Span], longest: int = 8) -> dict[str, object]:
    """Return the milliseconds from the first kernel to the last, with and without a kernel running, by kind and by gap.

    Kernels of several streams that overlap are counted once as `busy_ms` and each as its kind.

    Args:
        spans: kernels of one step, in any order; at least one.
        longest: gaps to name, each as [milliseconds, kernel before, kernel after].
    """
    ordered = sorted(spans, key=lambda span: span.start)
    reached, before, busy = ordered[0].start, "", 0.0
    gaps: list[tuple[float, str, str]] = []
    for span in ordered:
        if span.start > reached:
            gaps.append((span.start - reached, before, span.name))
        busy += max(span.end - max(span.start, reached), 0.0)
        if span.end > reached:
            reached, before = span.end, span.name
    kinds: Counter[str] = Counter()
    for span in ordered:
        kinds[kind_of(span.name)] += span.end - span.start
    return {
        "span_ms": (reached - ordered[0].start) / 1e3,
        "busy_ms": busy / 1e3,
        "kernels": len(ordered),
        "kinds_ms": {kind: round(us / 1e3, 2) for kind, us in kinds.most_common()},
        "longest_gaps": [(round(us / 1e3, 3), a[:60], b[:60]) for us, a, b in sorted(gaps, reverse=True)[:longest]],
    }


def record(step: Callable[[], None], warmup: int = 2) -> list[Span]:
    """Return the kernels of one step, right after others, so that the clock is that of a long run."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile, schedule

    with profile(
        activities=[ProfilerActivity.CUDA], schedule=schedule(wait=0, warmup=warmup, active=1), acc_events=True
    ) as recorded:
        for _ in range(warmup + 1):
            step()
            if recorded.step_num >= warmup - 1:  # what still runs of the step before would be recorded too
                torch.cuda.synchronize()
            recorded.step()
    return [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in recorded.events() or ()
        if event.device_type == DeviceType.CUDA and not event.name.startswith("ProfilerStep")
    ]


def kernels_of(spans: Sequence[Span], longest: int) -> list[tuple[str, float, int]]:
    """Return (name, milliseconds, calls) of the kernels that take the longest, the first one most."""
    total: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for span in spans:
        total[span.name] += (span.end - span.start) / 1e3
        count[span.name] += 1
    return [(name[:150], round(ms, 3), count[name]) for name, ms in total.most_common(longest)]


def table(spans: Sequence[Span], rows: int = 70) -> str:
    """Return the kernels by name, the longest first, as lines of text."""
    whole = sum(span.end - span.start for span in spans) / 1e3
    lines = [f"{whole:9.2f} ms of kernels"]
    lines += [f"{ms:9.3f} ms x{calls:<5d} {name}" for name, ms, calls in kernels_of(spans, rows)]
    return "\n".join(lines) + "\n"
