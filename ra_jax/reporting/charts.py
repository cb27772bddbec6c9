"""Small charts of a run's metrics, drawn as inline SVG for its page.

Colours come from the page's style (classes `s0` to `s5`), so that a chart follows light and dark mode. What a chart
shows where the reader points is in `Chart.data`, read by the page's script.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH, HEIGHT = 360, 190  # of the drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 56, 344, 10, 166  # of the plot in it
COLORS = 6  # classes s0 to s5; more series begin again
MARKED = 20  # up to so many points are marked one by one
DENSE = 150  # of more rows, lines are thinner
MAX_POINTS = 500  # rows of a chart; of more, the extremes of equal stretches are drawn
TICKS = 4  # about so many on an axis

Rows = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Axis:
    """Maps values low..high to pixels start..end, linearly or by the logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / (high - low)


@dataclass(frozen=True)
class Chart:
    """A drawing, and what its script needs: `steps` [P] and `values` [series][P] (None: not recorded), and the axes."""

    svg: str
    data: dict[str, Any]


def number(value: float) -> str:
    """`value` to four significant digits, as a reader writes it: −0.0123, 1.5e−5."""
    text = f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.3e}"
    mantissa, _, exponent = text.partition("e")
    if exponent:
        text = f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    return text.replace("-", "−")


def color(i: int) -> str:
    """The style's class for series i."""
    return f"s{i % COLORS}"


def line_chart(rows: Rows, names: Mapping[str, str], *, log: bool = False, reference: float | None = None) -> Chart:
    """A line for each metric of `names` (metric → label) over the rows' steps.

    log: whether the scale may be logarithmic; it is where values are positive and span more than a factor of 20.
    reference: a value to compare with, drawn as a dashed line.
    """
    rows = thinned(rows, names)
    values = [[row.get(name) for row in rows] for name in names]
    present = [value for series in values for value in series if value is not None]
    if reference is not None:
        present.append(reference)
    log = log and min(present) > 0 and max(present) > 20 * min(present)
    x, y = step_axis(rows), value_axis(min(present), max(present), log)
    parts = grid(x, y)
    if reference is not None:
        parts.append(
            f'<line class="reference" x1="{LEFT}" x2="{RIGHT}" y1="{y(reference):.1f}" y2="{y(reference):.1f}"/>'
        )
    fine = " fine" if len(rows) > DENSE else ""
    for i, series in enumerate(values):
        points = [(x(row["step"]), y(value)) for row, value in zip(rows, series, strict=True) if value is not None]
        parts.append(f'<polyline class="{color(i)}{fine}" points="{joined(points)}"/>')
        if len(points) <= MARKED:
            parts += [f'<circle class="{color(i)}" cx="{px:.1f}" cy="{py:.1f}" r="2.2"/>' for px, py in points]
    return Chart(drawing(parts, summary(names.values(), values)), chart_data(rows, values, x, y))


def area_chart(rows: Rows, names: Mapping[str, str]) -> Chart:
    """Shares of a whole, stacked upward in the order of `names`; only rows that have all of them."""
    rows = thinned([row for row in rows if all(name in row for name in names)], names)
    values = [[row[name] for row in rows] for name in names]
    x, y = step_axis(rows), Axis(0.0, max(1.0, *map(sum, zip(*values, strict=True))), BOTTOM, TOP)
    # A single row fills the width: an area needs two points.
    across = [LEFT, RIGHT] if len(rows) == 1 else [x(row["step"]) for row in rows]
    repeat = len(across) // len(rows)
    areas, floor = [], [0.0] * len(rows)
    for i, series in enumerate(values):
        ceiling = [a + b for a, b in zip(floor, series, strict=True)]
        outline = list(zip(across, map(y, ceiling * repeat), strict=True))
        outline += reversed(list(zip(across, map(y, floor * repeat), strict=True)))
        areas.append(f'<polygon class="{color(i)}" points="{joined(outline)}"/>')
        floor = ceiling
    data = chart_data(rows, values, x, y) | {"stacked": True}
    return Chart(drawing([*areas, *grid(x, y)], summary(names.values(), values)), data)


