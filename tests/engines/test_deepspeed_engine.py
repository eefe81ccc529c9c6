"""DeepSpeed's ZeRO on two ranks against one process, with torch's AdamW: nothing is compiled."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanotrain import engines
from nanotrain.checkpoint.hf_folder import load_state_dict
from nanotrain.config.engine import ActivationCheckpointingConfig, EngineConfig, EngineKind, Precision
from nanotrain.config.errors import UserError
from nanotrain.config.parallel import DeepSpeedConfig
from nanotrain.config.training import ParameterDtype, StateDtype
from nanotrain.engines import build_engine
from nanotrain.model.hybrid import build_meta_model
from tests.conftest import TINY
from tests.engines.parallel_runs import BF16, CLIP, FP32, Numbers, Report, build, close, run_kind, train, training
from tests.ranks import run_ranks

pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install 'nanotrain[deepspeed]'")

CHECKPOINTED = ActivationCheckpointingConfig(mamba=True, mlp=True, attention=True)


def zero(stage: int, base: EngineConfig = FP32, *, offload: bool = False, **changes) -> EngineConfig:
    return replace(base, kind=EngineKind.deepspeed, deepspeed=DeepSpeedConfig(stage, offload), **changes)


FAST = {"zero2": zero(2), "zero3": zero(3)}
SLOW = {"zero1": zero(1), **FAST, "zero2_offload": zero(2, offload=True), "zero3_offload": zero(3, offload=True)}
VARIANTS = {
    "zero2_checkpointed": zero(2, activation_checkpointing=CHECKPOINTED),
    "zero3_checkpointed": zero(3, activation_checkpointing=CHECKPOINTED),
    "zero1_bf16": zero(1, BF16),
    "zero3_bf16": zero(3, BF16),
    "zero3_tied": zero(3),
}
TIED = replace(TINY, tie_word_embeddings=True)


def kinds_on_two_ranks(folder: Path, kinds: dict[str, EngineConfig], steps: int) -> dict[str, Report]:
    reports = {name: run_kind(config, folder / name, steps) for name, config in kinds.items()}
    with pytest.raises(UserError, match=r"ZeRO-2 on 2 ranks.*engine=torch_fsdp2"):
        build(zero(3)).load_state(folder / "zero2" / "state")
    return reports


def variant(config: EngineConfig, tied: bool) -> Numbers:
    return train(build(config, TIED if tied else TINY), range(4))


def check(folder: Path, kinds: dict[str, EngineConfig], steps: int) -> None:
    one = run_kind(FP32, folder / "one", steps)
    assert max(norm for _, norm in one.steps) > CLIP
    exported = load_state_dict(folder / "one" / "hf")
    ranks = run_ranks(kinds_on_two_ranks, 2, folder, kinds, steps)
    assert ranks[0].keys() == ranks[1].keys() == kinds.keys()
    for reports in ranks:
        for name, report in reports.items():
            close(one.steps, report.steps)
            close(one.distilled, report.distilled)
            assert report.resumed == report.steps[steps // 2 :], name
            assert report.difference is None, name
            assert report.skips == (True, None, False), name
            assert report.evaluation == ranks[0][name].evaluation
            torch.testing.assert_close(report.logprobs, one.logprobs, rtol=1e-4, atol=1e-4)
    for name in kinds:
        stored = load_state_dict(folder / name / "hf")
        for tensor_name, tensor in exported.items():
            torch.testing.assert_close(stored[tensor_name], tensor, rtol=1e-3, atol=2e-4, msg=f"{name} {tensor_name}")


def test_zero_2_and_3_train_save_resume_and_skip_as_one_process(tmp_path):
    check(tmp_path, FAST, steps=6)


@pytest.mark.slow
def test_every_stage_and_offload_over_20_steps(tmp_path):
    check(tmp_path, SLOW, steps=20)


def variants_on_two_ranks() -> dict[str, Numbers]:
    return {name: variant(config, "tied" in name) for name, config in VARIANTS.items()}


@pytest.mark.slow
def test_checkpointed_layers_bf16_and_tied_embeddings():
    for numbers in run_ranks(variants_on_two_ranks, 2):
        for name, config in VARIANTS.items():
            one = variant(BF16 if config.precision is Precision.bf16 else FP32, "tied" in name)
            tolerances = {"loss": 1e-3, "norm": 2e-2} if "bf16" in name else {}
            close(one, numbers[name], **tolerances)


@pytest.mark.parametrize(
    ("config", "optimizer", "key"),
    [
        (zero(1), {"in_backward": True, "gradient_clip": 0.0}, "in_backward"),
        (zero(2), {"state_dtype": StateDtype.bf16}, "state_dtype"),
        (zero(3, BF16), {"parameter_dtype": ParameterDtype.bf16}, "parameter_dtype"),
        (zero(1, replace(FP32, precision=Precision.fp8_current)), {}, "engine.precision"),
    ],
)
def test_what_zero_cannot_do_is_refused_by_name(config, optimizer, key):
    with pytest.raises(UserError, match=rf"engine\.kind.*{key}"):
        build_engine(config, build_meta_model(TINY), training(**optimizer))


def test_without_deepspeed_the_install_line_is_given(monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'nanotrain\[deepspeed\]'"):
        build_engine(zero(1), build_meta_model(TINY), training())
