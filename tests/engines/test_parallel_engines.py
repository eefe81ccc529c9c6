"""DDP and FSDP2 on two ranks against one process: gradients, resume, export, steps that are skipped.

Ranks are processes, and starting them takes long: one fixture starts them once, and every test reads its part of what
came back.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanotrain.checkpoint.hf_folder import load_state_dict, save_model
from nanotrain.config.engine import ActivationCheckpointingConfig, Device, EngineConfig, EngineKind, Precision
from nanotrain.config.errors import UserError
from nanotrain.config.parallel import DataParallel, Fsdp2Config
from nanotrain.config.training import ParameterDtype, StateDtype
from nanotrain.engines import build_engine, precision
from nanotrain.engines.data_parallel import require_ranks
from nanotrain.losses.language_modeling import CrossEntropy
from nanotrain.model.hybrid import HybridModel, build_meta_model
from nanotrain.ops.fp8 import EmulatedProducts, Quantized
from nanotrain.runtime.distributed import World
from tests.conftest import TINY, random_batch
from tests.engines.parallel_runs import BF16, CLIP, FP32, Numbers, Report, build, close, here, run_kind, train, training
from tests.ranks import run_ranks

pytestmark = pytest.mark.xdist_group("parallel")  # one worker: the ranks are started once

DDP = replace(FP32, data_parallel=DataParallel.ddp)
FSDP2 = replace(FP32, data_parallel=DataParallel.fsdp2)
CHECKPOINTED = ActivationCheckpointingConfig(mamba=True, mlp=True, attention=True)
KINDS = {"ddp": DDP, "fsdp2": FSDP2}
VARIANTS = {
    "ddp_checkpointed": replace(DDP, activation_checkpointing=CHECKPOINTED),
    "fsdp2_checkpointed": replace(FSDP2, activation_checkpointing=CHECKPOINTED),
    "fsdp2_kept": replace(FSDP2, fsdp2=Fsdp2Config(reshard_after_forward=False, reduce_every_micro_batch=True)),
}
"""Trained for a few steps only."""
LOW_PRECISION = {"state_dtype": StateDtype.int8, "parameter_dtype": ParameterDtype.bf16}
STEPS, RESUMED_AT = 20, 10
WIDE = replace(
    TINY, hybrid_layer_pattern="M-M*-", hidden_size=128, intermediate_size=256, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=30, n_groups=2,
)  # fmt: skip
"""Every matrix has sides that are multiples of 128, which FP8 blocks want."""
FP8 = replace(FP32, precision=Precision.fp8_blockwise, fp8_bf16_first_layers=1, fp8_bf16_last_layers=1)
TIED = replace(TINY, tie_word_embeddings=True)


class CountedProducts(EmulatedProducts):
    """FP8 of weights that were rounded to bf16 first, as those that a rank gathers are."""

    quantised = 0

    def quantize_weight(self, weight: torch.Tensor) -> Quantized:
        CountedProducts.quantised += 1
        return super().quantize_weight(weight.to(torch.bfloat16))


def train_in_fp8(config: EngineConfig) -> tuple[Numbers, int]:
    """Return two steps in emulated FP8, and how many copies of weights they made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "load_fp8_products", lambda *_: CountedProducts())
        engine = build(config, WIDE)
        CountedProducts.quantised = 0
        return train(engine, range(2)), CountedProducts.quantised


def refusals() -> dict[str, str]:
    """Return what FSDP2 and DDP say to what they cannot do."""
    cases = {
        "in_backward": (DDP, {"in_backward": True, "gradient_clip": 0.0}),
        "fsdp2_in_backward": (FSDP2, {"in_backward": True, "gradient_clip": 0.0}),
        "state_dtype": (FSDP2, {"state_dtype": StateDtype.int8}),
        "parameter_dtype": (replace(FSDP2, precision=Precision.bf16), {"parameter_dtype": ParameterDtype.bf16}),
    }
    said = {}
    for name, (config, optimizer) in cases.items():
        batch = replace(training(**optimizer), global_batch_size=4)
        with pytest.raises(UserError) as refused:
            build_engine(config, build_meta_model(TINY), batch)
        said[name] = str(refused.value)
    return said


