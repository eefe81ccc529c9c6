"""Files of records to one token shard, over all cores, resumable, with bytes that depend on the input alone.

The input is cut into chunks that do not depend on the number of workers; workers encode chunks, this process appends
them in order. Now and then it makes what it wrote durable and notes how far it came in PREFIX.partial/state.json: after
a kill the shard is cut back to that note and goes on from there.
"""

import collections
import contextlib
import fcntl
import glob
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.data.chunk_encoder import ChunkEncoder, EncodedChunk, encode_in_worker, start_worker
from nanotrain.data.encoders import HfEncoder, TextEncoder, build_encoder, eos_token_id
from nanotrain.data.record_files import CHUNK_BYTES, Chunk, file_kind, plan_chunks, read_chunk
from nanotrain.data.token_shards import TokenShardWriter, shard_files, shard_work_files, smallest_dtype
from nanotrain.data.tokenizer import plain_tokenizer
from nanotrain.runtime.files import file_digest, fsync_folder, write_json_atomic

_LOG = logging.getLogger("nanotrain")
_FORMAT = 1
_NOTE_SECONDS, _NOTE_TOKENS = 5.0, 1 << 28
"""A note is written when either has gone by since the last."""
_CHUNKS_AHEAD = 2
"""Chunks a worker that may wait for their turn; bounds memory."""
_SAMPLE_FILES, _SAMPLE_CHARACTERS = 4, 1 << 18
_COUNTS = ("documents", "empty_documents", "text_bytes", "tokens")


@dataclass(frozen=True)
class TokenizeJob:
    """What is to be tokenised.

    Attributes:
        files: input, in the order of the shard.
        text_key: of the records.
        tokenizer_folder: with tokenizer.json.
        output: prefix of the shard.
        eos_token: that ends a document; None = the folder's own.
        encoder: auto, or one of encoders.ENCODERS.
        workers: processes that encode; 1 = this one.
    """

    files: tuple[Path, ...]
    text_key: str
    tokenizer_folder: Path
    output: Path
    eos_token: str | None = None
    encoder: str = "auto"
    workers: int = 1

    @property
    def manifest_file(self) -> Path:
        return Path(f"{self.output}.manifest.json")

    @property
    def work_folder(self) -> Path:
        return Path(f"{self.output}.partial")

    def settings(self) -> dict[str, Any]:
        """Return everything that the shard's bytes depend on."""
        tokenizer = plain_tokenizer(self.tokenizer_folder)
        vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        return {
            "format": _FORMAT,
            "text_key": self.text_key,
            "tokenizer_digest": file_digest(self.tokenizer_folder / "tokenizer.json"),
            "vocab_size": vocab_size,
            "eos_token_id": eos_token_id(self.tokenizer_folder, self.eos_token),
            "dtype": str(smallest_dtype(vocab_size)),
        }

    def identity(self) -> str:
        """Return a digest of the settings and of the input files' names, sizes and times."""
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        return hashlib.sha256(json.dumps([self.settings(), stats, CHUNK_BYTES]).encode()).hexdigest()


def find_inputs(pattern: str) -> tuple[Path, ...]:
    """Return the file, or the files that a glob pattern (with ** for folders) matches, in the order of their names.

    Raises:
        MissingInputError: there is none.
        UserError: an ending that is not known, or one file under two names.
    """
    matches = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - absolute patterns
    found = [Path(match) for match in matches]
    files = [file for file in found if file.is_file()]
    if not files:
        raise MissingInputError(f"--input {pattern!r} matches no file; correct the path or the pattern.")
    seen: dict[Path, Path] = {}
    for file in files:
        file_kind(file)
        other = seen.setdefault(file.resolve(), file)
        if other != file:
            raise UserError(f"`{file}` and `{other}` are the same file; give it once.")
    return tuple(files)


def tokenize_files(job: TokenizeJob) -> dict[str, Any]:
    """Write PREFIX.bin, PREFIX.idx and PREFIX.manifest.json and return the manifest.

    A finished shard of the same job is kept as it is; an unfinished one goes on where it was.

    Raises:
        UserError: damaged or wrong input, another job's output in the way, no documents, or no room on the disk.
    """
    identity = job.identity()
    if job.manifest_file.exists():
        return _finished(job, identity)
    with _locked(job.work_folder):
        state = _load_state(job, identity)
        if "manifest" not in state:
            state = _encode_all(job, state)
        return _publish(job, state)


