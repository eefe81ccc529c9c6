"""Documents before tokenisation: exact duplicates out, a byte cap, and the split into train and validation by family.

A family is whatever would leak if it stood on both sides: a page, a source file or project, a message in all its
translations, a template, a conversation. The split looks at the family's name only, never at a document.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from nanotrain.config.errors import UserError


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        text: what is tokenised.
        family: name of everything that must stay on one side of the split.
        source: name of the source, for the manifest.
    """

    text: str
    family: str
    source: str


def decode_utf8(raw: bytes, name: str) -> str:
    """Return the text of `raw`.

    Raises:
        UserError: not UTF-8; the message names the file and the offset of the first bad byte.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"`{name}` is not UTF-8: byte {raw[error.start]:#04x} at offset {error.start}; convert the file or leave"
            " it out."
        ) from None


def unit_hash(name: str, salt: str) -> float:
    """Return a number in [0, 1) that depends on nothing but `name` and `salt`."""
    digest = hashlib.sha256(f"{salt}\0{name}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big") / (1 << 56)


def drop_duplicates(documents: Iterable[Document], seen: set[bytes]) -> list[Document]:
    """Return the documents whose exact text is not in `seen`, and add them to it."""
    kept = []
    for document in documents:
        digest = hashlib.md5(document.text.encode("utf-8", "surrogatepass"), usedforsecurity=False).digest()
        if digest not in seen:
            seen.add(digest)
            kept.append(document)
    return kept


def _families(documents: Iterable[Document]) -> dict[str, list[Document]]:
    families: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        families[document.family].append(document)
    return families


def cap_bytes(documents: list[Document], max_bytes: int) -> list[Document]:
    """Keep whole families, in the order of a hash of their names, until `max_bytes` of text; 0 keeps everything.

    The first two families are always kept, so that both sides of the split have text; their documents are cut off
    at the cap when they alone exceed it, with at least one document each.
    """
    if not max_bytes:
        return documents
    families = _families(documents)
    kept, total = [], 0
    for number, name in enumerate(sorted(families, key=lambda name: (unit_hash(name, "cap"), name))):
        budget = max(max_bytes // 2, 1) if number < 2 else max_bytes - total
        for position, document in enumerate(families[name]):
            size = len(document.text.encode())
            if size > budget and not (number < 2 and position == 0):
                break
            budget -= size
            total += size
            kept.append(document)
        if total >= max_bytes and number >= 1:
            break
    return kept


def split_by_family(documents: list[Document], validation_fraction: float) -> tuple[list[Document], list[Document]]:
    """Return (train, validation).

    A family is held out when the hash of its name falls below `validation_fraction`: adding text never moves what is
    already there. When that leaves a side empty, the family nearest to the border changes sides.

    Raises:
        UserError: fewer than two families.
    """
    position = {name: unit_hash(name, "split") for name in _families(documents)}
    if len(position) < 2:
        raise UserError(
            f"a category with {len(position)} document families cannot be split into train and validation; raise"
            " `max_bytes_per_category` or add sources."
        )
    order = sorted(position, key=lambda name: (position[name], name))
    held_out = {name for name in order if position[name] < validation_fraction} or {order[0]}
    held_out.discard(order[-1])
    train = [document for document in documents if document.family not in held_out]
    return train, [document for document in documents if document.family in held_out]
