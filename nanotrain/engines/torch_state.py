"""The resumable state of the torch engines: weights, optimizer and random states, as rows of named tensors.

One form for one process, DDP and FSDP2: a state of one of them, on any number of ranks, continues as any other.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from nanotrain.checkpoint.row_shards import RowFiles, Rows, whole, write_rows
from nanotrain.engines.base import StateWriter
from nanotrain.model.hybrid import HybridModel
from nanotrain.optim.low_precision_adamw import LowPrecisionAdamW
from nanotrain.runtime.distributed import World

_WEIGHTS, _OPTIMIZER, _NUM_STEPS = "weights/", "optimizer/", "num_steps"

AnyAdamW = torch.optim.AdamW | LowPrecisionAdamW


def local_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """Return this rank's rows of a tensor, sharing its storage, and the index of the first."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), 0
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.detach().to_local(), offset[0] if offset else 0


def copy_rows_of(tensor: Tensor, value: Tensor) -> None:
    """Copy this rank's rows of the whole `value` into `tensor`."""
    rows, first = local_rows(tensor)
    rows.copy_(value[first : first + rows.shape[0]] if rows.ndim else value)


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return the whole tensor; every rank of a divided one must call it, and gets a copy."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def snapshot(model: HybridModel, optimizer: AnyAdamW, world: World, device: torch.device) -> StateWriter:
    """Copy this rank's part to host memory and return what writes it; ranks with equal copies leave it to the first."""
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    rows = {}
    if sharded or world.is_first:
        for name, parameter in model.named_parameters():
            rows[_WEIGHTS + name] = _host_rows(parameter)
            for field, value in optimizer.state[parameter].items():
                rows[f"{_OPTIMIZER}{name}/{field}"] = _host_rows(value)
        if isinstance(optimizer, LowPrecisionAdamW):
            rows[_NUM_STEPS] = whole(torch.tensor(optimizer.param_groups[0]["num_steps"]))
    random = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(device)

    def write(folder: Path) -> None:
        if rows:
            write_rows(folder / f"tensors-{world.rank:05d}.safetensors", rows)
        save_file(random, _random_file(folder, world.rank))

    return write


@torch.no_grad()
def restore(folder: Path, model: HybridModel, optimizer: AnyAdamW, world: World, device: torch.device) -> None:
    """Read this rank's part of what all ranks of a `snapshot` wrote, however many they were.

    Random states belong to ranks: on another number of them they stay as the run's seed made them.

    Raises:
        UserError: the state is of another model, or incomplete.
    """
    stored = RowFiles(folder.glob("tensors-*.safetensors"))
    for name, parameter in model.named_parameters():
        _read_rows(stored, _WEIGHTS + name, parameter)
        prefix = f"{_OPTIMIZER}{name}/"
        state = optimizer.state[parameter]
        for key in stored.names(prefix):
            field = key.removeprefix(prefix)
            if field not in state:  # torch's AdamW makes its states in its first step
                state[field] = (
                    torch.zeros_like(parameter)
                    if stored.shape(key) == tuple(parameter.shape)
                    else torch.zeros(stored.shape(key), dtype=stored.dtype(key), device=parameter.device)
                )
            _read_rows(stored, key, state[field])
    if isinstance(optimizer, LowPrecisionAdamW):
        num_steps = torch.tensor(0)
        stored.read_into(_NUM_STEPS, num_steps)
        for group in optimizer.param_groups:
            group["num_steps"] = int(num_steps)
    if len(list(folder.glob("random-*.safetensors"))) == world.size:
        random = load_file(_random_file(folder, world.rank))
        torch.set_rng_state(random["cpu"])
        if device.type == "cuda" and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], device)


def _random_file(folder: Path, rank: int) -> Path:
    return folder / f"random-{rank:05d}.safetensors"


def _host_rows(tensor: Tensor) -> Rows:
    """Return this rank's rows as a contiguous copy in host memory, of its own even where the tensor is there already."""
    rows, first = local_rows(tensor)
    copy = torch.empty(rows.shape, dtype=rows.dtype, device="cpu").copy_(rows)
    return Rows(copy, first, tensor.shape[0] if tensor.ndim else 1)


def _read_rows(stored: RowFiles, name: str, tensor: Tensor) -> None:
    rows, first = local_rows(tensor)
    stored.read_into(name, rows, first)
