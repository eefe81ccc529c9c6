"""A tiny hybrid and random packed batches, for whatever trains; the published architectures."""

from collections.abc import Callable

import pytest
import torch

from nanotrain.config.model import ModelConfig
from nanotrain.model.batch import IGNORE_INDEX, MicroBatch
from nanotrain.model.hybrid import HybridModel
from tests.published import published_model

TINY = ModelConfig(
    hybrid_layer_pattern="M-*-",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    mamba_num_heads=4,
    mamba_head_dim=8,
    ssm_state_size=8,
    n_groups=2,
    chunk_size=8,
    initializer_range=0.1,
)


@pytest.fixture
def tiny_training_model() -> HybridModel:
    model = HybridModel(TINY)
    model.init_weights(0)
    return model


def random_batch(rows: int, seed: int, length: int = 12, vocab: int = 61) -> MicroBatch:
    """Packed rows with two documents each and some ignored labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (rows, length + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[torch.rand(rows, length, generator=generator) < 0.3] = IGNORE_INDEX
    border = torch.randint(1, length, (rows, 1), generator=generator)
    segments = (torch.arange(length) >= border).to(torch.int32)
    return MicroBatch(ids[:, :-1].clone(), labels, segments)


class RandomLoader:
    """`num_micro` micro-batches a step, a function of the step alone."""

    def __init__(self, rows: int = 2, num_micro: int = 2) -> None:
        self.rows, self.num_micro = rows, num_micro

    def microbatches(self, step: int) -> list[MicroBatch]:
        return [random_batch(self.rows, 1000 * step + m) for m in range(self.num_micro)]


@pytest.fixture
def make_batch():
    return random_batch


@pytest.fixture
def random_loader() -> RandomLoader:
    return RandomLoader()


@pytest.fixture(scope="session")
def published() -> Callable[[str], ModelConfig]:
    """Return what reads an architecture by its size."""
    return published_model
