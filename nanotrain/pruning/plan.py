"""What a pruned model keeps of its parent: indices only, so that a plan can be stored, read and applied later."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanotrain.config.errors import MissingInputError, UserError, nearest
from nanotrain.config.model import MAMBA, MLP, ModelConfig
from nanotrain.planning.patterns import layers_of_kind
from nanotrain.runtime.files import write_json_atomic


@dataclass(frozen=True)
class PruningPlan:
    """Kept indices, all 0-based, all rising. Layer numbers are the parent's.

    Order is kept, so that head h of a pruned Mamba-2 layer still reads the B and C of the group it was in: every group
    keeps the same number of heads. Attention heads are never pruned.
    """

    layers: tuple[int, ...]
    hidden: tuple[int, ...]
    """Channels of the residual stream."""
    ffn: Mapping[int, tuple[int, ...]]
    """Layer -> neurons, for every kept MLP layer; the same number in each."""
    mamba_heads: Mapping[int, tuple[int, ...]]
    """Layer -> heads, for every kept Mamba-2 layer; the same number in each."""

    @classmethod
    def identity(cls, config: ModelConfig) -> "PruningPlan":
        """Return the plan that keeps everything."""
        pattern = config.hybrid_layer_pattern
        return cls(
            layers=tuple(range(len(pattern))),
            hidden=tuple(range(config.hidden_size)),
            ffn={i: tuple(range(config.intermediate_size)) for i in layers_of_kind(pattern, MLP)},
            mamba_heads={i: tuple(range(config.mamba_num_heads)) for i in layers_of_kind(pattern, MAMBA)},
        )

    def pruned_config(self, config: ModelConfig) -> ModelConfig:
        """Return the architecture that applying this plan to a model of `config` gives."""
        return dataclasses.replace(
            config,
            hybrid_layer_pattern="".join(config.hybrid_layer_pattern[i] for i in self.layers),
            hidden_size=len(self.hidden),
            intermediate_size=_common_size(self.ffn, config.intermediate_size),
            mamba_num_heads=_common_size(self.mamba_heads, config.mamba_num_heads),
        )

    def validate(self, config: ModelConfig, path: str = "plan") -> None:
        """Raise UserError unless this plan can be applied to a model of `config`.

        Args:
            path: what to call the plan in the message, for example its file.
        """
        pattern = config.hybrid_layer_pattern
        _check_indices(self.layers, len(pattern), f"`layers` of {path}", "num_layers")
        _check_indices(self.hidden, config.hidden_size, f"`hidden` of {path}", "hidden_size")
        for name, kept, kind, size_name in (
            ("ffn", self.ffn, MLP, "intermediate_size"),
            ("mamba_heads", self.mamba_heads, MAMBA, "mamba_num_heads"),
        ):
            expected = [i for i in self.layers if pattern[i] == kind]
            if sorted(kept) != expected:
                raise UserError(
                    f"`{name}` of {path} names the layers {sorted(kept)} but the kept {kind!r} layers are {expected};"
                    " give one list of indices for each of them."
                )
            for layer, indices in kept.items():
                _check_indices(indices, config.__dict__[size_name], f"`{name}.{layer}` of {path}", size_name)
            if len({len(indices) for indices in kept.values()}) > 1:
                sizes = {layer: len(indices) for layer, indices in kept.items()}
                raise UserError(f"`{name}` of {path} keeps {sizes}; every layer must keep the same number.")
        for layer, heads in self.mamba_heads.items():
            _check_groups(heads, config, f"`mamba_heads.{layer}` of {path}")

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "layers": list(self.layers),
            "hidden": list(self.hidden),
            "ffn": {str(layer): list(indices) for layer, indices in self.ffn.items()},
            "mamba_heads": {str(layer): list(indices) for layer, indices in self.mamba_heads.items()},
        }

    @classmethod
    def from_json(cls, value: Any, path: str = "plan") -> "PruningPlan":
        """Read what `to_json` gave.

        Raises:
            UserError: a key is missing or unknown, or a value is not a list of whole numbers.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(value, dict):
            raise UserError(f"{path} must hold a JSON object with the keys {', '.join(names)}.")
        for key in value:
            if key not in names:
                raise UserError(f"{path} has an unknown key {key!r}; {nearest(key, names)}")
        for key in names:
            if key not in value:
                raise UserError(f"{path} has no key {key!r}; a plan needs {', '.join(names)}.")
        return cls(
            layers=_read_indices(value["layers"], f"`layers` of {path}"),
            hidden=_read_indices(value["hidden"], f"`hidden` of {path}"),
            ffn=_read_per_layer(value["ffn"], f"`ffn` of {path}"),
            mamba_heads=_read_per_layer(value["mamba_heads"], f"`mamba_heads` of {path}"),
        )

    def save(self, file: Path) -> None:
        """Write the plan as JSON."""
        write_json_atomic(file, self.to_json())

    @classmethod
    def load(cls, file: Path) -> "PruningPlan":
        """Read a plan that `save` wrote.

        Raises:
            MissingInputError: there is no such file.
            UserError: the file does not hold a plan.
        """
        if not file.is_file():
            raise MissingInputError(f"{file} does not exist; the prune stage writes plan.json into its hf folder.")
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file} is not valid JSON ({error}); write the plan anew.") from error
        return cls.from_json(value, str(file))


def _common_size(kept: Mapping[int, Sequence[int]], parent_size: int) -> int:
    """Return how many each layer keeps; a size that no kept layer uses stays the parent's."""
    return len(next(iter(kept.values()))) if kept else parent_size


def _check_indices(indices: Sequence[int], size: int, path: str, size_name: str) -> None:
    if not indices:
        raise UserError(f"{path} is empty; at least one index must be kept.")
    for previous, index in zip((-1, *indices), indices, strict=False):
        if not 0 <= index < size:
            raise UserError(f"{path} holds {index}, outside 0..{size - 1} of the parent (`{size_name}` {size}).")
        if index <= previous:
            raise UserError(f"{path} holds {index} after {previous}; indices must rise, each once.")


def _check_groups(heads: Sequence[int], config: ModelConfig, path: str) -> None:
    heads_per_group = config.mamba_num_heads // config.n_groups
    counts = [0] * config.n_groups
    for head in heads:
        counts[head // heads_per_group] += 1
    if len(set(counts)) > 1:
        raise UserError(
            f"{path} keeps {counts} heads of the {config.n_groups} groups; every group must keep the same number,"
            " because a group's heads share one B and C."
        )


def _read_indices(value: Any, path: str) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(index) is not int for index in value):
        raise UserError(f"{path} must be a list of whole numbers.")
    return tuple(value)


def _read_per_layer(value: Any, path: str) -> dict[int, tuple[int, ...]]:
    if not isinstance(value, dict) or not all(layer.isdecimal() for layer in value):
        raise UserError(f"{path} must be an object from layer numbers to lists of whole numbers.")
    return {int(layer): _read_indices(value[layer], f"{path}, layer {layer},") for layer in sorted(value, key=int)}
