"""Reads torch's distributed checkpoints without executing what a stranger may have put into them.

Their table of contents (`.metadata`) and whatever is no tensor are pickles. The engine that stores its states so
(megatron-core's `dist_checkpointing`) reads them through here: a pickle may name what torch's own writer names, no more.
"""

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException

from nanotrain.config.errors import UserError

_OF_METADATA = "torch.distributed.checkpoint.metadata"
_NAMES = {
    *((_OF_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((_OF_METADATA, f"{kind}StorageMetadata") for kind in ("Bytes", "Chunk", "Tensor")),
    (_OF_METADATA, "TensorProperties"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
}
"""Exactly: a name with a dot in it would reach into a module's imports."""
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        of_torch = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if of_torch or (module, name) in _NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def require_plain_metadata(folder: Path) -> None:
    """Raise UserError where a checkpoint's table of contents names anything that its writer does not.

    Args:
        folder: of the checkpoint; without a table the reader has its own words.
    """
    file = folder / ".metadata"
    if not file.exists():
        return
    try:
        with file.open("rb") as handle:
            _Restricted(handle).load()
    except pickle.UnpicklingError as error:
        raise _refusal(file, str(error)) from None


@contextmanager
def plain_values(folder: Path) -> Iterator[None]:
    """Have every `torch.load` accept tensors and plain containers alone, also where a library asks for more.

    Raises:
        UserError: something else was found in `folder`.
    """
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        yield
    except (pickle.UnpicklingError, CheckpointException) as error:
        found = _unpickling_error(error)
        if found is None:
            raise
        raise _refusal(folder, _named(found)) from None
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def _unpickling_error(error: BaseException) -> pickle.UnpicklingError | None:
    """Return the one that an error is, or that some rank met; torch gathers those of all ranks in `failures`."""
    if isinstance(error, pickle.UnpicklingError):
        return error
    assert isinstance(error, CheckpointException)
    return next((one for one, _ in error.failures.values() if isinstance(one, pickle.UnpicklingError)), None)


def _named(error: pickle.UnpicklingError) -> str:
    """Return what torch.load refused, out of its advice."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return found[1] if found else str(error).strip().splitlines()[0]


def _refusal(path: Path, found: str) -> UserError:
    return UserError(
        f"`{path}` holds a pickle that names more than a state does ({found}), and reading it could run foreign code; resume"
        " from a state of your own, or remove this one."
    )
