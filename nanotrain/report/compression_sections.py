"""What pruning removed and what it cost, and how far distillation brought it back."""

from html import escape
from typing import Any

from nanotrain.report.charts import Bar, Marker, Series, bar_chart, heat_chart, line_chart
from nanotrain.report.markup import KINDS, Html, figure, grid, heading, in_order, show, show_bytes, show_count, table
from nanotrain.report.run_folder import RunRecord

KIND_COLOURS = {"M": 0, "-": 1, "*": 2}


def quality(numbers: dict[str, Any]) -> Html:
    """Return parameters and held-out quality of every checkpoint of the run."""
    rows = numbers["quality"]
    if not rows:
        return Html("")
    categories = in_order(dict.fromkeys(name for row in rows for name in row["bits_per_byte"]))
    body = [
        [
            row["entry"],
            show_count(row["parameters"]),
            show_count(row["tokens"]),
            *[f"{row['bits_per_byte'][name]:.3f}" if name in row["bits_per_byte"] else None for name in categories],
            Html(f"<b>{row['average']:.3f}</b>"),
            f"{row['loss']:.3f}",
        ]
        for row in rows
    ]
    headers = ["Checkpoint", "Parameters", "Tokens", *categories, "Mean", "Loss"]
    bars = [
        Bar(row["entry"], row["average"], title=f"{row['entry']}: {row['average']:.4f} bits per byte") for row in rows
    ]
    sizes = [
        Bar(row["entry"], row["parameters"] / 1e6, colour=1, title=f"{row['entry']}: {row['parameters']:,}")
        for row in rows
    ]
    return Html(
        table(headers, body, caption="Held-out bits per byte by category and their mean; loss in nats per token.")
        + grid(
            [
                figure(
                    bar_chart(
                        bars, label="held-out quality by checkpoint", x_label="checkpoint", y_label="bits per byte"
                    ),
                    "Held-out text",
                    "mean bits per byte over categories; lower is better",
                ),
                figure(
                    bar_chart(
                        sizes, label="parameters by checkpoint", x_label="checkpoint", y_label="million parameters"
                    ),
                    "Size",
                    "embeddings included",
                ),
            ]
        )
    )


def pruning(run: RunRecord) -> Html:
    """Return, for each pruning entry, what was measured and what was kept."""
    parts = []
    for entry in run.by_stage("PruneConfig"):
        results = entry.results
        charts = grid(
            [
                _removal_figure(results.get("layer_removal") or []),
                _hidden_figure(results),
                _ffn_figure(results),
                _heads_figure(results),
            ]
        )
        parts.append(heading(entry.name) + _before_and_after(results) + charts + _candidates(results))
    return Html("".join(parts))


def _before_and_after(results: dict[str, Any]) -> Html:
    rows = [["parameters", show_count(results["parameters_before"]), show_count(results["parameters_after"])]]
    before, after = results.get("held_out_before"), results.get("held_out_after")
    if before and after:
        rows.append(["held-out bits per byte (mean)", f"{before['average']:.3f}", f"{after['average']:.3f}"])
        rows.append(["held-out loss, nats per token", f"{before['loss']:.3f}", f"{after['loss']:.3f}"])
    return table(["", "Before", "After, not yet distilled"], rows)


def _removal_figure(removals: list[dict[str, Any]]) -> str:
    bars = [
        Bar(
            f"{row['layer']}",
            row["mse"],
            KIND_COLOURS.get(row["kind"], 3),
            title=f"layer {row['layer']} ({KINDS.get(row['kind'], row['kind'])}): {row['mse']:.4g}",
        )
        for row in removals
        if row["mse"] is not None
    ]
    present = {row["kind"] for row in removals}
    legend = [(KINDS[kind], colour) for kind, colour in KIND_COLOURS.items() if kind in present]
    chart = bar_chart(
        bars,
        label="logit error as layers are removed",
        x_label="layer removed (number in the parent, in order of removal)",
        y_label="mean squared error",
        legend=legend,
    )
    if not chart and removals:
        names = ", ".join(str(row["layer"]) for row in removals)
        return Html(f"<p>Layers removed, chosen at random: {escape(names)}.</p>")
    return figure(chart, "Layers removed", "squared error of the logits once this layer and those before it are gone")


