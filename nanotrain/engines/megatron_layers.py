"""Megatron-Core layers without CUDA libraries: the plain torch twins of its Transformer Engine and mamba-ssm layers.

They hold parameters of the same names, shapes and splits, so that weights, checkpoints and everything around the layers are
those of a GPU. They run the ops of this package, on CPU ranks and as the reference of the stock layers on a GPU.

Beside them: what makes both take packed rows under context parallelism. Megatron and Transformer Engine would split every document over the
ranks and need its length to divide; here the row is split, as a row of one document is, and documents begin where they begin.
"""

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.mamba_context_parallel import (
    MambaContextParallel,
    _redo_attention_load_balancing,
    _undo_attention_load_balancing,
)
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig, TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from nanotrain.engines.megatron_documents import ChunkDocuments, attend_chunks, attend_documents
from nanotrain.ops.attention import attention
from nanotrain.ops.causal_conv1d import causal_conv1d
from nanotrain.ops.rms_norm import grouped_gated_rms_norm, rms_norm
from nanotrain.ops.ssd import ssd_scan


@dataclass
class PackedDocuments(PackedSeqParams):
    """Megatron's description of a packed row; `cu_seqlens` and `seq_idx` are the whole row's also under context parallelism.

    Attributes:
        chunks: under context parallelism the documents of this rank's two chunks.
    """

    chunks: tuple[ChunkDocuments, ...] = ()


class RowContextParallel(MambaContextParallel):
    """Megatron's exchange of positions for heads, which undoes the balanced split of the row whether it is packed or not.

    So every rank has the row in order for convolution and scan, and `seq_idx` of the whole row starts them afresh.
    """

    def pre_conv_ssm(self, input_: Tensor, packed_seq_params: PackedSeqParams | None = None) -> Tensor:
        """Map [S / CP, B, C] to [S, B, C / CP], in order."""
        return super().pre_conv_ssm(input_, None)

    def post_conv_ssm(self, input_: Tensor, packed_seq_params: PackedSeqParams | None = None) -> Tensor:
        """Map [S, B, C / CP], in order, to [S / CP, B, C]."""
        return super().post_conv_ssm(input_, None)

    @classmethod
    def of(cls, mixer: MambaMixer, cp_group: Any, d_conv: int) -> "RowContextParallel":
        """Return the exchange of a mixer that has its sizes and parameters."""
        return cls(
            cp_group=cp_group,
            d_inner_local_tp=mixer.d_inner_local_tp,
            nheads_local_tp=mixer.nheads_local_tp,
            ngroups_local_tp=mixer.ngroups_local_tp,
            d_state=mixer.d_state,
            conv1d_weight_cp1=mixer.conv1d_weight,
            conv1d_bias_cp1=mixer.conv1d_bias,
            conv1d_padding=d_conv - 1,
            dt_bias_cp1=mixer.dt_bias,
            A_log_cp1=mixer.A_log,
            D_cp1=mixer.D,
            D_has_hdim=mixer.D_has_hdim,
        )


class RowMambaMixer(MambaMixer):
    """Megatron's stock mixer, taking packed rows under context parallelism."""

    def __init__(self, config: TransformerConfig, *args: Any, pg_collection: Any, **options: Any) -> None:
        super().__init__(config, *args, pg_collection=pg_collection, **options)
        self.cp = RowContextParallel.of(self, pg_collection.cp, self.d_conv)


def gathered_keys_values(key: Tensor, value: Tensor, cp_group: Any) -> Tensor:
    """Return [S, 2 Hkv, Dh] in order from all ranks' [S / CP, Hkv, Dh]; backward sums over ranks, each gets its positions'."""
    both = torch.cat([key, value], dim=1)
    whole = gather_from_sequence_parallel_region(both, tensor_parallel_output_grad=True, group=cp_group)
    return _undo_attention_load_balancing(whole, cp_group.size())


class _TEMask(Enum):
    """Masks of Transformer Engine without a name in Megatron's AttnMaskType; Megatron hands the name on."""

    padding_causal_bottom_right = auto()


class DocumentAttention:
    """Mixin before Megatron's TEDotProductAttention: packed rows under context parallelism; all else as it was.

    A mixin, because where Transformer Engine is not installed Megatron's class is no class.
    """

    cp_group: Any

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        packed_seq_params: PackedDocuments | None = None,
        **options: Any,
    ) -> Tensor:
        """Map [S, B, heads, Dh] to [S, B, heads x Dh]; packed, without the dimension B."""
        if packed_seq_params is None or not packed_seq_params.chunks:
            return super().forward(query, key, value, *args, packed_seq_params=packed_seq_params, **options)  # type: ignore[misc]
        group = self.cp_group
        keys_values = gathered_keys_values(key, value, group)
        self.cp_group = None  # all keys are here: Transformer Engine has nothing to exchange
        try:
            return attend_chunks(query, keys_values, packed_seq_params.chunks, self._attend)
        finally:
            self.cp_group = group

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, documents: ChunkDocuments) -> Tensor:
        """Map [S, Hq, Dh] to [S, Hq x Dh]: cuDNN's attention over sequences of different lengths, without a mask in memory."""
        # Transformer Engine takes separate q, k and v only where each begins its storage.
        q, k, v = (t.clone(memory_format=torch.contiguous_format) for t in (q, k, v))
        borders = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=documents.cu_seqlens_q,
            cu_seqlens_kv=documents.cu_seqlens_kv,
            # Bounds, not the longest: cuDNN's plans go by the number of tokens, and want no fewer keys than queries.
            max_seqlen_q=q.shape[0],
            max_seqlen_kv=k.shape[0],
        )
        return super().forward(  # type: ignore[misc]
            q, k, v, None, attn_mask_type=_TEMask.padding_causal_bottom_right, packed_seq_params=borders
        )


