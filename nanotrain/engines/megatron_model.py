"""Megatron-Core's hybrid model of our configuration, with the loss inside its forward (docs/decisions/0001)."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.activations import squared_relu as fused_squared_relu
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.ssm.mamba_mixer import MAMBA_HAS_STATE_DTYPE
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from nanotrain.checkpoint.pickled_names import plain_values, require_plain_metadata
from nanotrain.config.engine import FP8_PRECISIONS, EngineConfig
from nanotrain.config.megatron import Recompute
from nanotrain.config.model import ModelConfig
from nanotrain.engines.base import StateWriter
from nanotrain.engines.megatron_batch import LocalBatch
from nanotrain.engines.megatron_layers import DocumentAttention, PackedDocuments, RowMambaMixer, torch_stack_spec
from nanotrain.losses.base import LossFn, LossOutput
from nanotrain.model.head import HeadWeight, OutputHead
from nanotrain.ops.squared_relu import squared_relu
from nanotrain.ops.vocab_shard import VocabShard
from nanotrain.planning.parameters import FP32_TENSORS
from nanotrain.planning.pipeline_stages import padded_vocab_size, stage_layers


def transformer_config(
    model: ModelConfig, engine: EngineConfig, dtype: torch.dtype, *, training: bool, on_gpu: bool
) -> TransformerConfig:
    """Return Megatron's form of both configurations.

    Args:
        model: sizes.
        engine: parallelism, precision, recomputation.
        dtype: of parameters and activations.
        training: whether weights will be updated; without, they are held in `dtype` also under FP8.
        on_gpu: whether Transformer Engine's fusions apply.
    """
    megatron = engine.megatron
    return TransformerConfig(
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.intermediate_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_dim,
        mamba_num_heads=model.mamba_num_heads,
        mamba_head_dim=model.mamba_head_dim,
        mamba_num_groups=model.n_groups,
        mamba_state_dim=model.ssm_state_size,
        is_hybrid_model=True,
        activation_func=fused_squared_relu if on_gpu else squared_relu,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=model.layer_norm_epsilon,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        perform_initialization=False,  # init_weights and load_hf draw or read every tensor
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=on_gpu,
        calculate_per_token_loss=True,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=megatron.tensor_parallel,
        sequence_parallel=megatron.sequence_parallel,
        pipeline_model_parallel_size=megatron.pipeline_parallel,
        context_parallel_size=megatron.context_parallel,
        cp_comm_type="p2p",
        mamba_training_ssm_states_dtype=torch.float32 if MAMBA_HAS_STATE_DTYPE else None,
        **_recompute(megatron.recompute),
        **_fp8(engine, training),
    )


def _recompute(recompute: Recompute) -> dict[str, Any]:
    if recompute is Recompute.none:
        return {}
    if recompute is Recompute.selective:
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _fp8(engine: EngineConfig, training: bool) -> dict[str, Any]:
    if engine.precision not in FP8_PRECISIONS:
        return {}
    first, last = engine.fp8_bf16_first_layers, engine.fp8_bf16_last_layers
    return {
        "fp8": "e4m3",
        "fp8_recipe": "blockwise",
        "fp8_param": training and engine.megatron.fp8_parameters,
        "first_last_layers_bf16": first + last > 0,
        "num_layers_at_start_in_bf16": first,
        "num_layers_at_end_in_bf16": last,
    }


@dataclass(frozen=True)
class Layout:
    """This rank's layers and rows of the vocabulary."""

    layers: range
    first_row: int
    num_rows: int
    """Without padding rows, which are the last rank's."""

    @classmethod
    def of(cls, model: ModelConfig, engine: EngineConfig) -> "Layout":
        tp_rank, tp_size = parallel_state.get_tensor_model_parallel_rank(), engine.megatron.tensor_parallel
        rows = padded_vocab_size(model.vocab_size, tp_size) // tp_size
        layers = stage_layers(model.num_hidden_layers, engine.megatron)
        first = tp_rank * rows
        held = max(min(rows, model.vocab_size - first), 0)
        return cls(layers[parallel_state.get_pipeline_model_parallel_rank()], first, held)


