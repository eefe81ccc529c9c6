import json
import math
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nanotrain.report.build import build_report
from nanotrain.report.run_folder import read_run

Make = Callable[..., Path]


class Page(HTMLParser):
    """Collects tags, attributes and text; checks that tags are closed in order."""

    VOID = ("meta", "link", "br", "wbr", "img", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def build(folder: Path) -> tuple[Page, dict[str, Any], str]:
    build_report(folder)
    html = (folder / "report.html").read_text()
    numbers = json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)
    return Page(html), numbers, html


def test_total_is_the_sum_of_stages(make_run: Make) -> None:
    folder = make_run()
    _, numbers, _ = build(folder)
    records = {entry.name: json.loads((entry.folder / "stage.json").read_text()) for entry in read_run(folder).entries}
    assert numbers["total_seconds"] == pytest.approx(math.fsum(record["seconds"] for record in records.values()))
    assert numbers["stages"].keys() == records.keys()
    for name, record in records.items():
        assert numbers["stages"][name]["seconds"] == record["seconds"]
        assert numbers["stages"][name]["peak_memory_bytes"] == record["peak_memory_bytes"]
        assert numbers["stages"][name]["product_digest"] == record["product_digest"]
        results = json.loads((folder / name / "results.json").read_text())
        assert numbers["stages"][name]["results"] == results


def test_quality_rows_and_plan(make_run: Make) -> None:
    page, numbers, _ = build(make_run())
    rows = {row["entry"]: row for row in numbers["quality"]}
    assert list(rows) == ["pretrain", "prune", "distill", "sft"]
    assert rows["prune"]["parameters"] == 2_450_000 and rows["prune"]["average"] == 2.9
    assert rows["distill"]["tokens"] == 150 * 4096
    plan = {row["entry"]: row for row in numbers["plan_and_actual"]}
    assert plan["sft"]["planned_steps"] == plan["sft"]["steps"] == 240
    assert plan["pretrain"]["tokens_per_second"] == 9000.0
    times = plan["distill"]["step_time"]
    assert times == pytest.approx(
        {"data": 0.02, "compute": 0.33, "communication": 0.05, "evaluation": 3.0, "save_stall": 0.06}
    )
    assert plan["sft"]["step_time"]["communication"] is None  # not measured is not zero
    assert "distill|400.0 ms|5.0%|82.5%|12.5%|3.0 s|0.1 s" in "|".join(page.text)
    differing = {(row["entry"], row["key"]): row for row in numbers["published"]}
    assert differing["pretrain", "training.learning_rate"]["published"] == 4.5e-4
    assert ("pretrain", "training.optimizer.beta2") not in differing  # equal to the published value
    assert differing["evaluate", "thinking_grace"]["published"] == 500


def test_page_shows_the_numbers_and_has_all_sections(make_run: Make) -> None:
    page, _, html = build(make_run())
    text = " ".join(" ".join(page.text).split())
    for heading in (
        "Pipeline",
        "Quality and size",
        "Training",
        "Pruning",
        "Thinking budget",
        "Evaluation",
        "Samples",
        "Blend",
        "Plan and actual",
        "Data",
        "Against the published run",
        "Versions and digests",
    ):
        assert f"<h2>{heading}</h2>" in html
    for shown in (
        "8 min 49 s",
        "2.45 M",
        "2.900",
        "42.0%",
        "kept 112 of 128",
        "3.61",
        "312,345",
        "0.00045",
        "CC-BY-SA-3.0",
    ):
        assert shown in text, shown
    assert not re.search(r"\b(nan|inf|None)\b", text)


def test_nothing_is_fetched_and_nothing_runs(make_run: Make) -> None:
    page, _, html = build(make_run())
    assert {tag for tag, _ in page.tags} & {"script", "img", "iframe", "object", "embed", "form", "base"} == set()
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src", "xlink:href", "action"):
                assert value == "data:," or (value or "").startswith("#")
    assert "http://" not in html and "https://" not in html and "url(" not in html and "@import" not in html
    links = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert links == {f"#{attributes['id']}" for tag, attributes in page.tags if tag == "section"}


