"""What the Megatron engine's tests run on their ranks. A spawned rank imports Megatron once and goes through several layouts."""

import multiprocessing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from nanotrain.config.engine import Device, EngineConfig, EngineKind, Precision
from nanotrain.config.megatron import MegatronConfig
from nanotrain.config.model import ModelConfig
from nanotrain.config.training import OptimizerConfig, TrainingConfig
from nanotrain.engines import build_engine
from nanotrain.engines.base import Engine
from nanotrain.losses.distillation import ForwardKL
from nanotrain.losses.language_modeling import CrossEntropy
from nanotrain.model.batch import IGNORE_INDEX, MicroBatch
from nanotrain.model.hybrid import build_meta_model
from nanotrain.training.teacher import TeacherLoader

# The vocabulary does not divide by 2: the last tensor-parallel rank holds a row of padding.
SMALL = ModelConfig(
    hybrid_layer_pattern="M-*M*-",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    mamba_num_heads=8,
    mamba_head_dim=8,
    ssm_state_size=8,
    n_groups=2,
    chunk_size=8,
    initializer_range=0.1,
)
TEACHER = replace(SMALL, hybrid_layer_pattern="M*-M", hidden_size=40)
SEQUENCES, MICRO, LENGTH = 8, 2, 16
SEED, TEACHER_SEED, LEARNING_RATE = 3, 4, 1e-3


@dataclass(frozen=True)
class Layout:
    """Sizes of `engine.megatron`, and whether rows hold several documents; ranks left over are data-parallel."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    sp: bool = False
    packed: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def config(self) -> MegatronConfig:
        return MegatronConfig(
            tensor_parallel=self.tp,
            pipeline_parallel=self.pp,
            pipeline_layers={1: [], 2: [2, 4]}[self.pp],
            context_parallel=self.cp,
            sequence_parallel=self.sp,
            **self.options,
        )


@dataclass(frozen=True)
class Curve:
    """What training showed: one value a step, and held-out loss and log-probabilities after the last."""

    losses: list[float]
    grad_norms: list[float]
    num_tokens: list[int]
    evaluation: dict[str, float]
    logprobs: torch.Tensor


def all_batches(step: int, *, packed: bool) -> list[MicroBatch]:
    """Return a step's micro-batches for all ranks; their label counts differ much, and one has none."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, SMALL.vocab_size, (SEQUENCES, LENGTH + 1), generator=generator)
    labels = ids[:, 1:].clone()
    share = torch.linspace(0.1, 1.0, SEQUENCES)[:, None]
    labels[torch.rand(SEQUENCES, LENGTH, generator=generator) < share] = IGNORE_INDEX
    documents = (torch.rand(SEQUENCES, LENGTH, generator=generator) < 0.2).cumsum(1).to(torch.int32)
    batches = []
    for first in range(0, SEQUENCES, MICRO):
        rows = slice(first, first + MICRO)
        segments = documents[rows] if packed else None
        batches.append(MicroBatch(ids[rows, :-1].contiguous(), labels[rows].contiguous(), segments))
    batches[1].labels[:] = IGNORE_INDEX
    return batches


class RankLoader:
    """The micro-batches of one data-parallel rank."""

    def __init__(self, engine: Engine, *, packed: bool) -> None:
        self._engine, self._packed = engine, packed

    def microbatches(self, step: int) -> list[MicroBatch]:
        batches = all_batches(step, packed=self._packed)
        each = len(batches) // self._engine.dp_size
        return batches[self._engine.dp_rank * each :][:each]


def build(
    layout: Layout | None, *, model: ModelConfig = SMALL, training: bool = True, precision: Precision = Precision.fp32
) -> Engine:
    """Return a Megatron engine, or with no layout the torch engine of one process."""
    config = EngineConfig(device=Device.cpu, precision=precision)
    if layout is not None:
        config = replace(config, kind=EngineKind.megatron, megatron=layout.config())
    budget = TrainingConfig(
        steps=20,
        global_batch_size=SEQUENCES,
        micro_batch_size=MICRO,
        sequence_length=LENGTH,
        learning_rate=LEARNING_RATE,
        optimizer=OptimizerConfig(gradient_clip=0.5),
    )
    return build_engine(config, build_meta_model(model), budget if training else None)


def train(engine: Engine, steps: range, *, packed: bool) -> Curve:
    """Train with cross-entropy."""
    loader = RankLoader(engine, packed=packed)
    results = [engine.train_step(loader.microbatches(step), CrossEntropy(), LEARNING_RATE) for step in steps]
    assert not any(result.skipped for result in results)
    return Curve(
        [result.loss for result in results],
        [result.grad_norm for result in results],
        [result.num_tokens for result in results],
        engine.evaluate(loader.microbatches(99), CrossEntropy()),
        engine.logprobs(all_batches(99, packed=packed)[0]).cpu(),
    )


