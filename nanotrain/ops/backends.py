"""Which kernel runs each op on a GPU: the one place that imports CUDA libraries, and only when they are chosen.

The engine chooses once, when it is built (`choose_kernels`); the ops ask `kernel_for` with their tensors. Plain torch
runs on the CPU, in fp64, and wherever nothing was chosen.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from nanotrain.config.engine import Fp8Gemm, Precision
from nanotrain.config.errors import UserError
from nanotrain.ops.linear import QuantizedProducts
from nanotrain.runtime.logging import log_once

AUTO, TORCH = "auto", "torch"

MAMBA_INSTALL = 'pip install "mamba-ssm[causal-conv1d]" --no-build-isolation'


@dataclass(frozen=True)
class Kernel:
    """A kernel from a library."""

    module: str
    """What must be importable."""
    install: str
    """The command that installs it."""
    load: Callable[[], Callable[..., Any]]
    shared_bytes: int = 0
    """Of a block, that its programs need at most."""


def _fused_mamba_core() -> Callable[..., Any]:
    from nanotrain.ops.gpu.mamba_core_kernels import mamba_core

    return mamba_core


def _triton_gated_norm() -> Callable[..., Any]:
    from nanotrain.ops.gpu.gated_norm_triton import grouped_gated_rms_norm

    return grouped_gated_rms_norm


def _mamba_ssm_ssd() -> Callable[..., Any]:
    from nanotrain.ops.gpu.mamba_ssm_kernels import ssd_scan

    return ssd_scan


def _mamba_ssm_gated_norm() -> Callable[..., Any]:
    from nanotrain.ops.gpu.mamba_ssm_kernels import grouped_gated_rms_norm

    return grouped_gated_rms_norm


def _causal_conv1d() -> Callable[..., Any]:
    from nanotrain.ops.gpu.causal_conv1d_kernel import causal_conv1d

    return causal_conv1d


def _cudnn_attention() -> Callable[..., Any]:
    from nanotrain.ops.gpu.fused_attention import cudnn_attention

    return cudnn_attention


def _flash_attention() -> Callable[..., Any]:
    from nanotrain.ops.gpu.fused_attention import flash_attention

    return flash_attention


def _triton_rms_norm() -> Callable[..., Any]:
    from nanotrain.ops.gpu.rms_norm_triton import rms_norm

    return rms_norm


def _triton_squared_relu() -> Callable[..., Any]:
    from nanotrain.ops.gpu.squared_relu_triton import squared_relu

    return squared_relu


def _triton_cross_entropy() -> Callable[..., Any]:
    from nanotrain.ops.gpu.softmax_losses_triton import cross_entropy_chunk

    return cross_entropy_chunk


def _triton_kl_divergence() -> Callable[..., Any]:
    from nanotrain.ops.gpu.softmax_losses_triton import kl_divergence_chunk

    return kl_divergence_chunk


def _triton_gradient_scaling() -> Callable[..., Any]:
    from nanotrain.ops.gpu.gradient_scaling_triton import scale_in_place

    return scale_in_place


def _triton_adamw() -> Callable[..., Any]:
    from nanotrain.ops.gpu.adamw_triton import adamw_update

    return adamw_update


def _products(precision: Precision, gemm: Fp8Gemm) -> QuantizedProducts:
    if gemm is Fp8Gemm.deep_gemm:
        from nanotrain.ops.gpu.deep_gemm_products import DeepGemmProducts

        return DeepGemmProducts()
    if gemm is Fp8Gemm.wgmma:
        from nanotrain.ops.gpu.wgmma_products import WgmmaProducts

        return WgmmaProducts()
    from nanotrain.ops.gpu.transformer_engine_products import BlockwiseProducts, CurrentScalingProducts

    return BlockwiseProducts() if precision is Precision.fp8_blockwise else CurrentScalingProducts()


HOPPER = (9, 0)
FP8_CAPABILITY = {Precision.fp8_blockwise: HOPPER, Precision.fp8_current: (8, 9)}
TE_INSTALL = 'pip install "transformer-engine[pytorch]" --no-build-isolation'
_TE = ("Transformer Engine", "transformer_engine", TE_INSTALL)
_NVRTC = ("CUDA's runtime compiler", "cuda.bindings", "pip install cuda-bindings nvidia-cuda-nvrtc")
_DEEP_GEMM = ("DeepGEMM", "deep_gemm", "pip install sgl-deep-gemm==0.1.5")
_FP8_LIBRARIES = {
    Fp8Gemm.te: (_TE,),
    Fp8Gemm.wgmma: (_TE, _NVRTC),
    Fp8Gemm.deep_gemm: (_TE, _NVRTC, _DEEP_GEMM),
}
"""Name, module and install line of what each choice needs."""


def load_fp8_products(precision: Precision, device: torch.device, gemm: Fp8Gemm = Fp8Gemm.auto) -> QuantizedProducts:
    """Return the FP8 quantisers and products for `precision`, with the products of the library `gemm`.

    Raises:
        UserError: the device has no such instructions, or a library is missing.
    """
    key = f"`engine.precision` ({precision.value})"
    if device.type != "cuda":
        raise UserError(f"{key} needs a GPU with FP8 and the engine runs on {device.type}; use auto, bf16 or fp32.")
    capability, needed = torch.cuda.get_device_capability(device), FP8_CAPABILITY[precision]
    if capability < needed:
        raise UserError(
            f"{key} needs a GPU of compute capability {needed[0]}.{needed[1]} or later, which"
            f" {torch.cuda.get_device_name(device)} is not; use bf16."
        )
    if gemm is Fp8Gemm.auto:
        on_hopper = precision is Precision.fp8_blockwise and capability == HOPPER
        for fast in (Fp8Gemm.deep_gemm, Fp8Gemm.wgmma) if on_hopper else ():
            if all(_installed(module) for _, module, _ in _FP8_LIBRARIES[fast]):
                try:
                    return _loaded_products(key, precision, fast)
                except UserError as error:
                    log_once(f"kernels: fp8_gemm {fast.value} is left out: {error}")
        gemm = Fp8Gemm.te
    if gemm in (Fp8Gemm.wgmma, Fp8Gemm.deep_gemm) and capability != HOPPER:
        raise UserError(
            f"`engine.kernels.fp8_gemm` ({gemm.value}) needs a GPU of compute capability 9.0 (Hopper), which"
            f" {torch.cuda.get_device_name(device)} is not; use te."
        )
    return _loaded_products(key, precision, gemm)


def _loaded_products(key: str, precision: Precision, gemm: Fp8Gemm) -> QuantizedProducts:
    libraries = _FP8_LIBRARIES[gemm]
    for name, module, install in libraries:
        if not _installed(module):
            raise UserError(f"{key} needs {name}, which is not installed; run `{install}`, or use bf16.")
    try:
        products = _products(precision, gemm)
    except (
        AssertionError,
        ImportError,
        OSError,
        RuntimeError,
    ) as error:  # DeepGEMM asserts that it finds CUDA's compiler
        names, installs = (" and ".join(part) for part in list(zip(*libraries, strict=True))[::2])
        reason = f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"
        raise UserError(f"{key}: {names} cannot be loaded ({reason}); run `{installs}`.") from error
    log_once(f"kernels: fp8_gemm {gemm.value}")
    return products


def _installed(module: str) -> bool:
    """Return whether a module, or one of a package's, can be found; nothing of it is imported."""
    return find_spec(module.partition(".")[0]) is not None and find_spec(module) is not None


