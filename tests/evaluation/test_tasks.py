from pathlib import Path

import pytest

from nanotrain.checkpoint.hf_folder import load_tokenizer
from nanotrain.config.stage import EvaluateConfig
from nanotrain.evaluation import tasks
from nanotrain.evaluation.prompts import Prompt
from nanotrain.evaluation.tasks import (
    accuracy,
    build_budget_responder,
    build_direct_responder,
    graded_responses,
    split_response,
    summarise_tasks,
)
from nanotrain.generation.budget import BudgetResult
from nanotrain.model.hybrid import HybridModel
from nanotrain.runtime.progress import Progress


def prompt(number: int, task: str = "addition") -> Prompt:
    return Prompt({"task": task, "answer": str(number), "messages": []}, f"q{number}", [number])


def answer(text: str) -> BudgetResult:
    return BudgetResult(f"trace\n</think>\n\n{text}", 3, 4, False, True, True)


def right(prompts: list[list[int]], seed: int) -> list[BudgetResult]:
    return [answer(f"The answer is {ids[0]}.") for ids in prompts]


class Killed(Exception):
    pass


def test_split_response() -> None:
    assert split_response("a</think>b") == ("a", "b")
    assert split_response("a</think>b</think>c") == ("a", "b</think>c")
    assert split_response("never came to it") == ("never came to it", "")


def test_grading_checks_the_answer_and_not_the_trace(tmp_path: Path) -> None:
    texts = ["</think>The answer is 0.", "The answer is 1.", "The answer is 2.</think>The answer is 9."]

    def respond(prompts: list[list[int]], seed: int) -> list[BudgetResult]:
        return [BudgetResult(text, 1, 1, True, True, False) for text in texts]

    graded = graded_responses(
        respond, [prompt(i) for i in range(3)], batch_size=3, seed=0, progress=Progress(tmp_path / "p"), key="k"
    )
    assert [one["score"] for one in graded] == [1.0, 0.0, 0.0]
    assert graded[1] == {
        "score": 0.0,
        "thinking": "The answer is 1.",
        "answer": "",
        "thinking_tokens": 1,
        "answer_tokens": 1,
        "forced": True,
        "well_formed": True,
        "finished": False,
    }


def test_a_killed_evaluation_repeats_no_finished_batch(tmp_path: Path) -> None:
    """Every batch is cut off once; the end is that of an undisturbed run, draw for draw."""
    prompts = [prompt(i) for i in range(7)]

    def drawn(ids: list[list[int]], seed: int) -> list[BudgetResult]:
        return [answer(f"The answer is {seed * 31 + i}.") for i in range(len(ids))]

    whole = graded_responses(drawn, prompts, batch_size=3, seed=5, progress=Progress(tmp_path / "a"), key="k")
    calls = []

    def dying(ids: list[list[int]], seed: int) -> list[BudgetResult]:
        calls.append(ids[0][0])
        if calls.count(ids[0][0]) == 1:
            raise Killed
        return drawn(ids, seed)

    for _ in range(3):
        with pytest.raises(Killed):
            graded_responses(dying, prompts, batch_size=3, seed=5, progress=Progress(tmp_path / "b"), key="k")
    resumed = graded_responses(dying, prompts, batch_size=3, seed=5, progress=Progress(tmp_path / "b"), key="k")
    assert resumed == whole
    assert calls == [0, 0, 3, 3, 6, 6]


def test_summary_by_task() -> None:
    prompts = [prompt(0, "b"), prompt(1, "a"), prompt(2, "b")]
    summary = summarise_tasks(prompts, [{"score": 1.0}, {"score": 0.0}, {"score": 0.0}])
    assert summary["accuracy"] == pytest.approx(1 / 3) and summary["count"] == 3
    assert list(summary["by_task"]) == ["a", "b"]
    assert summary["by_task"]["b"] == accuracy([1.0, 0.0])
    assert summary["interval"][0] < 1 / 3 < summary["interval"][1]


def evaluate_config(**changes: object) -> EvaluateConfig:
    values = {"sequence_length": 16, "num_prompts": 2, "max_new_tokens": 12, "thinking_grace": 2, "temperature": 0.7}
    return EvaluateConfig(**values | changes)


def test_budget_responder_hands_on_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    monkeypatch.setattr(tasks, "generate_with_budget", lambda *args, **kwargs: seen.update(kwargs, args=args) or [])
    config = evaluate_config(top_p=0.9)
    build_budget_responder("model", "tokenizer", config, budget=4, stop_ids=(2, 12))([[5]], 99)
    expected = {"budget": 4, "grace": 2, "max_new_tokens": 12, "temperature": 0.7, "top_p": 0.9, "seed": 99}
    assert seen == expected | {"stop_ids": (2, 12), "args": ("model", "tokenizer", [[5]])}


def test_direct_responder_is_greedy_and_counts(monkeypatch: pytest.MonkeyPatch, data_folder: Path) -> None:
    tokenizer = load_tokenizer(data_folder / "tokenizer")
    settings = {}

    def scripted(model: object, prompts: list[list[int]], **kwargs: object) -> list[list[int]]:
        settings.update(kwargs)
        said = ("\n\nThe answer is 3.", "no end", "x</think>y", "")
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in said]
        return [[*ids[0], 12], ids[1], [*ids[2], 2], [2]]

    monkeypatch.setattr(tasks, "generate", scripted)
    respond = build_direct_responder("model", tokenizer, evaluate_config(), stop_ids=(2, 11, 12))
    results = respond([[1], [2], [3], [4]], 0)
    assert settings["temperature"] == 0.0
    assert [result.finished for result in results] == [True, False, True, True]
    assert [result.well_formed for result in results] == [True, True, False, True]
    assert split_response(results[0].text) == ("", "\n\nThe answer is 3.")
    assert [result.answer_tokens for result in results][1:] == [6, 9, 0]  # `th` is one token
    assert all(result.thinking_tokens == 0 for result in results)


def test_real_model_gives_responses_within_limits(model: HybridModel, data_folder: Path) -> None:
    tokenizer = load_tokenizer(data_folder / "tokenizer")
    ids = tokenizer.encode("12 + 5<think>\n", add_special_tokens=False)
    results = build_budget_responder(model, tokenizer, evaluate_config(), budget=1, stop_ids=(2,))([ids, ids], 3)
    assert all(result.thinking_tokens <= 3 and result.answer_tokens <= 12 for result in results)
    assert all(result.forced for result in results)
