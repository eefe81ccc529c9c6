import hashlib

import pytest

from data_prep import download
from nanotrain.data.wheels import Package


@pytest.fixture
def packages(monkeypatch, tmp_path):
    good = hashlib.sha256(b"good").hexdigest()
    found = (
        Package("one", "1", "MIT", 5.0, good),
        Package("two", "2", "BSD", 7.0, good),
        Package("six", "6", "X", 1, good),
    )
    monkeypatch.setattr(download, "PACKAGES", found)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels/one-1-py3-none-any.whl").write_bytes(b"good")
    (tmp_path / "wheels/two-2-py3-none-any.whl").write_bytes(b"bad")
    return found


def test_a_dry_run_says_what_would_be_fetched_and_fetches_nothing(packages, tmp_path, capsys):
    assert download.main(["--cache", str(tmp_path), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "cached" in lines[0] and "7.0 MB" in lines[1] and "sha256" in lines[1] and "missing" in lines[2]
    assert lines[3] == f"8.0 MB to fetch into {tmp_path / 'wheels'}"
    assert len(list((tmp_path / "wheels").iterdir())) == 2


def test_what_cannot_be_fetched_ends_with_2(packages, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    assert download.main(["--cache", str(tmp_path)]) == 2
    assert "error: `two==2` is not in the cache" in capsys.readouterr().err


def test_a_full_cache_needs_nothing(packages, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(download, "PACKAGES", packages[:1])
    assert download.main(["--cache", str(tmp_path)]) == 0
    assert "1 packages in" in capsys.readouterr().out