class MegatronRoot(HybridModel):
    """One rank's part of the model; on the last pipeline stage also the call of the loss."""

    layout: Layout

    def forward(self, local: LocalBatch, loss_fn: LossFn | None = None) -> LossOutput | Tensor:
        """Return the loss of a micro-batch, or hidden states when no loss is given or this is not the last stage.

        Hidden states of the last stage are [B, S / CP, D], after the final norm; those of others [S / CP / TP, B, D].
        """
        batch = local.batch
        x = self.embedding(input_ids=batch.input_ids, position_ids=None) if self.pre_process else None
        x = self.decoder(hidden_states=x, attention_mask=None, packed_seq_params=_documents(local))
        if not self.post_process:
            return x
        if self.config.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=self.pg_collection.tp)
        else:
            # The losses return this rank's part of the gradient: backward sums it over the ranks.
            x = copy_to_tensor_model_parallel_region(x, group=self.pg_collection.tp)
        hidden_states = x.transpose(0, 1)
        if loss_fn is None:
            return hidden_states
        head = self.head()
        return loss_fn(OutputHead(hidden_states, head.weight, head.vocab_shard), batch)

    def head(self) -> HeadWeight:
        """Return this rank's rows of the output matrix, without padding; on the last stage only."""
        weight = self.output_layer.weight[: self.layout.num_rows]
        group = self.pg_collection.tp
        if group.size() == 1:
            return HeadWeight(weight)

        def reduce(operation: Any) -> Any:
            def all_reduce(tensor: Tensor) -> Tensor:
                dist.all_reduce(tensor, operation, group=group)
                return tensor

            return all_reduce

        shard = VocabShard(self.layout.first_row, reduce(dist.ReduceOp.MAX), reduce(dist.ReduceOp.SUM))
        return HeadWeight(weight, shard)


def _documents(local: LocalBatch) -> PackedDocuments | None:
    if local.cu_seqlens is None:
        return None
    return PackedDocuments(
        qkv_format="thd",
        cu_seqlens_q=local.cu_seqlens,
        cu_seqlens_kv=local.cu_seqlens,
        max_seqlen_q=local.longest,
        max_seqlen_kv=local.longest,
        total_tokens=local.num_positions,  # from which it derives seq_idx for convolution and scan
        chunks=local.chunks,
    )


def build_root(model: ModelConfig, engine: EngineConfig, config: TransformerConfig, *, on_gpu: bool) -> MegatronRoot:
    """Return this rank's part of the model on its device; the weights are arbitrary."""
    stages = stage_layers(model.num_hidden_layers, engine.megatron)
    spec = _stock_spec(model, config) if on_gpu else torch_stack_spec(model.chunk_size, model.conv_kernel)
    root = MegatronRoot(
        config=config,
        hybrid_stack_spec=spec,
        vocab_size=padded_vocab_size(model.vocab_size, engine.megatron.tensor_parallel),
        max_sequence_length=model.max_position_embeddings,
        hybrid_layer_pattern="|".join(model.hybrid_layer_pattern[s.start : s.stop] for s in stages),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="none",
    )
    root.layout = Layout.of(model, engine)
    for name, parameter in root.named_parameters():
        if name.rsplit(".", 1)[-1] in FP32_TENSORS and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()  # Megatron holds dt_bias in bf16
    for module in root.modules():
        if isinstance(module, nn.Module) and hasattr(module, "ngroups_local_tp"):
            module.norm.eps = model.layer_norm_epsilon  # Megatron's mixer has 1e-5 written into it
    return root


def _stock_spec(model: ModelConfig, config: TransformerConfig) -> ModuleSpec:
    """Return Megatron's layers of Transformer Engine and mamba-ssm with the model's chunk and kernel sizes."""
    spec = copy.deepcopy(hybrid_stack_spec)
    mixer = spec.submodules.mamba_layer.submodules.mixer
    mixer.params = {"chunk_size": model.chunk_size, "d_conv": model.conv_kernel}
    if config.context_parallel_size > 1:
        mixer.module = RowMambaMixer
        attention = spec.submodules.attention_layer.submodules.self_attention.submodules
        attention.core_attention = type("RowAttention", (DocumentAttention, attention.core_attention), {})
    return spec


