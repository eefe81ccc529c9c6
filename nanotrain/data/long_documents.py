"""Long documents followed by questions and answers about their parts, for the long-context phase (paper section 2.6).

As published: documents longer than 32k tokens are cut into chunks of 1,024 tokens, a random tenth of the chunks gets one
question-answer pair each, and the pairs, one after the other, are appended to the document. Which model writes the pairs
is the user's choice: a file of pairs, a command, or a function. How a pair is written out is not published; ours is below.
"""

import json
import random
import shlex
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from nanotrain.config.errors import UserError
from nanotrain.data.permutation import derive_key
from nanotrain.data.record_shards import Record, RecordSource, State

PAIR_FORM = "Question: {question}\nAnswer: {answer}"


@dataclass(frozen=True)
class Chunk:
    """A chunk of a document that a pair is wanted for.

    Attributes:
        document: the document's id.
        number: of the chunk in the document, from 0.
        text: its text.
    """

    document: str
    number: int
    text: str


Pair = tuple[str, str]
Generator = Callable[[Chunk], Pair | None]
"""Chunk -> (question, answer), or None when there is nothing to ask."""


@dataclass(frozen=True)
class LongDocumentSettings:
    """The published recipe.

    Attributes:
        min_tokens: shorter documents are left out ("longer than 32k tokens").
        chunk_tokens: of a chunk; a shorter rest at the end is no chunk.
        chunk_fraction: share of the chunks that get a pair; at least one.
        seed: of the choice.
    """

    min_tokens: int = 32_768
    chunk_tokens: int = 1024
    chunk_fraction: float = 0.1
    seed: int = 1

    def validate(self) -> None:
        """Raise UserError for values that cannot work."""
        if not 1 <= self.chunk_tokens <= self.min_tokens:
            raise UserError(
                f"`--chunk-tokens` ({self.chunk_tokens}) must lie between 1 and `--min-tokens` ({self.min_tokens})."
            )
        if not 0 < self.chunk_fraction <= 1:
            raise UserError(f"`--chunk-fraction` ({self.chunk_fraction}) must lie in (0, 1].")


def choose_chunks(document: str, num_chunks: int, settings: LongDocumentSettings) -> list[int]:
    """Return the numbers of the chosen chunks in order; the choice depends on the seed and the document's id only."""
    count = max(1, round(settings.chunk_fraction * num_chunks))
    draw = random.Random(derive_key("long document chunks", settings.seed, document))
    return sorted(draw.sample(range(num_chunks), count))


def chosen_chunks(document: str, text: str, tokenizer: Tokenizer, settings: LongDocumentSettings) -> list[Chunk]:
    """Return the chunks of a document that get a pair; none when it is too short.

    A chunk's text is cut at the characters where its tokens begin and end.
    """
    encoding = tokenizer.encode(text, add_special_tokens=False)
    if len(encoding.ids) <= settings.min_tokens:
        return []
    size = settings.chunk_tokens
    chunks = []
    for number in choose_chunks(document, len(encoding.ids) // size, settings):
        begin, end = encoding.offsets[number * size][0], encoding.offsets[(number + 1) * size - 1][1]
        chunks.append(Chunk(document, number, text[begin:end]))
    return chunks


def with_pairs(text: str, pairs: list[Pair]) -> str:
    """Return the document with its pairs appended."""
    written = [PAIR_FORM.format(question=question.strip(), answer=answer.strip()) for question, answer in pairs]
    return "\n\n".join([text.rstrip("\n"), *written]) + "\n"


def pairs_from_records(records: Iterator[Record], what: str) -> Generator:
    """Return a generator that looks pairs up: records with document, chunk, question, answer.

    Raises:
        UserError: a record lacks one of them.
    """
    known: dict[tuple[str, int], Pair] = {}
    for number, record in enumerate(records):
        try:
            key = (str(record["document"]), int(record["chunk"]))
            known[key] = (str(record["question"]), str(record["answer"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{what} record {number} lacks or misstates one of document, chunk, question, answer ({error!r})."
            ) from None
    return lambda chunk: known.get((chunk.document, chunk.number))


class CommandGenerator:
    """A user's command, started once: a JSON line {"document", "chunk", "text"} in, {"question", "answer"} or null out.

    Use as a context manager.
    """

    def __init__(self, command: str) -> None:
        self._command = command

    def __enter__(self) -> "CommandGenerator":
        try:
            self._process = subprocess.Popen(
                shlex.split(self._command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
            )
        except (OSError, ValueError) as error:
            raise UserError(f"`--generator` ({self._command}) cannot be started ({error}); give a command.") from None
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def __call__(self, chunk: Chunk) -> Pair | None:
        """Ask for one pair.

        Raises:
            UserError: the command ended, or answered something else than JSON of that form.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        asked = {"document": chunk.document, "chunk": chunk.number, "text": chunk.text}
        answer = ""
        try:
            self._process.stdin.write(json.dumps(asked, ensure_ascii=False) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            content: Any = json.loads(answer)
            return None if content is None else (str(content["question"]), str(content["answer"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            state = "ended" if not answer else f"answered {answer[:80]!r}"
            raise UserError(
                f"`--generator` ({self._command}) {state} for chunk {chunk.number} of `{chunk.document}` ({error!r}); it must"
                ' answer each line with {"question": ..., "answer": ...} or null. Finished files stay.'
            ) from None


class LongDocuments:
    """Documents in, long documents with pairs out; a source of records for `record_shards.write_shards`.

    Args:
        source: records with text.
        text_key: column of the text.
        id_key: column of the document's id; empty = its number in the input.
        tokenizer: counts tokens and cuts chunks.
        settings: the recipe.
        generate: makes the pairs; None gives the chosen chunks themselves, for a model to be run on elsewhere.
    """

    def __init__(
        self,
        source: RecordSource,
        text_key: str,
        id_key: str,
        tokenizer: Tokenizer,
        settings: LongDocumentSettings,
        generate: Generator | None,
    ) -> None:
        settings.validate()
        self._source, self._text_key, self._id_key = source, text_key, id_key
        self._tokenizer, self._settings, self._generate = tokenizer, settings, generate
        self._state: State = {}
        self.counts: Counter[str] = Counter()
        """documents, long_documents, chunks_chosen, pairs, without_pair (long documents left out: no pair came)."""

    def state(self) -> State:
        """Return the state of the source and the number of documents read."""
        return self._state

    def records(self, state: State | None = None) -> Iterator[Record]:
        """Yield {"id", "text", "num_pairs"}, or, without a generator, {"document", "chunks": [{"chunk", "text"}]}."""
        read = state["read"] if state else 0
        for record in self._source.records(state["source"] if state else None):
            document = str(record[self._id_key]) if self._id_key else str(read)
            read += 1
            after = {"source": self._source.state(), "read": read}
            chunks = chosen_chunks(document, record[self._text_key], self._tokenizer, self._settings)
            self.counts.update(documents=1, long_documents=bool(chunks), chunks_chosen=len(chunks))
            if self._generate is None:
                if chunks:
                    self._state = after
                    yield {"document": document, "chunks": [{"chunk": c.number, "text": c.text} for c in chunks]}
                continue
            pairs = [pair for chunk in chunks if (pair := self._generate(chunk)) is not None]
            self.counts.update(pairs=len(pairs), without_pair=bool(chunks) and not pairs)
            if pairs:
                self._state = after
                yield {"id": document, "text": with_pairs(record[self._text_key], pairs), "num_pairs": len(pairs)}
