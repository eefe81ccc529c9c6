"""The loader over many sources of many shards, and fine-tuning packs through a model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotrain.config.data import PhaseConfig, ReasoningConfig
from nanotrain.config.errors import UserError
from nanotrain.config.training import TrainingConfig
from nanotrain.data.blend import Curriculum
from nanotrain.data.loader import PretrainLoader, SftLoader
from nanotrain.data.permutation import derive_key, permuted_index
from nanotrain.data.token_shards import TokenShard, TokenShardWriter
from nanotrain.data.tokenizer import NUM_SPECIALS
from nanotrain.model.batch import IGNORE_INDEX
from nanotrain.model.hybrid import HybridModel
from nanotrain.runtime.files import file_digest
from tests.model.architectures import random_config

LENGTH = 16


def training(steps: int, batch: int, micro: int, length: int = LENGTH) -> TrainingConfig:
    return TrainingConfig(
        steps=steps, global_batch_size=batch, micro_batch_size=micro, sequence_length=length, learning_rate=1e-3
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> dict[str, list[Path]]:
    """Five sources of one to four shards; tokens count up within a source, so a token says where it is from."""
    folder = tmp_path_factory.mktemp("shards")
    draw = np.random.default_rng(0)
    sources = {}
    for number in range(5):
        first = 0
        for part in range(1 + number % 4):
            writer = TokenShardWriter(folder / f"s{number}-{part}", np.int32)
            for size in draw.integers(1, 50, draw.integers(1, 30)):
                writer.add_document(np.arange(first, first + size) + 10_000 * number)
                first += int(size)
            writer.finish()
            sources.setdefault(f"s{number}", []).append(folder / f"s{number}-{part}")
    return sources


curricula = st.lists(st.lists(st.integers(0, 9), min_size=5, max_size=5).filter(sum), min_size=1, max_size=3).map(
    lambda phases: [
        PhaseConfig(until=(i + 1) / len(phases), weights={f"s{n}": w / 10 for n, w in enumerate(weights)})
        for i, weights in enumerate(phases)
    ]
)


def expected_sample(shards, curriculum, num_samples: int, seed: int, k: int) -> list[int]:
    """By the definition: sequences of all shards in a list, one shuffled list an epoch."""
    name, number = Curriculum(curriculum, num_samples).draw(k)
    sequences = []
    for prefix in shards[name]:
        flat = TokenShard(prefix)
        tokens = flat.tokens(0, flat.num_tokens).tolist()
        sequences += [tokens[start : start + LENGTH] for start in range(0, len(tokens) - LENGTH, LENGTH)]
    epoch, position = divmod(number, len(sequences))
    return sequences[permuted_index(position, len(sequences), derive_key("chunks", seed, name, epoch))]


@settings(max_examples=40, deadline=None)
@given(
    curriculum=curricula,
    shape=st.sampled_from([(1, 12), (2, 3), (3, 4), (4, 1), (6, 2), (12, 1)]),
    steps=st.sampled_from([1, 7, 10**6]),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_any_step_of_any_rank_is_the_definitions(shards, curriculum, shape, steps, seed, data):
    dp_size, micro = shape
    step = data.draw(st.integers(0, steps - 1), label="resumed at step")
    rows = []
    for rank in range(dp_size):
        config = training(steps, 12, micro)
        loader = PretrainLoader.from_shards(shards, curriculum, config, seed, dp_rank=rank, dp_size=dp_size)
        for batch in loader.microbatches(step):
            assert batch.input_ids.shape == (micro, LENGTH)
            rows += batch.input_ids.tolist()
    assert rows == [expected_sample(shards, curriculum, 12 * steps, seed, 12 * step + i) for i in range(12)]


def test_every_sequence_of_every_shard_comes_once_an_epoch(shards):
    only = [PhaseConfig(until=1.0, weights={"s3": 1.0})]
    sequences = sum((TokenShard(prefix).num_tokens - 1) // LENGTH for prefix in shards["s3"])
    loader = PretrainLoader.from_shards(shards, only, training(3 * sequences, 1, 1), 5)
    epochs = [
        [
            tuple(loader.microbatches(step)[0].input_ids[0].tolist())
            for step in range(e * sequences, (e + 1) * sequences)
        ]
        for e in range(3)
    ]
    assert len(set(epochs[0])) == sequences and len({tuple(epoch) for epoch in epochs}) == 3
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert loader.epochs() == {"s3": 3.0}


def test_sources_that_do_not_fit_are_refused(shards, tmp_path):
    def build(sources, **weights):
        return PretrainLoader.from_shards(sources, [PhaseConfig(until=1.0, weights=weights)], training(1, 1, 1), 0)

    with pytest.raises(UserError, match=r"draws from 's9', which has no shards; did you mean 's\d'"):
        build(shards, s0=1.0, s9=0.5)
    build(shards | {"broken": [tmp_path / "none"]}, s0=1.0, broken=0.0)  # not drawn from, not opened
    prefixes = []
    for name in ("a", "b"):
        writer = TokenShardWriter(tmp_path / name, np.int32)
        writer.add_document(list(range(40)))
        writer.finish()
        files = {}
        for end in ("bin", "idx"):
            files |= {f"{name}.{end}": _entry(tmp_path / f"{name}.{end}")}
        content = {"tokenizer_digest": name, "files": files}
        (tmp_path / f"{name}.manifest.json").write_text(json.dumps(content))
        prefixes.append(tmp_path / name)
    with pytest.raises(UserError, match="made by different tokenizers"):
        build({"x": prefixes}, x=1.0)
    build({"x": prefixes[:1]}, x=1.0)


def _entry(file: Path) -> dict:
    return {"bytes": file.stat().st_size, "sha256": file_digest(file)}


def test_best_fit_packs_have_the_loss_and_gradients_of_their_rows_alone(tmp_path, tokenizer_folder, write_data_folder):
    """Every pack of an epoch through a model in float64, against each row in a batch of its own."""
    folder = write_data_folder(tmp_path / "data", {"web": [[1001, 2]]})
    no_shaping = ReasoningConfig(empty_trace_fraction=0.5, truncated_fraction=0.0)
    loader = SftLoader(folder, tokenizer_folder, no_shaping, training(9, 1, 1, length=700), 4)
    config = random_config(7)
    config.vocab_size = NUM_SPECIALS + 400
    model = HybridModel(config).to(torch.float64)
    model.init_weights(0)
    model.to(torch.float64)

    def loss_and_gradients(pieces):
        losses = [
            F.cross_entropy(
                model(ids, segments).flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORE_INDEX
            )
            for ids, segments, labels in pieces
        ]
        total = torch.stack(losses).sum()
        return total, torch.autograd.grad(total, list(model.parameters()))

    for step in range(2):
        batch = loader.microbatches(step)[0]
        segments = batch.segment_ids[0]
        assert len(segments.unique()) > 2, "a pack of one row would show nothing"
        rows = []
        for segment in segments.unique():
            at = segments == segment
            if (batch.labels[0, at] != IGNORE_INDEX).any():
                rows.append((batch.input_ids[:, at], None, batch.labels[:, at]))
        packed, packed_gradients = loss_and_gradients([(batch.input_ids, batch.segment_ids, batch.labels)])
        alone, alone_gradients = loss_and_gradients(rows)
        torch.testing.assert_close(packed, alone, rtol=1e-10, atol=0)
        for ours, theirs in zip(packed_gradients, alone_gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9 * max(1.0, theirs.abs().max().item()))
