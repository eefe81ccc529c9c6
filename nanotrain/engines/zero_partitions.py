"""The tensors that DeepSpeed's ZeRO divides, and how to set, compare, gather, save and restore them.

ZeRO-1 and 2 keep whole weights on every rank and divide flat fp32 masters; ZeRO-3 divides each weight by its flattened
values. The masters are what trains: whoever sets weights must refresh them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus
from torch import Tensor, nn

from nanotrain.checkpoint.row_shards import RowFiles, whole, write_rows
from nanotrain.config.errors import UserError
from nanotrain.engines.torch_state import restore_random, snapshot_random
from nanotrain.runtime.distributed import World

_ABOUT = "zero.json"


class MasterAdamW(torch.optim.AdamW):
    """torch's fused AdamW over flat masters; a step that is not allowed leaves them and the states as they are.

    ZeRO computes the global norm, and then calls `step` once for each group: only there can a step still be skipped.
    States are allocated in the first call, allowed or not, because ZeRO links them right after it.
    """

    allowed: Callable[[], bool] = staticmethod(lambda: False)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the groups' parameters if that is allowed now."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    zero = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                    self.state[parameter] = {"step": zero, **moments}
        if self.allowed():
            super().step()


class ZeroPartitions:
    """This rank's part of a model under `deepspeed.initialize`."""

    def __init__(self, model: nn.Module, zero_optimizer: Any, stage: int, world: World) -> None:
        """Wrap what DeepSpeed made; `zero_optimizer` is its optimizer, or the ZeRO-3 wrapper of a model without one."""
        self._parameters = dict(model.named_parameters())
        self._optimizer = zero_optimizer
        self._stage, self._world = stage, world

    def assign(self, parameter: Tensor, value: Tensor) -> None:
        """Set this rank's part of a parameter to that of the whole `value`; call `refresh` after the last one."""
        part, mine = self._part(parameter, value)
        part.copy_(mine)

    def equals(self, name: str, value: Tensor) -> bool:
        """Return whether this rank's part of a parameter is that of the whole `value`, bit for bit."""
        part, mine = self._part(self._parameters[name], value)
        return part.cpu().equal(mine)

    def _part(self, parameter: Any, value: Tensor) -> tuple[Tensor, Tensor]:
        if self._stage < 3:
            return parameter.detach(), value
        partition = parameter.ds_tensor.detach()
        first = min(partition.numel() * self._world.rank, value.numel())
        mine = value.flatten()[first : first + partition.numel()]
        return partition.flatten()[: mine.numel()], mine

    def refresh(self, trained: bool) -> None:
        """Bring masters (where the model is trained) and kept copies in line with weights that were just set."""
        if trained:
            self._optimizer.refresh_fp32_params()
        self._gather_kept()

    def _gather_kept(self) -> None:
        """ZeRO-3 keeps small weights whole between steps; gather those anew, one by one (docs/decisions/0001)."""
        if self._stage == 3:
            for parameter in self._optimizer.persistent_parameters:
                if parameter.ds_status is ZeroParamStatus.AVAILABLE:
                    parameter.partition([parameter])  # or what was gathered before would stay
                parameter.all_gather([parameter])

    def whole(self, name: str) -> Tensor:
        """Return a whole weight, one of our own; every rank must call it."""
        parameter = self._parameters[name]
        if self._stage < 3:
            return parameter.detach()
        if parameter.ds_status is ZeroParamStatus.AVAILABLE:  # one that is kept; the context below would divide it
            return parameter.detach().clone()
        with GatheredParameters([parameter]):
            return parameter.detach().clone()

    def _masters(self) -> list[Tensor]:
        if self._stage < 3:
            return list(self._optimizer.single_partition_of_fp32_groups)
        return list(self._optimizer.fp32_partitioned_groups_flat)

    def _about(self) -> dict[str, int]:
        return {"zero_stage": self._stage, "ranks": self._world.size}

    def snapshot(self, device: torch.device) -> Callable[[Path], None]:
        """Copy this rank's masters and optimizer states to host memory and return what writes them."""
        rows = {}
        for index, master in enumerate(self._masters()):
            rows[f"{index}/master"] = whole(_host_copy(master))
            for field, value in self._optimizer.optimizer.state[master].items():
                rows[f"{index}/{field}"] = whole(_host_copy(value))
        write_random = snapshot_random(self._world, device)

        def write(folder: Path) -> None:
            write_rows(self._file(folder), rows)
            write_random(folder)
            if self._world.is_first:
                (folder / _ABOUT).write_text(json.dumps(self._about()), encoding="utf-8")

        return write

    @torch.no_grad()
    def restore(self, folder: Path, device: torch.device) -> None:
        """Read what this rank wrote, and give every rank the weights that follow from all masters.

        Raises:
            UserError: it was written by another ZeRO stage or number of ranks.
        """
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        if about != self._about():
            raise UserError(
                f"{folder} holds the state of ZeRO-{about['zero_stage']} on {about['ranks']} ranks, and this is"
                f" ZeRO-{self._stage} on {self._world.size}: start the same again, or use engine=torch_fsdp2, whose states"
                " any number of ranks continues."
            )
        stored = RowFiles([self._file(folder)])
        states = self._optimizer.optimizer.state
        for index, master in enumerate(self._masters()):
            for name in stored.names(f"{index}/"):
                field = name.split("/")[1]
                if field == "master":
                    stored.read_into(name, master.data)
                    continue
                if field not in states[master]:
                    shape, dtype = stored.shape(name), stored.dtype(name)
                    states[master][field] = torch.zeros(shape, dtype=dtype, device=master.device)
                stored.read_into(name, states[master][field])
        self._weights_from_masters()
        restore_random(folder, self._world, device)

    def _weights_from_masters(self) -> None:
        if self._stage < 3:
            self._optimizer.update_lp_params()
            return
        for flat, master in zip(self._optimizer.fp16_partitioned_groups_flat, self._masters(), strict=True):
            flat.data.copy_(master.data)
        self._gather_kept()

    def _file(self, folder: Path) -> Path:
        return folder / f"tensors-{self._world.rank:05d}.safetensors"


def _host_copy(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())
