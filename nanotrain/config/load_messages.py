"""Turns what Hydra and omegaconf refuse into one sentence: key path, file or override, rule, nearest name."""

import re
import types
import typing
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import Node
from omegaconf.errors import ConfigKeyError, InterpolationResolutionError, OmegaConfBaseException

from nanotrain.config.errors import UserError, nearest
from nanotrain.config.run import PipelineConfig, RecipeConfig
from nanotrain.config.stage import STAGE_CONFIGS

_FIELD_RULES = {
    int: "must be a whole number",
    float: "must be a number",
    str: "must be text",
    bool: "must be true or false",
}


def shown_path(file: Path) -> str:
    """Return the path relative to the working directory when it lies below it."""
    cwd = Path.cwd()
    return str(file.relative_to(cwd) if file.is_relative_to(cwd) else file)


def composition_error(
    error: Exception, file: Path, raw: dict[str, Any], *, key_prefix: str = "", overrides: Sequence[str] = ()
) -> UserError:
    """Return the sentence for an exception of Hydra's compose or of omegaconf.

    Args:
        error: what was raised.
        file: the recipe.
        raw: its top level, as plain values.
        key_prefix: `<entry>.` in a pipeline, else empty.
        overrides: the texts given to compose, to tell which one was refused.
    """
    cause = _omegaconf_cause(error)
    text = str(error)
    source = _source(text, file, overrides)
    if cause is None:
        return UserError(_hydra_sentence(text, source, key_prefix, overrides))
    path = _key_path(cause, source, raw)
    if not path and (misfit := _misfit_of_recipe(raw)):
        return UserError(f"`{key_prefix}{misfit[0]}` ({source}) {_type_rule(misfit[1])}")
    shown = f"`{key_prefix}{path}` ({source})" if path else source
    if isinstance(cause, InterpolationResolutionError):
        return UserError(f"{shown} refers to something that is not there: {_first_line(cause)}.")
    if isinstance(cause, ConfigKeyError | AttributeError):
        if is_dataclass(cause.object_type):
            names = [f.name for f in fields(typing.cast(Any, cause.object_type))]
            owner = typing.cast(type, cause.object_type).__name__
            return UserError(f"{shown} is not a key of {owner}; {nearest(str(cause.key), names)}")
        return UserError(f"{shown} is not there yet; `+{path}=...` adds it.")
    return UserError(f"{shown} {_value_rule(cause)}")


def missing_values_error(keys: list[str], file: Path, key_prefix: str) -> UserError:
    """Return the sentence for values that have no default and that neither the recipe nor an override states."""
    shown = ", ".join(f"`{key_prefix}{key}`" for key in keys[:3]) + (f" and {len(keys) - 3} more" if keys[3:] else "")
    verb = "has" if len(keys) == 1 else "have"
    return UserError(
        f"{shown} {verb} no value and no default; set it in {shown_path(file)} or with `{key_prefix}{keys[0]}=...`."
    )


def _omegaconf_cause(error: BaseException | None) -> OmegaConfBaseException | None:
    """Return the outermost omegaconf exception in the chain that knows its key."""
    first = None
    while error is not None:
        if isinstance(error, OmegaConfBaseException):
            first = first or error
            if error.full_key:
                return error
        error = error.__cause__ or error.__context__
    return first


def _source(text: str, file: Path, overrides: Sequence[str]) -> str:
    """Return where the mistake stands: `override x=y`, or a file."""
    named = re.search(r"(?:Could not override|Error merging override) '?(.+?)'?\.?(?:\n|$)", text)
    if named:
        for override in reversed(overrides):
            if named[1] in (override, override.lstrip("+~").split("=", 1)[0]):
                return f"override {override}"
        return f"override {named[1]}"
    inside = re.match(r"In '(.+?)':", text)
    if inside is None:
        return f"override {overrides[0]}" if len(overrides) == 1 else shown_path(file)
    return shown_path(file) if inside[1] == file.stem else f"{inside[1]}.yaml, used by {shown_path(file)}"


def _key_path(cause: OmegaConfBaseException, source: str, raw: dict[str, Any]) -> str:
    """Return the full key path; omegaconf forgets what lies above the element of a list."""
    path = cause.full_key or ""
    if source.startswith("override "):
        key = source.removeprefix("override ").lstrip("+~").split("=", 1)[0]
        key = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", key)
        if path and not (path.startswith(key) or key.startswith(path)):
            return f"{key}[...].{path}"
        return path or key
    if path and re.split(r"[.\[]", path)[0] not in raw:
        return _find(raw, path, "") or path
    return path


