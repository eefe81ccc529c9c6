import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from data_prep import tokenize_corpus
from nanotrain.data.token_shards import TokenShard


@pytest.fixture
def tokenizer_folder(tmp_path):
    """Any tokenizer.json folder will do: here whole words."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


@pytest.fixture
def arguments(tmp_path, tokenizer_folder):
    (tmp_path / "in.jsonl").write_text('{"body": "a b a"}\n{"body": "b z"}\n')
    fixed = ["--input", str(tmp_path / "in.jsonl"), "--text-key", "body", "--tokenizer", str(tokenizer_folder)]
    return [*fixed, "--output", str(tmp_path / "out/x"), "--workers", "1"]


def test_the_fixed_surface(arguments, tmp_path, capsys):
    assert tokenize_corpus.main(arguments) == 0
    assert "7 tokens of 2 documents" in capsys.readouterr().out
    shard = TokenShard(tmp_path / "out/x")
    assert [shard.document(i).tolist() for i in range(2)] == [[2, 3, 2, 1], [3, 0, 1]]
    assert json.loads((tmp_path / "out/x.manifest.json").read_text())["tokens"] == 7


def test_a_dry_run_writes_nothing(arguments, tmp_path, capsys):
    assert tokenize_corpus.main([*arguments, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "1 files" in out and "about 2 documents" in out and "MB into" in out
    assert not (tmp_path / "out").exists()


def test_mistakes_end_with_2_and_a_sentence(arguments, capsys):
    for wrong, message in (
        (["--text-key", "text"], "line 1: it has no key 'text'; its keys are body"),
        (["--workers", "0"], "--workers (0) must be at least 1"),
        (["--eos-token", "no"], "'no') is not in the vocabulary"),
        (["--input", "none/*.jsonl"], "matches no file"),
        (["--tokenizer", "none"], "tokenizer.json` is missing"),
    ):
        assert tokenize_corpus.main([*arguments, *wrong]) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
