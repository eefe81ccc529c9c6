import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotrain.data.documents import Document
from nanotrain.data.overlap import document_overlap, ngram_overlap, overlap_report


def grams(text: str) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + 13]) for i in range(len(words) - 12)]


def overlap_ref(train: list[str], validation: list[str]) -> list[tuple[int, int]]:
    """Brute force: sets of tuples of words."""
    known = {gram for text in train for gram in grams(text)}
    return [(len(grams(text)), sum(gram in known for gram in grams(text))) for text in validation]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_overlap_equals_the_sets_of_tuples_document_by_document(data):
    text = st.lists(st.sampled_from(["a", "b", "ä"]), max_size=40).map(" ".join)
    train, validation = data.draw(st.lists(text, max_size=4)), data.draw(st.lists(text, max_size=4))
    expected = overlap_ref(train, validation)
    assert [tuple(row) for row in document_overlap(train, validation).tolist()] == expected
    windows, shared = sum(row[0] for row in expected), sum(row[1] for row in expected)
    assert ngram_overlap(train, validation) == pytest.approx(shared / windows if windows else 0.0)


def test_many_texts_are_walked_in_parts():
    draw = random.Random(3)
    train = [" ".join(draw.choice("abc") for _ in range(30)) for _ in range(1300)]
    validation = [" ".join(draw.choice("abc") for _ in range(30)) for _ in range(20)] + train[1250:1252]
    assert [tuple(row) for row in document_overlap(iter(train), validation).tolist()] == overlap_ref(train, validation)


def test_overlap_sees_a_copied_page():
    page = " ".join(str(i) for i in range(200))
    assert ngram_overlap([f"before {page} after"], [page]) == 1.0
    assert ngram_overlap([page], [page[::-1]]) == 0.0


def test_the_report_sums_by_source_and_shows_what_a_random_split_would_leak():
    pieces = [(number, " ".join(f"{number}w{i // 2 * 2}" for i in range(60))) for number in range(30)]
    documents = [
        Document(f"{text} end {copy}", f"page {n}", "odd" if n % 2 else "even") for n, text in pieces for copy in (0, 1)
    ]
    train = [d for d in documents if int(d.family.split()[1]) >= 4]
    validation = [d for d in documents if int(d.family.split()[1]) < 4]
    report, kept = overlap_report(train, validation)
    assert kept == validation and report["dropped"] == 0
    assert (report["shared"], report["share"], report["documents"], report["documents_with_overlap"]) == (0, 0.0, 8, 0)
    assert report["windows"] == sum(len(grams(d.text)) for d in validation)
    assert report["random_share"] > 0.3 and report["by_source"] == {"even": 0.0, "odd": 0.0}
    leaking, kept = overlap_report([*train, validation[0]], validation)
    assert kept == validation
    assert leaking["by_source"]["even"] > 0.4 and leaking["by_source"]["odd"] == 0.0
    assert leaking["documents_with_overlap"] == 2
    cleaned, kept = overlap_report([*train, validation[0]], validation, max_share=0.2)
    assert kept == validation[2:] and cleaned["dropped"] == 2 and cleaned["share"] == 0.0
