"""Accuracy, answer length and well-formedness against the thinking budget (paper section 3.4, figure 5).

Before training on truncated traces, a short budget makes the model close its trace a second time and lengthen its
answer to make up for the cut; the curve shows whether that is cured.
"""

from collections.abc import Callable
from typing import Any

from nanotrain.evaluation.prompts import Prompt
from nanotrain.evaluation.tasks import Responder, accuracy, graded_responses
from nanotrain.runtime.progress import Progress


def curve_budgets(budgets: list[int]) -> list[int | None]:
    """Return the budgets in rising order without repeats, and None (unlimited) at the end."""
    return [*sorted(set(budgets)), None]


def measure_budget_curve(
    responder_for: Callable[[int | None], Responder],
    prompts: list[Prompt],
    budgets: list[int],
    *,
    batch_size: int,
    seed: int,
    progress: Progress,
) -> dict[int | None, list[dict[str, Any]]]:
    """Answer all prompts at every budget and without one.

    Returns:
        The graded responses (`tasks.graded_responses`) by budget, in rising order, None last.
    """
    return {
        budget: graded_responses(
            responder_for(budget),
            prompts,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
            key=f"budget/{'unlimited' if budget is None else budget}",
        )
        for budget in curve_budgets(budgets)
    }


def summarise_budget(budget: int | None, graded: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one point of the curve; lengths are mean tokens, `well_formed`, `forced` and `finished` are shares.

    A response is well-formed when it holds exactly one `</think>`, the model's own or a forced one.
    """

    def mean(name: str) -> float:
        return sum(float(one[name]) for one in graded) / len(graded)

    names = ("thinking_tokens", "answer_tokens", "well_formed", "forced", "finished")
    return {"budget": budget, **accuracy([one["score"] for one in graded]), **{name: mean(name) for name in names}}
