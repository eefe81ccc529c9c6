"""Where a checkpoint folder comes from: `nanotrain.json` beside the weights."""

import dataclasses
import json
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nanotrain.config.errors import UserError
from nanotrain.runtime.files import write_json_atomic

PROVENANCE_FILE = "nanotrain.json"


@dataclass(frozen=True)
class Provenance:
    """What made a checkpoint. Everything but the stage is optional, so that imports and tests can say little."""

    stage: str
    """The stage that wrote the folder (`pretrain`, `prune`, ...)."""
    parent: str = ""
    """Folder the weights started from; empty = random weights."""
    parent_digest: str = ""
    recipe_digest: str = ""
    seed: int | None = None
    step: int = 0
    tokens_seen: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    config_changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """config.json key -> {"from", "to", "why"}: what differs from the imported ancestor although no tensor does."""
    package_version: str = field(default_factory=lambda: version("nanotrain"))


def save_provenance(folder: Path, provenance: Provenance) -> None:
    """Write `nanotrain.json` into a checkpoint folder."""
    write_json_atomic(folder / PROVENANCE_FILE, dataclasses.asdict(provenance))


def load_provenance(folder: Path) -> Provenance | None:
    """Read `nanotrain.json`; None when the folder was not written by nanotrain.

    Keys of a newer version are left out rather than refused: provenance describes, it does not steer.

    Raises:
        UserError: the file is not a JSON object with a `stage`.
    """
    file = folder / PROVENANCE_FILE
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file} is not valid JSON ({error}); remove it to load the folder without provenance."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("stage"), str):
        raise UserError(
            f"{file} must hold a JSON object with a `stage`; remove it to load the folder without provenance."
        )
    known = {item.name for item in dataclasses.fields(Provenance)}
    return Provenance(**{name: value for name, value in content.items() if name in known})
