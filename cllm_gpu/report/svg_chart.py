"""Line charts as inline SVG, without a drawing library: for pages that must open anywhere.

Colours, font and its size come from the page's style sheet by class: c0 … c7 set the colour of a line.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from cllm_gpu.utils.text import visible

WIDTH, HEIGHT = 600, 330
LEFT, RIGHT, TOP, BOTTOM = 76, 16, 14, 52
"""Room around the plot, enough for labels at the larger size that narrow pages use."""
COLOURS = 8
MOST_POINTS = 600
"""Points of a line that are drawn; of more, the extremes of each stretch."""

FEW_DOTS = 40
"""Of more dots on a line each is drawn smaller."""


@dataclass(frozen=True)
class Line:
    """One curve: steps and finite values, of the same length."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    """Which of the page's colours; they repeat after COLOURS."""
    dotted: bool = False
    """Dashed, with a dot at every point that shows its value when pointed at."""
    faint: bool = False
    """In the background; does not decide how far the axis reaches."""


@dataclass(frozen=True)
class Chart:
    """Curves over the same axes."""

    title: str
    unit: str
    """Of the vertical axis."""
    lines: tuple[Line, ...]
    log: bool = False
    """Logarithmic vertical axis; values that are not above 0 are left out."""
    settling: float = 0.0
    """Share of the steps, from the start, that does not decide how far the axis reaches."""


@dataclass(frozen=True)
class Axis:
    """Maps values to 0 … 1."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Where `value` lies between `low` (0) and `high` (1)."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def svg(chart: Chart) -> str:
    """The chart as an <svg> element; "" when there is no point to draw."""
    lines = [drawable(line, log=chart.log) for line in chart.lines]
    lines = [line for line in lines if line.x]
    if not lines:
        return ""
    across = axis_over([0.0, *(x for line in lines for x in line.x)], margin=0.0)
    up = axis_over(_deciding(lines, chart.settling * across.high), margin=0.05, log=chart.log)
    # as far as the edge on the right, where the last point's dot reaches over the axis' end
    box = f'x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT}" height="{HEIGHT - TOP - BOTTOM}"'
    return "\n".join(
        [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escaped(chart.title)}">',
            *_grid(across, up),
            f"<svg {box}>",  # an inner picture clips what leaves it
            *(_line(line, across, up) for line in sorted(lines, key=lambda line: not line.faint)),
            "</svg>",
            "</svg>",
        ]
    )


def _deciding(lines: list[Line], settled: float) -> list[float]:
    """The values that decide how far the axis reaches: of lines that are not faint, and after the step `settled`."""
    for chosen in ([line for line in lines if not line.faint], lines):
        for first in (settled, 0.0):
            if values := [y for line in chosen for x, y in zip(line.x, line.y, strict=True) if x >= first]:
                return values
    return []


def drawable(line: Line, *, log: bool) -> Line:
    """The line with the points that can be drawn, at most about MOST_POINTS."""
    points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y) and (y > 0 or not log)]
    points = thinned(points)
    return Line(line.label, [x for x, _ in points], [y for _, y in points], line.colour, line.dotted, line.faint)


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of each stretch of many points the lowest and the highest, so that no spike is lost; first and last stay."""
    if len(points) <= MOST_POINTS:
        return points
    stretch = math.ceil(len(points) / (MOST_POINTS // 2))
    kept = {0, len(points) - 1}
    for first in range(0, len(points), stretch):
        part = range(first, min(first + stretch, len(points)))
        kept |= {min(part, key=lambda i: points[i][1]), max(part, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def escaped(text: str) -> str:
    """Text for HTML or SVG that shows as it is; what cannot be shown becomes U+FFFD."""
    return html.escape(visible(text))


# ---- axes


def axis_over(values: Sequence[float], *, margin: float, log: bool = False) -> Axis:
    """The axis that holds all `values` with a margin, as a share of its length, at both ends."""
    low, high = min(values), max(values)
    if low == high:  # one value still gets an axis around it
        low, high = (low / 2, high * 2) if log else (low - (abs(low) / 2 or 1.0), high + (abs(high) / 2 or 1.0))
    if log:
        factor = (high / low) ** margin
        return Axis(low / factor, high * factor, log=True)
    return Axis(low - margin * (high - low), high + margin * (high - low))


def ticks(axis: Axis, most: int = 5) -> list[float]:
    """At most `most` round values on the axis: 1, 2 or 5 times a power of ten apart, or on a log axis such values."""
    if axis.log and (found := _log_ticks(axis, most)):
        return found
    step = 10.0 ** math.floor(math.log10((axis.high - axis.low) / most))
    for factor in (1, 2, 5, 10, 20):
        first = math.ceil(axis.low / (factor * step) - 1e-9)
        last = math.floor(axis.high / (factor * step) + 1e-9)
        if last - first < most:
            return [n * factor * step for n in range(first, last + 1)]
    return []


def _log_ticks(axis: Axis, most: int) -> list[float]:
    """Powers of ten, or 1, 2, 5 times them where there are few; none where even those are fewer than two."""
    powers = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**p for p in powers for f in factors if axis.low <= f * 10.0**p <= axis.high]
        if len(found) <= most:
            return found if len(found) >= 2 else []
    return found[:: math.ceil(len(found) / most)]


def short(value: float) -> str:
    """A tick's number: 0.002, 1.5, 20k, 3M, 5e-05."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and unit != "k"):
            return f"{value / size:.4g}{unit}"
    return f"{value:.6g}"


# ---- marks


def _grid(across: Axis, up: Axis) -> list[str]:
    """Rules, numbers, and what the horizontal axis counts."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    marks = []
    for value in ticks(up, 7):
        y = TOP + (1 - up.place(value)) * (bottom - TOP)
        marks.append(f'<path class="rule" d="M{LEFT} {y:.1f}H{right}"/>')
        marks.append(f'<text x="{LEFT - 8}" y="{y:.1f}" dy=".35em" text-anchor="end">{short(value)}</text>')
    for value in (value for value in ticks(across) if value == round(value)):  # there is no half step
        x = LEFT + across.place(value) * (right - LEFT)
        anchor = "end" if x > right - 12 else "middle"
        marks.append(f'<path class="rule" d="M{x:.1f} {bottom}v5"/>')
        marks.append(f'<text x="{x:.1f}" y="{bottom + 8}" dy=".8em" text-anchor="{anchor}">{short(value)}</text>')
    marks.append(f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>')
    marks.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    return marks


def _line(line: Line, across: Axis, up: Axis) -> str:
    """A curve in the inner picture's coordinates."""
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    places = [(across.place(x) * width, (1 - up.place(y)) * height) for x, y in zip(line.x, line.y, strict=True)]
    colour = f"c{line.colour % COLOURS}"
    style = " ".join(name for name, on in (("dotted", line.dotted), ("faint", line.faint)) if on)
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    name = f"<title>{escaped(line.label)}</title>"
    marks = [f'<path class="line {colour} {style}" d="M{path}">{name}</path>']
    if line.dotted or len(places) == 1:
        radius = 3.5 if len(places) <= FEW_DOTS else 1.5
        marks += [
            f'<circle class="{colour}" cx="{px:.1f}" cy="{py:.1f}" r="{radius}">'
            f"<title>{escaped(line.label)}, step {x:,.0f}: {y:.6g}</title></circle>"
            for (px, py), x, y in zip(places, line.x, line.y, strict=True)
        ]
    return "".join(marks)