def test_hostile_samples_are_text(make_run: Make) -> None:
    page, numbers, html = build(make_run())
    hostile = numbers["stages"]["evaluate"]["results"]["samples"][1]["response"]
    assert hostile in "".join(page.text)
    assert "<img" not in html and "<script" not in html


def test_hostile_names_are_text(make_run: Make) -> None:
    folder = make_run([("sft", "sft")])
    run = json.loads((folder / "run.json").read_text()) | {"name": "<img src=x onerror=alert(1)>"}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "sft").rename(folder / "<b>&'\"")
    _, _, html = build(folder)
    assert "<img" not in html and "<b>&'" not in html


def test_equal_inputs_give_equal_bytes(make_run: Make) -> None:
    first, second = make_run(name="a"), make_run(name="b")
    build(first), build(second)
    build(first)  # once more over its own output
    assert (first / "report.html").read_bytes() == (second / "report.html").read_bytes()
    assert (first / "report.json").read_bytes() == (second / "report.json").read_bytes()


@pytest.mark.parametrize("last", range(1, 8))
def test_every_beginning_of_the_pipeline_gives_a_report(make_run: Make, last: int) -> None:
    names = ["prepare", "pretrain", "prune", "distill", "sft", "evaluate", "export"][:last]
    _, numbers, _ = build(make_run([(name, name) for name in names]))
    assert list(numbers["stages"]) and numbers["complete"]


@pytest.mark.parametrize("file", ["stage.json", "recipe.yaml", "results.json", "metrics.jsonl"])
def test_any_file_may_be_missing(make_run: Make, file: str) -> None:
    folder = make_run()
    for path in folder.glob(f"*/{file}"):
        path.unlink()
    _, numbers, html = build(folder)
    assert len(numbers["stages"]) == 7
    assert numbers["complete"] is (file != "stage.json")
    assert ("Not finished" in html) is (file == "stage.json")


def test_ablations_with_several_entries_of_one_stage(make_run: Make) -> None:
    entries = [("data", "prepare"), ("big", "pretrain"), ("small-a", "prune"), ("small-b", "prune")]
    entries += [
        ("kd-a", "distill"),
        ("kd-b", "distill"),
        ("scratch", "pretrain"),
        ("ev-a", "evaluate"),
        ("ev-b", "evaluate"),
    ]
    page, numbers, _ = build(make_run(entries))
    assert [row["entry"] for row in numbers["quality"]] == ["big", "small-a", "small-b", "kd-a", "kd-b", "scratch"]
    text = "".join(page.text)
    assert all(text.count(name) >= 2 for name, _ in entries)


def test_values_that_are_not_finite_become_null(make_run: Make) -> None:
    folder = make_run([("pretrain", "pretrain")])
    results = json.loads((folder / "pretrain" / "results.json").read_text()) | {"final_loss": float("nan")}
    (folder / "pretrain" / "results.json").write_text(json.dumps(results))
    with open(folder / "pretrain" / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 401, "loss": NaN}\n{"step": 402, "loss": Infinity, "grad_norm": null}\n')
    _, numbers, _ = build(folder)
    assert numbers["stages"]["pretrain"]["results"]["final_loss"] is None
    assert all(math.isfinite(value) for _, value in numbers["stages"]["pretrain"]["curves"]["loss"])


def test_random_pruning_has_no_errors_to_plot(make_run: Make) -> None:
    folder = make_run([("prune", "prune")])
    results = json.loads((folder / "prune" / "results.json").read_text())
    results["layer_removal"] = [{"layer": 3, "kind": "-", "mse": None}]
    results["candidates"][1]["held_out"] = None
    (folder / "prune" / "results.json").write_text(json.dumps(results))
    page, _, _ = build(folder)
    assert "chosen at random: 3" in "".join(page.text)


def test_folder_with_nothing_started(make_run: Make) -> None:
    page, numbers, _ = build(make_run([]))
    assert numbers["total_seconds"] == 0 and not numbers["complete"]
    assert "no stage yet" in "".join(page.text)


def test_a_stale_report_is_replaced(make_run: Make) -> None:
    folder = make_run()
    build(folder)
    shutil.rmtree(folder / "export")
    _, numbers, _ = build(folder)
    assert "export" not in numbers["stages"]
