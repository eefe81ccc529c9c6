import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.data import token_shards
from nanotrain.data.token_shards import TokenShard, TokenShardWriter, shard_files, smallest_dtype

DTYPES = [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64, np.float32, np.float64]


def write(prefix: Path, documents, dtype=np.uint16) -> TokenShard:
    writer = TokenShardWriter(prefix, dtype)
    for document in documents:
        writer.add_document(document)
    writer.finish()
    return TokenShard(prefix)


@pytest.fixture
def megatron():
    return pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")


@pytest.mark.parametrize("dtype", DTYPES)
def test_megatron_core_reads_ours_and_we_read_theirs(tmp_path, megatron, dtype):
    documents = [[1, 2, 3], [4], list(range(100)), [127, 0]]
    ours = write(tmp_path / "ours", documents, dtype)
    theirs = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert theirs.index.dtype == ours.dtype == np.dtype(dtype)
    assert [theirs[i].tolist() for i in range(len(theirs))] == documents
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]

    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(np.asarray(document, dtype), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for end in ("bin", "idx"):
        assert (tmp_path / f"theirs.{end}").read_bytes() == (tmp_path / f"ours.{end}").read_bytes()


def test_documents_of_several_sequences_follow_megatrons_document_index(tmp_path, megatron):
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.int32)
    builder.add_document(np.arange(7, dtype=np.int32), [3, 4])
    builder.add_document(np.arange(7, 12, dtype=np.int32), [5])
    builder.finalize(str(tmp_path / "x.idx"))
    shard = TokenShard(tmp_path / "x")
    assert [shard.document(i).tolist() for i in range(shard.num_documents)] == [list(range(7)), list(range(7, 12))]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20), cut=st.tuples(st.integers(0, 200), st.integers(0, 50))
)
def test_positions_and_documents_agree_with_plain_lists(tmp_path_factory, lengths, cut):
    documents = [[number] * length for number, length in enumerate(lengths)]
    shard = write(tmp_path_factory.mktemp("shard") / "s", documents)
    flat = [token for document in documents for token in document]
    start = min(cut[0], len(flat) - 1)
    stop = min(len(flat), start + 1 + cut[1])
    assert shard.num_tokens == len(flat) and shard.num_documents == len(documents)
    assert shard.tokens(start, stop).tolist() == flat[start:stop]
    assert shard.document_of(start, stop).tolist() == flat[start:stop]  # the token is the document's number


def test_an_empty_shard_is_readable(tmp_path):
    shard = write(tmp_path / "none", [])
    assert (shard.num_documents, shard.num_tokens) == (0, 0)


def test_nothing_has_the_final_name_before_finish(tmp_path):
    writer = TokenShardWriter(tmp_path / "s", np.uint16)
    writer.add_document([1])
    assert not any(file.exists() for file in shard_files(tmp_path / "s"))
    with pytest.raises(MissingInputError, match=r"s\.bin.*prepare"):
        TokenShard(tmp_path / "s")
    writer.finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.bin", "s.idx"]


def test_the_writer_refuses_what_it_cannot_store(tmp_path):
    writer = TokenShardWriter(tmp_path / "s", np.uint16)
    with pytest.raises(UserError, match="document 0 is empty"):
        writer.add_document([])
    with pytest.raises(UserError, match="70000 does not fit dtype uint16"):
        writer.add_document([1, 70000])
    with pytest.raises(UserError, match="-1 does not fit"):
        writer.add_document([-1])
    with pytest.raises(UserError, match="complex"):
        TokenShardWriter(tmp_path / "t", np.complex64)


