"""A made-up run folder with everything a whole quickstart leaves; the numbers are drawn, not measured."""

import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

CATEGORIES = ("web", "math", "code", "multilingual", "sft")
STAGES = {
    "prepare": ("PrepareConfig", "data", "data", 44.2),
    "pretrain": ("PretrainConfig", "checkpoint", "hf", 171.9),
    "prune": ("PruneConfig", "checkpoint", "hf", 28.4),
    "distill": ("DistillConfig", "checkpoint", "hf", 121.3),
    "sft": ("SftConfig", "checkpoint", "hf", 96.0),
    "evaluate": ("EvaluateConfig", "report", "evaluation.json", 57.8),
    "export": ("ExportConfig", "checkpoint", "hf", 9.6),
}
HOSTILE = "</script></pre><img src=x onerror=alert(1)><script>alert(2)</script>"
CURRICULUM = [
    {"until": 0.6, "weights": {"web": 0.35, "code": 0.2, "math": 0.15, "multilingual": 0.15, "sft": 0.15}},
    {"until": 0.9, "weights": {"web": 0.3, "code": 0.2, "math": 0.2, "multilingual": 0.1, "sft": 0.2}},
    {"until": 1.0, "weights": {"web": 0.25, "code": 0.15, "math": 0.2, "multilingual": 0.1, "sft": 0.3}},
]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _held_out(average: float) -> dict[str, Any]:
    offsets = (0.21, -0.32, 0.02, 0.35, -0.26)
    bits = {name: average + offset for name, offset in zip(CATEGORIES, offsets, strict=True)}
    return {"bits_per_byte": bits, "average": average, "loss": 2.1 * average}


def _metrics(steps: int, start: float, end: float, average: float, draw: random.Random) -> list[dict[str, Any]]:
    lines = []
    for step in range(1, steps + 1):
        loss = end + (start - end) * math.exp(-6 * step / steps) + draw.gauss(0, 0.02 * end)
        line = {"step": step, "loss": loss, "grad_norm": 0.4 + 2 * math.exp(-step / 20) + draw.random() * 0.1}
        line |= {"lr": 4e-3 * min(1, step / 20, 3 * (1 - step / (steps + 1))), "tokens_per_second": 9000.0, "mfu": None}
        line |= {"tokens": step * 4096, "loss_tokens": 4000, "seconds": 0.4 * step, "skipped": False}
        line |= {"data_seconds": 0.02, "compute_seconds": 0.33, "communication_seconds": None if steps > 200 else 0.05}
        line |= {"save_stall_seconds": 0.03 if step % 100 == 1 else 0.0}
        if step % 100 == 0 or step == steps:
            line |= {"evaluation_seconds": 1.5}
            scores = _held_out(average + math.exp(-4 * step / steps))
            line |= {"held_out/loss": scores["loss"], "held_out/average": scores["average"]}
            line |= {f"held_out/bits_per_byte/{name}": value for name, value in scores["bits_per_byte"].items()}
        lines.append(line)
    return lines


def _training(steps: int, average: float, loss: float, parameters: int) -> dict[str, Any]:
    return {
        "parameters": parameters,
        "steps": steps,
        "tokens": steps * 4096,
        "planned_tokens": steps * 4096,
        "final_loss": loss,
        "held_out": _held_out(average),
        "skipped_steps": 0,
        "training_seconds": 0.4 * steps,
        "blend": {"web": 0.33, "code": 0.2, "math": 0.17, "multilingual": 0.13, "sft": 0.17},
    }


def _prune_results(draw: random.Random) -> dict[str, Any]:
    def falling(count: int) -> list[float]:
        return [abs(draw.gauss(0, 1)) ** 2 + 0.05 for _ in range(count)]

    sizes = {"num_layers": 12, "hidden_size": 112, "mamba_num_heads": 8}
    candidates = [
        {
            **sizes,
            "intermediate_size": width,
            "parameters": 2_450_000 - 9000 * i,
            "memory_bytes": 9_100_000,
            "fits": True,
        }
        | {"held_out": 2.9 + 0.06 * i, "chosen": i == 0}
        for i, width in enumerate((448, 384, 320))
    ]
    return {
        "parameters_before": 3_520_000,
        "parameters_after": 2_450_000,
        "held_out_before": _held_out(1.92),
        "held_out_after": _held_out(2.9),
        "layer_removal": [{"layer": 7, "kind": "M", "mse": 0.31}, {"layer": 11, "kind": "*", "mse": 0.58}],
        "importance": {
            "hidden": falling(128),
            "ffn": {str(layer): falling(512) for layer in (1, 3, 5, 9, 13)},
            "mamba_heads": {str(layer): falling(8) for layer in (0, 2, 4, 8, 10, 12)},
        },
        "candidates": candidates,
        "kept": {
            "layers": [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 12, 13],
            "hidden": list(range(112)),
            "ffn": {str(layer): list(range(448)) for layer in (1, 3, 5, 9, 13)},
            "mamba_heads": {str(layer): list(range(8)) for layer in (0, 2, 4, 8, 10, 12)},
        },
    }


