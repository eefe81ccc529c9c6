import itertools
import random

import numpy as np
import pytest

from nanotrain.config.errors import UserError
from nanotrain.data.deduplication import (
    DedupSettings,
    KeptRecords,
    choose_bands,
    find_duplicates,
    save_signatures,
    shingles,
)
from nanotrain.runtime.progress import Progress
from tests.data.sources import ListSource


def decide(texts, settings, folder):
    records = [{"text": text} for text in texts]
    files = save_signatures(ListSource(records), "text", settings, folder, Progress(folder / "p.jsonl"), "k")
    return find_duplicates(files, settings)


def jaccard(a: str, b: str) -> float:
    one, two = shingles(a, 5), shingles(b, 5)
    return len(one & two) / len(one | two)


@pytest.fixture(scope="module")
def texts():
    """60 texts, some copied exactly, some with a few words changed; similarity falls from 1 to 0."""
    draw = random.Random(5)
    words = [f"w{n}" for n in range(200)]
    texts = [" ".join(draw.choice(words) for _ in range(120)) for _ in range(40)]
    for number in range(0, 40, 4):
        changed = texts[number].split()
        for _ in range(number // 4):
            changed[draw.randrange(120)] = "changed"
        texts.append(" ".join(changed))
    texts += [texts[1], texts[2], texts[40], texts[1]]
    return texts


def test_exact_copies_are_found_exactly(texts, tmp_path):
    found = decide(texts, DedupSettings(threshold=1.0), tmp_path)
    first = {}
    expected = [first.setdefault(text, number) for number, text in enumerate(texts)]
    assert found.kept_as.tolist() == expected
    assert found.counts()["exact_duplicates"] == len(texts) - len(set(texts)) and found.counts()["near_duplicates"] == 0


def test_near_copies_agree_with_brute_force_away_from_the_threshold(texts, tmp_path):
    found = decide(texts, DedupSettings(threshold=0.8, permutations=256), tmp_path)
    for a, b in itertools.combinations(range(len(texts)), 2):
        similarity = jaccard(texts[a], texts[b])
        joined = found.kept_as[a] == found.kept_as[b]
        if similarity > 0.92:
            assert joined, (a, b, similarity)
        if similarity < 0.5:
            assert not joined, (a, b, similarity)
    dropped = np.flatnonzero(~found.kept)
    assert (found.kept_as[dropped] < dropped).all() and found.kept[found.kept_as[dropped]].all()
    for number in dropped:
        truth = jaccard(texts[number], texts[found.kept_as[number]])
        assert abs(found.similarity[number] - truth) < 5 * 0.5 / np.sqrt(256)


def test_text_without_blanks_is_cut_into_characters(tmp_path):
    base = "東京都は日本の首都であり人口がもっとも多い都市である" * 3
    draw = random.Random(1)
    letters = [chr(0x4E00 + draw.randrange(3000)) for _ in range(80)]
    texts = [base, base[:-1] + "よ", "".join(letters)]
    assert decide(texts, DedupSettings(0.7), tmp_path).kept_as.tolist() == [0, 0, 2]


def test_empty_and_short_texts_do_not_crash(tmp_path):
    assert decide(["", "a", "", "a b", "a"], DedupSettings(), tmp_path).kept_as.tolist() == [0, 1, 0, 3, 1]
    (tmp_path / "none").mkdir()
    assert decide([], DedupSettings(), tmp_path / "none").counts()["records"] == 0


def test_kept_records_resume(texts):
    records = [{"text": text, "n": n} for n, text in enumerate(texts)]
    kept = np.asarray([n % 3 != 0 for n in range(len(texts))])
    whole = [record["n"] for record in KeptRecords(ListSource(records), kept).records()]
    assert whole == np.flatnonzero(kept).tolist()
    for taken in (1, 7, len(whole)):
        source = KeptRecords(ListSource(records), kept)
        stream = source.records()
        before = [next(stream)["n"] for _ in range(taken)]
        assert before + [r["n"] for r in KeptRecords(ListSource(records), kept).records(source.state())] == whole


def test_bands_rise_before_the_threshold_and_bad_settings_are_refused():
    for threshold in (0.6, 0.8, 0.95):
        bands, rows = choose_bands(128, threshold)
        assert bands * rows <= 128 and threshold - 0.2 < (1 / bands) ** (1 / rows) < threshold
    with pytest.raises(UserError, match=r"`--threshold` \(0.2\)"):
        DedupSettings(threshold=0.2).validate()


def test_a_column_that_is_no_text_is_named(tmp_path):
    with pytest.raises(UserError, match="`n` of record 0 is int, not text"):
        save_signatures(ListSource([{"n": 1}]), "n", DedupSettings(), tmp_path, Progress(tmp_path / "p"), "k")
