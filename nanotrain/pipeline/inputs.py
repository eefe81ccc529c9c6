"""What the `*_from` keys of every entry mean: an earlier entry, a finished entry of the run, or a folder.

All of them are resolved before the first stage starts.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path

from nanotrain.config.errors import MissingInputError, UserError, nearest
from nanotrain.config.load import LoadedEntry, LoadedRecipe
from nanotrain.config.load_messages import shown_path
from nanotrain.config.stage import PREVIOUS, PRODUCT_KINDS
from nanotrain.pipeline.ownership import read_run_file
from nanotrain.pipeline.products import RECORD_FILE, StageRecord, load_record


@dataclass(frozen=True)
class InputRef:
    """Where one input comes from; exactly one of `entry` and `folder` is set."""

    key: str
    """`init_from`, `teacher_from`, `data_from` or `architecture_from`."""
    kind: str
    """data or checkpoint."""
    entry: str = ""
    """An entry of this run: earlier in the pipeline, or finished in the output folder."""
    folder: Path | None = None
    """A product folder from outside the run."""


def resolve_inputs(recipe: LoadedRecipe, *, with_data: bool = True) -> dict[str, list[InputRef]]:
    """Return the inputs of every entry.

    Args:
        recipe: the run.
        with_data: data too, which a plan does not need.

    Raises:
        UserError: a name is unknown, comes later, or leaves another kind of product.
        MissingInputError: nothing was made yet that the entry could start from.
    """
    resolved = {}
    earlier: dict[str, str] = {} if recipe.is_pipeline else _finished_entries(recipe)
    later = set() if recipe.is_pipeline else _later_entries(recipe)
    for entry in recipe.entries:
        stage = entry.config.stage
        keys = {f.name: f.default for f in fields(stage) if f.name.endswith("_from")}
        refs = []
        for key, default in keys.items():
            value = stage.__dict__[key]
            if key == "data_from" and not with_data:
                continue
            if value or default != "":  # an optional input that is not asked for is none
                refs.append(_resolve(recipe, entry, key, earlier, later))
        resolved[entry.name] = refs
        earlier[entry.name] = PRODUCT_KINDS[type(stage)]
    return resolved


def _resolve(recipe: LoadedRecipe, entry: LoadedEntry, key: str, earlier: dict[str, str], later: set[str]) -> InputRef:
    """Resolve one key.

    Args:
        recipe: the run.
        entry: whose key it is.
        key: of its stage.
        earlier: kind of product by entry name, nearest last.
        later: names in `earlier` that `previous` does not mean.
    """
    value: str = entry.config.stage.__dict__[key]
    kind = "data" if key == "data_from" else "checkpoint"
    path = f"`{entry.key_prefix}stage.{key}`"
    if value == PREVIOUS:
        names = [name for name in earlier if earlier[name] == kind and name not in later]
        if not names:
            raise MissingInputError(_nothing_before(recipe, path, kind))
        return InputRef(key, kind, entry=names[-1])
    if value in earlier:
        if earlier[value] != kind:
            right = [name for name in earlier if earlier[name] == kind]
            raise UserError(
                f"{path} ({value}) names an entry that leaves {_article(earlier[value])}, but {_article(kind)} is"
                f" needed; {nearest(value, right) if right else 'name a folder.'}"
            )
        return InputRef(key, kind, entry=value)
    if value in [other.name for other in recipe.entries]:
        what = "is the entry itself" if value == entry.name else "names a later entry"
        raise UserError(f"{path} ({value}) {what}; an input must come from an earlier entry or a folder.")
    folder = Path(value).expanduser()
    if value and folder.is_dir():
        return InputRef(key, kind, folder=_product_folder(folder, kind, path))
    raise MissingInputError(_unknown(recipe, path, value, earlier))


def _finished_entries(recipe: LoadedRecipe) -> dict[str, str]:
    """Return the kinds of the other finished entries in the output folder, in the pipeline's order, else by time."""
    records: dict[str, StageRecord] = {}
    for file in sorted(recipe.output_dir.glob(f"*/{RECORD_FILE}")):
        record = load_record(file.parent)
        if record is not None and file.parent.name != recipe.entries[0].name:
            records[file.parent.name] = record
    order = _pipeline_order(recipe)

    def position(item: tuple[str, StageRecord]) -> tuple[int, float]:
        name, record = item
        return (order.index(name) if name in order else -1, record.finished_unix)

    return {name: record.kind for name, record in sorted(records.items(), key=position)}


def _pipeline_order(recipe: LoadedRecipe) -> list[str]:
    owner = read_run_file(recipe.output_dir)
    return owner["order"] if owner else []


def _later_entries(recipe: LoadedRecipe) -> set[str]:
    """Return the entries that come after the one that runs alone, in the pipeline that owns the folder."""
    order, own = _pipeline_order(recipe), recipe.entries[0].name
    return set(order[order.index(own) :]) if own in order else set()


def _product_folder(folder: Path, kind: str, path: str) -> Path:
    """Return the product folder for a folder that a user named: a product, or a finished entry."""
    record = load_record(folder)
    if record is not None:
        if record.kind != kind:
            raise UserError(f"{path} ({folder}) holds {_article(record.kind)}, but {_article(kind)} is needed.")
        return record.product_path(folder)
    if kind == "data":
        if not (folder / "manifest.json").is_file():
            raise MissingInputError(
                f"{path} ({folder}) is not a data folder: it has no manifest.json; a prepare stage makes one."
            )
        return folder
    config = folder / "config.json"
    if not config.is_file() or not any(folder.glob("*.safetensors")):
        lacking = "no config.json" if not config.is_file() else "no *.safetensors file"
        raise MissingInputError(f"{path} ({folder}) is not a Hugging Face checkpoint folder: it has {lacking}.")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: {config} is not valid JSON ({error}).") from error
    return folder


def _article(kind: str) -> str:
    return {"data": "a data folder", "checkpoint": "a checkpoint", "report": "a report"}[kind]


def _nothing_before(recipe: LoadedRecipe, path: str, kind: str) -> str:
    if recipe.is_pipeline:
        return (
            f"{path} is `previous`, but no earlier entry leaves {_article(kind)}; name a folder, or put an entry before"
            " it that leaves one."
        )
    pipeline = recipe.file.parent / "pipeline.yaml"
    way = f"run `nanotrain run {shown_path(pipeline)}`" if pipeline.is_file() else "run the stage that makes one"
    return (
        f"{path} is `previous`, but no finished entry in {shown_path(recipe.output_dir)} leaves {_article(kind)}; {way}"
        " first, or name a folder."
    )


def _unknown(recipe: LoadedRecipe, path: str, value: str, earlier: dict[str, str]) -> str:
    if recipe.is_pipeline:
        names = [*earlier, PREVIOUS]
        return f"{path} ({value}) is neither an earlier entry nor a folder; {nearest(value, names)}"
    sibling = recipe.file.parent / f"{value}.yaml"
    shown = shown_path(recipe.output_dir)
    if value and sibling.is_file():
        return (
            f"{path} ({value}) is not finished in {shown}; run `nanotrain run {shown_path(sibling)}` with the same"
            " output_dir first, or name a folder."
        )
    names = [*earlier, PREVIOUS, *(file.stem for file in recipe.file.parent.glob("*.yaml"))]
    return f"{path} ({value}) is neither a finished entry of {shown} nor a folder; {nearest(value, names)}"