def norm_weight(config: TransformerConfig) -> nn.Parameter:
    """Return the weight of an RMSNorm between layers; under sequence parallelism its gradients are summed over ranks."""
    weight = nn.Parameter(
        torch.empty(config.hidden_size, device=torch.cuda.current_device(), dtype=config.params_dtype)
    )
    weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # read by finalize_model_grads
    return weight


class FinalNorm(nn.Module):
    """RMSNorm after the last layer."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = norm_weight(config)
        self.eps = config.layernorm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Map [S, B, D] to [S, B, D]."""
        return rms_norm(x, self.weight, self.eps)


class NormColumnParallelLinear(ColumnParallelLinear):
    """The layer's RMSNorm and its first projection, split by output rows; twin of TELayerNormColumnParallelLinear."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **options: Any) -> None:
        options.pop("name", None)
        super().__init__(input_size, output_size, config=config, **options)
        self.layer_norm_weight = norm_weight(config)
        self.eps = config.layernorm_epsilon

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Map [S, B, D], or this rank's part of the sequence, to [S, B, rows of this rank]."""
        return super().forward(rms_norm(input_, self.layer_norm_weight, self.eps), *args, **kwargs)


class OutputLinear(RowParallelLinear):
    """The layer's last projection, split by input columns; twin of TERowParallelLinear."""

    def __init__(self, input_size: int, output_size: int, **options: Any) -> None:
        options.pop("name", None)
        super().__init__(input_size, output_size, **options)


class GatedNorm(nn.Module):
    """Gate and RMSNorm within groups; each tensor-parallel rank holds whole groups."""

    def __init__(self, width: int, num_groups: int, config: TransformerConfig, tp_group: Any) -> None:
        super().__init__()
        self.weight = _split_parameter(width, config.params_dtype)
        self.num_groups, self.eps, self.tp_group = num_groups, config.layernorm_epsilon, tp_group

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """Map y and the gate z [..., width] to [..., width]."""
        return grouped_gated_rms_norm(y, z, self.weight, self.eps, self.num_groups)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the weight, split over tensor-parallel ranks, for dist_checkpointing."""
        assert metadata is not None
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


def _split_parameter(size: int | tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    """Return a parameter whose first dimension is split over tensor-parallel ranks."""
    parameter = nn.Parameter(torch.empty(size, device=torch.cuda.current_device(), dtype=dtype))
    set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
    return parameter


class TorchMambaMixer(MambaMixer):
    """Megatron's mixer (projections, context parallelism, checkpoints) around our convolution, scan and norm."""

    def __init__(
        self,
        config: TransformerConfig,
        d_model: int,
        *,
        chunk_size: int,
        d_conv: int,
        pg_collection: Any,
        **unused: Any,
    ) -> None:
        del unused
        MegatronModule.__init__(self, config)  # not MambaMixer's, which needs mamba-ssm
        tp = pg_collection.tp.size()
        self.tp_group = pg_collection.tp
        self.chunk_size, self.use_mem_eff_path = chunk_size, True
        self.d_state, self.headdim = config.mamba_state_dim, config.mamba_head_dim
        self.nheads_local_tp = config.mamba_num_heads // tp
        self.ngroups_local_tp = config.mamba_num_groups // tp
        self.d_inner_local_tp = self.nheads_local_tp * self.headdim
        groups = self.ngroups_local_tp * self.d_state
        self.in_proj = NormColumnParallelLinear(
            d_model,
            tp * (2 * self.d_inner_local_tp + 2 * groups + self.nheads_local_tp),
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            tp_group=self.tp_group,
        )
        convolved = self.d_inner_local_tp + 2 * groups
        self.conv1d_weight = _split_parameter((convolved, 1, d_conv), config.params_dtype)
        self.conv1d_bias = _split_parameter(convolved, config.params_dtype)
        self.A_log, self.D, self.dt_bias = (_split_parameter(self.nheads_local_tp, torch.float32) for _ in range(3))
        self.norm = GatedNorm(self.d_inner_local_tp, self.ngroups_local_tp, config, self.tp_group)
        self.out_proj = OutputLinear(
            tp * self.d_inner_local_tp,
            d_model,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_group=self.tp_group,
        )
        self.D_has_hdim = False
        self.cp = RowContextParallel.of(self, pg_collection.cp, d_conv)

    def _ssm_training(self, zxBCdt: Tensor, packed_seq_params: PackedSeqParams | None = None) -> Tensor:
        """Everything between the projections: [S, B, C] of whole sequences to [S / CP, B, inner size / TP].

        Between the two all-to-all exchanges a context-parallel rank has whole sequences of some heads; the norm, whose
        groups may be spread over those ranks, runs after the second one.
        """
        cp = self.cp
        segment_ids = None if packed_seq_params is None else packed_seq_params.seq_idx
        groups = cp.ngroups_local_tpcp * self.d_state
        inner = cp.d_inner_local_tpcp
        z, xBC, dt = zxBCdt.transpose(0, 1).split([inner, inner + 2 * groups, cp.nheads_local_tpcp], dim=-1)
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt = nn.functional.softplus(dt.to(wide) + cp.get_dt_bias())
        xBC = causal_conv1d(xBC, cp.get_conv1d_weight(), cp.get_conv1d_bias(), segment_ids=segment_ids)
        x, B, C = xBC.split([inner, groups, groups], dim=-1)
        y, _ = ssd_scan(
            x.unflatten(-1, (-1, self.headdim)),
            dt,
            -torch.exp(cp.get_A_log().to(wide)),
            B.unflatten(-1, (-1, self.d_state)),
            C.unflatten(-1, (-1, self.d_state)),
            cp.get_D(),
            chunk_size=self.chunk_size,
            segment_ids=segment_ids,
        )
        y, z = (cp.post_conv_ssm(t.transpose(0, 1).contiguous()) for t in (y.flatten(2), z))
        return self.norm(y, z)


