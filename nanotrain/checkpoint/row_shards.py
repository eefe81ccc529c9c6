"""Tensors of a resumable state, divided by rows over files: written by one number of ranks, read by any other.

A file is a safetensors file; its header says which rows of the whole tensor it holds. Nothing is pickled, and a rank
writes its own file without talking to the others, so that it may do so from a thread while they train.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanotrain.config.errors import UserError

_HEADER_KEY = "rows"


@dataclass(frozen=True)
class Rows:
    """Rows [first, first + len(tensor)) of a tensor with `total` rows; a scalar is one row."""

    tensor: Tensor
    first: int
    total: int


def whole(tensor: Tensor) -> Rows:
    """Return all rows of a tensor."""
    return Rows(tensor, 0, tensor.shape[0] if tensor.ndim else 1)


def write_rows(file: Path, rows: Mapping[str, Rows]) -> None:
    """Write rows of any number of tensors, by name; the tensors must be contiguous and on the CPU."""
    kept = {name: part for name, part in rows.items() if part.tensor.numel()}
    header = {name: [part.first, part.total] for name, part in kept.items()}
    save_file({name: part.tensor for name, part in kept.items()}, file, metadata={_HEADER_KEY: json.dumps(header)})


@dataclass(frozen=True)
class _Piece:
    file: Path
    first: int
    count: int


@dataclass
class _Whole:
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: list[_Piece]


class RowFiles:
    """The tensors of several files that `write_rows` wrote, seen as whole tensors."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Read the headers only."""
        self._tensors: dict[str, _Whole] = {}
        for file in sorted(files):
            with safe_open(file, framework="pt") as handle:
                header = json.loads(handle.metadata()[_HEADER_KEY])
                for name, (first, total) in header.items():
                    part = handle.get_slice(name)
                    shape = tuple(part.get_shape())
                    count = shape[0] if shape else 1
                    if name not in self._tensors:
                        dtype = handle.get_tensor(name).dtype if not shape else part[:0].dtype
                        self._tensors[name] = _Whole((total, *shape[1:]) if shape else (), dtype, [])
                    self._tensors[name].pieces.append(_Piece(file, first, count))

    def names(self, prefix: str = "") -> list[str]:
        """Return the names that start with `prefix`."""
        return [name for name in self._tensors if name.startswith(prefix)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the whole tensor."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype as stored."""
        return self._tensors[name].dtype

    def read_into(self, name: str, target: Tensor, first: int = 0) -> None:
        """Copy rows [first, first + len(target)) into `target`, on whatever device it is.

        Raises:
            UserError: no such tensor, another shape, or rows that no file holds.
        """
        stored = self._tensors[name] if name in self._tensors else None
        if stored is None or stored.shape[1:] != tuple(target.shape[1:]) or len(stored.shape) != target.ndim:
            raise UserError(
                f"the saved state has {'no tensor' if stored is None else f'{list(stored.shape)} values for'} {name!r}, the"
                f" model needs rows of {list(target.shape[1:])}; it is the state of another model, so start afresh."
            )
        if target.ndim == 0:
            with safe_open(stored.pieces[0].file, framework="pt") as handle:
                target.copy_(handle.get_tensor(name))
            return
        covered = self._copy_rows(name, stored, target, first)
        if covered != target.shape[0]:
            raise UserError(
                f"the saved state lacks {target.shape[0] - covered} rows of {name!r}: files of some ranks are missing;"
                " remove the state to continue from an older one."
            )

    def _copy_rows(self, name: str, stored: _Whole, target: Tensor, first: int) -> int:
        """Copy what the files hold of the rows that `target` wants; return how many of them that is."""
        covered, end = 0, first + target.shape[0]
        for piece in sorted(stored.pieces, key=lambda one: one.first):
            low, high = max(piece.first, first + covered), min(piece.first + piece.count, end)
            if low > first + covered or low >= high:
                continue
            with safe_open(piece.file, framework="pt") as handle:
                target[low - first : high - first].copy_(handle.get_slice(name)[low - piece.first : high - piece.first])
            covered = high - first
        return covered
