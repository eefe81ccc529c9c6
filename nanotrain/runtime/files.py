"""Atomic writes and digests: a reader sees the old file, the new file, or none, never half of one."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
"""errno of a disk that is full or read-only, not of a mistake of ours."""
_PROBE_BYTES = 1 << 20


def write_bytes_atomic(file: Path, content: bytes) -> None:
    """Write to a temporary name beside `file`, fsync, rename."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    write_synced(temporary, content)
    os.replace(temporary, file)
    fsync_folder(file.parent)


def write_synced(file: Path, content: bytes) -> None:
    """Write under the name itself and fsync; for files of a folder that is renamed when it is whole."""
    with open(file, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def write_json_atomic(file: Path, value: Any) -> None:
    """Write JSON with sorted keys, so that equal values give equal bytes. NaN is refused: it is not JSON."""
    write_bytes_atomic(file, (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def storage_refuses(folder: Path) -> bool:
    """Return whether a plain write of a MiB below `folder` fails: libraries report a full disk under many names."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(os.urandom(_PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError:
        return True
    return False


def fsync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def folder_atomic(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` when the block ends without an exception.

    An existing `folder` is replaced; the files are fsynced before the rename. On an exception the temporary
    folder is removed and `folder` is as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                with open(path, "rb") as handle:
                    os.fsync(handle.fileno())
            else:
                fsync_folder(path)
        fsync_folder(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders that a killed process left directly below `folder`.

    A folder that was moved aside and whose replacement never arrived is moved back.
    """
    for path in sorted(folder.glob(".*.old")):
        original = path.with_name(path.name[1:].rsplit(".", 2)[0])
        if original.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.replace(path, original)
    for path in sorted(folder.glob(".*.tmp")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def file_digest(file: Path) -> str:
    """Return the sha256 of a file's bytes in hexadecimal."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def folder_digest(folder: Path) -> str:
    """Return one sha256 over the relative names and contents of all files below `folder`."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(f"{path.relative_to(folder).as_posix()}\0{file_digest(path)}\n".encode())
    return total.hexdigest()
