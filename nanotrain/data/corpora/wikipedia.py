"""Web text: the articles of the English Wikipedia slice that gensim's wheel carries for its tests."""

import bz2
import html
import re
from collections.abc import Iterator

from nanotrain.data.documents import Document, decode_utf8
from nanotrain.data.wheels import WheelReader

MEMBER = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_PAGE = re.compile(r"<title>(.*?)</title>\s*<ns>0</ns>(.*?)</page>", re.S)
_TEXT = re.compile(r"<text[^>]*>(.*?)</text>", re.S)
_COMMENT = re.compile(r"<!--.*?-->", re.S)
_REFERENCE = re.compile(r"<ref[^>]*?/>|<ref.*?</ref>|<(math|gallery|timeline|source)\b.*?</\1>", re.S | re.I)
_INNER_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\|).)*?\|\}", re.S)
_FILE_LINK = re.compile(r"\[\[(?:File|Image|Category|[a-z\-]{2,12}):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", re.I)
_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]")
_URL = re.compile(r"\[(?:https?|ftp)://\S+\s*([^\]]*)\]")
_TAG = re.compile(r"</?[a-zA-Z][^>]*>")
_BOLD = re.compile(r"'{2,}")
_HEADING = re.compile(r"^=+\s*(.*?)\s*=+\s*$", re.M)
_BLANKS = re.compile(r"\n{3,}")
_LAST_SECTIONS = re.compile(
    r"^=+\s*(?:References|External links|Notes|Further reading|Bibliography|See also)\s*=+", re.M
)
_SHORTEST_ARTICLE = 500


def plain_text(markup: str) -> str:
    """Return the readable text of MediaWiki markup: no templates, tables, references, files or tags."""
    text = html.unescape(_COMMENT.sub("", markup))
    ending = _LAST_SECTIONS.search(text)
    if ending:
        text = text[: ending.start()]
    text = _REFERENCE.sub("", _COMMENT.sub("", text))
    for pattern in (_INNER_TEMPLATE, _TABLE):
        replaced = 1
        while replaced:  # from the inside outwards
            text, replaced = pattern.subn("", text)
    text = _FILE_LINK.sub("", text)
    text = _LINK.sub(r"\1", _LINK.sub(r"\1", text))
    text = _BOLD.sub("", _TAG.sub("", _URL.sub(r"\1", text)))
    text = _HEADING.sub(r"\1", text).replace("\xa0", " ")
    lines = (line.strip(" \t:;") for line in text.splitlines())
    kept = (line for line in lines if not line.startswith(("|", "!", "{|", "|}", "}}")))
    return _BLANKS.sub("\n\n", "\n".join(kept)).strip()


def articles(reader: WheelReader) -> Iterator[Document]:
    """Yield one document an article; the family is the article."""
    dump = decode_utf8(bz2.decompress(reader.read_bytes(MEMBER)), MEMBER)
    for page in _PAGE.finditer(dump):
        body = _TEXT.search(page.group(2))
        if body is None or "<redirect" in page.group(2):
            continue
        title, text = html.unescape(page.group(1)), plain_text(html.unescape(body.group(1)))
        if len(text) >= _SHORTEST_ARTICLE:
            yield Document(f"{title}\n\n{text}\n", f"enwiki:{title}", "enwiki")
