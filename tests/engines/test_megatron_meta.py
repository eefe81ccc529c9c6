"""The name table against megatron-core's own model: every name and shape of every stage and tensor-parallel rank."""

import dataclasses
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanotrain.config.engine import EngineConfig, EngineKind, Precision
from nanotrain.config.errors import UserError
from nanotrain.config.megatron import MegatronConfig
from nanotrain.config.model import ModelConfig
from nanotrain.config.training import TrainingConfig
from nanotrain.engines.megatron_names import shard_shape, stage_sources
from nanotrain.planning.layout import check_layout
from nanotrain.planning.parallel_memory import memory_per_stage
from nanotrain.planning.parameters import count_parameters
from nanotrain.planning.pipeline_stages import layers_per_stage, padded_vocab_size, stage_layers

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("megatron_meta.py")
TRAINING = TrainingConfig(
    steps=1, global_batch_size=736 * 12, micro_batch_size=1, sequence_length=8192 * 3, learning_rate=1e-4
)


@dataclasses.dataclass(frozen=True)
class Case:
    model: ModelConfig
    megatron: MegatronConfig
    world_size: int
    ranks: list[int]
    fused_norms: bool = True
    by_engine: bool = False

    def as_json(self) -> dict[str, Any]:
        layout = dataclasses.asdict(self.megatron) | {
            "world_size": self.world_size,
            "fused_norms": self.fused_norms,
            "by_engine": self.by_engine,
            "layers_per_stage": layers_per_stage(self.model.num_hidden_layers, self.megatron),
            "padded_vocab_size": padded_vocab_size(self.model.vocab_size, self.megatron.tensor_parallel),
        }
        del layout["recompute"]
        return {"model": dataclasses.asdict(self.model), "layout": layout, "ranks": self.ranks}