def distill(student: Engine, teacher: Engine, num_steps: int, *, packed: bool) -> list[tuple[float, float]]:
    """Return (loss, gradient norm) of each step towards the teacher."""
    loader = TeacherLoader(RankLoader(student, packed=packed), teacher)
    with teacher.head() as head:
        loss_fn = ForwardKL(head, temperature=2.0)
        results = [student.train_step(loader.microbatches(s), loss_fn, LEARNING_RATE) for s in range(num_steps)]
    return [(result.loss, result.grad_norm) for result in results]


def poisoned_step_changes_nothing(engine: Engine) -> bool:
    """Return whether a step with a loss that is not a number was skipped and left the weights as they were."""

    class Poisoned(CrossEntropy):
        def __call__(self, head, batch):
            output = super().__call__(head, batch)
            return output._replace(loss_sum=output.loss_sum * float("nan"))

    batch = all_batches(98, packed=False)[0]
    before = engine.logprobs(batch)
    result = engine.train_step(RankLoader(engine, packed=False).microbatches(0), Poisoned(), LEARNING_RATE)
    return result.skipped and engine.logprobs(batch).equal(before)


def stop_megatron() -> None:
    """Forget the layout, so that the next engine of this process may have another one."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def start_megatron() -> None:
    """Let Megatron-Core run on this CPU rank."""
    from tests import megatron_cpu

    megatron_cpu.install()


def compare_layouts(layouts: dict[str, Layout], folder: str, num_steps: int) -> dict[str, Curve]:
    """Train under each layout from the same weights and save the result to `folder`/<name of the layout>."""
    start_megatron()
    curves = {}
    for name, layout in layouts.items():
        engine = build(layout)
        engine.init_weights(SEED)
        curves[name] = train(engine, range(num_steps), packed=layout.packed)
        assert poisoned_step_changes_nothing(engine)
        saved = Path(folder) / name
        engine.save_hf(saved)
        assert engine.first_difference(saved) is None
        stop_megatron()
    return curves


def processes_after_a_save(folder: str) -> list[str]:
    """Return the processes that this rank has started by the end of a save."""
    start_megatron()
    engine = build(Layout())
    engine.init_weights(SEED)
    engine.save_state(Path(folder))
    stop_megatron()
    return [process.name for process in multiprocessing.active_children()]


def compare_distillation(layouts: dict[str, Layout], num_steps: int) -> dict[str, list[tuple[float, float]]]:
    """Distil under each layout, student and teacher spread alike."""
    start_megatron()
    found = {}
    for name, layout in layouts.items():
        student, teacher = build(layout), build(layout, model=TEACHER, training=False)
        student.init_weights(SEED)
        teacher.init_weights(TEACHER_SEED)
        found[name] = distill(student, teacher, num_steps, packed=layout.packed)
        stop_megatron()
    return found


def continue_elsewhere(
    first: Layout, second: Layout, folder: str, precision: Precision = Precision.fp32
) -> tuple[Curve, Curve, Curve]:
    """Train 4 steps, save, train 4 more; and those 4 again from the saved state under `first` and under `second`."""
    start_megatron()
    engine = build(first, precision=precision)
    engine.init_weights(SEED)
    train(engine, range(4), packed=True)
    engine.save_state(Path(folder))
    straight = train(engine, range(4, 8), packed=True)
    resumed = []
    for layout in (first, second):
        stop_megatron()
        engine = build(layout, precision=precision)
        engine.load_state(Path(folder))
        resumed.append(train(engine, range(4, 8), packed=True))
    return straight, resumed[0], resumed[1]


def export_initial_weights(layouts: dict[str, Layout], folder: str) -> None:
    """Draw bf16 parameters with their fp32 masters under each layout, save them, and read them back."""
    start_megatron()
    for name, layout in layouts.items():
        engine = build(layout, precision=Precision.bf16)
        engine.init_weights(SEED)
        engine.save_hf(Path(folder) / name)
        again = build(layout, precision=Precision.bf16)
        again.load_hf(Path(folder) / name)
        assert again.first_difference(Path(folder) / name) is None
        loader = RankLoader(engine, packed=layout.packed)
        both = [e.train_step(loader.microbatches(0), CrossEntropy(), LEARNING_RATE) for e in (engine, again)]
        assert both[0] == both[1]
        assert again.first_difference(Path(folder) / name) is not None
        stop_megatron()
