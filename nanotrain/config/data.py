"""What a stage reads: the corpus to prepare, the curriculum of blends, and how reasoning rows are shaped."""

import math
from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from nanotrain.config.errors import UserError, nearest

CATEGORIES = ("web", "math", "code", "multilingual", "sft")


class CorpusKind(str, Enum):
    pip_mini = "pip_mini"


@dataclass
class CorpusConfig:
    """The text that the prepare stage fetches, splits and tokenises (configs/data/)."""

    kind: CorpusKind = CorpusKind.pip_mini
    vocab_size: int = MISSING
    """Tokens of the tokenizer, made of the first ranks of a published byte-level BPE."""
    validation_fraction: float = 0.06
    """Share of document families (pages, projects, templates) held out; never a random share of documents."""
    max_validation_overlap: float = 1.0
    """A held-out document that shares more than this part of its 13-word windows with training text is left out."""
    max_bytes_per_category: int = 0
    """Cap on the text of each category, for short runs; 0 = all of it."""
    num_chat_rows: int = 12000
    """Training rows of verifiable reasoning chat."""
    num_chat_validation_rows: int = 400

    def validate(self, path: str) -> None:
        if not 0 < self.validation_fraction < 0.5:
            raise UserError(f"`{path}.validation_fraction` ({self.validation_fraction}) must lie between 0 and 0.5.")
        if not 0 <= self.max_validation_overlap <= 1:
            raise UserError(f"`{path}.max_validation_overlap` ({self.max_validation_overlap}) must lie in [0, 1].")
        if self.vocab_size < 1280 or self.vocab_size > 131072:
            raise UserError(
                f"`{path}.vocab_size` ({self.vocab_size}) must lie between 1280 (1000 specials, 256 bytes and a few"
                " merges) and 131072."
            )
        for name, least in {"max_bytes_per_category": 0, "num_chat_rows": 1, "num_chat_validation_rows": 1}.items():
            if self.__dict__[name] < least:
                raise UserError(f"`{path}.{name}` ({self.__dict__[name]}) must be at least {least}.")


@dataclass
class PhaseConfig:
    """One blend of a curriculum."""

    until: float = MISSING
    """Share of the stage's tokens at which this phase ends; the last phase ends at 1.0."""
    weights: dict[str, float] = field(default_factory=dict)
    """Source name -> weight; normalised."""
    blend: str = ""
    """Take weights and caps from this blend file (configs/data/blends) instead of stating them."""
    max_epochs: dict[str, float] = field(default_factory=dict)
    """Source name -> most times that the whole stage may walk through its text; sources without one have no cap."""


def names_a_folder(value: str) -> bool:
    """Return whether a `*_from` value is a folder, not an entry's name."""
    return "/" in value or value.startswith((".", "~"))


def validate_curriculum(phases: list[PhaseConfig], path: str, sources: tuple[str, ...] | None = CATEGORIES) -> None:
    """Raise UserError unless phases rise to 1.0 and every weight is finite, positive in sum, and of a known source.

    Args:
        phases: the curriculum.
        path: its key.
        sources: known names; None when they are known only from the data folder.
    """
    if not phases:
        raise UserError(f"`{path}` must list at least one phase, for example [{{until: 1.0, weights: {{web: 1}}}}].")
    previous = 0.0
    for i, phase in enumerate(phases):
        if not previous < phase.until <= 1.0:
            raise UserError(f"`{path}[{i}].until` ({phase.until}) must rise from phase to phase and not exceed 1.0.")
        previous = phase.until
        for name, weight in phase.weights.items():
            if sources is not None and name not in sources:
                raise UserError(f"`{path}[{i}].weights.{name}` is not a source; {nearest(name, sources)}")
            if not math.isfinite(weight) or weight < 0:
                raise UserError(f"`{path}[{i}].weights.{name}` ({weight}) must be a finite number of at least 0.")
        for name, cap in phase.max_epochs.items():
            if name not in phase.weights:
                raise UserError(
                    f"`{path}[{i}].max_epochs.{name}` caps what is no source; {nearest(name, phase.weights)}"
                )
            if not math.isfinite(cap) or cap <= 0:
                raise UserError(f"`{path}[{i}].max_epochs.{name}` ({cap}) must be a finite number above 0.")
        if not sum(phase.weights.values()) > 0:
            raise UserError(f"`{path}[{i}].weights` must hold at least one weight above 0.")
    if previous != 1.0:
        raise UserError(f"`{path}[{len(phases) - 1}].until` ({previous}) must be 1.0 in the last phase.")


@dataclass
class ReasoningConfig:
    """How rows with a reasoning trace are shaped for SFT (paper section 3; exact forms are not published)."""

    empty_trace_fraction: float = 0.10
    """Share of prompts repeated with an empty trace (reasoning off)."""
    truncated_fraction: float = 0.05
    """Share of the rows that have traces whose trace is cut abruptly, the final answer kept."""
    truncated_min_tokens: int = 1000
    truncated_max_tokens: int = 2000
    """The cut falls uniformly in this range of trace tokens; shorter traces are cut at 25-75% of their length."""

    def validate(self, path: str) -> None:
        for name in ("empty_trace_fraction", "truncated_fraction"):
            if not 0 <= self.__dict__[name] <= 1:
                raise UserError(f"`{path}.{name}` ({self.__dict__[name]}) must lie between 0 and 1.")
        if not 1 <= self.truncated_min_tokens <= self.truncated_max_tokens:
            raise UserError(
                f"`{path}.truncated_min_tokens` ({self.truncated_min_tokens}) must lie between 1 and"
                f" `truncated_max_tokens` ({self.truncated_max_tokens})."
            )
