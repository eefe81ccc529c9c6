"""Plain torch, in one process or as replicas (DDP): products in fp32, bf16 autocast or FP8.

Weights and states are as the optimizer section says. FSDP2 is engines/torch_parallel.py.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nanotrain.checkpoint.hf_folder import iterate_tensors
from nanotrain.checkpoint.host_snapshot import HostSnapshot
from nanotrain.checkpoint.provenance import Provenance
from nanotrain.config.engine import EngineConfig
from nanotrain.config.errors import UserError
from nanotrain.config.training import TrainingConfig
from nanotrain.engines.base import StateWriter, StepResult
from nanotrain.engines.collective_waits import CollectiveWaits
from nanotrain.engines.data_parallel import LossSums, sum_count
from nanotrain.engines.optimizer_in_backward import OptimizerInBackward
from nanotrain.engines.out_of_memory import OutOfMemoryAdvice
from nanotrain.engines.parameters import global_norm, parameter_dtype, place_model, weight_copies_of
from nanotrain.engines.precision import apply_precision
from nanotrain.engines.rehearsal import rehearse
from nanotrain.engines.root import TrainingRoot
from nanotrain.engines.spread_model import RootEngine, save_gathered
from nanotrain.engines.torch_device import prepare_device
from nanotrain.engines.torch_state import copy_rows_of, local_rows, restore, snapshot, whole_tensor
from nanotrain.losses.base import LossFn
from nanotrain.losses.language_modeling import CrossEntropy
from nanotrain.model.batch import MicroBatch
from nanotrain.model.head import HeadWeight
from nanotrain.model.hybrid import HybridModel
from nanotrain.model.initialization import init_weights
from nanotrain.ops.backends import choose_kernels
from nanotrain.optim.adamw import build_adamw
from nanotrain.optim.low_precision_adamw import LowPrecisionAdamW
from nanotrain.runtime.distributed import World, from_all


class TorchEngine(RootEngine):
    """A whole model on this rank's device; several ranks average their gradients. See `Engine` for the methods."""

    _gathers_weights = False
    """Whether a weight is whole only while its layer runs."""

    def __init__(
        self,
        config: EngineConfig,
        model: HybridModel,
        training: TrainingConfig | None = None,
        world: World | None = None,
    ) -> None:
        """Build as `build_engine` says; `world` = the ranks that share the batches, None = this process alone."""
        self._world = world or World()
        self.dp_rank, self.dp_size = self._world.rank, self._world.size
        self.num_devices = self._world.size
        self.device, self._autocast_dtype = prepare_device(config)
        self._host = HostSnapshot(self.device)
        self.model_config = model.config
        choose_kernels(config.kernels.choices(), self.device)
        self._weight_copies = apply_precision(
            model, config, self.device, self._autocast_dtype, gathered=self._gathers_weights
        )
        self._advice = OutOfMemoryAdvice(config, model.config, training, self.device)
        self._optimizer: torch.optim.AdamW | LowPrecisionAdamW | None = None
        self._in_backward: OptimizerInBackward | None = None
        self._rehearsed = False
        self._waits = CollectiveWaits(None, self.device)
        with self._advice:
            self._model = model
            self._root = self._build_root(config, training)
            self._trained: nn.Module = self._root
            """What a training step calls; DDP around the root where there are replicas."""
            if training is None:
                self._model.eval().requires_grad_(False)
                return
            training.validate_batch("stage.training", self.dp_size)
            self._model.train()
            self._model.checkpointed_kinds = config.activation_checkpointing.layer_kinds()
            self._clip = training.optimizer.gradient_clip
            self._optimizer = build_adamw(model.named_parameters(), training.optimizer, training.learning_rate)
            self._connect_replicas(training)
        if training.optimizer.in_backward:
            assert isinstance(self._optimizer, LowPrecisionAdamW)
            self._in_backward = OptimizerInBackward(self._optimizer, weight_copies_of(self._model))

    def _build_root(self, config: EngineConfig, training: TrainingConfig | None) -> TrainingRoot:
        """Return the root module with the model where it is to be."""
        del config
        return TrainingRoot(place_model(self._model, self.device, parameter_dtype(training, self._autocast_dtype)))

    def _connect_replicas(self, training: TrainingConfig) -> None:
        if self.dp_size == 1:
            return
        if training.optimizer.in_backward:
            raise UserError(
                "`stage.training.optimizer.in_backward` updates a tensor before the ranks have added up its gradients, so"
                " it is for one process only; set it to false, or start one process."
            )
        # Every rank draws or reads the same weights, so none are sent around.
        self._trained = DistributedDataParallel(self._root, gradient_as_bucket_view=True, init_sync=False)
        # DDP orders its buckets anew after the first backward pass, and with more than two ranks the order of a sum
        # depends on its place in a bucket: without this the first step of a resumed run would round differently.
        shape = (training.micro_batch_size, training.sequence_length)
        ids = torch.zeros(shape, dtype=torch.int64, device=self.device)
        with self._autocast():
            output = self._trained(MicroBatch(ids, ids), CrossEntropy())
        output.loss_sum.backward()
        self._trained.zero_grad(set_to_none=True)
        self._drop_weight_copies()
        self._waits = CollectiveWaits(self._trained, self.device)

    def train_step(
        self,
        microbatches: Sequence[MicroBatch],
        loss_fn: LossFn,
        learning_rate: float,
        max_loss: float = math.inf,
    ) -> StepResult:
        assert self._optimizer is not None, "this engine was built without `training`"
        assert self._in_backward is None or len(microbatches) == 1, (
            "the optimizer in the backward pass cannot accumulate"
        )
        # Counted where the loader left the labels, before the first forward: the device is not waited for.
        count = sum(int(loss_fn.denominator(batch)) for batch in microbatches)
        with self._waits.on_host():
            num_tokens = sum_count(count, self._world)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        sums = LossSums()
        with self._advice:
            if not self._rehearsed:
                self._rehearse(microbatches[0].to(self.device), loss_fn)
                self._rehearsed = True
            for number, batch in enumerate(microbatches, start=1):
                with self._gradients_reduced(number == len(microbatches)):
                    with self._autocast():
                        output = self._trained(batch.to(self.device), loss_fn)
                    if self._in_backward is not None:
                        self._host.hold_updates()
                        self._in_backward.begin(output.loss_sum)
                    # Ranks average their gradients, hence the factor.
                    (output.loss_sum * self.dp_size / max(num_tokens, 1)).backward()
                sums.add(output)
            with self._waits.on_device():
                sums.reduce(self._world)
            if self._in_backward is not None:
                grad_norm, skipped = self._in_backward.finish()
                loss = sums.loss_sum / max(num_tokens, 1)
            else:
                norm = self._gradient_norm()
                loss = sums.loss_sum / max(num_tokens, 1)  # the one wait for the device
                grad_norm, skipped = self._update(loss, norm, max_loss)
        self._drop_weight_copies()
        self.communication_seconds = self._waits.take()
        return StepResult(loss, grad_norm, num_tokens, skipped, sums.metrics())

    def _rehearse(self, batch: MicroBatch, loss_fn: LossFn) -> None:
        """Compile the kernels of a step side by side before the first one."""
        assert self._optimizer is not None
        rehearse(self._model, batch, loss_fn, self._optimizer, self._autocast)
        self._drop_weight_copies()

    def _update(self, loss: float, norm: Tensor, max_loss: float) -> tuple[float, bool]:
        """Clip to gradients of `norm` [] and update; return the norm and whether the step was skipped."""
        assert self._optimizer is not None
        grad_norm = float(norm)
        skipped = not (math.isfinite(loss) and loss <= max_loss and math.isfinite(grad_norm))
        if not skipped:
            if self._clip > 0:
                self._clip_gradients(norm)
            self._host.hold_updates()
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return grad_norm, skipped

    def _gradients_reduced(self, last: bool) -> AbstractContextManager[None]:
        """Return the context of one micro-batch; ranks add up their gradients in the last one's backward pass."""
        if isinstance(self._trained, DistributedDataParallel) and not last:
            return self._trained.no_sync()
        return nullcontext()

    def _gradient_norm(self) -> Tensor:
        """Return the global L2 norm [] fp32, the same on every rank."""
        return global_norm([p.grad for p in self._model.parameters() if p.grad is not None])

    def _clip_gradients(self, norm: Tensor) -> None:
        torch.nn.utils.clip_grads_with_norm_(self._model.parameters(), self._clip, norm)

    def _forward(self, batch: MicroBatch, *arguments: Any) -> Any:
        return self._root(batch, *arguments)

    @contextmanager
    def head(self) -> Iterator[HeadWeight]:
        yield HeadWeight(self._model.output_weight().detach())

    @contextmanager
    def inference_model(self) -> Iterator[HybridModel]:
        with self._eval_mode():
            yield self._model

    def init_weights(self, seed: int) -> None:
        init_weights(self._model, self.model_config, seed, copy_rows_of)
        self._drop_weight_copies()

    def load_hf(self, folder: Path) -> None:
        parameters = dict(self._model.named_parameters())
        with torch.no_grad():
            for name, tensor in iterate_tensors(folder):
                copy_rows_of(parameters[name], tensor)
        self._drop_weight_copies()

    def save_hf(
        self,
        folder: Path,
        *,
        dtype: torch.dtype | None = None,
        tokenizer_from: Path | None = None,
        provenance: Provenance | None = None,
    ) -> None:
        parameters = dict(self._model.named_parameters())
        save_gathered(
            parameters,
            self.model_config,
            folder,
            lambda name: whole_tensor(parameters[name]),
            self._world,
            dtype=dtype,
            tokenizer_from=tokenizer_from,
            provenance=provenance,
        )

    def first_difference(self, folder: Path) -> str | None:
        found = None
        parameters = dict(self._model.named_parameters())
        for name, tensor in iterate_tensors(folder):
            rows, first = local_rows(parameters[name])
            stored = tensor[first : first + rows.shape[0]]
            if found is None and not rows.cpu().equal(stored):
                found = name
        return next((name for name in from_all(found) if name is not None), None) if self.dp_size > 1 else found

    def snapshot_state(self) -> StateWriter:
        assert self._optimizer is not None, "only a training engine has a state to resume from"
        return snapshot(self._model, self._optimizer, self._world, self.device, self._host)

    def load_state(self, folder: Path) -> None:
        assert self._optimizer is not None, "only a training engine can resume"
        restore(folder, self._model, self._optimizer, self._world, self.device)
        self._drop_weight_copies()

    def _drop_weight_copies(self) -> None:
        """Drop the FP8 and bf16 copies, which are of the weights before they changed."""
        for copy in self._weight_copies:
            copy.drop()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self._autocast_dtype, enabled=self._autocast_dtype is not None)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        with self._eval_mode(), self._autocast():
            yield

    @contextmanager
    def _eval_mode(self) -> Iterator[None]:
        training = self._model.training
        self._model.eval()
        try:
            yield
        finally:
            self._model.train(training)
