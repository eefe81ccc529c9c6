"""The nano blend's tables, and its builder on tiny made-up packages of all three kinds."""

import shutil
import tarfile

import pytest

from data_prep import build_nano_blend
from nanotrain.config.data import CATEGORIES, CorpusConfig
from nanotrain.config.errors import UserError
from nanotrain.data.corpora.distribution import Files, code, pages, plain_texts
from nanotrain.data.corpora.markup import html_text
from nanotrain.data.corpus import CorpusBuilder
from nanotrain.data.manifest import DataFolder
from nanotrain.data.nano_blend import MB, PACKAGES, SOURCES, scaled
from nanotrain.data.packages import DebPackage, NpmPackage
from nanotrain.data.pip_mini import PACKAGES as PIP_PACKAGES
from nanotrain.data.pip_mini import SOURCES as PIP_SOURCES
from nanotrain.data.pip_mini import Source
from nanotrain.runtime.files import file_digest, folder_digest
from nanotrain.runtime.progress import Progress
from tests.data.test_packages import make_deb


def test_the_tables_fit_together():
    names = [package.name for package in PACKAGES]
    assert len(names) == len(set(names)) and all(package.licence and package.megabytes > 0 for package in PACKAGES)
    sources = [source.name for source in SOURCES]
    assert len(sources) == len(set(sources))
    assert {source.package for source in SOURCES} | {"mistral-common"} == set(names)
    assert {source.category for source in SOURCES} == set(CATEGORIES)


def test_a_scale_shrinks_every_cap():
    small = scaled(0.01)
    assert [source.name for source in small] == [source.name for source in SOURCES] and scaled(1.0) == SOURCES
    for source, less in zip(SOURCES, small, strict=True):
        assert less.max_bytes == round(0.01 * (source.max_bytes or 10 * MB))


@pytest.fixture
def tiny(fake_wheels, fake_packages, tmp_path):
    """Fake wheels, a Debian package of pages and code, an npm tarball of texts; and sources over them."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not installed")
    import random

    draw = random.Random(4)
    members = {f"usr/share/doc/x/{n}.html": f"<p>{fake_packages.paragraph(draw)}</p>".encode() for n in range(12)}
    members |= {f"usr/src/p{n}/a.go": f"// {fake_packages.paragraph(draw)}".encode() for n in range(12)}
    packages = tmp_path / "packages"
    packages.mkdir()
    deb = make_deb(packages, "tiny", members)
    tarball = packages / "texts-1.0.0.tgz"
    with tarfile.open(tarball, "w:gz") as archive:
        for n in range(8):
            (tmp_path / "t.txt").write_text(fake_packages.paragraph(draw))
            archive.add(tmp_path / "t.txt", f"package/data/{n}.txt")
    npm = NpmPackage("texts", "1.0.0", "public domain", 0.1, file_digest(tarball))
    sources = (
        *PIP_SOURCES,
        Source("pages", "web", "tiny", "", pages("pages", Files("usr/share/doc/x/", (".html",)), clean=html_text)),
        Source("speeches", "web", "texts", "", plain_texts("speeches")),
        Source("go", "code", "tiny", "", code("go", Files("usr/src/", (".go",)), depth=1)),
    )
    files = fake_wheels | {"tiny": deb, "texts": tarball}
    return files, sources, (*PIP_PACKAGES, DebPackage("tiny", "GPL-2", 0.1), npm)


def build(tiny, num_ranks, root):
    files, sources, packages = tiny
    config = CorpusConfig(
        vocab_size=1000 + num_ranks, validation_fraction=0.15, num_chat_rows=60, num_chat_validation_rows=20
    )
    builder = CorpusBuilder(config, root / "data", Progress(root / "progress.jsonl"), files, sources, packages)
    return builder.build()


def test_packages_of_three_kinds_become_one_folder_with_versions_digests_and_licences(tiny, num_ranks, tmp_path):
    results = build(tiny, num_ranks, tmp_path / "a")
    manifest = DataFolder(tmp_path / "a/data").manifest
    listed = {source["name"]: source for source in manifest["sources"]}
    assert (listed["pages"]["version"], listed["pages"]["licence"]) == ("1:2.0-1", "GPL-2")
    assert listed["pages"]["sha256"] == file_digest(tiny[0]["tiny"]) and listed["pages"]["documents"] == 12
    assert listed["speeches"]["version"] == "1.0.0" and listed["go"]["category"] == "code"
    overlap = results["categories"]["web"]["overlap"]
    assert overlap["windows"] > 0 and set(overlap) >= {"share", "by_source", "random_share", "documents_with_overlap"}
    build(tiny, num_ranks, tmp_path / "b")
    assert folder_digest(tmp_path / "a/data") == folder_digest(tmp_path / "b/data")


def test_a_source_that_finds_nothing_is_named(tiny, num_ranks, tmp_path):
    files, sources, packages = tiny
    lost = Source("lost", "web", "tiny", "", pages("lost", Files("usr/nowhere/", (".html",))))
    with pytest.raises(UserError, match=r"source `lost` found no document in `tiny_1%3a2.0-1_all.deb`"):
        build((files, (*sources, lost), packages), num_ranks, tmp_path)


def test_the_program_says_what_is_missing_and_refuses_a_bad_scale(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NANOTRAIN_CACHE", str(tmp_path))
    assert build_nano_blend.main(["--output", str(tmp_path / "out"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    total = sum(package.megabytes for package in PACKAGES)
    assert f"{total:.1f} of {total:.1f} MB to fetch into {tmp_path}" in out and "linux-doc-6.1" in out
    assert not (tmp_path / "out").exists()
    assert build_nano_blend.main(["--output", str(tmp_path / "out"), "--scale", "2"]) == 2
    assert "`--scale` (2.0) must lie in (0, 1]" in capsys.readouterr().err
