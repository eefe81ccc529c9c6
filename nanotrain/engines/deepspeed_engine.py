"""DeepSpeed's ZeRO: optimizer states, gradients or weights divided over the ranks; states on the CPU if asked for.

DeepSpeed owns gradients and step; the loss, its one division and the skipping of steps are as in every engine.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from nanotrain.checkpoint.hf_folder import iterate_tensors
from nanotrain.checkpoint.provenance import Provenance
from nanotrain.config.engine import FP8_PRECISIONS, EngineConfig
from nanotrain.config.errors import UserError
from nanotrain.config.model import ModelConfig
from nanotrain.config.training import ParameterDtype, StateDtype, TrainingConfig
from nanotrain.engines.base import StateWriter, StepResult
from nanotrain.engines.data_parallel import LossSums, sum_count
from nanotrain.engines.out_of_memory import OutOfMemoryAdvice
from nanotrain.engines.parameters import place_model
from nanotrain.engines.precision import apply_precision
from nanotrain.engines.root import TrainingRoot
from nanotrain.engines.spread_model import RootEngine, meta_tensors, save_gathered
from nanotrain.engines.torch_device import prepare_device
from nanotrain.engines.zero_partitions import MasterAdamW, ZeroPartitions
from nanotrain.losses.base import LossFn
from nanotrain.model.batch import MicroBatch
from nanotrain.model.head import HeadWeight
from nanotrain.model.hybrid import HybridModel, build_meta_model
from nanotrain.model.initialization import init_weights
from nanotrain.ops.backends import choose_kernels
from nanotrain.optim.adamw import decay_groups
from nanotrain.planning.parameters import count_parameters, tensor_shapes
from nanotrain.runtime.distributed import World, from_all

BUCKET_VALUES = 500_000_000
"""DeepSpeed's own default of values reduced or gathered at a time; smaller models need less."""


class DeepSpeedEngine(RootEngine):
    """Trains under ZeRO-1, 2 or 3; without `training` it holds a ZeRO-3 model that only runs forward."""

    def __init__(self, config: EngineConfig, model: HybridModel, training: TrainingConfig | None, world: World) -> None:
        """Build as `build_engine` says; without `training` the stage must be 3."""
        _refuse(config, training)
        self._world = world
        self.dp_rank, self.dp_size, self.num_devices = world.rank, world.size, world.size
        self.device, self._autocast_dtype = prepare_device(config)
        self.model_config = model.config
        choose_kernels(config.kernels.choices(), self.device)
        for copy in apply_precision(model, config, self.device, None):
            copy.drop()
        self._model = place_model(model, self.device, torch.float32)
        self._model.checkpointed_kinds = config.activation_checkpointing.layer_kinds()
        self._advice = OutOfMemoryAdvice(config, model.config, training, self.device)
        self._optimizer: MasterAdamW | None = None
        if training is None:
            self._model.eval().requires_grad_(False)
        else:
            training.validate_batch("stage.training", self.dp_size)
            self._model.train()
            groups = decay_groups(self._model.named_parameters(), training.optimizer)
            for group in groups:
                group["params"] = [parameter for _, parameter in group["params"]]
            betas = (training.optimizer.beta1, training.optimizer.beta2)
            self._optimizer = MasterAdamW(
                groups, lr=training.learning_rate, betas=betas, eps=training.optimizer.epsilon, fused=True
            )
        self._start(_settings(config, training, world, self._autocast_dtype, model.config), config)
        self._partitions = ZeroPartitions(self._model, self._zero.optimizer, config.deepspeed.zero_stage, world)

    def _start(self, settings: dict[str, Any], config: EngineConfig) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # On the CPU DeepSpeed would compile its own collectives for minutes; gloo's serve as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if not dist.is_initialized():  # DeepSpeed needs a group, also of one
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        chosen = deepspeed.get_accelerator().device_name()
        if chosen != self.device.type:
            raise UserError(
                f"`engine.device` ({config.device.value}) came out as {self.device.type}, but DeepSpeed chose {chosen}; set"
                f" the environment variable DS_ACCELERATOR={self.device.type}."
            )
        root = TrainingRoot(self._model)
        with self._advice:
            self._zero: Any = deepspeed.initialize(
                model=root, optimizer=self._optimizer, config=settings, dist_init_required=False
            )[0]
        if config.deepspeed.zero_stage == 3:
            # The root reads the head's weight itself. ZeRO-3 would find that out in the midst of a forward pass, after
            # it has recorded the order of all weights, and refuse the next one.
            deepspeed.zero.register_external_parameter(root, self._model.output_weight())

    def train_step(
        self,
        microbatches: Sequence[MicroBatch],
        loss_fn: LossFn,
        learning_rate: float,
        max_loss: float = math.inf,
    ) -> StepResult:
        assert self._optimizer is not None, "this engine was built without `training`"
        assert len(microbatches) == self._zero.gradient_accumulation_steps(), "DeepSpeed counts micro-batches itself"
        num_tokens = sum_count(sum(int(loss_fn.denominator(batch)) for batch in microbatches), self._world)
        for group in self._zero.optimizer.param_groups:
            group["lr"] = learning_rate
        sums = LossSums()
        with self._advice:
            for number, batch in enumerate(microbatches, start=1):
                output = self._zero(batch.to(self.device), loss_fn)
                sums.add(output)
                # Ranks average their gradients, hence dp_size; DeepSpeed must not divide by the micro-batches.
                self._zero.backward(output.loss_sum * self.dp_size / max(num_tokens, 1), scale_wrt_gas=False)
                if number == len(microbatches):
                    sums.reduce(self._world)
                    small = sums.loss_sum / max(num_tokens, 1) <= max_loss
                    self._optimizer.allowed = _WhenFinite(sums.loss_sum if small else math.inf, self._zero.optimizer)
                self._zero.step()
        grad_norm = float(self._zero.optimizer._global_grad_norm)
        loss = sums.loss_sum / max(num_tokens, 1)
        skipped = not (math.isfinite(loss) and loss <= max_loss and math.isfinite(grad_norm))
        return StepResult(loss, grad_norm, num_tokens, skipped, sums.metrics())

    def _forward(self, batch: MicroBatch, *arguments: Any) -> Any:
        return self._zero(batch, *arguments)

    @contextmanager
    def head(self) -> Iterator[HeadWeight]:
        name = "backbone.embeddings.weight" if self.model_config.tie_word_embeddings else "lm_head.weight"
        yield HeadWeight(self._partitions.whole(name))

    @contextmanager
    def inference_model(self) -> Iterator[HybridModel]:
        whole = build_meta_model(self.model_config).to_empty(device=self.device)
        with torch.no_grad():
            for name in tensor_shapes(self.model_config):
                whole.get_parameter(name).copy_(self._partitions.whole(name))
        yield whole.eval().requires_grad_(False)

    def init_weights(self, seed: int) -> None:
        shapes = tensor_shapes(self.model_config)
        init_weights(self._model, self.model_config, seed, self._partitions.assign, shapes)
        self._partitions.refresh(self._optimizer is not None)

    @torch.no_grad()
    def load_hf(self, folder: Path) -> None:
        parameters = dict(self._model.named_parameters())
        for name, tensor in iterate_tensors(folder):
            self._partitions.assign(parameters[name], tensor)
        self._partitions.refresh(self._optimizer is not None)

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
            self._partitions.whole,
            self._world,
            dtype=dtype,
            tokenizer_from=tokenizer_from,
            provenance=provenance,
        )

    def first_difference(self, folder: Path) -> str | None:
        found = None
        for name, tensor in iterate_tensors(folder):
            if found is None and not self._partitions.equals(name, tensor):
                found = name
        return next((name for name in from_all(found) if name is not None), None)

    def snapshot_state(self) -> StateWriter:
        assert self._optimizer is not None, "only a training engine has a state to resume from"
        return self._partitions.snapshot(self.device)

    def load_state(self, folder: Path) -> None:
        assert self._optimizer is not None, "only a training engine can resume"
        self._partitions.restore(folder, self.device)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self._model.training
        self._zero.eval()
        try:
            yield
        finally:
            self._zero.train(training)


