"""The loop: an interrupted run is the uninterrupted one, bit for bit; signals, non-finite steps, damaged states."""

import json
import logging
import os
import signal
from dataclasses import replace

import pytest
import torch

from nanotrain.config.engine import Device, EngineConfig, Precision, TrackingConfig
from nanotrain.config.errors import UserError
from nanotrain.config.training import SaveFailure, ScheduleConfig, SpikeAction, SpikeConfig, TrainingConfig
from nanotrain.engines import build_engine
from nanotrain.losses.language_modeling import CrossEntropy
from nanotrain.model.batch import IGNORE_INDEX
from nanotrain.model.hybrid import HybridModel
from nanotrain.optim.lr_schedule import learning_rate
from nanotrain.runtime.run import Run
from nanotrain.runtime.signals import Preempted
from nanotrain.training.guard import TrainingDiverged
from nanotrain.training.loop import train

FP32 = EngineConfig(device=Device.cpu, precision=Precision.fp32)
CONFIG = TrainingConfig(
    steps=8,
    global_batch_size=4,
    micro_batch_size=2,
    sequence_length=12,
    learning_rate=1e-2,
    schedule=ScheduleConfig(warmup_steps=2, decay_steps=3),
    evaluation_interval=4,
    keep_every=1,
    max_nonfinite_steps=2,
)


def fresh_engine(config=CONFIG):
    from tests.conftest import TINY

    model = HybridModel(TINY)
    model.init_weights(0)
    return build_engine(FP32, model, config)


def run_in(folder) -> Run:
    return Run("t", "pretrain", folder, 1, FP32, TrackingConfig())


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "pretrain/metrics.jsonl").read_text().splitlines()]


class Interrupting:
    """Gives the batches of another loader; at one step, once, does something nasty first."""

    def __init__(self, loader, step, action):
        self.loader, self.step, self.action = loader, step, action

    def microbatches(self, step):
        if step == self.step:
            self.step = None
            self.action()
        return self.loader.microbatches(step)


def weights(engine):
    with engine.inference_model() as model:
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def comparable(folder):
    timing = ("tokens_per_second", "mfu", "memory_bytes")
    return [{k: v for k, v in line.items() if k not in timing and not k.endswith("seconds")} for line in lines(folder)]


class Crash(Exception):
    pass


def crash():
    raise Crash


@pytest.mark.parametrize("step", [0, 1, 5, 7])
def test_resumed_equals_uninterrupted(tmp_path, random_loader, step):
    calm = fresh_engine()
    summary = train(
        calm, random_loader, CrossEntropy(), CONFIG, run_in(tmp_path / "calm"), lambda: {"held_out/loss": 1.0}
    )
    with pytest.raises(Crash):
        train(
            fresh_engine(),
            Interrupting(random_loader, step, crash),
            CrossEntropy(),
            CONFIG,
            run_in(tmp_path / "cut"),
            lambda: {"held_out/loss": 1.0},
        )
    torch.manual_seed(12345)  # whatever the new process drew before it resumes
    engine = fresh_engine()
    again = train(
        engine, random_loader, CrossEntropy(), CONFIG, run_in(tmp_path / "cut"), lambda: {"held_out/loss": 1.0}
    )
    assert (again.steps, again.tokens, again.final_loss) == (summary.steps, summary.tokens, summary.final_loss)
    assert again.evaluation == summary.evaluation == {"held_out/loss": 1.0}
    expected = weights(calm)
    assert all(tensor.equal(expected[name]) for name, tensor in weights(engine).items())
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "calm")
    assert [line["step"] for line in lines(tmp_path / "cut")] == list(range(1, 9))


