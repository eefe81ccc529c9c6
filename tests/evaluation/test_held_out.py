import math
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from nanotrain.config.data import CATEGORIES
from nanotrain.config.engine import Device, EngineConfig, Precision
from nanotrain.config.errors import UserError
from nanotrain.data.token_shards import TokenShard
from nanotrain.engines import build_engine
from nanotrain.engines.base import Engine
from nanotrain.evaluation import held_out
from nanotrain.evaluation.held_out import HeldOutSums, combine_held_out, held_out_bits_per_byte, held_out_sums
from nanotrain.model.batch import IGNORE_INDEX, MicroBatch
from nanotrain.model.hybrid import HybridModel

FIXED_BYTES = {1000 + 256: 2, 1000 + 257: 3, 1000 + 258: 2, 1000 + 259: 2}  # the merged tokens; all others are bytes


@pytest.fixture(scope="module")
def engine(model: HybridModel) -> Engine:
    return build_engine(EngineConfig(device=Device.cpu, precision=Precision.fp32), model)


def brute_force(model: HybridModel, data_folder: Path, category: str, sequence_length: int) -> tuple[float, int, int]:
    """(nats, tokens, bytes), each stretch of one document in one sequence run alone, in fp64 from the logits on."""
    shard = TokenShard(data_folder / category / "validation")
    tokens = [(int(t), d) for d in range(shard.num_documents) for t in shard.document(d)]
    nats, count, size = 0.0, 0, 0
    for start in range(0, len(tokens) - 1, sequence_length):
        part = tokens[start : start + sequence_length + 1]
        for document in dict.fromkeys(d for _, d in part):
            ids = [t for t, d in part if d == document]
            if len(ids) < 2:
                continue
            logits = model(torch.tensor([ids[:-1]])).double().log_softmax(-1)[0]
            nats -= sum(float(logits[i, label]) for i, label in enumerate(ids[1:]))
            count += len(ids) - 1
            size += sum(0 if t < 1000 else FIXED_BYTES.get(t, 1) for t in ids[1:])
    return nats, count, size


@pytest.mark.parametrize(("sequence_length", "micro_batch_size"), [(256, 1), (16, 3), (7, 2)])
def test_equals_brute_force(engine, model, data_folder, sequence_length, micro_batch_size) -> None:
    result = held_out_bits_per_byte(
        engine, data_folder, sequence_length=sequence_length, micro_batch_size=micro_batch_size
    )
    with torch.no_grad():
        expected = {name: brute_force(model, data_folder, name, sequence_length) for name in CATEGORIES}
    for name, (nats, _, size) in expected.items():
        assert result["bits_per_byte"][name] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert result["average"] == pytest.approx(sum(result["bits_per_byte"].values()) / len(CATEGORIES))
    nats, tokens = (sum(one[i] for one in expected.values()) for i in (0, 1))
    assert result["loss"] == pytest.approx(nats / tokens, rel=1e-5)


def test_micro_batch_size_does_not_matter(engine: Engine, data_folder: Path) -> None:
    one, many = (
        held_out_bits_per_byte(engine, data_folder, sequence_length=16, micro_batch_size=size, categories=("web",))
        for size in (1, 5)
    )
    assert one["bits_per_byte"].keys() == {"web"}
    assert one["loss"] == pytest.approx(many["loss"], rel=1e-6)


def test_max_tokens_scores_fewer(engine: Engine, data_folder: Path) -> None:
    def sums(max_tokens: int) -> HeldOutSums:
        return held_out_sums(engine, data_folder, "web", sequence_length=16, micro_batch_size=2, max_tokens=max_tokens)

    assert 0 < sums(32).num_tokens <= 32 < sums(0).num_tokens


def test_average_is_over_categories_and_loss_over_tokens() -> None:
    sums = {"a": HeldOutSums(math.log(2) * 10, 1, 10), "b": HeldOutSums(math.log(2) * 60, 3, 20)}
    combined = combine_held_out(sums)
    assert combined["bits_per_byte"] == pytest.approx({"a": 1.0, "b": 3.0})
    assert combined["average"] == pytest.approx(2.0)
    assert combined["loss"] == pytest.approx(math.log(2) * 70 / 4)


class FakeRanks:
    """Stands for the data-parallel ranks of an engine that adds up over them: token t costs t nats."""

    def __init__(self, dp_size: int, batches: list[MicroBatch]) -> None:
        self.dp_size, self._batches = dp_size, batches
        self.forwards = [0] * dp_size
        self.dp_rank = 0

    def evaluate(self, microbatches: Iterable[MicroBatch], loss_fn: object) -> dict[str, float]:
        nats, tokens = 0, 0
        own = list(microbatches)
        byte_lengths = torch.ones(100, dtype=torch.int64)
        for rank in range(self.dp_size):
            share = held_out._CountedBatches(self._batches, byte_lengths, rank, self.dp_size)
            seen = own if rank == self.dp_rank else list(share)
            self.forwards[rank] = len(seen)
            for batch in seen:
                scored = batch.labels[batch.labels != IGNORE_INDEX]
                nats, tokens = nats + int(scored.sum()), tokens + scored.numel()
        return {"loss": nats / max(tokens, 1), "num_tokens": tokens}


@pytest.mark.parametrize("dp_size", [1, 2, 3, 5])
@pytest.mark.parametrize("num_batches", [1, 4, 5, 6])
def test_ranks_share_the_batches(monkeypatch: pytest.MonkeyPatch, dp_size: int, num_batches: int) -> None:
    """Every rank runs the same number of forwards, every token is scored once, every rank counts all bytes."""
    ids = torch.arange(num_batches * 4).view(num_batches, 1, 4) + 1
    batches = [MicroBatch(row, torch.where(row % 5 == 0, IGNORE_INDEX, row)) for row in ids]
    scored = [int(label) for batch in batches for label in batch.labels.flatten() if label != IGNORE_INDEX]
    monkeypatch.setattr(held_out, "validation_batches", lambda *args, **kwargs: iter(batches))
    for rank in range(dp_size):
        ranks = FakeRanks(dp_size, batches)
        ranks.dp_rank = rank
        sums = held_out_sums(
            ranks, Path("unused"), "web", sequence_length=4, micro_batch_size=1, byte_lengths=torch.ones(100).numpy()
        )
        assert sums == HeldOutSums(pytest.approx(sum(scored)), len(scored), len(scored))
        assert len(set(ranks.forwards)) == 1


@pytest.mark.parametrize("documents", [[], [[2]], [[5, 2]]])
def test_no_text_is_refused(monkeypatch, engine: Engine, documents: list[list[int]]) -> None:
    """Nothing to score, or only an end of text, which stands for no byte."""
    batches = [MicroBatch(torch.tensor([d[:-1] or [0]]), torch.tensor([d[1:] or [IGNORE_INDEX]])) for d in documents]
    monkeypatch.setattr(held_out, "validation_batches", lambda *args, **kwargs: iter(batches))
    lengths = torch.ones(1260).numpy()
    lengths[:1000] = 0
    with pytest.raises(UserError, match=r"web/validation\.bin holds no text"):
        held_out_sums(engine, Path("d"), "web", sequence_length=4, micro_batch_size=1, byte_lengths=lengths)
