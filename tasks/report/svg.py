"""Curves and points as inline SVG: axes, ticks, labels, gaps where a value is not finite. The page's style sheet colours it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Protocol

from markupsafe import Markup

__all__ = ["Axis", "Point", "describe", "draw", "draw_bars", "draw_many", "draw_points", "exact_axis", "log_axis", "round_axis"]


# ----------------------------------------
# One axis of a plot: the range it covers, its ticks and their labels.


# A range narrower than this share of its values is drawn as flat: ticks inside it could not be distinguished in float64.
FLAT = 1e-9
SMALLEST = 1e-290


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The range [low, high], low < high, and the ticks within it, each with its label. is_log: places go by log(1 + value), values from 0 on."""

    low: float
    high: float
    ticks: tuple[float, ...]
    labels: tuple[str, ...]
    is_log: bool = False

    def place(self, value: float, start: float, end: float) -> float:
        """Where `value` lies between `start` (at low) and `end` (at high)."""
        low, high, at = (math.log1p(one) for one in (self.low, self.high, value)) if self.is_log else (self.low, self.high, value)
        return start + (end - start) * ((at - low) / (high - low))


def round_axis(values: Sequence[float], n_ticks: int) -> Axis:
    """An axis that begins and ends on a tick: 0.31, 5.8 with 4 ticks -> 0, 2, 4, 6."""
    low, high = _spread(values)
    step = _step(high - low, n_ticks, 0.0)
    low, high = math.floor(low / step + FLAT) * step, math.ceil(high / step - FLAT) * step
    return _axis(low, high, step)


def exact_axis(values: Sequence[float], n_ticks: int) -> Axis:
    """An axis that begins and ends on the first and last value, ticks inside: 0, 950 with 4 ticks -> 0, 200, 400, 600, 800.

    Whole values (training steps) get no tick between two of them.
    """
    low, high = _spread(values)
    return _axis(low, high, _step(high - low, n_ticks, 1.0 if all(float(v).is_integer() for v in values) else 0.0))


