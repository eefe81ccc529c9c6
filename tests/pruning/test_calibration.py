"""Which text is drawn: every token says which category and split it comes from."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from nanotrain.config.data import CATEGORIES
from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.data.manifest import write_manifest
from nanotrain.data.token_shards import TokenShardWriter
from nanotrain.pruning.calibration import calibration_batches

LENGTH = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    files = []
    for number, category in enumerate(CATEGORIES):
        for split, first in (("train", 0), ("validation", 5000)):
            writer = TokenShardWriter(folder / category / split, np.uint16)
            for document in range(3):
                writer.add_document(first + 1000 * number + 50 * document + np.arange(40))
            writer.finish()
            files += [f"{category}/{split}.bin", f"{category}/{split}.idx"]
    write_manifest(folder, {}, files)
    return folder


def draw(data, **changes):
    sizes = {"num_samples": 10, "sequence_length": LENGTH, "micro_batch_size": 4, "seed": 1}
    return calibration_batches(data, **(sizes | changes))


def test_training_text_of_all_categories_in_equal_shares(data):
    batches = draw(data)
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(4, LENGTH), (4, LENGTH), (2, LENGTH)]
    tokens = torch.cat([batch.input_ids for batch in batches])
    assert tokens.max() < 5000  # never validation
    assert Counter((tokens[:, 0] // 1000).tolist()) == dict.fromkeys(range(5), 2)
    assert all(batch.segment_ids is not None and batch.segment_ids.shape == batch.labels.shape for batch in batches)


def test_the_seed_decides_and_the_batch_size_does_not(data):
    one = torch.cat([batch.input_ids for batch in draw(data)])
    assert torch.equal(one, torch.cat([batch.input_ids for batch in draw(data, micro_batch_size=3)]))
    assert not torch.equal(one, torch.cat([batch.input_ids for batch in draw(data, seed=2)]))
    assert len(set(map(tuple, one.tolist()))) == 10


def test_fewer_samples_than_a_batch(data):
    (batch,) = draw(data, num_samples=3, micro_batch_size=16)
    assert batch.input_ids.shape == batch.labels.shape == (3, LENGTH)


def test_a_sequence_longer_than_a_category(data):
    draw(data, sequence_length=119)
    with pytest.raises(UserError, match=r"holds 120 tokens, fewer than .* `stage.calibration_sequence_length` \(120\)"):
        draw(data, sequence_length=120)


def test_a_folder_without_data(tmp_path):
    with pytest.raises(MissingInputError, match=r"manifest\.json` is missing"):
        draw(tmp_path)
