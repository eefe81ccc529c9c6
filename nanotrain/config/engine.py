"""Which engine runs the model, on what device, in what precision."""

from dataclasses import dataclass
from enum import Enum

from nanotrain.config.errors import UserError


class EngineKind(str, Enum):
    torch = "torch"


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(str, Enum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


@dataclass
class EngineConfig:
    """The group `engine` (configs/engine/): file name = value."""

    kind: EngineKind = EngineKind.torch
    device: Device = Device.auto
    """auto = cuda when there is one, else cpu."""
    precision: Precision = Precision.auto
    """Matrix products in fp32 or bf16 (autocast; parameters and optimizer states stay fp32).
    auto = bf16 where the device has bf16 matrix instructions, else fp32."""
    threads: int = 0
    """CPU threads of torch; 0 = torch's own choice."""

    def validate(self, path: str) -> None:
        if self.threads < 0:
            raise UserError(f"`{path}.threads` ({self.threads}) must not be negative; 0 leaves the choice to torch.")


class TrackerKind(str, Enum):
    none = "none"
    wandb = "wandb"
    trackio = "trackio"


class TrackerMode(str, Enum):
    offline = "offline"
    online = "online"


@dataclass
class TrackingConfig:
    """The group `tracking` (configs/tracking/). metrics.jsonl is always written; a tracker comes on top."""

    kind: TrackerKind = TrackerKind.none
    project: str = "nanotrain"
    mode: TrackerMode = TrackerMode.offline
    """wandb only: offline needs no account and no network."""

    def validate(self, path: str) -> None:
        if self.mode is TrackerMode.online and self.kind is not TrackerKind.wandb:
            raise UserError(f"`{path}.mode` (online) is for kind=wandb; kind={self.kind.value} would ignore it.")
