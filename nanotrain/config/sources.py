"""Components of released training data: where each lies, how its records look, and what was published about it.

A component is one data set of the Hugging Face hub, or local files of the same form (configs/data/nemotron_pretraining_v1).
What could not be confirmed is said in `unverified`, and nothing of it is relied on: a column is looked up when the data is
opened, and a missing one is named.
"""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from omegaconf import MISSING

from nanotrain.config.errors import UserError, nearest
from nanotrain.config.shipped import find_values
from nanotrain.config.values_file import load_values


class RecordForm(str, Enum):
    """What a record is: running text, a conversation, or the place of a file whose content is fetched elsewhere."""

    text = "text"
    messages = "messages"
    code_reference = "code_reference"


COLUMN_TYPES = ("string", "int", "float", "bool", "struct", "list")
_REFERENCE_COLUMNS = ("repo", "commit_id", "rel_path")


@dataclass
class SubsetConfig:
    """One configuration and split of a component; its key is its name in blends."""

    hub_config: str = ""
    """Name of the configuration on the hub; empty = the data set's only one."""
    split: str = "train"
    form: RecordForm = RecordForm.text
    text_column: str = "text"
    messages_column: str = "messages"
    licence_column: str = ""
    """Column with the licence of each record; empty = the component's licence holds for all."""
    columns: dict[str, str] = field(default_factory=dict)
    """Published columns -> string, int, float, bool, struct or list. More columns than these are no mistake."""
    published_rows: int = 0
    """0 = not published."""
    published_tokens: int = 0
    """0 = not published."""
    origin: str = ""
    """Where rows and tokens are published."""
    unverified: str = ""
    """What about this subset could not be confirmed."""
    local_files: list[str] = field(default_factory=list)
    """Files or patterns (parquet, jsonl, also gzipped) that are read instead of the hub."""

    def validate(self, path: str) -> None:
        for name, kind in self.columns.items():
            if kind not in COLUMN_TYPES:
                raise UserError(f"`{path}.columns.{name}` ({kind}) is not a type; {nearest(kind, COLUMN_TYPES)}")
        for name in self.needed_columns():
            if name not in self.columns:
                raise UserError(
                    f"`{path}.columns` lacks `{name}`, which records of the form `{self.form.value}` are read from; add"
                    " it with its type, or name the right column."
                )
        for name in ("published_rows", "published_tokens"):
            if self.__dict__[name] < 0:
                raise UserError(f"`{path}.{name}` ({self.__dict__[name]}) must not be negative; 0 = not published.")
        if (self.published_rows or self.published_tokens) and not self.origin:
            raise UserError(f"`{path}.origin` must say where `published_rows` and `published_tokens` are published.")

    def needed_columns(self) -> tuple[str, ...]:
        """Return the columns without which a record cannot be used."""
        own = {
            RecordForm.text: (self.text_column,),
            RecordForm.messages: (self.messages_column,),
            RecordForm.code_reference: _REFERENCE_COLUMNS,
        }[self.form]
        return (*own, self.licence_column) if self.licence_column else own


@dataclass
class ComponentConfig:
    """One data set of the hub."""

    hub_id: str = MISSING
    licence: str = MISSING
    gated: bool = MISSING
    """Access must be asked for on the data set's page."""
    ask_at: str = ""
    """Page where access is asked for; empty = the data set's own page."""
    token_variable: str = "HF_TOKEN"
    """Environment variable with the access token of the hub."""
    unverified: str = ""
    subsets: dict[str, SubsetConfig] = field(default_factory=dict)

    @property
    def page(self) -> str:
        return self.ask_at or f"https://huggingface.co/datasets/{self.hub_id}"

    def validate(self, path: str) -> None:
        """Raise UserError when values do not fit together; `path` is what stands before a key in messages."""
        if not self.subsets:
            raise UserError(f"`{path}subsets` must list at least one subset.")
        for name, subset in self.subsets.items():
            subset.validate(f"{path}subsets.{name}")


COMPONENTS_FOLDER = Path("data") / "nemotron_pretraining_v1"


def load_component(name: str | Path) -> ComponentConfig:
    """Read and check a component's file, by path or by the name of a shipped one."""
    component = load_values(find_values(name, COMPONENTS_FOLDER, "component"), ComponentConfig)
    assert isinstance(component, ComponentConfig)
    component.validate("")
    return component
