"""How several ranks share one model and its batches (`engine.data_parallel`, `engine.fsdp2`, `engine.deepspeed`)."""

from dataclasses import dataclass
from enum import Enum

from nanotrain.config.errors import UserError


class DataParallel(str, Enum):
    auto = "auto"
    ddp = "ddp"
    fsdp2 = "fsdp2"


@dataclass
class Fsdp2Config:
    """What FSDP2 keeps between its collectives: memory against communication."""

    reshard_after_forward: bool = True
    """Free a layer's gathered weights after its forward pass and gather them again for the backward pass (as ZeRO-3
    does); false keeps them until then (as ZeRO-2 does). Embeddings and output head are always kept."""
    reduce_every_micro_batch: bool = False
    """Reduce gradients in every backward pass, so that a rank only keeps its shard of them; false reduces once a step and
    keeps all gradients in fp32 while micro-batches accumulate."""


@dataclass
class DeepSpeedConfig:
    """ZeRO: what of the training state is divided over the ranks."""

    zero_stage: int = 1
    """1 = optimizer states, 2 = gradients too, 3 = weights too."""
    offload_optimizer: bool = False
    """Optimizer states and their update on the CPU, for models whose states do not fit on the GPUs."""

    def validate(self, path: str) -> None:
        """Raise UserError for a stage that there is not."""
        if self.zero_stage not in (1, 2, 3):
            raise UserError(f"`{path}.zero_stage` ({self.zero_stage}) must be 1, 2 or 3.")


def check_parallel_keys(
    path: str, kind: str, data_parallel: DataParallel, fsdp2: Fsdp2Config, deepspeed: DeepSpeedConfig
) -> None:
    """Raise UserError for a value that the chosen engine would ignore.

    Args:
        path: of the engine section.
        kind: `engine.kind`.
        data_parallel: `engine.data_parallel`.
        fsdp2: its section.
        deepspeed: its section.
    """
    deepspeed.validate(f"{path}.deepspeed")
    if data_parallel is not DataParallel.auto and kind != "torch":
        raise UserError(
            f"`{path}.data_parallel` ({data_parallel.value}) belongs to `{path}.kind` (torch) and would be ignored by"
            f" {kind}; remove it or set it to auto."
        )
    if fsdp2 != Fsdp2Config() and data_parallel is not DataParallel.fsdp2:
        raise UserError(
            f"`{path}.fsdp2` would be ignored by `{path}.data_parallel` ({data_parallel.value}); remove it, or set"
            " data_parallel to fsdp2."
        )
    if deepspeed != DeepSpeedConfig() and kind != "deepspeed":
        raise UserError(
            f"`{path}.deepspeed` belongs to `{path}.kind` (deepspeed) and would be ignored by {kind}; remove it, or"
            " choose engine=deepspeed_zero1, 2 or 3."
        )
