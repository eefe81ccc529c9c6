"""The Megatron engine on CPU ranks against the torch engine in one process: one seed, one sequence of batches, fp32."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from nanotrain.checkpoint.hf_folder import load_state_dict
from nanotrain.config.engine import Precision
from nanotrain.config.megatron import Recompute
from nanotrain.losses.language_modeling import CrossEntropy
from nanotrain.model.hybrid import HybridModel
from tests.engines.megatron_ranks import (
    SEED,
    SMALL,
    TEACHER,
    TEACHER_SEED,
    Curve,
    Layout,
    all_batches,
    build,
    compare_distillation,
    compare_layouts,
    continue_elsewhere,
    distill,
    export_initial_weights,
    processes_after_a_save,
    train,
)
from tests.engines.quantised_weights import read_what_two_ranks_saved
from tests.ranks import run_ranks

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

NUM_STEPS, FEW_STEPS = 20, 4
ONE_RANK = {"one": Layout(), "selective": Layout(options={"recompute": Recompute.selective})}
TWO_RANKS = {
    "tp2": Layout(tp=2),
    "tp2_sp": Layout(tp=2, sp=True, options={"recompute": Recompute.full}),
    "pp2": Layout(pp=2),
    "cp2": Layout(cp=2),
    "cp2_plain": Layout(cp=2, packed=False),
    "dp2": Layout(),
}
FOUR_RANKS = {
    "tp2_pp2": Layout(tp=2, pp=2),
    "tp2_pp2_sp": Layout(tp=2, pp=2, sp=True),
    "tp2_dp2": Layout(tp=2, options={"distributed_optimizer": False}),
    "tp2_dp2_sp": Layout(tp=2, sp=True),
}
CONTEXT_RANKS = {
    "tp2_cp2_sp": Layout(tp=2, cp=2, sp=True),
    "tp2_cp2_sp_plain": Layout(tp=2, cp=2, sp=True, packed=False),
    "cp2_pp2": Layout(cp=2, pp=2, options={"recompute": Recompute.selective}),
    "cp4": Layout(cp=4, options={"recompute": Recompute.full}),
}
LOSS, GRAD_NORM = 1e-5, 1e-4
"""Relative, a step. fp32 sums in another order."""
WEIGHTS = 2e-4
"""Absolute, after 20 steps of 1e-3: AdamW divides gradients near zero by their own size."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Callable[[int, bool], tuple[Curve, Path]]:
    """Return the torch engine's curve and checkpoint after so many steps, by whether rows are packed."""

    @cache
    def run(num_steps: int, packed: bool) -> tuple[Curve, Path]:
        engine = build(None)
        engine.init_weights(SEED)
        curve = train(engine, range(num_steps), packed=packed)
        folder = tmp_path_factory.mktemp("torch") / "hf"
        engine.save_hf(folder)
        return curve, folder

    return run


def assert_same_curve(got: Curve, expected: Curve) -> None:
    assert got.num_tokens == expected.num_tokens
    assert got.losses == pytest.approx(expected.losses, rel=LOSS)
    assert got.grad_norms == pytest.approx(expected.grad_norms, rel=GRAD_NORM)
    assert got.evaluation == pytest.approx(expected.evaluation, rel=LOSS)
    torch.testing.assert_close(got.logprobs, expected.logprobs, rtol=1e-4, atol=1e-4)


def train_and_save(layouts: dict[str, Layout], folder: str, num_steps: int) -> tuple[dict[str, Curve], list[str]]:
    return compare_layouts(layouts, folder, num_steps), processes_after_a_save(f"{folder}/state")


def check_layouts(layouts: dict[str, Layout], num_ranks: int, num_steps: int, reference, folder: Path) -> None:
    (folder / "state").mkdir()
    ranks = run_ranks(train_and_save, num_ranks, layouts, str(folder), num_steps)
    assert all(processes == [] for _, processes in ranks), "a save's helper would outlive a rank that is killed"
    for name, layout in layouts.items():
        expected, checkpoint = reference(num_steps, layout.packed)
        for curves, _ in ranks:
            assert_same_curve(curves[name], expected)
        weights = load_state_dict(checkpoint)
        saved = load_state_dict(folder / name)
        assert saved.keys() == weights.keys()
        worst = max((float((saved[key] - weights[key]).abs().max()), key) for key in weights)
        assert worst[0] <= WEIGHTS, (name, worst)


