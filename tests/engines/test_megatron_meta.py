"""The name table against megatron-core's own model: every name and shape of every stage and tensor-parallel rank."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanotrain.config.megatron import MegatronConfig
from nanotrain.config.model import ModelConfig
from nanotrain.engines.megatron_names import shard_shape, stage_sources
from nanotrain.planning.pipeline_stages import layers_per_stage, padded_vocab_size, stage_layers

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

SCRIPT = Path(__file__).with_name("megatron_meta.py")


@dataclasses.dataclass(frozen=True)
class Case:
    model: ModelConfig
    megatron: MegatronConfig
    world_size: int
    fused_norms: bool
    ranks: list[int]

    def as_json(self) -> dict[str, Any]:
        layout = dataclasses.asdict(self.megatron) | {
            "world_size": self.world_size,
            "fused_norms": self.fused_norms,
            "layers_per_stage": layers_per_stage(self.model.num_hidden_layers, self.megatron),
            "padded_vocab_size": padded_vocab_size(self.model.vocab_size, self.megatron.tensor_parallel),
            "recompute": None,
        }
        return {"model": dataclasses.asdict(self.model), "layout": layout, "ranks": self.ranks}


def build_ranks(cases: list[Case]) -> list[list[dict[str, Any]]]:
    """Return what Megatron built for each case and rank."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        input=json.dumps([case.as_json() for case in cases]),
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[{")]


def check(case: Case, rank: dict[str, Any]) -> None:
    """Names, order-free, and shapes are the table's; the blocks of in_proj and convolution those Megatron tags."""
    layers = stage_layers(case.model.num_hidden_layers, case.megatron)[rank["pp_rank"]]
    sources = stage_sources(case.model, layers, fused_norms=case.fused_norms)
    tp_size, built = case.megatron.tensor_parallel, rank["parameters"]
    assert built.keys() == sources.keys()
    for name, source in sources.items():
        assert tuple(built[name]["shape"]) == shard_shape(case.model, source, tp_size), name
        tagged = built[name]["partition_sizes"]
        assert (tagged is not None) == (len(source.blocks[0]) > 1), name
        if tagged is not None:
            assert tagged == [block // tp_size for block in source.blocks[0]], name


def test_every_layout_has_the_tables_names_and_shapes(published: Callable[[str], ModelConfig]) -> None:
    small = dataclasses.replace(
        published("12b"),
        hybrid_layer_pattern="M-M*-M",
        vocab_size=61,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=16,
        head_dim=8,
        mamba_num_heads=16,
        mamba_head_dim=4,
        ssm_state_size=8,
    )
    sp = {"sequence_parallel": True}
    cases = [
        Case(small, MegatronConfig(), 1, False, [0]),
        Case(small, MegatronConfig(tensor_parallel=8, **sp), 8, True, [0, 7]),
        Case(small, MegatronConfig(tensor_parallel=2, context_parallel=2, pipeline_parallel=2), 16, False, [0, 3, 14]),
        Case(small, MegatronConfig(pipeline_parallel=3, pipeline_layers=[1, 4, 1]), 3, True, [0, 1, 2]),
        Case(published("9b"), MegatronConfig(tensor_parallel=4, pipeline_parallel=2, **sp), 8, True, [1, 6]),
        Case(published("12b"), MegatronConfig(tensor_parallel=8, context_parallel=16, **sp), 128, True, [77]),
        Case(
            published("12b"), MegatronConfig(tensor_parallel=8, pipeline_parallel=4, **sp), 1024, True, [3, 300, 1023]
        ),
    ]
    for case, ranks in zip(cases, build_ranks(cases), strict=True):
        assert len(ranks) == len(case.ranks)
        for rank in ranks:
            check(case, rank)
