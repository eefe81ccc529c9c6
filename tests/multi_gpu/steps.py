"""Times training steps of a trial and writes them beside the plan."""

from typing import Any

import torch

from nanotrain.config.model import ModelConfig
from nanotrain.engines.base import Engine, StepResult
from nanotrain.losses.language_modeling import CrossEntropy
from nanotrain.model.batch import MicroBatch
from tests.benchmarks.gpu_profile import kernels_of, record, summarize
from tests.benchmarks.measure import rotating, spread
from tests.multi_gpu.cases import Bench
from tests.multi_gpu.trials import GIB, LEARNING_RATE, Trial, against_plan, card_of, described


class FixedBatches:
    """A data-parallel rank's random micro-batches, on the host as a loader leaves them, the same in every step."""

    def __init__(self, trial: Trial, engine: Engine) -> None:
        generator = torch.Generator().manual_seed(engine.dp_rank)
        shape = (trial.micro_batches, trial.training.sequence_length + 1)
        ids = torch.randint(0, trial.model.vocab_size, shape, generator=generator)
        self._batches = [MicroBatch(row[None, :-1].contiguous(), row[None, 1:].contiguous()) for row in ids]

    def microbatches(self, step: int) -> list[MicroBatch]:
        """Return them whatever the step."""
        del step
        return self._batches


class Training:
    """A training step that can be called again and again; keeps what the last one returned."""

    def __init__(self, trial: Trial, engine: Engine) -> None:
        self.engine = engine
        self.batches = FixedBatches(trial, engine).microbatches(0)
        self.result: StepResult | None = None

    def __call__(self) -> None:
        self.result = self.engine.train_step(self.batches, CrossEntropy(), LEARNING_RATE)

    def told(self) -> dict[str, float]:
        """Return loss and gradient norm of the last step; a step that was skipped did no update and counts for nothing."""
        assert self.result is not None
        assert not self.result.skipped, self.result
        return {"loss": self.result.loss, "grad_norm": self.result.grad_norm}


def memory_of(bench: Bench, planned_bytes: float) -> dict[str, Any]:
    """Return each rank's measured peak beside the plan, in GiB."""
    peaks = [peak / GIB for peak in bench.peak_bytes()]
    return {"peak_gib": peaks, **against_plan(max(peaks), planned_bytes / GIB, "gib")}


def times_of(bench: Bench, trial: Trial, seconds: list[float]) -> dict[str, Any]:
    """Return median and spread of steps, throughput, and the plan's time."""
    times = spread(seconds)
    planned = trial.planned_time(card_of(bench.card))
    found = {**times, **trial.rates(times["ms"] / 1e3)}
    found |= against_plan(times["ms"], None if planned is None else 1e3 * planned.total, "ms")
    if planned is not None:
        parts = {"compute": planned.compute, "communication": planned.communication, "update": planned.update}
        found["plan_parts_ms"] = {name: 1e3 * value for name, value in parts.items()}
    return found


def time_training(
    bench: Bench,
    name: str,
    trial: Trial,
    full: ModelConfig,
    one_gpu: float | None = None,
    profiled: bool = False,
    **more: object,
) -> None:
    """Build, train and write a row.

    Args:
        bench: the ranks.
        name: of the row.
        trial: what to train, at a depth that fits.
        full: the model at full depth.
        one_gpu: tokens a second of one GPU alone, from which this scales.
        profiled: whether another row has the kernels of one more step of the first rank.
        more: values that the row has besides.
    """
    training = Training(trial, bench.engine(trial))
    training()  # compiles and tunes kernels, which takes memory of its own: peaks are of the steps after it
    bench.lasting_bytes()
    seconds = rotating({name: training}, bench.rounds, bench.wait, bench.warmup)[name]
    times = times_of(bench, trial, seconds)
    if one_gpu is not None:
        more |= {"one_gpu": one_gpu, "efficiency": times["tokens_per_second_per_gpu"] / one_gpu}
    bench.row(
        name,
        **described(trial, full),
        **times,
        **memory_of(bench, trial.planned_bytes()),
        **training.told(),
        **more,
    )
    if profiled and not bench.cpu:
        spans = record(training)  # on every rank, since they step together
        bench.row(f"{name} kernels", **summarize(spans, longest=4), longest=kernels_of(spans, 16))
