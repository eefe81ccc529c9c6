"""The three mixers of a hybrid model, with NemotronH's parameter names. None has a bias except the convolution."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanotrain.config.model import ModelConfig
from nanotrain.model.cache import HybridCache
from nanotrain.model.linear import Linear
from nanotrain.ops.attention import attention
from nanotrain.ops.causal_conv1d import causal_conv1d
from nanotrain.ops.linear import linears
from nanotrain.ops.mamba_core import mamba_core
from nanotrain.ops.mamba_layout import MambaParameters, MambaSizes, split_heads
from nanotrain.ops.rms_norm import branch_rms_norm, grouped_gated_rms_norm, rms_norm
from nanotrain.ops.squared_relu import squared_relu
from nanotrain.ops.squared_relu_mlp import fuses_squared_relu, squared_relu_mlp
from nanotrain.ops.ssd import ssd_scan, ssd_step
from nanotrain.planning.parameters import FP32_TENSORS


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension, fp32 inside."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        return rms_norm(x, self.weight, self.eps)

    def branch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normed x and x, whose gradients a kernel adds as it makes them."""
        if self._forward_hooks:  # they are there to see the output
            return self(x), x
        return branch_rms_norm(x, self.weight, self.eps)


class DepthwiseConv(nn.Module):
    """Holds the weight [C, 1, K] and the bias [C] of a depthwise causal convolution under the names `conv1d.*`."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor, segment_ids: Tensor | None, initial_state: Tensor | None) -> Tensor:
        """Map [B, S, C] to [B, S, C], SiLU included."""
        return causal_conv1d(x, self.weight, self.bias, segment_ids=segment_ids, initial_state=initial_state)


class MambaMixer(nn.Module):
    """Mamba-2: in_proj to [z, x, B, C, dt], convolution over [x, B, C], SSD scan, gate and grouped norm, out_proj."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.in_proj = Linear(config.hidden_size, config.in_proj_size)
        self.conv1d = DepthwiseConv(config.conv_channels, config.conv_kernel)
        self.A_log = nn.Parameter(torch.empty(config.mamba_num_heads))
        self.D = nn.Parameter(torch.empty(config.mamba_num_heads))
        self.dt_bias = nn.Parameter(torch.empty(config.mamba_num_heads))
        self.norm = RMSNorm(config.mamba_inner_size, config.layer_norm_epsilon)
        self.out_proj = Linear(config.mamba_inner_size, config.hidden_size)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MambaMixer":
        """Move or cast, but leave A_log, D and dt_bias at fp32 or more: a rounded A or dt shifts every decay."""
        before = {name: self._parameters[name] for name in FP32_TENSORS}
        before = {name: parameter.data for name, parameter in before.items() if parameter is not None}
        super()._apply(fn, recurse)
        for name, wide in before.items():
            parameter = self._parameters[name]
            assert parameter is not None
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = wide.to(device=parameter.device, dtype=torch.promote_types(wide.dtype, torch.float32))
        return self

    def forward(
        self, u: Tensor, segment_ids: Tensor | None, cache: HybridCache | None, num_valid: Tensor | None
    ) -> Tensor:
        """Map [B, S, D] to [B, S, D]; see HybridModel.hidden_states for the arguments."""
        return self.out_proj(self.between_projections(self.in_proj(u), segment_ids, cache, num_valid))

    def between_projections(
        self,
        zxBCdt: Tensor,
        segment_ids: Tensor | None,
        cache: HybridCache | None = None,
        num_valid: Tensor | None = None,
    ) -> Tensor:
        """Convolution, scan, gate and norm: [B, S, 2 inner + 2 G N + H] to [B, S, inner]."""
        if cache is None:
            return mamba_core(zxBCdt, self._core_parameters(), self._sizes, segment_ids)
        z, xBC, dt = zxBCdt.split(self._sizes.widths, dim=-1)
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias)
        if num_valid is not None:  # dt = 0 at padding: it leaves the state as it is
            dt = dt * (torch.arange(dt.shape[1], device=dt.device) < num_valid[:, None])[..., None]
        y = self._continue_scan(xBC, dt, segment_ids, cache, num_valid)
        config = self.config
        return grouped_gated_rms_norm(y.flatten(2), z, self.norm.weight, config.layer_norm_epsilon, config.n_groups)

    @property
    def _sizes(self) -> MambaSizes:
        config = self.config
        return MambaSizes(
            config.mamba_num_heads,
            config.mamba_head_dim,
            config.n_groups,
            config.ssm_state_size,
            config.chunk_size,
            config.layer_norm_epsilon,
        )

    def _core_parameters(self) -> MambaParameters:
        return MambaParameters(self.conv1d.weight, self.conv1d.bias, self.dt_bias, self.A_log, self.D, self.norm.weight)

    def _continue_scan(
        self, xBC: Tensor, dt: Tensor, segment_ids: Tensor | None, cache: HybridCache, num_valid: Tensor | None
    ) -> Tensor:
        """Convolution and SSD from the cache's states on: [B, S, C] and dt [B, S, H] to [B, S, H, P]."""
        convolved = self.conv1d(xBC, segment_ids, cache.conv_states[self.layer])
        x, B, C = split_heads(convolved, self._sizes)
        A = -torch.exp(self.A_log.to(dt.dtype))
        cache.store_conv_inputs(self.layer, xBC, num_valid)
        state = cache.ssm_states[self.layer]
        if xBC.shape[1] == 1:
            y, state = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], self.D, state)
            y = y[:, None]
        else:
            y, state = ssd_scan(x, dt, A, B, C, self.D, chunk_size=self.config.chunk_size, initial_state=state)
        cache.ssm_states[self.layer] = state
        return y


class AttentionMixer(nn.Module):
    """Causal grouped-query attention without position embedding."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q_proj = Linear(config.hidden_size, config.num_attention_heads * config.head_dim)
        self.k_proj = Linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.v_proj = Linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size)

    def forward(
        self, u: Tensor, segment_ids: Tensor | None, cache: HybridCache | None, num_valid: Tensor | None
    ) -> Tensor:
        """Map [B, S, D] to [B, S, D]; see HybridModel.hidden_states for the arguments."""
        del num_valid  # padding is on the right: no real query sees it, and the next tokens overwrite it
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self._projected(u))
        if cache is None:
            y = attention(q, k, v, segment_ids=segment_ids)
        else:
            k, v = cache.append_keys_values(self.layer, k, v)
            y = attention(q, k, v, num_cached=cache.lengths)
        return self.o_proj(y.flatten(2))

    def _projected(self, u: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values, [B, S, heads x Dh]; their input is quantised once."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        if any(p._forward_hooks for p in projections):  # a hook is there to see an output
            return tuple(p(u) for p in projections)
        return linears(u, [p.weight for p in projections], [p.weight_copy for p in projections])


class MLPMixer(nn.Module):
    """down(relu(up(u))^2), no gate."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        del layer
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, u: Tensor, *_unused: Any) -> Tensor:
        """Map [B, S, D] to [B, S, D]; positions do not meet here."""
        up, down = self.up_proj, self.down_proj
        copies = (up.weight_copy, down.weight_copy)
        if fuses_squared_relu(u, *copies) and not up._forward_hooks:  # a hook is there to see up's output
            return squared_relu_mlp(u, up.weight, down.weight, *copies)
        return down(squared_relu(up(u)))
