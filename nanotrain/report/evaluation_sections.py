"""Held-out quality of the evaluated model, verifiable tasks, the thinking-budget curve, and samples."""

from html import escape
from typing import Any

from nanotrain.report.charts import Bar, Series, bar_chart, line_chart
from nanotrain.report.markup import (
    Html,
    figure,
    grid,
    heading,
    in_order,
    paragraph,
    show_interval,
    show_share,
    table,
)
from nanotrain.report.run_folder import RunRecord

MODES = {"reasoning_on": "reasoning on", "reasoning_off": "reasoning off"}


def budget_curve(run: RunRecord) -> Html:
    """Return accuracy, lengths and well-formedness by thinking budget, for each evaluation."""
    parts = []
    for entry in run.by_stage("EvaluateConfig"):
        points = entry.results.get("budget_curve") or []
        if points:
            parts.append(heading(entry.name) + _curve_charts(points) + _curve_table(points))
    if parts:
        text = (
            "Reasoning is cut at the first newline after the budget. A response is well-formed when it holds exactly"
            " one closing tag; answers should not grow to make up for a short trace."
        )
        parts.insert(0, paragraph(text))
    return Html("".join(parts))


def _curve_charts(points: list[dict[str, Any]]) -> Html:
    ticks = [(float(i), "none" if p["budget"] is None else str(p["budget"])) for i, p in enumerate(points)]
    x_label = "thinking budget, tokens (none = unlimited)"

    def series(name: str, key: str, scale: float = 1.0) -> Series:
        return Series(name, [(float(i), scale * p[key]) for i, p in enumerate(points)], marked=True)

    whiskers = [
        (float(i), 100 * p["interval"][0], 100 * p["interval"][1]) for i, p in enumerate(points) if p.get("interval")
    ]
    longest = max(max(p["answer_tokens"], p["thinking_tokens"]) for p in points)
    highest = max([100 * p["accuracy"] for p in points] + [high for *_, high in whiskers])
    accuracy = Series("accuracy", series("", "accuracy", 100).points, marked=True, whiskers=whiskers)
    charts = [
        figure(
            line_chart(
                [accuracy],
                label="accuracy by budget",
                x_label=x_label,
                y_label="% correct",
                y_range=(0.0, 1.06 * highest or 1.0),
                x_ticks=ticks,
            ),
            "Accuracy",
            "with 95% intervals" if whiskers else "",
        ),
        figure(
            line_chart(
                [series("answer", "answer_tokens"), series("thinking", "thinking_tokens")],
                label="response length by budget",
                x_label=x_label,
                y_label="mean tokens",
                y_range=(0.0, 1.06 * longest or 1.0),
                x_ticks=ticks,
            ),
            "Length",
            "mean tokens of answer and trace",
        ),
        figure(
            line_chart(
                [series("well-formed", "well_formed", 100)],
                label="well-formed responses by budget",
                x_label=x_label,
                y_label="% of responses",
                y_range=(0.0, 104.0),
                x_ticks=ticks,
            ),
            "Well-formed",
            "responses with exactly one closing tag",
        ),
    ]
    return grid(charts, columns=3)


def _curve_table(points: list[dict[str, Any]]) -> Html:
    rows = [
        [
            "unlimited" if point["budget"] is None else point["budget"],
            show_share(point["accuracy"]),
            show_interval(point.get("interval")),
            f"{point['thinking_tokens']:.1f}",
            f"{point['answer_tokens']:.1f}",
            show_share(point["well_formed"]),
            show_share(point.get("forced")),
            show_share(point.get("finished")),
        ]
        for point in points
    ]
    headers = ["Budget", "Accuracy", "95%", "Thinking", "Answer", "Well-formed", "Cut", "Ended by itself"]
    return table(headers, rows)


def tasks(run: RunRecord) -> Html:
    """Return accuracies on verifiable tasks, with reasoning on and off, for each evaluation."""
    parts = []
    for entry in run.by_stage("EvaluateConfig"):
        modes = entry.results.get("tasks") or {}
        if not modes:
            continue
        names = sorted({name for mode in modes.values() for name in mode.get("by_task") or {}})
        rows: list[list[Any]] = []
        for name in names:
            row: list[Any] = [name.replace("_", " ")]
            for mode in MODES:
                one = (modes.get(mode, {}).get("by_task") or {}).get(name)
                row += _accuracy_cells(one)
            rows.append(row)
        rows.append([Html("<b>all</b>"), *[cell for mode in MODES for cell in _accuracy_cells(modes.get(mode))]])
        headers = ["Task", *[text for mode in MODES.values() for text in (mode.capitalize(), "95%", "prompts")]]
        parts.append(heading(entry.name) + _held_out_bars(entry.results) + table(headers, rows))
    return Html("".join(parts))


def _accuracy_cells(one: Any) -> list[Any]:
    """Return accuracy, interval and count; a plain number has only the first."""
    if one is None:
        return [None, None, None]
    if isinstance(one, (int, float)):
        return [show_share(float(one)), None, None]
    return [show_share(one["accuracy"]), show_interval(one.get("interval")), one.get("count")]


def _held_out_bars(results: dict[str, Any]) -> Html:
    held_out = results.get("held_out")
    if not held_out:
        return Html("")
    bits = held_out["bits_per_byte"]
    bars = [Bar(name, bits[name], title=f"{name}: {bits[name]:.4f}") for name in in_order(bits)]
    chart = bar_chart(bars, label="held-out bits per byte", x_label="category", y_label="bits per byte")
    return grid([figure(chart, "Held-out text", f"bits per byte; mean {held_out['average']:.3f}; lower is better")])


def samples(run: RunRecord) -> Html:
    """Return real generations, as they came."""
    parts = []
    for entry in run.by_stage("EvaluateConfig"):
        shown = [_sample(one) for one in entry.results.get("samples") or []]
        if shown:
            parts.append(heading(entry.name) + "".join(shown))
    return Html("".join(parts))


def _sample(one: dict[str, Any]) -> str:
    labels = [str(one[key]).replace("_", " ") for key in ("kind", "source") if one.get(key)]
    if one.get("score") is not None:
        labels.append("correct" if one["score"] >= 1 else "wrong")
    tags = "".join(f"<span>{escape(label)}</span>" for label in labels)
    thinking = f'<pre class="thinking">{escape(str(one["thinking"]).strip())}</pre>' if one.get("thinking") else ""
    return (
        f'<article><header>{tags}</header><pre class="prompt">{escape(str(one["prompt"]).strip())}</pre>{thinking}'
        f"{_response(str(one['response']).strip())}</article>"
    )


def _response(text: str) -> str:
    return f"<pre>{escape(text)}</pre>" if text else "<p>no answer</p>"