def _falling_shares(values: list[float]) -> list[tuple[float, float]]:
    """Return (percent of channels, importance over the largest), most important first."""
    ordered = sorted(values, reverse=True)
    largest = ordered[0] if ordered and ordered[0] > 0 else 1.0
    return [(100 * (index + 1) / len(ordered), value / largest) for index, value in enumerate(ordered)]


def _hidden_figure(results: dict[str, Any]) -> str:
    values = (results.get("importance") or {}).get("hidden") or []
    kept = (results.get("kept") or {}).get("hidden") or []
    chart = line_chart(
        [Series("hidden channels", _falling_shares(values))],
        label="importance of hidden channels",
        x_label="% of channels, most important first",
        y_label="importance / largest",
        markers=[Marker(100 * len(kept) / len(values), f"kept {len(kept)} of {len(values)}")]
        if kept and values
        else [],
    )
    return figure(chart, "Hidden channels", "activation after the norms, summed over layers")


def _ffn_figure(results: dict[str, Any]) -> str:
    layers = (results.get("importance") or {}).get("ffn") or {}
    kept = (results.get("kept") or {}).get("ffn") or {}
    series = [Series(f"layer {layer}", _falling_shares(layers[layer])) for layer in _layers_shown(layers)]
    markers = []
    if kept and layers:
        layer = next(iter(kept))
        width = len(next(iter(layers.values())))
        markers = [Marker(100 * len(kept[layer]) / width, f"kept {len(kept[layer])} of {width}")]
    chart = line_chart(
        series,
        label="importance of MLP neurons by layer",
        x_label="% of neurons, most important first",
        y_label="importance / largest",
        markers=markers,
    )
    note = "activation after the squared ReLU"
    if len(layers) > len(series):
        note += f"; {len(series)} of {len(layers)} layers shown"
    return figure(chart, "MLP neurons", note)


def _layers_shown(layers: dict[str, Any], limit: int = 6) -> list[str]:
    """Return at most `limit` layers, spread over the depth."""
    names = sorted(layers, key=int)
    if len(names) <= limit:
        return names
    return [names[round(index * (len(names) - 1) / (limit - 1))] for index in range(limit)]


def _heads_figure(results: dict[str, Any]) -> str:
    layers = (results.get("importance") or {}).get("mamba_heads") or {}
    rows = [(f"layer {layer}", layers[layer]) for layer in sorted(layers, key=int)]
    chart = heat_chart(rows, label="importance of Mamba-2 heads by layer", x_label="head", y_label="")
    return figure(chart, "Mamba-2 heads", "darker is more important, within a layer")


def _candidates(results: dict[str, Any]) -> Html:
    candidates = results.get("candidates") or []
    if not candidates:
        return Html("")
    special = ("parameters", "memory_bytes", "held_out", "chosen", "fits")
    known = ("num_layers", "hidden_size", "intermediate_size", "mamba_num_heads")
    sizes = [key for key in known if key in candidates[0]]
    sizes += [key for key in candidates[0] if key not in (*known, *special)]
    rows = [
        [
            "chosen" if row.get("chosen") else "",
            *[show(row.get(key)) for key in sizes],
            show_count(row["parameters"]),
            show_bytes(row["memory_bytes"]),
            None if row.get("held_out") is None else f"{row['held_out']:.3f}",
        ]
        for row in candidates
    ]
    names = [key.replace("_", " ") for key in sizes]
    return table(
        ["", *names, "parameters", "memory", "held-out"], rows, caption="Candidates that were scored, untrained."
    )
