"""FSDP2: every rank keeps its rows of each weight, gradient and optimizer state, and gathers a layer when it runs.

Two kinds of groups. A layer's matrices are gathered in bf16 where autocast would round them to it anyway, and FP8 copies
are made of what was gathered; a Mamba layer has two such groups, one on either side of its scan. All else is in the root's
group, in fp32 as under autocast: embeddings, output head and the small vectors (norms, convolution, A_log, D, dt_bias).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from nanotrain.config.engine import EngineConfig
from nanotrain.config.errors import UserError
from nanotrain.config.training import ParameterDtype, StateDtype, TrainingConfig
from nanotrain.engines.parameters import global_norm, place_model
from nanotrain.engines.root import TrainingRoot
from nanotrain.engines.torch_engine import TorchEngine
from nanotrain.engines.torch_state import whole_tensor
from nanotrain.losses.base import LossFn
from nanotrain.model.batch import MicroBatch
from nanotrain.model.head import HeadWeight
from nanotrain.model.hybrid import HybridModel, build_meta_model
from nanotrain.model.mixers import MambaMixer


class Fsdp2Engine(TorchEngine):
    """A model divided over the ranks. Between calls every weight is this rank's rows of it."""

    _gathers_weights = True

    def _build_root(self, config: EngineConfig, training: TrainingConfig | None) -> TrainingRoot:
        _refuse_what_needs_whole_tensors(training)
        self._reduce_always = config.fsdp2.reduce_every_micro_batch
        on_meta = any(parameter.is_meta for parameter in self._model.parameters())
        if not on_meta:
            place_model(self._model, self.device, torch.float32)
        root = TrainingRoot(self._model)
        self._shard(root, config.fsdp2.reshard_after_forward)
        if on_meta:
            root.to_empty(device=self.device)
        return root

    def _shard(self, root: TrainingRoot, reshard_after_forward: bool) -> None:
        mesh = init_device_mesh(self.device.type, (self.dp_size,))
        products = MixedPrecisionPolicy(
            param_dtype=self._autocast_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for block in self._model.backbone.layers:
            for module in _matrix_modules(block.mixer):
                fully_shard(module, mesh=mesh, mp_policy=products, reshard_after_forward=reshard_after_forward)
        # The loss follows the forward pass at once, so the head would only be gathered a second time.
        fully_shard(
            root, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), reshard_after_forward=False
        )

    def _connect_replicas(self, training: TrainingConfig) -> None:
        del training  # FSDP2's own hooks add the gradients up

    def _rehearse(self, batch: MicroBatch, loss_fn: LossFn) -> None:
        del batch, loss_fn  # a layer's weights are whole only inside a step

    def _gradients_reduced(self, last: bool) -> AbstractContextManager[None]:
        assert isinstance(self._root, FSDPModule)
        self._root.set_requires_gradient_sync(last or self._reduce_always)
        return nullcontext()

    def _local_gradients(self) -> list[Tensor]:
        return [p.grad.to_local() for p in self._model.parameters() if p.grad is not None]

    def _gradient_norm(self) -> Tensor:
        square = global_norm(self._local_gradients()).square()
        dist.all_reduce(square)
        return square.sqrt()

    def _clip_gradients(self, norm: Tensor) -> None:
        factor = (self._clip / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grads_with_norm_
        for gradient in self._local_gradients():
            gradient.mul_(factor)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        with super()._evaluating():
            yield
        # Without a backward pass nothing else gives back what a forward pass gathered and kept.
        for module in self._root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @contextmanager
    def head(self) -> Iterator[HeadWeight]:
        # A copy of its own: the gathered storage comes and goes with every forward pass.
        yield HeadWeight(whole_tensor(self._model.output_weight()))

    @contextmanager
    def inference_model(self) -> Iterator[HybridModel]:
        whole = build_meta_model(self.model_config).to_empty(device=self.device)
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                whole.get_parameter(name).copy_(whole_tensor(parameter))
        yield whole.eval().requires_grad_(False)


def _matrix_modules(mixer: nn.Module) -> list[nn.Module]:
    """Return the modules that hold nothing but matrices; together they hold all of the mixer's."""
    return [mixer.in_proj, mixer.out_proj] if isinstance(mixer, MambaMixer) else [mixer]


def _refuse_what_needs_whole_tensors(training: TrainingConfig | None) -> None:
    start = "`engine.data_parallel` (fsdp2) divides every tensor over the ranks, and"
    if training is None:
        return
    optimizer, path = training.optimizer, "stage.training.optimizer"
    refused = {
        "in_backward": (optimizer.in_backward, "updates a tensor before its gradient is reduced", "false"),
        "state_dtype": (
            optimizer.state_dtype is not StateDtype.fp32,
            f"({optimizer.state_dtype.value}) would round by where the ranks' borders lie",
            "fp32",
        ),
        "parameter_dtype": (
            optimizer.parameter_dtype is not ParameterDtype.fp32,
            f"({optimizer.parameter_dtype.value}) rounds with noise that is keyed by whole tensors",
            "fp32",
        ),
    }
    for key, (asked, reason, instead) in refused.items():
        if asked:
            raise UserError(f"{start} `{path}.{key}` {reason}; set it to {instead}, or use data_parallel=ddp.")
