"""Text to ids at corpus speed, with the ids of the folder's own `tokenizers` object and no others.

Three ways lead there: gigatoken (fastest), tiktoken, and `tokenizers` itself, which defines what is right. A fast way is
taken only for the tokenizer form it is known to handle, only after it gave the right ids for the probe texts, and its
work is compared again on a sample while it runs. Names of specials in a text are ordinary characters, as in any corpus.
"""

import functools
import itertools
import json
import logging
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
from tokenizers import Regex, pre_tokenizers

from nanotrain.config.errors import UserError
from nanotrain.data.tokenizer import CorpusEncoder, load_tokenizer_json, plain_tokenizer

try:
    import gigatoken
except ImportError:  # no wheel for this platform
    gigatoken = None

_LOG = logging.getLogger("nanotrain")
ENCODERS = ("gigatoken", "tiktoken", "tokenizers")
"""Fastest first."""
_CACHE_GROWTH_BYTES = 1 << 30
"""gigatoken remembers every word it saw and never forgets; a process that grew by this much starts it afresh."""
_LAST_CHECKED = 0x34000
"""Beyond lie unassigned planes, tags and private use; texts with such characters take the slow way."""

Ids = tuple[np.ndarray, np.ndarray]
"""Ids of all texts back to back, [n] uint32, and the number of ids of each text, [texts] int64."""


class TextEncoder(Protocol):
    """Encodes a batch of texts; no eos is added."""

    name: str

    def encode_batch(self, texts: list[str]) -> Ids: ...


def _join(parts: list[np.ndarray]) -> Ids:
    lengths = np.fromiter((len(part) for part in parts), np.int64, len(parts))
    return (np.concatenate(parts).astype(np.uint32) if parts else np.zeros(0, np.uint32)), lengths


class HfEncoder:
    """The `tokenizers` object itself: right by definition, for any tokenizer.json."""

    name = "tokenizers"

    def __init__(self, folder: Path) -> None:
        self._tokenizer = plain_tokenizer(folder)

    def content(self) -> dict[str, Any]:
        """Return what tokenizer.json says, in the library's current form."""
        return json.loads(self._tokenizer.to_str())

    def encode_batch(self, texts: list[str]) -> Ids:
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return _join([np.asarray(one.ids, np.uint32) for one in encoded])


class TiktokenEncoder:
    """tiktoken over the ranks of a byte-level BPE folder."""

    name = "tiktoken"

    def __init__(self, folder: Path) -> None:
        self._encoder = CorpusEncoder(folder)

    def encode_batch(self, texts: list[str]) -> Ids:
        return _join([self._encoder.encode(text) for text in texts])


@functools.cache
def _unassigned() -> np.ndarray:
    """Return for every code point whether `tokenizers` takes it for unassigned, [0x110000] bool.

    gigatoken's character classes are those of a newer Unicode; they differ exactly where the older one has nothing.
    """
    known = [chr(c) for c in range(_LAST_CHECKED) if not 0xD800 <= c < 0xE000]
    splitter = pre_tokenizers.Split(Regex(r"\p{Cn}+"), "removed")
    table = np.ones(0x110000, bool)
    for piece, _ in splitter.pre_tokenize_str("".join(known)):
        table[np.frombuffer(piece.encode("utf-32-le"), np.uint32)] = False
    return table


class GigatokenEncoder:
    """gigatoken, with `tokenizers` for texts whose characters its newer Unicode classes differently."""

    name = "gigatoken"

    def __init__(self, exact: HfEncoder) -> None:
        self._exact = exact
        content = exact.content()
        content |= {"truncation": None, "padding": None, "post_processor": None}
        content["added_tokens"] = [entry for entry in content["added_tokens"] if not entry["special"]]
        self._json = json.dumps(content)
        self._start()

    def _start(self) -> None:
        self._backend = gigatoken.Tokenizer.from_json(self._json)
        self._rss = psutil.Process().memory_info().rss

    def is_unsafe(self, text: str) -> bool:
        if text.isascii():
            return False
        return bool(_unassigned()[np.frombuffer(text.encode("utf-32-le"), np.uint32)].any())

    def encode_batch(self, texts: list[str]) -> Ids:
        unsafe = [i for i, text in enumerate(texts) if self.is_unsafe(text)]
        if not unsafe:
            return self._encode_fast(texts)
        slow_ids, slow_lengths = self._exact.encode_batch([texts[i] for i in unsafe])
        hidden = set(unsafe)
        ids, lengths = self._encode_fast(["" if i in hidden else text for i, text in enumerate(texts)])
        pieces = np.split(ids, np.cumsum(lengths)[:-1])
        for i, piece in zip(unsafe, np.split(slow_ids, np.cumsum(slow_lengths)[:-1]), strict=True):
            pieces[i] = piece
        return _join(pieces)

    def _encode_fast(self, texts: list[str]) -> Ids:
        if psutil.Process().memory_info().rss - self._rss > _CACHE_GROWTH_BYTES:
            self._start()
        layout = self._backend.encode_batch(texts, parallel=False).layout
        offsets = np.asarray(layout.offsets.data, np.int64)
        ids = layout.content.data[offsets[0] : offsets[-1]]
        return ids, np.diff(offsets)


