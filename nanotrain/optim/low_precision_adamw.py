"""AdamW with moments in fp32, bf16 or 8 bits over weights in fp32 or stochastically rounded bf16, tensor by tensor.

Its own class because torch's AdamW keeps moments in the weights' dtype, and because tensors can be updated one at a time
while the backward pass still runs.
"""

from typing import Any

import torch
from torch import Tensor

from nanotrain.ops.adamw import adamw_update
from nanotrain.ops.moments import AdamWStep, Moments, new_moments, rounding_key

_FIELDS = ("average", "square", "average_scale", "square_scale")


class LowPrecisionAdamW(torch.optim.Optimizer):
    """AdamW (decoupled weight decay, bias correction) in the arithmetic of `ops.adamw`.

    All moments are allocated when it is built, so that a model too large fails before its first step.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        state_dtype: torch.dtype,
    ) -> None:
        """Build over named parameters.

        Args:
            groups: each `params`, a list of (name, parameter), and `weight_decay`.
            lr: until `param_groups` get another.
            betas: of both moments.
            eps: added to the root of the second.
            state_dtype: float32, bfloat16, or uint8 for 8-bit blocks.
        """
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "num_steps": 0})
        self._group_of: dict[Tensor, dict[str, Any]] = {}
        self._name_of: dict[Tensor, str] = {}
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                self._name_of[parameter] = name
                self._set_moments(parameter, new_moments(parameter.detach(), state_dtype))
        self._map_groups()

    def _map_groups(self) -> None:
        self._group_of = {parameter: group for group in self.param_groups for parameter in group["params"]}

    def _set_moments(self, parameter: Tensor, moments: Moments) -> None:
        fields = {name: moments.__dict__[name] for name in _FIELDS}
        self.state[parameter] = {name: tensor for name, tensor in fields.items() if tensor is not None}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient, and count the step."""
        assert closure is None, "a closure would run the model again"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, parameter.grad)
        self.count_step()

    def update(self, parameter: Tensor, gradient: Tensor, allowed: Tensor | None = None) -> None:
        """Update one parameter as part of the step that `count_step` will count.

        Args:
            parameter: one of this optimizer's.
            gradient: in its shape.
            allowed: [] bool on its device; False = neither it nor its moments change.
        """
        group = self._group_of[parameter]
        step = group["num_steps"] + 1
        numbers = AdamWStep(
            learning_rate=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            epsilon=group["eps"],
            weight_decay=group["weight_decay"],
            step=step,
            key=rounding_key(self._name_of[parameter], step),
        )
        adamw_update(parameter.detach(), gradient, Moments(**self.state[parameter]), numbers, allowed)

    def count_step(self) -> None:
        """Count one step for the bias correction and the keys of the rounding noise."""
        for group in self.param_groups:
            group["num_steps"] += 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave; the base class would cast codes and fp32 moments to the weights' dtype."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self._map_groups()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in enumerate(parameters):
            stored = state_dict["state"][index]
            self.state[parameter] = {name: tensor.to(parameter.device) for name, tensor in stored.items()}
