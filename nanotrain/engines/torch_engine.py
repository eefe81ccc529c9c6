"""Plain torch in one process: products in fp32, bf16 autocast or FP8; weights and states as the optimizer section says."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_map_only

from nanotrain.checkpoint.hf_folder import load_state_dict, save_model
from nanotrain.checkpoint.provenance import Provenance
from nanotrain.config.engine import EngineConfig
from nanotrain.config.training import TrainingConfig
from nanotrain.engines.base import Engine, StateWriter, StepResult
from nanotrain.engines.optimizer_in_backward import OptimizerInBackward
from nanotrain.engines.out_of_memory import OutOfMemoryAdvice
from nanotrain.engines.parameters import global_norm, parameter_dtype, place_model, weight_copies_of
from nanotrain.engines.precision import apply_precision
from nanotrain.engines.rehearsal import rehearse
from nanotrain.engines.root import TrainingRoot
from nanotrain.engines.torch_device import prepare_device
from nanotrain.losses.base import LossFn, LossOutput
from nanotrain.model.batch import MicroBatch
from nanotrain.model.head import HeadWeight
from nanotrain.model.hybrid import HybridModel
from nanotrain.ops.backends import choose_kernels
from nanotrain.ops.linear_cross_entropy import token_log_probabilities
from nanotrain.optim.adamw import build_adamw
from nanotrain.optim.low_precision_adamw import LowPrecisionAdamW

MODEL_FILE, OPTIMIZER_FILE, RANDOM_FILE = "model.safetensors", "optimizer.pt", "random.pt"


class TorchEngine(Engine):
    """One process, one device. See `Engine` for the methods."""

    dp_rank = 0
    dp_size = 1
    num_devices = 1

    def __init__(self, config: EngineConfig, model: HybridModel, training: TrainingConfig | None = None) -> None:
        self.device, self._autocast_dtype = prepare_device(config)
        self.model_config = model.config
        choose_kernels(config.kernels.choices(), self.device)
        self._weight_copies = apply_precision(model, config, self.device, self._autocast_dtype)
        self._advice = OutOfMemoryAdvice(config, model.config, training, self.device)
        self._optimizer: torch.optim.AdamW | LowPrecisionAdamW | None = None
        self._in_backward: OptimizerInBackward | None = None
        self._rehearsed = False
        with self._advice:
            self._model = place_model(model, self.device, parameter_dtype(training, self._autocast_dtype))
            self._root = TrainingRoot(self._model)
            if training is None:
                self._model.eval().requires_grad_(False)
                return
            training.validate_batch("stage.training", self.dp_size)
            self._model.train()
            self._model.checkpointed_kinds = config.activation_checkpointing.layer_kinds()
            self._clip = training.optimizer.gradient_clip
            self._optimizer = build_adamw(model.named_parameters(), training.optimizer, training.learning_rate)
        if training.optimizer.in_backward:
            assert isinstance(self._optimizer, LowPrecisionAdamW)
            self._in_backward = OptimizerInBackward(self._optimizer, weight_copies_of(self._model))

    def train_step(self, microbatches: Sequence[MicroBatch], loss_fn: LossFn, learning_rate: float) -> StepResult:
        assert self._optimizer is not None, "this engine was built without `training`"
        assert self._in_backward is None or len(microbatches) == 1, (
            "the optimizer in the backward pass cannot accumulate"
        )
        # Counted where the loader left the labels, before the first forward: the device is not waited for.
        num_tokens = sum(int(loss_fn.denominator(batch)) for batch in microbatches)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        sums = _Sums()
        with self._advice:
            if not self._rehearsed:
                rehearse(self._model, microbatches[0].to(self.device), loss_fn, self._optimizer, self._autocast)
                self._drop_weight_copies()
                self._rehearsed = True
            for batch in microbatches:
                with self._autocast():
                    output = self._root(batch.to(self.device), loss_fn)
                if self._in_backward is not None:
                    self._in_backward.begin(output.loss_sum)
                (output.loss_sum / max(num_tokens, 1)).backward()
                sums.add(output)
            if self._in_backward is not None:
                grad_norm, skipped = self._in_backward.finish()
                loss = sums.loss_sum / max(num_tokens, 1)
            else:
                norm = global_norm([p.grad for p in self._model.parameters() if p.grad is not None])
                loss = sums.loss_sum / max(num_tokens, 1)  # the one wait for the device
                grad_norm, skipped = self._update(loss, norm)
        self._drop_weight_copies()
        return StepResult(loss, grad_norm, num_tokens, skipped, sums.metrics())

    def _update(self, loss: float, norm: Tensor) -> tuple[float, bool]:
        """Clip to gradients of `norm` [] and update; return the norm and whether the step was skipped."""
        assert self._optimizer is not None
        grad_norm = float(norm)
        skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
        if not skipped:
            if self._clip > 0:
                torch.nn.utils.clip_grads_with_norm_(self._model.parameters(), self._clip, norm)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return grad_norm, skipped

    @torch.no_grad()
    def evaluate(self, microbatches: Iterable[MicroBatch], loss_fn: LossFn) -> dict[str, float]:
        sums, num_tokens = _Sums(), 0
        with self._evaluating():
            for batch in microbatches:
                num_tokens += int(loss_fn.denominator(batch))
                sums.add(self._root(batch.to(self.device), loss_fn))
        return {**sums.metrics(), "loss": sums.loss_sum / max(num_tokens, 1), "num_tokens": num_tokens}

    @torch.no_grad()
    def hidden_states(self, microbatches: Sequence[MicroBatch]) -> list[Tensor | None]:
        with self._evaluating():
            return [self._root(batch.to(self.device)) for batch in microbatches]

    @contextmanager
    def head(self) -> Iterator[HeadWeight]:
        yield HeadWeight(self._model.output_weight().detach())

    @torch.no_grad()
    def logprobs(self, batch: MicroBatch) -> Tensor:
        batch = batch.to(self.device)
        with self._evaluating():
            return token_log_probabilities(self._root(batch), self._model.output_weight(), batch.labels)

    @contextmanager
    def inference_model(self) -> Iterator[HybridModel]:
        with self._eval_mode():
            yield self._model

    def init_weights(self, seed: int) -> None:
        self._model.init_weights(seed)
        self._drop_weight_copies()

    def load_hf(self, folder: Path) -> None:
        self._model.load_state_dict(load_state_dict(folder))

    def save_hf(
        self,
        folder: Path,
        *,
        dtype: torch.dtype | None = None,
        tokenizer_from: Path | None = None,
        provenance: Provenance | None = None,
    ) -> None:
        save_model(self._model, folder, dtype=dtype, tokenizer_from=tokenizer_from, provenance=provenance)

    def snapshot_state(self) -> StateWriter:
        assert self._optimizer is not None, "only a training engine has a state to resume from"
        weights = {name: _host_copy(p.detach()) for name, p in self._model.named_parameters()}
        optimizer = tree_map_only(Tensor, _host_copy, self._optimizer.state_dict())
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)

        def write(folder: Path) -> None:
            save_file(weights, folder / MODEL_FILE)
            torch.save(optimizer, folder / OPTIMIZER_FILE)
            torch.save(random, folder / RANDOM_FILE)

        return write

    def load_state(self, folder: Path) -> None:
        assert self._optimizer is not None, "only a training engine can resume"
        stored = load_file(folder / MODEL_FILE)
        parameters = dict(self._model.named_parameters())
        assert stored.keys() == parameters.keys(), "the state is of another architecture"
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(stored[name])
        self._optimizer.load_state_dict(torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True))
        random = torch.load(folder / RANDOM_FILE, map_location="cpu", weights_only=True)
        torch.set_rng_state(random["cpu"])
        if self.device.type == "cuda" and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self.device)

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


def _host_copy(tensor: Tensor) -> Tensor:
    """Return a contiguous copy in host memory, of its own even where the tensor is there already."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor)


class _Sums:
    """Adds losses and metrics up in double precision, on the device, so that nothing waits for a micro-batch."""

    def __init__(self) -> None:
        self._loss: Tensor | None = None
        self._metrics: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, output: LossOutput) -> None:
        loss = output.loss_sum.detach().double()
        self._loss = loss if self._loss is None else self._loss + loss
        for name, (total, count) in output.metrics.items():
            total, count = total.detach().double(), count.detach().double()
            if name in self._metrics:
                total, count = total + self._metrics[name][0], count + self._metrics[name][1]
            self._metrics[name] = (total, count)

    @property
    def loss_sum(self) -> float:
        return 0.0 if self._loss is None else float(self._loss)

    def metrics(self) -> dict[str, float]:
        """Return sum over count of each metric, leaving out those that counted nothing."""
        return {name: float(total / count) for name, (total, count) in self._metrics.items() if float(count)}