def _is_byte_level_bpe(content: dict[str, Any]) -> bool:
    """Return whether the tokenizer splits by one pattern, then merges bytes: the form that the fast ways implement."""
    model, before = content["model"], content["pre_tokenizer"]
    if model["type"] != "BPE" or content["normalizer"] is not None or before is None or before["type"] != "Sequence":
        return False
    steps = before["pretokenizers"]
    options = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    return (
        [step["type"] for step in steps] == ["Split", "ByteLevel"]
        and "Regex" in steps[0]["pattern"]
        and (steps[0]["behavior"], steps[0]["invert"]) == ("Isolated", False)
        and not steps[1]["add_prefix_space"]
        and not steps[1]["use_regex"]
        and not any(model[option] for option in options)
        and not model["byte_fallback"]
    )


def probe_texts(content: dict[str, Any]) -> list[str]:
    """Return texts that tell a wrong encoder: pairs of all kinds of characters, runs, contractions, added tokens."""
    kinds = (
        "aBé\u0301ſ ß ǅʰ日あア가ᄀ०٢Ⅷ½19.,'’-_/<>\n\r\t\x0b\x0c\x1c\x85\xa0\u2003\u2028\u3000\u200d\ufe0f\ufeff\x00\x7f"
    )
    kinds += "\U0001f469\U0001f1e9\u0915\u094d\u064e\u0e33\ufffd\U0001d400\U00020000"
    pairs = ["".join(pair) for pair in itertools.product(kinds, repeat=2)]
    texts = [" ".join(pairs[i::97]) + "".join(pairs[i::89]) for i in range(89)]
    words = ["don't WON'T I'LL we've", "a" * 700, "\n" * 300, " " * 300 + "x", "=-" * 400, "1234567890" * 9, "", " "]
    added = [entry["content"] for entry in content["added_tokens"]][:64]
    return [*texts, *words, *(f" x{name}y {name} " for name in added)]


def build_encoder(folder: Path, wanted: str = "auto") -> TextEncoder:
    """Return the fastest encoder that gives the ids of the folder's `tokenizers` object.

    Args:
        folder: with tokenizer.json.
        wanted: auto, or one of ENCODERS to insist on it.

    Raises:
        MissingInputError, UserError: as `load_tokenizer_json`; or the encoder that was insisted on is not installed or
            not exact for this tokenizer.
    """
    if wanted not in ("auto", *ENCODERS):
        raise UserError(f"encoder {wanted!r} is not known; use auto, {', '.join(ENCODERS)}.")
    exact = HfEncoder(folder)
    for name in ENCODERS[:-1] if wanted == "auto" else (wanted,):
        encoder, reason = _try_encoder(name, folder, exact)
        if encoder is not None:
            return encoder
        _LOG.info("%s is not used: %s", name, reason)
        if wanted != "auto":
            raise UserError(f"encoder {wanted!r} cannot be used with `{folder}`: {reason}; use auto.")
    return exact


def known_encoder(folder: Path, name: str) -> tuple[TextEncoder, HfEncoder]:
    """Return the encoder that `build_encoder` found elsewhere, not probed again, and the exact one beside it."""
    exact = HfEncoder(folder)
    if name == GigatokenEncoder.name:
        return GigatokenEncoder(exact), exact
    return (TiktokenEncoder(folder) if name == TiktokenEncoder.name else exact), exact


def _try_encoder(name: str, folder: Path, exact: HfEncoder) -> tuple[TextEncoder | None, str]:
    """Return the encoder, or None and why it is not to be had."""
    if name == HfEncoder.name:
        return exact, ""
    content = exact.content()
    refusals = {
        "it is not installed": name == GigatokenEncoder.name and gigatoken is None,
        "the tokenizer is not a byte-level BPE behind one pattern": not _is_byte_level_bpe(content),
        "the tokenizer finds added tokens in text": name == TiktokenEncoder.name
        and not all(entry["special"] for entry in content["added_tokens"]),
    }
    for reason, applies in refusals.items():
        if applies:
            return None, reason
    try:
        encoder = GigatokenEncoder(exact) if name == GigatokenEncoder.name else TiktokenEncoder(folder)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return None, f"it does not know the tokenizer's form ({error})"
    texts = probe_texts(content)
    for ours, right in zip(encoder.encode_batch(texts), exact.encode_batch(texts), strict=True):
        if not np.array_equal(ours, right):
            return None, "its ids differ from the exported tokenizer's on a probe text"
    return encoder, ""


def eos_token_id(folder: Path, name: str | None) -> int:
    """Return the id that ends a document: `name`, or the folder's own eos_token.

    Raises:
        UserError: the folder names none, or its vocabulary does not hold it.
    """
    origin = "--eos-token"
    if name is None:
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            path = Path(folder) / file
            found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            entry = found["eos_token"] if "eos_token" in found else None
            name = entry["content"] if isinstance(entry, dict) else entry
            origin = f"{file}'s eos_token"
            if name is not None:
                break
        else:
            raise UserError(f"`{folder}` names no eos_token, which ends every document; give --eos-token.")
    token = load_tokenizer_json(folder).token_to_id(name)
    if token is None:
        raise UserError(f"{origin} ({name!r}) is not in the vocabulary of `{folder}`; give --eos-token.")
    return token
