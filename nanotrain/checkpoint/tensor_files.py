"""The *.safetensors files of a checkpoint folder: one, or shards with an index. Nothing is ever unpickled."""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.runtime.files import write_json_atomic

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FLOATS = ("F32", "BF16", "F16", "F64")


class StoredTensors:
    """The tensors of a checkpoint folder, read whole or in parts; nothing is in memory before it is read.

    Attributes:
        shapes: name on disk -> shape, in the order of the files.
    """

    def __init__(self, handles: dict[Path, Any]) -> None:
        self._file = {name: file for file, handle in handles.items() for name in handle.keys()}  # noqa: SIM118
        self._handles = handles
        self.shapes = {name: tuple(self._slice(name).get_shape()) for name in self._file}
        for name, file in self._file.items():
            stored = self._slice(name).get_dtype()
            if stored not in _FLOATS:
                raise UserError(
                    f"{file}: `{name}` is stored as {stored}; only float32, bfloat16, float16 and float64"
                    " weights are read, so convert quantised ones first."
                )

    def _slice(self, name: str) -> Any:
        return self._handles[self._file[name]].get_slice(name)

    def read(self, name: str, dim: int, ranges: Sequence[tuple[int, int]]) -> Tensor:
        """Return the [start, stop) ranges of a tensor along a dimension, one after the other.

        Raises:
            UserError: the file cannot be read.
        """
        with _named_errors(self._file[name]):
            whole = self._slice(name)
            parts = [whole[(slice(None),) * dim + (slice(start, stop),)] for start, stop in ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)

    def read_whole(self, name: str) -> Tensor:
        """Return a tensor; raises as `read`."""
        with _named_errors(self._file[name]):
            tensor: Tensor = self._handles[self._file[name]].get_tensor(name)
            return tensor


@contextmanager
def open_tensors(folder: Path) -> Iterator[StoredTensors]:
    """Open the files of a folder for reading.

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
    with ExitStack() as stack:
        handles: dict[Path, Any] = {}
        for shard, names in expected.items():
            file = folder / shard
            if not file.is_file():
                raise MissingInputError(f"{file} is missing, although {INDEX_FILE} names it; copy the folder again.")
            with _named_errors(file):
                handles[file] = stack.enter_context(safe_open(file, framework="pt"))
            present = set(handles[file].keys())
            if names is not None and present != names:
                different = sorted(present ^ names)[0]
                raise UserError(
                    f"{file} and {INDEX_FILE} disagree about the tensor {different}; copy the folder again."
                )
        yield StoredTensors(handles)


@contextmanager
def _named_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is corrupt or cut off ({error}); copy or write the folder again.") from error


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name on disk, tensor) of every tensor, one in memory at a time; raises as `open_tensors`."""
    with open_tensors(folder) as stored:
        for name in stored.shapes:
            yield name, stored.read_whole(name)


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
    plan = plan_files(sizes, max_shard_bytes)
    write_files(plan, tensors, folder)
    write_index(plan, sizes, folder)


def plan_files(sizes: Mapping[str, int], max_shard_bytes: int, starts: Collection[str] = ()) -> dict[str, list[str]]:
    """Return file -> names of its tensors, in order; one file, or shards as in `write_tensors`.

    Args:
        sizes: name -> bytes, in the order of writing.
        max_shard_bytes: of a file.
        starts: tensors that begin a file of their own, because another process writes what comes before them.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and (filled + size > max_shard_bytes or name in starts):
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": names for n, names in enumerate(shards, start=1)}


def write_files(plan: Mapping[str, list[str]], tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write those files of a plan whose tensors come, holding one file's tensors at a time.

    Args:
        plan: of `plan_files`.
        tensors: in the order of the plan; whole files, one or more of them.
        folder: exists.
    """
    file_of = {name: file for file, names in plan.items() for name in names}
    waiting: dict[str, Tensor] = {}
    for name, tensor in tensors:
        waiting[name] = tensor
        if name == plan[file_of[name]][-1]:
            assert list(waiting) == plan[file_of[name]], f"tensors of {file_of[name]} out of order: {list(waiting)}"
            save_file(waiting, folder / file_of[name], metadata={"format": "pt"})
            waiting = {}
    assert not waiting, f"the file of {list(waiting)} is not whole"


def write_index(plan: Mapping[str, list[str]], sizes: Mapping[str, int], folder: Path) -> None:
    """Write the index of a plan of several files; one file has none."""
    if len(plan) > 1:
        weight_map = {name: file for file, names in plan.items() for name in names}
        content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json_atomic(folder / INDEX_FILE, content)
