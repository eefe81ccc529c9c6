"""FP8 quantisers and GEMMs of Transformer Engine, without its modules: the weights stay plain parameters."""

from collections.abc import Callable

import torch
import transformer_engine.pytorch  # noqa: F401 # pyright: ignore[reportMissingImports] (it loads the next one's library)
import transformer_engine_torch as tex  # pyright: ignore[reportMissingImports]
from torch import Tensor
from transformer_engine.pytorch.cpp_extensions import general_gemm  # pyright: ignore[reportMissingImports]
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import (  # pyright: ignore[reportMissingImports]
    Float8BlockQuantizer,
)
from transformer_engine.pytorch.tensor.float8_tensor import (  # pyright: ignore[reportMissingImports]
    Float8CurrentScalingQuantizer,
)
from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import (  # pyright: ignore[reportMissingImports]
    Float8BlockwiseQTensorStorage,
)
from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import (  # pyright: ignore[reportMissingImports]
    Float8TensorStorage,
)

from nanotrain.ops.fp8 import BLOCK, Quantized
from nanotrain.ops.gpu.fp8_tiles_triton import PLAIN, quantise_tiles, squared_relu_quantised

_E4M3, _E5M2 = tex.DType.kFloat8E4M3, tex.DType.kFloat8E5M2


class BlockwiseProducts:
    """E4M3 everywhere, 128 x 128 blocks for weights, 1 x 128 tiles for the rest (recipe Float8BlockScaling)."""

    row_multiple = BLOCK

    def __init__(self) -> None:
        self.squared_relu_quantised: Callable[[Tensor, Tensor | None], Quantized] | None = squared_relu_quantised
        self._quantizers = {
            (dimensions, columns): _internal(
                Float8BlockQuantizer(_E4M3, rowwise=True, columnwise=columns, block_scaling_dim=dimensions)
            )
            for dimensions in (1, 2)
            for columns in (False, True)
        }

    def quantize_activation(self, x: Tensor, *, columns: bool) -> Quantized:
        return self._tiles(x) if columns else self._quantize(x, 1, False)

    def quantize_gradient(self, grad: Tensor) -> Quantized:
        return self._tiles(grad)

    def quantize_weight(self, weight: Tensor) -> Quantized:
        return self._quantize(weight, 2, True)

    def output(self, x: Quantized, weight: Quantized, dtype: torch.dtype) -> Tensor:
        return general_gemm(self._wrap(weight, 2), self._wrap(x, 1), out_dtype=dtype, use_split_accumulator=True)[0]

    def input_gradient(self, grad: Quantized, weight: Quantized, dtype: torch.dtype) -> Tensor:
        return _gemm(self._wrap(weight, 2), self._wrap(grad, 1), "NN", dtype)

    def weight_gradient(self, grad: Quantized, x: Quantized, dtype: torch.dtype) -> Tensor:
        return _gemm(self._wrap(x, 1), self._wrap(grad, 1), "NT", dtype)

    def _tiles(self, matrix: Tensor) -> Quantized:
        """Quantise in both directions, by our kernel where there are no parts of a block; the bits are the same."""
        whole = matrix.is_contiguous() and all(size % BLOCK == 0 for size in matrix.shape)
        return quantise_tiles(matrix, kind=PLAIN) if whole else self._quantize(matrix, 1, True)

    def _quantize(self, matrix: Tensor, dimensions: int, columns: bool) -> Quantized:
        q = tex.quantize(matrix, self._quantizers[dimensions, columns])
        return Quantized(q._rowwise_data, q._rowwise_scale_inv, q._columnwise_data, q._columnwise_scale_inv)

    def _wrap(self, matrix: Quantized, dimensions: int) -> Float8BlockwiseQTensorStorage:
        return Float8BlockwiseQTensorStorage(
            rowwise_data=matrix.rows,
            rowwise_scale_inv=matrix.row_scales,
            columnwise_data=matrix.columns,
            columnwise_scale_inv=matrix.column_scales,
            fp8_dtype=_E4M3,
            quantizer=self._quantizers[dimensions, True],
            is_2D_scaled=dimensions == 2,
        )


class CurrentScalingProducts:
    """One scale per tensor, from its own largest magnitude; E4M3, gradients E5M2 (recipe Float8CurrentScaling)."""

    row_multiple = 16
    squared_relu_quantised: Callable[[Tensor, Tensor | None], Quantized] | None = None

    def __init__(self) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        self._quantizers = {
            (kind, columns): _internal(Float8CurrentScalingQuantizer(kind, device, rowwise=True, columnwise=columns))
            for kind in (_E4M3, _E5M2)
            for columns in (False, True)
        }

    def quantize_activation(self, x: Tensor, *, columns: bool) -> Quantized:
        return self._quantize(x, _E4M3, columns)

    def quantize_gradient(self, grad: Tensor) -> Quantized:
        return self._quantize(grad, _E5M2, True)

    def quantize_weight(self, weight: Tensor) -> Quantized:
        return self._quantize(weight, _E4M3, True)

    def output(self, x: Quantized, weight: Quantized, dtype: torch.dtype) -> Tensor:
        return general_gemm(_wrap_whole(weight, _E4M3), _wrap_whole(x, _E4M3), out_dtype=dtype)[0]

    def input_gradient(self, grad: Quantized, weight: Quantized, dtype: torch.dtype) -> Tensor:
        return _gemm(_wrap_whole(weight, _E4M3), _wrap_whole(grad, _E5M2), "NN", dtype)

    def weight_gradient(self, grad: Quantized, x: Quantized, dtype: torch.dtype) -> Tensor:
        return _gemm(_wrap_whole(x, _E4M3), _wrap_whole(grad, _E5M2), "NT", dtype)

    def _quantize(self, matrix: Tensor, kind: object, columns: bool) -> Quantized:
        q = tex.quantize(matrix, self._quantizers[kind, columns])
        return Quantized(q._data, q._scale_inv, q._transpose, q._scale_inv)


def _wrap_whole(matrix: Quantized, kind: object) -> Float8TensorStorage:
    scale = matrix.row_scales if matrix.row_scales is not None else matrix.column_scales
    return Float8TensorStorage(
        data=matrix.rows, data_transpose=matrix.columns, fp8_scale_inv=scale, fp8_dtype=kind, fake_dtype=torch.bfloat16
    )


def _gemm(a: object, b: object, layout: str, dtype: torch.dtype) -> Tensor:
    return general_gemm(a, b, layout=layout, grad=True, out_dtype=dtype, use_split_accumulator=True)[0]


def _internal(quantizer: Float8BlockQuantizer | Float8CurrentScalingQuantizer):
    """Let a quantiser return its bare buffers instead of a tensor subclass."""
    quantizer.internal = True
    return quantizer
