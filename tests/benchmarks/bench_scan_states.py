"""The walk over the states of the scan and its pairs at the 12B's shape: launches in turn, results first and then times.

python -m tests.benchmarks.bench_scan_states OUT.jsonl [states | pairs]      (one GPU, 40 seconds)

"off" is the norm of the difference from the former kernel's result, relative to that; "off_fp32" that of the former kernel
from the recurrence in fp32. A launch that fails, or is off, is a row of its own and not timed.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanotrain.ops.gpu import ssd_pairs_triton, ssd_states_triton
from nanotrain.ops.gpu.compile_ahead import compiling_only
from nanotrain.ops.gpu.ssd_pairs_triton import pair_gradients
from nanotrain.ops.gpu.ssd_states_triton import gradients_of_states, states_before_chunks
from nanotrain.ops.segments import segment_indices
from tests.benchmarks import ssd_pairs_before, ssd_pairs_stored, ssd_states_before
from tests.benchmarks.measure import interleaved, write
from tests.ops.comparison import random_segments

DEVICE = "cuda"
LENGTH, CHUNK, HEADS, WIDTH, GROUPS, SIZE = 8192, 128, 128, 80, 8, 128
CHUNKS = LENGTH // CHUNK
STATE_LAUNCHES = [
    ssd_states_triton.Launch(*numbers)
    for numbers in (
        (64, 128, 4, 2, False),
        (64, 64, 4, 3, False),
        (128, 128, 8, 3, False),
        (64, 64, 4, 3, True),
        (64, 64, 4, 2, True),
        (64, 64, 8, 3, True),
        (64, 32, 4, 5, True),
        (128, 64, 8, 3, True),
        (128, 64, 8, 4, True),
        (128, 128, 8, 2, True),
    )
]
PAIR_LAUNCHES = [
    ssd_pairs_triton.Launch(*numbers)
    for numbers in (
        (64, 4, 3, None, False),
        (64, 4, 2, None, True),
        (64, 4, 3, None, True),
        (64, 8, 2, 128, True),
        (64, 8, 3, 128, False),
    )
]
Forms = dict[str, Callable[[], Any]]
"""By launch, what returns its results, a list of tensors."""


class Case(NamedTuple):
    """Shapes as in the ops."""

    x: Tensor
    B: Tensor
    C: Tensor
    grad: Tensor
    dt: Tensor
    decay: Tensor
    documents: Tensor | None
    scores: Tensor


def make_case(packed: bool) -> Case:
    generator = torch.Generator(DEVICE).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE, generator=generator)

    wide = randn(1, LENGTH, HEADS * WIDTH + 2 * GROUPS * SIZE).bfloat16()
    x, B, C = wide.split([HEADS * WIDTH, GROUPS * SIZE, GROUPS * SIZE], dim=-1)
    x, B, C = x.unflatten(-1, (HEADS, WIDTH)), B.unflatten(-1, (GROUPS, SIZE)), C.unflatten(-1, (GROUPS, SIZE))
    A = -torch.empty(HEADS, 1, 1, device=DEVICE).uniform_(1, 16, generator=generator)
    dt = F.softplus(randn(1, HEADS, CHUNKS, CHUNK) - 4)
    ids = random_segments(1, LENGTH, 700, torch.Generator().manual_seed(1)).to(DEVICE) if packed else None
    index = None if ids is None else segment_indices(ids)
    b, c = (t.float().view(1, CHUNKS, CHUNK, GROUPS, SIZE) for t in (B.contiguous(), C.contiguous()))
    scores = torch.einsum("bcign,bcjgn->bcgij", c, b)
    if index is not None:
        of = index.view(1, CHUNKS, 1, CHUNK)
        scores = scores * (of[..., :, None] == of[..., None, :])
    return Case(x, B, C, randn(1, LENGTH, HEADS, WIDTH).bfloat16(), dt, (dt * A).cumsum(-1), index, scores)


def walked(case: Case, backward: bool) -> list[Tensor]:
    """The recurrence in fp32, chunk by chunk: the states that enter, or the gradients of those that leave."""
    values, columns = (case.grad, case.C) if backward else (case.x, case.B)
    number = torch.zeros(1, LENGTH, dtype=torch.int32, device=DEVICE) if case.documents is None else case.documents
    state, found = torch.zeros(HEADS, WIDTH, SIZE, device=DEVICE), [torch.empty(0)] * CHUNKS
    for chunk in reversed(range(CHUNKS)) if backward else range(CHUNKS):
        found[chunk] = state
        here = slice(chunk * CHUNK, chunk * CHUNK + CHUNK)
        decay, ids = case.decay[0, :, chunk], number[0, here]
        before = number[0, chunk * CHUNK - 1] if chunk else torch.tensor(-1, device=DEVICE)
        if backward:
            weight = decay.exp() * (ids == before)
        else:
            weight = (decay[:, -1:] - decay).exp() * case.dt[0, :, chunk] * (ids == ids[-1])
        spread = columns[0, here].float().repeat_interleave(HEADS // GROUPS, 1)
        added = torch.einsum("lhp,hl,lhn->hpn", values[0, here].float(), weight, spread)
        state = state * (decay[:, -1].exp() * (before == ids[-1]))[:, None, None] + added
    return [torch.stack(found)[None]]


def apart(mine: list[Tensor], other: list[Tensor]) -> float:
    """Return the largest relative distance of two lists, NaN where one has it."""
    distances = [(a.double() - b.double()).norm() / b.double().norm() for a, b in zip(mine, other, strict=True)]
    return float(torch.stack(distances).max())


def state_forms(case: Case) -> dict[str, Forms]:
    """Return what each launch returns, by direction."""
    forward = case.x, case.dt, case.decay, case.B, case.documents
    entering = ssd_states_before.states_before_chunks(*forward)
    backward = case.grad, case.decay, case.C, entering, case.documents
    forms: dict[str, Forms] = {
        "forward": {"before": lambda: [ssd_states_before.states_before_chunks(*forward)]},
        "backward": {"before": lambda: list(ssd_states_before.gradients_of_states(*backward))},
    }
    for launch in STATE_LAUNCHES:
        name = str(tuple(launch))
        forms["forward"][name] = lambda launch=launch: [states_before_chunks(*forward, launch)]
        forms["backward"][name] = lambda launch=launch: list(gradients_of_states(*backward, launch))
    return forms


def pair_forms(case: Case) -> dict[str, Forms]:
    arguments = case.x, case.grad, case.dt, case.decay, case.scores, case.documents
    forms: Forms = {"before": lambda: list(ssd_pairs_before.pair_gradients(*arguments))}
    for launch in [ssd_pairs_stored.Launch(64, 4, 2, None, True), ssd_pairs_stored.Launch(64, 8, 2, 128, True)]:
        stored = lambda launch=launch: list(ssd_pairs_stored.pair_gradients(*arguments, launch))  # noqa: E731
        forms[f"each head's sums stored {tuple(launch)}"] = stored
    for launch in PAIR_LAUNCHES:
        forms[str(tuple(launch))] = lambda launch=launch: list(pair_gradients(*arguments, launch))
    return {"pairs": forms}


def comparable(found: list[Tensor]) -> list[Tensor]:
    """Return results without what pairs do not write: with two tiles, sums that no pair of tiles has."""
    if len(found) < 3:
        return found
    scores, parts, own = found
    parts[..., 1, : CHUNK // 2] = 0.0
    parts[..., 2, CHUNK // 2 :] = 0.0
    return [scores, *parts.unbind(3), own]


def compile_all(forms: list[Forms], out: Path) -> None:
    try:
        with compiling_only():
            for name in [name for some in forms for name in some]:
                for some in forms:
                    if name in some:
                        some[name]()
    except Exception as error:  # the launch itself will fail again, and be a row then
        write(out, {"compiling": repr(error)[:300]})


def sound(kind: str, forms: Forms, out: Path) -> Forms:
    """Return the launches that give what the first does, writing a row for each."""
    first, *_ = forms
    other = comparable(forms[first]())
    kept = {}
    for name, form in forms.items():
        try:
            off = apart(comparable(form()), other)
        except Exception as error:
            write(out, {kind: name, "failed": repr(error)[:300]})
            continue
        write(out, {kind: name, "right": off < 0.005, "off": off})
        if off < 0.005:
            kept[name] = form
    return kept


def measure(part: str, packed: bool, out: Path) -> None:
    case = make_case(packed)
    kinds = state_forms(case) if part == "states" else pair_forms(case)
    compile_all(list(kinds.values()), out)
    for kind, forms in kinds.items():
        if part == "states":
            off = apart(forms["before"]()[:1], walked(case, kind == "backward"))
            write(out, {kind: "before", "packed": packed, "off_fp32": off})
        for name, times in interleaved(sound(kind, forms, out), rounds=15).items():
            write(out, {kind: name, "packed": packed, **times})


def main() -> None:
    out, parts = Path(sys.argv[1]), sys.argv[2:] or ["states", "pairs"]
    write(out, {"device": torch.cuda.get_device_name(), "torch": torch.__version__})
    for part in parts:
        for packed in (True, False):
            measure(part, packed, out)


if __name__ == "__main__":
    main()
