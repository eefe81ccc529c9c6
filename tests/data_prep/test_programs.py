"""The programs as a user runs them: dry runs, mistakes, and a SIGKILL in the middle."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import build_blend, build_long_context, dedup, download, fetch_code, prepare_chat
from nanotrain.config.data import ReasoningConfig
from nanotrain.config.training import TrainingConfig
from nanotrain.data.loader import SftLoader
from nanotrain.data.manifest import DataFolder
from nanotrain.data.token_shards import TokenShardWriter
from nanotrain.runtime.files import file_digest

ROOT = Path(__file__).parents[2]


def parquet(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=50)
    return file


def texts(count: int) -> list[dict]:
    return [{"text": f"document number {n} about {n % 7} things", "id": str(n)} for n in range(count)]


def products(folder: Path) -> dict[str, str]:
    """Digests of everything but the journal of finished work."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != "progress.jsonl")
    return {file.relative_to(folder).as_posix(): file_digest(file) for file in files}


def killed_then_finished(module: str, arguments: list[str], output: Path, appears: str) -> None:
    """Start a program, SIGKILL it when `appears` exists below its output, and run it again to its end."""
    command = [sys.executable, "-m", module, *arguments, "--output", str(output)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and not list(output.glob(appears)) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "the program ended before it was killed"
    assert not (output / "manifest.json").exists()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


COMPONENT = ["--component", "nemotron_cc_v2", "--subset", "cc_v2_high_quality"]


def test_download_writes_records_a_manifest_and_says_beforehand_what_it_would_do(tmp_path, capsys):
    source = parquet(tmp_path / "in.parquet", texts(130))
    arguments = [*COMPONENT, "--input", str(source), "--output", str(tmp_path / "out"), "--rows-per-file", "50"]
    assert download.main([*arguments, "--dry-run"]) == 0
    assert "1 local files" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert download.main(arguments) == 0
    assert "130 rows of 1 subsets" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert list(manifest["files"]) == [f"cc_v2_high_quality-{n:05d}.parquet" for n in range(3)]
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == file_digest(tmp_path / "out" / name)
    assert manifest["sources"][0]["rows"] == 130
    assert manifest["sources"][0]["bytes"] == sum(len(r["text"]) + len(r["id"]) for r in texts(130))
    rows = [row for name in manifest["files"] for row in pq.read_table(tmp_path / "out" / name).to_pylist()]
    assert rows == texts(130)


def test_mistakes_end_with_2_and_one_sentence(tmp_path, capsys, tokenizer_folder):
    tokenizer, out = ["--tokenizer", str(tokenizer_folder)], ["--output", str(tmp_path / "o")]
    cases = [
        (download.main, [*COMPONENT, "--input", "no*.parquet", *out], "matches no file"),
        (
            download.main,
            ["--component", "nemotron_cc_v2", "--subset", "cc"],
            "is not a subset of nvidia/Nemotron-CC-v2",
        ),
        (download.main, ["--component", "nemotron_cc_v2", "--input", "x", *out], "add `--subset NAME`"),
        (fetch_code.main, ["--url", "http://x", *out], "must contain {repo}"),
        (dedup.main, ["--input", "no*", *out], "matches no file"),
        (dedup.main, ["--input", "no*", "--threshold", "2", *out], "`--threshold` (2.0)"),
        (build_blend.main, [], "name either `--curriculum FILE` or `--blend FILE`"),
        (build_blend.main, ["--curriculum", "nemotron_nano_v2/curriculum"], "`--shards` is missing"),
        (build_blend.main, ["--blend", "nemotron_nano_v2/phase_1", "--shards", "."], "`--tokens` (0)"),
        (prepare_chat.main, ["--component", "nemotron_cc_v2", *tokenizer, *out], "holds no conversations"),
        (prepare_chat.main, ["--tokenizer", "nowhere", *out], "nowhere/tokenizer.json` is missing"),
        (build_long_context.main, ["--input", "x", *tokenizer, *out], "name exactly one of"),
    ]
    for program, arguments, expected in cases:
        assert program(arguments) == 2, expected
        error = capsys.readouterr().err.strip()
        assert expected in error and error.startswith("error: ") and "\n" not in error, error


def test_download_resumes_after_sigkill_with_the_same_bytes(tmp_path):
    source = parquet(tmp_path / "in.parquet", texts(6_000))
    arguments = [*COMPONENT, "--input", str(source), "--rows-per-file", "200"]
    killed_then_finished("data_prep.download", arguments, tmp_path / "killed", "*-00002.parquet")
    assert download.main([*arguments, "--output", str(tmp_path / "whole")]) == 0
    assert products(tmp_path / "killed") == products(tmp_path / "whole")


class Slow(http.server.BaseHTTPRequestHandler):
    """Every fifth file is gone; each answer takes a moment, so that a kill comes in the middle."""

    def do_GET(self):
        time.sleep(0.002)
        number = int(self.path.rsplit("/", 1)[-1].removesuffix(".c"))
        body = b"gone" if number % 5 == 0 else f"int f{number};\n".encode()
        self.send_response(404 if number % 5 == 0 else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Be silent."""


def test_fetch_code_resumes_after_sigkill_keeps_the_licence_and_counts_what_is_gone(tmp_path, capsys):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    rows = [
        {"repo": "o/r", "commit_id": "c", "rel_path": f"{n}.c", "language": "C", "license": "MIT"} for n in range(200)
    ]
    url = f"http://127.0.0.1:{server.server_port}/{{repo}}/{{commit_id}}/{{rel_path}}"
    source = parquet(tmp_path / "refs.parquet", rows)
    arguments = ["--input", str(source), "--url", url, "--rows-per-file", "10", "--concurrency", "4"]
    killed_then_finished("data_prep.fetch_code", arguments, tmp_path / "killed", "code-00002.parquet")
    assert fetch_code.main([*arguments, "--output", str(tmp_path / "whole")]) == 0
    server.shutdown()
    assert "200 references: 160 fetched, 40 gone" in capsys.readouterr().out
    assert products(tmp_path / "killed") == products(tmp_path / "whole")
    found = [r for f in sorted((tmp_path / "whole").glob("*.parquet")) for r in pq.read_table(f).to_pylist()]
    assert found == [row | {"text": f"int f{n};\n"} for n, row in enumerate(rows) if n % 5]


def test_dedup_reports_what_it_dropped_and_repeats_itself(tmp_path, capsys):
    rows = [{"text": row["text"] * 9, "n": n} for n, row in enumerate(texts(40))] + [
        {"text": texts(1)[0]["text"] * 9, "n": 40}
    ]
    source = parquet(tmp_path / "in.parquet", rows)
    for name in ("a", "b"):
        assert dedup.main(["--input", str(source), "--output", str(tmp_path / name), "--threshold", "1"]) == 0
    assert "41 records: 40 kept, 1 exact and 0 near duplicates dropped" in capsys.readouterr().out
    assert products(tmp_path / "a") == products(tmp_path / "b")
    assert pq.read_table(tmp_path / "a/dropped.parquet").to_pylist() == [
        {"record": 40, "kept_record": 0, "similarity": 1.0, "exact": True}
    ]
    assert dedup.main(["--input", str(source), "--output", str(tmp_path / "a"), "--threshold", "1"]) == 0
    assert products(tmp_path / "a") == products(tmp_path / "b")


def test_chat_rows_become_a_folder_that_fine_tuning_reads(tmp_path, tokenizer_folder, capsys):
    rows = []
    for n in range(60):
        trace = "<think>\nthe answer\n</think>\n\n" if n % 2 else ""
        messages = [
            {"role": "user", "content": f"question {n}" if n else ""},
            {"role": "assistant", "content": f"{trace}{n}"},
        ]
        columns = dict.fromkeys(("generator", "version", "category", "reasoning"), "x")
        rows.append(
            {"uuid": f"u{n}", "license": "CC-BY-4.0", "messages": [m | {"tool_calls": []} for m in messages]} | columns
        )
    source = parquet(tmp_path / "in.parquet", rows)
    arguments = ["--subset", "post_training_v2_math", "--input", str(source), "--tokenizer", str(tokenizer_folder)]
    arguments += ["--output", str(tmp_path / "data"), "--validation-fraction", "0.2", "--rows-per-file", "7"]
    assert prepare_chat.main([*arguments, "--dry-run"]) == 0
    assert prepare_chat.main(arguments) == 0
    assert "59 of 60 rows, 30 with a trace; left out: 1 empty_prompt" in capsys.readouterr().out
    before = products(tmp_path / "data")
    assert prepare_chat.main(arguments) == 0 and products(tmp_path / "data") == before
    manifest = DataFolder(tmp_path / "data").manifest
    assert manifest["chat"]["train_rows"] + manifest["chat"]["validation_rows"] == 59 > manifest["chat"]["train_rows"]
    training = TrainingConfig(steps=2, global_batch_size=2, micro_batch_size=2, sequence_length=256, learning_rate=1.0)
    loader = SftLoader(tmp_path / "data", tmp_path / "data/tokenizer", ReasoningConfig(), training, seed=1)
    assert loader.summary()["rows"] >= manifest["chat"]["train_rows"] and loader.microbatches(1)


def test_the_blend_program_prints_the_epochs_of_the_published_run_and_builds_a_folder(
    tmp_path, tokenizer_folder, capsys
):
    assert build_blend.main(["--curriculum", "nemotron_nano_v2/curriculum", "--epochs"]) == 0
    table = capsys.readouterr().out.strip().splitlines()
    assert len(table) == 2 + 13 and "| wikipedia | 0.3 | 0.8 | 1.5 | 114 | 17.3 | 6.57 | 8 |" in table
    assert (
        build_blend.main(["--curriculum", "nemotron_nano_v2/curriculum", "--epochs", "--tokens", str(40 * 10**12)]) == 2
    )
    assert "would repeat `crawl_synthetic` 4.76 times, its cap is 4" in capsys.readouterr().err
    (tmp_path / "b.yaml").write_text("sources: {a: {weight: 1, max_epochs: 2, origin: chosen}}")
    for split in ("train", "validation"):
        writer = TokenShardWriter(tmp_path / "shards/a" / split, np.uint16)
        writer.add_document(np.arange(100))
        writer.finish()
    arguments = [
        "--blend",
        str(tmp_path / "b.yaml"),
        "--shards",
        str(tmp_path / "shards"),
        "--tokenizer",
        str(tokenizer_folder),
    ]
    arguments += ["--output", str(tmp_path / "blend")]
    assert build_blend.main([*arguments, "--tokens", "300"]) == 2
    assert not (tmp_path / "blend").exists()
    assert build_blend.main([*arguments, "--tokens", "150", "--dry-run"]) == 0
    assert "1.500 epochs" in capsys.readouterr().out and not (tmp_path / "blend").exists()
    assert build_blend.main([*arguments, "--tokens", "150"]) == 0
    assert DataFolder(tmp_path / "blend").shard("a", "train").name == "train"


@pytest.mark.parametrize("name", ["nemotron_nano_v2", "released_v1"])
def test_the_tables_in_the_documents_are_what_the_command_prints(name, capsys):
    assert build_blend.main(["--curriculum", f"{name}/curriculum", "--epochs"]) == 0
    assert capsys.readouterr().out.strip() in (ROOT / "docs/data.md").read_text(encoding="utf-8")


def test_long_context_samples_from_pairs(tmp_path, tokenizer_folder, capsys):
    source = parquet(tmp_path / "in.parquet", [{"text": "answer think " * 200}, {"text": "short"}])
    common = [
        "--input",
        str(source),
        "--tokenizer",
        str(tokenizer_folder),
        "--min-tokens",
        "100",
        "--chunk-tokens",
        "20",
    ]
    assert build_long_context.main([*common, "--output", str(tmp_path / "chunks"), "--chunks-only"]) == 0
    (row,) = pq.read_table(tmp_path / "chunks/chunks-00000.parquet").to_pylist()
    pairs = [{"document": row["document"], "chunk": c["chunk"], "question": "q", "answer": "a"} for c in row["chunks"]]
    parquet(tmp_path / "pairs.parquet", pairs)
    assert (
        build_long_context.main(
            [*common, "--output", str(tmp_path / "out"), "--pairs", str(tmp_path / "pairs.parquet")]
        )
        == 0
    )
    (sample,) = pq.read_table(tmp_path / "out/long_documents-00000.parquet").to_pylist()
    assert sample["num_pairs"] == len(pairs) and sample["text"].endswith("Question: q\nAnswer: a\n")
    assert "2 documents, 1 of them long" in capsys.readouterr().out


@pytest.mark.parametrize(
    "program",
    ["download", "fetch_code", "dedup", "build_blend", "prepare_chat", "build_long_context", "build_nano_blend"],
)
def test_every_program_has_help(program, capsys):
    from importlib import import_module

    with pytest.raises(SystemExit) as ended:
        import_module(f"data_prep.{program}").main(["--help"])
    assert ended.value.code == 0 and "--dry-run" in capsys.readouterr().out
