"""Reads what the entries of a run have left so far; any part may be missing."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nanotrain.config.errors import MissingInputError, UserError

logger = logging.getLogger("nanotrain")

STAGE_ORDER = (
    "PrepareConfig",
    "PretrainConfig",
    "PruneConfig",
    "DistillConfig",
    "SftConfig",
    "EvaluateConfig",
    "ExportConfig",
)
"""Order of entries when run.json does not give one."""


@dataclass(frozen=True)
class EntryRecord:
    """One entry of a run. Missing files are empty values."""

    name: str
    folder: Path
    record: dict[str, Any]
    """stage.json; empty while the entry is unfinished."""
    attempts: dict[str, Any]
    """attempts.json: seconds and memory so far."""
    recipe: dict[str, Any]
    results: dict[str, Any]
    manifest: dict[str, Any]
    """Of the data folder that a prepare entry leaves; empty for others."""
    metrics: list[dict[str, Any]]
    """Lines of metrics.jsonl in rising order of step, one a step: after a resume the later line holds."""

    @property
    def is_finished(self) -> bool:
        return bool(self.record)

    @property
    def seconds(self) -> float:
        """Wall clock of all attempts so far."""
        if self.record:
            return float(self.record["seconds"])
        return float(sum(self.attempts["seconds"])) if self.attempts else 0.0

    @property
    def peak_memory_bytes(self) -> int:
        source = self.record or self.attempts
        return int(source["peak_memory_bytes"]) if source else 0

    @property
    def stage(self) -> str:
        """Class name of the stage's config; of an unfinished entry the one that its recipe's keys tell."""
        if self.record:
            return str(self.record["stage"])
        return stage_of_recipe(self.recipe)


@dataclass(frozen=True)
class RunRecord:
    """A run's folder as it stands."""

    name: str
    folder: Path
    entries: list[EntryRecord]

    def by_stage(self, *stages: str) -> list[EntryRecord]:
        """Return the entries of these stages that have results."""
        return [entry for entry in self.entries if entry.stage in stages and entry.results]


def read_run(folder: Path) -> RunRecord:
    """Read a run's folder.

    Raises:
        UserError: the folder is missing, holds no entry, or a file in it is damaged.
    """
    if not folder.is_dir():
        raise MissingInputError(f"{folder} is not a folder; give the output_dir of a run, for example runs/quickstart.")
    run_file = _read_json(folder / "run.json")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and _looks_like_entry(path))
    if not names and not run_file:
        raise UserError(f"{folder} holds no entry of a run; give the output_dir of `nanotrain run`.")
    entries = [_read_entry(folder / name) for name in names]
    order = run_file.get("order", [])

    def rank(entry: EntryRecord) -> tuple[int, int, str]:
        place = order.index(entry.name) if entry.name in order else len(order)
        stage = STAGE_ORDER.index(entry.stage) if entry.stage in STAGE_ORDER else len(STAGE_ORDER)
        return (place, stage, entry.name)

    name = run_file["name"] if "name" in run_file else folder.resolve().name
    return RunRecord(str(name), folder, sorted(entries, key=rank))


def stage_of_recipe(recipe: dict[str, Any]) -> str:
    """Return the class name of a stage's config by the keys that only it has; empty when none is found."""
    stage = recipe["stage"] if isinstance(recipe.get("stage"), dict) else {}
    telling = {
        "corpus": "PrepareConfig",
        "architecture_from": "PretrainConfig",
        "importance": "PruneConfig",
        "teacher_from": "DistillConfig",
        "reasoning": "SftConfig",
        "thinking_budgets": "EvaluateConfig",
        "save_dtype": "ExportConfig",
    }
    return next((name for key, name in telling.items() if key in stage), "")


def _looks_like_entry(folder: Path) -> bool:
    files = ("stage.json", "recipe.yaml", "results.json", "metrics.jsonl", "attempts.json")
    return not folder.name.startswith(".") and any((folder / file).is_file() for file in files)


def _read_entry(folder: Path) -> EntryRecord:
    recipe_file = folder / "recipe.yaml"
    try:
        recipe = yaml.safe_load(recipe_file.read_text(encoding="utf-8")) if recipe_file.is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _damaged(recipe_file, error) from error
    return EntryRecord(
        name=folder.name,
        folder=folder,
        record=_read_json(folder / "stage.json"),
        attempts=_read_json(folder / "attempts.json"),
        recipe=recipe if isinstance(recipe, dict) else {},
        results=_read_json(folder / "results.json"),
        manifest=_read_json(folder / "data" / "manifest.json"),
        metrics=_read_metrics(folder / "metrics.jsonl"),
    )


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(file, error) from error
    if not isinstance(value, dict):
        raise _damaged(file, TypeError("not a JSON object"))
    return value


def _read_metrics(file: Path) -> list[dict[str, Any]]:
    """Merge the lines of each step, later ones over earlier ones; lines cut off by a kill are left out."""
    if not file.is_file():
        return []
    steps: dict[int, dict[str, Any]] = {}
    unreadable = 0
    for line in file.read_bytes().split(b"\n"):
        try:
            values = json.loads(line) if line.strip() else {}
        except ValueError:
            unreadable += 1
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            steps.setdefault(values["step"], {}).update(values)
    if unreadable:
        logger.warning("%s: %d unreadable lines left out of the report", file, unreadable)
    return [steps[step] for step in sorted(steps)]


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(f"{file} is damaged ({error}); remove it, or run the entry again.")
