"""Whose an output folder is, and who works in it now.

`run.json` names the recipe that owns the folder. A pipeline and the stage recipes beside it own a folder together, so
that one stage can be run alone inside its pipeline's folder; any other recipe is refused.
"""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanotrain.config.errors import UserError
from nanotrain.config.load import LoadedRecipe
from nanotrain.config.load_messages import shown_path
from nanotrain.runtime.files import write_json_atomic

RUN_FILE = "run.json"
LOCK_FILE = ".lock"


def recipe_identity(file: Path) -> str:
    """Return `<folder>/<file>` of a recipe: the same in a checkout, in a moved checkout and in an installed package."""
    return f"{file.parent.name}/{file.name}"


def read_run_file(output_dir: Path) -> dict[str, Any] | None:
    """Return run.json, None when there is none.

    Raises:
        UserError: it is damaged.
    """
    file = output_dir / RUN_FILE
    if not file.is_file():
        return None
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(value["recipe_name"], str) or not isinstance(value["entries"], dict):
            raise TypeError("unexpected types")
        return {"pipeline": None, "order": [], **value}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{shown_path(file)} is damaged ({error}); set another output_dir.") from error


def check_ownership(recipe: LoadedRecipe) -> None:
    """Raise UserError unless the output folder is absent, empty, or owned by this recipe. Writes nothing."""
    output_dir = recipe.output_dir
    shown = shown_path(output_dir)
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"`output_dir` ({shown}) cannot be made: {existing} is a file; set another output_dir.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"`output_dir` ({shown}) cannot be written: no permission for {existing}; set another output_dir."
        )
    if not output_dir.exists():
        return
    owner = read_run_file(output_dir)
    if owner is None:
        strangers = sorted(p.name for p in output_dir.iterdir() if p.name != LOCK_FILE and not _is_own_leftover(p))
        if strangers:
            raise UserError(
                f"`output_dir` ({shown}) is not empty and was not made by a run (it holds {strangers[0]!r} but no"
                f" {RUN_FILE}); set another output_dir."
            )
        return
    other = ""
    if owner["recipe_name"] != recipe.declared_name:
        other = f"the recipe named {owner['recipe_name']!r}"
    elif recipe.is_pipeline and owner["pipeline"] not in (None, recipe_identity(recipe.file)):
        other = f"the pipeline {owner['pipeline']}"
    else:
        for entry in recipe.entries:
            first = owner["entries"].get(entry.name)
            if first not in (None, recipe_identity(entry.recipe_file)):
                other = f"a run whose entry {entry.name!r} is {first}"
    if other:
        raise UserError(
            f"`output_dir` ({shown}) belongs to {other}, not to {shown_path(recipe.file)}"
            f" ({recipe.declared_name!r}), and is not overwritten; set another output_dir."
        )


def _is_own_leftover(path: Path) -> bool:
    """True for the temporary name of a run.json whose writer was killed."""
    return path.name.startswith(f".{RUN_FILE}.") and path.name.endswith(".tmp")


@contextlib.contextmanager
def owned_folder(recipe: LoadedRecipe) -> Iterator[None]:
    """Make the output folder, claim it for the recipe, and hold its lock while the block runs.

    The lock is the kernel's: it goes away with the process that holds it, however that ends.

    Raises:
        UserError: another process runs in the folder, or it is another recipe's.
    """
    output_dir = recipe.output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / LOCK_FILE).open("a+", encoding="utf-8") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise UserError(
                f"`output_dir` ({shown_path(output_dir)}) is in use by {holder}; wait for it, or set"
                " another output_dir."
            ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        check_ownership(recipe)
        _claim(recipe)
        yield


def _claim(recipe: LoadedRecipe) -> None:
    owner = read_run_file(recipe.output_dir) or {"entries": {}, "pipeline": None, "order": []}
    claimed = {
        "recipe_name": recipe.declared_name,
        "name": recipe.name,
        "pipeline": recipe_identity(recipe.file) if recipe.is_pipeline else owner["pipeline"],
        "order": [entry.name for entry in recipe.entries] if recipe.is_pipeline else owner["order"],
        "entries": owner["entries"] | {entry.name: recipe_identity(entry.recipe_file) for entry in recipe.entries},
    }
    if claimed != owner:
        write_json_atomic(recipe.output_dir / RUN_FILE, claimed)
