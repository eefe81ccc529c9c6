import hashlib
import shutil
import subprocess
import tarfile

import pytest

from nanotrain.config.errors import UserError
from nanotrain.data.packages import (
    DebPackage,
    NpmPackage,
    ensure_package,
    find_package,
    open_package,
    package_problem,
    package_version,
)

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed")


def make_deb(folder, name, files, version="1:2.0-1"):
    """Build a real .deb from {member: bytes} and return it; its file name quotes the version as apt's does."""
    tree = folder / f"tree-{name}"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: x <x@y>\nDescription: x\n"
    )
    for member, content in files.items():
        (tree / member).parent.mkdir(parents=True, exist_ok=True)
        (tree / member).write_bytes(content)
    file = folder / f"{name}_{version.replace(':', '%3a')}_all.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", str(tree), str(file)], check=True, capture_output=True)
    return file


@needs_dpkg
def test_a_debian_package_is_read_without_being_installed(tmp_path):
    (tmp_path / "debs").mkdir()
    file = make_deb(tmp_path / "debs", "tiny", {"usr/share/doc/a.txt": "ä".encode(), "usr/share/doc/b.html": b"<p>x"})
    package = DebPackage("tiny", "MIT", 0.1)
    assert find_package(package, tmp_path) == file == ensure_package(package, tmp_path)
    assert package_version(package, file) == "1:2.0-1" and package_problem(package, file) == ""
    with open_package(file) as reader:
        assert reader.members("usr/share/doc/", ".txt") == ["usr/share/doc/a.txt"]
        assert reader.read_text("usr/share/doc/a.txt") == "ä"
        with pytest.raises(UserError, match="usr/x cannot be read"):
            reader.read_bytes("usr/x")
    file.write_bytes(file.read_bytes()[:200])
    assert package_problem(package, file)
    with pytest.raises(UserError, match="cannot be unpacked"), open_package(file):
        pass


def test_an_npm_tarball_is_pinned(tmp_path):
    (tmp_path / "npm").mkdir()
    (tmp_path / "data.txt").write_text("speech")
    file = tmp_path / "npm/scope-data-1.0.0.tgz"
    with tarfile.open(file, "w:gz") as archive:
        archive.add(tmp_path / "data.txt", "package/data/data.txt")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    package = NpmPackage("@scope/data", "1.0.0", "MIT", 0.1, digest)
    assert ensure_package(package, tmp_path) == file and package_version(package, file) == "1.0.0"
    with open_package(file) as reader:
        assert reader.read_text("package/data/data.txt") == "speech"
    assert "pinned is 00" in package_problem(NpmPackage("@scope/data", "1.0.0", "MIT", 0.1, "00" * 32), file)


@pytest.mark.parametrize("package", [DebPackage("tiny", "MIT", 0.1), NpmPackage("tiny", "1", "MIT", 0.1, "00")])
def test_without_the_tool_the_cache_is_named(package, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"`tiny` is not in the cache .* is not installed; .*copy a filled cache here"):
        ensure_package(package, tmp_path)


def test_a_fetch_that_fails_gives_the_tools_last_line(tmp_path, monkeypatch):
    (tmp_path / "apt-get").write_text(
        "#!/bin/sh\necho noise >&2\necho 'E: Unable to locate package tiny' >&2\nexit 100\n"
    )
    (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(
        UserError, match=r"`apt-get download -q tiny` failed \(E: Unable to locate package tiny\); run `apt-get update`"
    ):
        ensure_package(DebPackage("tiny", "MIT", 0.1), tmp_path)
