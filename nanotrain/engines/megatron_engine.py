"""Megatron-Core: tensor, sequence, pipeline, context and data parallel ranks, with a distributed optimizer."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor

from nanotrain.checkpoint.hf_folder import iterate_tensors
from nanotrain.checkpoint.provenance import Provenance
from nanotrain.config.engine import EngineConfig
from nanotrain.config.errors import UserError
from nanotrain.config.model import MAMBA
from nanotrain.config.training import TrainingConfig
from nanotrain.engines.base import Engine, StateWriter, StepResult
from nanotrain.engines.megatron_batch import LocalBatch, SequenceSplit, localize, unpad
from nanotrain.engines.megatron_limits import (
    OWN_KERNELS,
    choose_dtype,
    own_stages,
    require_addressable,
    require_device,
    require_saveable,
    require_supported,
    smallest_batch,
)
from nanotrain.engines.megatron_model import build_root, match_groups, restore, snapshot, transformer_config
from nanotrain.engines.megatron_totals import Ranks, Totals, detached, reduce_totals
from nanotrain.engines.megatron_weights import Export, Parameters, Place, fill, initialise, load
from nanotrain.engines.spread_model import meta_tensors, save_gathered
from nanotrain.engines.torch_device import choose_device, set_threads
from nanotrain.losses.base import LossFn, LossOutput
from nanotrain.model.batch import MicroBatch
from nanotrain.model.head import HeadWeight
from nanotrain.model.hybrid import HybridModel
from nanotrain.ops.backends import choose_kernels, use_tuned_mamba_ssm
from nanotrain.ops.linear_cross_entropy import token_log_probabilities
from nanotrain.planning.layout import check_layout
from nanotrain.planning.parameters import tensor_shapes
from nanotrain.planning.pipeline_stages import stage_layers
from nanotrain.runtime.distributed import COLLECTIVE_TIMEOUT, World, from_first, start_ranks
from nanotrain.runtime.logging import log_once

DEVICE_TYPES = {"cuda"}
"""Where Megatron-Core runs. tests/megatron_cpu.py adds cpu once it has redirected Megatron's calls of torch.cuda."""
EVALUATED_AT_ONCE = 8
"""Micro-batches that evaluation puts into the pipeline together."""


