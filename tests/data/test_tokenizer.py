import base64
import json

import pytest
import tiktoken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.data.tokenizer import (
    EOS_ID,
    NUM_SPECIALS,
    SPECIALS,
    CorpusEncoder,
    build_tokenizer,
    load_tokenizer_json,
    read_tekken,
    token_byte_lengths,
)

ADVERSARIAL = (
    "",
    " ",
    "\n\r\n\t  \n",
    "\x00\x01\x7f\x85\u2028\u00a0\ufeff",
    "e\u0301 \u00e9 \ufb01 \u0130 \u1e9e \u01c5 \u02b0",
    "\U0001f469\u200d\U0001f4bb\U0001f1e9\U0001f1ea \U0010ffff \ufffd",
    "\u0915\u094d\u0937\u093f \u0e01\u0e33 \u0645\u064e \u65e5\u672c\u8a9e \uac00",
    "don't WON'T 12345 1.5e-3 \u0661\u0662 \u2167 ++//\n\n</think>\n\nThe answer",
    "a" * 500 + " " * 77 + "the answer" * 50,
    "think<SPECIAL_12></s><s>[INST]<unk>",
)
RELAXED = {"suppress_health_check": [HealthCheck.function_scoped_fixture], "deadline": None}


@pytest.fixture(scope="module")
def oracle(tekken_json, num_ranks):
    """tiktoken over the ranks of the published file, shifted by the specials."""
    content = json.loads(tekken_json)
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in content["vocab"][:num_ranks]}
    encoding = tiktoken.Encoding("o", pat_str=content["config"]["pattern"], mergeable_ranks=ranks, special_tokens={})
    return lambda text: [NUM_SPECIALS + rank for rank in encoding.encode_ordinary(text)]


@pytest.fixture(scope="module")
def exported(tokenizer_folder):
    tokenizer = load_tokenizer_json(tokenizer_folder)
    tokenizer.encode_special_tokens = True  # names of specials in text are ordinary characters, as in a corpus
    return tokenizer


@settings(max_examples=300, **RELAXED)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
    | st.text("ab <think>/\n answer019", max_size=80)
)
def test_ids_are_those_of_tiktoken_with_the_same_ranks(text, oracle, exported, tokenizer_folder):
    expected = oracle(text)
    assert exported.encode(text, add_special_tokens=False).ids == expected
    assert _encoder(tokenizer_folder).encode(text).tolist() == expected
    assert exported.decode(expected) == text


@pytest.mark.parametrize("text", ADVERSARIAL)
def test_adversarial_unicode(text, oracle, exported, tokenizer_folder):
    expected = oracle(text)
    assert exported.encode(text, add_special_tokens=False).ids == expected
    assert _encoder(tokenizer_folder).encode(text).tolist() == expected


_ENCODERS: dict = {}


def _encoder(folder) -> CorpusEncoder:
    if folder not in _ENCODERS:
        _ENCODERS[folder] = CorpusEncoder(folder)
    return _ENCODERS[folder]


def test_documents_end_with_eos(tokenizer_folder, oracle):
    texts = ["the answer", "ä", "think " * 30]
    encoded = _encoder(tokenizer_folder).encode_documents(texts)
    assert [ids.tolist() for ids in encoded] == [[*oracle(text), EOS_ID] for text in texts]


def test_a_million_blanks_get_the_exported_tokenizers_ids(tokenizer_folder, exported):
    texts = ["a" + " " * 1_000_000 + "b", "between", "\n" * 5000]
    expected = [exported.encode(text, add_special_tokens=False).ids for text in texts]
    encoder = _encoder(tokenizer_folder)
    assert [encoder.encode(text).tolist() for text in texts] == expected
    assert [ids.tolist() for ids in encoder.encode_documents(texts)] == [[*ids, EOS_ID] for ids in expected]


def test_transformers_loads_the_folder_offline(tokenizer_folder, oracle, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.encode("The answer") == oracle("The answer")  # no BOS
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 10, 11, 12, 999]) == [
        "<unk>",
        "<s>",
        "</s>",
        "<SPECIAL_10>",
        "<SPECIAL_11>",
        "<SPECIAL_12>",
        "<SPECIAL_999>",
    ]
    assert tokenizer.encode("<SPECIAL_12>think") == [12, *oracle("think")]
    assert tokenizer.decode([12, *oracle("The  answer .")], skip_special_tokens=True) == "The  answer ."


def test_specials_fill_the_first_thousand_ids():
    assert len(SPECIALS) == len(set(SPECIALS)) == NUM_SPECIALS


@settings(max_examples=50, **RELAXED)
@given(text=st.text(max_size=50).filter(lambda text: text.isprintable()))
def test_byte_lengths_sum_to_the_texts_bytes(text, tokenizer_folder, oracle):
    lengths = token_byte_lengths(tokenizer_folder)
    assert sum(lengths[token] for token in oracle(text)) == len(text.encode())


def test_byte_lengths_of_specials_are_zero(tokenizer_folder, num_ranks):
    lengths = token_byte_lengths(tokenizer_folder)
    assert len(lengths) == NUM_SPECIALS + num_ranks
    assert not lengths[:NUM_SPECIALS].any() and (lengths[NUM_SPECIALS:] > 0).all()


def test_fewer_ranks_are_a_smaller_vocabulary(tekken_json, exported):
    small = build_tokenizer(*read_tekken(tekken_json, 280))
    assert small.get_vocab_size() == 1280
    text = "The answer is what stands ä"
    assert small.decode(small.encode(text).ids) == text
    assert len(small.encode(text).ids) > len(exported.encode(text).ids)


def test_files_that_are_no_vocabulary_are_refused(tekken_json, num_ranks, tmp_path):
    with pytest.raises(UserError, match=rf"`stage.corpus.vocab_size` \({num_ranks + 1001}\) exceeds"):
        read_tekken(tekken_json, num_ranks + 1)
    content = json.loads(tekken_json)
    content["vocab"][3], content["vocab"][300] = content["vocab"][300], content["vocab"][3]
    with pytest.raises(UserError, match="in order"):
        read_tekken(json.dumps(content).encode(), num_ranks)
    swapped = json.loads(tekken_json)
    for i, j in ((3, 300), (300, 3)):
        swapped["vocab"][i] = {"rank": i, "token_bytes": json.loads(tekken_json)["vocab"][j]["token_bytes"]}
    with pytest.raises(UserError, match="256 single bytes"):
        read_tekken(json.dumps(swapped).encode(), num_ranks)
    with pytest.raises(UserError, match="not a merge of two earlier"):
        build_tokenizer(".", [bytes([b]) for b in range(256)] + [b"qqq"])


def test_missing_and_damaged_tokenizers_are_named(tmp_path):
    with pytest.raises(MissingInputError, match=r"tokenizer\.json` is missing"):
        CorpusEncoder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json` is not a tokenizer"):
        load_tokenizer_json(tmp_path)
