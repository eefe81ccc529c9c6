"""What data-parallel ranks add up: token counts before a step, losses and metrics after it."""

import torch
import torch.distributed as dist
from torch import Tensor

from nanotrain.config.engine import Device, EngineConfig, EngineKind
from nanotrain.config.errors import UserError
from nanotrain.config.parallel import DataParallel
from nanotrain.losses.base import LossOutput
from nanotrain.runtime.distributed import World


def require_ranks(config: EngineConfig, world: World) -> None:
    """Raise UserError where one process would ignore how several are to share the work, or ranks cannot share a GPU."""
    if world.size == 1 and config.kind is EngineKind.torch and config.data_parallel is not DataParallel.auto:
        raise UserError(
            f"`engine.data_parallel` ({config.data_parallel.value}) needs several ranks, and this is one process; start"
            " them with launch/torchrun.sh or torchrun, or set it to auto."
        )
    gpus = torch.cuda.device_count()
    if config.device is Device.cpu or not 0 < gpus < world.local_size:
        return
    divided = config.kind is EngineKind.torch and config.data_parallel is DataParallel.fsdp2
    if divided or config.kind is not EngineKind.torch:
        # Over gloo, which carries what such ranks exchange, a gather of tensors on a GPU ends the process (torch 2.11).
        key = "`engine.data_parallel` (fsdp2)" if divided else f"`engine.kind` ({config.kind.value})"
        raise UserError(
            f"{key} needs a GPU for each rank, and {world.local_size} ranks of this machine share {gpus}; start as many"
            " ranks as GPUs, all of which each rank must see, or use engine=torch with data_parallel=ddp."
        )


def sum_count(count: int, world: World) -> int:
    """Return the sum of `count` over all ranks; on the CPU, so that no GPU is waited for."""
    if world.size == 1:
        return count
    total = torch.tensor(count, dtype=torch.int64)
    dist.all_reduce(total)
    return int(total)


class LossSums:
    """Adds losses and metrics up in double precision, on the device, so that nothing waits for a micro-batch."""

    def __init__(self) -> None:
        self._loss: Tensor | None = None
        self._metrics: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, output: LossOutput) -> None:
        """Add one micro-batch's."""
        loss = output.loss_sum.detach().double()
        self._loss = loss if self._loss is None else self._loss + loss
        for name, (total, count) in output.metrics.items():
            total, count = total.detach().double(), count.detach().double()
            if name in self._metrics:
                total, count = total + self._metrics[name][0], count + self._metrics[name][1]
            self._metrics[name] = (total, count)

    def reduce(self, world: World) -> None:
        """Add up over the ranks, once; every rank has added the same metrics."""
        if world.size == 1 or self._loss is None:
            return
        names = sorted(self._metrics)
        packed = torch.stack([self._loss, *(value for name in names for value in self._metrics[name])])
        dist.all_reduce(packed)
        self._loss = packed[0]
        self._metrics = {name: (packed[2 * i + 1], packed[2 * i + 2]) for i, name in enumerate(names)}

    @property
    def loss_sum(self) -> float:
        return 0.0 if self._loss is None else float(self._loss)

    def metrics(self) -> dict[str, float]:
        """Return sum over count of each metric, leaving out those that counted nothing."""
        return {name: float(total / count) for name, (total, count) in self._metrics.items() if float(count)}
