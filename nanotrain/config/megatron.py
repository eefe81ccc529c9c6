"""How Megatron-Core spreads a model over ranks (`engine.megatron`)."""

from dataclasses import dataclass, field
from enum import Enum

from nanotrain.config.errors import UserError


class Recompute(str, Enum):
    none = "none"
    selective = "selective"
    full = "full"


@dataclass
class MegatronConfig:
    """Ranks = tensor x pipeline x context x data; the data-parallel size is what is left of the launcher's ranks."""

    tensor_parallel: int = 1
    """Ranks that share every layer's heads, groups and FFN rows, and the vocabulary."""
    sequence_parallel: bool = False
    """Between the layers each tensor-parallel rank holds its part of the sequence; needs tensor_parallel > 1."""
    pipeline_parallel: int = 1
    """Stages of layers, one after the other."""
    pipeline_layers: list[int] = field(default_factory=list)
    """Layers of each stage; empty = as even as they come, the first and last stage taking the fewer. A teacher with another
    number of layers is always split evenly."""
    context_parallel: int = 1
    """Ranks that share a sequence: Mamba by its heads, attention by its positions."""
    distributed_optimizer: bool = True
    """Each data-parallel rank keeps and updates its part of the optimizer states."""
    recompute: Recompute = Recompute.none
    """Activations made again in the backward pass: none, those between queries and attention's output, or whole layers."""
    fp8_parameters: bool = True
    """FP8 only: gather weights over data-parallel ranks in FP8, not in bf16 (distributed optimizer)."""

    def validate(self, path: str) -> None:
        """Raise UserError when a value is out of range or contradicts another."""
        for name in ("tensor_parallel", "pipeline_parallel", "context_parallel"):
            if self.__dict__[name] < 1:
                raise UserError(f"`{path}.{name}` ({self.__dict__[name]}) must be at least 1.")
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise UserError(
                f"`{path}.sequence_parallel` (true) splits between tensor-parallel ranks and there is one; set"
                f" `{path}.tensor_parallel` above 1, or sequence_parallel to false."
            )
        if self.pipeline_layers and len(self.pipeline_layers) != self.pipeline_parallel:
            raise UserError(
                f"`{path}.pipeline_layers` ({self.pipeline_layers}) must name the layers of each of"
                f" `pipeline_parallel` ({self.pipeline_parallel}) stages; leave it empty for an even split."
            )
