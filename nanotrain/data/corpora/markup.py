"""Readable text out of HTML, manual pages, POD and Mallard, and long texts in pieces at paragraph borders.

These are converters for running text, not renderers: structure that carries no words is dropped.
"""

import gzip
import html
import re
from collections.abc import Iterator

MAX_CHARACTERS = 12_000
"""Longer texts are cut at a paragraph border: a page of a manual, not a book, is a document."""
MIN_CHARACTERS = 120

_INVISIBLE = re.compile(
    r"<(script|style|nav|head|svg|header|footer|noscript|info)\b.*?</\1\s*>|<!--.*?-->", re.S | re.I
)
_BLOCK = re.compile(
    r"</?(?:p|div|br|li|ul|ol|dl|dt|dd|tr|table|h[1-6]|pre|section|article|blockquote|hr|title|item|steps|note)\b[^>]*>",
    re.I,
)
_TAG = re.compile(r"<[^>]+>")
_BLANKS = re.compile(r"\n[ \t\r\f\v\xa0]*(?:\n[ \t\r\f\v\xa0]*)+")
_INLINE_BLANKS = re.compile(r"[ \t\r\f\v\xa0]+")
_PREFORMATTED = re.compile(r"(<pre\b[^>]*>)(.*?)(</pre>)", re.S | re.I)
_NAVIGATION = re.compile(r"(?:Next|Previous|Prev|Up|Home): ?|Prev Up|\[(?:Top|Contents|Up|Next|Previous)\]")
_BODY = re.compile(r"<body\b[^>]*>(.*)</body>", re.S | re.I)


def html_text(markup: str) -> str:
    """Return the words of an HTML or Mallard page, a line a block; the lines of `pre` stay as they are."""
    body = _BODY.search(markup)
    kept: list[str] = []

    def keep(match: re.Match[str]) -> str:
        kept.append(html.unescape(_TAG.sub("", match[2])))
        return f"\n\x00{len(kept) - 1}\x00\n"

    text = _INVISIBLE.sub(" ", body[1] if body else markup).replace("\x00", "")
    text = _PREFORMATTED.sub(keep, text)
    text = _BLOCK.sub("\x01", text.replace("\n", " "))
    text = html.unescape(_TAG.sub("", text))
    lines = (_INLINE_BLANKS.sub(" ", line).strip() for line in text.split("\x01"))
    joined = "\n".join(line for line in lines if line and not _NAVIGATION.match(line))
    joined = re.sub("\x00(\\d+)\x00", lambda match: "\n" + kept[int(match[1])].strip("\n") + "\n", joined)
    return _BLANKS.sub("\n\n", joined).strip()


_ROFF_ESCAPE = re.compile(
    r"\\f(?:\[[^\]]*\]|\(..|.)|\\s[+-]?\d+|\\[&|^%:/,]|\\\*(?:\[[^\]]*\]|\(..|.)|\\m\[[^\]]*\]|\\c$"
)
_ROFF_NAMES = {"\\(bu": "*", "\\(aq": "'", "\\(dq": '"', "\\(em": "-", "\\(en": "-", "\\(co": "(c)", "\\-": "-"}
_ROFF_NAMES |= {"\\(lq": '"', "\\(rq": '"', "\\(oq": "'", "\\(cq": "'", "\\e": "\\", "\\ ": " ", "\\~": " ", "\\'": "'"}
_ROFF_NAME = re.compile("|".join(re.escape(name) for name in sorted(_ROFF_NAMES, key=len, reverse=True)))
_ROFF_LONG_NAME = re.compile(r"\\\[u([0-9A-Fa-f]{4,6})\]|\\\(([a-z]{2})|\\\[[^\]]*\]")
_ROFF_FONT = re.compile(
    r"^\.\s*(?:B|I|BR|RB|IR|RI|BI|IB|SM|SB|IP|TP|LP|PP|P|TQ|Nm|Fl|Ar|Pa|Xr|Nd|Cm|Op|Sh|It|Dv|Em|Li)\b ?(.*)$"
)
_ROFF_HEADING = re.compile(r"^\.\s*S[HSs]\b ?(.*)$")


def man_text(roff: str) -> str:
    """Return the words of a manual page: headings, paragraphs and font macros; tables and definitions are dropped."""
    lines = []
    for line in roff.splitlines():
        if line.startswith(("'\\\"", '.\\"', "'\"", "'\\")):
            continue
        heading, font = _ROFF_HEADING.match(line), _ROFF_FONT.match(line)
        if heading:
            line = "\n" + heading[1].replace('"', "")
        elif font:
            line = font[1].replace('"', "")
            if not line:
                line = "\n"
        elif line.startswith((".", "'")):
            continue
        line = _ROFF_NAME.sub(lambda match: _ROFF_NAMES[match[0]], _ROFF_ESCAPE.sub("", line))
        line = _ROFF_LONG_NAME.sub(lambda match: chr(int(match[1], 16)) if match[1] else "", line)
        lines.append(line.rstrip())
    return _BLANKS.sub("\n\n", "\n".join(lines)).strip()


_POD_CODE = re.compile(r"[BICFSXEZ]<([^<>]*)>|[BICFSXEZ]<< (.*?) >>")
_POD_LINK = re.compile(r"L<(?:([^<>|]*)\|)?([^<>]*)>")


def pod_text(pod: str) -> str:
    """Return the words of Perl documentation, without its formatting codes."""
    text = pod
    for _ in range(3):  # codes nest
        text = _POD_CODE.sub(lambda match: match[1] if match[1] is not None else match[2], text)
    text = _POD_LINK.sub(lambda match: match[1] or match[2], text)
    lines = (re.sub(r"^=(?:head\d|item)\s*", "", line) for line in text.splitlines())
    return _BLANKS.sub("\n\n", "\n".join(line for line in lines if not line.startswith("="))).strip()


def decode(raw: bytes, member: str, encoding: str = "utf-8") -> str | None:
    """Return the text of a member, unpacked when gzipped; None when it is not in that encoding."""
    if member.endswith((".gz", ".dz")):
        raw = gzip.decompress(raw)
    try:
        return raw.decode(encoding).replace("\r\n", "\n").replace("\x00", "")
    except UnicodeDecodeError:
        return None


def pieces(text: str, limit: int = MAX_CHARACTERS) -> Iterator[str]:
    """Yield the text in parts of at most about `limit` characters, cut at blank lines, else at line ends, else anywhere.

    What is shorter than MIN_CHARACTERS in the end is left out.
    """
    parts: list[str] = []
    size = 0
    for paragraph in _units(text, limit):
        if parts and size + len(paragraph) > limit:
            yield from _whole("".join(parts))
            parts, size = [], 0
        parts.append(paragraph)
        size += len(paragraph)
    yield from _whole("".join(parts))


def _units(text: str, limit: int) -> Iterator[str]:
    for paragraph in re.split(r"(?<=\n\n)", text):
        if len(paragraph) <= limit:
            yield paragraph
            continue
        for line in paragraph.splitlines(keepends=True):
            yield from (line[at : at + limit] for at in range(0, len(line), limit))


def _whole(text: str) -> Iterator[str]:
    text = text.strip("\n")
    if len(text) >= MIN_CHARACTERS:
        yield text + "\n"
