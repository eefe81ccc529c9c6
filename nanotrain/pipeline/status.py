"""Whether an entry is finished, may start or resume, or holds work that another recipe left."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from nanotrain.config.load import LoadedEntry
from nanotrain.config.load_messages import shown_path
from nanotrain.pipeline.attempts import load_attempts
from nanotrain.pipeline.fingerprint import changes, fingerprint, package_version, recipe_digest
from nanotrain.pipeline.products import BOOKKEEPING, RECIPE_FILE, StageRecord, changed_file, load_record


class State(Enum):
    """Of one entry."""

    FINISHED = "finished"
    """Nothing to do."""
    RUN = "run"
    """To be started or resumed."""
    STALE = "stale"
    """Holds a product or unfinished work that does not belong to the recipe and inputs of today."""


@dataclass(frozen=True)
class Status:
    """State of one entry, and the sentence that says why it is stale."""

    state: State
    record: StageRecord | None = None
    reason: str = ""


def entry_recipe_digest(entry: LoadedEntry) -> str:
    """Return the digest of the part of an entry's recipe that changes its product."""
    return recipe_digest(entry.resolved, type(entry.config.stage).__name__)


def assess(entry: LoadedEntry, folder: Path, input_digests: dict[str, str] | None) -> Status:
    """Return the status of an entry. Writes nothing.

    Args:
        entry: the entry.
        folder: its folder.
        input_digests: digest of each input by key; None when an input has still to be made, so that only the recipe
            can be compared.
    """
    wanted = None if input_digests is None else fingerprint(entry_recipe_digest(entry), input_digests)
    record = load_record(folder)
    if record is None:
        return _assess_unfinished(entry, folder, wanted)
    reason = ""
    if record.recipe_digest != entry_recipe_digest(entry):
        reason = f"its recipe was another ({_changes(entry, folder)})"
    elif record.package_version != package_version():
        reason = f"nanotrain {record.package_version} made it, and this is {package_version()}"
    elif wanted is not None and record.fingerprint != wanted:
        assert input_digests is not None
        before = {key: value["digest"] for key, value in record.inputs.items()}
        keys = sorted(k for k in before.keys() | input_digests.keys() if before.get(k) != input_digests.get(k))
        reason = f"its input {', '.join(f'`{key}`' for key in keys)} has changed since"
    else:
        changed = changed_file(record, folder, read_all=False)
        if changed is not None:
            reason = f"{shown_path(folder / changed)} was changed or removed after it was finished"
    if reason:
        return Status(State.STALE, record, f"the product in {shown_path(folder)} is stale: {reason}")
    return Status(State.FINISHED, record)


def _assess_unfinished(entry: LoadedEntry, folder: Path, wanted: str | None) -> Status:
    if not folder.exists():
        return Status(State.RUN)
    work = [p.name for p in folder.iterdir() if p.name not in BOOKKEEPING and not p.name.startswith(".")]
    attempts = load_attempts(folder)
    if not work or (attempts is not None and wanted in (None, attempts.fingerprint)):
        return Status(State.RUN)
    if attempts is None:
        reason = f"{shown_path(folder)} holds {sorted(work)[0]!r}, which no run of this recipe left"
    else:
        reason = f"the unfinished work in {shown_path(folder)} belongs to another recipe ({_changes(entry, folder)})"
    return Status(State.STALE, None, reason)


def _changes(entry: LoadedEntry, folder: Path) -> str:
    """Return the first changed keys between the recipe that an entry was made with and today's."""
    try:
        old: dict[str, Any] = yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8"))
        found = changes(old, entry.resolved)
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return f"its {RECIPE_FILE} cannot be read"
    if not found:
        return "its inputs have changed"
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if found[3:] else "")
