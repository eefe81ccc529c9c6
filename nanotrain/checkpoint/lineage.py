"""From a checkpoint back to random weights: what each entry of a run did to it, read from the folders beside it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanotrain.config.errors import UserError


@dataclass(frozen=True)
class Ancestor:
    """One entry on the way to a checkpoint."""

    entry: str
    folder: Path
    """Of the entry."""
    record: dict[str, Any]
    """stage.json."""
    results: dict[str, Any]

    @property
    def stage(self) -> str:
        """Class name of the stage's config."""
        return str(self.record["stage"])


def trace_lineage(product: Path) -> list[Ancestor]:
    """Return the entries that made a checkpoint, oldest first; empty for a folder that stands alone.

    The way back follows `init_from` in each stage.json, as far as the folders are there.

    Raises:
        UserError: a stage.json or results.json is damaged.
    """
    found: list[Ancestor] = []
    seen: set[Path] = set()
    current: Path | None = Path(product)
    while current is not None and current.parent.resolve() not in seen:
        folder = current.parent
        seen.add(folder.resolve())
        record = read_json_object(folder / "stage.json")
        if not record or folder / record["product"] != current:
            break
        found.append(Ancestor(folder.resolve().name, folder, record, read_json_object(folder / "results.json")))
        current = input_folder(folder, record, "init_from")
    return found[::-1]


def input_folder(folder: Path, record: dict[str, Any], key: str) -> Path | None:
    """Return where an input of a finished entry lies now; None when it has none, or it is gone.

    Args:
        folder: of the entry.
        record: its stage.json.
        key: for example `data_from`.
    """
    if key not in record["inputs"]:
        return None
    source = record["inputs"][key]
    candidates = [Path(source["path"])]
    if source["entry"]:  # a run that was moved: the entry lies beside this one, its product under the same name
        candidates.insert(0, folder.parent / source["entry"] / Path(source["path"]).name)
    return next((path for path in candidates if path.exists()), None)


def read_data_manifest(ancestors: list[Ancestor]) -> dict[str, Any]:
    """Return the manifest of the data that the newest ancestor with data was made from; empty when none is found."""
    for ancestor in reversed(ancestors):
        data = input_folder(ancestor.folder, ancestor.record, "data_from")
        if data is not None:
            return read_json_object(data / "manifest.json")
    return {}


def find_evaluations(checkpoint: Ancestor) -> list[dict[str, Any]]:
    """Return the results of the finished evaluations of this very checkpoint in the same run, by name of entry."""
    found = []
    for file in sorted(checkpoint.folder.parent.glob("*/stage.json")):
        record = read_json_object(file)
        same = "init_from" in record["inputs"] and (
            record["inputs"]["init_from"]["digest"] == checkpoint.record["product_digest"]
        )
        if record["stage"] == "EvaluateConfig" and same:
            found.append(read_json_object(file.parent / "results.json"))
    return found


def read_json_object(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file, empty when it is not there.

    Raises:
        UserError: it does not hold a JSON object.
    """
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); remove it and run the entry again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} does not hold a JSON object; remove it and run the entry again.")
    return value
