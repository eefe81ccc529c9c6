"""Saving on several ranks: complete or absent, failed on all when it failed on one."""

from pathlib import Path

import pytest

from nanotrain.checkpoint.resume import find_defect, latest_resume_state, list_states
from nanotrain.checkpoint.saver import SaveFailedError, StateSaver
from nanotrain.runtime.distributed import current_world
from tests.ranks import run_ranks


def save_on_ranks(root: Path) -> list:
    rank = current_world().rank
    saver, told = StateSaver(root, keep_last=2, keep_every=4), []
    for step in range(1, 8):

        def write(folder: Path, step: int = step) -> None:
            (folder / f"part-{rank}").write_bytes(bytes([step, rank]) * 1000)
            if step == 6 and rank == 1:
                raise OSError(28, "No space left on device")

        saver.start(step, write, {"step": step})
        try:
            saver.finish()
        except SaveFailedError as failure:
            told.append(str(failure))
    found = latest_resume_state(root)
    assert found is not None and not saver.busy
    return [told, found[1]["step"], [step for step, _ in list_states(root)]]


def test_a_state_is_whole_or_absent_on_all_ranks(tmp_path):
    results = run_ranks(save_on_ranks, 3, tmp_path)
    assert results == [[["rank 1: OSError: [Errno 28] No space left on device"], 7, [4, 5, 7]]] * 3
    state = tmp_path / "step-00000007"
    assert sorted(p.name for p in (state / "engine").iterdir()) == ["part-0", "part-1", "part-2"]
    assert find_defect(state) is None and not list(tmp_path.glob(".*"))


def damaged_on_ranks(root: Path) -> int:
    found = latest_resume_state(root)
    assert found is not None
    return found[1]["step"]


def test_damage_is_found_by_whoever_reads_that_file(tmp_path):
    run_ranks(save_on_ranks, 2, tmp_path)
    victim = tmp_path / "step-00000007/engine/part-1"
    victim.write_bytes(victim.read_bytes()[:-1] + b"!")
    assert run_ranks(damaged_on_ranks, 2, tmp_path) == [5, 5]


def test_a_second_save_waits_for_its_turn(tmp_path):
    saver = StateSaver(tmp_path, 1)
    saver.start(1, lambda folder: None, {"step": 1})
    with pytest.raises(AssertionError, match="in flight"):
        saver.start(2, lambda folder: None, {"step": 2})
    saver.finish()
    assert [step for step, _ in list_states(tmp_path)] == [1]
