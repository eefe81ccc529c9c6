"""From scores to kept indices."""

from collections.abc import Sequence

from torch import Tensor

from nanotrain.config.model import ModelConfig
from nanotrain.pruning.importance import WidthScores
from nanotrain.pruning.plan import PruningPlan


def keep_largest(scores: Tensor, count: int) -> tuple[int, ...]:
    """Return the rising indices of the `count` largest scores [C]; of equal scores the lower index is kept."""
    assert 1 <= count <= len(scores), (count, len(scores))
    return tuple(sorted(scores.argsort(descending=True, stable=True)[:count].tolist()))


def keep_largest_per_group(scores: Tensor, count: int, num_groups: int) -> tuple[int, ...]:
    """Return the rising indices of `count` scores [C], the largest of each of `num_groups` equal runs of indices."""
    assert len(scores) % num_groups == 0 and count % num_groups == 0, (len(scores), count, num_groups)
    size = len(scores) // num_groups
    kept: list[int] = []
    for group in range(num_groups):
        own = scores[group * size : (group + 1) * size]
        kept += [group * size + index for index in keep_largest(own, count // num_groups)]
    return tuple(kept)


def plan_from_scores(
    config: ModelConfig,
    layers: Sequence[int],
    scores: WidthScores,
    *,
    hidden_size: int,
    intermediate_size: int,
    mamba_num_heads: int,
) -> PruningPlan:
    """Keep the given layers of a model of `config` and, of each width, the wanted number with the largest scores."""
    return PruningPlan(
        layers=tuple(layers),
        hidden=keep_largest(scores.hidden, hidden_size),
        ffn={layer: keep_largest(own, intermediate_size) for layer, own in scores.ffn.items()},
        mamba_heads={
            layer: keep_largest_per_group(own, mamba_num_heads, config.n_groups)
            for layer, own in scores.mamba_heads.items()
        },
    )