def log_axis(values: Sequence[float]) -> Axis:
    """An axis from the first to the last value, of 0 or more, that grows by factors: ticks at powers of ten, or at 1, 2, 5 times these where few fit."""
    low, high = _spread(values)
    low = max(low, 0.0)
    powers = [10.0**k for k in range(math.floor(math.log10(max(low, 1))), math.ceil(math.log10(max(high, 10))) + 1)]
    steps = (1,) if high > 500 * max(low, 1) else (1, 2, 5)
    ticks = tuple(power * step for power in powers for step in steps if low <= power * step <= high) or (low, high)
    ticks = ticks[:: -(-len(ticks) // 7)]
    return Axis(low=low, high=high, ticks=ticks, labels=tuple(_short(tick) for tick in ticks), is_log=True)


def _short(value: float) -> str:
    """1500 -> 1.5K."""
    size, letter = next(((size, letter) for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "K")) if abs(value) >= size), (1.0, ""))
    return f"{value / size:.3g}{letter}"


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """The range of the values, opened where they are all the same: 3, 3 -> 2, 4, and 0 -> -1, 1, and 1e-4 -> 0, 2e-4."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    if high - low > max(FLAT * size, SMALLEST):
        return low, high
    room = 1.0 if size < SMALLEST or size >= 1 else size
    room = max(room, 1e-3 * size)
    return low - room, high + room


def _step(span: float, n_ticks: int, smallest: float) -> float:
    """The least of 1, 2, 5 times a power of ten that leaves at most `n_ticks` intervals."""
    power = 10.0 ** math.floor(math.log10(span / n_ticks))
    return max(smallest, next(power * m for m in (1, 2, 5, 10, 20) if span / (power * m) <= n_ticks + FLAT))


def _axis(low: float, high: float, step: float) -> Axis:
    first, last = math.ceil(low / step - FLAT), math.floor(high / step + FLAT)
    ticks = tuple(i * step for i in range(first, last + 1))
    size = max(abs(low), abs(high))
    return Axis(low=low, high=high, ticks=ticks, labels=tuple(_label(tick, step, size) for tick in ticks))


def _label(value: float, step: float, size: float) -> str:
    """As many digits as distinguish two ticks: 2000 -> 2,000, and 0.25 -> 0.25, and 0.00025 -> 2.5e-4, and 3000000 -> 3M."""
    if abs(value) < step / 2:
        return "0"
    decimals = max(0, -math.floor(math.log10(step) + FLAT))
    if size < 1e6 and decimals <= 3:
        return f"{value:,.{decimals}f}"
    if size < 1e9 and step >= 1e4:
        return f"{value / 1e6:.{max(0, 6 - math.floor(math.log10(step) + FLAT))}f}M"
    digits = max(0, math.floor(math.log10(abs(value)) + FLAT) - math.floor(math.log10(step) + FLAT))
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


Point = tuple[float, float]

# Drawn about one to one on a phone, so that 12 units of type stay 12 pixels.
WIDTH, HEIGHT = 360, 220
TOP, RIGHT, BOTTOM = 24, 22, 38
CHARACTER = 7.0  # the width of a digit at 12 pixels, rounded up
LARGEST = 1e290  # beyond it the span of two values overflows; drawn as a gap
FEW = 40  # so many points get a dot each
MANY = 240  # more points than this get a running mean over them


def draw(name: str, points: Sequence[Point], unit: str) -> Markup:
    """One `<svg>`, bounded in size however many points there are: (step, value) pairs in any order; nothing where none can be drawn.

    A value that is NaN, infinite or beyond 1e290 makes a gap, and a cross on the upper edge says where. Points without a finite
    step are left out; `describe` counts both.
    """
    placed = _placed(points)
    finite = [point for point in placed if _drawable(point[1])]
    if not finite:
        return Markup("")
    label = escape(f"Curve of {name}" + (f" in {unit}" if unit else ""), quote=True)
    head = f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
    x_axis, y_axis = exact_axis([x for x, _ in placed], 5), round_axis([y for _, y in finite], 4)
    frame = _Frame(x_axis, y_axis)
    parts = [frame.axes(unit), frame.line(_thin(placed, x_axis), "raw" if len(finite) > MANY else "line")]
    if len(finite) > MANY:
        parts.append(frame.line(_thin(_running_mean(placed), x_axis), "line"))
    if len(finite) <= FEW:
        parts.append(frame.dots(finite))
    parts.append(frame.crosses(x for x, y in placed if not _drawable(y)))
    return Markup(f"{head}{''.join(parts)}</svg>")


class _Named(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def points(self) -> Sequence[Point]: ...


def draw_many(name: str, series: Sequence[_Named], x_unit: str = "step") -> Markup:
    """One `<svg>` with the curves of several runs over each other, of the classes series0, series1, ...; nothing where none can be drawn.

    Of more than 240 points the running mean is drawn: what is laid over each other is compared as a whole.
    """
    placed = [_placed(one.points) for one in series]
    finite = [point for points in placed for point in points if _drawable(point[1])]
    if not finite:
        return Markup("")
    x_axis, y_axis = exact_axis([x for points in placed for x, _ in points], 5), round_axis([y for _, y in finite], 4)
    frame = _Frame(x_axis, y_axis)
    label = escape(f"Curves of {name} of {', '.join(one.name for one in series)}", quote=True)
    drawn = [_thin(_running_mean(points) if len(points) > MANY else points, x_axis) for points in placed]
    lines = [frame.line(points, f"series{i}") for i, points in enumerate(drawn)]
    return Markup(f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{frame.axes("", x_unit)}{"".join(lines)}</svg>')


def draw_points(name: str, series: Sequence[_Named], lines: Sequence[Sequence[Point]], unit: str, x_unit: str) -> Markup:
    """One `<svg>` with the points of several series, of the classes dot0, dot1, ...; nothing where none can be drawn.

    lines   for each series, points that a line of the class series0, series1, ... joins, such as its front
    x is on an axis that grows by factors
    """
    finite = [[point for point in _placed(one.points) if _drawable(point[1])] for one in series]
    whole = [point for points in finite for point in points]
    if not whole:
        return Markup("")
    frame = _Frame(log_axis([x for x, _ in whole]), round_axis([y for _, y in whole], 4))
    label = escape(f"{name}: {unit} against {x_unit}, of {', '.join(one.name for one in series)}", quote=True)
    drawn = [frame.line(points, f"series{i}") for i, points in enumerate(lines) if points]
    drawn += [frame.dots(points, f"dot{i}") for i, points in enumerate(finite)]
    return Markup(f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{frame.axes(unit, x_unit)}{"".join(drawn)}</svg>')


N_BARS = 24
ALMOST_ALL = 99.0  # percent; where the largest value is far beyond them, the last bar holds the rest


def draw_bars(name: str, values: Sequence[float], unit: str) -> Markup:
    """One `<svg>` with the histogram of finite values, at most 24 bars; nothing where there is no value."""
    if not values:
        return Markup("")
    ordered = sorted(values)
    low, high = ordered[0], ordered[min(len(ordered) - 1, math.ceil(len(ordered) * ALMOST_ALL / 100))]
    beyond = ordered[-1] > high + (high - low) / 2
    high = high if beyond else ordered[-1]
    n_bars = N_BARS
    if all(float(value).is_integer() for value in values):  # then each bar is of as many whole numbers
        width = math.ceil((high - low + 1) / N_BARS)
        n_bars = math.ceil((high - low + 1) / width)
        high = low + n_bars * width
    x_axis = exact_axis([low, high], 5)
    counts = [0] * n_bars
    for value in ordered:
        counts[min(n_bars - 1, int(x_axis.place(value, 0, n_bars)))] += 1
    frame = _Frame(x_axis, round_axis([0, max(counts)], 4))
    label = escape(f"Histogram of {name} in {unit}", quote=True)
    more = f"; the last bar holds all up to {_number(ordered[-1])}" if beyond else ""
    axes = frame.axes("", f"{unit}{more}")
    return Markup(f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{axes}{frame.bars(counts)}</svg>')


def describe(points: Sequence[Point]) -> str:
    """The curve in words, for those who do not see it: last, lowest and highest value, and what could not be drawn."""
    placed = _placed(points)
    finite = [point for point in placed if _drawable(point[1])]
    if not finite:
        return "no point was recorded" if not points else f"none of {len(points):,} values is finite"
    low, high = min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])
    words = [f"last {_number(finite[-1][1])} at step {finite[-1][0]:,.10g}"]
    if len(finite) > 1:
        words += [f"lowest {_number(low[1])} at {low[0]:,.10g}", f"highest {_number(high[1])} at {high[0]:,.10g}"]
    if len(finite) > MANY:
        words.append(f"thick line: mean of {_window(len(placed)):,} neighbours of {len(placed):,} values")
    if len(placed) > len(finite):
        words.append(f"{len(placed) - len(finite):,} not finite (×)")
    if len(points) > len(placed):
        words.append(f"{len(points) - len(placed):,} without a step left out")
    return "; ".join(words)


class _Frame:
    """Two axes on the canvas, and how points are put between them."""

    def __init__(self, x: Axis, y: Axis) -> None:
        self._x, self._y = x, y
        self._left = 12 + CHARACTER * max(len(label) for label in y.labels)

    def axes(self, unit: str, x_unit: str = "step") -> str:
        left, right, bottom = self._left, WIDTH - RIGHT, HEIGHT - BOTTOM
        out = []
        for tick, label in zip(self._y.ticks, self._y.labels, strict=True):
            at = self._y.place(tick, bottom, TOP)
            out.append(f'<path class="grid" d="M{left:g} {at:.1f}H{right}"/>')
            out.append(f'<text x="{left - 6:g}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
        for tick, label in zip(self._x.ticks, self._x.labels, strict=True):
            at = self._x.place(tick, left, right)
            out.append(f'<path class="axis" d="M{at:.1f} {bottom}v4"/>')
            out.append(f'<text x="{at:.1f}" y="{bottom + 17}" text-anchor="middle">{label}</text>')
        out.append(f'<path class="axis" d="M{left:g} {TOP}V{bottom}H{right}"/>')
        out.append(f'<text x="{right}" y="{HEIGHT - 5}" text-anchor="end">{escape(x_unit)}</text>')
        out.append(f'<text x="4" y="13">{escape(unit)}</text>')
        return "".join(out)

    def line(self, points: Sequence[Point], kind: str) -> str:
        """One path: a new subpath after every gap; a point alone between two gaps is a dot, by the round cap of a line of no length."""
        d = []
        for drawable, run in groupby(points, key=lambda point: _drawable(point[1])):
            places = [self._place(point) for point in run] if drawable else []
            if len(places) == 1:
                places *= 2
            d.append("M" + "L".join(places) if places else "")
        return f'<path class="{kind}" d="{"".join(d)}"/>'

    def dots(self, points: Iterable[Point], kind: str = "") -> str:
        out, of_kind = [], f' class="{kind}"' if kind else ""
        for point in points:
            x, y = self._place(point).split()
            out.append(f'<circle{of_kind} cx="{x}" cy="{y}" r="3"><title>{_number(point[1])} at {point[0]:,.10g}</title></circle>')
        return "".join(out)

    def bars(self, counts: Sequence[int]) -> str:
        """Bars side by side over the whole width; their heights are counts."""
        bottom, width = HEIGHT - BOTTOM, (WIDTH - RIGHT - self._left) / len(counts)
        out = []
        for i, count in enumerate(counts):
            top = self._y.place(count, bottom, TOP)
            low, high = (self._x.low + (self._x.high - self._x.low) * (i + k) / len(counts) for k in (0, 1))
            about = f"<title>{count:,} from {_number(low)} to {_number(high)}</title>"
            out.append(f'<rect x="{self._left + i * width + 0.5:.1f}" y="{top:.1f}" width="{width - 1:.1f}" height="{bottom - top:.1f}">{about}</rect>')
        return "".join(out)

    def crosses(self, steps: Iterable[float]) -> str:
        """A cross on the upper edge at each step whose value is not finite; steps on the same pixel share one."""
        places = sorted({round(self._x.place(step, self._left, WIDTH - RIGHT)) for step in steps})
        d = "".join(f"M{x - 3} {TOP + 3}l6 6m0 -6l-6 6" for x in places)
        return f'<path class="cross" d="{d}"/>' if d else ""

    def _place(self, point: Point) -> str:
        return f"{self._x.place(point[0], self._left, WIDTH - RIGHT):.1f} {self._y.place(point[1], HEIGHT - BOTTOM, TOP):.1f}"


def _drawable(value: float) -> bool:
    return math.isfinite(value) and abs(value) < LARGEST


def _placed(points: Sequence[Point]) -> list[Point]:
    """The points that have a step, by step: a resumed run may have written some steps twice."""
    return sorted(((float(x), float(y)) for x, y in points if _drawable(x)), key=lambda point: point[0])


def _thin(points: Sequence[Point], axis: Axis) -> list[Point]:
    """At most five points a column of one pixel, which draw the same line: first, lowest, highest, last, and one gap if there is any.

    Averages or every n-th point would hide a spike; 10,000 steps of a loss are looked at for their spikes.
    """
    retained: list[Point] = []
    for _, group in groupby(points, key=lambda point: int(axis.place(point[0], 0, WIDTH))):
        column = list(group)
        finite = [i for i, point in enumerate(column) if _drawable(point[1])]
        keep = set(finite[:1] + finite[-1:])
        if finite:
            keep |= {min(finite, key=lambda i: column[i][1]), max(finite, key=lambda i: column[i][1])}
        keep |= set([i for i in range(len(column)) if i not in set(finite)][:1])
        retained += [column[i] for i in sorted(keep)]
    return retained


def _window(n_points: int) -> int:
    return max(3, n_points // 50 | 1)


def _running_mean(points: Sequence[Point]) -> list[Point]:
    """The mean of the finite values among the neighbours of each point, half before and half after; a gap stays a gap."""
    half = _window(len(points)) // 2
    sums, counts = [0.0], [0]
    for _, y in points:
        sums.append(sums[-1] + (y if _drawable(y) else 0.0))
        counts.append(counts[-1] + _drawable(y))
    out = []
    for i, (x, y) in enumerate(points):
        start, end = max(0, i - half), min(len(points), i + half + 1)
        out.append((x, (sums[end] - sums[start]) / (counts[end] - counts[start]) if _drawable(y) else y))
    return out


def _number(value: float) -> str:
    if 1e4 <= abs(value) < 1e12:
        return f"{value:,.0f}"
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"
