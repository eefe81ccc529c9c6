from pathlib import Path

import pytest

from nanotrain.evaluation.budget_curve import curve_budgets, measure_budget_curve, summarise_budget
from nanotrain.evaluation.prompts import Prompt
from nanotrain.evaluation.tasks import Responder
from nanotrain.generation.budget import BudgetResult
from nanotrain.runtime.progress import Progress

PROMPTS = [Prompt({"task": "addition", "answer": str(i), "messages": []}, f"q{i}", [i]) for i in range(4)]


def scripted(log: list[tuple[int | None, int, int]]):
    """Prompt i wants 4 i tokens of thought; it is right when it may finish them, and closes twice when cut at 0."""

    def responder_for(budget: int | None) -> Responder:
        def respond(prompts: list[list[int]], seed: int) -> list[BudgetResult]:
            log.append((budget, len(prompts), seed))
            results = []
            for (i,) in prompts:
                forced = budget is not None and 4 * i > budget
                text = f"t</think>The answer is {'wrong' if forced else i}." + ("</think>" if budget == 0 else "")
                thought = budget if forced else 4 * i
                results.append(BudgetResult(text, thought, 10 if forced else 5, forced, budget != 0, True))
            return results

        return respond

    return responder_for


def test_budgets_rise_and_end_unlimited() -> None:
    assert curve_budgets([32, 0, 8, 8]) == [0, 8, 32, None]
    assert curve_budgets([]) == [None]


def test_curve_of_a_scripted_model(tmp_path: Path) -> None:
    log: list[tuple[int | None, int, int]] = []
    progress = Progress(tmp_path / "progress.jsonl")
    curve = measure_budget_curve(scripted(log), PROMPTS, [8, 0], batch_size=3, seed=100, progress=progress)
    points = [summarise_budget(budget, graded) for budget, graded in curve.items()]
    assert [point["budget"] for point in points] == [0, 8, None]
    # At 0 prompt 0 alone thinks to its end, but its answer stands before a second tag.
    assert [point["accuracy"] for point in points] == [0.0, 0.75, 1.0]
    assert [point["well_formed"] for point in points] == [0.0, 1.0, 1.0]
    assert [point["forced"] for point in points] == [0.75, 0.25, 0.0]
    assert [point["thinking_tokens"] for point in points] == [0.0, 5.0, 6.0]
    assert [point["answer_tokens"] for point in points] == [8.75, 6.25, 5.0]
    assert all(point["count"] == 4 and len(point["interval"]) == 2 for point in points)
    # Seeds belong to the place of a batch, so that budgets are compared on equal draws.
    assert {seed for _, _, seed in log} == {100, 103}
    assert [(size, seed) for budget, size, seed in log if budget == 8] == [(3, 100), (1, 103)]


def test_finished_batches_are_not_repeated(tmp_path: Path) -> None:
    log: list[tuple[int | None, int, int]] = []
    first = measure_budget_curve(
        scripted(log), PROMPTS, [0], batch_size=3, seed=1, progress=Progress(tmp_path / "p.jsonl")
    )
    lines = (tmp_path / "p.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "p.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:20])  # killed while writing the last batch
    log.clear()
    again = measure_budget_curve(
        scripted(log), PROMPTS, [0], batch_size=3, seed=1, progress=Progress(tmp_path / "p.jsonl")
    )
    assert again == first
    assert log == [(None, 1, 4)]


def test_summary_needs_no_budget() -> None:
    one = {
        "score": 1.0,
        "thinking_tokens": 2,
        "answer_tokens": 4,
        "well_formed": True,
        "forced": False,
        "finished": True,
    }
    other = one | {"score": 0.0, "well_formed": False, "answer_tokens": 8}
    point = summarise_budget(None, [one, other])
    assert point["budget"] is None and point["well_formed"] == 0.5 and point["answer_tokens"] == 6.0
    assert point["accuracy"] == pytest.approx(0.5)