def test_damage_is_named(tmp_path):
    write(tmp_path / "s", [[1, 2, 3], [4, 5]])
    bin_file, idx_file = shard_files(tmp_path / "s")
    tokens, index = bin_file.read_bytes(), idx_file.read_bytes()

    bin_file.write_bytes(tokens[:-2])
    with pytest.raises(UserError, match=r"s\.bin` has 8 bytes where its index `s\.idx` says 10"):
        TokenShard(tmp_path / "s")
    bin_file.write_bytes(tokens)
    for damaged, message in (
        (b"", "does not begin like a Megatron index"),
        (b"XXIDIDX\x00\x00" + index[9:], "does not begin like a Megatron index"),
        (index[:9] + struct.pack("<Q", 7) + index[17:], "index version 7"),
        (index[:17] + bytes([99]) + index[18:], "dtype code 99"),
        (index[:-3], "too few"),
        (index + b"abc", "too many"),
        (index[:34] + struct.pack("<2i", 2, 3) + index[42:], "do not follow"),
        (index[:34] + struct.pack("<2i", 6, -1) + index[42:], "do not follow"),
        (index[:-8] + struct.pack("<q", 1), "do not follow"),
    ):
        idx_file.write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            TokenShard(tmp_path / "s")
    bin_file.write_bytes(tokens[:6])
    idx_file.write_bytes(index[:34] + struct.pack("<2i2q", 3, 0, 0, 6) + index[58:])
    with pytest.raises(UserError, match="empty document"):
        TokenShard(tmp_path / "s")


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 73), value=st.integers(0, 255))
def test_any_changed_index_byte_is_refused_or_harmless(tmp_path_factory, position, value):
    prefix = tmp_path_factory.mktemp("fuzz") / "s"
    write(prefix, [[1, 2, 3], [4, 5]])
    idx_file = shard_files(prefix)[1]
    index = bytearray(idx_file.read_bytes())
    index[position % len(index)] = value
    idx_file.write_bytes(bytes(index))
    try:
        shard = TokenShard(prefix)
    except UserError:
        return
    assert sum(len(shard.document(i)) for i in range(shard.num_documents)) == shard.num_tokens


def test_reading_outside_is_an_error(tmp_path):
    shard = write(tmp_path / "s", [[1, 2, 3]])
    for call in (lambda: shard.tokens(0, 4), lambda: shard.tokens(-1, 2), lambda: shard.document(1)):
        with pytest.raises(IndexError):
            call()


def test_dtype_choice_is_megatrons(megatron):
    for size in (256, 8192, 65499, 65500, 131072):
        assert smallest_dtype(size) == np.dtype(megatron.DType.optimal_dtype(size))


@settings(max_examples=300, deadline=None)
@given(raw=st.binary(max_size=120), keep=st.integers(0, 74), tokens=st.integers(0, 40))
def test_any_bytes_for_an_index_are_refused_or_harmless(tmp_path_factory, raw, keep, tokens):
    """The beginning of a right index, then noise: nothing outside the tokens is ever read."""
    prefix = tmp_path_factory.mktemp("noise") / "s"
    write(prefix, [[1, 2, 3], [4, 5]])
    bin_file, idx_file = shard_files(prefix)
    idx_file.write_bytes(idx_file.read_bytes()[:keep] + raw)
    bin_file.write_bytes(bytes(tokens))
    try:
        shard = TokenShard(prefix)
    except UserError as error:
        assert "s.idx" in str(error) or "s.bin" in str(error)
        return
    assert sum(len(shard.document(i)) for i in range(shard.num_documents)) == shard.num_tokens
    assert shard.num_tokens * shard.dtype.itemsize == tokens


def test_the_index_is_written_in_blocks(tmp_path, monkeypatch):
    documents = [[i % 7] * (1 + i % 5) for i in range(53)]
    write(tmp_path / "whole", documents)
    for block in (1, 10, 53, 54):
        monkeypatch.setattr(token_shards, "_BLOCK", block)
        write(tmp_path / "blocks", documents)
        for end in ("bin", "idx"):
            assert (tmp_path / f"blocks.{end}").read_bytes() == (tmp_path / f"whole.{end}").read_bytes()


def test_a_document_index_that_skips_nothing_is_read_as_megatron_reads_it(tmp_path, megatron):
    """Megatron writes a document of no sequences as a repeated border; its tokens are none."""
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.int32)
    builder.add_document(np.arange(3, dtype=np.int32), [3])
    builder.end_document()
    builder.finalize(str(tmp_path / "x.idx"))
    with pytest.raises(UserError, match=r"empty document \(number 1\)"):
        TokenShard(tmp_path / "x")
