"""The shipped launch parameters against the kernels that they are for."""

import json
import re
from pathlib import Path

import pytest
import torch

import nanotrain.ops

TABLE = json.loads((Path(nanotrain.ops.__path__[0]) / "gpu" / "tuned_configs.json").read_text(encoding="utf-8"))
PUBLISHED = "sm_90 P 80 N 128 chunk 128 bfloat16"


def test_the_published_shape_is_tuned_for_every_kernel_of_a_step():
    assert len(TABLE[PUBLISHED]) == 14
    for key, kernels in TABLE.items():
        assert re.fullmatch(r"sm_\d+ P \d+ N \d+ chunk \d+ (bfloat16|float32)", key)
        assert kernels.keys() == TABLE[PUBLISHED].keys()
        assert all({"num_warps", "num_stages"} < config.keys() for config in kernels.values())


def test_a_tuned_shape_leaves_one_variant_and_another_leaves_all(monkeypatch):
    pytest.importorskip("mamba_ssm", reason="the table is of mamba-ssm's kernels")
    from nanotrain.ops.gpu import tuned_configs

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    tuners = tuned_configs.tuners()
    before = {name: len(tuner.configs) for name, tuner in tuners.items()}
    tuned_configs.restrict_to_tuned(80, 128, 128, torch.bfloat16)
    for name, tuner in tuners.items():
        assert len(tuner.configs) == (1 if name in TABLE[PUBLISHED] else before[name])
        if name in TABLE[PUBLISHED]:
            assert tuned_configs.describe(tuner.configs[0]) == TABLE[PUBLISHED][name]
    tuned_configs.restrict_to_tuned(64, 128, 128, torch.bfloat16)
    assert {name: len(tuner.configs) for name, tuner in tuners.items()} == before
