"""pretrain, distill and sft on a small prepared folder: products that load, numbers that add up, refusals that explain."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanotrain.checkpoint.hf_folder import load_config, load_model, load_tokenizer, save_model
from nanotrain.checkpoint.provenance import load_provenance
from nanotrain.config.blend import Curriculum, load_blend
from nanotrain.config.data import CorpusConfig, PhaseConfig, ReasoningConfig
from nanotrain.config.engine import Device, EngineConfig, Precision, TrackingConfig
from nanotrain.config.errors import UserError
from nanotrain.config.stage import DistillConfig, PrepareConfig, PretrainConfig, SftConfig
from nanotrain.config.training import OptimizerConfig, ParameterDtype, StateDtype, TrainingConfig
from nanotrain.data import corpus
from nanotrain.data.blend_folder import build_blend_folder, plan_blend
from nanotrain.model.hybrid import HybridModel
from nanotrain.runtime.files import folder_digest
from nanotrain.runtime.run import Run
from nanotrain.stages.distill import distill
from nanotrain.stages.prepare import prepare
from nanotrain.stages.pretrain import pretrain
from nanotrain.stages.sft import sft
from tests.conftest import TINY

FP32 = EngineConfig(device=Device.cpu, precision=Precision.fp32)
TRAINING = TrainingConfig(
    steps=3, global_batch_size=2, micro_batch_size=2, sequence_length=128, learning_rate=3e-3, evaluation_tokens=256
)
CURRICULUM = [PhaseConfig(until=0.5, weights={"web": 1, "code": 1}), PhaseConfig(until=1.0, weights={"math": 1})]
MODEL = replace(TINY, vocab_size=1280)


def run_of(folder: Path, entry: str, **inputs: Path) -> Run:
    return Run("t", entry, folder, 3, FP32, TrackingConfig(), inputs)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    file = Path(__file__).parents[1] / "data" / "fake_packages.py"
    spec = importlib.util.spec_from_file_location("fakes", file)
    fakes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fakes)
    wheels = fakes.make_wheels(tmp_path_factory.mktemp("wheels"), fakes.byte_tekken())
    patch = pytest.MonkeyPatch()
    patch.setattr(corpus, "ensure_wheels", lambda packages, folder: wheels)
    config = PrepareConfig(
        corpus=CorpusConfig(vocab_size=1280, validation_fraction=0.15, num_chat_rows=60, num_chat_validation_rows=20)
    )
    folder = prepare(config, run_of(tmp_path_factory.mktemp("data"), "prepare"))
    patch.undo()
    return folder


@pytest.fixture(scope="module")
def parent(data, tmp_path_factory) -> Path:
    config = PretrainConfig(model=MODEL, curriculum=CURRICULUM, training=TRAINING)
    return pretrain(config, run_of(tmp_path_factory.mktemp("run"), "pretrain", data_from=data))


def test_pretrain_leaves_a_folder_and_its_numbers(parent, data, tmp_path):
    assert load_config(parent) == MODEL
    assert len(load_tokenizer(parent)) == 1280
    assert load_provenance(parent).tokens_seen == 3 * 2 * 128
    results = json.loads((parent.parent / "results.json").read_text())
    assert results["tokens"] == results["planned_tokens"] == 768
    assert results["blend"] == pytest.approx({"web": 1 / 3, "code": 1 / 6, "math": 1 / 2}, abs=0.2)
    assert sum(results["blend"].values()) == pytest.approx(1)
    last = json.loads((parent.parent / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 3 and last["held_out/average"] == results["held_out"]["average"]
    again = pretrain(
        PretrainConfig(model=MODEL, curriculum=CURRICULUM, training=TRAINING),
        run_of(tmp_path, "pretrain", data_from=data),
    )
    ours, theirs = load_model(parent).state_dict(), load_model(again).state_dict()
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items()), "the same seed gives the same weights"


@pytest.mark.parametrize("in_backward", [False, True])
def test_pretrain_in_low_precision_leaves_bf16_weights_that_load(data, tmp_path, in_backward):
    optimizer = OptimizerConfig(
        state_dtype=StateDtype.int8, parameter_dtype=ParameterDtype.bf16, in_backward=in_backward, gradient_clip=0.0
    )
    config = PretrainConfig(model=MODEL, curriculum=CURRICULUM, training=replace(TRAINING, optimizer=optimizer))
    run = replace(run_of(tmp_path, "pretrain", data_from=data), engine=replace(FP32, precision=Precision.bf16))
    folder = pretrain(config, run)
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert tensor.dtype == (torch.bfloat16 if tensor.ndim == 2 else torch.float32), name
    assert torch.isfinite(load_model(folder)(torch.tensor([[1, 1005, 1010]]))).all()


def test_scratch_takes_the_architecture_not_the_weights(parent, data, tmp_path):
    config = PretrainConfig(architecture_from="prune", curriculum=CURRICULUM, training=TRAINING)
    folder = pretrain(config, run_of(tmp_path, "scratch", data_from=data, architecture_from=parent))
    assert load_config(folder) == load_config(parent)


def test_distill_keeps_the_students_size_and_leaves_the_teacher_alone(parent, data, tmp_path):
    small = HybridModel(replace(MODEL, hidden_size=24, intermediate_size=40))
    small.init_weights(1)
    save_model(small, tmp_path / "student", tokenizer_from=data / "tokenizer")
    before = folder_digest(parent)
    config = DistillConfig(teacher_from="pretrain", curriculum=CURRICULUM, training=TRAINING)
    inputs = {"init_from": tmp_path / "student", "teacher_from": parent, "data_from": data}
    folder = distill(config, run_of(tmp_path, "distill", **inputs))
    assert load_config(folder).hidden_size == 24
    assert folder_digest(parent) == before
    results = json.loads((tmp_path / "distill/results.json").read_text())
    first = json.loads((tmp_path / "distill/metrics.jsonl").read_text().splitlines()[0])
    assert results["final_loss"] > 0 and first["loss"] > 0


def test_distill_refuses_another_vocabulary(parent, data, tmp_path):
    other = HybridModel(replace(MODEL, vocab_size=1300))
    other.init_weights(1)
    save_model(other, tmp_path / "student")
    config = DistillConfig(teacher_from="pretrain", curriculum=CURRICULUM, training=TRAINING)
    inputs = {"init_from": tmp_path / "student", "teacher_from": parent, "data_from": data}
    with pytest.raises(UserError, match="vocabulary of 1280"):
        distill(config, run_of(tmp_path, "distill", **inputs))
    assert not (tmp_path / "distill/hf").exists()


def test_pretrain_refuses_a_vocabulary_smaller_than_the_datas(data, tmp_path):
    config = PretrainConfig(model=replace(MODEL, vocab_size=1200), curriculum=CURRICULUM, training=TRAINING)
    with pytest.raises(UserError, match="1200"):
        pretrain(config, run_of(tmp_path, "pretrain", data_from=data))


def test_sft_reports_how_it_shaped_the_traces(parent, data, tmp_path):
    config = SftConfig(
        reasoning=ReasoningConfig(empty_trace_fraction=0.2, truncated_fraction=0.1),
        training=replace(TRAINING, sequence_length=512),
    )
    folder = sft(config, run_of(tmp_path, "sft", init_from=parent, data_from=data))
    results = json.loads((tmp_path / "sft/results.json").read_text())
    assert results["sft"]["truncated_rows"] > 0 and results["sft"]["empty_trace_rows"] > 0
    assert load_tokenizer(folder).chat_template
    provenance = load_provenance(folder)
    assert provenance.parent == parent.as_posix() and provenance.parent_digest == folder_digest(parent)
    logits = load_model(folder)(torch.tensor([[1, 1005, 1010]]))
    assert logits.shape == (1, 3, 1280) and torch.isfinite(logits).all()


@pytest.fixture(scope="module")
def blend(data, tmp_path_factory) -> Path:
    """A blend of two sources with names of their own, one of two shards, over the prepared shards."""
    root = tmp_path_factory.mktemp("shards")
    for name, category in (("prose/train", "web"), ("proofs-00000", "math"), ("proofs-00001", "code")):
        for end in ("bin", "idx"):
            (root / name).parent.mkdir(exist_ok=True)
            shutil.copy(data / category / f"train.{end}", root / f"{name}.{end}")
            shutil.copy(data / "web" / f"validation.{end}", root / "prose" / f"validation.{end}")
    (root / "blend.yaml").write_text(
        "sources: {prose: {weight: 1, origin: chosen}, proofs: {weight: 1, max_epochs: 4, origin: chosen}}"
    )
    curriculum = Curriculum(768, [(1.0, load_blend(root / "blend.yaml"))], {})
    build_blend_folder(plan_blend(curriculum, root, 768), curriculum, data / "tokenizer", root / "blend")
    return root / "blend"


def test_pretrain_reads_a_blend_of_prepared_shards_under_its_own_names(blend, tmp_path):
    phases = [PhaseConfig(until=1.0, weights={"prose": 0.5, "proofs": 0.5}, max_epochs={"proofs": 4.0})]
    config = PretrainConfig(data_from=str(blend), model=MODEL, curriculum=phases, training=TRAINING)
    pretrain(config, run_of(tmp_path, "pretrain", data_from=blend))
    results = json.loads((tmp_path / "pretrain/results.json").read_text())
    assert results["blend"] == {"prose": 0.5, "proofs": 0.5} and 0 < results["epochs"]["proofs"] <= 4
    assert list(results["held_out"]["bits_per_byte"]) == ["prose"]


def test_a_cap_or_an_unknown_source_ends_the_stage_before_its_first_step(blend, tmp_path):
    for phase, message in (
        (
            PhaseConfig(1.0, {"proofs": 1.0}, "", {"proofs": 1e-6}),
            r"`stage.curriculum` would repeat `proofs` 0\.\d\d times",
        ),
        (PhaseConfig(1.0, {"prosa": 1.0}), r"`stage.curriculum\[0\].weights.prosa` is not a source of .*mean 'prose'"),
    ):
        config = PretrainConfig(data_from=str(blend), model=MODEL, curriculum=[phase], training=TRAINING)
        with pytest.raises(UserError, match=message):
            pretrain(config, run_of(tmp_path, "pretrain", data_from=blend))
    assert not (tmp_path / "pretrain/metrics.jsonl").exists()
