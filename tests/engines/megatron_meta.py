"""Builds megatron-core's HybridModel on the meta device, one rank of a cluster at a time, under a fake process group.

By the engine's own builder with its plain torch layers, or of megatron-core's stock layers.

Run as a script in a process of its own, because it changes what torch.cuda answers: reads a list of layouts from stdin
(JSON) and prints, for each rank, what its parameters are. Layers are megatron-core's, the Mamba mixer in the form that the
engine gives it under context parallelism; what is not installed on a CPU machine is replaced there by the least that has the
same parameters: mamba-ssm's gated norm, Transformer Engine's norms and its linear layer with a norm inside.
"""

import dataclasses
import json
import sys
import types
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

META = torch.device("meta")


class GatedNorm(nn.Module):
    """Parameters of mamba_ssm.ops.triton.layernorm_gated.RMSNorm."""

    def __init__(
        self, hidden_size: int, eps: float, group_size: int, norm_before_gate: bool, device: Any, dtype: Any
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))


def scan(*_: Any, state_dtype: Any = None) -> None:
    raise NotImplementedError


def pretend_to_have_a_gpu_and_mamba_ssm() -> None:
    modules: dict[str, dict[str, Any]] = {
        "mamba_ssm": {},
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.layernorm_gated": {"RMSNorm": GatedNorm},
        "mamba_ssm.ops.triton.ssd_combined": {
            "mamba_chunk_scan_combined": scan,
            "mamba_split_conv1d_scan_combined": scan,
        },
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__path__ = []
        module.__dict__.update(content)
        sys.modules[name] = module
    torch.cuda.current_device = lambda: META  # type: ignore[assignment, return-value]


pretend_to_have_a_gpu_and_mamba_ssm()

from megatron.core import parallel_state as ps  # noqa: E402
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add  # noqa: E402
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules  # noqa: E402
from megatron.core.models.hybrid.hybrid_model import HybridModel  # noqa: E402
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules  # noqa: E402
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules  # noqa: E402
from megatron.core.ssm.mlp_layer import MLPLayer  # noqa: E402
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear  # noqa: E402
from megatron.core.tensor_parallel import random as megatron_random  # noqa: E402
from megatron.core.transformer import (  # noqa: E402
    TransformerConfig,
    TransformerLayer,
    TransformerLayerSubmodules,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.identity_op import IdentityOp  # noqa: E402
from megatron.core.transformer.mlp import MLP, MLPSubmodules  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402

from nanotrain.config.engine import EngineConfig, EngineKind, Precision  # noqa: E402
from nanotrain.config.megatron import MegatronConfig, Recompute  # noqa: E402
from nanotrain.config.model import ModelConfig  # noqa: E402
from nanotrain.engines.megatron_layers import RowMambaMixer  # noqa: E402
from nanotrain.engines.megatron_model import build_root, transformer_config  # noqa: E402


class NoRandomStates:
    """In place of Megatron's tracker of CUDA random states: nothing is drawn on the meta device."""

    def fork(self, *_: Any) -> Any:
        return nullcontext()

    def is_initialized(self) -> bool:
        return True


class Norm(nn.Module):
    def __init__(self, config: Any, hidden_size: int, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, device=META, dtype=config.params_dtype))


class NormedColumnParallelLinear(ColumnParallelLinear):
    """Parameters of Transformer Engine's LayerNormLinear without bias."""

    def __init__(self, input_size: int, *arguments: Any, config: Any, **named: Any) -> None:
        super().__init__(input_size, *arguments, config=config, **named)
        self.layer_norm_weight = nn.Parameter(torch.empty(input_size, device=META, dtype=config.params_dtype))


class NoParameters(nn.Module):
    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


class Stack(HybridStack):
    """The stock stack asks Transformer Engine for its last norm."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named, post_layer_norm=False)
        if self.post_process:
            self.final_norm = Norm(self.config, self.config.hidden_size)


def stack_spec(fused_norms: bool) -> ModuleSpec:
    column = NormedColumnParallelLinear if fused_norms else ColumnParallelLinear
    norm = IdentityOp if fused_norms else Norm
    mixer = ModuleSpec(
        module=RowMambaMixer, submodules=MambaMixerSubmodules(in_proj=column, out_proj=RowParallelLinear)
    )
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=column, core_attention=NoParameters, linear_proj=RowParallelLinear
        ),
    )
    mlp = partial(MLP.as_mlp_submodule, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=RowParallelLinear))
    return ModuleSpec(
        module=Stack,
        submodules=HybridStackSubmodules(
            mamba_layer=ModuleSpec(
                module=MambaLayer,
                submodules=MambaLayerSubmodules(norm=norm, mixer=mixer, mamba_bda=get_bias_dropout_add),
            ),
            attention_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=norm, self_attention=attention, self_attn_bda=get_bias_dropout_add
                ),
            ),
            mlp_layer=ModuleSpec(
                module=MLPLayer,
                submodules=TransformerLayerSubmodules(pre_mlp_layernorm=norm, mlp=mlp, mlp_bda=get_bias_dropout_add),
            ),
        ),
    )


def build(sizes: dict[str, Any], layout: dict[str, Any]) -> HybridModel:
    config = TransformerConfig(
        num_layers=len(sizes["hybrid_layer_pattern"]),
        hidden_size=sizes["hidden_size"],
        ffn_hidden_size=sizes["intermediate_size"],
        num_attention_heads=sizes["num_attention_heads"],
        num_query_groups=sizes["num_key_value_heads"],
        kv_channels=sizes["head_dim"],
        mamba_num_heads=sizes["mamba_num_heads"],
        mamba_head_dim=sizes["mamba_head_dim"],
        mamba_state_dim=sizes["ssm_state_size"],
        mamba_num_groups=sizes["n_groups"],
        tensor_model_parallel_size=layout["tensor_parallel"],
        pipeline_model_parallel_size=layout["pipeline_parallel"],
        context_parallel_size=layout["context_parallel"],
        sequence_parallel=layout["sequence_parallel"],
        normalization="RMSNorm",
        add_bias_linear=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        bf16=True,
        is_hybrid_model=True,
        perform_initialization=False,
    )
    pattern, stages = sizes["hybrid_layer_pattern"], []
    for length in layout["layers_per_stage"]:
        stages.append(pattern[:length])
        pattern = pattern[length:]
    return HybridModel(
        config,
        stack_spec(layout["fused_norms"]),
        layout["padded_vocab_size"],
        8192,
        hybrid_layer_pattern="|".join(stages),
        pre_process=ps.is_pipeline_first_stage(),
        post_process=ps.is_pipeline_last_stage(),
    )


def build_by_engine(sizes: dict[str, Any], layout: dict[str, Any]) -> HybridModel:
    known = {field.name for field in dataclasses.fields(MegatronConfig)}
    engine = EngineConfig(
        kind=EngineKind.megatron,
        precision=Precision.bf16,
        megatron=MegatronConfig(**{name: layout[name] for name in known - {"recompute"}}, recompute=Recompute.none),
    )
    model = ModelConfig(**sizes)
    config = transformer_config(model, engine, torch.bfloat16, training=True, on_gpu=False)
    return build_root(model, engine, config, on_gpu=False)


def describe(sizes: dict[str, Any], layout: dict[str, Any], rank: int) -> dict[str, Any]:
    """Build what one rank holds and return its place in the layout and its parameters."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout["world_size"])
    ps.initialize_model_parallel(
        layout["tensor_parallel"],
        layout["pipeline_parallel"],
        context_parallel_size=layout["context_parallel"],
        create_gloo_process_groups=False,
    )
    model = (build_by_engine if layout["by_engine"] else build)(sizes, layout)
    described = {
        "tp_rank": ps.get_tensor_model_parallel_rank(),
        "pp_rank": ps.get_pipeline_model_parallel_rank(),
        "dp_size": ps.get_data_parallel_world_size(),
        "parameters": {
            name: {
                "shape": list(parameter.shape),
                "bytes": parameter.nbytes,
                "partition_sizes": getattr(parameter, "partition_sizes", None),
            }
            for name, parameter in model.named_parameters()
        },
    }
    ps.destroy_model_parallel()
    dist.destroy_process_group()
    return described


def main() -> None:
    megatron_random._CUDA_RNG_STATE_TRACKER = NoRandomStates()
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    for case in json.loads(sys.stdin.read()):
        print(json.dumps([describe(case["model"], case["layout"], rank) for rank in case["ranks"]]), flush=True)


if __name__ == "__main__":
    main()
