"""The torch engine against a hand-written loop with logits, F.cross_entropy and torch's own AdamW."""

import copy

import pytest
import torch
import torch.nn.functional as F

from nanotrain.config.engine import Device, EngineConfig, Precision
from nanotrain.config.errors import UserError
from nanotrain.config.training import OptimizerConfig, TrainingConfig
from nanotrain.engines import build_engine
from nanotrain.losses.distillation import ForwardKL
from nanotrain.losses.language_modeling import CrossEntropy
from nanotrain.model.batch import IGNORE_INDEX, MicroBatch
from nanotrain.training.teacher import TeacherLoader

FP32 = EngineConfig(device=Device.cpu, precision=Precision.fp32)


def training(**changes) -> TrainingConfig:
    values = {"steps": 4, "global_batch_size": 4, "micro_batch_size": 2, "sequence_length": 12, "learning_rate": 1e-2}
    return TrainingConfig(**(values | changes))


def test_steps_equal_a_hand_written_loop(tiny_training_model, make_batch):
    reference = copy.deepcopy(tiny_training_model).train()
    decayed = [p for p in reference.parameters() if p.ndim > 1]
    plain = [p for p in reference.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-8
    )
    engine = build_engine(FP32, tiny_training_model, training(optimizer=OptimizerConfig(gradient_clip=0.5)))
    for step in range(4):
        batches = [make_batch(2, 10 * step), make_batch(2, 10 * step + 1)]
        result = engine.train_step(batches, CrossEntropy(), 1e-2 / (step + 1))
        logits = torch.cat([reference(b.input_ids, b.segment_ids).flatten(0, 1) for b in batches])
        labels = torch.cat([b.labels.flatten() for b in batches])
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)  # the mean over all labelled tokens
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        optimizer.step()
        assert result.loss == pytest.approx(loss.item(), rel=1e-5)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4)
        assert result.num_tokens == int((labels != IGNORE_INDEX).sum())
    assert engine.evaluate([make_batch(2, 99)], CrossEntropy())["loss"] == pytest.approx(
        F.cross_entropy(
            reference(make_batch(2, 99).input_ids, make_batch(2, 99).segment_ids).flatten(0, 1),
            make_batch(2, 99).labels.flatten(),
            ignore_index=IGNORE_INDEX,
        ).item(),
        rel=1e-3,
    )


@pytest.mark.parametrize("split", [[4], [2, 2], [1, 1, 1, 1], [3, 1]])
def test_gradient_does_not_depend_on_the_micro_batch_split(tiny_training_model, make_batch, split):
    whole = make_batch(4, 5)
    whole.labels[0] = IGNORE_INDEX  # a row, and in some splits a micro-batch, without any label
    parts, start = [], 0
    for size in split:
        rows = slice(start, start + size)
        parts.append(MicroBatch(whole.input_ids[rows], whole.labels[rows], whole.segment_ids[rows]))
        start += size
    other = build_engine(FP32, copy.deepcopy(tiny_training_model), training(optimizer=OptimizerConfig(gradient_clip=0)))
    one = build_engine(FP32, tiny_training_model, training(optimizer=OptimizerConfig(gradient_clip=0)))
    expected, got = one.train_step([whole], CrossEntropy(), 1e-3), other.train_step(parts, CrossEntropy(), 1e-3)
    assert got.loss == pytest.approx(expected.loss, rel=1e-6)
    assert got.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)


def test_a_step_that_is_not_finite_changes_nothing(tiny_training_model, make_batch):
    engine = build_engine(FP32, tiny_training_model, training())
    engine.train_step([make_batch(2, 1)], CrossEntropy(), 1e-2)
    before = {name: tensor.clone() for name, tensor in tiny_training_model.state_dict().items()}

    class Poisoned(CrossEntropy):
        def __call__(self, head, batch):
            output = super().__call__(head, batch)
            return output._replace(loss_sum=output.loss_sum * float("nan"))

    result = engine.train_step([make_batch(2, 2)], Poisoned(), 1e-2)
    assert result.skipped
    assert all(tensor.equal(before[name]) for name, tensor in tiny_training_model.state_dict().items())
    assert not engine.train_step([make_batch(2, 3)], CrossEntropy(), 1e-2).skipped


def test_state_round_trip_continues_bit_for_bit(tiny_training_model, make_batch, tmp_path):
    engine = build_engine(FP32, tiny_training_model, training())
    engine.train_step([make_batch(2, 1)], CrossEntropy(), 1e-2)
    (tmp_path / "s").mkdir()
    engine.save_state(tmp_path / "s")
    other = build_engine(FP32, copy.deepcopy(tiny_training_model), training())
    other._model.init_weights(7)
    other.load_state(tmp_path / "s")
    for step in (2, 3):
        a = engine.train_step([make_batch(2, step)], CrossEntropy(), 1e-2)
        b = other.train_step([make_batch(2, step)], CrossEntropy(), 1e-2)
        assert (a.loss, a.grad_norm) == (b.loss, b.grad_norm)


def test_distillation_towards_a_teacher_lowers_the_divergence(tiny_training_model, random_loader):
    teacher_model = copy.deepcopy(tiny_training_model)
    teacher_model.init_weights(5)
    engine = build_engine(FP32, tiny_training_model, training())
    teacher = build_engine(FP32, teacher_model)
    loader = TeacherLoader(random_loader, teacher)
    before = {name: p.clone() for name, p in teacher_model.state_dict().items()}
    with teacher.head() as head:
        loss_fn = ForwardKL(head)
        first = engine.evaluate(loader.microbatches(0), loss_fn)["loss"]
        batch = loader.microbatches(0)[0]
        student = tiny_training_model(batch.input_ids, batch.segment_ids).log_softmax(-1)
        target = teacher_model(batch.input_ids, batch.segment_ids).log_softmax(-1)
        kl = F.kl_div(student, target, log_target=True, reduction="none").sum(-1)
        labelled = batch.labels != IGNORE_INDEX
        assert engine.evaluate([batch], loss_fn)["loss"] == pytest.approx(kl[labelled].mean().item(), rel=1e-4)
        for _ in range(15):
            engine.train_step(loader.microbatches(0), loss_fn, 1e-2)
        assert engine.evaluate(loader.microbatches(0), loss_fn)["loss"] < 0.7 * first
    assert all(p.equal(before[name]) for name, p in teacher_model.state_dict().items())


def test_logprobs_and_evaluate_agree(tiny_training_model, make_batch):
    engine = build_engine(FP32, tiny_training_model)
    batch = make_batch(3, 4)
    scores = engine.evaluate([batch], CrossEntropy())
    assert -engine.logprobs(batch).sum().item() == pytest.approx(scores["loss"] * scores["num_tokens"], rel=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_refused(tiny_training_model):
    with pytest.raises(UserError, match=r"engine\.device"):
        build_engine(EngineConfig(device=Device.cuda), tiny_training_model)
