"""Axes that read well and marks that stand where the numbers say."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fewmask.report.plot import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Series,
    forest,
    histogram,
    line_chart,
    log_ticks,
    nice_ticks,
    span,
    standalone,
    thin,
    tick_texts,
)
from fewmask.report.wording import counted, duration, fixed, size


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_inside_the_range(low: float, reach: float) -> None:
    ticks = nice_ticks(low, low + reach)
    slack = 1e-6 * (reach + abs(low))
    assert 2 <= len(ticks) <= 7
    assert all(low - slack <= tick <= low + reach + slack for tick in ticks)


@given(st.floats(1e-8, 1e6), st.floats(2.0, 1e8))
def test_logarithmic_ticks_are_inside_the_range(low: float, ratio: float) -> None:
    ticks = log_ticks(low, low * ratio)
    assert len(ticks) >= 1
    assert all(low * 0.99 <= tick <= low * ratio * 1.01 for tick in ticks)


@pytest.mark.parametrize(
    ("ticks", "texts"),
    [
        ([0, 0.25, 0.5], ["0.00", "0.25", "0.50"]),
        ([0, 5e-4, 1e-3], ["0", "5e-4", "1e-3"]),
        ([0, 500, 1000], ["0", "500", "1,000"]),
        ([0, 0.0025], ["0", "2.5e-3"]),
    ],
)
def test_texts_of_an_axis_share_their_form(ticks: list[float], texts: list[str]) -> None:
    assert tick_texts(ticks) == texts


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.booleans())
@example([5e-324], True)  # half of it is zero
def test_an_axis_holds_its_values_even_if_they_are_all_the_same(values: list[float], log: bool) -> None:
    axis = span(values, "x", log=log)
    assert axis.low < axis.high
    assert axis.low <= min(values)
    assert max(values) <= axis.high
    assert axis.ticks()


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=700))
def test_thinning_keeps_the_mean_and_the_extremes(values: list[float]) -> None:
    points = [(float(i), v) for i, v in enumerate(values)]
    means, band, stride = thin(points, limit=50)
    assert len(means) <= 50
    if stride == 1:
        assert means == points
        return
    weights = [min(stride, len(values) - i) for i in range(0, len(values), stride)]
    assert sum(w * y for w, (_, y) in zip(weights, means, strict=True)) == pytest.approx(math.fsum(values), abs=1e-6)
    assert max(high for _, _, high in band) == max(values)
    assert min(low for _, low, _ in band) == min(values)


def test_a_line_runs_from_corner_to_corner() -> None:
    svg = line_chart("t", [Series("s", [(0, 0), (10, 1)])], Axis(0, 10, "x"), Axis(0, 1, "y"))
    assert f'points="{LEFT},{HEIGHT - BOTTOM} {WIDTH - RIGHT},{TOP}"' in svg


def test_a_histogram_counts_every_value_once() -> None:
    values = [0.0, 0.04, 0.05, 0.5, 0.999, 1.0, 1.0]
    svg = histogram("t", values, "Dice", "images")
    counts = [int(n) for n in re.findall(r": (\d+) images</title>", svg)]
    assert len(counts) == 20
    assert (sum(counts), counts[0], counts[1], counts[-1]) == (7, 2, 1, 3)
    assert "median 0.500" in svg


def test_texts_in_a_chart_are_escaped() -> None:
    svg = line_chart("<b>", [Series("<i>", [(0, 0), (1, 1)])], Axis(0, 1, "<x>"), Axis(0, 1, "<y>"), best=(1, 1, "<u>"))
    assert not set(re.findall(r"<(\w+)", svg)) & {"b", "i", "x", "y", "u"}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.42, "8.4 s"), (59.99, "1 min"), (200, "3 min 20 s"), (3599.8, "1 h"), (5549, "1 h 32 min"), (None, "–")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_numbers_as_words() -> None:
    assert (counted(1, "image"), counted(2594, "image")) == ("1 image", "2,594 images")
    assert (size(9_412_000), size(94_000)) == ("9.4 MB", "94 kB")
    assert (fixed(float("nan"), 3), fixed(None, 3), fixed("0.5", 2)) == ("–", "–", "0.50")


NUMBERS = st.floats(-50, 50).map(lambda value: round(value, 2))
INTERVALS = st.tuples(NUMBERS, NUMBERS, NUMBERS).map(lambda three: tuple(sorted(three)))
NAMES = ["kd", "m2bf & <decisions>", "alone"]
SVG = "{http://www.w3.org/2000/svg}"


@given(st.lists(st.dictionaries(st.sampled_from(NAMES), INTERVALS), min_size=1, max_size=3))
def test_a_forest_stands_on_the_side_of_zero_that_its_numbers_say(panels: list[dict]) -> None:
    chart = standalone(forest("gains", NAMES, [(str(i), found) for i, found in enumerate(panels)], "points"))
    tree = ElementTree.fromstring(chart).find(f"{SVG}g[@class='chart']")
    assert tree is not None
    # A panel holds one line at zero, and its rows follow that line.
    zero, shown, drawn = 0.0, [], iter([(name, *found[name]) for found in panels for name in found])
    for element in tree:
        if element.tag == f"{SVG}line" and element.get("class") == "axis":
            zero = float(element.attrib["x1"])
        if element.tag == f"{SVG}g":
            name, low, value, high = next(drawn)
            whisker, dot = element.find(f"{SVG}line"), element.find(f"{SVG}circle")
            assert whisker is not None
            assert dot is not None
            x0, x1, at = float(whisker.attrib["x1"]), float(whisker.attrib["x2"]), float(dot.attrib["cx"])
            assert x0 <= at <= x1
            for number, place in ((low, x0), (value, at), (high, x1)):
                assert (place - zero) * number >= -0.1 * abs(number)
            assert element.get("class") == ("above" if low > 0 else "below" if high < 0 else "around")
            row = next(text for text in tree.iter(f"{SVG}text") if text.text == name)
            assert abs(float(row.attrib["y"]) - float(dot.attrib["cy"])) < 8
            shown.append(name)
    assert len(shown) == sum(map(len, panels))
