import torch
from hypothesis import given
from hypothesis import strategies as st

from nanotrain.pruning.importance import WidthScores
from nanotrain.pruning.ranking import keep_largest, keep_largest_per_group, plan_from_scores

scores = st.lists(st.floats(0, 10, width=16), min_size=1, max_size=12)


@given(scores, st.data())
def test_keep_largest(values, data):
    count = data.draw(st.integers(1, len(values)))
    kept = keep_largest(torch.tensor(values, dtype=torch.float64), count)
    expected = sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])
    assert list(kept) == expected


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_keep_largest_per_group(groups, size, data):
    values = data.draw(st.lists(st.floats(0, 10, width=16), min_size=groups * size, max_size=groups * size))
    per_group = data.draw(st.integers(1, size))
    kept = keep_largest_per_group(torch.tensor(values, dtype=torch.float64), per_group * groups, groups)
    assert list(kept) == sorted(kept)
    for group in range(groups):
        own = [i for i in kept if i // size == group]
        assert len(own) == per_group
        dropped = [i for i in range(group * size, (group + 1) * size) if i not in own]
        assert all(values[i] >= values[j] for i in own for j in dropped)


def test_plan_from_scores(tiny_config):
    config = tiny_config()
    layers = (0, 1, 2, 5)
    found = WidthScores(
        hidden=torch.arange(12.0),
        ffn={1: -torch.arange(20.0)},
        mamba_heads={0: torch.tensor([1.0, 2, 4, 3, 9, 0]), 5: torch.tensor([2.0, 1, 3, 4, 0, 9])},
    )
    plan = plan_from_scores(config, layers, found, hidden_size=4, intermediate_size=3, mamba_num_heads=3)
    plan.validate(config)
    assert plan.layers == layers and plan.hidden == (8, 9, 10, 11) and plan.ffn == {1: (0, 1, 2)}
    assert plan.mamba_heads == {0: (1, 2, 4), 5: (0, 3, 5)}
