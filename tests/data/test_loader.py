from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotrain.config.data import PhaseConfig, ReasoningConfig
from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.config.training import TrainingConfig
from nanotrain.data.chat import encode
from nanotrain.data.chat_rows import load_rows
from nanotrain.data.loader import PretrainLoader, SftLoader, validation_batches
from nanotrain.data.reasoning import shape_rows
from nanotrain.data.tokenizer import load_tokenizer_json
from nanotrain.model.batch import IGNORE_INDEX


def training(steps=6, batch=12, micro=2, length=16) -> TrainingConfig:
    return TrainingConfig(
        steps=steps, global_batch_size=batch, micro_batch_size=micro, sequence_length=length, learning_rate=1e-3
    )


def documents(seed: int, count: int, longest: int = 40) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [[*draw.integers(1000, 1300, draw.integers(1, longest)).tolist(), 2] for _ in range(count)]


SOURCES = {"web": documents(0, 60), "code": documents(1, 23), "math": [[1001, 2]] * 200}
CURRICULUM = [
    PhaseConfig(until=0.5, weights={"web": 0.7, "code": 0.3}),
    PhaseConfig(until=1.0, weights={"web": 0.2, "code": 0.5, "math": 0.3, "sft": 0.0}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_data_folder) -> Path:
    return write_data_folder(tmp_path_factory.mktemp("loader") / "data", SOURCES)


def flat(batches) -> list[tuple]:
    """One hashable item a sequence."""
    out = []
    for batch in batches:
        assert batch.input_ids.dtype == batch.labels.dtype == torch.int64 and batch.segment_ids.dtype == torch.int32
        for row in zip(batch.input_ids, batch.labels, batch.segment_ids, strict=True):
            out.append(tuple(tuple(part.tolist()) for part in row))
    return out


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from([(1, 1), (1, 4), (2, 3), (3, 2), (4, 1), (6, 1), (12, 1), (2, 6), (1, 12)]),
    step=st.integers(0, 5),
)
def test_the_samples_do_not_depend_on_ranks_or_micro_batches(folder, shape, step):
    dp_size, micro = shape
    whole = flat(PretrainLoader(folder, CURRICULUM, training(micro=12), 7).microbatches(step))
    parts = []
    for rank in range(dp_size):
        loader = PretrainLoader(folder, CURRICULUM, training(micro=micro), 7, dp_rank=rank, dp_size=dp_size)
        batches = loader.microbatches(step)
        assert {batch.input_ids.shape for batch in batches} == {(micro, 16)}
        parts += flat(batches)
    assert parts == whole


def test_any_step_can_be_asked_for_first(folder):
    loader = PretrainLoader(folder, CURRICULUM, training(), 7)
    forward = [flat(loader.microbatches(step)) for step in range(6)]
    fresh = PretrainLoader(folder, CURRICULUM, training(), 7)
    assert [flat(fresh.microbatches(step)) for step in (5, 0, 3)] == [forward[5], forward[0], forward[3]]
    with pytest.raises(IndexError):
        fresh.microbatches(6)


def test_seeds_change_the_order_not_the_blend(folder):
    a, b = (PretrainLoader(folder, CURRICULUM, training(), seed) for seed in (1, 2))
    assert flat(a.microbatches(0)) != flat(b.microbatches(0)) and a.plan() == b.plan()


def test_an_epoch_holds_every_token_once_and_epochs_differ(folder):
    length, tokens = 16, [token for document in SOURCES["code"] for token in document]
    chunks = (len(tokens) - 1) // length
    only_code = [PhaseConfig(until=1.0, weights={"code": 1.0})]
    loader = PretrainLoader(folder, only_code, training(steps=2 * chunks, batch=1, micro=1), 3)
    epochs = [
        [row[0] for s in range(e * chunks, (e + 1) * chunks) for row in flat(loader.microbatches(s))] for e in (0, 1)
    ]
    expected = Counter(tuple(tokens[i * length : (i + 1) * length]) for i in range(chunks))
    assert Counter(epochs[0]) == Counter(epochs[1]) == expected
    assert epochs[0] != epochs[1]
    assert loader.epochs() == {"code": 2.0}


