"""How much of held-out text occurs in training text: the 13-word windows that both have, by document and by source.

Windows are compared by a 64-bit hash. Training text is walked through in parts, so memory follows the held-out text.
"""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from nanotrain.data.documents import Document, unit_hash

WINDOW = 13
"""Words; the usual length in contamination reports."""
_TEXTS_AT_ONCE = 512


def _window_hashes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return ([windows] uint64, [windows] int64): a hash of every window inside a text, and the text's number."""
    words: list[int] = []
    owners: list[np.ndarray] = []
    inside: list[np.ndarray] = []
    for number, text in enumerate(texts):
        hashed = [zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in text.split()]
        if len(hashed) >= WINDOW:
            words += hashed
            owners.append(np.full(len(hashed), number))
            inside.append(np.arange(len(hashed)) <= len(hashed) - WINDOW)  # a window begins here and ends in the text
    if not words:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    starts = np.flatnonzero(np.concatenate(inside))
    array = np.asarray(words, np.uint64)
    total = np.zeros(len(starts), np.uint64)
    for offset in range(WINDOW):
        total = total * np.uint64(0x9E3779B97F4A7C15) + (array[starts + offset] ^ np.uint64(0xBF58476D1CE4E5B9))
    return total, np.concatenate(owners)[starts]


def _parts(texts: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(texts)
    while part := list(islice(iterator, _TEXTS_AT_ONCE)):
        yield part


def document_overlap(train: Iterable[str], validation: Sequence[str]) -> np.ndarray:
    """Return [documents, 2] int64: of each validation text, its windows and how many of them training text has."""
    hashes, owners = _window_hashes(validation)
    wanted, positions = np.unique(hashes, return_inverse=True)
    known = np.zeros(len(wanted), bool)
    for part in _parts(train):
        known |= np.isin(wanted, _window_hashes(part)[0])
    counts = np.zeros((len(validation), 2), np.int64)
    np.add.at(counts[:, 0], owners, 1)
    np.add.at(counts[:, 1], owners, known[positions])
    return counts


def ngram_overlap(train: Iterable[str], validation: Sequence[str]) -> float:
    """Return the share of the validation texts' 13-word windows that occur in the training texts; 0 without windows."""
    windows, shared = document_overlap(train, validation).sum(axis=0)
    return float(shared / windows) if windows else 0.0


def overlap_report(
    train: Sequence[Document], validation: Sequence[Document], max_share: float = 1.0
) -> tuple[dict[str, Any], list[Document]]:
    """Return the overlap of a split, and the validation documents without those that training text nearly holds.

    Args:
        train: training documents.
        validation: held-out documents.
        max_share: a held-out document that shares more than this part of its windows with training text is dropped;
            1 drops none.

    Returns:
        (report, kept). The report has `dropped`, and of the kept documents: windows, shared, share; documents and
        documents_with_overlap; by_source: source -> share. random_share is the share when as many documents are held
        out by a hash of their text instead.
    """
    counts = document_overlap((document.text for document in train), [document.text for document in validation])
    keep = counts[:, 1] <= max_share * counts[:, 0]
    kept = [document for document, good in zip(validation, keep, strict=True) if good]
    by_source: dict[str, np.ndarray] = {}
    for document, count in zip(kept, counts[keep], strict=True):
        by_source[document.source] = by_source[document.source] + count if document.source in by_source else count
    mixed = sorted([*train, *validation], key=lambda document: unit_hash(document.text, "random split"))
    held_out, rest = mixed[: len(validation)], mixed[len(validation) :]
    windows, shared = (int(total) for total in counts[keep].sum(axis=0))
    report = {
        "windows": windows,
        "shared": shared,
        "share": shared / windows if windows else 0.0,
        "documents": len(kept),
        "documents_with_overlap": int((counts[keep][:, 1] > 0).sum()),
        "dropped": len(validation) - len(kept),
        "by_source": {
            source: round(float(count[1] / count[0]), 4) if count[0] else 0.0
            for source, count in sorted(by_source.items())
        },
        "random_share": ngram_overlap((document.text for document in rest), [document.text for document in held_out]),
    }
    return report, kept
