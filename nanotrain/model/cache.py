"""What a hybrid model remembers while it generates: keys and values, convolution inputs, SSM states.

Rows may have different lengths, so that prompts of any lengths decode together. A multi-row prefill pads on the
right: padding never enters a state, and keys behind a row's length are free space that is never looked at.
"""

import torch
from torch import Tensor

from nanotrain.config.model import ATTENTION, MAMBA, ModelConfig


class HybridCache:
    """State of `batch_size` sequences in all layers.

    Attributes:
        lengths: [B] int64, tokens seen per row.
        conv_states: layer -> [B, K - 1, C], the last inputs of the convolution.
        ssm_states: layer -> [B, H, P, N], fp32 (fp64 in an fp64 model) whatever the model's dtype, because rounding
            errors add up over the sequence.
    """

    def __init__(self, config: ModelConfig, batch_size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.conv_states: dict[int, Tensor] = {}
        self.ssm_states: dict[int, Tensor] = {}
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._longest = 0
        wide = torch.promote_types(dtype, torch.float32)
        for layer, kind in enumerate(config.hybrid_layer_pattern):
            if kind == MAMBA:
                shape = (batch_size, config.conv_kernel - 1, config.conv_channels)
                self.conv_states[layer] = torch.zeros(shape, dtype=dtype, device=device)
                state = (batch_size, config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
                self.ssm_states[layer] = torch.zeros(state, dtype=wide, device=device)
            elif kind == ATTENTION:
                empty = torch.empty(
                    batch_size, 0, config.num_key_value_heads, config.head_dim, dtype=dtype, device=device
                )
                self._keys[layer], self._values[layer] = empty, empty

    @property
    def batch_size(self) -> int:
        return self.lengths.shape[0]

    def append_keys_values(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values [B, S, Hkv, Dh] of new positions behind those of each row.

        Returns:
            All keys and values [B, T, Hkv, Dh], T at least the longest row's length; `lengths` is not yet advanced.
        """
        num_new = keys.shape[1]
        needed = self._longest + num_new
        columns = self.lengths[:, None] + torch.arange(num_new, device=keys.device)
        rows = torch.arange(self.batch_size, device=keys.device)[:, None]
        stored = []
        for store, new in ((self._keys, keys), (self._values, values)):
            if store[layer].shape[1] < needed:
                store[layer] = _grown(store[layer], max(needed, 2 * store[layer].shape[1], 64))
            store[layer][rows, columns] = new.to(store[layer].dtype)
            stored.append(store[layer][:, :needed])
        return stored[0], stored[1]

    def store_conv_inputs(self, layer: int, inputs: Tensor, num_valid: Tensor | None) -> None:
        """Keep the last K - 1 inputs of each row, from what was there and the new inputs [B, S, C].

        `num_valid` [B] counts the rows' real inputs; None = all S.
        """
        old = self.conv_states[layer]
        kept = old.shape[1]
        joined = torch.cat([old, inputs.to(old.dtype)], dim=1)
        if num_valid is None:
            self.conv_states[layer] = joined[:, joined.shape[1] - kept :].clone()
        else:
            positions = num_valid[:, None] + torch.arange(kept, device=inputs.device)
            self.conv_states[layer] = joined.gather(1, positions[..., None].expand(-1, -1, joined.shape[2]))

    def advance(self, num_new: int, num_valid: Tensor | None) -> None:
        """Count the new positions of one forward pass, after all layers have stored theirs."""
        self.lengths = self.lengths + (num_new if num_valid is None else num_valid)
        self._longest += num_new

    def select(self, rows: Tensor) -> None:
        """Keep only these rows [B'] (indices), in this order."""
        self.lengths = self.lengths[rows]
        self._longest = int(self.lengths.max()) if len(rows) else 0
        for states in (self.conv_states, self.ssm_states, self._keys, self._values):
            for layer, state in states.items():
                states[layer] = state[rows]


def _grown(stored: Tensor, capacity: int) -> Tensor:
    """Return `stored` [B, T, ...] with room for `capacity` positions; zeros, as a masked key must still be finite."""
    grown = stored.new_zeros(stored.shape[0], capacity, *stored.shape[2:])
    grown[:, : stored.shape[1]] = stored
    return grown
