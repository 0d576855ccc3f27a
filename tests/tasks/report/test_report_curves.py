from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tasks.report.svg import HEIGHT, WIDTH, describe, draw, draw_bars, exact_axis, round_axis


@pytest.mark.parametrize("values, labels", [
    ([0, 5.8], ["0", "2", "4", "6"]), ([0, 3e-4], ["0", "1e-4", "2e-4", "3e-4"]), ([2e5, 1.6e7], ["0", "5M", "10M", "15M", "20M"]),
    ([3, 3], ["2.0", "2.5", "3.0", "3.5", "4.0"]), ([0, 0], ["-1.0", "-0.5", "0", "0.5", "1.0"]), ([-1, 0], ["-1.0", "-0.5", "0"]),
])  # fmt: skip
def test_ticks_are_round_and_told_apart(values: list[float], labels: list[str]) -> None:
    assert list(round_axis(values, 4).labels) == labels


def test_no_tick_lies_between_two_steps() -> None:
    assert list(exact_axis([0, 1, 2], 5).labels) == ["0", "1", "2"]
    assert list(exact_axis([0, 9_999], 5).labels) == ["0", "2,000", "4,000", "6,000", "8,000"]


def coordinates(svg: str) -> list[tuple[float, float]]:
    lines = "".join(re.findall(r'class="(?:line|raw)" d="([^"]*)"', svg))
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](\S+?) ([^ML]+)", lines)]


@given(st.lists(st.tuples(st.floats(width=64), st.floats(width=64)), max_size=60))
@example([(0.0, -1.7e308), (1.0, 1.7e308), (2.0, 3.0)])  # a span beyond float64
@example([(-1.7e308, 0.0), (1.7e308, 1.0), (3.0, 1.0)])
@example([(0.0, 0.0), (5e-324, 5e-324)])
@example([(1e16, 1e16), (1e16 + 2, 1e16 + 2)])
def test_any_points_give_valid_svg_within_its_canvas(points: list[tuple[float, float]]) -> None:
    svg = draw("a <b>", points, "x & y")
    assert describe(points)
    if svg:
        ElementTree.fromstring(svg)
        assert "nan" not in svg
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in coordinates(svg))


def test_ten_thousand_points_are_thinned_and_the_spike_stays() -> None:
    points = [(float(i), 2.0 + (i * 37 % 100) / 100) for i in range(10_000)]
    points[7_012] = (7_012.0, 50.0)  # in the middle of its column of pixels, where every n-th point would miss it
    svg = draw("loss", points, "")
    assert len(coordinates(svg)) < 2 * 4 * WIDTH
    assert len(svg) < 40_000
    assert min(y for _, y in coordinates(svg)) == pytest.approx(round_axis([2.0, 50.0], 4).place(50.0, HEIGHT - 38, 24), abs=0.1)
    assert "highest 50 at 7,012" in describe(points)
    assert "mean of 201 neighbours of 10,000 values" in describe(points)


def test_a_value_that_is_not_finite_is_a_gap_a_cross_and_a_count() -> None:
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, math.nan), (3.0, math.inf), (4.0, 1.0), (math.nan, 1.0)]
    svg = draw("loss", points, "")
    line = re.search(r'class="line" d="([^"]*)"', svg)
    assert line is not None
    assert line[1].count("M") == 2
    assert svg.count("l6 6m0 -6l-6 6") == 2
    assert describe(points).endswith("2 not finite (×); 1 without a step left out")
    assert "cross" not in draw("loss", points[:2], "")


def test_few_points_are_dots_and_none_is_a_sentence() -> None:
    assert draw("loss", [(100.0, 0.73)], "").count("<circle") == 1
    assert describe([(100.0, 0.73)]) == "last 0.73 at step 100"
    assert (draw("loss", [], ""), describe([])) == ("", "no point was recorded")
    assert (draw("loss", [(1.0, math.nan)], ""), describe([(1.0, math.nan)])) == ("", "none of 1 values is finite")


def test_bars_count_every_value_and_the_last_says_that_it_holds_what_is_far_beyond() -> None:
    svg = draw_bars("lengths", [*range(1, 201), 9000], "characters")
    counts = [int(count) for count in re.findall(r"<title>([0-9]+) from", svg)]
    assert (len(counts), sum(counts)) == (23, 201)  # of nine whole numbers each, to the last
    assert counts[:3] == [9, 9, 9]
    assert "the last bar holds all up to 9000" in svg
    assert "the last bar" not in draw_bars("lengths", [1, 2, 3], "characters")
    assert draw_bars("lengths", [], "characters") == ""
    assert sum(int(count) for count in re.findall(r"<title>([0-9]+) from", draw_bars("lengths", [5, 5], "pixels"))) == 2
