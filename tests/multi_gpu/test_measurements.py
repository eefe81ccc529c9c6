"""The measurements on several GPUs, rehearsed on CPU ranks through their launcher; what decides depths and rows, in one process."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanotrain.config.engine import Device
from nanotrain.config.errors import UserError
from nanotrain.config.megatron import MegatronConfig, Recompute
from nanotrain.planning.flops import training_flops_per_token
from tests.multi_gpu import distill, long, speed
from tests.multi_gpu.cases import REHEARSAL_BYTES, SMALLER
from tests.multi_gpu.trials import (
    GIB,
    PEAK_OPERATIONS,
    Trial,
    against_plan,
    architecture,
    deepest,
    megatron_engine,
    torch_engine,
    training_of,
)

ROOT = Path(__file__).parents[2]
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore", "PYTHON": sys.executable}


def rehearse(tmp_path: Path, *parts: str, gpus: int = 2) -> list[dict[str, Any]]:
    """Return the rows of parts that the launcher ran on CPU ranks."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    command = ["bash", "launch/test_multi_gpu.sh", "--cpu", "--gpus", str(gpus), "--out", str(tmp_path), *parts]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | QUIET, capture_output=True, text=True, timeout=550, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return rows_in(tmp_path, *parts)


def rows_in(folder: Path, *parts: str) -> list[dict[str, Any]]:
    files = [folder / f"{part}.jsonl" for part in parts]
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def check(row: dict[str, Any]) -> None:
    """Hold a measured row to what follows from its own numbers."""
    assert "failed" not in row, row
    assert "not_run" not in row, row
    assert row["min_ms"] <= row["ms"] <= row["max_ms"]
    data = row["ranks"] // (row["tensor"] * row["context"])
    tokens = row["micro_batches"] * data * row["sequence_length"]
    assert row["tokens_per_second_per_gpu"] == pytest.approx(1e3 * tokens / row["ms"] / row["ranks"])
    assert row["grad_norm"] > 0


def test_distillation_is_rehearsed(tmp_path):
    (row,) = rehearse(tmp_path, "distill")
    check(row)
    assert (row["name"], row["layers"], row["teacher_layers"]) == ("tp2_dp1", 8, 10)
    assert row["over_published"] == pytest.approx(row["tokens_per_second_per_gpu"] / 2913)
    assert row["loss"] > 0


@pytest.mark.slow
def test_long_context_is_rehearsed(tmp_path):
    rows = rehearse(tmp_path, "long")
    for row in rows:
        check(row)
    assert [row["name"] for row in rows] == ["cp2", "cp2_kept"]
    assert rows[0]["plan_lasting_gib"] + rows[0]["plan_passing_gib"] == pytest.approx(rows[0]["plan_gib"])
    assert rows[1]["layers"] < rows[0]["layers"]  # all activations are kept


