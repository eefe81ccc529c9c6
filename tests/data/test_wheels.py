import hashlib
import logging
import os
import time
import zipfile
from pathlib import Path

import pytest

from nanotrain.config.errors import UserError
from nanotrain.data import wheels
from nanotrain.data.wheels import Package, WheelReader, cache_folder, ensure_wheel, ensure_wheels, find_cached


def make_wheel(file: Path, text: bytes = b"hello") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo("pkg/data.txt"), text)
    return file


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A folder of wheels that the real pip installs from, with no index."""
    folder = tmp_path / "index"
    make_wheel(folder / "nanotrain_sample-1.0-py3-none-any.whl")
    with zipfile.ZipFile(folder / "nanotrain_sample-1.0-py3-none-any.whl", "a") as archive:
        archive.writestr(
            "nanotrain_sample-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: nanotrain-sample\nVersion: 1.0\n"
        )
        archive.writestr(
            "nanotrain_sample-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def package(source):
    content = (source / "nanotrain_sample-1.0-py3-none-any.whl").read_bytes()
    return Package("nanotrain-sample", "1.0", "MIT", 0.1, hashlib.sha256(content).hexdigest())


def test_pip_fills_the_cache_once(tmp_path, package, monkeypatch):
    cache = tmp_path / "cache"
    wheel = ensure_wheel(package, cache)
    assert wheel == find_cached(package, cache) and [p.name for p in cache.iterdir()] == [wheel.name]
    monkeypatch.setattr(wheels.subprocess, "run", lambda *a, **k: pytest.fail("the cache is full: no pip"))
    assert ensure_wheels([package], cache) == {"nanotrain-sample": wheel}


def test_a_corrupt_cached_wheel_is_named_and_fetched_again(tmp_path, package, caplog):
    cache = tmp_path / "cache"
    wheel = ensure_wheel(package, cache)
    good = wheel.read_bytes()
    wheel.write_bytes(good[:-10])
    with caplog.at_level(logging.WARNING, "nanotrain"):
        assert ensure_wheel(package, cache).read_bytes() == good
    assert wheel.name in caplog.text and "corrupt" in caplog.text


def test_without_cache_and_network_one_sentence_says_what_to_do(tmp_path, package, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError) as error:
        ensure_wheels([package], tmp_path / "cache")
    message = str(error.value)
    for part in ("nanotrain-sample==1.0", str(tmp_path / "cache"), "data_prep.download", "NANOTRAIN_CACHE"):
        assert part in message
    assert "\n" not in message and list((tmp_path / "cache").iterdir()) == []


def test_a_wheel_that_is_not_the_pinned_one_never_enters_the_cache(tmp_path, package):
    wrong = Package(package.name, package.version, "MIT", 0.1, "0" * 64)
    with pytest.raises(UserError, match=r"nanotrain_sample-1\.0-py3-none-any\.whl.*is not the pinned file.*sha256"):
        ensure_wheel(wrong, tmp_path / "cache")
    assert find_cached(wrong, tmp_path / "cache") is None


def test_compiled_packages_are_pinned_by_what_is_read(tmp_path):
    good = hashlib.sha256(b"hello").hexdigest()
    package = Package("comp", "2.0", "MIT", 1, members=(("pkg/data.txt", good),))
    wheel = make_wheel(tmp_path / "comp-2.0-cp399-cp399-any.whl")
    assert wheels.check_wheel(package, wheel) == ""
    make_wheel(wheel, b"other")
    assert "pkg/data.txt differs" in wheels.check_wheel(package, wheel)
    content = bytearray(make_wheel(wheel).read_bytes())
    content[content.index(b"hello")] ^= 1
    wheel.write_bytes(bytes(content))
    assert "cannot be read" in wheels.check_wheel(package, wheel)
    wheel.write_bytes(b"not a zip")
    assert wheels.check_wheel(package, wheel) == "it is not a zip file"
    with_other_member = Package("comp", "2.0", "MIT", 1, members=(("absent", good),))
    assert "absent cannot be read" in wheels.check_wheel(with_other_member, make_wheel(wheel))


def test_only_old_leftovers_of_killed_downloads_are_removed(tmp_path, package):
    cache = tmp_path / "cache"
    for name in ("old", "new"):
        (cache / f".download-{name}").mkdir(parents=True)
    past = time.time() - 7200
    os.utime(cache / ".download-old", (past, past))
    ensure_wheels([package], cache)
    assert not (cache / ".download-old").exists() and (cache / ".download-new").exists()


def test_the_cache_is_where_the_variable_says(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOTRAIN_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path / "wheels"
    monkeypatch.setenv("NANOTRAIN_CACHE", "")
    assert cache_folder() == Path.home() / ".cache/nanotrain/wheels"
    monkeypatch.delenv("NANOTRAIN_CACHE")
    assert cache_folder() == Path.home() / ".cache/nanotrain/wheels"


def test_a_member_is_read_with_errors_that_name_it(tmp_path):
    wheel = make_wheel(tmp_path / "w-1-py3-none-any.whl", b"caf\xe9")
    with WheelReader(wheel) as reader:
        assert reader.members("pkg/", ".txt") == ["pkg/data.txt"]
        with pytest.raises(UserError, match=r"w-1-py3-none-any\.whl:pkg/data\.txt` is not UTF-8.*offset 3"):
            reader.read_text("pkg/data.txt")
        with pytest.raises(UserError, match="pkg/none cannot be read"):
            reader.read_bytes("pkg/none")
