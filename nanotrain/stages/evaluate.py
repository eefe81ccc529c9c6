"""Evaluation: held-out bits per byte, verifiable tasks with reasoning on and off, the thinking-budget curve, samples."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanotrain.checkpoint.config_json import STOP_IDS
from nanotrain.checkpoint.hf_folder import load_model, load_tokenizer
from nanotrain.config.stage import EvaluateConfig
from nanotrain.data.manifest import DataFolder
from nanotrain.engines import build_local_engine
from nanotrain.engines.base import Engine
from nanotrain.evaluation.budget_curve import measure_budget_curve, summarise_budget
from nanotrain.evaluation.held_out import HeldOutSums, combine_held_out, held_out_sums
from nanotrain.evaluation.prompts import build_prompts, load_validation_rows
from nanotrain.evaluation.samples import chat_samples, continue_text
from nanotrain.evaluation.tasks import (
    build_budget_responder,
    build_direct_responder,
    graded_responses,
    summarise_tasks,
)
from nanotrain.runtime.files import write_json_atomic
from nanotrain.runtime.progress import Progress
from nanotrain.runtime.run import Run
from nanotrain.runtime.seeding import derived_seed
from nanotrain.stages.training_products import RESULTS, check_vocabulary, tokenizer_folder

PRODUCT_FILE = "evaluation.json"
PROGRESS_FILE = "progress.jsonl"
HELD_OUT_TOKENS_PER_FORWARD = 4096
SAMPLES_REASONING_ON, SAMPLES_REASONING_OFF = 6, 3


def evaluate(config: EvaluateConfig, run: Run) -> Path:
    """Measure the checkpoint of `init_from` and return evaluation.json.

    Args:
        config: lengths, prompts, budgets, sampling.
        run: inputs `init_from`, `data_from`.

    Raises:
        UserError: the checkpoint and the data have different tokenizers, or too few held-out prompts.
    """
    folder, data = run.inputs["init_from"], run.inputs["data_from"]
    model = load_model(folder)
    check_vocabulary(model.config, data, "stage.init_from")
    if (folder / "tokenizer.json").is_file():
        DataFolder(data).check_tokenizer(folder)
    rows = load_validation_rows(data, config.num_prompts)
    engine = build_local_engine(run.engine, model)
    progress = Progress(run.folder / PROGRESS_FILE)
    results = {
        "held_out": _held_out(engine, data, config, progress),
        **_generations(engine, data, config, rows, progress, run.seed),
    }
    write_json_atomic(run.folder / RESULTS, results)
    write_json_atomic(run.folder / PRODUCT_FILE, results)
    return run.folder / PRODUCT_FILE


def _held_out(engine: Engine, data: Path, config: EvaluateConfig, progress: Progress) -> dict[str, Any]:
    """Score the held-out text; each category is one work item."""
    sums = {}
    for category in DataFolder(data).sources("validation"):
        item = f"held_out/{category}"
        if item not in progress:
            scored = held_out_sums(
                engine,
                data,
                category,
                sequence_length=config.sequence_length,
                micro_batch_size=max(1, HELD_OUT_TOKENS_PER_FORWARD // config.sequence_length),
                max_tokens=config.max_validation_tokens,
            )
            progress.record(item, asdict(scored))
        sums[category] = HeldOutSums(**progress[item])
    return combine_held_out(sums)


def _generations(
    engine: Engine, data: Path, config: EvaluateConfig, rows: list[dict[str, Any]], progress: Progress, seed: int
) -> dict[str, Any]:
    """Answer the prompts at every budget, without reasoning, and continue a text of each category."""
    tokenizer = load_tokenizer(tokenizer_folder(data))
    open_prompts = build_prompts(rows, tokenizer, thinking=True)
    shut_prompts = build_prompts(rows, tokenizer, thinking=False)
    batches = {"batch_size": config.generation_batch_size, "seed": derived_seed(seed, "tasks"), "progress": progress}
    with engine.inference_model() as model:
        curve = measure_budget_curve(
            lambda budget: build_budget_responder(model, tokenizer, config, budget=budget, stop_ids=STOP_IDS),
            open_prompts,
            config.thinking_budgets,
            **batches,
        )
        direct = build_direct_responder(model, tokenizer, config, stop_ids=STOP_IDS)
        answers = graded_responses(direct, shut_prompts, key="reasoning_off", **batches)
        continuations = []
        for category in DataFolder(data).sources("validation"):
            item = f"continuation/{category}"
            if item not in progress:
                sample_seed = derived_seed(seed, item)
                drawn = {"temperature": config.temperature, "top_p": config.top_p, "seed": sample_seed}
                progress.record(item, continue_text(model, tokenizer, data, category, **drawn))
            continuations.append(progress[item])
    samples = chat_samples(open_prompts, curve[None], kind="reasoning on", num_samples=SAMPLES_REASONING_ON)
    samples += chat_samples(shut_prompts, answers, kind="reasoning off", num_samples=SAMPLES_REASONING_OFF)
    return {
        "tasks": {
            "reasoning_on": summarise_tasks(open_prompts, curve[None]),
            "reasoning_off": summarise_tasks(shut_prompts, answers),
        },
        "budget_curve": [summarise_budget(budget, graded) for budget, graded in curve.items()],
        "samples": samples + [sample for sample in continuations if sample is not None],
    }
