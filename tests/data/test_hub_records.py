import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.config.shipped import package_folder
from nanotrain.config.sources import COMPONENTS_FOLDER, load_component
from nanotrain.data.hub_records import expand_files, open_records

NAMES = sorted(file.stem for file in (package_folder("configs") / COMPONENTS_FOLDER).glob("*.yaml"))
SUBSETS = [(name, subset) for name in NAMES for subset in load_component(name).subsets]
CALL = pa.struct(
    [
        ("id", pa.string()),
        ("type", pa.string()),
        ("function", pa.struct([("name", pa.string()), ("arguments", pa.string())])),
    ]
)
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(CALL))])
SCORES = ("finemath_int_scores", "finemath_scores", "nemocurator_int_scores", "nemocurator_scores")
METADATA = pa.struct(
    [(name, pa.string()) for name in ("warc_filename", "warc_id")]
    + [(name, pa.int64() if "int" in name else pa.float64()) for name in SCORES]
    + [(name, pa.string()) for name in ("category", "models_used")]
)
TYPES = {"string": pa.string(), "struct": METADATA, "list": pa.list_(MESSAGE), "int": pa.int64()}


def value(column: str, kind: str, number: int):
    if kind == "struct":
        return {f.name: 3 if "scores" in f.name else f"{f.name} {number}" for f in METADATA}
    if kind == "list":
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        reply = {"role": "assistant", "content": f"reply {number}", "tool_calls": [call] if number % 2 else []}
        return [{"role": "user", "content": "ask", "tool_calls": []}, reply]
    return f"{column} {number}"


def published_file(folder: Path, columns: dict[str, str], rows: int, start: int = 0) -> Path:
    """A parquet file with exactly the published columns."""
    table = pa.table(
        {c: pa.array([value(c, k, n) for n in range(start, start + rows)], TYPES[k]) for c, k in columns.items()}
    )
    file = folder / f"part-{start:05d}.parquet"
    pq.write_table(table, file, row_group_size=4)
    return file


@pytest.mark.parametrize(("name", "subset"), SUBSETS, ids=[subset for _, subset in SUBSETS])
def test_each_released_subset_is_read_from_files_with_its_published_columns(name, subset, tmp_path):
    component = load_component(name)
    columns = component.subsets[subset].columns
    for start in (0, 7):
        published_file(tmp_path, columns, 7, start)
    component.subsets[subset].local_files = [str(tmp_path / "*.parquet")]
    stream = open_records(component, subset)
    assert list(stream.columns) == list(columns)
    records = list(stream.records())
    assert records == [{c: value(c, k, n) for c, k in columns.items()} for n in range(14)]


@pytest.fixture
def component(tmp_path):
    component = load_component("nemotron_cc_v2")
    subset = component.subsets["cc_v2_high_quality"]
    for start in (0, 9, 18):
        published_file(tmp_path, subset.columns, 9, start)
    subset.local_files = [str(tmp_path / "part-*.parquet")]
    return component


@pytest.mark.parametrize("taken", [0, 1, 4, 8, 9, 10, 17, 26, 27])
def test_a_stream_is_taken_up_where_it_was_left(component, taken):
    stream = open_records(component, "cc_v2_high_quality")
    records = stream.records()
    before = [next(records) for _ in range(taken)]
    state = json.loads(json.dumps(stream.state()))
    after = list(open_records(component, "cc_v2_high_quality").records(state))
    assert [record["id"] for record in before + after] == [f"id {n}" for n in range(27)]
    assert len(list(stream.records())) == 27  # a stream can also start again


def test_jsonl_plain_and_gzipped(component, tmp_path):
    import gzip

    lines = "".join(json.dumps({"text": f"t{n}", "id": str(n)}) + "\n" for n in range(5))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for file in ("a.jsonl", "b.jsonl.gz"):
        component.subsets["cc_v2_high_quality"].local_files = [str(tmp_path / file)]
        texts = [record["text"] for record in open_records(component, "cc_v2_high_quality").records()]
        assert texts == [f"t{n}" for n in range(5)]


def refused(component, files, match, error=UserError):
    component.subsets["cc_v2_high_quality"].local_files = [str(file) for file in files]
    with pytest.raises(error, match=match):
        list(open_records(component, "cc_v2_high_quality").records())


def test_what_cannot_be_read_is_one_sentence(component, tmp_path):
    whole = tmp_path / "part-00000.parquet"
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(whole.read_bytes()[:-40])
    refused(component, [cut], "cut.parquet.* cannot be read as records")
    refused(component, [tmp_path / "none*.parquet"], "matches no file", MissingInputError)
    (tmp_path / "x.csv").write_text("a")
    refused(component, [tmp_path / "x.csv"], "is not a kind of file that holds records")
    (tmp_path / "y.jsonl").write_text('{"text": "a"}\n')
    refused(component, [whole, tmp_path / "y.jsonl"], "files of different kinds")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    refused(component, [tmp_path / "bad.jsonl"], "failed|cannot be read")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe4"}\n')
    refused(component, [tmp_path / "latin.jsonl"], "failed|cannot be read")
    pq.write_table(pa.table({"content": ["a"]}), tmp_path / "other.parquet")
    refused(component, [tmp_path / "other.parquet"], "has no column `text`; ")
    pq.write_table(pa.table({"text": [1]}), tmp_path / "number.parquet")
    refused(
        component, [tmp_path / "number.parquet"], "column `text` of .* is int64, but the component's file says string"
    )
    with pytest.raises(UserError, match="did you mean 'cc_v2_diverse_qa'"):
        open_records(component, "cc_v2_diverse")
    assert expand_files([str(whole)], "x") == [str(whole)]


class Gate(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does for a data set to which one has no access."""

    def do_GET(self):
        body = b'{"error": "Access to this dataset is restricted."}'
        self.send_response(403 if "Authorization" in self.headers else 401)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_POST = do_GET

    def log_message(self, *_):
        """Be silent."""


@pytest.mark.parametrize("token", ["", pytest.param("hf_abc", marks=pytest.mark.slow)])
def test_a_gated_set_says_where_to_ask_and_which_variable_to_set(token, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gate)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    environment |= {"HF_TOKEN": token} if token else {}
    command = [
        sys.executable,
        "-m",
        "data_prep.download",
        "--component",
        "nemotron_cc_v2",
        "--subset",
        "cc_v2_diverse_qa",
    ]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out")], env=environment, capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    server.shutdown()
    assert done.returncode == 2, done.stderr
    state = "is set but has no access" if token else "is not set"
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        f"error: `nvidia/Nemotron-CC-v2` is gated and HF_TOKEN {state}; ask for access at"
        " https://huggingface.co/datasets/nvidia/Nemotron-CC-v2, then set HF_TOKEN to a token of that account."
    )
