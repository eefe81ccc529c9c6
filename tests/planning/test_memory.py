"""Against the published budget's arithmetic (GiB, MiB)."""

import dataclasses

import pytest

from nanotrain.planning.memory import inference_memory, inference_memory_bytes
from nanotrain.planning.paper import CANDIDATES, PRUNING

GIB, MIB = 2**30, 2**20


@pytest.mark.parametrize(
    "size, gib, states_mib", [("12b", (22.929, 3.0, 26.0), (72, 142)), ("9b", (16.556, 2.0, 18.62), (69, 137))]
)
def test_published_models(published, size, gib, states_mib):
    memory = inference_memory(published(size), 131072, 1)
    served = inference_memory(published(size), 131072, 1, bytes_per_ssm_value=4)
    parts = (memory.weights, memory.key_value_cache, memory.total)
    assert [part / GIB for part in parts] == pytest.approx(gib, abs=5e-3)
    states = [(one.ssm_states + one.convolution_states) / MIB for one in (memory, served)]
    assert states == pytest.approx(states_mib, abs=0.5)
    assert inference_memory_bytes(published(size), 131072, 1, 2, 4) == served.total


@pytest.mark.parametrize("name, total", [("candidate_1", 18.68), ("candidate_2", 18.62), ("candidate_3", 18.76)])
def test_published_candidates_fit_the_published_budget(published, name, total):
    sizes = {key: value for key, value in CANDIDATES[name].items() if key != "num_layers"}
    used = inference_memory_bytes(dataclasses.replace(published("9b"), **sizes), PRUNING["context_length"].value, 1)
    assert used / GIB == pytest.approx(total, abs=5e-3)
    assert used <= PRUNING["memory_budget_gib"].value * GIB < inference_memory_bytes(published("12b"), 131072, 1)


def test_budget_is_the_published_product():
    assert PRUNING["memory_budget_gib"].value == pytest.approx(22.06 * 0.95 - 1.3, abs=5e-3)


def test_what_grows_with_what(published):
    config = published("9b")
    one, long, batch = (inference_memory(config, *sizes) for sizes in ((100, 1), (200, 1), (100, 3)))
    assert long.key_value_cache == 2 * one.key_value_cache and long.ssm_states == one.ssm_states
    assert batch.key_value_cache == 3 * one.key_value_cache and batch.ssm_states == 3 * one.ssm_states
    assert batch.weights == one.weights
    assert one.key_value_cache / 100 == 16 * 1024  # published: 16 KiB a token
