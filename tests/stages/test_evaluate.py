"""The whole stage on a tiny checkpoint and a tiny prepared folder: contract, resume after a kill, refusals."""

import importlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from nanotrain.checkpoint.hf_folder import save_model
from nanotrain.config.data import CATEGORIES
from nanotrain.config.engine import Device, EngineConfig, Precision, TrackingConfig
from nanotrain.config.errors import UserError
from nanotrain.config.model import ModelConfig
from nanotrain.config.stage import EvaluateConfig
from nanotrain.data.chat_rows import save_rows
from nanotrain.data.manifest import write_manifest
from nanotrain.data.tasks import ANSWER_FORM, make_problem
from nanotrain.data.token_shards import TokenShardWriter
from nanotrain.data.tokenizer import build_tokenizer, save_tokenizer
from nanotrain.model.hybrid import HybridModel
from nanotrain.runtime.files import file_digest
from nanotrain.runtime.run import Run
from nanotrain.stages.evaluate import evaluate

VOCABULARY = 1256
MODEL = {"hybrid_layer_pattern": "M-*", "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
MODEL |= {"num_key_value_heads": 1, "head_dim": 8, "mamba_num_heads": 2, "mamba_head_dim": 8, "ssm_state_size": 8}
MODEL |= {"n_groups": 1, "chunk_size": 8, "initializer_range": 0.2}


def write_data(folder: Path, num_bytes: int = 256) -> Path:
    save_tokenizer(build_tokenizer(r"\S+|\s+", [bytes([byte]) for byte in range(num_bytes)]), folder / "tokenizer")
    files = [f"tokenizer/{file.name}" for file in sorted((folder / "tokenizer").iterdir())]
    draw = np.random.default_rng(0)
    for category in CATEGORIES:
        writer = TokenShardWriter(folder / category / "validation", np.uint16)
        for length in (70, 20):
            writer.add_document([*draw.integers(1097, 1123, length), 2])
        writer.finish()
        files += [f"{category}/validation.bin", f"{category}/validation.idx"]
    rows = []
    for number, task in itertools.product(range(3), ("addition", "gcd")):
        problem = make_problem(task, number)
        reply = {"role": "assistant", "content": ANSWER_FORM.format(problem.answer)}
        messages = [{"role": "user", "content": problem.prompt}, reply | {"reasoning_content": problem.trace}]
        rows.append({"messages": messages, "task": task, "answer": problem.answer, "metadata": {"family": str(number)}})
    (folder / "chat").mkdir()
    save_rows(rows, folder / "chat" / "validation.jsonl")
    digest = file_digest(folder / "tokenizer" / "tokenizer.json")
    write_manifest(folder, {"tokenizer_digest": digest}, [*files, "chat/validation.jsonl"])
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    folder = tmp_path_factory.mktemp("parent") / "hf"
    model = HybridModel(ModelConfig(vocab_size=VOCABULARY, **MODEL))
    model.init_weights(3)
    save_model(model, folder, tokenizer_from=data / "tokenizer")
    return folder


def run_at(output_dir: Path, data: Path, checkpoint: Path) -> Run:
    engine = EngineConfig(device=Device.cpu, precision=Precision.fp32)
    inputs = {"init_from": checkpoint, "data_from": data}
    return Run("test", "evaluate", output_dir, 1, engine, TrackingConfig(), inputs)


def config(**changes: object) -> EvaluateConfig:
    values = {"sequence_length": 16, "num_prompts": 5, "generation_batch_size": 2, "thinking_budgets": [4, 0]}
    return EvaluateConfig(**values | {"thinking_grace": 2, "max_new_tokens": 10} | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path, checkpoint: Path) -> Path:
    run = run_at(tmp_path_factory.mktemp("whole"), data, checkpoint)
    assert evaluate(config(), run) == run.folder / "evaluation.json"
    return run.folder


def test_results_keep_the_contract(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert results == json.loads((finished / "evaluation.json").read_text())
    assert results.keys() == {"held_out", "tasks", "budget_curve", "samples"}
    assert results["held_out"]["bits_per_byte"].keys() == set(CATEGORIES)
    # An untrained model is near log2(vocabulary) bits a token, and here a token is a byte.
    assert results["held_out"]["average"] == pytest.approx(np.log2(VOCABULARY) * 91 / 90, rel=0.2)
    assert [point["budget"] for point in results["budget_curve"]] == [0, 4, None]
    assert all(point["count"] == 5 for point in results["budget_curve"])
    assert results["tasks"].keys() == {"reasoning_on", "reasoning_off"}
    assert sum(one["count"] for one in results["tasks"]["reasoning_off"]["by_task"].values()) == 5
    assert results["budget_curve"][-1]["accuracy"] == results["tasks"]["reasoning_on"]["accuracy"]
    assert all(
        point["thinking_tokens"] <= budget + 2 for point, budget in zip(results["budget_curve"], (0, 4), strict=False)
    )
    kinds = [sample["kind"] for sample in results["samples"]]
    assert kinds.count("continuation") == len(CATEGORIES) and kinds.count("reasoning on") == 5
    assert all({"prompt", "response", "thinking"} <= sample.keys() for sample in results["samples"])


@pytest.mark.parametrize("items", [3, 7, 15])
def test_killed_after_any_item_ends_in_the_same_numbers(
    finished: Path, data: Path, checkpoint: Path, tmp_path: Path, items: int
) -> None:
    lines = (finished / "progress.jsonl").read_bytes().splitlines(keepends=True)
    assert items < len(lines)
    run = run_at(tmp_path, data, checkpoint)
    run.folder.mkdir(parents=True)
    (run.folder / "progress.jsonl").write_bytes(b"".join(lines[:items]) + lines[items][:9])
    evaluate(config(), run)
    assert (run.folder / "results.json").read_bytes() == (finished / "results.json").read_bytes()
    assert (run.folder / "progress.jsonl").read_bytes() == b"".join(lines)


def test_finished_work_is_not_repeated(
    finished: Path, data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_at(tmp_path, data, checkpoint)
    run.folder.mkdir(parents=True)
    (run.folder / "progress.jsonl").write_bytes((finished / "progress.jsonl").read_bytes())

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("work was repeated")

    for name in ("nanotrain.evaluation.tasks.generate", "nanotrain.evaluation.tasks.generate_with_budget"):
        monkeypatch.setattr(name, refuse)
    monkeypatch.setattr(importlib.import_module("nanotrain.stages.evaluate"), "held_out_sums", refuse)
    evaluate(config(), run)
    assert (run.folder / "results.json").read_bytes() == (finished / "results.json").read_bytes()


def test_the_seed_changes_draws_and_not_held_out(finished: Path, data: Path, checkpoint: Path, tmp_path: Path) -> None:
    run = run_at(tmp_path, data, checkpoint)
    evaluate(config(thinking_budgets=[]), Run(**{**run.__dict__, "seed": 2}))
    one, other = (json.loads((folder / "results.json").read_text()) for folder in (finished, run.folder))
    assert one["held_out"] == other["held_out"]
    assert one["samples"][0]["prompt"] == other["samples"][0]["prompt"]
    assert one["samples"][0]["thinking"] != other["samples"][0]["thinking"]


def test_too_many_prompts_are_refused(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="num_prompts"):
        evaluate(config(num_prompts=7), run_at(tmp_path, data, checkpoint))


def test_another_tokenizer_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = write_data(tmp_path / "other")
    tokenizer = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    tokenizer["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    names.remove("manifest.json")
    digest = file_digest(folder / "tokenizer" / "tokenizer.json")
    write_manifest(folder, {"tokenizer_digest": digest}, names)
    with pytest.raises(UserError, match="is not the tokenizer of the data"):
        evaluate(config(), run_at(tmp_path, folder, checkpoint))
