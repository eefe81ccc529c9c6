"""Checks of a composed recipe beyond what omegaconf does: nothing that a user writes may be dropped in silence."""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nanotrain.config.errors import UserError, nearest
from nanotrain.config.load_messages import shown_path
from nanotrain.config.run import RecipeConfig
from nanotrain.config.stage import STAGE_CONFIGS, TRAINING_STAGES, PretrainConfig, StageConfig

_ENTRY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
RESERVED = frozenset(
    {
        "name",
        "seed",
        "output_dir",
        "engine",
        "tracking",
        "cluster",
        "stage",
        "pipeline",
        "hydra",
        "defaults",
        "previous",
        "slurm",
    }
)
"""Names that an entry of a pipeline must not have: they mean something on the command line, or are a folder of the run."""


def read_yaml(file: Path) -> dict[str, Any]:
    """Return the top level of a YAML file as plain values, without resolving anything."""
    try:
        raw = OmegaConf.load(file)
    except UnicodeDecodeError as error:
        raise UserError(f"{shown_path(file)} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{shown_path(file)} is not valid YAML: {' '.join(str(error).split())}.") from error
    except (OSError, OmegaConfBaseException) as error:
        raise UserError(f"{shown_path(file)} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(raw, DictConfig) or not raw:
        raise UserError(f"{shown_path(file)} must hold a mapping (key: value); see docs/recipes.md.")
    container = OmegaConf.to_container(raw, resolve=False)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def check_layout(file: Path, raw: dict[str, Any]) -> None:
    """Refuse what Hydra would accept and silently drop."""
    if file.suffix != ".yaml":
        raise UserError(f"{shown_path(file)} must be named *.yaml.")
    defaults = raw.get("defaults")
    example = "[recipe, /stage: pretrain, _self_]"
    if not isinstance(defaults, list):
        raise UserError(f"{shown_path(file)} must have a list `defaults`, for example {example}; see docs/recipes.md.")
    if "_self_" not in defaults:
        raise UserError(
            f"`defaults` in {shown_path(file)} must end with `_self_`, or what the file states would be overwritten."
        )
    for key in ("hydra", "pipeline"):
        if key in raw:
            raise UserError(f"`{key}` in {shown_path(file)} has no place in a stage recipe; remove it.")


def require_schema(composed: DictConfig, file: Path, key_prefix: str) -> None:
    if OmegaConf.get_type(composed) is not RecipeConfig:
        raise UserError(
            f"`defaults` in {shown_path(file)} must start with `- recipe`, the schema that refuses mistyped keys."
        )
    if OmegaConf.is_missing(composed, "stage") or OmegaConf.get_type(composed, "stage") is StageConfig:
        raise UserError(
            f"`{key_prefix}stage` is not chosen; add `- /stage: <one of {', '.join(STAGE_CONFIGS)}>` to `defaults` in"
            f" {shown_path(file)}."
        )
    _refuse_added_keys(composed, key_prefix)


def _refuse_added_keys(node: DictConfig | ListConfig, path: str) -> None:
    """`+key=value` can add a key that the schema does not have; nothing would read it."""
    children = node.items_ex(resolve=False) if isinstance(node, DictConfig) else enumerate(node._iter_ex(resolve=False))
    schema = OmegaConf.get_type(node)
    for key, value in children:
        if isinstance(schema, type) and is_dataclass(schema) and key not in (names := [f.name for f in fields(schema)]):
            raise UserError(f"`{path}{key}` is not a key of {schema.__name__}; {nearest(str(key), names)}")
        if isinstance(value, DictConfig | ListConfig) and not (value._is_missing() or value._is_none()):
            _refuse_added_keys(value, f"{path}{key}.")


def missing_keys(composed: DictConfig) -> list[str]:
    """Return the keys without a value; the sizes of a model whose architecture comes from a checkpoint may lack one."""
    if OmegaConf.is_missing(composed, "name"):
        return ["name"]  # output_dir refers to it, so asking for the others would fail
    keys = sorted(OmegaConf.missing_keys(composed))
    if OmegaConf.get_type(composed, "stage") is PretrainConfig and composed.stage.architecture_from:
        return [key for key in keys if not key.startswith("stage.model.")]
    return keys


def instantiate(node: Any) -> Any:
    """Return `node` as real dataclasses, lists and dicts; missing values stay MISSING (OmegaConf.to_object refuses)."""
    if isinstance(node, ListConfig):
        return [instantiate(item) for item in node]
    if not isinstance(node, DictConfig):
        return node
    values = {str(key): MISSING if OmegaConf.is_missing(node, key) else instantiate(node[key]) for key in node}
    schema = OmegaConf.get_type(node)
    return schema(**values) if isinstance(schema, type) and is_dataclass(schema) else values


def validate(config: RecipeConfig, key_prefix: str) -> None:
    config.engine.validate(f"{key_prefix}engine")
    config.tracking.validate(f"{key_prefix}tracking")
    config.cluster.validate(f"{key_prefix}cluster")
    config.stage.validate(f"{key_prefix}stage")
    if isinstance(config.stage, TRAINING_STAGES):
        config.stage.training.validate_batch(f"{key_prefix}stage.training", dp_size=1)


def check_run_keys(name: str, output_dir: str) -> str:
    """Return output_dir with `~` expanded."""
    if not _RUN_NAME.fullmatch(name):
        raise UserError(f"`name` ({name!r}) must consist of letters, digits, `.`, `_` and `-`.")
    if not output_dir.strip():
        raise UserError("`output_dir` is empty; leave it out to get runs/<name>.")
    return str(Path(output_dir).expanduser())


def require_entry_name(name: str, what: str, reserved: frozenset[str]) -> None:
    if not _ENTRY_NAME.fullmatch(name) or name in reserved:
        rule = f"and must not be one of {', '.join(sorted(reserved))}" if reserved else "without its extension"
        raise UserError(f"{what} must consist of letters, digits, `_` and `-`, {rule}; rename it.")