KERNELS: dict[str, dict[str, Kernel]] = {
    "mamba_core": {
        "fused": Kernel("mamba_ssm", MAMBA_INSTALL, _fused_mamba_core, shared_bytes=162 * 1024),  # in fp32
    },
    "ssd": {
        "mamba_ssm": Kernel("mamba_ssm", MAMBA_INSTALL, _mamba_ssm_ssd),
    },
    "causal_conv1d": {
        "causal_conv1d": Kernel("causal_conv1d", "pip install causal-conv1d --no-build-isolation", _causal_conv1d)
    },
    "gated_rms_norm": {
        "triton": Kernel("triton", "pip install triton", _triton_gated_norm),
        "mamba_ssm": Kernel("mamba_ssm", MAMBA_INSTALL, _mamba_ssm_gated_norm),
    },
    "rms_norm": {"triton": Kernel("triton", "pip install triton", _triton_rms_norm)},
    "attention": {
        "cudnn": Kernel("torch", "pip install torch", _cudnn_attention),
        "flash": Kernel("torch", "pip install torch", _flash_attention),
    },
    "squared_relu": {"triton": Kernel("triton", "pip install triton", _triton_squared_relu)},
    "cross_entropy": {"triton": Kernel("triton", "pip install triton", _triton_cross_entropy)},
    "kl_divergence": {"triton": Kernel("triton", "pip install triton", _triton_kl_divergence)},
    "gradient_scaling": {"triton": Kernel("triton", "pip install triton", _triton_gradient_scaling)},
    "adamw": {"triton": Kernel("triton", "pip install triton", _triton_adamw)},
}
"""Op -> kernels, fastest first; `torch` is always there."""

