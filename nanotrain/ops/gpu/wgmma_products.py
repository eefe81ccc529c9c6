"""FP8 products by our kernel for Hopper, on Transformer Engine's quantised weights and our own tiles; the same bits as cuBLASLt's."""

import torch
from torch import Tensor

from nanotrain.ops.fp8 import Quantized
from nanotrain.ops.gpu import fp8_wgmma
from nanotrain.ops.gpu.transformer_engine_products import BlockwiseProducts

_TILES_PER_PROCESSOR = 4
"""A weight's gradient of fewer leaves too many processors idle at its end: cuBLASLt's smaller tiles are faster then."""


class WgmmaProducts(BlockwiseProducts):
    """The same quantisers and formats. Outputs that are not bf16 stay with Transformer Engine."""

    def __init__(self) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        fp8_wgmma.load(device)
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._fewest_gradients = _TILES_PER_PROCESSOR * processors * fp8_wgmma.ROWS * fp8_wgmma.COLUMNS

    def output(self, x: Quantized, weight: Quantized, dtype: torch.dtype) -> Tensor:
        if dtype != torch.bfloat16:
            return super().output(x, weight, dtype)
        return self._by_blocks(x, weight.rows, weight.row_scales)

    def input_gradient(self, grad: Quantized, weight: Quantized, dtype: torch.dtype) -> Tensor:
        if dtype != torch.bfloat16:
            return super().input_gradient(grad, weight, dtype)
        return self._by_blocks(grad, weight.columns, weight.column_scales)

    def weight_gradient(self, grad: Quantized, x: Quantized, dtype: torch.dtype) -> Tensor:
        assert grad.columns is not None and grad.column_scales is not None
        assert x.columns is not None and x.column_scales is not None
        few = grad.columns.shape[0] * x.columns.shape[0] < self._fewest_gradients
        if few or dtype not in (torch.bfloat16, torch.float32):
            return super().weight_gradient(grad, x, dtype)
        return fp8_wgmma.product(grad.columns, grad.column_scales, x.columns, x.column_scales, dtype, blocks=False)

    def _by_blocks(self, tiles: Quantized, blocks: Tensor | None, scales: Tensor | None) -> Tensor:
        """Return the rows of tiles, [M, K], @ blocks [N, K].T in bf16."""
        assert tiles.rows is not None and tiles.row_scales is not None
        assert blocks is not None and scales is not None
        return fp8_wgmma.product(tiles.rows, tiles.row_scales, blocks, scales, torch.bfloat16, blocks=True)
