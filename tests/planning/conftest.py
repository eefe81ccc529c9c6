from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nanotrain.config.model import ModelConfig

MODELS = Path(__file__).parents[2] / "configs" / "model"


@pytest.fixture(scope="session")
def published() -> Callable[[str], ModelConfig]:
    """Read configs/model/nemotron_nano_<size>_v2.yaml through the strict schema."""

    def read(size: str) -> ModelConfig:
        file = MODELS / f"nemotron_nano_{size}_v2.yaml"
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(file)))
        assert isinstance(config, ModelConfig)
        return config

    return read
