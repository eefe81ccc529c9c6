"""The tokenizer: the first ranks of a published byte-level BPE as a Hugging Face folder, and a fast way to its ids.

BPE ranks are ordered, so the first N of them are a valid smaller vocabulary with no training. Ids 0 to 999 are
specials with Nemotron Nano 2's names, id = 1000 + rank follows. Corpora are encoded by tiktoken, ten times faster than
the exported `tokenizers` object with the same ids.
"""

import base64
import functools
import json
import re
from pathlib import Path

import numpy as np
import tiktoken
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.data.chat import portable_template
from nanotrain.runtime.files import write_bytes_atomic, write_json_atomic

NUM_SPECIALS = 1000
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
TURN_END_ID = 12
_NAMED = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]")
_NAMED += ("[/TOOL_RESULTS]", "[TOOL_CALLS]")
SPECIALS = _NAMED + tuple(f"<SPECIAL_{i}>" for i in range(len(_NAMED), NUM_SPECIALS))
"""String of each id below 1000."""
_LONG_SPACE = re.compile(r"\s{4096}")
"""tiktoken's pattern engine overflows its stack on long runs of white space."""


@functools.cache
def _byte_alphabet() -> tuple[str, ...]:
    """Return the printable character that stands for each byte in a byte-level BPE (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    table = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in table)
    table |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return tuple(table[byte] for byte in range(256))


def _to_characters(token: bytes) -> str:
    return "".join(_byte_alphabet()[byte] for byte in token)


def _to_bytes(characters: str) -> bytes:
    inverse = _inverse_alphabet()
    return bytes(inverse[character] for character in characters)


@functools.cache
def _inverse_alphabet() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(_byte_alphabet())}


def _split_of(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two tokens whose merge makes `token`: what BPE leaves when only lower ranks may merge."""
    limit, parts = ranks[token], [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [parts[i] + parts[i + 1] for i in range(len(parts) - 1)]
        candidates = [(ranks[pair], i) for i, pair in enumerate(joined) if pair in ranks and ranks[pair] < limit]
        if not candidates:
            raise UserError(f"the vocabulary's token {token!r} (rank {limit}) is not a merge of two earlier ones.")
        place = min(candidates)[1]
        parts[place : place + 2] = [joined[place]]
    return parts[0], parts[1]


def read_tekken(raw: bytes, num_ranks: int) -> tuple[str, list[bytes]]:
    """Return (split pattern, the first `num_ranks` tokens in the order of their ranks) of a tekken JSON file.

    Raises:
        UserError: the file has fewer ranks, or does not begin with the 256 single bytes.
    """
    content = json.loads(raw)
    vocabulary = content["vocab"]
    if num_ranks > len(vocabulary):
        raise UserError(
            f"`stage.corpus.vocab_size` ({num_ranks + NUM_SPECIALS}) exceeds the {len(vocabulary)} ranks of the"
            f" published tokenizer plus {NUM_SPECIALS} specials; lower it."
        )
    tokens = [base64.b64decode(entry["token_bytes"]) for entry in vocabulary[:num_ranks]]
    if [entry["rank"] for entry in vocabulary[:num_ranks]] != list(range(num_ranks)) or len(set(tokens)) != num_ranks:
        raise UserError("the published tokenizer file does not list its ranks in order.")
    if {token for token in tokens[:256] if len(token) == 1} != {bytes([byte]) for byte in range(256)}:
        raise UserError("the published tokenizer file does not begin with the 256 single bytes.")
    return content["config"]["pattern"], tokens


def build_tokenizer(pattern: str, tokens: list[bytes]) -> Tokenizer:
    """Return the `tokenizers` object with ids 0..999 special and id 1000 + rank for `tokens`."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = [_split_of(token, ranks) for token in tokens if len(token) > 1]
    vocabulary = {name: i for i, name in enumerate(SPECIALS)}
    clash = vocabulary.keys() & {_to_characters(token) for token in tokens}
    if clash:
        raise UserError(f"the vocabulary holds tokens with the names of specials: {', '.join(sorted(clash))}.")
    vocabulary |= {_to_characters(token): NUM_SPECIALS + rank for token, rank in ranks.items()}
    bpe = models.BPE(
        vocab=vocabulary,
        merges=[(_to_characters(left), _to_characters(right)) for left, right in merges],
        ignore_merges=True,
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a folder that `transformers.AutoTokenizer` loads offline: base eos `</s>`, pad `<unk>`, no BOS added."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {"bos_token": SPECIALS[BOS_ID], "eos_token": SPECIALS[EOS_ID], "unk_token": SPECIALS[UNK_ID]}
    names["pad_token"] = SPECIALS[UNK_ID]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": portable_template(),
    }
    write_bytes_atomic(folder / "tokenizer.json", tokenizer.to_str().encode())
    write_bytes_atomic(folder / "chat_template.jinja", portable_template().encode())
    write_json_atomic(folder / "special_tokens_map.json", names)
    write_json_atomic(folder / "tokenizer_config.json", settings | names)


def load_tokenizer_json(folder: Path) -> Tokenizer:
    """Return the `tokenizers` object of a tokenizer folder.

    Raises:
        MissingInputError: there is no tokenizer.json.
        UserError: it cannot be read.
    """
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise MissingInputError(f"`{file}` is missing; a tokenizer folder holds tokenizer.json.")
    try:
        return Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception for any malformed file
        raise UserError(f"`{file}` is not a tokenizer ({error}); write the folder again.") from None


def _special_ids(content: dict) -> set[int]:
    return {entry["id"] for entry in content["added_tokens"] if entry["special"]}


def token_byte_lengths(tokenizer_folder: Path) -> np.ndarray:
    """Return how many bytes of text each id stands for, [V] int64; specials stand for none.

    Raises:
        MissingInputError, UserError: as `load_tokenizer_json`; or the vocabulary is not byte-level.
    """
    content = json.loads(load_tokenizer_json(tokenizer_folder).to_str())
    vocabulary, specials = content["model"]["vocab"], _special_ids(content)
    highest = max([*vocabulary.values(), *(entry["id"] for entry in content["added_tokens"])])
    lengths = np.zeros(highest + 1, np.int64)
    for characters, token in vocabulary.items():
        if token not in specials:
            _require_byte_level(characters, tokenizer_folder)
            lengths[token] = len(characters)
    return lengths


def _require_byte_level(characters: str, folder: Path) -> None:
    if not all(character in _inverse_alphabet() for character in characters):
        raise UserError(f"`{folder}/tokenizer.json` holds {characters!r}, so it is not a byte-level BPE.")


def plain_tokenizer(folder: Path) -> Tokenizer:
    """Return a folder's `tokenizers` object for corpora: nothing added, cut or padded, specials in text not parsed."""
    tokenizer = load_tokenizer_json(folder)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


class CorpusEncoder:
    """Encodes plain text to the ids of a byte-level BPE tokenizer folder: with tiktoken, long white space with `tokenizers`.

    Names of specials that occur in the text are ordinary characters here. Documents get the eos id at their end.

    Args:
        tokenizer_folder: as `save_tokenizer` writes it.
    """

    def __init__(self, tokenizer_folder: Path) -> None:
        self._exact = plain_tokenizer(tokenizer_folder)
        content = json.loads(self._exact.to_str())
        specials = _special_ids(content)
        vocabulary = {chars: token for chars, token in content["model"]["vocab"].items() if token not in specials}
        self._offset = min(vocabulary.values())
        for characters in vocabulary:
            _require_byte_level(characters, tokenizer_folder)
        ranks = {_to_bytes(characters): token - self._offset for characters, token in vocabulary.items()}
        try:
            pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        except (KeyError, TypeError, IndexError):
            raise UserError(
                f"`{tokenizer_folder}/tokenizer.json` does not split text by one pattern and then by bytes; the fast"
                " encoder knows only that form."
            ) from None
        self._encoding = tiktoken.Encoding(
            "corpus", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}, explicit_n_vocab=len(ranks)
        )

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of one text, [n] int64, without eos."""
        if _LONG_SPACE.search(text):
            return np.asarray(self._exact.encode(text, add_special_tokens=False).ids, np.int64)
        return np.asarray(self._encoding.encode_ordinary(text), np.int64) + self._offset

    def encode_documents(self, texts: list[str], *, threads: int = 2) -> list[np.ndarray]:
        """Return the ids of each text and then eos, [n + 1] int64."""
        slow = {i: self.encode(text) for i, text in enumerate(texts) if _LONG_SPACE.search(text)}
        fast = ["" if i in slow else text for i, text in enumerate(texts)]
        batches = self._encoding.encode_ordinary_batch(fast, num_threads=threads)
        ids = [slow[i] if i in slow else np.asarray(one, np.int64) + self._offset for i, one in enumerate(batches)]
        return [np.append(one, EOS_ID) for one in ids]
