import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.data import encoders
from nanotrain.data.encoders import ENCODERS, GigatokenEncoder, HfEncoder, build_encoder, eos_token_id
from nanotrain.data.tokenizer import load_tokenizer_json, plain_tokenizer

NEWER_THAN_THE_ORACLE = "\U0003241e,B \U00011de3 1 \U00016ff4 \U000332a0"
"""Assigned in Unicode 17, unassigned for `tokenizers`."""
ALPHABETS = (
    "abc ABC\n\r\t 019.,'\u2019-_/<>",
    "\u00e9\u0301\u0308e\u200d\u200c\ufe0f\u0130i\u017fK\u212a",
    "\u0627\u064e\u0915\u094d\u0937\u0661\u0e33",
    "日本あア가\u1100\u1161\u3000",
    "\U0001f469\u200d\U0001f4bb\U0001f1e9\U00020000\U0010ffff" + NEWER_THAN_THE_ORACLE,
    "\u00a0\u2003\u2028\u0085\x0b\x0c\x1c\x00\u01c5\u02b0\u2167\u00b2\u00bd\u2460",
)
TEXTS = st.one_of(
    *(st.text(alphabet, max_size=80) for alphabet in ALPHABETS),
    st.text("".join(ALPHABETS), max_size=80),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    st.builds(
        lambda part, times: part * times, st.text("".join(ALPHABETS), min_size=1, max_size=4), st.integers(1, 300)
    ),
)


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request, tokenizer_folder):
    if request.param == "gigatoken" and encoders.gigatoken is None:
        pytest.skip("gigatoken is not installed")
    return build_encoder(tokenizer_folder, request.param)


@pytest.fixture(scope="module")
def exact_ids(tokenizer_folder):
    """The `tokenizers` object of the folder, one text at a time."""
    tokenizer = load_tokenizer_json(tokenizer_folder)
    tokenizer.encode_special_tokens = True
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def split(ids: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    assert ids.dtype == np.uint32 and lengths.sum() == ids.size
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if lengths.size else []


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXTS, max_size=6))
def test_ids_are_the_exported_tokenizers(texts, encoder, exact_ids):
    assert split(*encoder.encode_batch(texts)) == [exact_ids(text) for text in texts]


def test_names_of_specials_are_text_and_long_runs_are_no_trouble(encoder, exact_ids):
    texts = [
        "think<SPECIAL_12></s><s>[INST]",
        " " * 9000 + "x",
        "\n" * 5000,
        "a" * 20_000,
        "=-" * 9000,
        "日本語" * 5000,
    ]
    assert split(*encoder.encode_batch(texts)) == [exact_ids(text) for text in texts]
    assert exact_ids("</s>") != [2]


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_every_code_point_gives_the_same_ids(tokenizer_folder, step):
    """Each code point below the private planes after a letter, doubled, and at a line's start."""
    exact, fast = HfEncoder(tokenizer_folder), build_encoder(tokenizer_folder)
    points = [chr(c) for c in range(0x20, 0x34000, step) if not 0xD800 <= c < 0xE000]
    texts = ["".join(f"a{c}B {c}{c} 1\n{c}\n" for c in points[i : i + 8]) for i in range(0, len(points), 8)]
    ours, right = fast.encode_batch(texts), exact.encode_batch(texts)
    assert np.array_equal(ours[1], right[1]) and np.array_equal(ours[0], right[0])


@pytest.mark.skipif(encoders.gigatoken is None, reason="gigatoken is not installed")
def test_text_of_a_newer_unicode_takes_the_slow_way(tokenizer_folder, exact_ids):
    fast = GigatokenEncoder(HfEncoder(tokenizer_folder))
    assert fast.is_unsafe(NEWER_THAN_THE_ORACLE) and fast.is_unsafe("\u0378")
    assert not fast.is_unsafe("plain") and not fast.is_unsafe("äöü 日本語 \U0001f469\u200d\U0001f4bb ࠀ")
    texts = ["first", NEWER_THAN_THE_ORACLE, "", "last é"]
    assert split(*fast.encode_batch(texts)) == [exact_ids(text) for text in texts]


@pytest.mark.skipif(encoders.gigatoken is None, reason="gigatoken is not installed")
def test_a_grown_cache_is_dropped(tokenizer_folder, exact_ids, monkeypatch):
    fast = GigatokenEncoder(HfEncoder(tokenizer_folder))
    monkeypatch.setattr(encoders, "_CACHE_GROWTH_BYTES", -(1 << 60))
    before = fast._backend
    assert split(*fast.encode_batch(["the answer"])) == [exact_ids("the answer")]
    assert fast._backend is not before


def save(tokenizer: Tokenizer, folder):
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    return folder


def words_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "answer": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def test_a_tokenizer_of_another_form_is_encoded_by_tokenizers(tmp_path, tokenizer_folder):
    tokenizer = words_tokenizer()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding()
    encoder = build_encoder(save(tokenizer, tmp_path / "words"))
    assert encoder.name == "tokenizers"
    assert split(*encoder.encode_batch(["the answer the", "no"])) == [[1, 2, 1], [0]]  # neither cut nor padded
    normalizing = load_tokenizer_json(tokenizer_folder)
    normalizing.normalizer = normalizers.NFC()
    folder = save(normalizing, tmp_path / "nfc")
    assert build_encoder(folder).name == "tokenizers"
    with pytest.raises(
        UserError, match=r"'gigatoken' cannot be used with .*(not a byte-level BPE|not installed).*use auto"
    ):
        build_encoder(folder, "gigatoken")
    with pytest.raises(UserError, match="'fastest' is not known; use auto, gigatoken"):
        build_encoder(folder, "fastest")


def test_added_tokens_that_are_not_special_are_found_in_text(tmp_path, tokenizer_folder):
    tokenizer = load_tokenizer_json(tokenizer_folder)
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    folder = save(tokenizer, tmp_path / "added")
    text = "the <tool_call> answer</s><tool_call>"
    expected = plain_tokenizer(folder).encode(text, add_special_tokens=False).ids
    assert expected.count(tokenizer.token_to_id("<tool_call>")) == 2
    assert split(*build_encoder(folder).encode_batch([text])) == [expected]


def test_an_encoder_that_is_wrong_is_not_taken(tokenizer_folder, monkeypatch):
    monkeypatch.setattr(
        GigatokenEncoder,
        "encode_batch",
        lambda self, texts: (np.zeros(len(texts), np.uint32), np.ones(len(texts), np.int64)),
    )
    assert build_encoder(tokenizer_folder).name == "tiktoken"
    monkeypatch.setattr(encoders, "gigatoken", None)
    assert build_encoder(tokenizer_folder).name == "tiktoken"


def test_the_end_of_a_document(tmp_path, tokenizer_folder):
    assert eos_token_id(tokenizer_folder, None) == 2
    assert eos_token_id(tokenizer_folder, "<SPECIAL_12>") == 12
    folder = save(words_tokenizer(), tmp_path / "words")
    with pytest.raises(UserError, match="names no eos_token"):
        eos_token_id(folder, None)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "the"}}))
    assert eos_token_id(folder, None) == 1
    with pytest.raises(UserError, match=r"--eos-token \('none'\) is not in the vocabulary"):
        eos_token_id(folder, "none")
    with pytest.raises(MissingInputError, match=r"tokenizer\.json"):
        build_encoder(tmp_path)
