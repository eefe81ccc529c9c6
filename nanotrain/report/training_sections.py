"""Loss curves and data blends of the training stages."""

from typing import Any

from nanotrain.report.charts import Bar, Series, bar_chart, line_chart
from nanotrain.report.markup import Html, colour_of, figure, grid, heading, in_order, table
from nanotrain.report.run_folder import EntryRecord, RunRecord

LOSS_NAMES = {
    "PretrainConfig": "cross-entropy, nats per token",
    "DistillConfig": "forward KL, nats per token",
    "SftConfig": "cross-entropy of assistant turns, nats per token",
}
HELD_OUT = "held_out/"
"""Prefix of held-out metrics in metrics.jsonl: held_out/loss, held_out/average, held_out/bits_per_byte/<category>."""


def loss_curves(run: RunRecord, numbers: dict[str, Any]) -> Html:
    """Return, for each training stage, its loss and its held-out quality over the steps."""
    parts = []
    for entry in run.entries:
        if entry.stage not in LOSS_NAMES:
            continue
        curves = numbers["stages"][entry.name]["curves"]
        charts = grid([_loss_figure(entry, curves), _held_out_figure(curves), _rate_figure(curves)])
        if charts:
            parts.append(heading(entry.name) + charts)
    return Html("".join(parts))


def _loss_figure(entry: EntryRecord, curves: dict[str, list[tuple[float, float]]]) -> str:
    series = [Series("training", curves.get("loss", []))]
    held_out = curves.get(f"{HELD_OUT}loss", [])
    if held_out and entry.stage == "PretrainConfig":  # elsewhere the two losses are not of one kind
        series.append(Series("held-out text", held_out, marked=True))
    what = LOSS_NAMES[entry.stage]
    return figure(line_chart(series, label=f"{entry.name}: {what}", x_label="step", y_label="loss"), "Loss", what)


def _held_out_figure(curves: dict[str, list[tuple[float, float]]]) -> str:
    prefix = f"{HELD_OUT}bits_per_byte/"
    series = [
        Series(name, curves[prefix + name], marked=True, colour=colour_of(name))
        for name in in_order(key.removeprefix(prefix) for key in curves if key.startswith(prefix))
    ]
    chart = line_chart(series, label="held-out bits per byte by category", x_label="step", y_label="bits per byte")
    return figure(chart, "Held-out text", "bits per byte by category; lower is better")


def _rate_figure(curves: dict[str, list[tuple[float, float]]]) -> str:
    rate = line_chart(
        [Series("learning rate", curves.get("lr", []), colour=2)],
        label="learning rate over steps",
        x_label="step",
        y_label="learning rate",
    )
    norm = line_chart(
        [Series("gradient norm", curves.get("grad_norm", []), colour=3)],
        label="gradient norm over steps",
        x_label="step",
        y_label="L2 norm",
    )
    return figure(rate, "Learning rate") + figure(norm, "Gradient norm", "before clipping")


def blend(run: RunRecord) -> Html:
    """Return what each stage read: realised shares by source, and the curriculum that asked for them."""
    parts = []
    for entry in run.entries:
        stage = entry.recipe.get("stage", {})
        phases = stage.get("curriculum") or []
        shares = entry.results.get("blend") or {}
        charts = grid([_curriculum_figure(entry.name, phases), _share_figure(entry.name, shares)])
        rows = [[name.replace("_", " "), value] for name, value in (entry.results.get("sft") or {}).items()]
        content = charts + table(["Chat rows as trained on", ""], rows)
        if content:
            parts.append(heading(entry.name) + content)
    return Html("".join(parts))


def _share_figure(name: str, shares: dict[str, float]) -> str:
    if len(shares) < 2:
        return Html("")
    bars = [Bar(one, 100 * shares[one], title=f"{one}: {100 * shares[one]:.2f}%") for one in in_order(sorted(shares))]
    chart = bar_chart(bars, label=f"{name}: realised blend", x_label="source", y_label="% of tokens")
    return figure(chart, "Realised blend", "share of the tokens that were trained on")


def _curriculum_figure(name: str, phases: list[dict[str, Any]]) -> str:
    if len(phases) < 2:
        return ""
    sources = in_order(sorted({source for phase in phases for source in phase["weights"]}))
    series = []
    for source in sources:
        points, start = [], 0.0
        for phase in phases:
            share = 100 * phase["weights"].get(source, 0.0) / sum(phase["weights"].values())
            points += [(100 * start, share), (100 * phase["until"], share)]
            start = phase["until"]
        series.append(Series(source, points, colour=colour_of(source)))
    chart = line_chart(series, label=f"{name}: curriculum", x_label="% of the stage's tokens", y_label="% of the blend")
    return figure(chart, "Curriculum", "weights by phase, as planned")