def _evaluation() -> dict[str, Any]:
    def accuracy(mean: float, count: int) -> dict[str, Any]:
        return {"accuracy": mean, "count": count, "interval": [max(0.0, mean - 0.08), min(1.0, mean + 0.08)]}

    tasks = ("addition", "counting", "gcd", "sorting", "word_problem")
    curve = [
        {"budget": budget, **accuracy(0.12 + 0.06 * i, 128), "thinking_tokens": 6.0 + 9 * i, "answer_tokens": 7.2}
        | {"well_formed": 0.97 + 0.005 * i, "forced": 0.8 - 0.16 * i, "finished": 1.0}
        for i, budget in enumerate((0, 8, 16, 32, 64, None))
    ]
    chat = {"kind": "reasoning on", "source": "addition", "prompt": "What is 27 + 5?", "score": 1.0}
    chat |= {"thinking": "27 + 5\n7 + 5 = 12, carry 1\n2 + 1 = 3\ndigits 32\n", "response": "\n\nThe answer is 32."}
    hostile = {"kind": "continuation", "source": "web", "prompt": "The river", "thinking": "", "response": HOSTILE}
    return {
        "held_out": _held_out(1.98),
        "tasks": {
            "reasoning_on": {**accuracy(0.42, 128), "by_task": {name: accuracy(0.4, 26) for name in tasks}},
            "reasoning_off": {**accuracy(0.12, 128), "by_task": {name: accuracy(0.1, 26) for name in tasks}},
        },
        "budget_curve": curve,
        "samples": [chat, hostile | {"score": None}],
    }


def _prepare() -> dict[str, Any]:
    one = {"train_tokens": 312_345, "validation_tokens": 20_123, "train_documents": 803, "validation_documents": 51}
    categories = {name: {**one, "bytes": 1_234_567} for name in CATEGORIES}
    chat = {"train_rows": 12000, "validation_rows": 400}
    return {"categories": categories, "chat": chat} | {
        "manifest_digest": _digest("manifest"),
        "tokenizer_digest": _digest("tok"),
    }


def _content(stage: str, draw: random.Random) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """Return (`stage` of the recipe, results, metrics)."""
    training = {"steps": 400, "sequence_length": 256, "global_batch_size": 16, "learning_rate": 4e-3}
    training |= {"schedule": {"kind": "wsd", "min_learning_rate": 4e-5}, "optimizer": {"beta2": 0.95}}
    model = {"hybrid_layer_pattern": "M-M-M*-M-M*-M-", "hidden_size": 128, "vocab_size": 8192}
    pretrain = {"model": model, "architecture_from": "", "curriculum": CURRICULUM, "training": training}
    distill = {"teacher_from": "pretrain", "curriculum": CURRICULUM[:1], "training": training | {"steps": 150}}
    sft = {"reasoning": {"empty_trace_fraction": 0.1}, "training": training | {"steps": 240}}
    sft_results = _training(240, 1.98, 0.41, 2_450_000) | {"blend": {"chat": 1.0}}
    verification = {"max_abs_logit_difference": 1.2e-6, "tokens_checked": 138}
    exported = {"weight_bytes": 4_912_331, "dtype": "bfloat16", "verification": verification}
    return {
        "PrepareConfig": ({"corpus": {"kind": "pip_mini"}}, _prepare(), []),
        "PretrainConfig": (pretrain, _training(400, 1.92, 3.61, 3_520_000), _metrics(400, 9.0, 3.6, 1.92, draw)),
        "PruneConfig": ({"importance": "activation", "calibration_samples": 64}, _prune_results(draw), []),
        "DistillConfig": (distill, _training(150, 2.01, 0.12, 2_450_000), _metrics(150, 1.4, 0.12, 2.0, draw)),
        "SftConfig": (sft, sft_results, _metrics(240, 3.0, 0.41, 1.98, draw)),
        "EvaluateConfig": ({"thinking_budgets": [0, 8], "thinking_grace": 16}, _evaluation(), []),
        "ExportConfig": ({"save_dtype": "bfloat16"}, exported, []),
    }[stage]


def _write_entry(folder: Path, stage: str, kind: str, product: str, seconds: float) -> None:
    section, results, metrics = _content(stage, random.Random(folder.name))
    folder.mkdir(parents=True)
    recipe = {"name": "quickstart", "seed": 1, "stage": section}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "results.json").write_text(json.dumps(results))
    if metrics:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    if stage == "PrepareConfig":
        (folder / "data").mkdir()
        source = {"name": "enwiki", "category": "web", "package": "gensim", "licence": "CC-BY-SA-3.0", "tokens": 49820}
        (folder / "data" / "manifest.json").write_text(json.dumps({"sources": [source]}))
    inputs = {"init_from": {"path": f"runs/x/{folder.name}", "digest": _digest("in"), "entry": "earlier"}}
    record = {"fingerprint": _digest("f"), "recipe_digest": _digest("r"), "entry": folder.name, "stage": stage}
    record |= {"kind": kind, "product": product, "product_digest": _digest(folder.name), "product_files": {}}
    record |= {"inputs": {} if stage == "PrepareConfig" else inputs, "seconds": seconds, "finished_unix": 1.0}
    record |= {"peak_memory_bytes": int(1.1e9 + seconds * 1e6), "package_version": "0.1.0"}
    (folder / "stage.json").write_text(json.dumps(record))


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a run; `entries` maps entry names to names of stages."""

    def make(entries: Sequence[tuple[str, str]] = tuple((name, name) for name in STAGES), name: str = "run") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        order = [entry for entry, _ in entries]
        run = {"recipe_name": "quickstart", "name": "quickstart", "pipeline": "p", "order": order, "entries": {}}
        (folder / "run.json").write_text(json.dumps(run))
        for entry, stage in entries:
            _write_entry(folder / entry, *STAGES[stage])
        return folder

    return make
