"""Charts: every point where its axes say, round numbers beside them, and no spike lost by thinning."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cllm_gpu.report.svg_chart import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MOST_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Chart,
    Line,
    axis_over,
    downsampled,
    svg,
    tick_label,
    ticks,
)

VALUES = st.floats(-1e9, 1e9)
POSITIVE = st.floats(1e-9, 1e9)


def drawn(chart):
    """The chart's elements; it must be well-formed."""
    return ElementTree.fromstring(svg(chart))


def points(path):
    """The points of a line's path, in the plot's coordinates."""
    return [tuple(map(float, pair.split())) for pair in path.get("d").removeprefix("M").split("L")]


def lines(chart):
    return [path for path in drawn(chart).iter("path") if "line" in path.get("class").split()]


@given(st.lists(VALUES, min_size=1), st.booleans())
def test_an_axis_holds_its_values(values, margin):
    axis = axis_over(values, margin=0.05 * margin)
    assert all(-1e-9 <= axis.place(value) <= 1 + 1e-9 for value in values)


@given(st.lists(POSITIVE, min_size=1))
def test_a_log_axis_holds_its_values(values):
    axis = axis_over(values, margin=0.05, log=True)
    assert all(0 <= axis.place(value) <= 1 for value in values)


@given(VALUES, VALUES, st.integers(3, 8))
def test_ticks_are_few_round_and_on_the_axis(low, high, most):
    assume(high - low > 1e-6 * max(abs(low), abs(high), 1e-300))
    axis = Axis(low, high)
    found = ticks(axis, most)
    assert 1 <= len(found) <= most
    assert all(-1e-6 <= axis.place(value) <= 1 + 1e-6 for value in found)
    steps = {f"{b - a:.3g}" for a, b in itertools.pairwise(found)}
    assert len(steps) <= 1
    if steps:
        assert re.sub(r"[.0+-]|e.*", "", steps.pop()) in ("1", "2", "5")


@given(POSITIVE, st.floats(1.001, 1e15), st.integers(3, 8))
def test_ticks_of_a_log_axis_are_few_and_on_it(low, ratio, most):
    axis = Axis(low, low * ratio, log=True)
    found = ticks(axis, most)
    assert len(found) <= most
    assert all(-1e-6 <= axis.place(value) <= 1 + 1e-6 for value in found)
    assert found == sorted(found)
    if ratio >= 10:
        assert len(found) >= 2


def test_ticks_one_can_read():
    assert ticks(Axis(0, 300)) == [0, 100, 200, 300]
    assert ticks(Axis(0, 1), 6) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(Axis(0.5, 200, log=True)) == [1, 3, 10, 30, 100]
    assert ticks(Axis(0.4, 2.1, log=True)) == [0.5, 1, 2]
    numbers = (0.002, 5e-05, 0.1 + 0.2, 1500, 20_000, 1_250_000, 3e9)
    assert [tick_label(n) for n in numbers] == ["0.002", "5e-05", "0.3", "1500", "20k", "1.25M", "3G"]


@given(st.integers(0, 5000), st.integers(0, 4999))
def test_thinning_keeps_spikes_and_both_ends(count, spike):
    whole = [(float(n), math.sin(n)) for n in range(count)]
    if spike < count:
        whole[spike] = (float(spike), 50.0)
    kept = downsampled(whole)
    assert len(kept) <= MOST_POINTS + 2
    assert kept == sorted(set(kept) & set(whole))
    assert kept[:1] + kept[-1:] == whole[:1] + whole[-1:]
    if spike < count:
        assert whole[spike] in kept


def test_points_lie_where_the_axes_say():
    (line,) = lines(Chart("t", "", (Line("a", [0, 5, 10], [1.0, 3.0, 2.0]),)))
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    across, up = Axis(0, 10), axis_over([1.0, 3.0], margin=0.05)
    expected = [(across.place(x) * width, (1 - up.place(y)) * height) for x, y in ((0, 1.0), (5, 3.0), (10, 2.0))]
    assert points(line) == [pytest.approx(point, abs=0.051) for point in expected]  # written with one decimal


def test_a_faint_line_is_behind_and_does_not_stretch_the_axis():
    steady, spiky = Line("a", [1, 2], [1.0, 2.0]), Line("b", [1, 2], [1.5, 900.0], faint=True)
    first, second = lines(Chart("t", "", (steady, spiky)))
    assert "faint" in first.get("class")
    assert points(second) == points(lines(Chart("t", "", (steady,)))[0])


def test_the_start_need_not_decide_the_axis():
    falling = Line("a", [1, 50, 100], [900.0, 1.0, 2.0])
    after = Line("a", [50, 100], [1.0, 2.0])
    (settled,) = lines(Chart("t", "", (falling,), settling=0.02))
    assert points(settled)[1:] == points(lines(Chart("t", "", (after,)))[0])
    (early,) = lines(Chart("t", "", (Line("a", [0, 0], [3.0, 4.0]),), settling=0.02))  # nothing after: all decide
    assert len(points(early)) == 2


def test_steps_are_whole():
    texts = [text.text for text in drawn(Chart("t", "", (Line("a", [1], [7.0]),))).iter("text")]
    assert texts[-3:] == ["0", "1", "step"]


def test_what_a_log_axis_cannot_show_is_left_out():
    (line,) = lines(Chart("t", "", (Line("a", [1, 2, 3], [0.0, 1.0, 10.0]),), log=True))
    assert len(points(line)) == 2
    assert svg(Chart("t", "", (Line("a", [1], [0.0]),), log=True)) == ""
    assert svg(Chart("t", "", (Line("a", [], []), Line("b", [1], [math.nan])))) == ""


def test_dots_tell_their_values_and_a_single_point_is_a_dot():
    chart = Chart("t", "", (Line("v <1>", [1000, 2000], [1.5, 1.25], dotted=True), Line("one", [1], [7.0], colour=9)))
    dots = list(drawn(chart).iter("circle"))
    assert [dot.find("title").text for dot in dots] == [
        "v <1>, step 1,000: 1.5",
        "v <1>, step 2,000: 1.25",
        "one, step 1: 7",
    ]
    assert dots[-1].get("class") == "c1"


def test_texts_are_escaped():
    chart = Chart('"<t>"', "", (Line("</title><script>", [1, 2], [1, 2]),))
    picture = drawn(chart)
    assert picture.get("aria-label") == '"<t>"'
    assert {element.tag for element in picture.iter()} == {"svg", "path", "text", "title"}
