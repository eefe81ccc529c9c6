"""A recipe: one stage, or a pipeline of named stage recipes; both share name, seed, output_dir."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from nanotrain.config.cluster import ClusterConfig
from nanotrain.config.engine import EngineConfig, TrackingConfig
from nanotrain.config.stage import StageConfig


@dataclass
class RecipeConfig:
    """A stage recipe."""

    name: str = MISSING
    """Of the run; also the default folder below runs/."""
    seed: int = 1
    output_dir: str = "runs/${name}"
    """The run's folder; a stage's product is <output_dir>/<entry>/hf/."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """For launch/slurm.sh only."""
    stage: StageConfig = MISSING


@dataclass
class EntryConfig:
    """One line of a pipeline."""

    name: str = MISSING
    """Unique; the folder below the run, and the prefix of overrides."""
    recipe: str = MISSING
    """Path of the stage recipe, relative to the pipeline's own file."""
    overrides: list[str] = field(default_factory=list)
    """Hydra overrides of that recipe, for example `stage.training.steps=50`."""


@dataclass
class PipelineConfig:
    """A pipeline recipe."""

    name: str = MISSING
    seed: int = 1
    output_dir: str = "runs/${name}"
    pipeline: list[EntryConfig] = field(default_factory=list)
