"""Opens the report in headless Chromium, as a reader does."""

import json
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nanotrain.report.build import build_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs the Debian package `chromium`")


def browse(page: Path, profile: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-dev-shm-usage",
    ]
    command += [
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-extensions",
    ]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", "--enable-logging=stderr"]
    return subprocess.run(
        [*command, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True, errors="replace"
    )


def test_report_opens_without_errors_or_requests(make_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_run()
    build_report(folder)
    done = browse(folder / "report.html", tmp_path / "profile", "--dump-dom")
    assert "CONSOLE" not in done.stderr, done.stderr  # a refused request or a syntax error would be logged there
    dom = done.stdout
    assert "<h1>quickstart</h1>" in dom and "<h2>Thinking budget</h2>" in dom
    assert dom.count("<svg") > 15 and "8 min 49 s" in dom
    assert "<script" not in dom and "<img" not in dom  # the hostile sample stayed text
    numbers = json.loads((folder / "report.json").read_text())
    assert all(f"<b>{name}</b>" in dom for name in numbers["stages"])


def test_a_broken_page_would_be_noticed(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<!doctype html><title>bad</title><script>undefined_name()</script>")
    assert "CONSOLE" in browse(page, tmp_path / "profile", "--dump-dom").stderr


@pytest.mark.parametrize(("width", "height"), [(1200, 1600), (500, 1600)])
def test_screenshot_has_the_size_of_the_window(
    make_run: Callable[..., Path], tmp_path: Path, width: int, height: int
) -> None:
    folder = make_run()
    build_report(folder)
    picture = tmp_path / "report.png"
    browse(folder / "report.html", tmp_path / "profile", f"--screenshot={picture}", f"--window-size={width},{height}")
    content = picture.read_bytes()
    assert struct.unpack(">II", content[16:24]) == (width, height)
    assert len(content) > 20_000  # not blank
