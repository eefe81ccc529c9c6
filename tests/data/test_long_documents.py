import sys

import pytest

from nanotrain.config.errors import UserError
from nanotrain.data.long_documents import (
    Chunk,
    CommandGenerator,
    LongDocuments,
    LongDocumentSettings,
    choose_chunks,
    chosen_chunks,
    pairs_from_records,
    with_pairs,
)
from nanotrain.data.tokenizer import load_tokenizer_json
from tests.data.sources import ListSource

SETTINGS = LongDocumentSettings(min_tokens=64, chunk_tokens=16, chunk_fraction=0.1, seed=3)
ECHO = (
    "import sys, json\n"
    "for line in sys.stdin:\n"
    "    asked = json.loads(line)\n"
    "    print(json.dumps({'question': f'chunk {asked[\"chunk\"]}?', 'answer': asked['text'][:5]}), flush=True)\n"
)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return load_tokenizer_json(tokenizer_folder)


def text_of(words):
    return " ".join(f"answer {n} 日本語" for n in range(words))


def test_published_defaults():
    assert LongDocumentSettings() == LongDocumentSettings(32_768, 1024, 0.1, 1)


def test_a_tenth_of_the_chunks_drawn_by_document(tokenizer):
    picks = [choose_chunks(f"doc {n}", 50, SETTINGS) for n in range(400)]
    assert all(len(set(pick)) == 5 and pick == sorted(pick) for pick in picks)
    counts = [sum(chunk in pick for pick in picks) for chunk in range(50)]
    assert min(counts) > 15 and max(counts) < 75  # 40 expected, standard deviation 6
    assert (
        choose_chunks("doc 1", 50, SETTINGS)
        == picks[1]
        != choose_chunks("doc 1", 50, LongDocumentSettings(64, 16, 0.1, 4))
    )
    assert len(choose_chunks("x", 3, SETTINGS)) == 1


def test_chunks_are_the_tokens_between_their_borders(tokenizer):
    text = text_of(80)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    chunks = chosen_chunks("d", text, tokenizer, SETTINGS)
    assert len(chunks) == round(0.1 * (len(ids) // 16))
    for chunk in chunks:
        expected = tokenizer.decode(ids[chunk.number * 16 : (chunk.number + 1) * 16], skip_special_tokens=False)
        assert chunk.text in text and expected.strip("\ufffd") in chunk.text
    short = tokenizer.decode(ids[:60], skip_special_tokens=False).strip("\ufffd")
    assert chosen_chunks("d", short, tokenizer, SETTINGS) == []


def records(*lengths):
    return [{"id": f"doc{n}", "text": text_of(length)} for n, length in enumerate(lengths)]


def test_pairs_follow_the_document_and_short_documents_are_left_out(tokenizer):
    given = records(80, 2, 60)
    documents = LongDocuments(
        ListSource(given), "text", "id", tokenizer, SETTINGS, lambda chunk: (f"q{chunk.number}", f"a{chunk.number}")
    )
    rows = list(documents.records())
    assert [row["id"] for row in rows] == ["doc0", "doc2"]
    for row, source in zip(rows, (given[0], given[2]), strict=True):
        numbers = [chunk.number for chunk in chosen_chunks(row["id"], source["text"], tokenizer, SETTINGS)]
        pairs = "\n\n".join(f"Question: q{n}\nAnswer: a{n}" for n in numbers)
        assert row["text"] == f"{source['text']}\n\n{pairs}\n" and row["num_pairs"] == len(numbers)
    assert documents.counts["documents"] == 3 and documents.counts["long_documents"] == 2
    first = LongDocuments(ListSource(given), "text", "id", tokenizer, SETTINGS, lambda chunk: ("q", "a"))
    next(stream := first.records())
    stream.close()
    rest = LongDocuments(ListSource(given), "text", "id", tokenizer, SETTINGS, lambda chunk: ("q", "a"))
    assert [row["id"] for row in rest.records(first.state())] == ["doc2"]


def test_chunks_out_pairs_in_equals_asking_directly(tokenizer):
    chunks = list(LongDocuments(ListSource(records(80, 60)), "text", "", tokenizer, SETTINGS, None).records())
    answered = [
        {"document": row["document"], "chunk": chunk["chunk"], "question": "q", "answer": chunk["text"][:3]}
        for row in chunks
        for chunk in row["chunks"]
    ]
    from_file = LongDocuments(
        ListSource(records(80, 60)), "text", "", tokenizer, SETTINGS, pairs_from_records(iter(answered), "x")
    )
    direct = LongDocuments(ListSource(records(80, 60)), "text", "", tokenizer, SETTINGS, lambda c: ("q", c.text[:3]))
    assert list(from_file.records()) == list(direct.records())
    some = LongDocuments(
        ListSource(records(80, 60)), "text", "", tokenizer, SETTINGS, pairs_from_records(iter(answered[:1]), "x")
    )
    assert len(list(some.records())) == 1 and some.counts["without_pair"] == 1


def test_a_command_makes_the_pairs(tmp_path):
    (tmp_path / "echo.py").write_text(ECHO)
    with CommandGenerator(f"{sys.executable} {tmp_path / 'echo.py'}") as generate:
        assert generate(Chunk("d", 3, "hello world")) == ("chunk 3?", "hello")
    (tmp_path / "bad.py").write_text("input(); print('nonsense', flush=True); input()")
    with (
        CommandGenerator(f"{sys.executable} {tmp_path / 'bad.py'}") as generate,
        pytest.raises(UserError, match=r"answered 'nonsense\\n' for chunk 3 of `d`"),
    ):
        generate(Chunk("d", 3, "x"))
    with pytest.raises(UserError, match="cannot be started"), CommandGenerator("/no/such/command"):
        pass


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"x record 0 lacks or misstates"):
        pairs_from_records(iter([{"document": "a"}]), "x")
    with pytest.raises(UserError, match=r"`--chunk-fraction` \(0\)"):
        LongDocumentSettings(chunk_fraction=0).validate()
    assert with_pairs("text\n", [("q ", "a")]) == "text\n\nQuestion: q\nAnswer: a\n"
