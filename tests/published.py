"""The published architectures, for tests and benchmarks."""

from pathlib import Path

from omegaconf import OmegaConf

from nanotrain.config.model import ModelConfig

MODELS = Path(__file__).parents[1] / "configs" / "model"


def published_model(size: str) -> ModelConfig:
    """Read configs/model/nemotron_nano_<size>_v2.yaml through the strict schema."""
    file = MODELS / f"nemotron_nano_{size}_v2.yaml"
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(file)))
    assert isinstance(config, ModelConfig)
    return config
