"""From a recipe file and command-line overrides to checked dataclasses; the only module that imports Hydra.

A stage recipe is a YAML file with a defaults list that starts from the schema (`recipe`); a pipeline recipe lists
named stage recipes. Both become a `LoadedRecipe`: everything is composed and validated before anything runs.
"""

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override as HydraOverride
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nanotrain.config.blend import resolve_blends
from nanotrain.config.errors import MissingInputError, UserError, nearest
from nanotrain.config.load_checks import (
    RESERVED,
    check_layout,
    check_run_keys,
    instantiate,
    missing_keys,
    read_yaml,
    require_entry_name,
    require_schema,
    validate,
)
from nanotrain.config.load_messages import composition_error, missing_values_error, shown_path
from nanotrain.config.overrides import Override, SweepJob, sweep_suffix
from nanotrain.config.run import PipelineConfig, RecipeConfig
from nanotrain.config.shipped import package_folder
from nanotrain.config.stage import STAGE_CONFIGS

SHARED_GROUPS = {"engine": "torch", "tracking": "none", "cluster": "one_node"}
"""Groups of every recipe with their default choice; in a pipeline their overrides apply to every entry."""


@dataclass(frozen=True)
class LoadedEntry:
    """One stage, composed and validated."""

    name: str
    """Folder below the run's output_dir."""
    recipe_file: Path
    config: RecipeConfig
    resolved: dict[str, Any]
    """The same as plain values (enums by name), for recipe.yaml and the fingerprint."""
    key_prefix: str
    """`<entry>.` in a pipeline, empty alone: what stands before a key on the command line."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A pipeline; a stage recipe is a pipeline of one entry, named by its file."""

    file: Path
    declared_name: str
    """`name` as the file states it, before overrides: the identity of the recipe, whatever a run is called."""
    name: str
    output_dir: Path
    is_pipeline: bool
    entries: list[LoadedEntry]

    def to_yaml(self) -> str:
        """Return the composed recipe; in a pipeline each entry under its name, so that a key's path is its override."""
        if not self.is_pipeline:
            return yaml.safe_dump(self.entries[0].resolved, sort_keys=False)
        head = {"name": self.name, "output_dir": str(self.output_dir)}
        parts = [yaml.safe_dump(head, sort_keys=False)]
        for entry in self.entries:
            body = {key: value for key, value in entry.resolved.items() if key not in head}
            parts.append(yaml.safe_dump({entry.name: body}, sort_keys=False))
        return "\n".join(parts)


def find_recipe(path: str | Path) -> Path:
    """Return the recipe's file: relative to the working directory, else among the recipes shipped with the package.

    Raises:
        UserError: no such file in either place.
    """
    given = Path(path)
    shipped = package_folder("recipes")
    for candidate in (given, shipped.parent / given, shipped / given):
        if candidate.is_file():
            return candidate.resolve()
    names = [f"recipes/{file.relative_to(shipped).as_posix()}" for file in sorted(shipped.rglob("*.yaml"))]
    raise MissingInputError(
        f"`{path}` is not a recipe file, here or among the shipped ones; {nearest(str(path), names)}"
    )


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> LoadedRecipe:
    """Compose and validate a stage recipe or a pipeline recipe.

    Args:
        path: the recipe, relative to the working directory or among the shipped recipes.
        overrides: Hydra overrides. In a pipeline a key starts with `<entry>.`, except `name`, `seed`, `output_dir`,
            and `engine...`, `tracking...` and `cluster...`, which apply to every entry.

    Raises:
        UserError: anything that the user can mend; nothing has been written.
    """
    file = find_recipe(path)
    raw = read_yaml(file)
    parsed = _parse_overrides(overrides)
    if "pipeline" in raw:
        return _load_pipeline(file, raw, parsed)
    require_entry_name(file.stem, f"the recipe's file name `{file.name}`", reserved=frozenset())
    entry = _load_entry(file.stem, file, raw, parsed, key_prefix="")
    config = entry.config
    declared = str(raw["name"]) if "name" in raw else config.name
    return LoadedRecipe(file, declared, config.name, Path(config.output_dir), False, [entry])


