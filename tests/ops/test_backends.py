"""The choice of kernels, on a machine that may have none of them."""

from types import SimpleNamespace

import pytest
import torch

from nanotrain.config.engine import CoreKernel, EngineConfig, Fp8Gemm, KernelsConfig, Precision, SsdKernel
from nanotrain.config.errors import UserError
from nanotrain.ops import backends
from nanotrain.ops.backends import KERNELS, Kernel, choose_kernels, kernel_for, load_fp8_products

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


def test_a_core_out_of_fused_kernels_gives_way_to_a_switch_of_its_parts():
    assert KernelsConfig().choices()["mamba_core"] == "auto"
    assert KernelsConfig(ssd=SsdKernel.mamba_ssm).choices()["mamba_core"] == "auto"
    assert KernelsConfig(ssd=SsdKernel.torch).choices()["mamba_core"] == "torch"
    assert KernelsConfig(ssd=SsdKernel.torch, mamba_core=CoreKernel.fused).choices()["mamba_core"] == "fused"


def test_a_library_for_fp8_products_is_refused_where_nothing_is_multiplied_in_blocks():
    kernels = KernelsConfig(fp8_gemm=Fp8Gemm.deep_gemm)
    EngineConfig(precision=Precision.fp8_blockwise, kernels=kernels).validate("engine")
    for precision in (Precision.bf16, Precision.fp8_current):
        with pytest.raises(UserError, match=r"`engine\.kernels\.fp8_gemm` \(deep_gemm\) .* would be ignored"):
            EngineConfig(precision=precision, kernels=kernels).validate("engine")


def test_a_missing_library_for_fp8_products_is_named_with_its_install_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "find_spec", lambda module: None if module == "deep_gemm" else module)
    with pytest.raises(UserError, match=r"needs DeepGEMM, which is not installed; run `pip install sgl-deep-gemm"):
        load_fp8_products(Precision.fp8_blockwise, GPU, Fp8Gemm.deep_gemm)


def test_our_kernel_for_hopper_is_refused_elsewhere_and_chosen_there(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a B200")
    monkeypatch.setattr(backends, "find_spec", lambda module: module)
    monkeypatch.setattr(backends, "_products", lambda precision, gemm: chosen.append(gemm))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    with pytest.raises(
        UserError, match=r"`engine\.kernels\.fp8_gemm` \(wgmma\) needs .* 9\.0 \(Hopper\), which a B200 is not; use te"
    ):
        load_fp8_products(Precision.fp8_blockwise, GPU, Fp8Gemm.wgmma)
    load_fp8_products(Precision.fp8_blockwise, GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    load_fp8_products(Precision.fp8_blockwise, GPU)
    load_fp8_products(Precision.fp8_current, GPU)
    monkeypatch.setattr(backends, "find_spec", lambda module: None if module == "deep_gemm" else module)
    load_fp8_products(Precision.fp8_blockwise, GPU)
    assert chosen == [Fp8Gemm.te, Fp8Gemm.deep_gemm, Fp8Gemm.te, Fp8Gemm.wgmma]


def test_without_cudas_compilers_transformer_engine_multiplies(monkeypatch):
    def products(precision, gemm):
        if gemm is not Fp8Gemm.te:
            raise RuntimeError("no such library: libnvrtc")
        return gemm

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "find_spec", lambda module: module)
    monkeypatch.setattr(backends, "_products", products)
    assert load_fp8_products(Precision.fp8_blockwise, GPU) is Fp8Gemm.te
    with pytest.raises(UserError, match=r"CUDA's runtime compiler cannot be loaded \(RuntimeError: no such library"):
        load_fp8_products(Precision.fp8_blockwise, GPU, Fp8Gemm.wgmma)
    monkeypatch.setattr(backends, "find_spec", lambda module: None if module.startswith("cuda") else module)
    assert load_fp8_products(Precision.fp8_blockwise, GPU) is Fp8Gemm.te
    with pytest.raises(
        UserError, match=r"needs CUDA's runtime compiler, which is not installed; run `pip install cuda-bindings"
    ):
        load_fp8_products(Precision.fp8_blockwise, GPU, Fp8Gemm.wgmma)


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


@pytest.mark.parametrize(("kib", "chosen"), [(227, "fused"), (99, "torch")])
def test_a_kernel_that_the_gpu_has_too_little_shared_memory_for_is_passed_over(monkeypatch, kib, chosen):
    table = {"fused": Kernel("torch", "pip install it", lambda: len, shared_bytes=160 * 1024)}
    monkeypatch.setitem(KERNELS, "mamba_core", table)
    properties = SimpleNamespace(shared_memory_per_block_optin=kib * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert choose_kernels({"mamba_core": "auto"}, GPU) == {"mamba_core": chosen}
    if chosen == "torch":
        with pytest.raises(UserError, match="needs 160 KiB of shared memory in a block, and the GPU has 99; use a GPU"):
            choose_kernels({"mamba_core": "fused"}, GPU)