def match_groups(optimizer: MegatronOptimizer) -> None:
    """Let a state find its parameters where a group has fp32 ones beside bf16 ones, as Mamba-2's layers do.

    megatron-core 0.19's distributed optimizer notes the places of a group in the order of its buffers and then puts the fp32
    parameters first (NVIDIA/Megatron-LM issue 2777); training is right, but states are saved and loaded by those places.
    """
    for one in optimizer.chained_optimizers:
        if not isinstance(one, DistributedOptimizer):
            continue
        for group, both in enumerate(zip(one.model_fp32_groups, one.model_float16_groups, strict=True)):
            for place, parameter in enumerate(parameter for part in both for parameter in part):
                one.model_param_group_index_map[parameter] = (group, place)


def snapshot(root: MegatronRoot, optimizer: MegatronOptimizer, dp_cp_group: dist.ProcessGroup) -> StateWriter:
    """Copy weights and optimizer states to host memory and return what writes them with dist_checkpointing.

    The tensors are described by where they lie in the whole model, so that any other layout can read them.
    """
    state = _sharded_state(root, optimizer, dp_cp_group, is_loading=False)
    force_all_tensors_to_non_fp8(state)  # to bf16, exactly: blocks are scaled by powers of two
    for sharded in nested_values(state):
        if isinstance(sharded, ShardedTensor | ShardedTensorFactory) and isinstance(sharded.data, Tensor):
            sharded.data = torch.empty_like(sharded.data, device="cpu").copy_(sharded.data.detach())

    def write(folder: Path) -> None:
        # For the results of its writer Megatron would start a server process, which outlives a rank that is killed; this
        # thread is the writer.
        filesystem_async._results_queue = SimpleQueue()
        dist_checkpointing.save(state, str(folder))

    return write


def restore(root: MegatronRoot, optimizer: MegatronOptimizer, dp_cp_group: dist.ProcessGroup, folder: Path) -> None:
    """Read what `snapshot` wrote under this or another layout."""
    with torch.no_grad():
        require_plain_metadata(folder)
        wanted = _sharded_state(root, optimizer, dp_cp_group, is_loading=True)
        read_fp8_weights_unquantised(wanted)
        with plain_values(folder):
            state = dist_checkpointing.load(wanted, str(folder))
        root.load_state_dict(state["model"])
        for one in _with_torch_adamw(optimizer):
            set_states = one._set_main_param_and_optimizer_states
            # torch's count of steps is a tensor, which Megatron restores elsewhere but then looks for here
            one._set_main_param_and_optimizer_states = partial(_without_step, set_states)
        optimizer.load_state_dict(state["optimizer"])
    for one in _with_torch_adamw(optimizer):
        for values in one.optimizer.state.values():
            values["step"] = values["step"].clone()  # Megatron gives all of them one tensor, which each would count up


def read_fp8_weights_unquantised(wanted: dict[str, Any]) -> None:
    """Give FP8 weights of a state to be loaded a place in host memory, in the dtype that they stand for.

    megatron-core 0.19 reads a part of an FP8 weight, as another layout saved it, into a dequantised copy and drops that: the
    weight would silently keep what it held. Whoever gets the loaded state quantises it.
    """
    for sharded in nested_values(wanted):
        if isinstance(sharded, ShardedTensor | ShardedTensorFactory) and is_float8tensor(sharded.data):
            sharded.data = torch.empty(sharded.data.shape, dtype=sharded.data.dtype, device="cpu")


def _without_step(set_states: Callable[..., None], parameter: Tensor, tensors: dict[str, Tensor]) -> None:
    set_states(parameter, {**tensors, "step": None})


def _sharded_state(
    root: MegatronRoot, optimizer: MegatronOptimizer, dp_cp_group: dist.ProcessGroup, *, is_loading: bool
) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": dp_cp_group,
    }
    for one in _with_torch_adamw(optimizer):
        for parameter in (p for group in one.optimizer.param_groups for p in group["params"]):
            if not one.optimizer.state[parameter]:  # torch makes them in its first step, Megatron describes them before
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                one.optimizer.state[parameter] = {"step": torch.tensor(0.0), **zeros}
    model = root.sharded_state_dict(metadata=metadata)
    return {"model": model, "optimizer": optimizer.sharded_state_dict(model, is_loading, metadata=metadata)}


def _with_torch_adamw(optimizer: MegatronOptimizer) -> list[Any]:
    """Return Megatron's distributed optimizers around torch's AdamW; none where Transformer Engine's fused one is."""
    chained: list[Any] = optimizer.chained_optimizers
    return [
        one for one in chained if isinstance(one, DistributedOptimizer) and isinstance(one.optimizer, torch.optim.AdamW)
    ]
