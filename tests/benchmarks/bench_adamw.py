"""One AdamW step over tensors of the 12B: our kernel in every form, torch's fused AdamW, torchao's AdamW8bit.

python -m tests.benchmarks.bench_adamw OUT.jsonl      (one GPU, about a minute; torchao is left out when it is not installed)
"""

import importlib.util
import sys
import time
from pathlib import Path

import torch

from nanotrain.ops.adamw import adamw_update, adamw_update_ref
from nanotrain.ops.backends import choose_kernels
from nanotrain.ops.moments import AdamWStep, new_moments
from tests.benchmarks.measure import interleaved, write

SHAPES = ((131072, 5120), (22656, 5120), (5120, 10240), (20480, 5120), (5120, 20480))
FORMS = {
    f"{str(p)[6:]} weights, {str(s)[6:]} moments": (p, s)
    for p in (torch.float32, torch.bfloat16)
    for s in (torch.float32, torch.bfloat16, torch.uint8)
}


def tensors(dtype: torch.dtype, std: float, shapes=SHAPES) -> list[torch.Tensor]:
    return [torch.empty(s, device="cuda", dtype=dtype).normal_(0, std) for s in shapes]


def agreement(out: Path) -> None:
    """Write how far the kernel is from its twin after three steps."""
    for name, (dtype, moments_dtype) in FORMS.items():
        ours = tensors(dtype, 0.02, [(3000, 512)])[0]
        twin = ours.clone()
        states = new_moments(ours, moments_dtype), new_moments(twin, moments_dtype)
        for step in (1, 2, 3):
            gradient = tensors(dtype, 1e-4, [(3000, 512)])[0] * torch.rand(3000, 512, device="cuda").to(dtype) ** 8
            numbers = AdamWStep(1e-3, 0.9, 0.95, 1e-8, 0.1, step, (step, 7))
            adamw_update(ours, gradient, states[0], numbers, torch.ones((), dtype=torch.bool, device="cuda"))
            adamw_update_ref(twin, gradient, states[1], numbers)
        before = ours.clone()
        adamw_update(ours, gradient, states[0], numbers, torch.zeros((), dtype=torch.bool, device="cuda"))
        assert ours.equal(before), "an update that is not allowed must write nothing"
        write(out, {
            "agreement": name, "largest": float((ours.float() - twin.float()).abs().max()),
            "share_unequal": float((ours != twin).float().mean()),
            "moments_unequal": [float((a != b).float().mean()) for a, b in ((states[0].average, states[1].average), (states[0].square, states[1].square))],
        })  # fmt: skip


def library(kind: str):
    """Return (step function, seconds of the first step) of a library's optimizer over the same shapes."""
    dtype = torch.float32 if kind == "torch fused" else torch.bfloat16
    parameters = tensors(dtype, 0.02)
    for p in parameters:
        p.grad = torch.empty_like(p).normal_(0, 1e-4)
    if kind == "torch fused":
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    else:
        from torchao.optim import AdamW8bit

        optimizer = AdamW8bit(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, bf16_stochastic_round=True)
    torch.cuda.synchronize()
    start = time.perf_counter()
    optimizer.step()
    torch.cuda.synchronize()
    return optimizer.step, time.perf_counter() - start


def ours(dtype: torch.dtype, moments_dtype: torch.dtype):
    parameters, gradients = tensors(dtype, 0.02), tensors(dtype, 1e-4)
    moments = [new_moments(p, moments_dtype) for p in parameters]
    count = [0]

    def step():
        count[0] += 1
        for index, (p, g, m) in enumerate(zip(parameters, gradients, moments, strict=True)):
            adamw_update(p, g, m, AdamWStep(1e-4, 0.9, 0.95, 1e-8, 0.1, count[0], (count[0], index)))

    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return step, time.perf_counter() - start


def main(out: Path) -> None:
    choose_kernels({"adamw": "triton"}, torch.device("cuda"))
    agreement(out)
    total = sum(a * b for a, b in SHAPES)
    makers = {name: lambda form=form: ours(*form) for name, form in FORMS.items()} | {
        "torch fused": lambda: library("torch fused")
    }
    if importlib.util.find_spec("torchao") is None:
        write(out, {"skipped": "torchao is not installed"})
    else:
        makers["torchao AdamW8bit"] = lambda: library("torchao")
    steps, firsts = {}, {}
    for name, make in makers.items():
        steps[name], firsts[name] = make()
    for name, times in interleaved(steps, rounds=10).items():
        write(out, {
            "optimizer": name, **times, "first_step_seconds": firsts[name], "parameters": total,
            "ms_for_12.31B": times["median_ms"] * 12.31e9 / total,
        })  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