def _finished(job: TokenizeJob, identity: str) -> dict[str, Any]:
    manifest = json.loads(job.manifest_file.read_bytes())
    if manifest["job"] != identity:
        raise UserError(
            f"`{job.manifest_file}` belongs to a shard of other input or settings; give another --output, or remove that"
            " shard first."
        )
    _LOG.info("%s is complete: %d tokens", job.output, manifest["tokens"])
    shutil.rmtree(job.work_folder, ignore_errors=True)
    return manifest


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing `{folder}`; wait for it or give another --output.") from None
        yield


def _load_state(job: TokenizeJob, identity: str) -> dict[str, Any]:
    file = job.work_folder / "state.json"
    if not file.exists():
        taken = [path for path in shard_files(job.output) if path.exists()]
        if taken:
            raise UserError(f"`{taken[0]}` exists and has no manifest; give another --output, or remove it first.")
        sources = [{"file": str(path), "bytes": path.stat().st_size} | dict.fromkeys(_COUNTS, 0) for path in job.files]
        return {"job": identity, "chunks": 0, "input_bytes": 0, "sources": sources}
    state = json.loads(file.read_bytes())
    if state["job"] != identity:
        raise UserError(
            f"`{job.work_folder}` holds the unfinished work of another job (other input, tokenizer or text key); remove"
            " it, or give another --output."
        )
    return state


def _total(state: dict[str, Any], name: str) -> int:
    return sum(source[name] for source in state["sources"])


def _encode_all(job: TokenizeJob, state: dict[str, Any]) -> dict[str, Any]:
    settings = job.settings()
    written = (_total(state, "documents"), _total(state, "tokens"))
    writer = TokenShardWriter(job.output, settings["dtype"], work_folder=job.work_folder, written=written)
    chunks = itertools.islice(_all_chunks(job), state["chunks"], None)
    bar = tqdm(total=_total(state, "bytes"), initial=state["input_bytes"], unit="B", unit_scale=True, desc="tokenize")
    noted, noted_tokens = time.monotonic(), writer.tokens
    with contextlib.closing(writer), bar:
        for number, chunk, encoded in _encoded_chunks(job, settings, chunks):
            writer.add_documents(encoded.tokens, encoded.lengths)
            counts = (encoded.lengths.size, encoded.empty, encoded.text_bytes, encoded.tokens.size)
            for name, count in zip(_COUNTS, counts, strict=True):
                state["sources"][number][name] += int(count)
            state["chunks"] += 1
            state["input_bytes"] += chunk.file_bytes
            bar.update(chunk.file_bytes)
            bar.set_postfix_str(f"{writer.tokens / 1e6:.1f} Mtokens", refresh=False)
            if time.monotonic() - noted > _NOTE_SECONDS or writer.tokens - noted_tokens > _NOTE_TOKENS:
                _note(job, writer, state)
                noted, noted_tokens = time.monotonic(), writer.tokens
        if not writer.documents:
            raise UserError(
                f"none of the {len(job.files)} input files (the first is `{job.files[0]}`) holds a document with text"
                f" under {job.text_key!r}; no shard was written."
            )
        writer.seal()
    state["manifest"] = _manifest(job, settings, state)
    write_json_atomic(job.work_folder / "state.json", state)
    return state


def _note(job: TokenizeJob, writer: TokenShardWriter, state: dict[str, Any]) -> None:
    writer.sync()
    write_json_atomic(job.work_folder / "state.json", state)


def _all_chunks(job: TokenizeJob) -> Iterator[tuple[int, Chunk]]:
    for number, file in enumerate(job.files):
        for chunk in plan_chunks(file):
            yield number, chunk