class MegatronEngine(Engine):
    """One rank of a model spread by Megatron-Core. See `Engine` for the methods."""

    def __init__(self, config: EngineConfig, model: HybridModel, training: TrainingConfig | None = None) -> None:
        config = own_stages(config, model.config, training)
        require_supported(config, model.config, None if training is None else training.optimizer)
        world = start_ranks()
        check_layout(model.config, training or smallest_batch(config, world), config, world.size)
        set_threads(config.threads)
        self.device = choose_device(config.device)
        require_device(self.device, DEVICE_TYPES)
        dtype = choose_dtype(config.precision, self.device)
        if training is not None:
            require_addressable(config, model.config, training, self.device)
            require_saveable(config, model.config, dtype)
        self.model_config, self._layout = model.config, config.megatron
        self._start_parallel(config)
        choose_kernels({op: config.kernels.choices()[op] for op in OWN_KERNELS}, self.device)
        on_gpu = self.device.type == "cuda"
        if on_gpu and MAMBA in model.config.hybrid_layer_pattern:
            sizes = model.config
            use_tuned_mamba_ssm(sizes.mamba_head_dim, sizes.ssm_state_size, sizes.chunk_size, dtype)
        self._config = transformer_config(model.config, config, dtype, training=training is not None, on_gpu=on_gpu)
        self._root = build_root(model.config, config, self._config, on_gpu=on_gpu)
        self._model: torch.nn.Module = self._root
        self._optimizer: MegatronOptimizer | None = None
        self._clip = 0.0
        if training is None:
            self._root.eval().requires_grad_(False)
        else:
            self._build_optimizer(training, dtype)
        self._values = Parameters(self._root, self._optimizer, self.device, self._dp_cp_group)
        self._place = Place(
            model.config,
            stage_layers(model.config.num_hidden_layers, config.megatron),
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_rank(),
            config.megatron.tensor_parallel,
        )
        if not any(parameter.is_meta for parameter in model.parameters()):
            fill(self._place, model.state_dict(), self._values.assign)
        log_once(f"engine megatron: {self._describe()}, parameters in {str(dtype).removeprefix('torch.')}")

    def _start_parallel(self, config: EngineConfig) -> None:
        """Make Megatron's groups, once a process, and learn this rank's place."""
        megatron = config.megatron
        if not dist.is_initialized():  # one process: the groups have one rank each
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        sizes = (megatron.tensor_parallel, megatron.pipeline_parallel, megatron.context_parallel)
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(
                sizes[0],
                sizes[1],
                context_parallel_size=sizes[2],
                distributed_timeout_minutes=int(COLLECTIVE_TIMEOUT.total_seconds() // 60),
            )
            model_parallel_cuda_manual_seed(0)  # nothing here is random; some layers want the generators to exist
        assert sizes == (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_context_parallel_world_size(),
        ), "all engines of a process share one layout"
        self.dp_rank = parallel_state.get_data_parallel_rank()
        self.dp_size = parallel_state.get_data_parallel_world_size()
        self.num_devices = dist.get_world_size()
        self._tp_group = parallel_state.get_tensor_model_parallel_group()
        self._cp_group = parallel_state.get_context_parallel_group()
        self._pp_group = parallel_state.get_pipeline_model_parallel_group()
        self._dp_cp_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self._is_last_stage = parallel_state.is_pipeline_last_stage()
        self._split = SequenceSplit(
            megatron.context_parallel,
            parallel_state.get_context_parallel_rank(),
            megatron.tensor_parallel if megatron.sequence_parallel else 1,
        )

    def _describe(self) -> str:
        megatron = self._layout
        return (
            f"{self.device.type}, tensor {megatron.tensor_parallel} (sequence parallel: {megatron.sequence_parallel}) x"
            f" pipeline {megatron.pipeline_parallel} x context {megatron.context_parallel} x data {self.dp_size}"
        )

    def _build_optimizer(self, training: TrainingConfig, dtype: torch.dtype) -> None:
        sharded = self._layout.distributed_optimizer
        several = self._dp_cp_group.size() > 1
        self._model = DistributedDataParallel(
            self._config,
            DistributedDataParallelConfig(
                use_distributed_optimizer=sharded,
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=several,
                fp8_param_gather=bool(self._config.fp8_param),
            ),
            self._root,
        )
        optimizer = training.optimizer
        self._clip, self._weight_decay = optimizer.gradient_clip, optimizer.weight_decay
        self._optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=training.learning_rate,
                weight_decay=optimizer.weight_decay,
                adam_beta1=optimizer.beta1,
                adam_beta2=optimizer.beta2,
                adam_eps=optimizer.epsilon,
                clip_grad=optimizer.gradient_clip,
                use_distributed_optimizer=sharded,
                bf16=dtype is torch.bfloat16,
                params_dtype=dtype,
                fp8_recipe=self._config.fp8_recipe if self._config.fp8 else None,
            ),
            [self._model],
        )
        match_groups(self._optimizer)
        self._config.finalize_model_grads_func = finalize_model_grads
        if several:
            self._config.no_sync_func = self._model.no_sync
        self._model.train()

    def train_step(
        self, microbatches: Sequence[MicroBatch], loss_fn: LossFn, learning_rate: float, max_loss: float = math.inf
    ) -> StepResult:
        assert self._optimizer is not None, "this engine was built without `training`"
        for group in self._optimizer.param_groups:  # what Megatron's own scheduler would do
            group["lr"], group["weight_decay"] = learning_rate, self._weight_decay * group["wd_mult"]
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()
        counts = self._counts(microbatches, loss_fn)
        outputs = self._run(microbatches, counts, loss_fn, forward_only=False)
        totals = self._reduce(outputs, sum(counts))
        grad_norm, skipped = self._update(totals.loss, max_loss)
        return StepResult(totals.loss, grad_norm, totals.num_tokens, skipped, totals.metrics)

    @torch.no_grad()
    def _update(self, loss: float, max_loss: float) -> tuple[float, bool]:
        """Clip and update; return the norm of the gradient and whether the step was skipped."""
        assert self._optimizer is not None
        self._optimizer.prepare_grads()
        norm = self._optimizer.get_grad_norm()
        grad_norm = float(norm)
        if not (math.isfinite(loss) and loss <= max_loss and math.isfinite(grad_norm)):
            return grad_norm, True
        if self._clip > 0:
            parameters = self._optimizer.get_parameters()
            if parameters:
                clip_grad_by_total_norm_fp32(parameters, self._clip, norm)
        self._optimizer.step_with_ready_grads()
        return grad_norm, False

    def _counts(self, microbatches: Iterable[MicroBatch], loss_fn: LossFn) -> list[int]:
        """Return what counts in each whole micro-batch; one of the ranks that share a sequence counts it."""
        if self._split.context_rank > 0:
            return [0 for _ in microbatches]
        return [int(loss_fn.denominator(batch)) for batch in microbatches]

    def _run(
        self, microbatches: Sequence[MicroBatch], counts: Sequence[int], loss_fn: LossFn | None, *, forward_only: bool
    ) -> list[LossOutput | Tensor]:
        """Put micro-batches through the pipeline; return what each came to, on the last stage (elsewhere nothing)."""
        local = localize(microbatches, self._split)

        def step(batches: Iterator[tuple[LocalBatch, int]], model: torch.nn.Module) -> tuple[Any, Any]:
            batch, count = next(batches)
            output = model(batch.to(self.device), loss_fn)

            def unpack(tensor: Tensor) -> tuple[Tensor, Tensor, LossOutput | Tensor]:
                # The schedule sums the counts and divides gradients by them, once, after the reduction over ranks.
                tokens = torch.tensor(count, dtype=torch.int, device=self.device)
                return tensor, tokens, detached(output)

            # Cloned, because the schedule may scale what it gets in place.
            return (output.loss_sum.clone() if isinstance(output, LossOutput) else output), unpack

        rows, length = local[0].batch.input_ids.shape
        shapes = {tuple(item.batch.input_ids.shape) for item in local}
        assert len(shapes) == 1 or self._pp_group.size() == 1, f"pipeline stages exchange one shape, not {shapes}"
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(list(zip(local, counts, strict=True))),
            model=[self._model],
            num_microbatches=len(local),
            seq_length=length * self._split.context_parallel,
            micro_batch_size=rows,
            forward_only=forward_only,
        )

    def _reduce(self, outputs: Sequence[LossOutput | Tensor], count: int) -> Totals:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        return reduce_totals(outputs, count, self.device, Ranks(self._dp_cp_group, self._pp_group, last))

    @torch.no_grad()
    def evaluate(self, microbatches: Iterable[MicroBatch], loss_fn: LossFn) -> dict[str, float]:
        outputs: list[LossOutput | Tensor] = []
        count = 0
        with self._eval_mode():
            remaining = iter(microbatches)
            while together := list(islice(remaining, EVALUATED_AT_ONCE)):
                for _, alike in groupby(together, key=lambda batch: batch.input_ids.shape):
                    group = list(alike)
                    counts = self._counts(group, loss_fn)
                    count += sum(counts)
                    outputs += self._run(group, counts, loss_fn, forward_only=True)
        totals = self._reduce(outputs, count)
        return {**totals.metrics, "loss": totals.loss, "num_tokens": totals.num_tokens}

    @torch.no_grad()
    def hidden_states(self, microbatches: Sequence[MicroBatch]) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        with self._eval_mode():
            for _, alike in groupby(microbatches, key=lambda batch: batch.input_ids.shape):
                group = list(alike)
                outputs = self._run(group, [0] * len(group), None, forward_only=True)
                if self._is_last_stage:
                    found += [unpad(self._whole_rows(h), b) for h, b in zip(outputs, group, strict=True)]
                else:
                    found += [None] * len(group)
        return found

    def _whole_rows(self, hidden_states: Any) -> Tensor:
        """Return [B, S, D] from the positions of all context-parallel ranks."""
        if self._split.context_parallel == 1:
            return hidden_states
        parts = [torch.empty_like(hidden_states) for _ in range(self._split.context_parallel)]
        dist.all_gather(parts, hidden_states.contiguous(), group=self._cp_group)
        return self._split.join(parts)

    @contextmanager
    def head(self) -> Iterator[HeadWeight | None]:
        if not self._is_last_stage:
            yield None
            return
        head = self._root.head()
        yield HeadWeight(head.weight.detach(), head.vocab_shard)

    @torch.no_grad()
    def logprobs(self, batch: MicroBatch) -> Tensor:
        (hidden_states,) = self.hidden_states([batch])
        labels = batch.labels.to(self.device)
        if hidden_states is not None:
            head = self._root.head()
            scores = token_log_probabilities(hidden_states, head.weight, labels, vocab_shard=head.vocab_shard)
        else:
            scores = torch.empty(labels.shape, dtype=torch.float32, device=self.device)
        if self._pp_group.size() > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(scores, src=last, group=self._pp_group)
        return scores

    def init_weights(self, seed: int) -> None:
        initialise(self._place, seed, self._values.assign)

    def load_hf(self, folder: Path) -> None:
        load(self._place, folder, self._values.assign)

    def save_hf(
        self,
        folder: Path,
        *,
        dtype: torch.dtype | None = None,
        tokenizer_from: Path | None = None,
        provenance: Provenance | None = None,
    ) -> None:
        save_gathered(
            meta_tensors(self.model_config),
            self.model_config,
            folder,
            self._export().tensor,
            World(dist.get_rank(), dist.get_world_size()),
            dtype=dtype,
            tokenizer_from=tokenizer_from,
            provenance=provenance,
        )

    def first_difference(self, folder: Path) -> str | None:
        export, found = self._export(), None
        stored = dict(iterate_tensors(folder)) if dist.get_rank() == 0 else {}  # mapped files, not memory
        for name in tensor_shapes(self.model_config):
            tensor = export.tensor(name)
            if tensor is not None and found is None and not tensor.equal(stored[name]):
                found = name
        return from_first(found)

    def _export(self) -> Export:
        return Export(self._place, self._values.whole, has_first_copy=dist.get_rank(self._dp_cp_group) == 0)

    def snapshot_state(self) -> StateWriter:
        assert self._optimizer is not None, "only a training engine has a state to resume from"
        return snapshot(self._root, self._optimizer, self._dp_cp_group)

    def load_state(self, folder: Path) -> None:
        assert self._optimizer is not None, "only a training engine can resume"
        restore(self._root, self._optimizer, self._dp_cp_group, folder)

    @contextmanager
    def inference_model(self) -> Iterator[HybridModel]:
        raise UserError(
            "`engine.kind` (megatron) spreads the model over ranks, so no rank can sample from it or prune it; save it and"
            " run that stage with engine=torch."
        )
        yield

    @contextmanager
    def _eval_mode(self) -> Iterator[None]:
        training = self._model.training
        self._model.eval()
        try:
            yield
        finally:
            self._model.train(training)
