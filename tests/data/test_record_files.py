import functools
import gzip
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.data import record_files
from nanotrain.data.record_files import plan_chunks, read_chunk, read_records

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

ROWS = [{"id": i, "text": f"row {i} \u00e9\u65e5\U0001f469\n" * (i % 7), "meta": {"n": [i]}} for i in range(300)]
ENDINGS = ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"]


def as_jsonl(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=row["id"] % 2 == 0) + "\n" for row in rows).encode()


def write(file, rows=ROWS):
    """Write rows in the form that the ending names."""
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=70, write_page_checksum=True)
    else:
        pack = {".gz": functools.partial(gzip.compress, mtime=0), ".zst": checked_zstd}.get(file.suffix, bytes)
        file.write_bytes(pack(as_jsonl(rows)))
    return file


def checked_zstd(raw: bytes) -> bytes:
    return zstd.compress(raw, options={zstd.CompressionParameter.checksum_flag: 1})


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("chunk_bytes", [64, 1000, 1 << 23])
def test_every_form_gives_the_same_records_in_order(tmp_path, monkeypatch, ending, chunk_bytes):
    monkeypatch.setattr(record_files, "CHUNK_BYTES", chunk_bytes)
    file = write(tmp_path / f"a.{ending}")
    assert list(read_records(file, [])) == ROWS
    assert list(read_records(file, ["text", "id"])) == [{"text": row["text"], "id": row["id"]} for row in ROWS]
    chunks = list(plan_chunks(file))
    assert sum(chunk.file_bytes for chunk in chunks) == file.stat().st_size
    backwards = [list(read_chunk(chunk, ["id"])) for chunk in reversed(chunks)]  # each on its own, in any order
    assert [row["id"] for part in reversed(backwards) for row in part] == list(range(300))


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=12),
    chunk_bytes=st.integers(1, 90),
    newline=st.booleans(),
    blank=st.booleans(),
)
def test_a_line_belongs_to_exactly_one_chunk(tmp_path_factory, texts, chunk_bytes, newline, blank):
    file = tmp_path_factory.mktemp("lines") / "x.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts]
    content = (b"\n \n" if blank else b"\n").join(lines) + (b"\n" if newline else b"")
    for suffix, packed in (("", content), (".gz", gzip.compress(content)), (".zst", zstd.compress(content))):
        part = file.with_name(file.name + suffix)
        part.write_bytes(packed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(record_files, "CHUNK_BYTES", chunk_bytes)
            assert [row["text"] for row in read_records(part, ["text"])] == texts


def test_plain_text_is_one_record(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo é", encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("zip é".encode()))
    assert list(read_records(tmp_path / "a.txt", ["text"])) == [{"text": "one\n\ntwo é"}]
    assert list(read_records(tmp_path / "b.txt.gz", [])) == [{"text": "zip é"}]
    with pytest.raises(UserError, match="only key is 'text', not 'body'"):
        list(read_records(tmp_path / "a.txt", ["body"]))


def bad_lines(tmp_path, line: bytes, suffix: str):
    raw = as_jsonl(ROWS[:150]) + line + b"\n" + as_jsonl(ROWS[150:])
    file = tmp_path / f"bad.jsonl{suffix}"
    file.write_bytes(gzip.compress(raw) if suffix else raw)
    return file


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("chunk_bytes", [100, 1 << 23])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "caf\xe9"}', "not JSON: .*UTF-8"),
        (b'{"text": "x"', "not JSON"),
        (b'{"text": "\\ud800"}', "not JSON"),
        (b'["text"]', "a JSON list, not an object"),
        (b'{"body": "x", "id": 1}', r"it has no key 'text'; its keys are body, id"),
        (b'{"text": ' + b"[" * 5000, "not JSON"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, monkeypatch, suffix, chunk_bytes, line, message):
    monkeypatch.setattr(record_files, "CHUNK_BYTES", chunk_bytes)
    file = bad_lines(tmp_path, line, suffix)
    seen = []
    with pytest.raises(UserError, match=rf"{file.name}`, line 151: {message}"):
        seen.extend(read_records(file, ["text"]))


@pytest.mark.parametrize("ending", ENDINGS[1:])
def test_every_cut_of_a_packed_file_is_refused(tmp_path, ending):
    whole = write(tmp_path / f"whole.{ending}").read_bytes()
    cut = tmp_path / f"cut.{ending}"
    for length in [*range(0, 40), *range(40, len(whole), 97), *range(len(whole) - 12, len(whole))]:
        cut.write_bytes(whole[:length])
        with pytest.raises(UserError, match=rf"cut\.{ending}` cannot be read .* cut off or damaged"):
            list(read_records(cut, ["text"]))


@settings(max_examples=250, deadline=None)
@given(data=st.data(), ending=st.sampled_from(ENDINGS[1:]))
def test_changed_bytes_give_the_right_records_or_one_error(tmp_path_factory, data, ending):
    """The three packed forms carry checksums; a plain file cannot know its own text."""
    file = write(tmp_path_factory.mktemp("fuzz") / f"f.{ending}", ROWS[:60])
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(bytes(raw))
    try:
        records = list(read_records(file, ["text", "id"]))
    except UserError as error:
        assert str(error).count("`") % 2 == 0 and file.name in str(error)
        return
    assert records == [{"text": row["text"], "id": row["id"]} for row in ROWS[:60]]


@settings(max_examples=150, deadline=None)
@given(raw=st.binary(max_size=400), ending=st.sampled_from([*ENDINGS, "txt", "txt.zst"]))
def test_any_bytes_are_read_or_refused(tmp_path_factory, raw, ending):
    file = tmp_path_factory.mktemp("noise") / f"n.{ending}"
    file.write_bytes(raw)
    try:
        records = list(read_records(file, []))
    except UserError:
        return
    if ending == "txt":
        assert records == [{"text": raw.decode()}]
    else:
        assert ending in ("jsonl", "jsonl.gz") and all(isinstance(record, dict) for record in records)


def test_a_column_that_is_not_there_and_text_that_is_not_utf8(tmp_path):
    file = write(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column 'body'; its columns are id, text, meta"):
        list(read_records(file, ["body"]))
    table = pa.table({"text": pa.array([b"fine", b"caf\xe9"], pa.binary())})
    pq.write_table(
        table.set_column(0, "text", table["text"].combine_chunks().view(pa.string())), tmp_path / "b.parquet"
    )
    with pytest.raises(UserError, match=r"b\.parquet` cannot be read after row 0 .*utf-8"):
        list(read_records(tmp_path / "b.parquet", ["text"]))
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"c\.txt` is not UTF-8: byte 0xe9 at offset 3"):
        list(read_records(tmp_path / "c.txt", []))


def test_names_that_say_nothing_are_refused(tmp_path):
    with pytest.raises(MissingInputError, match=r"none\.jsonl` is missing"):
        list(read_records(tmp_path / "none.jsonl", []))
    for name in ("a.csv", "a", "a.parquet.gz", ".gz"):
        with pytest.raises(UserError, match="ending that is known"):
            list(read_records(tmp_path / name, []))


def test_an_empty_file_has_no_records(tmp_path):
    (tmp_path / "a.jsonl").touch()
    write(tmp_path / "b.parquet", [])
    assert list(read_records(tmp_path / "a.jsonl", ["text"])) == []
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b""))
    assert list(read_records(tmp_path / "c.jsonl.gz", ["text"])) == []
