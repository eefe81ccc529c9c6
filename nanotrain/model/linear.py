"""A linear layer without bias whose products may run in FP8; its one parameter is `weight` in every precision."""

from torch import Tensor, nn

from nanotrain.ops.linear import WeightCopy, linear


class Linear(nn.Linear):
    """x @ weight.T. `weight_copy` is set by the engine (engines/precision.py); None = no quantisation."""

    weight_copy: WeightCopy | None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.weight_copy = None

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        return linear(input, self.weight, self.weight_copy)
