"""Blends and curricula as files: sources with weights and repetition caps, and blends with switch points in tokens.

Every weight says where it comes from: published, proxy (published for a sibling model), or chosen (by us). A recipe's
phase may name a blend; its weights and caps then stand in the resolved recipe, so a changed blend is a changed recipe.
"""

import math
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf

from nanotrain.config.data import PhaseConfig, validate_curriculum
from nanotrain.config.errors import UserError, nearest
from nanotrain.config.load_messages import shown_path
from nanotrain.config.shipped import find_values
from nanotrain.config.values_file import load_values

BLENDS_FOLDER = Path("data") / "blends"


class WeightOrigin(str, Enum):
    """Where a weight comes from."""

    published = "published"
    proxy = "proxy"
    chosen = "chosen"


@dataclass
class BlendSourceConfig:
    """One source of a blend."""

    weight: float = MISSING
    """Any scale; shares are the weights over their sum."""
    max_epochs: float = 0.0
    """Most times that its text may be walked through over the whole stage; 0 = no cap."""
    origin: WeightOrigin = MISSING
    note: str = ""
    """Where the weight is published, or why it was chosen."""


@dataclass
class BlendConfig:
    """A blend file."""

    base: str = ""
    """Another blend that takes `base_share` of this one, in its own proportions."""
    base_share: float = 0.0
    sources: dict[str, BlendSourceConfig] = field(default_factory=dict)


@dataclass
class PoolConfig:
    """Text with a known number of tokens that one or more sources draw from."""

    tokens: int = MISSING
    origin: str = MISSING
    """Where the number is published."""
    sources: list[str] = field(default_factory=list)
    """Names as in the blends; several when the number is known only for all of them together."""
    subsets: list[str] = field(default_factory=list)
    """Released subsets (configs/data/nemotron_pretraining_v1) that hold it or part of it; empty = not released."""


@dataclass
class CurriculumPhaseConfig:
    until: float = MISSING
    """Share of the tokens at which the phase ends."""
    blend: str = MISSING
    """Blend file, relative to this file or among the shipped ones."""


@dataclass
class CurriculumConfig:
    """A curriculum file."""

    total_tokens: int = MISSING
    phases: list[CurriculumPhaseConfig] = field(default_factory=list)
    pools: dict[str, PoolConfig] = field(default_factory=dict)


@dataclass(frozen=True)
class Blend:
    """A blend with its base worked in.

    Attributes:
        weights: source -> share; they sum to 1.
        sources: source -> cap, origin and note.
    """

    weights: dict[str, float]
    sources: dict[str, BlendSourceConfig]

    @property
    def max_epochs(self) -> dict[str, float]:
        """Source -> cap, of those that have one."""
        return {name: source.max_epochs for name, source in self.sources.items() if source.max_epochs}


@dataclass(frozen=True)
class Curriculum:
    """A curriculum with its blends read.

    Attributes:
        total_tokens: of the run.
        phases: (until, blend).
        pools: how much text there is.
    """

    total_tokens: int
    phases: list[tuple[float, Blend]]
    pools: dict[str, PoolConfig]

    def recipe_phases(self) -> list[PhaseConfig]:
        """Return the phases as a recipe's `curriculum` has them."""
        return [
            PhaseConfig(until=until, weights=dict(blend.weights), max_epochs=blend.max_epochs)
            for until, blend in self.phases
        ]


def load_blend(name: str | Path, beside: Path | None = None, trail: tuple[Path, ...] = ()) -> Blend:
    """Read a blend file, by path, relative to another file, or by the name of a shipped one.

    Raises:
        UserError: unknown keys, weights that cannot be, a base that leads back to the blend itself.
    """
    file = find_values(name, BLENDS_FOLDER, "blend", beside).resolve()
    if file in trail:
        raise UserError(f"`base` of {shown_path(file)} leads back to the blend itself; take it out.")
    config = load_values(file, BlendConfig)
    where = shown_path(file)
    for source, one in config.sources.items():
        for key, value in (("weight", one.weight), ("max_epochs", one.max_epochs)):
            if not math.isfinite(value) or value < 0:
                raise UserError(f"`sources.{source}.{key}` ({value}) in {where} must be a finite number of at least 0.")
    if bool(config.base) != (config.base_share > 0) or not 0 <= config.base_share < 1:
        raise UserError(f"`base` and `base_share` ({config.base_share}) in {where} go together, the share in (0, 1).")
    own = sum(one.weight for one in config.sources.values())
    if not own > 0:
        raise UserError(f"`sources` in {where} must hold at least one weight above 0.")
    weights: dict[str, float] = {}
    sources: dict[str, BlendSourceConfig] = {}
    if config.base:
        base = load_blend(config.base, file, (*trail, file))
        weights = {source: config.base_share * weight for source, weight in base.weights.items()}
        sources = dict(base.sources)
    for source, one in config.sources.items():
        if source in weights:
            raise UserError(f"`sources.{source}` in {where} is a source of its base already; give it another name.")
        weights[source], sources[source] = (1 - config.base_share) * one.weight / own, one
    return Blend({source: round(weight, 12) for source, weight in weights.items()}, sources)


def load_curriculum(name: str | Path) -> Curriculum:
    """Read a curriculum file and its blends.

    Raises:
        UserError: as `load_blend`; phases that do not rise to 1; a pool of an unknown source, or two pools of one.
    """
    file = find_values(name, BLENDS_FOLDER, "curriculum")
    config = load_values(file, CurriculumConfig)
    if config.total_tokens < 1:
        raise UserError(f"`total_tokens` ({config.total_tokens}) in {shown_path(file)} must be at least 1.")
    curriculum = Curriculum(
        config.total_tokens, [(phase.until, load_blend(phase.blend, file)) for phase in config.phases], config.pools
    )
    names = tuple(dict.fromkeys(source for _, blend in curriculum.phases for source in blend.weights))
    validate_curriculum(curriculum.recipe_phases(), "phases", names)
    owner: dict[str, str] = {}
    for pool, one in config.pools.items():
        if one.tokens < 1:
            raise UserError(f"`pools.{pool}.tokens` ({one.tokens}) in {shown_path(file)} must be at least 1.")
        for source in one.sources:
            if source not in names:
                raise UserError(
                    f"`pools.{pool}.sources` names `{source}`, which no blend has; {nearest(source, names)}"
                )
            if source in owner:
                raise UserError(
                    f"`pools.{pool}.sources` names `{source}`, which is in `pools.{owner[source]}` already."
                )
            owner[source] = pool
    return curriculum


def resolve_blends(composed: DictConfig, recipe: Path) -> None:
    """Put the weights and caps of each phase's `blend` into a composed recipe; does nothing without such phases.

    Raises:
        UserError: a phase with both a blend and weights; as `load_blend`.
    """
    stage: Any = composed.stage if not OmegaConf.is_missing(composed, "stage") else None
    if not isinstance(stage, DictConfig) or "curriculum" not in stage or not isinstance(stage.curriculum, ListConfig):
        return
    for number, phase in enumerate(stage.curriculum):
        if not phase.blend:
            continue
        if phase.weights:
            raise UserError(
                f"`stage.curriculum[{number}]` in {shown_path(recipe)} has both `blend` and `weights`; a blend brings its"
                " weights, so keep one."
            )
        blend = load_blend(phase.blend, recipe)
        phase.weights = dict(blend.weights)
        phase.max_epochs = blend.max_epochs | dict(phase.max_epochs)