def _encoded_chunks(
    job: TokenizeJob, settings: dict[str, Any], chunks: Iterator[tuple[int, Chunk]]
) -> Iterator[tuple[int, Chunk, EncodedChunk]]:
    """Yield (number of the source, chunk, its documents) in the order of the chunks."""
    encoder = build_encoder(job.tokenizer_folder, job.encoder)
    _LOG.info("encoding with %s in %d process(es)", encoder.name, job.workers)
    parts = (job.text_key, settings["eos_token_id"], settings["dtype"])
    if job.workers == 1:
        encode = _own_encoder(encoder, job, settings)
        for number, chunk in chunks:
            yield number, chunk, encode(chunk)
        return
    context = multiprocessing.get_context("spawn")  # threads of the libraries do not survive a fork
    arguments = (job.tokenizer_folder, encoder.name, *parts)
    with ProcessPoolExecutor(job.workers, context, start_worker, arguments) as pool:
        waiting = collections.deque()
        try:
            for number, chunk in chunks:
                waiting.append((number, chunk, pool.submit(encode_in_worker, chunk)))
                if len(waiting) > _CHUNKS_AHEAD * job.workers:
                    yield _take(waiting)
            while waiting:
                yield _take(waiting)
        except BrokenProcessPool:
            raise UserError(
                "a worker process was ended from outside, most often for lack of memory; lower --workers and run again"
                " to go on."
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _take(waiting: collections.deque) -> tuple[int, Chunk, EncodedChunk]:
    number, chunk, future = waiting.popleft()
    return number, chunk, future.result()


def _own_encoder(encoder: TextEncoder, job: TokenizeJob, settings: dict[str, Any]) -> ChunkEncoder:
    exact = encoder if isinstance(encoder, HfEncoder) else HfEncoder(job.tokenizer_folder)
    return ChunkEncoder(encoder, exact, job.text_key, settings["eos_token_id"], np.dtype(settings["dtype"]))


def _manifest(job: TokenizeJob, settings: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """Describe the sealed shard; nothing in it depends on time, workers or encoder."""
    files = {}
    for work, final in zip(shard_work_files(job.work_folder), shard_files(job.output), strict=False):
        files[final.name] = {"bytes": work.stat().st_size, "sha256": file_digest(work)}
    totals = {name: _total(state, name) for name in _COUNTS}
    return settings | totals | {"job": state["job"], "sources": state["sources"], "files": files}


def _publish(job: TokenizeJob, state: dict[str, Any]) -> dict[str, Any]:
    """Give the sealed files their names; the manifest comes last. A kill in between is made good by the next run."""
    for work, final in zip(shard_work_files(job.work_folder), shard_files(job.output), strict=False):
        if work.exists():
            os.replace(work, final)
    fsync_folder(job.output.parent)
    write_json_atomic(job.manifest_file, state["manifest"])
    shutil.rmtree(job.work_folder, ignore_errors=True)
    return state["manifest"]


@dataclass(frozen=True)
class Estimate:
    """What a job would read and write, from a sample."""

    files: int
    input_bytes: int
    encoder: str
    documents: int
    tokens: int
    output_bytes: int
    state: str


def estimate(job: TokenizeJob) -> Estimate:
    """Encode a little of up to four of the files and scale; nothing is written.

    Raises:
        UserError: as `tokenize_files`, for what is sampled.
    """
    settings = job.settings()
    encoder = build_encoder(job.tokenizer_folder, job.encoder)
    documents = read_bytes = characters = sampled_characters = tokens = 0
    step = max(1, len(job.files) // _SAMPLE_FILES)
    for file in job.files[::step][:_SAMPLE_FILES]:
        chunk = next(plan_chunks(file), None)
        texts = [] if chunk is None else [record[job.text_key] or "" for record in read_chunk(chunk, [job.text_key])]
        sample = "\n".join(texts)[:_SAMPLE_CHARACTERS]
        documents += len(texts)
        read_bytes += 0 if chunk is None else chunk.file_bytes
        characters += sum(map(len, texts))
        sampled_characters += len(sample)
        tokens += len(encoder.encode_batch([sample])[0])
    input_bytes = sum(file.stat().st_size for file in job.files)
    scale = input_bytes / max(1, read_bytes)
    total = round(scale * (characters * tokens / max(1, sampled_characters) + documents))
    all_documents = round(scale * documents)
    size = total * np.dtype(settings["dtype"]).itemsize + 20 * all_documents + 42
    state = "complete" if job.manifest_file.exists() else "unfinished" if job.work_folder.exists() else "not begun"
    return Estimate(len(job.files), input_bytes, encoder.name, all_documents, total, size, state)
