"""Duplicate documents out: the same text exactly, then nearly the same text by MinHash and locality-sensitive hashing.

First every document gets a digest of its text and a MinHash signature (by rensa) of its shingles; these are saved in
blocks, so a killed run goes on. Then signatures that agree in a band are compared, and documents whose estimated Jaccard
similarity reaches the threshold are joined; of each group the first is kept. Last the kept records are written.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rensa import RMinHash
from tqdm import tqdm

from nanotrain.config.errors import UserError
from nanotrain.data.record_shards import Record, RecordSource, State
from nanotrain.runtime.files import file_digest, write_bytes_atomic
from nanotrain.runtime.progress import Progress

_BLOCK_ROWS = 10_000
_SEED = 1
_LONG_WORD = 20
"""A text whose words are longer on average is not separated by blanks (Chinese, Japanese, Thai)."""


@dataclass(frozen=True)
class DedupSettings:
    """What counts as a duplicate.

    Attributes:
        threshold: estimated Jaccard similarity of shingles from which two documents are the same; 1 = exact text only.
        permutations: length of a signature; the estimate's standard error is at most 0.5 / sqrt(permutations).
        shingle_words: words of a shingle; a text without blanks is cut into as many characters.
    """

    threshold: float = 0.8
    permutations: int = 128
    shingle_words: int = 5

    def validate(self) -> None:
        """Raise UserError for values that cannot work."""
        if not 0.5 <= self.threshold <= 1:
            raise UserError(f"`--threshold` ({self.threshold}) must lie between 0.5 and 1; 1 drops exact copies only.")
        if self.permutations < 16 or self.shingle_words < 1:
            raise UserError("`--permutations` must be at least 16 and `--shingle-words` at least 1.")


def shingles(text: str, size: int) -> set[str]:
    """Return the runs of `size` words, lower case; of characters where the text is not separated by blanks."""
    words = text.lower().split()
    if not words or sum(map(len, words)) > _LONG_WORD * len(words):
        joined = "".join(words)
        return {joined[i : i + size] for i in range(max(1, len(joined) - size + 1))}
    return {" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}


def choose_bands(permutations: int, threshold: float) -> tuple[int, int]:
    """Return (bands, rows of a band) whose S-curve rises a little before the threshold, so that few pairs are missed."""
    wanted = threshold - 0.1
    options = [(permutations // rows, rows) for rows in range(1, permutations + 1)]
    return min(options, key=lambda option: abs((1 / option[0]) ** (1 / option[1]) - wanted))


def save_signatures(
    source: RecordSource, text_key: str, settings: DedupSettings, folder: Path, progress: Progress, key: str
) -> list[Path]:
    """Write digests and signatures of all records in blocks and return their files; finished blocks are kept."""
    files, state, stream = [], None, None
    with tqdm(unit="row", desc="signatures") as bar:
        for number in range(10**9):
            file = folder / f"signatures-{number:05d}.npz"
            item_key = f"{key}:{file.name}"
            if item_key not in progress or not (file.is_file() and file_digest(file) == progress[item_key]["sha256"]):
                stream = source.records(state) if stream is None else stream
                texts = _texts(stream, text_key, bar)
                write_bytes_atomic(file, _block(texts, settings))
                item = {"state": source.state(), "rows": len(texts), "sha256": file_digest(file)}
                progress.record(item_key, item)
            elif stream is None:
                bar.update(progress[item_key]["rows"])
            files.append(file)
            state = progress[item_key]["state"]
            if progress[item_key]["rows"] < _BLOCK_ROWS:
                return files
    raise AssertionError("unreachable")


def _texts(stream: Iterator[Record], text_key: str, bar: tqdm) -> list[str]:
    texts = []
    for record in stream:
        text = record[text_key]
        if not isinstance(text, str):
            raise UserError(f"`{text_key}` of record {bar.n} is {type(text).__name__}, not text; correct `--text-key`.")
        texts.append(text)
        bar.update()
        if len(texts) == _BLOCK_ROWS:
            break
    return texts


def _block(texts: list[str], settings: DedupSettings) -> bytes:
    digests = [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts]
    exact = np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)
    signatures = np.zeros((len(texts), 0), np.uint32)
    if settings.threshold < 1 and texts:
        sets = [sorted(shingles(text, settings.shingle_words)) for text in texts]
        rows = RMinHash.digests_from_token_sets(sets, settings.permutations, _SEED)
        signatures = np.asarray(rows, np.uint32)
    content = io.BytesIO()
    np.savez(content, exact=exact, signatures=signatures)
    return content.getvalue()


@dataclass(frozen=True)
class Duplicates:
    """What is dropped.

    Attributes:
        kept_as: [records] int64; the record that stands for each: its own number when it is kept.
        similarity: [records] float32; estimated Jaccard similarity to that record, 1 for exact copies.
        exact: [records] bool; dropped because the text is the same.
    """

    kept_as: np.ndarray
    similarity: np.ndarray
    exact: np.ndarray

    @property
    def kept(self) -> np.ndarray:
        """[records] bool."""
        return self.kept_as == np.arange(len(self.kept_as))

    def counts(self) -> dict[str, int]:
        """Return records, kept, exact_duplicates, near_duplicates."""
        dropped = ~self.kept
        return {"records": len(self.kept_as), "kept": int(self.kept.sum())} | {
            "exact_duplicates": int(self.exact.sum()),
            "near_duplicates": int((dropped & ~self.exact).sum()),
        }


def find_duplicates(files: list[Path], settings: DedupSettings) -> Duplicates:
    """Decide from the saved blocks which records are dropped; the first of each group is kept."""
    blocks = [np.load(file) for file in files]
    exact_keys = np.concatenate([block["exact"] for block in blocks])
    count = len(exact_keys)
    pairs = np.ascontiguousarray(exact_keys).view([("a", np.uint64), ("b", np.uint64)]).reshape(-1)
    _, first, inverse = np.unique(pairs, return_index=True, return_inverse=True)
    parent = first[inverse].astype(np.int64)
    exact = parent != np.arange(count)
    if settings.threshold < 1 and count:
        signatures = np.concatenate([block["signatures"] for block in blocks if len(block["exact"])])
        _join_similar(signatures, np.flatnonzero(~exact), settings, parent)
    roots = np.asarray([_root(parent, number) for number in range(count)], np.int64)
    similarity = np.ones(count, np.float32)
    near = (roots != np.arange(count)) & ~exact
    if near.any():
        similarity[near] = (signatures[near] == signatures[roots[near]]).mean(axis=1)
    return Duplicates(roots, similarity, exact)


def _join_similar(signatures: np.ndarray, candidates: np.ndarray, settings: DedupSettings, parent: np.ndarray) -> None:
    bands, rows = choose_bands(settings.permutations, settings.threshold)
    for band in range(bands):
        part = np.ascontiguousarray(signatures[candidates, band * rows : (band + 1) * rows])
        keys = part.view(np.dtype((np.void, part.dtype.itemsize * rows))).reshape(-1)
        _, inverse = np.unique(keys, return_inverse=True)
        order = np.lexsort((candidates, inverse))
        bucket, members = inverse[order], candidates[order]
        starts = np.flatnonzero(np.r_[True, bucket[1:] != bucket[:-1]])
        leader = members[np.repeat(starts, np.diff(np.r_[starts, len(members)]))]
        previous = np.r_[members[:1], members[:-1]]
        for others in (leader, np.where(np.r_[True, bucket[1:] != bucket[:-1]], members, previous)):
            different = others != members
            left, right = others[different], members[different]
            alike = (signatures[left] == signatures[right]).mean(axis=1) >= settings.threshold
            for a, b in zip(left[alike], right[alike], strict=True):
                one, two = sorted((_root(parent, int(a)), _root(parent, int(b))))
                parent[two] = one


def _root(parent: np.ndarray, number: int) -> int:
    while parent[number] != number:
        parent[number] = parent[parent[number]]
        number = int(parent[number])
    return number


class KeptRecords:
    """The records that are kept, in order; a source of records for `record_shards.write_shards`."""

    def __init__(self, source: RecordSource, kept: np.ndarray) -> None:
        self._source, self._kept = source, kept
        self._number = 0
        self._state: State = {}
        self.counts: Counter[str] = Counter()

    def state(self) -> State:
        """Return the state of the source and how many of its records were read."""
        return self._state

    def records(self, state: State | None = None) -> Iterator[Record]:
        """Yield the kept records, all or those after `state`."""
        self._state = state or {}
        self._number = state["read"] if state else 0
        for record in self._source.records(state["source"] if state else None):
            number, self._number = self._number, self._number + 1
            if self._kept[number]:
                self._state = {"source": self._source.state(), "read": self._number}
                yield record