class _WhenFinite:
    """Whether the step at hand may change anything; asked after ZeRO computed the norm of its gradient."""

    def __init__(self, loss_sum: float, zero_optimizer: Any) -> None:
        self._loss_sum, self._zero_optimizer = loss_sum, zero_optimizer

    def __call__(self) -> bool:
        return math.isfinite(self._loss_sum) and math.isfinite(float(self._zero_optimizer._global_grad_norm))


def _settings(
    config: EngineConfig,
    training: TrainingConfig | None,
    world: World,
    autocast_dtype: torch.dtype | None,
    model: ModelConfig,
) -> dict[str, Any]:
    """Return DeepSpeed's own configuration."""
    bucket = min(BUCKET_VALUES, count_parameters(model))
    zero: dict[str, Any] = {
        "stage": config.deepspeed.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        # Norms and convolutions stay whole, every matrix is divided.
        "stage3_param_persistence_threshold": model.conv_channels * model.conv_kernel,
    }
    if dist.is_initialized() and dist.get_backend() == "gloo":
        zero["stage3_allgather_sequential"] = True  # or several gathers at once return wrong values (decision 0001)
    if config.deepspeed.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1 if training is None else training.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0 if training is None else training.optimizer.gradient_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW is as fast on a CPU, and nothing is compiled
        "steps_per_print": None,
    }
    if training is not None:
        settings["gradient_accumulation_steps"] = training.global_batch_size // (training.micro_batch_size * world.size)
    if autocast_dtype is not None:
        settings["torch_autocast"] = {
            "enabled": True,
            "dtype": str(autocast_dtype).removeprefix("torch."),
            "lower_precision_safe_modules": [],  # gradients are reduced in fp32, as in every engine
        }
    return settings


def _refuse(config: EngineConfig, training: TrainingConfig | None) -> None:
    start = "`engine.kind` (deepspeed) flattens weights and states into fp32 buffers, and"
    if config.precision in FP8_PRECISIONS:
        raise UserError(f"{start} `engine.precision` ({config.precision.value}) needs engine=torch; use bf16.")
    if training is None:
        return
    optimizer = training.optimizer
    refused = {
        "in_backward": (optimizer.in_backward, "false"),
        "state_dtype": (optimizer.state_dtype is not StateDtype.fp32, "fp32"),
        "parameter_dtype": (optimizer.parameter_dtype is not ParameterDtype.fp32, "fp32"),
    }
    for key, (asked, instead) in refused.items():
        if asked:
            raise UserError(
                f"{start} `stage.training.optimizer.{key}` works on single tensors; set it to {instead}, or use"
                " engine=torch."
            )