def other_states(folder: Path) -> dict[str, Any]:
    """Continue what one process saved as FSDP2, and what DDP saved; load and save what is tied."""
    numbers = {}
    for name in ("one", "ddp"):
        engine = build(FSDP2, seed=3)
        engine.load_state(folder / name / "state")
        numbers[name] = train(engine, range(RESUMED_AT, STEPS))
    tied = build(FSDP2, TIED)
    numbers["tied"] = train(tied, range(3))
    for name, config in VARIANTS.items():
        numbers[name] = train(build(config), range(3))
    tied.save_hf(folder / "tied" / "hf")
    loaded = build(FSDP2, TIED, seed=4)
    loaded.load_hf(folder / "tied" / "hf")
    assert loaded.first_difference(folder / "tied" / "hf") is None
    loaded.init_weights(4)
    assert loaded.first_difference(folder / "tied" / "hf") == "backbone.embeddings.weight"
    with tied.inference_model() as model:
        save_model(model, folder / f"inference-{here()[0]}")
    bf16 = build(replace(BF16, data_parallel=DataParallel.fsdp2))
    numbers["bf16"] = train(bf16, range(4))
    kept = Fsdp2Config(reshard_after_forward=False, reduce_every_micro_batch=True)
    for name, changes in {
        "fp8": {},
        "fp8_kept": {"fsdp2": kept},
        "fp8_checkpointed": {"activation_checkpointing": CHECKPOINTED},
    }.items():
        numbers[name], numbers[f"{name}_copies"] = train_in_fp8(
            replace(FP8, data_parallel=DataParallel.fsdp2, **changes)
        )
    narrow = build(replace(BF16, data_parallel=DataParallel.ddp), **LOW_PRECISION)
    numbers["low_precision"] = train(narrow, range(4))
    return numbers


def on_two_ranks(folder: Path):
    reports = {name: run_kind(config, folder / name, STEPS) for name, config in KINDS.items()}
    return reports, other_states(folder), refusals()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def one(folder) -> Report:
    return run_kind(FP32, folder / "one", STEPS)