def test_a_finished_training_is_not_repeated(tmp_path, random_loader):
    first = train(fresh_engine(), random_loader, CrossEntropy(), CONFIG, run_in(tmp_path))

    class Refusing:
        def microbatches(self, step):
            raise AssertionError("no step is left to do")

    engine = fresh_engine()
    assert replace(train(engine, Refusing(), CrossEntropy(), CONFIG, run_in(tmp_path)), seconds=0) == replace(
        first, seconds=0
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_ends(tmp_path, random_loader, number):
    config = replace(CONFIG, keep_every=0)
    loader = Interrupting(random_loader, 3, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Preempted) as caught:
        train(fresh_engine(config), loader, CrossEntropy(), config, run_in(tmp_path))
    assert caught.value.step == 4
    assert (tmp_path / "pretrain/state/step-00000004").is_dir()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert train(fresh_engine(), random_loader, CrossEntropy(), config, run_in(tmp_path)).steps == 8


def test_a_signal_in_the_last_step_stops_the_run_before_what_comes_after(tmp_path, random_loader):
    run, last = run_in(tmp_path / "stopped"), CONFIG.steps - 1
    loader = Interrupting(random_loader, last, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted) as caught:
        train(fresh_engine(), loader, CrossEntropy(), CONFIG, run)
    assert caught.value.step == CONFIG.steps
    resumed, straight = fresh_engine(), fresh_engine()
    summary = train(resumed, random_loader, CrossEntropy(), CONFIG, run)
    assert summary.steps == CONFIG.steps
    train(straight, random_loader, CrossEntropy(), CONFIG, run_in(tmp_path / "straight"))
    assert all(tensor.equal(weights(straight)[name]) for name, tensor in weights(resumed).items())


def test_a_damaged_state_is_passed_over(tmp_path, random_loader, caplog):
    with pytest.raises(Crash):
        train(fresh_engine(), Interrupting(random_loader, 5, crash), CrossEntropy(), CONFIG, run_in(tmp_path))
    states = sorted((tmp_path / "pretrain/state").iterdir())
    assert [state.name for state in states] == [f"step-{step:08d}" for step in range(1, 6)]
    file = states[-1] / "engine/tensors-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    engine = fresh_engine()
    train(engine, random_loader, CrossEntropy(), CONFIG, run_in(tmp_path))
    calm = fresh_engine()
    train(calm, random_loader, CrossEntropy(), CONFIG, run_in(tmp_path / "calm"))
    expected = weights(calm)
    assert all(tensor.equal(expected[name]) for name, tensor in weights(engine).items())


def test_steps_that_are_not_finite_are_counted_and_end_the_run(tmp_path, random_loader):
    class Poisoned(CrossEntropy):
        calls = 0

        def __call__(self, head, batch):
            output = super().__call__(head, batch)
            Poisoned.calls += 1
            bad = Poisoned.calls in self.bad
            return output._replace(loss_sum=output.loss_sum * (float("inf") if bad else 1.0))

    Poisoned.bad, Poisoned.calls = {3, 7}, 0  # steps 1 and 3: never two in a row
    summary = train(fresh_engine(), random_loader, Poisoned(), CONFIG, run_in(tmp_path / "a"))
    assert summary.skipped_steps == 2
    assert [line["step"] for line in lines(tmp_path / "a") if line["skipped"]] == [2, 4]
    Poisoned.bad, Poisoned.calls = {5, 7}, 0  # steps 2 and 3
    with pytest.raises(TrainingDiverged, match="max_nonfinite_steps"):
        train(fresh_engine(), random_loader, Poisoned(), CONFIG, run_in(tmp_path / "b"))
    assert not (tmp_path / "b/pretrain/state/step-00000004").exists()


class Failing:
    """An engine whose states cannot be stored at some saves."""

    def __init__(self, engine, failing, error):
        self.engine, self.failing, self.error, self.saves = engine, failing, error, 0

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def snapshot_state(self):
        self.saves += 1
        if self.saves not in self.failing:
            return self.engine.snapshot_state()

        def write(folder):
            (folder / "half").write_bytes(b"x")
            raise self.error

        return write


FULL = OSError(28, "No space left on device")


def test_a_full_disk_is_a_warning_and_the_last_good_state_stays(tmp_path, random_loader, caplog):
    engine = Failing(fresh_engine(), {3, 4, 8}, FULL)
    summary = train(engine, random_loader, CrossEntropy(), CONFIG, run_in(tmp_path))
    assert summary.steps == 8
    kept = [state.name for state in sorted((tmp_path / "pretrain/state").iterdir())]
    assert kept == [f"step-{step:08d}" for step in (1, 2, 5, 6, 7)]
    calm = fresh_engine()
    train(calm, random_loader, CrossEntropy(), CONFIG, run_in(tmp_path / "calm"))
    again = fresh_engine()
    train(again, random_loader, CrossEntropy(), CONFIG, run_in(tmp_path))
    assert all(tensor.equal(weights(calm)[name]) for name, tensor in weights(again).items())


def test_a_full_disk_ends_the_run_where_that_is_asked_for(tmp_path, random_loader):
    config = replace(CONFIG, on_save_failure=SaveFailure.stop)
    engine = Failing(fresh_engine(), {3}, FULL)
    with pytest.raises(
        UserError, match=r"state of step 3 could not be saved .*No space left.*that of step 2.*on_save_fai"
    ):
        train(engine, random_loader, CrossEntropy(), config, run_in(tmp_path))
    assert train(fresh_engine(), random_loader, CrossEntropy(), config, run_in(tmp_path)).steps == 8


def test_a_signal_on_a_full_disk_tells_the_step_that_is_really_saved(tmp_path, random_loader):
    loader = Interrupting(random_loader, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted) as caught:
        train(Failing(fresh_engine(), {3, 4}, FULL), loader, CrossEntropy(), CONFIG, run_in(tmp_path))
    assert caught.value.step == 2


def test_a_defect_of_the_writer_surfaces(tmp_path, random_loader):
    engine = Failing(fresh_engine(), {2}, KeyError("defect"))
    with pytest.raises(RuntimeError, match="KeyError"):
        train(engine, random_loader, CrossEntropy(), CONFIG, run_in(tmp_path))


class Spiking:
    """Labels of one step are another permutation: its loss stands out."""

    def __init__(self, loader, steps):
        self.loader, self.steps = loader, steps

    def microbatches(self, step):
        batches = self.loader.microbatches(0)
        if step not in self.steps:
            return batches
        return [replace(b, labels=torch.where(b.labels == IGNORE_INDEX, b.labels, 60 - b.labels)) for b in batches]


def spiky(action, **changes):
    spike = SpikeConfig(action=action, z_score=3.0, window=4)
    return replace(
        CONFIG, steps=16, keep_every=4, spike=spike, schedule=ScheduleConfig(), learning_rate=1e-4, **changes
    )


def test_a_spike_is_logged_or_left_out(tmp_path, random_loader, caplog):
    logging.getLogger("nanotrain").propagate = True
    for action, skipped in ((SpikeAction.off, 0), (SpikeAction.log, 0), (SpikeAction.skip, 1)):
        config, folder = spiky(action), tmp_path / action.value
        caplog.clear()
        engine = fresh_engine(config)
        summary = train(engine, Spiking(random_loader, {10}), CrossEntropy(), config, run_in(folder))
        assert summary.skipped_steps == skipped
        assert ("step 11: the loss" in caplog.text) == (action is not SpikeAction.off)
        assert [line["step"] for line in lines(folder) if line["skipped"]] == [11][:skipped]


@pytest.mark.parametrize("cut", [None, 9, 10, 11, 13])
def test_a_roll_back_takes_the_updates_since_the_kept_state_back_and_survives_an_interruption(
    tmp_path, random_loader, cut
):
    """States of steps 4, 8, ...; the spike of step 11 takes 9 to 11 back. The reference trains without those steps."""
    config = spiky(SpikeAction.roll_back)
    reference = fresh_engine(config)
    for step in [*range(8), *range(11, 16)]:
        reference.train_step(random_loader.microbatches(0), CrossEntropy(), learning_rate(step, config))
    loader = Spiking(random_loader, {10})
    if cut is not None:
        with pytest.raises(Crash):
            train(fresh_engine(config), Interrupting(loader, cut, crash), CrossEntropy(), config, run_in(tmp_path))
    engine = fresh_engine(config)
    train(engine, loader, CrossEntropy(), config, run_in(tmp_path))
    assert all(tensor.equal(weights(reference)[name]) for name, tensor in weights(engine).items())
    last = json.loads((tmp_path / "pretrain/state/step-00000016/progress.json").read_text())
    assert last["rolled_back"] == [[9, 11]]


def test_stop_after_saves_and_stops_like_a_signal(tmp_path, random_loader):
    config = replace(CONFIG, keep_every=0)
    with pytest.raises(Preempted) as caught:
        train(fresh_engine(config), random_loader, CrossEntropy(), config, replace(run_in(tmp_path), stop_after=3))
    assert caught.value.step == 3 and (tmp_path / "pretrain/state/step-00000003").is_dir()
