import json
import shutil

import numpy as np
import pytest

from nanotrain.config.blend import load_curriculum
from nanotrain.config.data import PhaseConfig
from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.config.training import TrainingConfig
from nanotrain.data.blend_folder import (
    build_blend_folder,
    check_caps,
    find_shards,
    plan_blend,
)
from nanotrain.data.loader import PretrainLoader, validation_batches
from nanotrain.data.manifest import DataFolder, check_sources
from nanotrain.data.token_shards import TokenShardWriter
from nanotrain.runtime.files import file_digest


def write(prefix, first, tokens):
    writer = TokenShardWriter(prefix, np.uint16)
    for start in range(0, tokens, 50):
        writer.add_document(np.arange(start, min(start + 50, tokens)) % 40 + first)
    writer.finish()


@pytest.fixture
def shards(tmp_path):
    """crawl: one shard and held-out text; code: two shards of 300 and 100 tokens; rare: 60 tokens."""
    root = tmp_path / "shards"
    write(root / "crawl/train", 100, 2000)
    write(root / "crawl/validation", 100, 200)
    write(root / "code-00000", 200, 300)
    write(root / "code-00001", 300, 100)
    write(root / "rare/a/train", 400, 60)
    return root


def curriculum_file(folder, cap=9.0, until=0.5):
    (folder / "one.yaml").write_text(
        "sources:\n  crawl: {weight: 3, origin: chosen}\n  code: {weight: 1, origin: chosen}\n  none: {weight: 0, origin: chosen}\n"
    )
    (folder / "two.yaml").write_text(
        f"sources:\n  code: {{weight: 1, origin: chosen}}\n  rare: {{weight: 1, max_epochs: {cap}, origin: chosen}}\n"
    )
    (folder / "c.yaml").write_text(
        f"total_tokens: 1000\nphases:\n  - {{until: {until}, blend: one.yaml}}\n  - {{until: 1.0, blend: two.yaml}}\n"
    )
    return load_curriculum(folder / "c.yaml")


@pytest.fixture
def blend(tmp_path, shards, tokenizer_folder):
    curriculum = curriculum_file(tmp_path)
    rows = plan_blend(curriculum, shards, 1000)
    build_blend_folder(rows, curriculum, tokenizer_folder, tmp_path / "blend")
    return tmp_path / "blend", curriculum, rows


def test_shares_tokens_and_epochs_by_hand(blend):
    _, _, rows = blend
    table = {row["name"]: row for row in rows}
    assert list(table) == ["crawl", "code", "rare"]
    assert table["crawl"]["drawn_tokens"] == 375 and table["code"]["drawn_tokens"] == 375
    assert table["code"]["part_tokens"] == [300, 100] and table["code"]["epochs"] == pytest.approx(375 / 400)
    assert table["rare"]["epochs"] == pytest.approx(250 / 60) and table["crawl"]["validation_tokens"] == 200


def test_the_loader_reads_the_folder_and_realises_the_weights(blend):
    folder, curriculum, _ = blend
    phases = curriculum.recipe_phases()
    check_sources(phases, folder, "stage.curriculum")
    training = TrainingConfig(
        steps=40, global_batch_size=10, micro_batch_size=5, sequence_length=20, learning_rate=1.0
    )  # fmt: skip
    loader = PretrainLoader(folder, phases, training, seed=1)
    drawn = loader.plan()
    assert sum(drawn.values()) == 400
    for name, expected in (("crawl", 150), ("code", 150), ("rare", 100)):
        assert abs(drawn[name] - expected) <= 1.5, name
    first = {int(t) // 100 for batch in loader.microbatches(0) for t in batch.input_ids.flatten()}
    assert first <= {1, 2, 3} and {int(t) // 100 for b in loader.microbatches(39) for t in b.input_ids.flatten()} <= {
        2,
        3,
        4,
    }
    assert (
        sum(
            int((b.labels >= 0).sum())
            for b in validation_batches(folder, "crawl", sequence_length=20, micro_batch_size=4)
        )
        > 0
    )
    assert DataFolder(folder).sources("validation") == ["crawl"]
    assert DataFolder(folder).sources("train") == ["code", "crawl", "rare"]


def test_caps_are_enforced_when_the_blend_is_built_and_again_before_training(tmp_path, shards, blend):
    _folder, curriculum, _ = blend
    with pytest.raises(UserError, match=r"1,000 tokens of this blend would repeat `rare` 4.17 times, its cap is 4"):
        plan_blend(curriculum_file(tmp_path, cap=4.0), shards, 1000)
    with pytest.raises(
        UserError, match=r"`stage.curriculum` would repeat `rare` 9.50 times, its cap is 9; prepare more"
    ):
        check_caps(curriculum.recipe_phases(), {"rare": 9.5, "code": 1.0}, "stage.curriculum")


def test_a_changed_shard_is_refused_by_the_loader(blend, shards):
    folder, _curriculum, _ = blend
    content = bytearray((shards / "crawl/train.bin").read_bytes())
    content[7] ^= 1
    (shards / "crawl/train.bin").write_bytes(bytes(content))
    with pytest.raises(UserError, match="does not match its sha256"):
        DataFolder(folder).shard("crawl", "train")


def test_mistakes_are_one_sentence(tmp_path, shards, tokenizer_folder, blend):
    folder, curriculum, rows = blend
    with pytest.raises(
        UserError, match=r"`stage.curriculum\[0\].weights.crwl` is not a source of .*did you mean 'crawl'"
    ):
        check_sources([PhaseConfig(1.0, {"crwl": 1.0})], folder, "stage.curriculum")
    shutil.move(shards / "rare", tmp_path / "elsewhere")
    with pytest.raises(MissingInputError, match="source `rare` has no shard"):
        find_shards(shards, "rare")
    write(shards / "rare/train", 400, 60)
    other = tmp_path / "other"
    shutil.copytree(tokenizer_folder, other)
    digest = file_digest(tokenizer_folder / "tokenizer.json")
    (shards / "code-00000.manifest.json").write_text(json.dumps({"tokenizer_digest": digest}))
    with pytest.raises(MissingInputError, match=r"rare/a/train\.bin` is gone"):
        build_blend_folder(rows, curriculum, tokenizer_folder, tmp_path / "again")
    rows = plan_blend(curriculum, shards, 1000)
    build_blend_folder(rows, curriculum, tokenizer_folder, tmp_path / "again")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    with pytest.raises(UserError, match="was tokenised by another tokenizer"):
        build_blend_folder(rows, curriculum, other, tmp_path / "third")
    assert not (tmp_path / "third").exists()
    write(shards / "crawl/more-validation", 100, 60)
    with pytest.raises(UserError, match="source `crawl` has 2 held-out shards"):
        find_shards(shards, "crawl")
    for end in ("bin", "idx"):
        (shards / f"crawl/more-validation.{end}").unlink()
    (shards / "crawl/validation.idx").unlink()
    (shards / "crawl/validation.bin").unlink()
    with pytest.raises(UserError, match="no source has a held-out shard"):
        build_blend_folder(plan_blend(curriculum, shards, 1000), curriculum, tokenizer_folder, tmp_path / "third")
