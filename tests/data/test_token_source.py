import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.data.token_shards import TokenShardWriter, shard_files
from nanotrain.data.token_source import TokenSource, verify_shard
from nanotrain.data.tokenize_files import TokenizeJob, tokenize_files
from nanotrain.model.batch import IGNORE_INDEX


def write(prefix, documents, dtype=np.int32):
    writer = TokenShardWriter(prefix, dtype)
    for document in documents:
        writer.add_document(document)
    writer.finish()
    return prefix


def read(source: TokenSource, number: int, length: int):
    row = np.full(length, -7), np.full(length, -7), np.full(length, -7, np.int32)
    source.write_sequence(number, row)
    return [part.tolist() for part in row]


@settings(max_examples=60, deadline=None)
@given(
    shards=st.lists(st.lists(st.integers(1, 25), min_size=1, max_size=12), min_size=1, max_size=4),
    length=st.integers(1, 30),
)
def test_sequences_are_those_of_plain_lists(tmp_path_factory, shards, length):
    """Each shard's documents back to back, cut every `length` tokens; labels and segments by walking over them."""
    folder = tmp_path_factory.mktemp("source")
    expected, prefixes, token = [], [], 0
    for number, lengths in enumerate(shards):
        documents = []
        for size in lengths:
            documents.append(list(range(token, token + size)))
            token += size
        prefixes.append(write(folder / str(number), documents))
        flat = [(value, index) for index, document in enumerate(documents) for value in document]
        for start in range(0, len(flat) - length, length):
            part = flat[start : start + length + 1]
            labels = [b if i == j else IGNORE_INDEX for (_, i), (b, j) in itertools.pairwise(part)]
            segments = [index - part[0][1] for _, index in part[:-1]]
            expected.append([[value for value, _ in part[:-1]], labels, segments])
    if not expected:
        with pytest.raises(UserError, match="less than one sequence"):
            TokenSource("s", prefixes, length)
        return
    source = TokenSource("s", prefixes, length)
    assert source.num_tokens == token and source.num_sequences == len(expected)
    assert [read(source, k, length) for k in range(len(expected))] == expected
    for outside in (-1, len(expected)):
        with pytest.raises(IndexError):
            read(source, outside, length)


def test_lists_of_shards_that_cannot_be_a_source_are_refused(tmp_path):
    good = write(tmp_path / "good", [[1, 2, 3]])
    (tmp_path / "link.bin").symlink_to(tmp_path / "good.bin")
    (tmp_path / "link.idx").symlink_to(tmp_path / "good.idx")
    for twice in (tmp_path / "good", tmp_path / "link"):
        with pytest.raises(UserError, match=r"source `s` lists the shard `.*` twice \(the other is .*good"):
            TokenSource("s", [good, twice], 2)
    with pytest.raises(UserError, match=r"none` of source `s` holds no document"):
        TokenSource("s", [good, write(tmp_path / "none", [])], 2)
    with pytest.raises(UserError, match="holds float32, which are no token ids"):
        TokenSource("s", [write(tmp_path / "float", [[1.5]], np.float32)], 2)
    with pytest.raises(UserError, match="lists no shard"):
        TokenSource("s", [], 2)
    (tmp_path / "good.idx").unlink()
    with pytest.raises(MissingInputError, match=r"good\.idx` is missing"):
        TokenSource("s", [good], 2)


@pytest.fixture
def tokenized(tmp_path, tokenizer_folder):
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"text": f"the answer {i}"}) + "\n" for i in range(50)))
    tokenize_files(TokenizeJob((file,), "text", tokenizer_folder, tmp_path / "x"))
    return tmp_path / "x"


def test_a_shard_is_checked_against_its_manifest(tokenized):
    digest = json.loads((tokenized.parent / "x.manifest.json").read_text())["tokenizer_digest"]
    assert verify_shard(tokenized) == (tokenized, digest)
    for file in shard_files(tokenized):
        whole = file.read_bytes()
        for damaged in (whole[:-2], whole[:90] + bytes([whole[90] ^ 4]) + whole[91:]):
            file.write_bytes(damaged)
            with pytest.raises(UserError, match=rf"{file.name}` does not match its sha256 in `.*x\.manifest\.json`"):
                verify_shard(tokenized)
        file.write_bytes(whole)
    verify_shard(tokenized)
    shard_files(tokenized)[1].unlink()
    with pytest.raises(MissingInputError, match=r"x\.idx` is missing though the manifest lists it"):
        verify_shard(tokenized)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"files": {"x.bin": {}}, "tokenizer_digest": "a"}'])
def test_a_damaged_manifest_is_named(tokenized, content):
    (tokenized.parent / "x.manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"x\.manifest\.json` is not the manifest of a shard"):
        verify_shard(tokenized)


def test_a_shard_of_other_tools_has_no_manifest(tmp_path):
    assert verify_shard(write(tmp_path / "m", [[1]])) == (tmp_path / "m", None)
