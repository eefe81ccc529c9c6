"""The sha256 of a file against its manifest, remembered for large files so that a start does not read them all again.

A stamp holds a file's size, times, inode and sha256 as they were when it was read in full; while the first four are the
same, the sha256 is taken from it. Stamps lie beside the files; a folder that cannot be written has none.
"""

import functools
import json
import logging
from pathlib import Path

from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.runtime.files import file_digest, write_json_atomic

STAMP_FILE = ".verified.json"
_STAMPED_BYTES = 1 << 26
"""Smaller files are read again by every process: 64 MiB take a twentieth of a second."""
_LOG = logging.getLogger("nanotrain")


def verify_file(file: Path, *, size: int, sha256: str, manifest: Path, remedy: str) -> Path:
    """Return `file` after checking its bytes against what the manifest says.

    Args:
        file: to check.
        size: bytes by the manifest.
        sha256: by the manifest.
        manifest: its name, for the message.
        remedy: what the user should do, for the message.

    Raises:
        MissingInputError: the file is not there.
        UserError: its size or its bytes differ.
    """
    if not file.is_file():
        raise MissingInputError(f"`{file}` is missing though the manifest lists it; {remedy}.")
    if file.stat().st_size != size or known_digest(file) != sha256:
        raise UserError(
            f"`{file}` does not match its sha256 in `{manifest}`: the file was changed or cut off; {remedy}."
        )
    return file


def known_digest(file: Path) -> str:
    """Return the sha256 of a file, read at most once per process and, when it is large, once per version."""
    return _digest(file, _version(file))


def _version(file: Path) -> tuple[int, ...]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


@functools.lru_cache(maxsize=4096)
def _digest(file: Path, version: tuple[int, ...]) -> str:
    if version[0] < _STAMPED_BYTES:
        return file_digest(file)
    stamps = _load_stamps(file.parent)
    if file.name in stamps and stamps[file.name]["version"] == list(version):
        return stamps[file.name]["sha256"]
    digest = file_digest(file)
    if _version(file) == version:
        try:
            stamp = {file.name: {"version": list(version), "sha256": digest}}
            write_json_atomic(file.parent / STAMP_FILE, _load_stamps(file.parent) | stamp)
        except OSError as error:
            _LOG.info("no stamp beside %s (%s): it is read again at every start", file, error.strerror)
    return digest


def _load_stamps(folder: Path) -> dict[str, dict]:
    try:
        stamps = json.loads((folder / STAMP_FILE).read_bytes())
        return {name: {"version": list(s["version"]), "sha256": str(s["sha256"])} for name, s in stamps.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # a lost or damaged stamp costs one reading
