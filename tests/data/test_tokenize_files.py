import gzip
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.data import chunk_encoder, record_files, tokenize_files
from nanotrain.data.token_shards import TokenShard, shard_files
from nanotrain.data.tokenize_files import TokenizeJob, estimate, find_inputs
from nanotrain.data.tokenizer import plain_tokenizer
from nanotrain.runtime.files import file_digest

WORDS = [
    "the",
    "answer",
    "what",
    "stands",
    "after",
    "<think>",
    "trace\n",
    "ähnlich",
    "日本語",
    "don't",
    "12",
    "[INST]",
    "</s>",
]


def texts(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 60))) for _ in range(count)]


def write_jsonl(file: Path, rows: list) -> Path:
    file.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(rows)))
    return file


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Four files of four forms; the plain one has empty and null texts."""
    folder = tmp_path_factory.mktemp("corpus")
    plain = texts(0, 300)
    plain[5], plain[17] = "", None
    write_jsonl(folder / "a.jsonl", plain)
    raw = write_jsonl(folder / "tmp", texts(1, 200))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(raw.read_bytes()))
    raw.unlink()
    pq.write_table(pa.table({"text": texts(2, 150)}), folder / "c.parquet", row_group_size=40)
    (folder / "d.txt").write_text("one text\n\nof two lines é", encoding="utf-8")
    return folder


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(record_files, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(tokenize_files, "CHUNK_BYTES", 2000)


def job_of(corpus, tokenizer_folder, output, **options) -> TokenizeJob:
    return TokenizeJob(find_inputs(f"{corpus}/*"), "text", tokenizer_folder, output, **options)


def expected_documents(tokenizer_folder) -> list[list[int]]:
    tokenizer = plain_tokenizer(tokenizer_folder)
    everything = [t for i, t in enumerate(texts(0, 300)) if i not in (5, 17)] + texts(1, 200) + texts(2, 150)
    everything.append("one text\n\nof two lines é")
    return [[*tokenizer.encode(text, add_special_tokens=False).ids, 2] for text in everything]


def files_of(prefix: Path) -> dict[str, str]:
    return {end: file_digest(Path(f"{prefix}.{end}")) for end in ("bin", "idx", "manifest.json")}


def test_the_shard_is_the_exported_tokenizers_ids_in_megatrons_form(corpus, tokenizer_folder, tmp_path, small_chunks):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    manifest = tokenize_files.tokenize_files(job_of(corpus, tokenizer_folder, tmp_path / "x"))
    documents = expected_documents(tokenizer_folder)
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "y.bin"), dtype=np.uint16)
    for document in documents:
        builder.add_document(np.asarray(document, np.uint16), [len(document)])
    builder.finalize(str(tmp_path / "y.idx"))
    for end in ("bin", "idx"):
        assert (tmp_path / f"x.{end}").read_bytes() == (tmp_path / f"y.{end}").read_bytes()
    assert manifest["documents"] == len(documents) and manifest["tokens"] == sum(map(len, documents))
    assert manifest["empty_documents"] == 2
    assert [source["documents"] for source in manifest["sources"]] == [298, 200, 150, 1]
    assert manifest["tokenizer_digest"] == file_digest(tokenizer_folder / "tokenizer.json")
    for name, entry in manifest["files"].items():
        file = tmp_path / name
        assert entry == {"bytes": file.stat().st_size, "sha256": file_digest(file)}
    assert json.loads((tmp_path / "x.manifest.json").read_text()) == manifest
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] == "x") == [
        "x.bin",
        "x.idx",
        "x.manifest.json",
    ]


def test_workers_and_encoders_do_not_change_a_byte(corpus, tokenizer_folder, tmp_path):
    results = []
    for number, options in enumerate(({}, {"workers": 2}, {"encoder": "tokenizers"}, {"encoder": "tiktoken"})):
        output = tmp_path / str(number) / "x"
        tokenize_files.tokenize_files(job_of(corpus, tokenizer_folder, output, **options))
        results.append(files_of(output))
    assert all(result == results[0] for result in results)


def _killed_job(corpus, tokenizer_folder, output, after):
    """Notes every chunk, and kills itself without warning when `after` chunks are written."""
    record_files.CHUNK_BYTES = tokenize_files.CHUNK_BYTES = 2000
    tokenize_files._NOTE_SECONDS = 0.0
    add, left = tokenize_files.TokenShardWriter.add_documents, [after]

    def add_and_die(self, tokens, lengths):
        add(self, tokens, lengths)
        left[0] -= 1
        if left[0] <= 0:
            self._bin.flush()  # more is on the disk than the note says
            os.kill(os.getpid(), signal.SIGKILL)

    tokenize_files.TokenShardWriter.add_documents = add_and_die
    tokenize_files.tokenize_files(job_of(corpus, tokenizer_folder, output))


def test_a_killed_job_ends_in_the_same_bytes(corpus, tokenizer_folder, tmp_path, small_chunks, monkeypatch):
    tokenize_files.tokenize_files(job_of(corpus, tokenizer_folder, tmp_path / "whole/x"))
    output = tmp_path / "killed/x"
    fork = multiprocessing.get_context("fork")
    for after in (3, 1, 9, 14):
        process = fork.Process(target=_killed_job, args=(corpus, tokenizer_folder, output, after))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert not any(file.exists() for file in shard_files(output))
    assert json.loads((tmp_path / "killed/x.partial/state.json").read_text())["chunks"] >= 20
    seen = []
    monkeypatch.setattr(chunk_encoder, "read_chunk", lambda *a: seen.append(a) or record_files.read_chunk(*a))
    tokenize_files.tokenize_files(job_of(corpus, tokenizer_folder, output, workers=1))
    total = sum(1 for file in find_inputs(f"{corpus}/*") for _ in record_files.plan_chunks(file))
    assert 0 < len(seen) <= total - 20  # what was done is not done again
    assert files_of(output) == files_of(tmp_path / "whole/x")


@pytest.mark.parametrize("published", [0, 1, 2])
def test_a_kill_while_files_get_their_names_is_made_good(corpus, tokenizer_folder, tmp_path, monkeypatch, published):
    job = job_of(corpus, tokenizer_folder, tmp_path / "x")
    replace, calls = os.replace, []

    def stop(source, target):
        if Path(target).name in ("x.bin", "x.idx", "x.manifest.json"):
            if len(calls) == published:
                raise KeyboardInterrupt
            calls.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        tokenize_files.tokenize_files(job)
    monkeypatch.undo()
    assert not job.manifest_file.exists()
    manifest = tokenize_files.tokenize_files(job)
    assert TokenShard(tmp_path / "x").num_tokens == manifest["tokens"] and not job.work_folder.exists()


def test_a_finished_job_is_not_done_again_and_never_overwritten(corpus, tokenizer_folder, tmp_path, monkeypatch):
    job = job_of(corpus, tokenizer_folder, tmp_path / "x")
    first = tokenize_files.tokenize_files(job)
    stamp = (tmp_path / "x.bin").stat().st_mtime_ns
    assert tokenize_files.tokenize_files(job) == first and (tmp_path / "x.bin").stat().st_mtime_ns == stamp
    other = TokenizeJob(find_inputs(str(corpus / "a.jsonl")), "text", tokenizer_folder, tmp_path / "x")
    with pytest.raises(UserError, match=r"x\.manifest\.json` belongs to a shard of other input"):
        tokenize_files.tokenize_files(other)
    job.manifest_file.unlink()
    with pytest.raises(UserError, match=r"x\.bin` exists and has no manifest"):
        tokenize_files.tokenize_files(job)
    assert (tmp_path / "x.bin").stat().st_mtime_ns == stamp


def test_unfinished_work_of_another_job_and_of_a_running_one_is_left_alone(corpus, tokenizer_folder, tmp_path):
    work = tmp_path / "x.partial"
    work.mkdir()
    (work / "state.json").write_text(json.dumps({"job": "other"}))
    job = job_of(corpus, tokenizer_folder, tmp_path / "x")
    with pytest.raises(UserError, match="unfinished work of another job"):
        tokenize_files.tokenize_files(job)
    with tokenize_files._locked(work), pytest.raises(UserError, match="another process is writing"):
        tokenize_files.tokenize_files(job)


@pytest.mark.parametrize(
    ("name", "content", "message", "workers"),
    [
        ("bad.jsonl", b'{"text": "fine"}\n{"text": "caf\xe9"}\n', r"bad\.jsonl`, line 2: not JSON", 1),
        ("bad.jsonl.gz", gzip.compress(b'{"text": "fine"}\n' * 999)[:-9], r"bad\.jsonl\.gz` cannot be read", 2),
        ("bad.parquet", b"PAR1 no", r"bad\.parquet` cannot be read as parquet", 1),
        ("bad.jsonl", b'{"text": 5}\n', r"bad\.jsonl` holds a int under 'text' \('5'\), which is not text", 1),
        ("bad.jsonl", b'{"text": null}\n\n{"text": ""}\n', "none of the 1 input files .* holds a document", 1),
        ("bad.txt", b"\xff", r"bad\.txt` is not UTF-8", 1),
    ],
    ids=["utf-8", "cut-gzip", "parquet", "not-text", "no-document", "text"],
)
def test_bad_input_is_one_error_and_no_shard(tmp_path, tokenizer_folder, name, content, message, workers):
    (tmp_path / name).write_bytes(content)
    job = TokenizeJob(find_inputs(str(tmp_path / name)), "text", tokenizer_folder, tmp_path / "x", workers=workers)
    with pytest.raises(UserError, match=message):
        tokenize_files.tokenize_files(job)
    assert not any(file.exists() for file in shard_files(tmp_path / "x"))


def test_after_the_input_is_mended_the_old_work_does_not_count(tmp_path, tokenizer_folder):
    file = tmp_path / "in.jsonl"
    file.write_bytes(b'{"text": "the answer"}\n{"text"')
    with pytest.raises(UserError, match="line 2"):
        tokenize_files.tokenize_files(TokenizeJob((file,), "text", tokenizer_folder, tmp_path / "x"))
    file.write_bytes(b'{"text": "the answer"}\n{"text": "stands"}\n')
    manifest = tokenize_files.tokenize_files(TokenizeJob((file,), "text", tokenizer_folder, tmp_path / "x"))
    assert manifest["documents"] == 2


def test_names_of_input(tmp_path, corpus):
    assert [path.name for path in find_inputs(f"{corpus}/*")] == ["a.jsonl", "b.jsonl.gz", "c.parquet", "d.txt"]
    assert find_inputs(f"{corpus}/**/d.txt") == (corpus / "d.txt",)
    with pytest.raises(MissingInputError, match="matches no file"):
        find_inputs(f"{tmp_path}/*.jsonl")
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"b\.jsonl` and .*a\.jsonl` are the same file"):
        find_inputs(f"{tmp_path}/*.jsonl")


def test_wrong_ids_of_a_fast_encoder_stop_the_job(corpus, tokenizer_folder, tmp_path, monkeypatch):
    class Wrong:
        name = "gigatoken"

        def encode_batch(self, batch):
            return np.full(len(batch), 1007, np.uint32), np.ones(len(batch), np.int64)

    monkeypatch.setattr(tokenize_files, "build_encoder", lambda *_: Wrong())
    with pytest.raises(UserError, match=r"gigatoken encoder gave other ids .*a\.jsonl.*--encoder tokenizers"):
        tokenize_files.tokenize_files(job_of(corpus, tokenizer_folder, tmp_path / "x"))


def test_an_estimate_is_near_the_truth_and_writes_nothing(tmp_path, tokenizer_folder):
    file = write_jsonl(tmp_path / "in.jsonl", texts(3, 4000))
    job = TokenizeJob((file,), "text", tokenizer_folder, tmp_path / "out/x")
    guess = estimate(job)
    assert not (tmp_path / "out").exists() and guess.state == "not begun"
    manifest = tokenize_files.tokenize_files(job)
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    assert guess.tokens == pytest.approx(manifest["tokens"], rel=0.03)
    assert guess.output_bytes == pytest.approx(size, rel=0.03)
    assert guess.documents == 4000 and estimate(job).state == "complete"


_LIMITED = """
import resource, signal, sys
from pathlib import Path
from data_prep import tokenize_corpus
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(tokenize_corpus.main(sys.argv[2:]))
"""


def test_a_full_disk_is_one_error_and_the_next_run_goes_on(tmp_path, tokenizer_folder):
    good = write_jsonl(tmp_path / "good.jsonl", texts(4, 20))
    file = write_jsonl(tmp_path / "in.jsonl", texts(5, 3000))
    finished = tokenize_files.tokenize_files(TokenizeJob((good,), "text", tokenizer_folder, tmp_path / "done"))
    arguments = ["--input", str(file), "--tokenizer", str(tokenizer_folder), "--output", str(tmp_path / "x")]
    result = subprocess.run(
        [sys.executable, "-c", _LIMITED, "100000", *arguments, "--workers", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert "x.bin` cannot be written (File too large); every finished shard is untouched: make room" in result.stderr
    assert "Traceback" not in result.stderr
    assert not any(path.exists() for path in shard_files(tmp_path / "x"))
    for name, entry in finished["files"].items():
        assert file_digest(tmp_path / name) == entry["sha256"]
    manifest = tokenize_files.tokenize_files(TokenizeJob((file,), "text", tokenizer_folder, tmp_path / "x"))
    assert TokenShard(tmp_path / "x").num_documents == manifest["documents"] == 3000
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_workers_end_when_their_parent_is_killed(tmp_path, tokenizer_folder):
    file = write_jsonl(tmp_path / "in.jsonl", texts(6, 200) * 1500)
    command = [
        sys.executable,
        "-m",
        "data_prep.tokenize_corpus",
        "--input",
        str(file),
        "--tokenizer",
        str(tokenizer_folder),
    ]
    command += ["--output", str(tmp_path / "x"), "--workers", "2", "--encoder", "tokenizers"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    children, deadline = [], time.monotonic() + 60
    while len(children) < 2 and time.monotonic() < deadline and process.poll() is None:
        children = [pid for pid in _children(process.pid) if b"spawn_main" in _command_line(pid)]
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert len(children) == 2
    while any(b"spawn_main" in _command_line(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(b"spawn_main" in _command_line(pid) for pid in children)


def _children(pid: int) -> list[int]:
    file = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in file.read_text().split()] if file.exists() else []


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.slow
def test_a_document_of_fifty_megabytes(tmp_path, tokenizer_folder):
    text = " ".join(texts(7, 4000)) + "\n"
    text *= 50_000_000 // len(text)
    file = write_jsonl(tmp_path / "in.jsonl", ["first", text, "last"])
    manifest = tokenize_files.tokenize_files(TokenizeJob((file,), "text", tokenizer_folder, tmp_path / "x", workers=2))
    shard = TokenShard(tmp_path / "x")
    assert manifest["documents"] == shard.num_documents == 3
    tokenizer = plain_tokenizer(tokenizer_folder)
    assert tokenizer.decode(shard.document(1)[:-1].tolist(), skip_special_tokens=False) == text
