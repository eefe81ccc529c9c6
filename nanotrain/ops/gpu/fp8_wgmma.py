"""FP8 products by a kernel of our own for Hopper (fp8_wgmma.cu), which NVRTC compiles in half a second at first use."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver, nvrtc  # pyright: ignore[reportMissingImports]
from torch import Tensor

from nanotrain.ops.fp8 import BLOCK

ROWS, COLUMNS, CLUSTER = 256, 128, 2
"""Results of a block, and blocks of a cluster, as in the kernel's source."""
_THREADS, _STAGES = 384, 4
_SHARED_BYTES = -(-_STAGES * ((ROWS + COLUMNS) * BLOCK + 4 * ROWS + 4 * 4 * 36 + 16) // 1024) * 1024


def product(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, dtype: torch.dtype, *, blocks: bool) -> Tensor:
    """Return a @ b.T, each with its scales; partial sums of 128 terms are added in fp32.

    Args:
        a: [M, R] uint8, E4M3 in tiles of 1 x 128; contiguous, as b. R is a multiple of 16.
        a_scales: [R / 128, M] fp32; rows are 16-byte aligned.
        b: [N, R] uint8; N a multiple of 8.
        b_scales: [R / 128, N], powers of two, of tiles; or [N / 128, R / 128] of blocks of 128 x 128.
        dtype: bf16 or fp32, of the result.
        blocks: whether b has blocks.

    Returns:
        [M, N].

    Raises:
        RuntimeError: CUDA or its compiler refuses the kernel.
    """
    (rows, depth), columns, device = a.shape, b.shape[0], a.device
    _require_context(device.index)
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    kernel = _kernel(dtype, blocks, device.index)
    values = (
        _tensor_map(a, ROWS // CLUSTER),
        _tensor_map(b, COLUMNS),
        *(matrix.data_ptr() for matrix in (a_scales, b_scales, out)),
        *(rows, columns, -(-depth // BLOCK), a_scales.stride(0), b_scales.stride(0)),
    )
    types = (None, None, *(ctypes.c_void_p,) * 3, *(ctypes.c_int,) * 5)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    stream = torch.cuda.current_stream(device).cuda_stream
    grid, block = (processors // CLUSTER * CLUSTER, 1, 1), (_THREADS, 1, 1)
    _checked(driver.cuLaunchKernel(kernel, *grid, *block, _SHARED_BYTES, stream, (values, types), 0))
    return out


def _require_context(device: int) -> None:
    """Make the GPU's context current where a thread (autograd's) has none yet: unlike a torch op, a launch does not."""
    if int(_checked(driver.cuCtxGetCurrent())) == 0:
        _checked(driver.cuCtxSetCurrent(_checked(driver.cuDevicePrimaryCtxRetain(device))))


def load(device: int) -> None:
    """Compile and load the kernel for weights' gradients in bf16; the other forms come at their first use.

    Raises:
        RuntimeError: CUDA or its compiler refuses it.
    """
    torch.cuda.init()
    _require_context(device)
    _kernel(torch.bfloat16, False, device)


def _tensor_map(matrix: Tensor, height: int) -> Any:
    """Describe [M, R] bytes, to be brought in boxes of `height` x 128 with the swizzle that the tensor cores read."""
    assert matrix.is_contiguous()
    size = driver.cuuint64_t
    return _checked(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
            2,
            matrix.data_ptr(),
            [size(matrix.shape[1]), size(matrix.shape[0])],
            [size(matrix.shape[1])],
            [driver.cuuint32_t(BLOCK), driver.cuuint32_t(height)],
            [driver.cuuint32_t(1), driver.cuuint32_t(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


@cache
def _kernel(dtype: torch.dtype, blocks: bool, device: int) -> Any:
    """Return the loaded kernel; a module belongs to one GPU's context."""
    module = _checked(driver.cuModuleLoadData(compiled(dtype, blocks=blocks)))
    kernel = _checked(driver.cuModuleGetFunction(module, b"fp8_product"))
    most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver.cuFuncSetAttribute(kernel, most, _SHARED_BYTES))
    return kernel


def compiled(dtype: torch.dtype, *, blocks: bool) -> bytes:
    """Return the kernel's machine code for Hopper; needs no GPU.

    Args:
        dtype: bf16 or fp32, of the result.
        blocks: as in `product`.

    Raises:
        RuntimeError: NVRTC's message.
    """
    options = [
        "--gpu-architecture=sm_90a",
        "--std=c++17",
        f"-DB_BLOCKS={int(blocks)}",
        f"-DSHARED_BYTES={_SHARED_BYTES}",
    ]
    options += ["-DOUT_FLOAT"] if dtype == torch.float32 else []
    source = Path(__file__).with_suffix(".cu").read_bytes()
    program = _checked(nvrtc.nvrtcCreateProgram(source, b"fp8_wgmma.cu", 0, [], []))
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])[0]
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytes(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"fp8_wgmma.cu does not compile: {log.decode()}")
        code = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc.nvrtcGetCUBIN(program, code))
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(answer: tuple[Any, ...]) -> Any:
    status, *values = answer
    if int(status) != 0:
        raise RuntimeError(f"fp8_wgmma.cu: CUDA answers {status!s}")
    return values[0] if values else None
