"""Tests of what only a GPU can run. Without one they are skipped, by name."""

import pytest
import torch

from nanotrain.config.errors import UserError
from nanotrain.ops import backends
from nanotrain.ops.backends import choose_kernels

DEVICE = torch.device("cuda", 0)


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def own_choice(monkeypatch):
    monkeypatch.setattr(backends, "_chosen", {})


@pytest.fixture
def use():
    """Choose one kernel by name, or skip with the sentence that says what is missing."""

    def choose(op: str, name: str) -> None:
        try:
            choose_kernels({op: name}, DEVICE)
        except UserError as error:
            pytest.skip(str(error))

    return choose