_chosen: dict[str, Callable[..., Any]] = {}


def kernel_for(op: str, *tensors: Tensor) -> Callable[..., Any] | None:
    """Return the chosen kernel if it takes these tensors (on a GPU, at most fp32); None = use plain torch."""
    kernel = _chosen.get(op)
    if kernel is None or any(not t.is_cuda or t.dtype == torch.float64 for t in tensors):
        return None
    return kernel


def compiling_only() -> AbstractContextManager[None]:
    """Return a context in which Triton kernels are compiled, all cores at once, and not run; nothing without Triton."""
    if find_spec("triton") is None:
        return nullcontext()
    from nanotrain.ops.gpu import compile_ahead

    return compile_ahead.compiling_only()


def use_tuned_mamba_ssm(head_dim: int, state_size: int, chunk_size: int, dtype: torch.dtype) -> None:
    """Let mamba-ssm's kernels, where a library calls them itself, start with the shipped launch parameters of these sizes.

    Without them the first call on a fresh machine times all variants for 60 to 90 seconds. mamba-ssm must be installed.
    """
    from nanotrain.ops.gpu.tuned_configs import restrict_to_tuned

    restrict_to_tuned(head_dim, state_size, chunk_size, dtype)


def choose_kernels(wanted: Mapping[str, str], device: torch.device) -> dict[str, str]:
    """Choose a kernel for every op in this process, and log the choice once.

    Args:
        wanted: op -> auto, torch or a kernel's name (KernelsConfig.choices).
        device: where the model will run. On the CPU everything is plain torch.

    Returns:
        op -> name of the kernel.

    Raises:
        UserError: a kernel that was asked for by name is not installed, does not load or needs a GPU.
    """
    names = {op: _choose(op, name, device) for op, name in wanted.items()}
    if device.type == "cuda":
        log_once("kernels: " + ", ".join(f"{op} {name}" for op, name in names.items()))
    return names


def _choose(op: str, wanted: str, device: torch.device) -> str:
    key = f"`engine.kernels.{op}` ({wanted})"
    if device.type != "cuda":
        if wanted not in (AUTO, TORCH):
            raise UserError(f"{key} needs a GPU and the engine runs on {device.type}; use auto or torch.")
        return TORCH
    _chosen.pop(op, None)
    for name, kernel in KERNELS[op].items():
        if wanted not in (AUTO, name):
            continue
        problem, remedy = _shortage(kernel, device), f"run `{kernel.install}`"
        if problem is not None:
            remedy = "use a GPU with more"
        elif find_spec(kernel.module) is None:
            problem = f"needs the package {kernel.module.replace('_', '-')}, which is not installed"
        else:
            try:
                _chosen[op] = kernel.load()
                return name
            except (ImportError, OSError, RuntimeError) as error:  # built for another torch or CUDA
                problem = f"cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0]})"
        if wanted == name:
            raise UserError(f"{key} {problem}; {remedy}, or use auto or torch.")
        log_once(f"kernels: {op} {name} {problem}; to make the step faster, {remedy}")
    return TORCH


def _shortage(kernel: Kernel, device: torch.device) -> str | None:
    """Say what the GPU lacks for a kernel; None = nothing."""
    if not kernel.shared_bytes:
        return None
    there = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    if there >= kernel.shared_bytes:
        return None
    return f"needs {kernel.shared_bytes >> 10} KiB of shared memory in a block, and the GPU has {there >> 10}"
