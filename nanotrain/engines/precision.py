"""Puts a precision onto a model's linear layers: which of them multiply in FP8, which in bf16."""

import torch

from nanotrain.config.engine import EngineConfig, Precision
from nanotrain.config.errors import UserError
from nanotrain.model.hybrid import HybridModel
from nanotrain.model.linear import Linear
from nanotrain.ops.backends import load_fp8_products
from nanotrain.ops.linear import QuantizedProducts, RoundedProducts, WeightCopy

_MULTIPLE = {Precision.fp8_blockwise: 128, Precision.fp8_current: 16}
FP8 = tuple(_MULTIPLE)


def apply_precision(
    model: HybridModel,
    config: EngineConfig,
    device: torch.device,
    autocast_dtype: torch.dtype | None,
    *,
    gathered: bool = False,
) -> list[WeightCopy]:
    """Give the linear layers of the mixers their weight copies. Names, values and dtypes of parameters stay.

    Args:
        model: the model; its embedding and output matrix are left alone.
        config: precision, and which layers stay in bf16 under FP8.
        device: where it runs.
        autocast_dtype: of everything else; None = fp32.
        gathered: whether a weight is whole only while its layer runs, and then in `autocast_dtype` (FSDP2): it needs no
            bf16 copy, and an FP8 copy is made for each use.

    Returns:
        The copies, to be dropped when weights were changed behind PyTorch's back, or to free their memory.

    Raises:
        UserError: the device, the installed packages or the layers' sizes do not allow the precision.
    """
    layers = model.backbone.layers
    for module in layers.modules():
        if isinstance(module, Linear):
            module.weight_copy = None
    in_fp8 = range(0)
    fp8: QuantizedProducts | None = None
    if config.precision in FP8:
        in_fp8 = range(config.fp8_bf16_first_layers, len(layers) - config.fp8_bf16_last_layers)
        _require_layers(config, len(layers), in_fp8)
        _require_sizes(model, config.precision, in_fp8)
        fp8 = load_fp8_products(config.precision, device, config.kernels.fp8_gemm)
    # On the CPU autocast itself casts, as it always did.
    rounds = device.type == "cuda" and autocast_dtype is torch.bfloat16 and not gathered
    rounded = RoundedProducts() if rounds else None
    copies = []
    for index, layer in enumerate(layers):
        products = fp8 if index in in_fp8 else rounded
        if products is None:
            continue
        for module in layer.modules():
            if isinstance(module, Linear):
                module.weight_copy = WeightCopy(products, keep=not gathered)
                copies.append(module.weight_copy)
    return copies


def _require_layers(config: EngineConfig, num_layers: int, in_fp8: range) -> None:
    if len(in_fp8) == 0:
        raise UserError(
            f"`engine.precision` ({config.precision.value}) leaves none of the {num_layers} layers in FP8, as"
            f" `fp8_bf16_first_layers` ({config.fp8_bf16_first_layers}) and `fp8_bf16_last_layers`"
            f" ({config.fp8_bf16_last_layers}) stay in bf16; lower them or use bf16."
        )


def _require_sizes(model: HybridModel, precision: Precision, in_fp8: range) -> None:
    multiple = _MULTIPLE[precision]
    for index in in_fp8:
        for name, module in model.backbone.layers[index].named_modules():
            if isinstance(module, Linear) and (module.in_features % multiple or module.out_features % multiple):
                way_out = "use bf16"
                if precision is Precision.fp8_blockwise:
                    way_out += " or, where multiples of 16 suffice, fp8_current"
                raise UserError(
                    f"`engine.precision` ({precision.value}) needs matrices whose sides are multiples of {multiple}, and"
                    f" layer {index}'s {name} maps {module.in_features} to {module.out_features} values; {way_out}."
                )
