import torch

from nanotrain.pruning.layer_removal import DepthTargets
from nanotrain.pruning.random_importance import random_width_scores, remove_random_layers


def test_scores_depend_on_seed_and_item_only(tiny_config):
    config = tiny_config()
    one, few = random_width_scores(config, range(6), 1), random_width_scores(config, (0, 4), 1)
    assert torch.equal(one.hidden, few.hidden) and torch.equal(one.ffn[4], few.ffn[4])
    assert sorted(few.ffn) == [4] and sorted(few.mamba_heads) == [0]
    assert one.hidden.shape == (12,) and one.ffn[1].shape == (20,) and one.mamba_heads[3].shape == (6,)
    assert not torch.equal(one.hidden, random_width_scores(config, range(6), 2).hidden)
    assert not torch.equal(one.ffn[1], one.ffn[4])


def test_layers_obey_the_same_rules(tiny_config):
    pattern = "M-*M-*M-*M"
    targets = DepthTargets.from_search(pattern, [7, 5], 1)
    orders = set()
    for seed in range(20):
        removals = remove_random_layers(pattern, targets, seed)
        assert removals == remove_random_layers(pattern, targets, seed)
        order = [one.layer for one in removals]
        assert len(set(order)) == 5 and all(one.mse is None and one.kind == pattern[one.layer] for one in removals)
        assert all(sum(pattern[i] == "*" for i in kept) == 1 for kept in targets.kept_layers(order).values())
        orders.add(tuple(order))
    assert len(orders) > 10
