"""Resumable states: the newest intact one is found, whatever was done to the others."""

import json
import random
from pathlib import Path

import pytest

from nanotrain.checkpoint.resume import find_defect, latest_resume_state, list_states
from nanotrain.checkpoint.saver import SaveFailedError, StateSaver


def write_engine(content: str):
    def write(folder: Path) -> None:
        (folder / "weights.bin").write_bytes(content.encode() * 50)
        (folder / "deep").mkdir()
        (folder / "deep" / "optimizer.bin").write_bytes(content.encode())

    return write


def save(root: Path, step: int, keep_last: int = 10) -> Path:
    saver = StateSaver(root, keep_last)
    saver.start(step, write_engine(f"state {step}"), {"step": step})
    saver.finish()
    return root / f"step-{step:08d}"


def test_the_newest_is_returned_with_its_progress_and_old_ones_go(tmp_path):
    for step in (5, 10, 100_000_000, 20):
        save(tmp_path, step, keep_last=3)
    assert [step for step, _ in list_states(tmp_path)] == [10, 20, 100_000_000]
    found = latest_resume_state(tmp_path)
    assert found is not None
    engine, progress = found
    assert progress == {"step": 100_000_000}
    assert (engine / "weights.bin").read_bytes() == b"state 100000000" * 50


def test_no_state_is_none_and_temporary_folders_are_not_states(tmp_path):
    assert latest_resume_state(tmp_path / "absent") is None
    (tmp_path / ".step-00000009.77.tmp").mkdir()
    (tmp_path / "step-9").mkdir()
    assert list_states(tmp_path) == [] and latest_resume_state(tmp_path) is None
    assert not (tmp_path / ".step-00000009.77.tmp").exists()


def test_a_write_that_fails_leaves_the_states_as_they_were(tmp_path):
    save(tmp_path, 1)

    def fail(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise OSError("no space left on device")

    saver = StateSaver(tmp_path, 1)
    saver.start(2, fail, {"step": 2})
    with pytest.raises(SaveFailedError, match="rank 0: OSError: no space"):
        saver.finish()
    assert [step for step, _ in list_states(tmp_path)] == [1] and find_defect(tmp_path / "step-00000001") is None


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_every_flipped_bit_and_truncation_is_noticed(tmp_path):
    """50 damages at random places in random files, each named, each passed over for the state before."""
    chance = random.Random(0)
    for number in range(50):
        root = tmp_path / str(number)
        save(root, 1), save(root, 2)
        victim = chance.choice(files_of(root / "step-00000002"))
        content = bytearray(victim.read_bytes())
        if chance.random() < 0.3:
            content = content[: chance.randrange(len(content))]
        else:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        victim.write_bytes(content)
        assert find_defect(root / "step-00000002") is not None, victim.name
        found = latest_resume_state(root)
        assert found is not None and found[1] == {"step": 1}
        assert [step for step, _ in list_states(root)] == [1]


def test_missing_and_added_files_are_named(tmp_path):
    folder = save(tmp_path, 3)
    assert find_defect(folder) is None
    (folder / "engine" / "stray").write_bytes(b"")
    assert find_defect(folder) == "engine/stray is missing or was added"
    (folder / "engine" / "stray").unlink()
    (folder / "progress.json").unlink()
    assert find_defect(folder) == "progress.json is missing or was added"
    (folder / "digests.json").write_text(json.dumps({}))
    assert find_defect(folder) == "digests.json is incomplete"
