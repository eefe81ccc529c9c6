import dataclasses

import pytest

from nanotrain.planning import paper


@pytest.mark.parametrize("size, values", [("12b", paper.ARCHITECTURE_12B), ("9b", paper.ARCHITECTURE_9B)])
def test_configs_model_hold_the_published_values(published, size, values):
    assert dataclasses.asdict(published(size)) == {key: one.value for key, one in values.items()}
    published(size).validate("stage.model")


def test_every_value_names_a_known_source():
    groups = [paper.ARCHITECTURE_12B, paper.ARCHITECTURE_9B, paper.PARAMETERS, paper.PRETRAINING, paper.PRUNING]
    for group in [*groups, paper.DISTILLATION_TOKENS, paper.REASONING]:
        for key, one in group.items():
            assert one.sources and set(one.sources) <= paper.SOURCES.keys(), key


def test_the_published_figures_agree_with_each_other():
    pretraining = {key: one.value for key, one in paper.PRETRAINING.items()}
    assert pretraining["global_batch_size"] * pretraining["sequence_length"] == pretraining["tokens_per_step"]
    assert pretraining["decay_tokens"] < pretraining["tokens"]
    candidate = paper.CANDIDATES["candidate_2"]
    nine = {key: one.value for key, one in paper.ARCHITECTURE_9B.items()}
    assert candidate["num_layers"] == len(nine["hybrid_layer_pattern"]) == paper.PRUNING["num_layers"].value
    assert all(candidate[key] == nine[key] for key in candidate if key != "num_layers")
