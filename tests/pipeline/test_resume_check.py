"""The check must pass on a training that resumes exactly, and must say what differs on one that does not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nanotrain.config.engine import Device, EngineConfig, Precision
from nanotrain.config.errors import UserError
from nanotrain.config.stage import PretrainConfig
from nanotrain.config.training import ScheduleConfig, TrainingConfig
from nanotrain.engines import build_engine
from nanotrain.losses.language_modeling import CrossEntropy
from nanotrain.model.hybrid import HybridModel
from nanotrain.pipeline.resume_check import check_resume, shortened
from nanotrain.training.loop import train
from tests.conftest import TINY, RandomLoader
from tests.pipeline.test_run import start


def build(training: TrainingConfig):
    model = HybridModel(TINY)
    model.init_weights(0)
    return build_engine(EngineConfig(device=Device.cpu, precision=Precision.fp32), model, training)


class Forgetful:
    """An engine whose optimizer starts afresh after a resume."""

    def __init__(self, training):
        self._training, self.engine = training, build(training)

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def load_state(self, folder):
        self.engine.load_state(folder)
        for state in self.engine._optimizer.state.values():
            state["exp_avg"].zero_()


def stage_with(make_engine):
    def pretrain(config, run) -> Path:
        engine = make_engine(config.training)
        train(engine, RandomLoader(rows=1, num_micro=2), CrossEntropy(), config.training, run)
        product = run.folder / "hf"
        product.mkdir(exist_ok=True)
        with engine.inference_model() as model:
            save_file({k: v.clone() for k, v in model.state_dict().items()}, product / "model.safetensors")
        return product

    return lambda: {PretrainConfig: pretrain}


def test_an_exact_resume_is_equal_and_leaves_nothing_behind(load):
    start(load("prepare"))
    before = sorted(Path("runs").iterdir())
    lines = check_resume(load("pretrain", "stage.training.steps=40"), stage_with(build), steps=4)
    assert len(lines) == 1 and lines[0].startswith("pretrain: resumed after step 2 of 4, equal bit for bit")
    assert sorted(Path("runs").iterdir()) == before


def test_what_differs_is_named(load):
    start(load("prepare"))
    (line,) = check_resume(load("pretrain", "stage.training.steps=40"), stage_with(Forgetful), steps=4)
    assert "differ" in line and "model.safetensors" in line and "of the last state" in line


def test_what_cannot_be_checked_is_refused(load):
    with pytest.raises(UserError, match="no finished entry"):
        check_resume(load("pretrain"), stage_with(build), steps=4)
    with pytest.raises(UserError, match=r"'pretrain' starts from 'prepare', which is not finished"):
        check_resume(load("pipeline"), stage_with(build), steps=4)
    with pytest.raises(UserError, match="trains nothing"):
        check_resume(load("prepare"), stage_with(build), steps=4)
    with pytest.raises(UserError, match="at least 2"):
        check_resume(load("pretrain"), stage_with(build), steps=1)
    start(load("pipeline"))
    with pytest.raises(UserError, match=r"--only prune"):
        check_resume(load("pipeline"), stage_with(build), steps=4, only="prune")


def test_the_shortened_training_passes_every_phase_of_its_schedule():
    training = TrainingConfig(
        steps=1000, global_batch_size=1, micro_batch_size=1, sequence_length=8, learning_rate=1.0,
        schedule=ScheduleConfig(warmup_steps=10, decay_steps=300),
    )  # fmt: skip
    short = shortened(training, 6)
    assert (short.steps, short.schedule.warmup_steps, short.schedule.decay_steps) == (6, 1, 2)
    short.validate("t")
    assert torch.isfinite(torch.tensor(short.save_interval_seconds))