def build_ranks(cases: list[Case]) -> list[list[dict[str, Any]]]:
    """Return what Megatron built for each case and rank."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        input=json.dumps([case.as_json() for case in cases]),
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[{")]


def check(case: Case, rank: dict[str, Any]) -> None:
    """Names and shapes are the table's, the blocks of in_proj and convolution those Megatron tags, bytes those planned."""
    layers = stage_layers(case.model.num_hidden_layers, case.megatron)[rank["pp_rank"]]
    sources = stage_sources(case.model, layers, fused_norms=case.fused_norms)
    tp_size, built = case.megatron.tensor_parallel, rank["parameters"]
    assert built.keys() == sources.keys()
    for name, source in sources.items():
        assert tuple(built[name]["shape"]) == shard_shape(case.model, source, tp_size), name
        tagged = built[name]["partition_sizes"]
        assert (tagged is not None) == (len(source.blocks[0]) > 1 and not case.by_engine), name
        if tagged is not None:
            assert tagged == [block // tp_size for block in source.blocks[0]], name
    engine = EngineConfig(kind=EngineKind.megatron, precision=Precision.bf16, megatron=case.megatron)
    layout = check_layout(case.model, TRAINING, engine, case.world_size)
    assert rank["dp_size"] == layout.data
    planned = memory_per_stage(case.model, TRAINING, engine, layout)[rank["pp_rank"]]
    assert planned.num_parameters == sum(math.prod(one["shape"]) for one in built.values())
    dt_bias = 0 if case.by_engine else 2 * sum(one["bytes"] for name, one in built.items() if name.endswith("dt_bias"))
    assert planned.weights == sum(one["bytes"] for one in built.values()) + dt_bias // 2  # the engine widens it to fp32


SMALL = {
    "hybrid_layer_pattern": "M-M*-M",
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 16,
    "head_dim": 8,
    "mamba_num_heads": 16,
    "mamba_head_dim": 4,
    "ssm_state_size": 8,
}
SP = {"sequence_parallel": True}
LARGEST = MegatronConfig(tensor_parallel=8, pipeline_parallel=4, pipeline_layers=[17, 16, 17, 12], **SP)


def check_all(cases: list[Case]) -> None:
    for case, ranks in zip(cases, build_ranks(cases), strict=True):
        assert len(ranks) == len(case.ranks)
        for rank in ranks:
            check(case, rank)


def test_every_layout_has_the_planned_names_shapes_and_bytes(published: Callable[[str], ModelConfig]) -> None:
    """Chosen layouts of both builders, and random ones that the layout check accepts, in one process (imports are slow)."""
    small = dataclasses.replace(published("12b"), **SMALL)
    both_splits = MegatronConfig(tensor_parallel=2, context_parallel=2, pipeline_parallel=2)
    long_context = MegatronConfig(tensor_parallel=8, context_parallel=16, **SP)
    uneven = MegatronConfig(pipeline_parallel=3, pipeline_layers=[1, 4, 1])
    check_all(
        [
            Case(small, MegatronConfig(), 1, [0], fused_norms=False),
            Case(small, MegatronConfig(tensor_parallel=8, **SP), 8, [0, 7]),
            Case(small, both_splits, 16, [0, 3, 14], fused_norms=False),
            Case(small, uneven, 3, [0, 1, 2]),
            Case(small, uneven, 3, [0, 1, 2], by_engine=True),
            Case(small, both_splits, 16, [0, 3, 14], by_engine=True),
            Case(published("9b"), MegatronConfig(tensor_parallel=4, pipeline_parallel=2, **SP), 8, [1, 6]),
            Case(published("12b"), long_context, 128, [77], by_engine=True),
            Case(published("12b"), LARGEST, 1024, [1023], by_engine=True),
            *accepted_layouts(small, 6),
        ]
    )


def accepted_layouts(small: ModelConfig, number: int) -> list[Case]:
    """Draw models and layouts until the check has accepted so many."""
    draw = random.Random(0)
    accepted: list[Case] = []
    while len(accepted) < number:
        changes = {
            "hybrid_layer_pattern": "".join(draw.choices("M*-", k=draw.randint(1, 7))),
            "vocab_size": draw.randint(20, 90),
            "intermediate_size": draw.choice([24, 60, 96]),
            "num_key_value_heads": draw.choice([2, 4, 8]),
            "n_groups": draw.choice([1, 2, 3, 4, 8]),
            "mamba_num_heads": 24,
        }
        tensor, pipeline, context = draw.choice([1, 2, 3, 4]), draw.randint(1, 4), draw.choice([1, 2, 3, 4])
        megatron = MegatronConfig(tensor, draw.random() < 0.5 and tensor > 1, pipeline, context_parallel=context)
        case = Case(
            dataclasses.replace(small, **changes),
            megatron,
            tensor * pipeline * context * draw.choice([1, 2]),
            [],
            by_engine=True,
        )
        engine = EngineConfig(kind=EngineKind.megatron, precision=Precision.bf16, megatron=megatron)
        try:
            check_layout(case.model, TRAINING, engine, case.world_size)
        except UserError:
            continue
        accepted.append(dataclasses.replace(case, ranks=[case.world_size - 1]))
    assert len({(case.megatron.tensor_parallel, case.megatron.context_parallel) for case in accepted}) > 3
    return accepted


@pytest.mark.slow
def test_every_coordinate_of_1024_gpus(published: Callable[[str], ModelConfig]) -> None:
    """One rank of each (tensor, pipeline) coordinate: 32 shards that add up to the model."""
    config = published("12b")
    ranks = [256 * stage + 8 * 17 + tensor for stage in range(4) for tensor in range(8)]
    case = Case(config, LARGEST, 1024, ranks, by_engine=True)
    (built,) = build_ranks([case])
    assert {(rank["tp_rank"], rank["pp_rank"]) for rank in built} == {(t, p) for t in range(8) for p in range(4)}
    total = 0
    for rank in built:
        check(case, rank)
        for name, one in rank["parameters"].items():
            whole = "layer_norm_weight" in name or name == "decoder.final_norm.weight"
            total += 0 if whole and rank["tp_rank"] else math.prod(one["shape"])
    assert total == count_parameters(config)
