"""The baseline: what to keep drawn at random, with the same sizes. Draws depend on (seed, item), not on their order."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nanotrain.config.model import MAMBA, MLP, ModelConfig
from nanotrain.pruning.importance import WidthScores
from nanotrain.pruning.layer_removal import DepthTargets, LayerRemoval
from nanotrain.runtime.seeding import derived_seed


def _uniform(seed: int, item: str, count: int) -> Tensor:
    """Return `count` fp64 draws from [0, 1) that depend on seed and item only."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "pruning", item))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def random_width_scores(config: ModelConfig, layers: Sequence[int], seed: int) -> WidthScores:
    """Return uniform scores for every width of the model that consists of `layers`."""
    kinds = config.hybrid_layer_pattern
    return WidthScores(
        hidden=_uniform(seed, "hidden", config.hidden_size),
        ffn={i: _uniform(seed, f"ffn.{i}", config.intermediate_size) for i in layers if kinds[i] == MLP},
        mamba_heads={i: _uniform(seed, f"mamba.{i}", config.mamba_num_heads) for i in layers if kinds[i] == MAMBA},
    )


def remove_random_layers(pattern: str, targets: DepthTargets, seed: int) -> list[LayerRemoval]:
    """Choose layers to remove by uniform scores, under the same rules as `layer_removal.remove_layers`."""
    scores = _uniform(seed, "layers", len(pattern)).tolist()
    removals: list[LayerRemoval] = []
    for _ in range(targets.num_removals):
        allowed = targets.removable(pattern, [removal.layer for removal in removals])
        layer = min(allowed, key=lambda index: scores[index])
        removals.append(LayerRemoval(layer, pattern[layer], None))
    return removals
