"""Weights of a Megatron rank from and to NemotronH's tensors, one parameter at a time: no rank ever holds a whole copy."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanotrain.checkpoint.hf_folder import open_checkpoint
from nanotrain.config.model import ModelConfig
from nanotrain.engines.megatron_names import (
    Source,
    in_file_order,
    ranges_of,
    shard_shape,
    stage_sources,
    to_hf,
    to_megatron,
)
from nanotrain.model.initialization import initial_value
from nanotrain.planning.parameters import tensor_shapes

Assign = Callable[[str, Tensor], None]
"""(name of a parameter of this rank, its value) sets it."""
Whole = Callable[[str], Tensor]
"""Name of a parameter of this rank -> its fp32 value on the CPU; collective over data-parallel ranks."""


@dataclass(frozen=True)
class Place:
    """One rank among those of its kind; ranks count tensor-parallel first, pipeline-parallel last."""

    config: ModelConfig
    stages: Sequence[range]
    stage: int
    tp_rank: int
    tp_size: int

    def sources(self, stage: int | None = None) -> dict[str, Source]:
        """Return this stage's parameters, or those of another one."""
        return stage_sources(self.config, self.stages[self.stage if stage is None else stage], fused_norms=True)

    def first_rank(self, stage: int, tp_rank: int) -> int:
        """Return the first of the ranks with the same part of the model."""
        return stage * (dist.get_world_size() // len(self.stages)) + tp_rank


def initialise(place: Place, seed: int, assign: Assign) -> None:
    """Draw this rank's parameters: those that a whole model draws from the same seed."""
    shapes = tensor_shapes(place.config)

    def fill(item: tuple[str, Source]) -> None:
        name, source = item
        drawn = {hf: initial_value(hf, shapes[hf], place.config, seed) for hf in source.hf_names}
        assign(name, _part(place, source, drawn))

    with ThreadPoolExecutor(min(torch.get_num_threads(), 16)) as pool:
        for _ in pool.map(fill, place.sources().items()):
            pass


def fill(place: Place, tensors: dict[str, Tensor], assign: Assign) -> None:
    """Set this rank's parameters from the tensors of a whole model."""
    for name, source in place.sources().items():
        assign(name, _part(place, source, tensors))


def _part(place: Place, source: Source, tensors: dict[str, Tensor]) -> Tensor:
    return to_megatron(place.config, source, ranges_of(tensors), tp_rank=place.tp_rank, tp_size=place.tp_size)


def load(place: Place, folder: Path, assign: Assign) -> None:
    """Set this rank's parameters from a checkpoint folder, reading no more of it than they are.

    Raises:
        UserError: the folder holds another architecture, or is not whole.
    """
    with open_checkpoint(folder) as checkpoint:
        for name, source in in_file_order(place.sources(), checkpoint.stored_names):
            part = to_megatron(place.config, source, checkpoint.read, tp_rank=place.tp_rank, tp_size=place.tp_size)
            assign(name, part)


class Export:
    """Brings the tensors of a checkpoint to the first rank, one after the other; every rank asks for them in one order."""

    def __init__(self, place: Place, whole: Whole, *, has_first_copy: bool) -> None:
        """
        Args:
            place: this rank.
            whole: gives this rank's part of a parameter.
            has_first_copy: whether this is the first of the ranks with the same part of the model, which sends it.
        """
        self._place, self._whole, self._has_first_copy = place, whole, has_first_copy
        self._owners = {
            hf: (stage, name, source)
            for stage in range(len(place.stages))
            for name, source in place.sources(stage).items()
            for hf in source.hf_names
        }
        self._waiting: dict[str, Tensor] = {}

    def tensor(self, hf_name: str) -> Tensor | None:
        """Return a whole tensor, fp32 on the CPU, on the first rank; None elsewhere."""
        if hf_name not in self._waiting:
            stage, name, source = self._owners[hf_name]
            mine = self._whole(name) if stage == self._place.stage else None
            if dist.get_rank() == 0:
                shards = [self._receive(stage, tp_rank, source, mine) for tp_rank in self._senders(source)]
                self._waiting |= to_hf(self._place.config, source, shards)
            else:
                if mine is not None and self._has_first_copy and self._place.tp_rank in self._senders(source):
                    dist.send(mine, 0)
                self._waiting |= dict.fromkeys(source.hf_names, torch.empty(0))
        tensor = self._waiting.pop(hf_name)
        return tensor if dist.get_rank() == 0 else None

    def _senders(self, source: Source) -> range:
        return range(1 if source.dim is None else self._place.tp_size)

    def _receive(self, stage: int, tp_rank: int, source: Source, mine: Tensor | None) -> Tensor:
        sender = self._place.first_rank(stage, tp_rank)
        if sender == 0:
            assert mine is not None
            return mine
        shard = torch.empty(shard_shape(self._place.config, source, self._place.tp_size))
        dist.recv(shard, sender)
        return shard


@dataclass(frozen=True)
class _Master:
    """A flat part of a parameter's fp32 master, from the element `start` on."""

    values: Tensor
    start: int
    sharded: bool


class Parameters:
    """This rank's parameters with the fp32 masters that the optimizer keeps of those that are narrower."""

    def __init__(
        self, root: nn.Module, optimizer: Any | None, device: torch.device, sharing: dist.ProcessGroup
    ) -> None:
        """
        Args:
            root: this rank's part of the model.
            optimizer: Megatron's; None where nothing trains.
            device: of the parameters.
            sharing: ranks with the same part of the model, between which the masters may be divided.
        """
        self._parameters = dict(root.named_parameters())
        self._optimizer, self._device, self._sharing = optimizer, device, sharing

    @torch.no_grad()
    def assign(self, name: str, value: Tensor) -> None:
        """Set a parameter and, where it is narrower than fp32, this rank's part of its fp32 master."""
        parameter, value = self._parameters[name], value.to(self._device)
        parameter.copy_(value)
        master = self._master(parameter)
        if master is not None:
            master.values.copy_(value.flatten()[master.start : master.start + master.values.numel()])

    @torch.no_grad()
    def whole(self, name: str) -> Tensor:
        """Return a parameter in fp32 on the CPU: the master where there is one."""
        parameter = self._parameters[name]
        if self._optimizer is None or not hasattr(parameter, "main_param"):
            return parameter.detach().to("cpu", torch.float32).contiguous()
        whole = torch.zeros(parameter.shape, device=self._device)
        master = self._master(parameter)
        if master is not None:
            whole.view(-1)[master.start : master.start + master.values.numel()] = master.values
        if master is None or master.sharded:
            dist.all_reduce(whole, group=self._sharing)
        return whole.cpu()

    def _master(self, parameter: Tensor) -> "_Master | None":
        """Return this rank's part of a parameter's fp32 master; None where there is none on this rank."""
        values = getattr(parameter, "main_param", None)
        if self._optimizer is None or values is None:
            return None
        if not getattr(parameter, "main_param_sharded", False):
            return _Master(values.view(-1), 0, False)
        for optimizer in self._optimizer.chained_optimizers:
            if parameter in optimizer.model_param_gbuf_map:
                return _Master(values, optimizer._get_model_param_range_map(parameter)["param"].start, True)
        raise AssertionError("a master without a place in the distributed optimizer")
