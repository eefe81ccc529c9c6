"""The *.safetensors files of a checkpoint folder: one, or shards with an index. Nothing is ever unpickled."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.runtime.files import write_json_atomic

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name on disk, tensor) of every tensor, one in memory at a time.

    Raises:
        MissingInputError: there are no weights, or a shard that the index names is missing.
        UserError: a file is corrupt or cut off, does not hold what the index says, or holds tensors that are not
            floating point (quantised weights).
    """
    expected = _read_index(folder) if (folder / INDEX_FILE).is_file() else {SINGLE_FILE: None}
    if not (folder / INDEX_FILE).is_file() and not (folder / SINGLE_FILE).is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; {pickled[0]} is a pickle, which is never loaded: convert it first" if pickled else ""
        raise MissingInputError(f"{folder} holds no {SINGLE_FILE} and no {INDEX_FILE}{hint}.")
    for shard, names in expected.items():
        file = folder / shard
        if not file.is_file():
            raise MissingInputError(f"{file} is missing, although {INDEX_FILE} names it; copy the folder again.")
        yield from _read_file(file, names)


def _read_file(file: Path, names: set[str] | None) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as handle:
            present = list(handle.keys())
            if names is not None and set(present) != names:
                different = sorted(set(present) ^ names)[0]
                raise UserError(
                    f"{file} and {INDEX_FILE} disagree about the tensor {different}; copy the folder again."
                )
            for name in present:
                tensor = handle.get_tensor(name)
                if tensor.dtype not in _FLOATS:
                    raise UserError(
                        f"{file}: `{name}` is stored as {tensor.dtype}; only float32, bfloat16, float16 and float64"
                        " weights are read, so convert quantised ones first."
                    )
                yield name, tensor
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is corrupt or cut off ({error}); copy or write the folder again.") from error


def _read_index(folder: Path) -> dict[str, set[str]]:
    """Return shard file -> names of its tensors."""
    file = folder / INDEX_FILE
    try:
        content = json.loads(file.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid JSON ({error}); copy the folder again.") from error
    weight_map = content["weight_map"] if isinstance(content, dict) and "weight_map" in content else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{file} has no `weight_map` from tensor names to files; copy the folder again.")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise UserError(f"{file} puts `{name}` into {shard!r}; it must be a *.safetensors file of the same folder.")
        shards.setdefault(shard, set()).add(name)
    return shards


def write_tensors(
    tensors: Iterable[tuple[str, Tensor]], sizes: Mapping[str, int], folder: Path, max_shard_bytes: int
) -> None:
    """Write one file, or shards of at most `max_shard_bytes` (a larger tensor gets its own) and their index.

    Args:
        tensors: (name, tensor on the CPU), asked for one at a time; only those of one shard are held.
        sizes: bytes of each, in the order in which `tensors` gives them.
        folder: an existing folder.
        max_shard_bytes: of one file.
    """
    shards = plan_shards(sizes, max_shard_bytes)
    weight_map: dict[str, str] = {}
    given = iter(tensors)
    for number, names in enumerate(shards, start=1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = dict(next(given) for _ in names)
        assert {name: tensor.nbytes for name, tensor in shard.items()} == {name: sizes[name] for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json_atomic(folder / INDEX_FILE, index)


def plan_shards(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Return the names of each shard's tensors: in order, as many as fit, at least one."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
