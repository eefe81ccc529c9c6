"""DeepGEMM's block-scaled FP8 products for outputs and input gradients, on Transformer Engine's quantised matrices.

Weights' gradients stay with our kernel for Hopper (wgmma_products.py), which is faster there.
"""

import deep_gemm  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor

from nanotrain.ops.fp8 import BLOCK, Quantized
from nanotrain.ops.gpu.wgmma_products import WgmmaProducts


class DeepGemmProducts(WgmmaProducts):
    """The same quantisers and formats; both libraries add 128 terms in the tensor cores and the parts in fp32."""

    def _by_blocks(self, tiles: Quantized, blocks: Tensor | None, scales: Tensor | None) -> Tensor:
        assert tiles.rows is not None and tiles.row_scales is not None
        assert blocks is not None and scales is not None
        out = torch.empty(tiles.rows.shape[0], blocks.shape[0], dtype=torch.bfloat16, device=blocks.device)
        # Scales of tiles already lie by columns, as the kernel loads them; those of blocks lose their padding. A single row
        # counts as contiguous whatever its stride, which DeepGEMM reads all the same.
        shape = (blocks.shape[0] // BLOCK, blocks.shape[1] // BLOCK)
        scales = scales[: shape[0], : shape[1]].contiguous().as_strided(shape, (shape[1], 1))
        deep_gemm.fp8_gemm_nt(
            (tiles.rows.view(torch.float8_e4m3fn), tiles.row_scales.t()),
            (blocks.view(torch.float8_e4m3fn), scales),
            out,
            disable_ue8m0_cast=True,
        )
        return out
