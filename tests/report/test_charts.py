import re
import xml.etree.ElementTree as ET

import pytest

from nanotrain.report.charts import HEIGHT, WIDTH, Bar, Marker, Series, bar_chart, heat_chart, line_chart, thin

NAN, INF = float("nan"), float("inf")


def parse(chart: str) -> ET.Element:
    return ET.fromstring(f"<div>{chart}</div>")


def test_line_goes_through_the_scaled_points() -> None:
    chart = line_chart([Series("loss", [(0, 0), (1, 10), (2, 0)])], label="l", x_label="x", y_label="y")
    path = re.search(r'd="M([\d. ]+)L([\d. ]+)L([\d. ]+)"', chart)
    assert path is not None
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, part.split())) for part in path.groups())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11) and x0 < x1
    assert y0 == y2 > y1
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in ((x0, y0), (x1, y1), (x2, y2)))


def test_points_that_are_not_finite_are_left_out() -> None:
    chart = line_chart([Series("a", [(0, 1), (1, NAN), (2, INF), (3, 2)])], label="l", x_label="x", y_label="y")
    assert "nan" not in chart and "inf" not in chart
    assert line_chart([Series("a", [(0, NAN)])], label="l", x_label="x", y_label="y") == ""
    assert bar_chart([Bar("a", NAN)], label="l", x_label="x", y_label="y") == ""


def test_one_point_and_constants_are_drawn() -> None:
    for points in ([(5, 1)], [(0, 0), (1, 0)], [(0, 1e-30), (1, 2e-30)]):
        parse(line_chart([Series("a", points)], label="l", x_label="x", y_label="y"))


def test_everything_is_escaped_and_well_formed() -> None:
    evil = '<b a="1">&'
    charts = [
        line_chart([Series(evil, [(0, 1), (1, 2)]), Series("b", [(0, 2)])], label=evil, x_label=evil, y_label=evil),
        line_chart([Series("a", [(0, 1)])], label="l", x_label="x", y_label="y", markers=[Marker(0, evil)]),
        bar_chart([Bar(evil, 1.0, title=evil)], label=evil, x_label=evil, y_label=evil, legend=[(evil, 0), ("b", 1)]),
        heat_chart([(evil, [0.0, 1.0])], label=evil, x_label=evil, y_label=evil),
    ]
    for chart in charts:
        texts = [text for element in parse(chart).iter() for text in (element.text, element.get("aria-label")) if text]
        assert any(evil in text for text in texts)


def test_bars_keep_their_proportion() -> None:
    root = parse(bar_chart([Bar("a", 1.0), Bar("b", 3.0)], label="l", x_label="x", y_label="y"))
    heights = [float(rect.attrib["height"]) for rect in root.iter("rect")]
    assert heights[1] / heights[0] == pytest.approx(3, rel=0.01)


def test_legend_only_for_several_series() -> None:
    one, two = Series("a", [(0, 1)]), Series("b", [(0, 2)])
    assert "legend" not in line_chart([one], label="l", x_label="x", y_label="y")
    assert "legend" in line_chart([one, two], label="l", x_label="x", y_label="y")


def test_thin_keeps_the_mean_the_end_and_the_limit() -> None:
    points = [(float(i), float(i % 7)) for i in range(5000)]
    kept = thin(points, 100)
    assert len(kept) <= 100 and kept[-1] == points[-1]
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert sum(y for _, y in kept) / len(kept) == pytest.approx(3.0, abs=0.1)
    assert thin(points[:50], 100) == points[:50]


def test_heat_rows_may_differ_and_hold_zeros() -> None:
    root = parse(heat_chart([("a", [0, 0]), ("b", [1.0, NAN, 3.0])], label="l", x_label="x", y_label="y"))
    assert len(list(root.iter("rect"))) == 5
