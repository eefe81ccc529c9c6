"""The first screen: what was made, how good it is, what it cost."""

from html import escape
from typing import Any

from nanotrain.report.markup import (
    ABSENT,
    Html,
    show,
    show_bytes,
    show_count,
    show_digest,
    show_seconds,
    show_share,
    table,
)
from nanotrain.report.run_folder import RunRecord


def summary(run: RunRecord, numbers: dict[str, Any]) -> Html:
    """Return one sentence and the headline figures."""
    tiles = [
        ("Wall clock", show_seconds(numbers["total_seconds"]), f"{len(run.entries)} stages"),
        ("Peak memory", show_bytes(numbers["peak_memory_bytes"]), "largest resident set of a stage"),
    ]
    quality = numbers["quality"]
    if quality:
        first, last = quality[0], quality[-1]
        shrunk = last["parameters"] / first["parameters"]
        note = f"{show_share(shrunk)} of {show_count(first['parameters'])}" if shrunk != 1 else f"after {last['entry']}"
        tiles.append(("Parameters", show_count(last["parameters"]), note))
        tiles.append(("Held-out text", f"{last['average']:.3f}", f"bits per byte, after {last['entry']}"))
    for entry in run.by_stage("EvaluateConfig"):
        tasks = entry.results.get("tasks", {}).get("reasoning_on")
        if tasks:
            tiles.append(("Verifiable tasks", show_share(tasks["accuracy"]), f"reasoning on, {entry.name}"))
            break
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in tiles
    )
    return Html(f'<p class="lead">{escape(_sentence(run, numbers))}</p><dl class="tiles">{cells}</dl>')


def _sentence(run: RunRecord, numbers: dict[str, Any]) -> str:
    stages = ", ".join(entry.name for entry in run.entries) or "no stage yet"
    state = "Finished" if numbers["complete"] else "Unfinished"
    words = f"{state}: {stages}."
    tokens = sum(row["tokens"] for row in numbers["plan_and_actual"])
    if tokens:
        words += f" {show_count(tokens)} tokens of training in all."
    unfinished = [entry.name for entry in run.entries if not entry.is_finished]
    if unfinished:
        words += f" Not finished: {', '.join(unfinished)}; the numbers below are those so far."
    return words


def pipeline(run: RunRecord, numbers: dict[str, Any]) -> Html:
    """Return the table of stages."""
    total = numbers["total_seconds"]
    rows = []
    for name, stage in numbers["stages"].items():
        sources = ", ".join(
            f"{key.removesuffix('_from')}: {source['entry'] or source['path']}"
            for key, source in sorted(stage["inputs"].items())
        )
        share = stage["seconds"] / total if total else 0.0
        rows.append(
            [
                Html(f"<b>{escape(name)}</b>"),
                sources or ABSENT,
                stage["kind"] or "unfinished",
                show_seconds(stage["seconds"]),
                Html(f'{100 * share:.0f}%<span class="share" style="--share:{share:.3f}"></span>'),
                show_bytes(stage["peak_memory_bytes"]),
                Html(show_digest(stage["product_digest"])),
            ]
        )
    if not rows:
        return Html("")
    total_row = [Html("<b>total</b>"), "", "", Html(f"<b>{show_seconds(total)}</b>"), "", _total_memory(numbers), ""]
    headers = ["Stage", "Made from", "Product", "Time", "Share", "Peak memory", "Digest"]
    return table(headers, [*rows, total_row], text_columns=3)


def _total_memory(numbers: dict[str, Any]) -> Html:
    return Html(f"<b>{escape(show_bytes(numbers['peak_memory_bytes']))}</b>")


def plan_and_actual(numbers: dict[str, Any]) -> Html:
    """Return the table of planned and realised budgets of the training stages."""
    rows = [
        [
            row["entry"],
            f"{show(row['steps'])} of {show(row['planned_steps'])}",
            f"{show(row['tokens'])} of {show(row['planned_tokens'])}",
            row["skipped_steps"],
            show_seconds(row["seconds"]),
            None if row["tokens_per_second"] is None else round(row["tokens_per_second"]),
            row["final_loss"],
        ]
        for row in numbers["plan_and_actual"]
    ]
    headers = ["Stage", "Steps", "Tokens", "Skipped", "Time", "Tokens/s (median)", "Final loss"]
    return Html(table(headers, rows) + _step_times(numbers))


def _step_times(numbers: dict[str, Any]) -> Html:
    """Return the table of where the steps' time went, on the first rank."""
    rows = []
    for row in numbers["plan_and_actual"]:
        parts = row["step_time"]
        if parts is None:
            continue
        step = sum(parts[name] or 0.0 for name in ("data", "compute", "communication"))
        shares = [
            show_share(parts[name] / step if step and parts[name] is not None else None)
            for name in ("data", "compute", "communication")
        ]
        apart = [show_seconds(parts[name]) for name in ("evaluation", "save_stall")]
        rows.append([row["entry"], f"{1000 * step:.1f} ms", *shares, *apart])
    headers = ["Stage", "Step (mean)", "Waiting for data", "Computing", "Waiting for ranks", "Evaluating", "Saving"]
    return table(headers, rows, caption="Where the time of a step went; evaluating and saving, in all, are apart.")
