"""Choice of device, precision and threads for plain torch, logged once a process."""

import torch

from nanotrain.config.engine import FP8_PRECISIONS, Device, EngineConfig, Precision
from nanotrain.config.errors import UserError
from nanotrain.runtime.logging import log_once

_default_threads = torch.get_num_threads()


def choose_device(device: Device) -> torch.device:
    """Return the torch device; `auto` = cuda when there is one.

    Raises:
        UserError: cuda is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if device is Device.cuda and not available:
        raise UserError(
            "`engine.device` (cuda) needs a GPU that this PyTorch can use, and there is none; use auto or cpu."
        )
    if device is Device.cpu or not available:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def choose_autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """Return the dtype of autocast, None for fp32; `auto` = bf16 where the device multiplies bf16 matrices natively.

    FP8 concerns linear layers only (engines/precision.py); all else runs as under bf16.

    Raises:
        UserError: bf16 is asked for on a GPU without it.
    """
    if precision is Precision.fp32:
        return None
    if precision in FP8_PRECISIONS:
        return torch.bfloat16
    native = has_bf16_matrix_instructions(device)
    if precision is Precision.bf16 and device.type == "cuda" and not native:
        raise UserError(
            f"`engine.precision` (bf16) is not supported by {torch.cuda.get_device_name(device)}; use auto or fp32."
        )
    return torch.bfloat16 if native or precision is Precision.bf16 else None


def has_bf16_matrix_instructions(device: torch.device) -> bool:
    """Return whether bf16 products run in hardware: compute capability 8 or AVX512_BF16, AMX, or Arm's bf16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(name in capabilities and capabilities[name] for name in ("avx512_bf16", "amx_bf16", "bf16"))


def set_threads(threads: int) -> None:
    """Set the CPU threads of torch; 0 = what torch chose when the process began."""
    torch.set_num_threads(threads or _default_threads)


def prepare_device(config: EngineConfig) -> tuple[torch.device, torch.dtype | None]:
    """Apply `threads`, choose device and autocast dtype, and log the choice.

    Raises:
        UserError: what is asked for explicitly is not there.
    """
    set_threads(config.threads)
    device = choose_device(config.device)
    dtype = choose_autocast_dtype(config.precision, device)
    products = "fp32" if dtype is None else "bf16 (autocast)"
    if config.precision in FP8_PRECISIONS:
        products = config.precision.value
    log_once(
        f"engine {config.kind.value}: {device}, products in {products}, parameters in fp32, {torch.get_num_threads()} threads"
    )
    return device, dtype
