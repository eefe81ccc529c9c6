"""What a stage is told about the run that it belongs to."""

from dataclasses import dataclass, field
from pathlib import Path

from nanotrain.config.engine import EngineConfig, TrackingConfig


@dataclass(frozen=True)
class Run:
    """One entry of a run; built by the pipeline."""

    name: str
    """Of the run."""
    entry: str
    """Of this stage within the run."""
    output_dir: Path
    """The run's folder."""
    seed: int
    engine: EngineConfig
    tracking: TrackingConfig
    inputs: dict[str, Path] = field(default_factory=dict)
    """Product folders by key (`init_from`, `teacher_from`, `data_from`, `architecture_from`)."""
    stop_after: int | None = None
    """Training stops after so many steps as if a signal had come; `--resume-check` interrupts itself with it."""

    @property
    def folder(self) -> Path:
        """This entry's folder: <output_dir>/<entry>."""
        return self.output_dir / self.entry
