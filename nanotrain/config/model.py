"""The architecture of a hybrid Mamba-2 / attention / MLP model, in NemotronH's names.

It is stated once, in the pretrain recipe; afterwards the checkpoint's config.json is the architecture.
"""

from dataclasses import dataclass

from omegaconf import MISSING

from nanotrain.config.errors import UserError

MAMBA, ATTENTION, MLP = "M", "*", "-"


@dataclass
class ModelConfig:
    """Sizes have no default. Values of the published 12B and 9B are in configs/model/."""

    hybrid_layer_pattern: str = MISSING
    """One letter a layer: M Mamba-2, * attention, - MLP."""
    vocab_size: int = MISSING
    hidden_size: int = MISSING
    intermediate_size: int = MISSING
    num_attention_heads: int = MISSING
    num_key_value_heads: int = MISSING
    head_dim: int = MISSING
    mamba_num_heads: int = MISSING
    mamba_head_dim: int = MISSING
    """Inner width of a Mamba-2 layer is mamba_num_heads x mamba_head_dim; it need not be 2 x hidden_size."""
    ssm_state_size: int = MISSING
    n_groups: int = MISSING
    conv_kernel: int = 4
    chunk_size: int = 128
    tie_word_embeddings: bool = False
    layer_norm_epsilon: float = 1e-5
    max_position_embeddings: int = 131072
    initializer_range: float = 0.0125
    """Standard deviation of linear weights and embeddings (Megatron-LM's script for the 12B)."""
    dt_init_min: float = 0.001
    dt_init_max: float = 0.1
    dt_init_floor: float = 1e-4
    """dt is drawn log-uniformly from [dt_init_min, dt_init_max] at initialisation; it is never clamped afterwards."""

    @property
    def num_hidden_layers(self) -> int:
        return len(self.hybrid_layer_pattern)

    @property
    def mamba_inner_size(self) -> int:
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the causal convolution: x, B and C."""
        return self.mamba_inner_size + 2 * self.n_groups * self.ssm_state_size

    @property
    def in_proj_size(self) -> int:
        """Output rows of in_proj, in the order z, x, B, C, dt."""
        return self.mamba_inner_size + self.conv_channels + self.mamba_num_heads

    def validate(self, path: str) -> None:
        """Raise UserError when the sizes do not fit together.

        Args:
            path: key path of this section, for the message (for example `stage.model`).
        """
        unknown = sorted(set(self.hybrid_layer_pattern) - {MAMBA, ATTENTION, MLP})
        if unknown or not self.hybrid_layer_pattern:
            raise UserError(
                f"`{path}.hybrid_layer_pattern` ({self.hybrid_layer_pattern!r}) must be a non-empty string of"
                f" M (Mamba-2), * (attention) and - (MLP); remove {', '.join(map(repr, unknown)) or 'nothing'}."
            )
        positive = [
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "mamba_num_heads",
            "mamba_head_dim",
            "ssm_state_size",
            "n_groups",
            "conv_kernel",
            "chunk_size",
            "max_position_embeddings",
        ]
        for name in positive:
            value = self.__dict__[name]
            if value < 1:
                raise UserError(f"`{path}.{name}` ({value}) must be at least 1.")
        self._require_divisible(path, "num_attention_heads", "num_key_value_heads")
        self._require_divisible(path, "mamba_num_heads", "n_groups")
        if not 0 < self.dt_init_floor <= self.dt_init_min <= self.dt_init_max:
            raise UserError(
                f"`{path}.dt_init_floor`, `dt_init_min` and `dt_init_max` ({self.dt_init_floor}, {self.dt_init_min},"
                f" {self.dt_init_max}) must be positive and in rising order."
            )
        for name in ("initializer_range", "layer_norm_epsilon"):
            if not self.__dict__[name] > 0:
                raise UserError(f"`{path}.{name}` ({self.__dict__[name]}) must be greater than 0.")

    def _require_divisible(self, path: str, number: str, divisor: str) -> None:
        n, d = self.__dict__[number], self.__dict__[divisor]
        if n % d:
            below, above = max(n // d, 1) * d, (n // d + 1) * d
            raise UserError(
                f"`{path}.{number}` ({n}) must be divisible by `{path}.{divisor}` ({d}); use {below} or {above}."
            )