def thinned(rows: Rows, names: Iterable[str]) -> Rows:
    """The rows that have any of `names`; of more than `MAX_POINTS`, those with a metric's extreme in a stretch."""
    names = list(names)
    rows = [row for row in rows if any(name in row for name in names)]
    if len(rows) <= MAX_POINTS:
        return rows
    kept = {0, len(rows) - 1}
    stretches = max(1, MAX_POINTS // (2 * len(names)))
    for i in range(stretches):
        stretch = range(i * len(rows) // stretches, (i + 1) * len(rows) // stretches)
        for name in names:
            if there := [j for j in stretch if name in rows[j]]:
                kept |= {min(there, key=lambda j: rows[j][name]), max(there, key=lambda j: rows[j][name])}
    return [rows[j] for j in sorted(kept)]


def step_axis(rows: Rows) -> Axis:
    """The horizontal axis over the rows' steps; a single step gets one on either side."""
    low, high = rows[0]["step"], rows[-1]["step"]
    return Axis(low, high, LEFT, RIGHT) if high > low else Axis(low - 1, high + 1, LEFT, RIGHT)


def value_axis(low: float, high: float, log: bool) -> Axis:
    """With a little room around; a constant is given some on either side. What is never negative stays so."""
    if log:
        return Axis(low / 1.2, high * 1.2, BOTTOM, TOP, log=True)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    floor = max(low - room, 0.0) if low >= 0 else low - room
    return Axis(floor, high + room, BOTTOM, TOP)


def ticks(axis: Axis, *, whole: bool = False) -> list[float]:
    """Round values within the axis, about `TICKS` of them; `whole`: integers only."""
    if axis.log:
        powers = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
        digits = (1, 2, 5) if len(powers) <= 3 else (1,)
        found = [digit * 10.0**power for power in powers for digit in digits]
        found = found[:: 1 + len(found) // (3 * TICKS)]
    else:
        rough = (axis.high - axis.low) / TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        digits = (1, 2, 5, 10) if whole and power < 10 else (1, 2, 2.5, 5, 10)
        step = next(digit * power for digit in digits if digit * power >= rough)
        step = max(1.0, step) if whole else step
        first, last = math.ceil(axis.low / step), math.floor(axis.high / step)
        found = [i * step for i in range(first, last + 1)]
    return [value for value in found if axis.low <= value <= axis.high]


def grid(x: Axis, y: Axis) -> list[str]:
    """Lines and numbers along both axes."""
    parts = []
    for value in ticks(y):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text class="left" x="{LEFT - 6}" y="{y(value) + 3.5:.1f}">{number(value)}</text>')
    for value in ticks(x, whole=True):
        parts.append(f'<line class="tick" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{BOTTOM}" y2="{BOTTOM + 4}"/>')
        middle = min(x(value), WIDTH - 3.6 * len(f"{value:.0f}"))  # the last one must not stick out
        parts.append(f'<text class="below" x="{middle:.1f}" y="{BOTTOM + 17}">{value:.0f}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>')
    return parts


def joined(points: Iterable[tuple[float, float]]) -> str:
    """Points as SVG writes them: "x,y x,y"."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def summary(labels: Iterable[str], values: Sequence[Sequence[float | None]]) -> str:
    """The chart in words, for who cannot see it."""
    ends = ([value for value in series if value is not None] for series in values)
    return "; ".join(
        f"{label} from {number(end[0])} to {number(end[-1])}" for label, end in zip(labels, ends, strict=True) if end
    )


def drawing(parts: Iterable[str], words: str) -> str:
    """The SVG element of these parts, with its description in words and the cursor that the script moves."""
    cursor = f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{BOTTOM}"/>'
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{escape(words)}">'
        f"{''.join(parts)}{cursor}</svg>"
    )


def chart_data(rows: Rows, values: Sequence[Sequence[float | None]], x: Axis, y: Axis) -> dict[str, Any]:
    """Values to six significant digits, and the axes as [low, high, start, end, whether logarithmic]."""
    return {
        "steps": [row["step"] for row in rows],
        "values": [[None if value is None else float(f"{value:.6g}") for value in series] for series in values],
        "x": [x.low, x.high, x.start, x.end, x.log],
        "y": [y.low, y.high, y.start, y.end, y.log],
    }