def test_two_ranks_train_like_one_process(reference, tmp_path):
    check_layouts(TWO_RANKS, 2, FEW_STEPS, reference, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("layouts", "num_ranks"), [(ONE_RANK, 1), (TWO_RANKS, 2), (FOUR_RANKS, 4), (CONTEXT_RANKS, 4)])
def test_twenty_steps_under_every_layout(reference, tmp_path, layouts, num_ranks):
    check_layouts(layouts, num_ranks, NUM_STEPS, reference, tmp_path)


@pytest.mark.slow
def test_checkpoints_of_bf16_parameters_hold_their_masters(tmp_path):
    layouts = {
        "dp2": Layout(),
        "tp2_sp": Layout(tp=2, sp=True),
        "pp2": Layout(pp=2),
    }
    run_ranks(export_initial_weights, 2, layouts, str(tmp_path))
    model = HybridModel(SMALL)
    model.init_weights(SEED)
    for name in layouts:
        saved = load_state_dict(tmp_path / name)
        for key, value in model.state_dict().items():
            assert saved[key].equal(value), (name, key)


@pytest.mark.slow
def test_a_checkpoint_goes_on_in_the_torch_engine(tmp_path):
    (curves, _) = run_ranks(compare_layouts, 2, {"tp2": Layout(tp=2)}, str(tmp_path), 3)
    engine = build(None)
    engine.load_hf(tmp_path / "tp2")
    batch = all_batches(99, packed=True)[0]
    torch.testing.assert_close(engine.logprobs(batch), curves["tp2"].logprobs, rtol=1e-5, atol=1e-5)
    scores = engine.evaluate(all_batches(99, packed=True), CrossEntropy())
    assert scores == pytest.approx(curves["tp2"].evaluation, rel=LOSS)


@pytest.mark.slow
def test_distillation_with_both_models_spread():
    student, teacher = build(None), build(None, model=TEACHER, training=False)
    student.init_weights(SEED)
    teacher.init_weights(TEACHER_SEED)
    expected = distill(student, teacher, 5, packed=True)
    layouts = {"tp2": Layout(tp=2), "tp2_sp": Layout(tp=2, sp=True), "pp2": Layout(pp=2), "cp2": Layout(cp=2)}
    for found in run_ranks(compare_distillation, 2, layouts, 5):
        for name, steps in found.items():
            for got, wanted in zip(steps, expected, strict=True):
                assert got == pytest.approx(wanted, rel=GRAD_NORM), name


@pytest.mark.slow
def test_a_state_continues_under_another_layout(tmp_path):
    first, second = Layout(tp=2), Layout(pp=2)
    for straight, same, other in run_ranks(continue_elsewhere, 4, first, second, str(tmp_path)):
        assert same.losses == straight.losses
        assert same.grad_norms == straight.grad_norms
        assert_same_curve(other, straight)


@pytest.mark.slow
def test_a_state_of_bf16_and_fp32_parameters_continues_under_another_layout(tmp_path):
    """Mamba-2's A_log, D and dt_bias stay in fp32 beside norms in bf16, in one group of the optimizer."""
    first, second = Layout(tp=2), Layout(pp=2)
    for straight, same, other in run_ranks(continue_elsewhere, 4, first, second, str(tmp_path), Precision.bf16):
        assert same.losses == straight.losses
        assert same.grad_norms == straight.grad_norms
        assert other.losses == pytest.approx(straight.losses, rel=2e-3)
        assert other.grad_norms == pytest.approx(straight.grad_norms, rel=2e-2)


def test_fp8_weights_are_read_whole_where_another_layout_has_saved_them_in_parts(tmp_path):
    """Parts of one are read into a dequantised copy, which megatron-core forgets; on GPUs tests/multi_gpu `faults` has the real ones."""
    folder = tmp_path / "state"
    folder.mkdir()
    assert run_ranks(read_what_two_ranks_saved, 2, str(folder)) == [{"whole": True, "joined": True}] * 2