class TorchCoreAttention(MegatronModule):
    """Causal attention; a context-parallel rank sees all positions of plain rows and keeps its own (simple, not sparing)."""

    def __init__(self, config: TransformerConfig, pg_collection: Any, **unused: Any) -> None:
        super().__init__(config)
        del unused
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedDocuments | None = None,
        **unused: Any,
    ) -> Tensor:
        """Map [S, B, heads, Dh] to [S, B, heads x Dh]; packed, without the dimension B."""
        del attention_mask, unused
        if packed_seq_params is not None and packed_seq_params.chunks:
            keys_values = gathered_keys_values(key, value, self.cp_group)
            return attend_chunks(query, keys_values, packed_seq_params.chunks, attend_documents).flatten(1)
        if packed_seq_params is not None:
            y = attention(query[None], key[None], value[None], segment_ids=packed_seq_params.seq_idx)
            return y[0].flatten(1)
        size = self.cp_group.size()
        if size > 1:
            query, key, value = (
                _undo_attention_load_balancing(
                    gather_from_sequence_parallel_region(
                        t.contiguous(), tensor_parallel_output_grad=True, group=self.cp_group
                    ),
                    size,
                )
                for t in (query, key, value)
            )
        y = attention(*(t.transpose(0, 1) for t in (query, key, value))).transpose(0, 1).flatten(2)
        if size > 1:
            y = _redo_attention_load_balancing(y, size).chunk(size)[self.cp_group.rank()]
        return y.contiguous()


class TorchHybridStack(HybridStack):
    """Megatron's stack of layers, whose final norm is always Transformer Engine's, with ours."""

    def __init__(self, config: TransformerConfig, submodules: HybridStackSubmodules, **options: Any) -> None:
        super().__init__(config, submodules, **(options | {"post_layer_norm": False}))
        self.post_layer_norm = True
        if self.post_process:
            self.final_norm = FinalNorm(config)


def torch_stack_spec(chunk_size: int, conv_kernel: int) -> ModuleSpec:
    """Return the plain torch counterpart of megatron.core.models.hybrid.hybrid_layer_specs.hybrid_stack_spec."""
    mixer = ModuleSpec(module=TorchMambaMixer, params={"chunk_size": chunk_size, "d_conv": conv_kernel})
    attention_layer = TransformerLayerSubmodules(
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=NormColumnParallelLinear, core_attention=TorchCoreAttention, linear_proj=OutputLinear
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
    )

    def mlp(**options: Any) -> MLP:
        submodules = MLPSubmodules(linear_fc1=NormColumnParallelLinear, linear_fc2=OutputLinear)
        return MLP.as_mlp_submodule(submodules=submodules, **options)

    return ModuleSpec(
        module=TorchHybridStack,
        submodules=HybridStackSubmodules(
            mamba_layer=ModuleSpec(
                module=MambaLayer, submodules=MambaLayerSubmodules(mixer=mixer, mamba_bda=get_bias_dropout_add)
            ),
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention_layer),
            mlp_layer=ModuleSpec(
                module=MLPLayer, submodules=TransformerLayerSubmodules(mlp=mlp, mlp_bda=get_bias_dropout_add)
            ),
        ),
    )
