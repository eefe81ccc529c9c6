"""Verifiable tasks: prompts are answered, answers are checked by rule, accuracies come with an interval.

Every batch of prompts is one work item of the journal, so a killed evaluation continues where it was.
"""

import logging
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from nanotrain.config.stage import EvaluateConfig
from nanotrain.data import tasks
from nanotrain.evaluation.intervals import wilson_interval
from nanotrain.evaluation.prompts import Prompt
from nanotrain.generation.budget import THINK_CLOSE, BudgetResult, generate_with_budget
from nanotrain.generation.sampler import generate
from nanotrain.model.hybrid import HybridModel
from nanotrain.runtime.progress import Progress

logger = logging.getLogger("nanotrain")

Responder = Callable[[list[list[int]], int], list[BudgetResult]]
"""(prompts as token ids, seed) -> one response a prompt."""


def split_response(text: str) -> tuple[str, str]:
    """Return the reasoning trace and the answer: what stands before and after the first `</think>`.

    A text without the tag is all trace: the model never came to an answer.
    """
    trace, tag, answer = text.partition(THINK_CLOSE)
    return (trace, answer) if tag else (text, "")


def build_budget_responder(
    model: HybridModel,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluateConfig,
    *,
    budget: int | None,
    stop_ids: tuple[int, ...],
) -> Responder:
    """Return a responder that reasons first, for at most about `budget` tokens (None = as long as it likes)."""

    def respond(prompts: list[list[int]], seed: int) -> list[BudgetResult]:
        return generate_with_budget(
            model,
            tokenizer,
            prompts,
            budget=budget,
            grace=config.thinking_grace,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=seed,
            stop_ids=stop_ids,
        )

    return respond


def build_direct_responder(
    model: HybridModel, tokenizer: PreTrainedTokenizerBase, config: EvaluateConfig, *, stop_ids: tuple[int, ...]
) -> Responder:
    """Return a responder that answers at once, after an empty trace; greedy, as published for this mode."""

    def respond(prompts: list[list[int]], seed: int) -> list[BudgetResult]:
        continuations = generate(
            model,
            prompts,
            max_new_tokens=config.max_new_tokens,
            stop_ids=stop_ids,
            temperature=0.0,
            top_p=1.0,
            seed=seed,
        )
        results = []
        for ids in continuations:
            finished = bool(ids) and ids[-1] in stop_ids
            answer = tokenizer.decode(ids[:-1] if finished else ids)
            results.append(
                BudgetResult(
                    text=f"{THINK_CLOSE}{answer}",
                    thinking_tokens=0,
                    answer_tokens=len(ids) - finished,
                    forced=False,
                    well_formed=THINK_CLOSE not in answer,
                    finished=finished,
                )
            )
        return results

    return respond


def graded_responses(
    respond: Responder, prompts: list[Prompt], *, batch_size: int, seed: int, progress: Progress, key: str
) -> list[dict[str, Any]]:
    """Answer and grade every prompt, batch by batch; batches found in the journal are not run again.

    The seed of a batch depends on the run's seed and the place of the batch, not on the budget: budgets are then
    compared on the same draws.

    Returns:
        One dict a prompt, in order: score, thinking, answer, thinking_tokens, answer_tokens, forced, well_formed,
        finished.
    """
    graded: list[dict[str, Any]] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        item = f"{key}/{start}"
        if item not in progress:
            results = respond([prompt.input_ids for prompt in batch], seed + start)
            assert len(results) == len(batch)
            progress.record(item, [_grade(p, r) for p, r in zip(batch, results, strict=True)])
            logger.info("%s: %d of %d prompts", key, start + len(batch), len(prompts))
        graded.extend(progress[item])
    return graded


def _grade(prompt: Prompt, result: BudgetResult) -> dict[str, Any]:
    thinking, answer = split_response(result.text)
    score = float(tasks.score(prompt.row, answer))
    assert 0 <= score <= 1
    return {
        "score": score,
        "thinking": thinking,
        "answer": answer,
        "thinking_tokens": result.thinking_tokens,
        "answer_tokens": result.answer_tokens,
        "forced": result.forced,
        "well_formed": result.well_formed,
        "finished": result.finished,
    }


def accuracy(scores: list[float]) -> dict[str, Any]:
    """Return `accuracy`, `count` and the 95% `interval`."""
    mean = sum(scores) / len(scores)
    return {"accuracy": mean, "count": len(scores), "interval": list(wilson_interval(mean, len(scores)))}


def summarise_tasks(prompts: list[Prompt], graded: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the accuracy over all prompts and, under `by_task`, of each task."""
    by_task: dict[str, list[float]] = {}
    for prompt, one in zip(prompts, graded, strict=True):
        by_task.setdefault(prompt.task, []).append(one["score"])
    whole = accuracy([one["score"] for one in graded])
    return {**whole, "by_task": {task: accuracy(scores) for task, scores in sorted(by_task.items())}}
