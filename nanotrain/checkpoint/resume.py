"""Resumable states: state/step-00001000/, complete or absent, the newest found by listing.

Nothing stores which state is the latest: a stored pointer could point to what a kill cut off.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanotrain.runtime.files import file_digest, folder_atomic, remove_leftovers

logger = logging.getLogger("nanotrain")

DIGESTS_FILE = "digests.json"
PROGRESS_FILE = "progress.json"
ENGINE_FOLDER = "engine"


def save_resume_state(
    root: Path, step: int, write_engine: Callable[[Path], None], progress: dict[str, Any], keep_last: int
) -> Path:
    """Write the state after `step` steps, then remove all but the newest `keep_last`.

    Args:
        root: the entry's `state` folder.
        step: optimizer steps done.
        write_engine: fills an empty folder (Engine.save_state).
        progress: what the loop needs beside the engine, as JSON.
        keep_last: states kept, at least 1.
    """
    folder = root / f"step-{step:08d}"
    with folder_atomic(folder) as temporary:
        (temporary / ENGINE_FOLDER).mkdir()
        write_engine(temporary / ENGINE_FOLDER)
        (temporary / PROGRESS_FILE).write_text(json.dumps(progress), encoding="utf-8")
        digests = {name: file_digest(temporary / name) for name in _files(temporary)}
        (temporary / DIGESTS_FILE).write_text(json.dumps(digests, indent=2, sort_keys=True), encoding="utf-8")
    for _, old in list_states(root)[:-keep_last]:
        shutil.rmtree(old)
    return folder


def list_states(root: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of every state, oldest first; temporary folders are not states."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        match = re.fullmatch(r"step-(\d{8,})", path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found)


def latest_resume_state(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest intact state, as (folder of the engine, progress); None when there is none.

    A damaged one is named in a warning, removed, and the one before it is used. Call it once, when a stage starts: it
    also clears what a killed process left.
    """
    if root.is_dir():
        remove_leftovers(root)
    for _, folder in reversed(list_states(root)):
        defect = find_defect(folder)
        if defect is None:
            progress = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
            return folder / ENGINE_FOLDER, progress
        logger.warning("%s is damaged (%s); it is removed and the state before it is used.", folder, defect)
        shutil.rmtree(folder)
    return None


def find_defect(folder: Path) -> str | None:
    """Return what is wrong with a state: a missing, surplus or changed file; None when it is intact."""
    try:
        digests = json.loads((folder / DIGESTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"no readable {DIGESTS_FILE}"
    if not isinstance(digests, dict) or PROGRESS_FILE not in digests:
        return f"{DIGESTS_FILE} is incomplete"
    present = set(_files(folder)) - {DIGESTS_FILE}
    differing = present ^ digests.keys()
    if differing:
        return f"{sorted(differing)[0]} is missing or was added"
    for name, digest in digests.items():
        if file_digest(folder / name) != digest:
            return f"{name} differs from its digest"
    return None


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