def _misfit_of_recipe(raw: dict[str, Any]) -> tuple[str, Any] | None:
    if "pipeline" in raw:
        return _misfit(raw, PipelineConfig, "")
    chosen = [item["/stage"] for item in raw["defaults"] if isinstance(item, dict) and "/stage" in item]
    if isinstance(raw.get("stage"), dict) and chosen and chosen[0] in STAGE_CONFIGS:
        found = _misfit(raw["stage"], STAGE_CONFIGS[chosen[0]], "stage.")
        if found:
            return found
    return _misfit({key: value for key, value in raw.items() if key != "stage"}, RecipeConfig, "")


def _misfit(raw: dict[str, Any], schema: type, above: str) -> tuple[str, Any] | None:
    """Return the first (key path, declared type) where a list stands for a mapping or the other way round."""
    hints = typing.get_type_hints(schema)
    for key, value in raw.items():
        kind, path = hints.get(key), f"{above}{key}"
        if isinstance(kind, type) and is_dataclass(kind):
            found = _misfit(value, kind, f"{path}.") if isinstance(value, dict) else (path, kind)
            if found:
                return found
        elif typing.get_origin(kind) in (list, dict) and not isinstance(value, typing.get_origin(kind) or object):
            return path, kind
    return None


def _find(node: Any, path: str, above: str) -> str | None:
    """Return the first place in `node` below which `path` exists."""
    if isinstance(node, dict):
        first = path.split(".", maxsplit=1)[0]
        if first in node:
            return f"{above}.{path}".lstrip(".")
        children = [(f"{above}.{key}".lstrip("."), value) for key, value in node.items()]
    elif isinstance(node, list):
        children = [(f"{above}[{i}]", value) for i, value in enumerate(node)]
    else:
        return None
    return next((found for place, value in children if (found := _find(value, path, place))), None)


def _value_rule(cause: OmegaConfBaseException) -> str:
    """Return `is ... but must be ...`, from the type of the field in the schema."""
    kind = _field_type(cause)
    value = cause.value._value() if isinstance(cause.value, Node) else cause.value
    given = "is empty but" if value is None else f"is {value!r} but"
    if isinstance(value, float) and kind is int and value.is_integer():
        return f"{given} must be a whole number; write {int(value)}."
    if isinstance(kind, type) and issubclass(kind, Enum):
        names = [member.name for member in kind]
        return f"{given} must be one of {', '.join(names)}; {nearest(str(value), names)}"
    rule = _type_rule(kind)
    return f"{given} {rule}" if rule else f"cannot be used: {_first_line(cause)}."


def _type_rule(kind: Any) -> str:
    if kind in _FIELD_RULES:
        return f"{_FIELD_RULES[kind]}."
    if isinstance(kind, type) and is_dataclass(kind):
        return f"must be a mapping with the keys {', '.join(f.name for f in fields(kind))}."
    if typing.get_origin(kind) in (list, dict):
        what = "a list" if typing.get_origin(kind) is list else "a mapping"
        return f"must be {what} ({re.sub(r'nanotrain[.a-z_]*[.]', '', str(kind))})."
    return ""


def _field_type(cause: OmegaConfBaseException) -> Any:
    """Return the declared type of the refused field, or None."""
    holder, key = cause.object_type, cause.key
    if cause.full_key and key is None:  # a whole section was refused: its own type is what was wanted
        return holder if is_dataclass(holder) else None
    if is_dataclass(holder) and isinstance(key, str):
        hints = typing.get_type_hints(holder)
        return hints.get(key)
    element = typing.get_args(cause.ref_type)
    return element[-1] if element and not isinstance(cause.ref_type, types.UnionType) else None


def _hydra_sentence(text: str, source: str, key_prefix: str, overrides: Sequence[str]) -> str:
    """Return the sentence for what Hydra itself refuses: groups, defaults lists, overrides."""
    choice = re.search(r"Could not find '(.+?)'", text) or re.search(r"Could not load '(.+?)'", text)
    if choice:
        options = re.findall(r"^\t([\w./@-]+)$", text.split("Config search path", maxsplit=1)[0], re.MULTILINE)
        group, _, name = choice[1].rpartition("/")
        asked = f"`{group}: {name}` in `defaults`" if group else f"`{name}` in `defaults`"
        for override in overrides:
            if group and override.lstrip("+~").startswith(group) and override.endswith(f"={name}"):
                asked, source = f"`{key_prefix}{override}`", "an override"
        known = nearest(name, options) if options else "there is no such group or file."
        return f"{asked} ({source}) is not a choice; {known}"
    several = re.search(r"Multiple values for ([\w@./]*\w)|([\w@./]+) appears more than once", text)
    if several:
        group = several[1] or several[2]
        return (
            f"`{group}` is chosen twice in `defaults` of {source}; to change an earlier choice write"
            f" `- override /{group}: ...`."
        )
    missing_group = re.search(r"Could not override '([\w@./-]+)'\.", text)
    if missing_group:
        return (
            f"`{key_prefix}{missing_group[1]}` ({source}) is not a key or group of this recipe; `+group@path=choice`"
            " adds a group."
        )
    return f"{source} cannot be composed: {' '.join(text.split())}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")
