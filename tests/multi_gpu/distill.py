"""Distillation of the 12B into the 9B under tensor parallelism: both models and the divergence are divided over the ranks.

The published number, 2,913 tokens a second of an H100, is another model's: 9B into 7B, 768 GPUs, TP 8, micro-batches of four.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from nanotrain.config.megatron import MegatronConfig
from nanotrain.config.model import ModelConfig
from nanotrain.engines.base import Engine, StepResult
from nanotrain.losses.distillation import ForwardKL
from nanotrain.planning.flops import forward_flops
from nanotrain.planning.step_time import PRODUCTS, micro_batch_seconds
from nanotrain.training.teacher import TeacherLoader
from tests.benchmarks.measure import rotating, spread
from tests.multi_gpu.cases import Bench, Case, options_of, run_part
from tests.multi_gpu.steps import FixedBatches, memory_of
from tests.multi_gpu.trials import (
    LEARNING_RATE,
    PEAK_OPERATIONS,
    Trial,
    against_plan,
    architecture,
    card_of,
    deepest,
    described,
    megatron_engine,
    training_of,
)

PART, BUDGET_SECONDS = "distill", 125
LENGTH, TINY_LENGTH = 8192, 64
MICRO_BATCHES, TINY_MICRO_BATCHES = 4, 1
PUBLISHED_TOKENS_PER_SECOND = 2913
MOST_TENSOR = 4
"""FP8 leaves each rank multiples of 16 of the 9B's 15,680 MLP rows."""


def layouts(ranks: int) -> dict[str, MegatronConfig]:
    """Return as many tensor-parallel ranks as the student takes, and two with the rest data-parallel."""
    found = {}
    for tensor in sorted({min(ranks, MOST_TENSOR), 2}, reverse=True):
        found[f"tp{tensor}_dp{ranks // tensor}"] = MegatronConfig(tensor_parallel=tensor, sequence_parallel=True)
    return found


def teacher_of(student: ModelConfig, *, cpu: bool) -> ModelConfig:
    """Return the teacher at the same share of its depth as the student."""
    teacher, full = architecture("12b", cpu=cpu), architecture("9b", cpu=cpu)
    layers = round(teacher.num_hidden_layers * student.num_hidden_layers / full.num_hidden_layers)
    return replace(teacher, hybrid_layer_pattern=teacher.hybrid_layer_pattern[:layers])


def teacher_bytes(trial: Trial, teacher: ModelConfig) -> int:
    """Return what a rank holds of the teacher by the plan: weights as they are and in FP8, and its hidden states of a step."""
    megatron = replace(trial.engine.megatron, fp8_parameters=False)
    alone = replace(trial, model=teacher, engine=replace(trial.engine, megatron=megatron))
    tokens = trial.micro_batches * trial.training.sequence_length
    value = 4 if trial.engine.precision.value == "fp32" else 2
    return alone.rank_memory().weights + value * tokens * teacher.hidden_size


class Distillation:
    """A step of teacher and student that can be called again and again."""

    def __init__(self, trial: Trial, student: Engine, teacher: Engine, loss_fn: ForwardKL) -> None:
        self._student, self._loss_fn = student, loss_fn
        self._batches = FixedBatches(trial, student)
        self._loader, self._teacher = TeacherLoader(self._batches, teacher), teacher
        self.result: StepResult | None = None

    def __call__(self) -> None:
        self.result = self._student.train_step(self._loader.microbatches(0), self._loss_fn, LEARNING_RATE)
        assert not self.result.skipped, self.result

    def teach(self) -> None:
        """Do the teacher's part alone."""
        self._teacher.hidden_states(self._batches.microbatches(0))


def planned_seconds(bench: Bench, trial: Trial, teacher: ModelConfig) -> float | None:
    """Return the plan's step of the student, and forward passes of the teacher with its head."""
    card = card_of(bench.card)
    step = trial.planned_time(card)
    if step is None:
        return None
    length, tensor = trial.training.sequence_length, trial.engine.megatron.tensor_parallel
    forward = micro_batch_seconds(teacher, trial.engine, length, length, card, backward=False)
    forward += 2 * length * teacher.vocab_size * teacher.hidden_size / PRODUCTS[False]
    return step.total + trial.micro_batches * forward / tensor


def run_distillation(name: str, layout: MegatronConfig, bench: Bench) -> None:
    """Time a step; both models as deep as they fit together."""
    full = architecture("9b", cpu=bench.cpu)
    each = TINY_MICRO_BATCHES if bench.cpu else MICRO_BATCHES
    batch = each * bench.ranks // layout.tensor_parallel
    training = training_of(batch, TINY_LENGTH if bench.cpu else LENGTH)
    whole = Trial(full, training, megatron_engine(bench.device, layout), bench.ranks)

    def needed(tried: Trial) -> float:
        return tried.planned_bytes() + teacher_bytes(tried, teacher_of(tried.model, cpu=bench.cpu))

    trial = deepest(whole, bench.free_bytes(), needed)
    teacher_model = teacher_of(trial.model, cpu=bench.cpu)
    student = bench.engine(trial)
    teacher = bench.build(trial.engine, replace(trial, model=teacher_model), None)
    with teacher.head() as head:
        step = Distillation(trial, student, teacher, ForwardKL(head))
        step()
        bench.lasting_bytes()
        seconds = rotating({name: step}, bench.rounds, bench.wait, bench.warmup)[name]
        memory = memory_of(bench, needed(trial))
        taught = rotating({name: step.teach}, bench.rounds, bench.wait, warmup=0)[name]
    assert step.result is not None
    planned = planned_seconds(bench, trial, teacher_model)
    bench.row(
        name,
        **described(trial, full),
        teacher_layers=teacher_model.num_hidden_layers,
        **rates(trial, teacher_model, seconds),
        **against_plan(spread(seconds)["ms"], None if planned is None else 1e3 * planned, "ms"),
        teacher_ms=spread(taught)["ms"],
        **memory,
        loss=step.result.loss,
        grad_norm=step.result.grad_norm,
    )


def rates(trial: Trial, teacher: ModelConfig, seconds: list[float]) -> dict[str, Any]:
    """Return times, tokens a second of a GPU beside the published number, and the model FLOPs of both models."""
    times = spread(seconds)
    found = trial.rates(times["ms"] / 1e3)
    tokens = found["tokens_per_second_per_gpu"]
    operations = 1e12 * found["tflops_per_gpu"]
    operations += tokens * forward_flops(teacher, trial.training.sequence_length).total
    return {
        **times,
        "tokens_per_second_per_gpu": tokens,
        "tflops_per_gpu": operations / 1e12,
        "mfu": operations / PEAK_OPERATIONS,
        "published_tokens_per_second_per_gpu": PUBLISHED_TOKENS_PER_SECOND,
        "over_published": tokens / PUBLISHED_TOKENS_PER_SECOND,
    }


def cases(bench: Bench) -> Sequence[Case]:
    """Return a case a layout."""
    return [Case(name, partial(run_distillation, name, layout)) for name, layout in layouts(bench.ranks).items()]


if __name__ == "__main__":
    run_part(PART, cases, options_of(BUDGET_SECONDS))