@pytest.fixture(scope="module")
def ranks(folder, one):
    return run_ranks(on_two_ranks, 2, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_of_20_steps_equal_one_process(one, ranks, kind):
    assert max(norm for _, norm in one.steps) > CLIP
    for reports, _, _ in ranks:
        close(one.steps, reports[kind].steps)
    assert ranks[0][0][kind].steps == ranks[1][0][kind].steps


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_sums_over_ranks_and_logprobs_are_of_the_own_batch(folder, one, ranks, kind):
    engine = build(FP32)
    engine.load_hf(folder / "one" / "hf")
    expected = engine.evaluate([random_batch(2, 90), random_batch(2, 91)], CrossEntropy())
    for reports, _, _ in ranks:
        assert reports[kind].evaluation == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(reports[kind].logprobs, one.logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_exported_folders_are_equal(folder, one, ranks, kind):
    expected, got = load_state_dict(folder / "one" / "hf"), load_state_dict(folder / kind / "hf")
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=2e-4, msg=name)
    for reports, _, _ in ranks:
        assert reports[kind].difference is None
    files = [sorted(p.name for p in (folder / name / "hf").iterdir()) for name in ("one", kind)]
    assert files[0] == files[1]


@pytest.mark.parametrize("kind", VARIANTS)
def test_checkpointed_layers_and_kept_weights_change_nothing(one, ranks, kind):
    for _, numbers, _ in ranks:
        close(one.steps[:3], numbers[kind])


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_the_same_ranks_resume_bit_for_bit(ranks, kind):
    for reports, _, _ in ranks:
        assert reports[kind].resumed == reports[kind].steps[RESUMED_AT:]


@pytest.mark.parametrize("kind", ["one", "ddp"])
def test_two_ranks_continue_what_others_saved(one, ranks, kind):
    for _, numbers, _ in ranks:
        close(one.steps[RESUMED_AT:], numbers[kind])


@pytest.mark.parametrize("kind", ["one", "ddp", "fsdp2"])
def test_one_process_continues_what_ranks_saved(folder, one, ranks, kind):
    engine = build(FP32, seed=3)
    engine.load_state(folder / kind / "state")
    close(one.steps[RESUMED_AT:], train(engine, range(RESUMED_AT, STEPS)))


def test_a_state_without_a_rank_is_refused(folder, ranks, tmp_path):
    shutil.copytree(folder / "fsdp2" / "state", tmp_path / "state")
    (tmp_path / "state" / "tensors-00001.safetensors").unlink()
    with pytest.raises(UserError, match="files of some ranks are missing"):
        build(FP32).load_state(tmp_path / "state")


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(one, ranks, kind):
    for report in (one, *(reports[kind] for reports, _, _ in ranks)):
        assert report.skips == (True, None, False)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_distillation_from_a_divided_teacher(one, ranks, kind):
    for reports, _, _ in ranks:
        close(one.distilled, reports[kind].distilled)


def test_tied_embeddings_bf16_and_low_precision_states(folder, one, ranks):
    tied = build(FP32, TIED)
    bf16 = build(BF16)
    narrow = build(BF16, **LOW_PRECISION)
    expected = {"tied": train(tied, range(3)), "bf16": train(bf16, range(4)), "low_precision": train(narrow, range(4))}
    for _, numbers, _ in ranks:
        close(expected["tied"], numbers["tied"])
        close(expected["bf16"], numbers["bf16"], loss=1e-3, norm=2e-2)
        close(expected["low_precision"], numbers["low_precision"], loss=5e-3, norm=5e-2)
    exported = load_state_dict(folder / "tied" / "hf")
    for rank in range(2):
        gathered = load_state_dict(folder / f"inference-{rank}")
        assert all(tensor.equal(gathered[name]) for name, tensor in exported.items())


def test_fp8_of_gathered_weights(ranks):
    expected, copies = train_in_fp8(FP8)
    in_bf16 = train(build(BF16, WIDE), range(2))
    matrices = 2 + 2 + 4  # of the layers "-M*"
    assert copies == 2 * matrices  # one for each step
    assert abs(expected[0][0] / in_bf16[0][0] - 1) > 1e-5  # FP8 differs
    for _, numbers, _ in ranks:
        for name in ("fp8", "fp8_kept", "fp8_checkpointed"):
            close(expected[:1], numbers[name][:1], loss=1e-6, norm=1e-4)
            # AdamW's first update follows the sign of a gradient that is reduced from bf16.
            close(expected[1:], numbers[name][1:], loss=5e-3, norm=5e-2)
        # Forward and backward of this rank's two micro-batches of each step; checkpointed layers run forward twice.
        assert numbers["fp8_copies"] == numbers["fp8_kept_copies"] == 2 * 2 * 2 * matrices
        assert numbers["fp8_checkpointed_copies"] == 2 * 2 * 3 * matrices


def test_what_cannot_be_divided_is_refused_by_name(ranks):
    said = ranks[0][2]
    assert "in_backward" in said["in_backward"] and "one process only" in said["in_backward"]
    for key in ("in_backward", "state_dtype", "parameter_dtype"):
        sentence = said["fsdp2_in_backward" if key == "in_backward" else key]
        assert "engine.data_parallel" in sentence and f"optimizer.{key}" in sentence and "ddp" in sentence


def on_four_ranks(folder: Path) -> dict[str, Report]:
    return {name: run_kind(config, folder / name, 8) for name, config in KINDS.items()}


@pytest.mark.slow
def test_four_ranks_resume_bit_for_bit_and_equal_one_process(tmp_path):
    """With more than two ranks the order of a sum could differ from the first step of a run to the later ones."""
    one = run_kind(FP32, tmp_path / "one", 8)
    for reports in run_ranks(on_four_ranks, 4, tmp_path):
        for name, report in reports.items():
            close(one.steps, report.steps)
            assert report.resumed == report.steps[4:], name
            assert report.difference is None and report.skips == (True, None, False)
            close(one.distilled, report.distilled)
    for name in KINDS:
        engine = build(FP32, seed=3)
        engine.load_state(tmp_path / name / "state")
        close(one.steps[4:], train(engine, range(4, 8)))


@pytest.mark.parametrize("kind", [DataParallel.ddp, DataParallel.fsdp2])
def test_one_process_refuses_what_it_would_ignore(kind):
    with pytest.raises(UserError, match=rf"engine\.data_parallel` \({kind.value}\) needs several ranks"):
        build_engine(replace(FP32, data_parallel=kind), HybridModel(TINY), training())


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(data_parallel=DataParallel.fsdp2),
        EngineConfig(kind=EngineKind.megatron),
        EngineConfig(kind=EngineKind.deepspeed),
    ],
)
def test_ranks_that_share_a_gpu_are_refused_where_their_gathers_would_crash(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    world = World(rank=0, size=2, local_rank=0, local_size=2)
    with pytest.raises(
        UserError, match=r"needs a GPU for each rank, and 2 ranks of this machine share 1; start as many"
    ):
        require_ranks(config, world)
    require_ranks(replace(config, kind=EngineKind.torch, data_parallel=DataParallel.ddp), world)
    require_ranks(replace(config, device=Device.cpu), world)
    for gpus in (0, 2):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        require_ranks(config, world)
