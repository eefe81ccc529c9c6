"""The backward pass of the scan, and its outputs, at the 12B's shape: our kernels against mamba-ssm's, results first and then times.

python -m tests.benchmarks.bench_scan_backward OUT.jsonl      (one GPU, half a minute)

Differences are norms relative to the other's. "wide" is mamba-ssm's path on the same values in fp32 (products in TF32).
A launch that fails, or is off, is a row of its own.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mamba_ssm.ops.triton.ssd_bmm import _bmm_chunk_fwd  # pyright: ignore[reportMissingImports]
from mamba_ssm.ops.triton.ssd_chunk_scan import (  # pyright: ignore[reportMissingImports]
    _chunk_scan_bwd_dC,
    _chunk_scan_bwd_dcb,
    _chunk_scan_bwd_ddAcs_stable,
    _chunk_scan_fwd,
)
from mamba_ssm.ops.triton.ssd_chunk_state import (  # pyright: ignore[reportMissingImports]
    _chunk_cumsum_fwd,
    _chunk_state_bwd_db,
)
from mamba_ssm.ops.triton.ssd_combined import _chunk_scan_chunk_state_bwd_dx  # pyright: ignore[reportMissingImports]
from torch import Tensor

from nanotrain.ops.gpu import ssd_columns_triton, ssd_scan_triton
from nanotrain.ops.gpu.compile_ahead import compiling_only
from nanotrain.ops.gpu.ssd_columns_triton import gradient_of_B, gradient_of_C
from nanotrain.ops.gpu.ssd_decays_triton import gradients_of_decays
from nanotrain.ops.gpu.ssd_pairs_triton import pair_gradients
from nanotrain.ops.gpu.ssd_scan_triton import gradient_of_inputs, scan_outputs
from nanotrain.ops.gpu.ssd_states_triton import gradients_of_states, states_before_chunks
from nanotrain.ops.gpu.tuned_configs import restrict_to_tuned
from nanotrain.ops.segments import segment_indices
from tests.benchmarks.measure import interleaved, write
from tests.ops.comparison import random_segments

DEVICE = "cuda"
LENGTH, CHUNK, HEADS, WIDTH, GROUPS, SIZE = 8192, 128, 128, 80, 8, 128
SCAN_LAUNCHES = [
    ssd_scan_triton.Launch(*numbers)
    for numbers in ((128, 16, 8, 3), (128, 8, 8, 3), (128, 16, 8, 2), (64, 16, 4, 3), (64, 16, 4, 1), (64, 8, 4, 1))
]
COLUMN_LAUNCHES = [
    ssd_columns_triton.Launch(*numbers)
    for numbers in ((128, 128, 8, 3), (128, 128, 8, 2), (64, 128, 4, 2), (128, 64, 8, 2), (64, 64, 4, 3))
]


class Case(NamedTuple):
    """What the backward pass of a layer's scan has at hand; shapes as in the ops."""

    x: Tensor
    B: Tensor
    C: Tensor
    grad: Tensor
    dt: Tensor
    decay: Tensor
    D: Tensor
    documents: Tensor | None
    scores: Tensor
    states: Tensor
    grad_states: Tensor
    of_chunks: Tensor
    grad_x: Tensor


def make_case(dtype: torch.dtype, packed: bool) -> Case:
    generator = torch.Generator(DEVICE).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        values = torch.randn(*shape, device=DEVICE, generator=generator)
        return values.bfloat16().to(dtype)  # the same values in either dtype

    restrict_to_tuned(WIDTH, SIZE, CHUNK, dtype)
    wide = randn(1, LENGTH, HEADS * WIDTH + 2 * GROUPS * SIZE)
    x, B, C = wide.split([HEADS * WIDTH, GROUPS * SIZE, GROUPS * SIZE], dim=-1)
    x, B, C = x.unflatten(-1, (HEADS, WIDTH)), B.unflatten(-1, (GROUPS, SIZE)), C.unflatten(-1, (GROUPS, SIZE))
    grad = randn(1, LENGTH, HEADS, WIDTH)
    A = -torch.empty(HEADS, device=DEVICE).uniform_(1, 16, generator=generator)
    decay, dt = _chunk_cumsum_fwd(F.softplus(randn(1, LENGTH, HEADS).float() - 4), A, CHUNK)
    D = randn(HEADS).float()
    ids = random_segments(1, LENGTH, 700, torch.Generator().manual_seed(1)).to(DEVICE) if packed else None
    index = None if ids is None else segment_indices(ids)
    scores = _bmm_chunk_fwd(C, B, CHUNK, seq_idx=index, output_dtype=torch.float32)
    states = states_before_chunks(x, dt, decay, B, index)
    grad_states, of_chunks = gradients_of_states(grad, decay, C, states, index)
    grad_x = torch.empty_like(wide)[..., : HEADS * WIDTH].unflatten(-1, (HEADS, WIDTH))
    return Case(x, B, C, grad, dt, decay, D, index, scores, states, grad_states, of_chunks, grad_x)


