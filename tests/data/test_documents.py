from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotrain.config.errors import UserError
from nanotrain.data.documents import (
    Document,
    cap_bytes,
    decode_utf8,
    drop_duplicates,
    split_by_family,
    unit_hash,
)


def documents_of(families: int, each: int = 3, size: int = 50) -> list[Document]:
    return [Document(f"{f}-{i} ".ljust(size, "x"), f"family {f}", "s") for f in range(families) for i in range(each)]


@settings(max_examples=50, deadline=None)
@given(families=st.integers(2, 60), fraction=st.floats(0.01, 0.49))
def test_a_family_is_never_on_both_sides_and_no_side_is_empty(families, fraction):
    documents = documents_of(families)
    train, validation = split_by_family(documents, fraction)
    assert train and validation
    assert Counter(train + validation) == Counter(documents)
    assert not {d.family for d in train} & {d.family for d in validation}


def test_the_share_is_kept_over_many_families_and_new_text_moves_nothing():
    documents = documents_of(4000, each=1)
    _, validation = split_by_family(documents, 0.06)
    assert 0.045 < len(validation) / len(documents) < 0.075
    _, fewer = split_by_family(documents[:2000], 0.06)
    assert {d.family for d in fewer} == {d.family for d in validation if int(d.family.split()[1]) < 2000}


def test_one_family_cannot_be_split():
    with pytest.raises(UserError, match="1 document families cannot be split"):
        split_by_family(documents_of(1), 0.1)


def test_the_hash_is_the_same_in_every_process():
    assert unit_hash("enwiki:Anarchism", "split") == pytest.approx(0.746673518, abs=1e-8)
    assert unit_hash("a", "split") != unit_hash("a", "cap")
    assert all(0 <= unit_hash(str(i), "s") < 1 for i in range(100))


def test_exact_duplicates_are_dropped_across_calls():
    seen: set[bytes] = set()
    a, b = Document("same", "f", "s"), Document("same", "g", "s")
    assert drop_duplicates([a, b, Document("same ", "f", "s")], seen) == [a, Document("same ", "f", "s")]
    assert drop_duplicates([b], seen) == []


@settings(max_examples=60, deadline=None)
@given(families=st.integers(2, 30), each=st.integers(1, 5), cap=st.integers(1, 8000))
def test_a_cap_keeps_at_least_two_families_and_little_more_than_its_bytes(families, each, cap):
    documents = documents_of(families, each)
    kept = cap_bytes(documents, cap)
    assert len({d.family for d in kept}) >= 2
    assert sum(len(d.text) for d in kept) <= max(cap, 100) and set(kept) <= set(documents)
    assert split_by_family(kept, 0.1)[1]


def test_no_cap_keeps_everything_and_the_order_of_input_does_not_matter():
    documents = documents_of(20)
    assert cap_bytes(documents, 0) == documents
    reordered = [d for f in reversed(range(20)) for d in documents if d.family == f"family {f}"]
    assert Counter(cap_bytes(documents, 700)) == Counter(cap_bytes(reordered, 700))


def test_bad_bytes_are_named_with_their_offset():
    assert decode_utf8("ä".encode(), "x") == "ä"
    with pytest.raises(UserError, match=r"`pages\.txt` is not UTF-8: byte 0xe4 at offset 4"):
        decode_utf8(b"abcd\xe4x", "pages.txt")
