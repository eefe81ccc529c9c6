"""A source of a blend: one or more verified shards whose documents are concatenated and cut into sequences.

Sequence k of a source lies in a known shard at a known position, so a source costs one search among its shards.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nanotrain.config.errors import UserError
from nanotrain.data.token_shards import TokenShard, shard_files
from nanotrain.data.verified_files import verify_file
from nanotrain.model.batch import IGNORE_INDEX

Row = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Input ids, labels, segment ids to be written in place; each [S]."""


def write_chunk(shard: TokenShard, start: int, row: Row) -> None:
    """Fill a row with the tokens of the concatenated documents from `start`, and the tokens after them as labels.

    A label that would cross into the next document is ignored; each document is a segment.
    """
    inputs, labels, segments = row
    length = len(inputs)
    tokens = shard.tokens(start, start + length + 1)
    inputs[:] = tokens[:-1]
    labels[:] = tokens[1:]
    borders = shard.borders(start + 1, start + length + 1) - start
    labels[borders - 1] = IGNORE_INDEX
    segments[:] = 0
    segments[borders[borders < length]] = 1
    np.cumsum(segments, out=segments)


def verify_shard(prefix: Path) -> tuple[Path, str | None]:
    """Check a shard against PREFIX.manifest.json, where there is one, and return (prefix, its tokenizer's digest).

    A shard without a manifest (written by Megatron's own tools) is checked by its sizes and index alone.

    Raises:
        MissingInputError, UserError: a file is missing or is not the one that was written; the manifest is damaged.
    """
    manifest = Path(f"{prefix}.manifest.json")
    if not manifest.is_file():
        return prefix, None
    remedy = "run data_prep.tokenize_corpus again after removing the shard, or fetch it again"
    try:
        content = json.loads(manifest.read_bytes())
        listed = [(file, content["files"][file.name]) for file in shard_files(prefix)]
        expected = [(file, int(entry["bytes"]), str(entry["sha256"])) for file, entry in listed]
        tokenizer = str(content["tokenizer_digest"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"`{manifest}` is not the manifest of a shard ({error!r}); {remedy}.") from None
    for file, size, sha256 in expected:
        verify_file(file, size=size, sha256=sha256, manifest=manifest, remedy=remedy)
    return prefix, tokenizer


class TokenSource:
    """Shards walked as one; a sequence lies in one shard, and each shard's last tokens, fewer than a sequence, are left over.

    Args:
        name: for messages.
        prefixes: verified shards, in order.
        sequence_length: tokens of a sequence.

    Raises:
        UserError: no shard, a shard given twice or without documents, tokens that are no integers, or no sequence.
    """

    def __init__(self, name: str, prefixes: Sequence[Path], sequence_length: int) -> None:
        self._length = sequence_length
        if not prefixes:
            raise UserError(f"source `{name}` lists no shard; give at least one prefix of a .bin/.idx pair.")
        self.shards = [TokenShard(prefix) for prefix in prefixes]
        seen: dict[tuple[int, int], Path] = {}
        for shard in self.shards:
            stat = shard_files(shard.prefix)[0].stat()
            first = seen.setdefault((stat.st_dev, stat.st_ino), shard.prefix)
            if first is not shard.prefix:
                raise UserError(
                    f"source `{name}` lists the shard `{shard.prefix}` twice (the other is `{first}`), so its documents"
                    " would be repeated unnoticed; remove one, or raise the source's weight."
                )
        for shard in self.shards:
            if not shard.num_documents:
                raise UserError(f"`{shard.prefix}` of source `{name}` holds no document; leave the shard out.")
            if shard.dtype.kind not in "iu":
                raise UserError(f"`{shard.prefix}` of source `{name}` holds {shard.dtype}, which are no token ids.")
        self.num_tokens = sum(shard.num_tokens for shard in self.shards)
        self._ends = np.cumsum([max(0, shard.num_tokens - 1) // sequence_length for shard in self.shards])
        self.num_sequences = int(self._ends[-1])
        if not self.num_sequences:
            longest = max(shard.num_tokens for shard in self.shards)
            raise UserError(
                f"source `{name}` (`{prefixes[0]}`) has {longest} tokens, less than one sequence of"
                f" `stage.training.sequence_length` ({sequence_length}) + 1; shorten sequences, prepare more text, or"
                " set the source's weight to 0."
            )

    def write_sequence(self, number: int, row: Row) -> None:
        """Fill a row with sequence `number` of the source, in [0, num_sequences)."""
        if not 0 <= number < self.num_sequences:
            raise IndexError(f"sequence {number} of {self.num_sequences}")
        place = int(np.searchsorted(self._ends, number, side="right"))
        first = number - (int(self._ends[place - 1]) if place else 0)
        write_chunk(self.shards[place], first * self._length, row)
