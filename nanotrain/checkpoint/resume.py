"""Resumable states: state/step-00001000/, complete or absent, the newest found by listing.

checkpoint/saver.py writes them. Nothing stores which state is the latest: a stored pointer could point to what a kill cut off.
"""

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from nanotrain.runtime.distributed import current_world, from_all, from_first
from nanotrain.runtime.files import file_digest, remove_leftovers

logger = logging.getLogger("nanotrain")

DIGESTS_FILE = "digests.json"
PROGRESS_FILE = "progress.json"
ENGINE_FOLDER = "engine"


def list_states(root: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of every state, oldest first; temporary folders are not states."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        match = re.fullmatch(r"step-(\d{8,})", path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found)


def latest_resume_state(root: Path, keep_every: int = 0) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest intact state, as (folder of the engine, progress); None when there is none.

    A damaged one is named in a warning, removed, and the one before it is used. Called on every rank when a stage
    starts: it also clears what a killed process left.

    Args:
        root: the entry's `state` folder.
        keep_every: look only at states of a step that this divides; 0 = at all.
    """
    if current_world().is_first and root.is_dir():
        remove_leftovers(root)
    states = [(step, path) for step, path in list_states(root) if not keep_every or step % keep_every == 0]
    for folder in reversed(from_first([path for _, path in states])):
        defect = find_defect(folder)
        if defect is None:
            progress = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
            return folder / ENGINE_FOLDER, progress
        logger.warning("%s is damaged (%s); it is removed and the state before it is used.", folder, defect)
        if current_world().is_first:
            remove_state(folder)
    return None


def find_defect(folder: Path) -> str | None:
    """Return what is wrong with a state: a missing, surplus or changed file; None when it is intact.

    Collective: each rank reads its share of the files.
    """
    digests = from_first(_read_digests(folder))
    if isinstance(digests, str):
        return digests
    defect = None
    for name in shares(sorted(digests)):
        if not (folder / name).is_file() or file_digest(folder / name) != digests[name]:
            defect = f"{name} differs from its digest"
            break
    return next((found for found in from_all(defect) if found is not None), None)


def _read_digests(folder: Path) -> dict[str, str] | str:
    """Return file -> sha256 as it was saved, or what is wrong with the list itself."""
    try:
        digests = json.loads((folder / DIGESTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"no readable {DIGESTS_FILE}"
    if not isinstance(digests, dict) or PROGRESS_FILE not in digests:
        return f"{DIGESTS_FILE} is incomplete"
    differing = (set(state_files(folder)) - {DIGESTS_FILE}) ^ digests.keys()
    return f"{sorted(differing)[0]} is missing or was added" if differing else digests


def state_files(folder: Path) -> list[str]:
    """Return the relative names of all files of a state."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def shares(names: list[str]) -> list[str]:
    """Return the files that this rank reads, so that all ranks together read each of them once."""
    world = current_world()
    return names[world.rank :: world.size]


def remove_state(folder: Path) -> None:
    """Remove a state so that a kill leaves it whole or gone."""
    doomed = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