def expand_sweeps(overrides: list[str]) -> list[SweepJob]:
    """Expand sweep syntax (`key=1,2`, `key=choice(a,b)`, `key=range(0,10)`) into the jobs of a grid, in order.

    Raises:
        UserError: no override sweeps, or one does not parse.
    """
    axes = []
    for text in overrides:
        override = _parse(text)
        if override.is_sweep_override():
            key = override.get_key_element()
            axes.append([(text, f"{key}={value}") for value in override.sweep_string_iterator()])
        else:
            axes.append([(None, text)])
    if not any(source for axis in axes for source, _ in axis):
        raise UserError("`--multirun` needs an override that sweeps, for example `seed=1,2`.")
    jobs = []
    for point in itertools.product(*axes):
        swept = [text for source, text in point if source]
        jobs.append(SweepJob([text for _, text in point], sweep_suffix(swept)))
    return jobs


def _parse(text: str) -> HydraOverride:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        reason = str(error).removeprefix(f"Error parsing override '{text}'").strip().splitlines()[0].split(":")[0]
        raise UserError(
            f"`{text}` cannot be read as an override ({reason}); write key=value, and quote a value that holds any of"
            " `= , [ ] { } ( )` or blanks: key='\"value\"'."
        ) from error


def _parse_overrides(texts: list[str] | tuple[str, ...]) -> list[Override]:
    overrides = [Override(text) for text in texts]
    for override in overrides:
        if not override.head:
            raise UserError(f"`{override.text}` has no key; write key=value.")
        if _parse(override.text).is_sweep_override():
            raise UserError(f"`{override.text}` sweeps over values; add --multirun, or write key=[a,b] for a list.")
    return overrides


def _load_pipeline(file: Path, raw: dict[str, Any], overrides: list[Override]) -> LoadedRecipe:
    pipeline, declared = _pipeline_config(file, raw, [o for o in overrides if o.head in ("name", "seed", "output_dir")])
    names = [entry.name for entry in pipeline.pipeline]
    for name in names:
        require_entry_name(name, f"the entry name `{name}` in {shown_path(file)}", reserved=RESERVED)
        if names.count(name) > 1:
            raise UserError(
                f"{shown_path(file)} lists the entry `{name}` twice; entry names are folders and must be unique."
            )
    heads = ("name", "seed", "output_dir", *SHARED_GROUPS, *names)
    for override in overrides:
        if override.head not in heads or (override.head in names and not override.has_tail):
            if override.head in ("stage", "model@stage"):
                raise UserError(
                    f"`{override.text}`: say whose stage it is, for example `{names[0]}.{override.text}`; the entries"
                    f" are {', '.join(names)}."
                )
            raise UserError(
                f"`{override.text}`: in a pipeline a key is `<entry>.<key of its recipe>`, or one of name, seed,"
                f" output_dir, engine, tracking, cluster; {nearest(override.head, heads)}"
            )
    shared = [override for override in overrides if override.head in SHARED_GROUPS]
    entries = []
    for item in pipeline.pipeline:
        recipe_file = (file.parent / item.recipe).resolve()
        if not recipe_file.is_file():
            near = [sibling.name for sibling in sorted(file.parent.glob("*.yaml")) if sibling != file]
            raise MissingInputError(
                f"`pipeline` of {shown_path(file)}: the recipe {item.recipe!r} of entry {item.name!r} is not a file"
                f" beside the pipeline; {nearest(item.recipe, near)}"
            )
        own = [override.without_head() for override in overrides if override.head == item.name]
        for override in own:
            if override.head in ("name", "output_dir"):
                raise UserError(
                    f"`{item.name}.{override.text}`: `{override.head}` belongs to the whole run, because an entry's"
                    f" folder is <output_dir>/{item.name}; write `{override.text}` without the prefix."
                )
        changes = [*_parse_overrides(item.overrides), *shared, *own]
        entries.append(
            _load_entry(
                item.name, recipe_file, read_yaml(recipe_file), changes, key_prefix=f"{item.name}.", pipeline=pipeline
            )
        )
    return LoadedRecipe(file, declared, pipeline.name, Path(pipeline.output_dir), True, entries)


