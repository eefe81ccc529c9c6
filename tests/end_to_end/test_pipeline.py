"""All real stages through the command line, on made-up text in the layout of the real packages; seconds, no network.

The same on real text, with kills: test_quickstart.py (slow).
"""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from nanotrain.checkpoint.hf_folder import load_model
from nanotrain.cli import main
from nanotrain.data import corpus
from nanotrain.runtime.files import folder_digest

pytestmark = pytest.mark.xdist_group("pipeline")  # one worker: the run is made once
ROOT = Path(__file__).parents[2]
STAGES = ["prepare", "pretrain", "prune", "distill", "sft", "evaluate", "export"]
TRAINING = ["steps=3", "global_batch_size=4", "micro_batch_size=2", "sequence_length=64", "evaluation_interval=0"]
TRAINING += ["schedule.warmup_steps=1", "schedule.decay_steps=1"]
OVERRIDES = [
    "engine=torch_cpu",
    "engine.threads=1",
    "prepare.stage.corpus.vocab_size=1280",
    "prepare.stage.corpus.validation_fraction=0.15",
    "prepare.stage.corpus.num_chat_rows=60",
    "prepare.stage.corpus.num_chat_validation_rows=20",
    "pretrain.stage.model.hybrid_layer_pattern='M-M*-M-'",
    "pretrain.stage.model.vocab_size=1280",
    "pretrain.stage.model.hidden_size=32",
    "pretrain.stage.model.intermediate_size=64",
    "pretrain.stage.model.head_dim=8",
    "pretrain.stage.model.mamba_num_heads=4",
    "pretrain.stage.model.mamba_head_dim=8",
    "pretrain.stage.model.ssm_state_size=8",
    *(f"{entry}.stage.training.{value}" for entry in ("pretrain", "distill", "sft") for value in TRAINING),
    "sft.stage.training.sequence_length=512",
    "prune.stage.calibration_samples=4",
    "prune.stage.calibration_sequence_length=32",
    "prune.stage.search.num_layers=[5]",
    "prune.stage.search.hidden_size=[24]",
    "prune.stage.search.intermediate_size=[48]",
    "prune.stage.search.mamba_num_heads=[4]",
    "prune.stage.search.max_parameters_fraction=1.0",
    "evaluate.stage.num_prompts=2",
    "evaluate.stage.max_new_tokens=6",
    "evaluate.stage.sequence_length=64",
    "evaluate.stage.max_validation_tokens=500",
    "evaluate.stage.thinking_budgets=[2]",
    "evaluate.stage.thinking_grace=2",
]
RECIPE = str(ROOT / "recipes/quickstart/pipeline.yaml")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The finished output folder of the whole pipeline."""
    spec = importlib.util.spec_from_file_location("fakes", ROOT / "tests/data/fake_packages.py")
    assert spec is not None and spec.loader is not None
    fakes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fakes)
    wheels = fakes.make_wheels(tmp_path_factory.mktemp("wheels"), fakes.byte_tekken())
    folder = tmp_path_factory.mktemp("work") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "ensure_wheels", lambda packages, target: wheels)
        assert main(["run", RECIPE, *OVERRIDES, f"output_dir={folder}"]) == 0
    return folder


def alone(stage: str, run: Path, folder: Path, *overrides: str) -> list[str]:
    """Return the command that runs one stage in `folder`, with the finished run's settings."""
    own = [text.removeprefix(f"{stage}.") for text in OVERRIDES if text.startswith(f"{stage}.")]
    recipe = str(ROOT / f"recipes/quickstart/{stage}.yaml")
    return ["run", recipe, "engine=torch_cpu", "engine.threads=1", *own, f"output_dir={folder}", *overrides]


def test_products_report_and_records(run):
    report = json.loads((run / "report.json").read_text())
    assert sorted(report["stages"]) == sorted(STAGES) and report["total_seconds"] > 0
    for name in STAGES:
        assert report["stages"][name]["seconds"] > 0 and report["stages"][name]["peak_memory_bytes"] > 0
        record = json.loads((run / name / "stage.json").read_text())
        product = run / name / record["product"]
        assert product.exists()
        if product.is_dir():
            assert record["product_digest"] == folder_digest(product)
    for name in ("pretrain", "prune", "distill", "sft", "export"):
        logits = load_model(run / name / "hf", dtype=torch.float32)(torch.tensor([[1, 2, 3]]))
        assert logits.shape == (1, 3, 1280)
    for name in ("pretrain", "distill", "sft"):
        assert len((run / name / "metrics.jsonl").read_text().splitlines()) == 3
    assert (run / "report.html").read_text().lstrip().lower().startswith("<!doctype html>")


def test_the_same_command_again_changes_nothing(run):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    assert main(["run", RECIPE, *OVERRIDES, f"output_dir={run}"]) == 0
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_a_stage_alone_in_another_folder_gives_the_same_bytes(run, tmp_path):
    sources = [
        f"stage.{key}={run / entry}"
        for key, entry in (("init_from", "prune"), ("teacher_from", "pretrain"), ("data_from", "prepare"))
    ]
    assert main(alone("distill", run, tmp_path / "again", *sources)) == 0
    weights = [folder / "distill/hf/model.safetensors" for folder in (run, tmp_path / "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


HARMS = {
    "truncated shard": ("data", "web/train.bin", truncate),
    "truncated index": ("data", "web/train.idx", truncate),
    "missing shard": ("data", "math/train.bin", Path.unlink),
    "corrupt manifest": ("data", "manifest.json", truncate),
    "truncated weights": ("hf", "model.safetensors", truncate),
    "corrupt config": ("hf", "config.json", truncate),
    "no tokenizer": ("hf", "tokenizer.json", Path.unlink),
}


@pytest.mark.parametrize("harm", HARMS)
def test_damaged_inputs_from_outside_are_one_sentence(run, tmp_path, capsys, harm):
    """Copies have no record to compare with: the stage's own checks must name the file."""
    which, name, damage = HARMS[harm]
    data, checkpoint = tmp_path / "data", tmp_path / "hf"
    shutil.copytree(run / "prepare/data", data)
    shutil.copytree(run / "pretrain/hf", checkpoint)
    damage((data if which == "data" else checkpoint) / name)
    if harm == "no tokenizer":
        command = alone("export", run, tmp_path / "out", f"stage.init_from={checkpoint}")
    else:
        command = alone("prune", run, tmp_path / "out", f"stage.init_from={checkpoint}", f"stage.data_from={data}")
    digests = folder_digest(data), folder_digest(checkpoint)
    assert main(command) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nanotrain: ")]
    assert len(lines) == 1 and (Path(name).stem in lines[0] or str(checkpoint) in lines[0])
    assert (folder_digest(data), folder_digest(checkpoint)) == digests
    assert not list((tmp_path / "out").glob("*/stage.json"))