def scores_of(c: Case) -> Tensor:
    return _bmm_chunk_fwd(c.C, c.B, CHUNK, seq_idx=c.documents, output_dtype=torch.float32)


def outputs_before(c: Case) -> Tensor:
    return _chunk_scan_fwd(c.scores, c.x, c.dt, c.decay, c.C, c.states, D=c.D, seq_idx=c.documents)[0]


def inputs_before(c: Case) -> tuple[Tensor, Tensor, Tensor]:
    return _chunk_scan_chunk_state_bwd_dx(
        c.x, c.dt, c.decay, c.B, c.scores, c.grad, c.grad_states, D=c.D, seq_idx=c.documents, dx=c.grad_x
    )


def B_before(c: Case) -> tuple[Tensor, Tensor]:
    return _chunk_state_bwd_db(c.x, c.dt, c.decay, c.grad_states, seq_idx=c.documents, B=c.B, ngroups=GROUPS)


def C_before(c: Case) -> tuple[Tensor, Tensor]:
    return _chunk_scan_bwd_dC(c.states, c.decay, c.grad, seq_idx=c.documents, C=c.C, ngroups=GROUPS)


def pairs_before(c: Case) -> tuple[Tensor, Tensor]:
    of_scores = _chunk_scan_bwd_dcb(c.x, c.dt, c.decay, c.grad, seq_idx=c.documents, ngroups=GROUPS)
    return of_scores, _chunk_scan_bwd_ddAcs_stable(c.x, c.dt, c.decay, c.grad, c.scores)


def decays_before(grad_decay: Tensor, of_pairs: Tensor, of_chunks: Tensor, to_end: Tensor) -> Tensor:
    grad_decay[..., -1] += of_chunks
    return grad_decay.flip(-1).cumsum(-1).flip(-1) + to_end + of_pairs


def before(c: Case) -> dict[str, Tensor]:
    x, dt, D = inputs_before(c)
    B, to_end = B_before(c)
    C, decay = C_before(c)
    scores, of_pairs = pairs_before(c)
    dA = decays_before(decay, of_pairs, c.of_chunks, to_end)
    return {"x": x, "dt": dt, "D": D, "B": B, "C": C, "scores": scores, "dA": dA}


def outputs(c: Case, launch: ssd_scan_triton.Launch | None = None) -> Tensor:
    return scan_outputs(c.x, c.dt, c.decay, c.B, c.C, c.states, c.D, c.documents, launch)


def inputs(c: Case, launch: ssd_scan_triton.Launch | None = None) -> Tensor:
    gradient_of_inputs(c.grad, c.dt, c.decay, c.B, c.C, c.grad_states, c.D, c.documents, c.grad_x, launch)
    return c.grad_x


def of_B(c: Case, launch: ssd_columns_triton.Launch | None = None) -> tuple[Tensor, Tensor]:
    return gradient_of_B(c.x, c.B, c.grad_states, c.dt, c.decay, c.documents, launch)


def of_C(c: Case, launch: ssd_columns_triton.Launch | None = None) -> tuple[Tensor, Tensor]:
    return gradient_of_C(c.grad, c.C, c.states, c.decay, c.documents, launch)


def now(c: Case) -> dict[str, Tensor]:
    (B, B_parts), (C, C_parts) = of_B(c), of_C(c)
    pairs = pair_gradients(c.x, c.grad, c.dt, c.decay, c.scores, c.documents)
    dA, dt = gradients_of_decays(c.dt, pairs.parts, B_parts, C_parts, c.of_chunks)
    D = pairs.own.sum((0, 2, 3))
    return {"x": inputs(c), "dt": dt, "D": D, "B": B, "C": C, "scores": pairs.scores, "dA": dA}


def apart(mine: Tensor, other: Tensor) -> float:
    mine, other = mine.double(), other.double()
    return float((mine - other).norm() / other.norm())