def test_labels_follow_inputs_and_stop_at_document_borders(folder):
    starts = np.cumsum([0] + [len(d) for d in SOURCES["web"]])
    tokens = np.concatenate([np.asarray(d) for d in SOURCES["web"]])
    document = np.repeat(np.arange(len(SOURCES["web"])), np.diff(starts))
    loader = PretrainLoader(folder, [PhaseConfig(until=1.0, weights={"web": 1})], training(steps=4), 0)
    for step in range(4):
        for inputs, labels, segments in flat(loader.microbatches(step)):
            places = [p for p in range(len(tokens) - 16) if tuple(tokens[p : p + 16]) == inputs]
            assert len(places) == 1
            own, following = document[places[0] : places[0] + 16], document[places[0] + 1 : places[0] + 17]
            expected = np.where(own == following, tokens[places[0] + 1 : places[0] + 17], IGNORE_INDEX)
            assert labels == tuple(expected)
            assert segments == tuple(own - own[0])


def test_plan_counts_what_is_drawn(folder):
    loader = PretrainLoader(folder, CURRICULUM, training(steps=50, batch=10, micro=10), 1)
    plan = loader.plan()
    assert sum(plan.values()) == 500
    for name, share in {"web": 0.45, "code": 0.4, "math": 0.15}.items():
        assert abs(plan[name] - share * 500) <= 2
    drawn = Counter()
    for step in range(50):
        for inputs, _, _ in flat(loader.microbatches(step)):
            drawn["math" if set(inputs) == {1001, 2} else "text"] += 1
    assert drawn["math"] == plan["math"]
    assert loader.num_tokens_available == sum(len(d) for name in SOURCES for d in SOURCES[name])


def test_mistakes_are_named(folder, tmp_path, write_data_folder):
    with pytest.raises(UserError, match=r"global_batch_size` \(12\) must be divisible"):
        PretrainLoader(folder, CURRICULUM, training(micro=5), 1)
    with pytest.raises(UserError, match=r"source `math`.*400 tokens, less than one sequence"):
        PretrainLoader(folder, CURRICULUM, training(length=400), 1)
    with pytest.raises(UserError, match=r"sft/train\.idx` is not listed"):
        PretrainLoader(folder, [PhaseConfig(until=1.0, weights={"sft": 1})], training(), 1)
    with pytest.raises(MissingInputError, match="prepare stage"):
        PretrainLoader(tmp_path, CURRICULUM, training(), 1)
    broken = write_data_folder(tmp_path / "broken", SOURCES)
    content = bytearray((broken / "code/train.bin").read_bytes())
    content[11] ^= 4
    (broken / "code/train.bin").write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"code/train\.bin` does not match its sha256"):
        PretrainLoader(broken, CURRICULUM, training(), 1)
    PretrainLoader(broken, [PhaseConfig(until=1.0, weights={"web": 1, "code": 0})], training(), 1)


@settings(max_examples=30, deadline=None)
@given(length=st.integers(2, 200), micro=st.integers(1, 5), max_tokens=st.integers(0, 300))
def test_validation_labels_every_token_with_a_predecessor_once(folder, length, micro, max_tokens):
    batches = list(
        validation_batches(folder, "code", sequence_length=length, micro_batch_size=micro, max_tokens=max_tokens)
    )
    labels = [label for row in flat(batches) for label in row[1] if label != IGNORE_INDEX]
    limit = max_tokens or 10**9
    expected, position = [], 0
    for document in SOURCES["code"]:
        expected += [token for i, token in enumerate(document) if i > 0 and position + i < limit]
        position += len(document)
    assert labels == expected
    assert all(batch.input_ids.shape[1] == length and batch.input_ids.shape[0] <= micro for batch in batches)
    assert all(torch.equal(b.segment_ids, b.segment_ids.cummax(1).values) for b in batches)


# --- fine-tuning ---------------------------------------------------------------------------------------------------

NO_SHAPING = ReasoningConfig(empty_trace_fraction=0.0, truncated_fraction=0.0)


