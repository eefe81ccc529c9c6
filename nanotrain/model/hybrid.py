"""The hybrid Mamba-2 / attention / MLP language model. Its state_dict has NemotronH's names on disk."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanotrain.config.model import ATTENTION, MAMBA, MLP, ModelConfig
from nanotrain.model import initialization
from nanotrain.model.cache import HybridCache
from nanotrain.model.mixers import AttentionMixer, MambaMixer, MLPMixer, RMSNorm

_MIXERS: dict[str, Callable[[ModelConfig, int], nn.Module]] = {
    MAMBA: MambaMixer,
    ATTENTION: AttentionMixer,
    MLP: MLPMixer,
}


class Block(nn.Module):
    """x + mixer(RMSNorm(x)), one mixer a layer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = _MIXERS[config.hybrid_layer_pattern[layer]](config, layer)

    def forward(
        self,
        x: Tensor,
        segment_ids: Tensor | None = None,
        cache: HybridCache | None = None,
        num_valid: Tensor | None = None,
    ) -> Tensor:
        """Map [B, S, D] to [B, S, D]."""
        normed, x = self.norm.branch(x)
        return x + self.mixer(normed, segment_ids, cache, num_valid)


class Backbone(nn.Module):
    """Embeddings, blocks, final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)


class HybridModel(nn.Module):
    """NemotronH. Parameters hold arbitrary values until `init_weights` or a checkpoint sets them.

    Building under `with torch.device("meta")` allocates nothing; `to_empty` then gives storage.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointed_kinds: frozenset[str] = frozenset()
        """Letters of layers whose activations are made again in the backward pass; the engine's choice."""
        self.backbone = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._tie()

    def _tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HybridModel":
        """Move or cast; tied weights stay one tensor also where that replaces parameters (`to_empty`)."""
        super()._apply(fn, recurse)
        self._tie()
        return self

    def init_weights(self, seed: int) -> None:
        """Draw all parameters (model/initialization.py); the same seed gives the same values on every device."""
        initialization.init_weights(self, self.config, seed)

    def output_weight(self) -> Tensor:
        """Return the output matrix [V, D]."""
        return self.lm_head.weight

    def new_cache(self, batch_size: int) -> HybridCache:
        """Return an empty cache in this model's dtype, on its device."""
        weight = self.backbone.embeddings.weight
        return HybridCache(self.config, batch_size, dtype=weight.dtype, device=weight.device)

    def hidden_states(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None = None,
        cache: HybridCache | None = None,
        num_valid: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states after the final norm.

        Args:
            input_ids: [B, S] int64.
            segment_ids: [B, S]; where the id changes a new document begins. Not together with a cache.
            cache: continues the sequences it holds, and is updated; call it without gradient.
            num_valid: [B], with a cache only: real tokens of each row, the rest is padding on the right whose output
                means nothing. None = all.

        Returns:
            [B, S, D].
        """
        assert segment_ids is None or cache is None, "a cache holds one document a row"
        assert num_valid is None or cache is not None, "padding is for prefill; pack documents by segment_ids instead"
        x = self.backbone.embeddings(input_ids)
        for kind, block in zip(self.config.hybrid_layer_pattern, self.backbone.layers, strict=True):
            if kind in self.checkpointed_kinds and torch.is_grad_enabled():
                # Nothing in a block is random, so there is no state of a generator to keep.
                x = checkpoint(block, x, segment_ids, cache, num_valid, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, segment_ids, cache, num_valid)
        if cache is not None:
            cache.advance(input_ids.shape[1], num_valid)
        return self.backbone.norm_f(x)

    def forward(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None = None,
        cache: HybridCache | None = None,
        num_valid: Tensor | None = None,
    ) -> Tensor:
        """Return logits [B, S, V]; arguments as in `hidden_states`."""
        return F.linear(self.hidden_states(input_ids, segment_ids, cache, num_valid), self.output_weight())


def build_meta_model(config: ModelConfig) -> HybridModel:
    """Return a model without storage: an engine gives it that, on the device and in the dtype where it will be."""
    with torch.device("meta"):
        return HybridModel(config)
