"""Line charts as inline SVG, without a plotting library, for self-contained pages.

Colours and fonts come from the page's style sheet: the classes c0 … c7 set the colour of a line.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from cllm_gpu.utils.text import visible

WIDTH, HEIGHT = 600, 330
LEFT, RIGHT, TOP, BOTTOM = 76, 16, 14, 52
"""Margins around the plot, large enough for labels in the larger font of narrow pages."""
COLOURS = 8
MOST_POINTS = 600
"""Maximum number of points drawn per line; longer lines are downsampled to the extremes of each interval."""

FEW_DOTS = 40
"""Lines with more dots have smaller ones."""


@dataclass(frozen=True)
class Line:
    """One curve: steps and finite values, of the same length."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    """Index of the colour, modulo COLOURS."""
    dotted: bool = False
    """Dashed, with a dot at every point and its value as a tooltip."""
    faint: bool = False
    """In the background; does not affect the range of the axis."""


@dataclass(frozen=True)
class Chart:
    """Curves over the same axes."""

    title: str
    unit: str
    """Unit of the vertical axis."""
    lines: tuple[Line, ...]
    log: bool = False
    """Logarithmic vertical axis; values that are not positive are omitted."""
    settling: float = 0.0
    """Fraction of the steps, from the start, that does not affect the range of the axis."""


@dataclass(frozen=True)
class Axis:
    """Maps values to 0 … 1."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """The position of `value` between `low` (0) and `high` (1)."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def svg(chart: Chart) -> str:
    """The chart as an <svg> element; "" if it has no points."""
    lines = [drawable(line, log=chart.log) for line in chart.lines]
    lines = [line for line in lines if line.x]
    if not lines:
        return ""
    across = axis_over([0.0, *(x for line in lines for x in line.x)], margin=0.0)
    up = axis_over(_range_values(lines, chart.settling * across.high), margin=0.05, log=chart.log)
    # up to the right edge, because the last dot extends beyond the end of the axis
    box = f'x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT}" height="{HEIGHT - TOP - BOTTOM}"'
    return "\n".join(
        [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escaped(chart.title)}">',
            *_grid(across, up),
            f"<svg {box}>",  # the inner svg clips the lines
            *(_line(line, across, up) for line in sorted(lines, key=lambda line: not line.faint)),
            "</svg>",
            "</svg>",
        ]
    )


def _range_values(lines: list[Line], settled: float) -> list[float]:
    """The values that determine the range of the axis: those of lines that are not faint, from step `settled` on."""
    for chosen in ([line for line in lines if not line.faint], lines):
        for first in (settled, 0.0):
            if values := [y for line in chosen for x, y in zip(line.x, line.y, strict=True) if x >= first]:
                return values
    return []


def drawable(line: Line, *, log: bool) -> Line:
    """The line with its drawable points only, about MOST_POINTS at most."""
    points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y) and (y > 0 or not log)]
    points = downsampled(points)
    return Line(line.label, [x for x, _ in points], [y for _, y in points], line.colour, line.dotted, line.faint)


def downsampled(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Downsample to the lowest and highest point of each interval, so that no spike is lost; keeps first and last."""
    if len(points) <= MOST_POINTS:
        return points
    stretch = math.ceil(len(points) / (MOST_POINTS // 2))
    kept = {0, len(points) - 1}
    for first in range(0, len(points), stretch):
        part = range(first, min(first + stretch, len(points)))
        kept |= {min(part, key=lambda i: points[i][1]), max(part, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def escaped(text: str) -> str:
    """Text escaped for HTML or SVG; characters that cannot be displayed become U+FFFD."""
    return html.escape(visible(text))


# ---- axes


def axis_over(values: Sequence[float], *, margin: float, log: bool = False) -> Axis:
    """The axis that covers all `values`, with a margin (a fraction of its length) at both ends."""
    low, high = min(values), max(values)
    if low == high:  # an axis around a single value
        low, high = (low / 2, high * 2) if log else (low - (abs(low) / 2 or 1.0), high + (abs(high) / 2 or 1.0))
    if log:
        factor = (high / low) ** margin
        return Axis(low / factor, high * factor, log=True)
    return Axis(low - margin * (high - low), high + margin * (high - low))


def ticks(axis: Axis, most: int = 5) -> list[float]:
    """At most `most` round tick values, spaced by 1, 2 or 5 times a power of ten; on a log axis, such values."""
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
    """Powers of ten, with 1, 2, 5 times them if they are few; empty if even these are fewer than two."""
    powers = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**p for p in powers for f in factors if axis.low <= f * 10.0**p <= axis.high]
        if len(found) <= most:
            return found if len(found) >= 2 else []
    return found[:: math.ceil(len(found) / most)]


def tick_label(value: float) -> str:
    """The label of a tick: 0.002, 1.5, 20k, 3M, 5e-05."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and unit != "k"):
            return f"{value / size:.4g}{unit}"
    return f"{value:.6g}"


# ---- marks


def _grid(across: Axis, up: Axis) -> list[str]:
    """Grid lines, tick labels, and the label of the horizontal axis."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    marks = []
    for value in ticks(up, 7):
        y = TOP + (1 - up.place(value)) * (bottom - TOP)
        marks.append(f'<path class="rule" d="M{LEFT} {y:.1f}H{right}"/>')
        marks.append(f'<text x="{LEFT - 8}" y="{y:.1f}" dy=".35em" text-anchor="end">{tick_label(value)}</text>')
    for value in (value for value in ticks(across) if value == round(value)):  # only whole steps
        x = LEFT + across.place(value) * (right - LEFT)
        anchor = "end" if x > right - 12 else "middle"
        marks.append(f'<path class="rule" d="M{x:.1f} {bottom}v5"/>')
        marks.append(f'<text x="{x:.1f}" y="{bottom + 8}" dy=".8em" text-anchor="{anchor}">{tick_label(value)}</text>')
    marks.append(f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>')
    marks.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    return marks


def _line(line: Line, across: Axis, up: Axis) -> str:
    """A curve in the coordinates of the inner svg."""
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