@pytest.mark.slow
def test_speed_is_rehearsed(tmp_path):
    rows = {row["name"]: row for row in rehearse(tmp_path, "speed")}
    for row in rows.values():
        check(row)
    assert list(rows) == [
        "weak_fsdp2_1",
        "weak_distributed_optimizer_1",
        "tp2_dp1",
        "tp2_dp1_beside_bare nanotrain",
        "tp2_dp1_beside_bare bare",
        "fsdp2_2",
        "weak_distributed_optimizer_2",
        "weak_fsdp2_2",
    ]
    ours, bare = rows["tp2_dp1_beside_bare nanotrain"], rows["tp2_dp1_beside_bare bare"]
    assert ours["speed_over_bare"] == pytest.approx(bare["ms"] / ours["ms"])
    assert ours["loss"] == pytest.approx(bare["loss"], rel=0.1)  # other weights of the same size: both near ln 128
    assert ours["layers"] < rows["tp2_dp1"]["layers"] == rows["tp2_dp1"]["full_layers"]
    for kind in ("fsdp2", "distributed_optimizer"):
        one, two = rows[f"weak_{kind}_1"], rows[f"weak_{kind}_2"]
        assert (one["layers"], one["ranks"], two["ranks"]) == (two["layers"], 1, 2)
        assert two["efficiency"] == pytest.approx(two["tokens_per_second_per_gpu"] / one["tokens_per_second_per_gpu"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_four_ranks_have_more_layouts(tmp_path):
    rows = rehearse(tmp_path, "long", "distill", gpus=4)
    for row in rows:
        check(row)
    names = [row["name"] for row in rows]
    assert names == ["cp4", "cp4_kept", "tp2_cp2", "cp2_dp2", "tp4_dp1", "tp2_dp2"]


FAILING = """
    import os, sys, torch
    from nanotrain.config.errors import UserError
    from nanotrain.runtime.distributed import current_world, from_all
    from tests.multi_gpu.cases import REHEARSAL_BYTES, Case, options_of, run_part

    def refused(bench):
        raise UserError("`layout` cannot be built.")

    def full_once(bench):
        if bench.free_bytes() == REHEARSAL_BYTES and current_world().rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        from_all(0)
        bench.row("full_once", free=bench.free_bytes())

    def lost(bench):
        if current_world().rank == 1:
            os._exit(7)
        from_all(0)

    def fine(bench):
        bench.row("fine", free=bench.free_bytes())

    run_part("failing", lambda bench: [Case(f.__name__, f) for f in (refused, full_once, lost, fine)], options_of(500))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_case_that_fails_is_a_row_and_the_next_one_runs(tmp_path):
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    script = tmp_path / "failing.py"
    script.write_text(textwrap.dedent(FAILING), encoding="utf-8")
    out = tmp_path / "failing.jsonl"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "--max-restarts", "4", str(script), "--cpu", "--out", str(out)]
    environment = os.environ | QUIET | {"PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [(row["name"], row.get("failed"), row.get("free")) for row in rows_in(tmp_path, "failing")]
    (lost,) = (index for index, row in enumerate(rows) if row[0] == "lost")
    assert rows.pop(lost)[1] is not None  # the other rank's broken connection, where it had time to say so
    assert rows == [
        ("refused", "UserError: `layout` cannot be built.", None),
        ("full_once", "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", None),
        ("full_once", None, int(SMALLER * REHEARSAL_BYTES)),
        ("fine", None, REHEARSAL_BYTES),
    ]


def whole(size: str, batch: int, layout: MegatronConfig, ranks: int, length: int = 8192) -> Trial:
    engine = megatron_engine(Device.cuda, layout)
    return Trial(architecture(size, cpu=False), training_of(batch, length), engine, ranks)


def test_depth_is_the_largest_that_the_plan_finds_room_for():
    layout = MegatronConfig(tensor_parallel=2, sequence_parallel=True)
    trial = whole("12b", 2, layout, 2)
    assert deepest(trial, 200 * GIB) == trial
    found = deepest(trial, 79 * GIB)
    pattern, depth = trial.model.hybrid_layer_pattern, found.model.num_hidden_layers
    assert found.model.hybrid_layer_pattern == pattern[:depth]
    one_more = replace(trial, model=replace(trial.model, hybrid_layer_pattern=pattern[: depth + 1]))
    assert found.planned_bytes() <= 0.93 * 79 * GIB < one_more.planned_bytes()
    half = deepest(trial, 79 * GIB, lambda tried: 2 * tried.planned_bytes())
    assert half.model.num_hidden_layers < depth
    with pytest.raises(UserError, match=r"asks for .* GiB with 8 layers and the fullest GPU has 20\.0 GiB free"):
        deepest(trial, 20 * GIB)
    torch_trial = replace(trial, engine=torch_engine(Device.cuda, divided=True))
    assert deepest(torch_trial, 79 * GIB).model.num_hidden_layers < 62


def test_rates_count_model_operations_of_a_gpu():
    trial = whole("12b", 2, MegatronConfig(tensor_parallel=4, sequence_parallel=True), 4)
    rates = trial.rates(0.5)
    assert rates["tokens_per_second_per_gpu"] == 2 * 8192 / 4 / 0.5
    operations = training_flops_per_token(trial.model, 8192)
    assert rates["mfu"] == pytest.approx(8192 * operations / PEAK_OPERATIONS)
    assert trial.micro_batches == 2
    assert against_plan(2.0, 1.9, "ms") == {"plan_ms": 1.9, "plan_ms_error": pytest.approx(-0.05)}
    assert against_plan(0.0, 1.9, "gib") == {"plan_gib": 1.9, "plan_gib_error": None}


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_layout_can_be_built(ranks):
    """By the plan's own check, at a size of GPU where full depth is out of the question for some."""
    for layout in speed.layouts(ranks).values():
        assert whole("12b", 2 * ranks // layout.tensor_parallel, layout, ranks).rank_memory().total > 0
    for layout in long.layouts(ranks).values():
        batch = ranks // (layout.tensor_parallel * layout.context_parallel)
        trial = whole("12b", batch, layout, ranks, 131072)
        assert sum(long.parts_of(trial.rank_memory())) == trial.planned_bytes()
    for layout in distill.layouts(ranks).values():
        trial = whole("9b", 4 * ranks // layout.tensor_parallel, layout, ranks)
        teacher = distill.teacher_of(trial.model, cpu=False)
        assert teacher == architecture("12b", cpu=False)
        assert 2 * 12.3e9 / layout.tensor_parallel < distill.teacher_bytes(trial, teacher) < 60e9


def test_the_published_layout_keeps_more_without_recomputation():
    lasting, kept = long.published_parts(Recompute.none)
    again_lasting, again = long.published_parts(Recompute.full)
    assert lasting == again_lasting
    assert kept > 3 * again