def segments_of(batches) -> list[tuple[tuple, tuple]]:
    """(inputs, labels) of every packed row, padding left out."""
    rows = []
    for inputs, labels, segments in flat(batches):
        for segment in sorted(set(segments)):
            at = [i for i, s in enumerate(segments) if s == segment]
            assert at == list(range(at[0], at[-1] + 1))
            row = (tuple(inputs[i] for i in at), tuple(labels[i] for i in at))
            if set(row[1]) == {IGNORE_INDEX}:
                assert set(row[0]) == {0} and at[-1] == len(inputs) - 1  # padding, at the end
            else:
                rows.append(row)
    return rows


def test_packed_rows_equal_the_rows_alone(folder, tokenizer_folder):
    tokenizer = load_tokenizer_json(tokenizer_folder)
    config = training(batch=1, micro=1, length=700, steps=400)
    reasoning = ReasoningConfig(empty_trace_fraction=0.5, truncated_fraction=0.5)
    loader = SftLoader(folder, tokenizer_folder, reasoning, config, 4)
    packs = loader.summary()["packs"]
    packed = segments_of(batch for step in range(packs) for batch in loader.microbatches(step))
    alone = []
    for row in shape_rows(load_rows(folder / "chat/train.jsonl"), reasoning, tokenizer, 4):
        ids, mask = encode(row["messages"], tokenizer)
        labels = tuple(i if trained else IGNORE_INDEX for i, trained in zip(ids[1:], mask[1:], strict=True))
        alone.append((tuple(ids[:-1]), labels))
    assert Counter(packed) == Counter(alone)
    second = [batch for step in range(packs, 2 * packs) for batch in loader.microbatches(step)]
    assert Counter(segments_of(second)) == Counter(alone)


def test_summary_counts(folder, tokenizer_folder):
    config = training(length=600, steps=5)
    reasoning = ReasoningConfig(empty_trace_fraction=0.25, truncated_fraction=0.1)
    summary = SftLoader(folder, tokenizer_folder, reasoning, config, 4).summary()
    assert (summary["rows"], summary["dropped_rows"]) == (50, 0)
    assert (summary["empty_trace_rows"], summary["truncated_rows"]) == (10, 4)
    assert 0.5 < summary["packing_efficiency"] <= 1.0
    assert summary["epochs"] == pytest.approx(60 / summary["packs"])


@pytest.mark.parametrize("shape", [(2, 3), (3, 4), (12, 1)])
def test_sft_samples_do_not_depend_on_ranks(folder, tokenizer_folder, shape):
    def loader(micro, **ranks):
        return SftLoader(folder, tokenizer_folder, NO_SHAPING, training(micro=micro, length=400), 4, **ranks)

    dp_size, micro = shape
    parts = [loader(micro, dp_rank=r, dp_size=dp_size).microbatches(3) for r in range(dp_size)]
    assert [row for part in parts for row in flat(part)] == flat(loader(12).microbatches(3))


def test_rows_longer_than_a_sequence_are_dropped_and_counted(folder, tokenizer_folder):
    tokenizer = load_tokenizer_json(tokenizer_folder)
    lengths = sorted(len(encode(row["messages"], tokenizer)[0]) for row in load_rows(folder / "chat/train.jsonl"))
    limit = lengths[20] - 1  # inputs of the 21st shortest row fit exactly
    fitting = sum(length - 1 <= limit for length in lengths)
    summary = SftLoader(folder, tokenizer_folder, NO_SHAPING, training(length=limit), 4).summary()
    assert (summary["rows"], summary["dropped_rows"]) == (fitting, 40 - fitting)
    with pytest.raises(UserError, match=rf"none of the 40 rows.*fits.*\(8\); the shortest has {lengths[0]} tokens"):
        SftLoader(folder, tokenizer_folder, NO_SHAPING, training(length=8), 4)


def test_another_tokenizer_is_refused(folder, tokenizer_folder, tmp_path):
    text = (tokenizer_folder / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text + " ")
    with pytest.raises(UserError, match="is not the tokenizer of the data"):
        SftLoader(folder, tmp_path, NO_SHAPING, training(length=400), 4)