def results(form: Callable[[Case], dict[str, Tensor]], c: Case) -> dict[str, Tensor]:
    """`form`'s gradients, copied: both write x's into the same memory."""
    c.grad_x.fill_(torch.nan)
    return {name: value.clone() for name, value in form(c).items()}


def agreement(packed: bool, out: Path) -> Case:
    case = make_case(torch.float32, packed)
    wide = results(before, case) | {"y": outputs_before(case)}
    case = make_case(torch.bfloat16, packed)
    theirs = results(before, case) | {"y": outputs_before(case)}
    ours = results(now, case) | {"y": outputs(case)}
    for name, mine in ours.items():
        row = {"ours_to_theirs": apart(mine, theirs[name]), "ours_to_wide": apart(mine, wide[name])}
        write(out, {"result": name, "packed": packed, **row, "theirs_to_wide": apart(theirs[name], wide[name])})
    return case


def attempt(out: Path, name: str, run: Callable[[], float]) -> bool:
    """Write how far the launch's result is off, or why there is none; return whether it may be timed."""
    try:
        off = run()
        torch.cuda.synchronize()
    except Exception as error:
        write(out, {"launch": name, "failed": repr(error)[:300]})
        return False
    write(out, {"launch": name, "off": off})
    return off < 0.01


def compile_all(case: Case, out: Path) -> None:
    try:
        with compiling_only():
            for launch in SCAN_LAUNCHES:
                inputs(case, launch)
                outputs(case, launch)
            for launch in COLUMN_LAUNCHES:
                of_B(case, launch)
                of_C(case, launch)
    except Exception as error:  # the launch itself will fail again, and be a row then
        write(out, {"compiling": repr(error)[:300]})


def launches(case: Case, out: Path) -> dict[str, Callable[[], object]]:
    """Return the launches that give the right result."""
    compile_all(case, out)
    theirs = results(before, case) | {"y": outputs_before(case)}
    forms: dict[str, Callable[[], object]] = {}
    for letter, form in (("x", inputs), ("y", outputs)):
        for launch in SCAN_LAUNCHES:
            case.grad_x.fill_(torch.nan)
            name = f"{letter} {tuple(launch)}"
            run = lambda launch=launch, form=form, letter=letter: apart(form(case, launch), theirs[letter])  # noqa: E731
            if attempt(out, name, run):
                forms[name] = lambda launch=launch, form=form: form(case, launch)
    for letter, form in (("B", of_B), ("C", of_C)):
        for launch in COLUMN_LAUNCHES:
            name = f"{letter} {tuple(launch)}"
            run = lambda launch=launch, form=form, letter=letter: apart(form(case, launch)[0], theirs[letter])  # noqa: E731
            if attempt(out, name, run):
                forms[name] = lambda launch=launch, form=form: form(case, launch)
    return forms


def parts(c: Case) -> dict[str, Callable[[], object]]:
    """Each part of either path, and either as a whole."""
    sums, zeros = pair_gradients(c.x, c.grad, c.dt, c.decay, c.scores, c.documents), torch.zeros_like(c.dt)
    B_parts, C_parts = of_B(c)[1], of_C(c)[1]
    return {
        "before": lambda: before(c),
        "now": lambda: now(c),
        "scores": lambda: scores_of(c),
        "y before": lambda: outputs_before(c),
        "y now": lambda: outputs(c),
        "x before": lambda: inputs_before(c),
        "x now": lambda: inputs(c),
        "B before": lambda: B_before(c),
        "B now": lambda: of_B(c),
        "C before": lambda: C_before(c),
        "C now": lambda: of_C(c),
        "pairs before": lambda: pairs_before(c),
        "pairs now": lambda: pair_gradients(c.x, c.grad, c.dt, c.decay, c.scores, c.documents),
        "decays before": lambda: decays_before(zeros, zeros, c.of_chunks, zeros),
        "decays now": lambda: (
            gradients_of_decays(c.dt, sums.parts, B_parts, C_parts, c.of_chunks),
            sums.own.sum((0, 2, 3)),
        ),
    }


def main() -> None:
    out = Path(sys.argv[1])
    write(out, {"device": torch.cuda.get_device_name(), "torch": torch.__version__})
    for packed in (True, False):
        case = agreement(packed, out)
        for name, times in interleaved(parts(case), rounds=15).items():
            write(out, {"part": name, "packed": packed, **times})
        if packed:
            for name, times in interleaved(launches(case, out), rounds=15).items():
                write(out, {"launch": name, **times})


if __name__ == "__main__":
    main()
