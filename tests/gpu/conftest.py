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


def pytest_runtest_logreport(report):
    """Say at once what failed: a run on a borrowed GPU may be cut off before pytest's summary."""
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        print(f"\nFAILED {report.nodeid}: {crash.message if crash else report.longrepr}", flush=True)


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
