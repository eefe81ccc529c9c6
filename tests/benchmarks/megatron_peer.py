"""The peer of bench_one_gpu.py and bench_megatron.py: Megatron-Core's hybrid model with Transformer Engine layers and mamba-ssm.

`step_of` is forward and backward in one process, `training_loop_of` a whole step with Megatron's schedule and optimizer, in one
process or on ranks whose groups exist (tensor, sequence and data parallel).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from nanotrain.config.megatron import MegatronConfig
from nanotrain.config.model import ModelConfig
from nanotrain.engines.megatron_layers import torch_stack_spec
from nanotrain.model.batch import MicroBatch
from nanotrain.ops.squared_relu import squared_relu as plain_squared_relu

ENVIRONMENT = {
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29533",
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}
FP8 = {
    "fp32": {},
    "bf16": {},
    "fp8_blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
    "fp8_current": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
}


def start() -> None:
    """Set Megatron's process groups up, for one process."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    dist.init_process_group("nccl", rank=0, world_size=1)
    parallel_state.initialize_model_parallel(1, 1)
    model_parallel_cuda_manual_seed(1)


def build(
    config: ModelConfig,
    precision: str,
    bf16_layers: int,
    length: int,
    *,
    fp8_parameters: bool = False,
    layout: MegatronConfig | None = None,
) -> HybridModel:
    """Return a rank's part of the model on the GPU, in bf16, with `bf16_layers` at each end kept out of FP8.

    In precision fp32 it has plain torch layers, which run on CPU ranks (tests/megatron_cpu.py): a rehearsal, not a peer.
    """
    layout = layout or MegatronConfig()
    extra: dict[str, Any] = dict(FP8[precision])
    if fp8_parameters:
        extra["fp8_param"] = True
    if extra and bf16_layers:
        extra |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": bf16_layers,
            "num_layers_at_end_in_bf16": bf16_layers,
        }
    on_gpu = precision != "fp32"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    transformer = TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.intermediate_size,
        activation_func=squared_relu if on_gpu else plain_squared_relu,
        add_bias_linear=False,
        gated_linear_unit=False,
        normalization="RMSNorm",
        layernorm_epsilon=config.layer_norm_epsilon,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=on_gpu,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        mamba_num_heads=config.mamba_num_heads,
        mamba_head_dim=config.mamba_head_dim,
        mamba_num_groups=config.n_groups,
        mamba_state_dim=config.ssm_state_size,
        cross_entropy_loss_fusion=on_gpu,
        cross_entropy_fusion_impl="native",
        bias_dropout_fusion=on_gpu,
        is_hybrid_model=True,
        perform_initialization=on_gpu,
        init_method_std=0.02,
        tensor_model_parallel_size=layout.tensor_parallel,
        sequence_parallel=layout.sequence_parallel,
        **extra,
    )
    model = HybridModel(
        config=transformer,
        hybrid_stack_spec=hybrid_stack_spec if on_gpu else torch_stack_spec(config.chunk_size, config.conv_kernel),
        vocab_size=config.vocab_size,
        max_sequence_length=length,
        hybrid_layer_pattern=config.hybrid_layer_pattern,
        position_embedding_type="none",
        share_embeddings_and_output_weights=False,
    )
    if not on_gpu:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02)
    return model.cuda().train()


def step_of(model: HybridModel, ids: Tensor, labels: Tensor) -> Callable[[Callable[[], None]], None]:
    """Return a forward and backward on one batch; it calls its argument between the two."""
    positions = torch.arange(ids.shape[1], device=ids.device)[None].expand(len(ids), -1)

    def step(between: Callable[[], None]) -> None:
        for parameter in model.parameters():
            parameter.grad = None
        model.set_is_first_microbatch()  # quantise the weights anew, as after an optimizer step
        loss = model(input_ids=ids, position_ids=positions, attention_mask=None, labels=labels).mean()
        between()
        loss.backward()

    return step


def training_loop_of(
    model: HybridModel, batches: Sequence[MicroBatch], learning_rate: float
) -> Callable[[], tuple[float, float]]:
    """Return one optimizer step on micro-batches as a bare Megatron-Core program does it.

    It returns this rank's loss, a token's mean, and the gradient norm: both come to the host, as ours do.

    Data-parallel ranks each give their own micro-batches; gradients are reduced behind the backward pass, as ours are.
    """
    several = parallel_state.get_data_parallel_world_size() > 1
    dtype = model.config.params_dtype
    model.config.calculate_per_token_loss = True
    model.config.finalize_model_grads_func = finalize_model_grads
    ddp = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=several,
            fp8_param_gather=bool(model.config.fp8_param),
        ),
        model,
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=learning_rate, weight_decay=0.1, adam_beta2=0.95, clip_grad=1.0,
            bf16=dtype is torch.bfloat16, params_dtype=dtype, use_distributed_optimizer=True,
            fp8_recipe=model.config.fp8_recipe if model.config.fp8 else None,
        ),
        [ddp],
    )  # fmt: skip
    if several:
        model.config.no_sync_func = ddp.no_sync
    length = batches[0].input_ids.shape[1]
    positions = torch.arange(length, device="cuda")[None]

    def forward(data: Iterator[MicroBatch], chunk: nn.Module) -> tuple[Tensor, Callable[[Tensor], tuple]]:
        batch = next(data)
        ids, labels = batch.input_ids.cuda(non_blocking=True), batch.labels.cuda(non_blocking=True)
        losses = chunk(input_ids=ids, position_ids=positions, attention_mask=None, labels=labels)

        def reduce(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            total = values.float().sum()
            return total, torch.tensor(labels.numel(), dtype=torch.int, device="cuda"), total.detach()

        return losses, reduce

    num_tokens = sum(batch.labels.numel() for batch in batches)

    def step() -> tuple[float, float]:
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=forward, data_iterator=iter(batches), model=[ddp], num_microbatches=len(batches),
            seq_length=length, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        _, norm, _ = optimizer.step()
        return float(sum(losses)) / num_tokens, float(norm)

    ddp.train()
    return step


def mamba_core(model: HybridModel) -> nn.Module:
    """Return the mixer of the first Mamba-2 layer."""
    return model.decoder.layers[0].mixer