def _pipeline_config(file: Path, raw: dict[str, Any], overrides: list[Override]) -> tuple[PipelineConfig, str]:
    if "defaults" in raw:
        raise UserError(f"{shown_path(file)} is a pipeline (it has the key `pipeline`), so it takes no `defaults`.")
    schema = OmegaConf.structured(PipelineConfig)
    key = ""
    try:
        config = OmegaConf.merge(schema, OmegaConf.create(raw))
        declared = "" if OmegaConf.is_missing(config, "name") else config.name
        for override in overrides:
            key = override.text
            if override.text[0] in "+~" or override.has_tail:
                raise UserError(f"`{override.text}`: write `{override.head}=value`.")
            OmegaConf.update(config, override.head, _parse(override.text).value())
        missing = ["name"] if OmegaConf.is_missing(config, "name") else sorted(OmegaConf.missing_keys(config))
        if missing:
            raise missing_values_error(missing, file, "")
        config = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise composition_error(error, file, raw, overrides=[key] if key else []) from error
    assert isinstance(config, PipelineConfig)
    if not config.pipeline:
        raise UserError(f"`pipeline` in {shown_path(file)} must list at least one entry, {{name: ..., recipe: ...}}.")
    config.output_dir = check_run_keys(config.name, config.output_dir)
    return config, declared


def _load_entry(
    name: str,
    file: Path,
    raw: dict[str, Any],
    overrides: list[Override],
    *,
    key_prefix: str,
    pipeline: PipelineConfig | None = None,
) -> LoadedEntry:
    """Compose one stage recipe; a pipeline's name, output_dir and (unless the recipe has its own) seed go in."""
    for override in overrides:
        if override.head == "hydra":
            raise UserError(f"`{override.text}` would be ignored: a run takes no `hydra` keys; remove it.")
    composed = _compose(file, raw, overrides, key_prefix)
    try:
        if pipeline is not None:
            composed.name, composed.output_dir = pipeline.name, pipeline.output_dir
            if "seed" not in raw and not any(override.head == "seed" for override in overrides):
                composed.seed = pipeline.seed
        require_schema(composed, file, key_prefix)
        resolve_blends(composed, file)
        missing = missing_keys(composed)
        if missing:
            raise missing_values_error(missing, file, key_prefix)
        config = instantiate(composed)
        resolved = OmegaConf.to_container(composed, resolve=True, enum_to_str=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise composition_error(error, file, raw, key_prefix=key_prefix) from error
    assert isinstance(config, RecipeConfig) and isinstance(resolved, dict)
    config.output_dir = resolved["output_dir"] = check_run_keys(config.name, config.output_dir)
    validate(config, key_prefix)
    return LoadedEntry(name, file, config, {str(key): value for key, value in resolved.items()}, key_prefix)


def _compose(file: Path, raw: dict[str, Any], overrides: list[Override], key_prefix: str) -> DictConfig:
    check_layout(file, raw)
    _register_schema()
    _register_recipe_defaults(raw["defaults"])
    search = f"file://{package_folder('configs')}".replace("\\", "\\\\").replace("'", "\\'")
    texts = [override.text for override in overrides]
    try:
        with initialize_config_dir(str(file.parent), version_base="1.3"):
            return compose(file.stem, overrides=[f"hydra.searchpath=['{search}']", *texts])
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
        raise composition_error(error, file, raw, key_prefix=key_prefix, overrides=texts) from error


@functools.cache
def _register_schema() -> None:
    store = ConfigStore.instance()
    store.store(name="recipe_schema", node=RecipeConfig)
    for name, stage_config in STAGE_CONFIGS.items():
        store.store(group="stage", name=name, node=stage_config)


def _register_recipe_defaults(defaults: list[Any]) -> None:
    """Make `recipe` the schema with a choice of engine, tracking and cluster, so that `engine=<choice>` works on every recipe.

    A recipe may choose for itself with `- /engine: <choice>`; Hydra refuses two choices, so ours then stays out.
    """
    named = {str(key).removeprefix("/") for item in defaults if isinstance(item, dict) for key in item}
    choices = [{key: value} for key, value in SHARED_GROUPS.items() if key not in named]
    ConfigStore.instance().store(name="recipe", node={"defaults": ["recipe_schema", *choices, "_self_"]})
