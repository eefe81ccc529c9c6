"""The choice of kernels, on a machine that may have none of them."""

import pytest
import torch

from nanotrain.config.engine import EngineConfig, KernelsConfig, SsdKernel
from nanotrain.config.errors import UserError
from nanotrain.ops import backends
from nanotrain.ops.backends import KERNELS, Kernel, choose_kernels, kernel_for

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.setattr(backends, "_chosen", {})


def test_every_switch_of_the_config_has_its_kernels():
    choices = KernelsConfig().choices()
    assert choices.keys() == KERNELS.keys()
    for op, kernels in KERNELS.items():
        options = {member.value for member in type(KernelsConfig().__dict__[op])}
        assert options == {"auto", "torch", *kernels}


def test_the_cpu_runs_plain_torch():
    assert set(choose_kernels(EngineConfig().kernels.choices(), CPU).values()) == {"torch"}
    with pytest.raises(UserError, match=r"engine\.kernels\.ssd` \(mamba_ssm\) needs a GPU"):
        choose_kernels(KernelsConfig(ssd=SsdKernel.mamba_ssm).choices(), CPU)


def test_a_missing_kernel_is_named_with_its_install_line(monkeypatch):
    monkeypatch.setitem(KERNELS, "ssd", {"mamba_ssm": Kernel("no_such_package", "pip install it", lambda: len)})
    with pytest.raises(UserError, match=r"\(mamba_ssm\) needs the package no-such-package.*`pip install it`"):
        choose_kernels({"ssd": "mamba_ssm"}, GPU)
    assert choose_kernels({"ssd": "auto"}, GPU) == {"ssd": "torch"}


def test_a_kernel_that_does_not_load_is_named_with_the_reason(monkeypatch):
    def load():
        raise ImportError("undefined symbol: thing\nmore")

    monkeypatch.setitem(KERNELS, "ssd", {"mamba_ssm": Kernel("torch", "pip install it", load)})
    with pytest.raises(UserError, match=r"cannot be loaded \(ImportError: undefined symbol: thing\)"):
        choose_kernels({"ssd": "mamba_ssm"}, GPU)
    assert choose_kernels({"ssd": "auto"}, GPU) == {"ssd": "torch"}


def test_auto_takes_the_first_that_is_there_and_torch_unsets(monkeypatch):
    table = {"a": Kernel("no_such_package", "", lambda: len), "b": Kernel("torch", "", lambda: sorted)}
    monkeypatch.setitem(KERNELS, "ssd", table)
    assert choose_kernels({"ssd": "auto"}, GPU) == {"ssd": "b"}
    assert backends._chosen["ssd"] is sorted
    assert kernel_for("ssd", torch.zeros(1)) is None  # a tensor on the CPU
    assert choose_kernels({"ssd": "torch"}, GPU) == {"ssd": "torch"}
    assert "ssd" not in backends._chosen
