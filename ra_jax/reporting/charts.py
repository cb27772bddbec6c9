"""Small charts of a run's metrics as inline SVG for `report.html`.

Colors are CSS classes (`s0` to `s5`), so that a chart follows the light or dark mode of the page. `Chart.data` holds
the values that the page's script shows at the pointer.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH, HEIGHT = 360, 190  # size of the SVG view box [user units]
LEFT, RIGHT, TOP, BOTTOM = 56, 344, 10, 166  # edges of the plot area in the view box
COLORS = 6  # CSS classes s0 to s5; the seventh series uses s0 again
MARKED = 20  # a line with at most this many points shows each point as a circle
DENSE = 150  # a chart with more rows than this has thinner lines
MAX_POINTS = 500  # a chart with more rows than this shows only some of them, see `thinned`
TICKS = 4  # approximate number of ticks on an axis

Rows = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Axis:
    """Linear or logarithmic map from the values low..high to the coordinates start..end of the view box."""

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
    """A chart and the data that the page's script reads.

    Attributes:
        svg: the `<svg>` element.
        data: `chart_data`'s result; an area chart also has `stacked` = True.
    """

    svg: str
    data: dict[str, Any]


def number(value: float) -> str:
    """Formats `value` with four significant digits for readers, such as −0.0123 or 1.5e−5."""
    text = f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.3e}"
    mantissa, _, exponent = text.partition("e")
    if exponent:
        text = f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    return text.replace("-", "−")


def color(i: int) -> str:
    """Returns the CSS class of series `i`."""
    return f"s{i % COLORS}"


def line_chart(rows: Rows, names: Mapping[str, str], *, log: bool = False, reference: float | None = None) -> Chart:
    """Draws one line for each metric over the steps.

    Args:
        rows: rows of metrics.jsonl; a row need not have every metric.
        names: metric -> label.
        log: whether the value axis may be logarithmic. It is logarithmic if all values are positive and the largest
            is more than 20 times the smallest.
        reference: a value to compare with, drawn as a dashed horizontal line; None for no line.
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
    """Draws metrics that are shares of a whole as stacked areas, the first of `names` at the bottom.

    Rows that lack any of the metrics are left out.
    """
    rows = thinned([row for row in rows if all(name in row for name in names)], names)
    values = [[row[name] for row in rows] for name in names]
    x, y = step_axis(rows), Axis(0.0, max(1.0, *map(sum, zip(*values, strict=True))), BOTTOM, TOP)
    # An area needs two points, so a single row is drawn at the left and at the right edge.
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
    """Returns the rows that have any metric of `names`, reduced to about `MAX_POINTS` rows if there are more.

    To reduce them, the rows are split into equal stretches. Each stretch keeps the rows with the smallest and the
    largest value of each metric, so that peaks stay visible. The first and the last row are always kept.
    """
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
    """Returns the horizontal axis over the rows' steps; a single step gets a margin of one step on each side."""
    low, high = rows[0]["step"], rows[-1]["step"]
    return Axis(low, high, LEFT, RIGHT) if high > low else Axis(low - 1, high + 1, LEFT, RIGHT)


def value_axis(low: float, high: float, log: bool) -> Axis:
    """Returns the vertical axis for values from `low` to `high`, with a margin at both ends.

    The margin is 6 % of the range. For a constant value it is 10 % of the value, or 1 if the value is 0. If
    `low` is at least 0, the axis does not extend below 0. A logarithmic axis has a margin of a factor of 1.2 instead.
    """
    if log:
        return Axis(low / 1.2, high * 1.2, BOTTOM, TOP, log=True)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    floor = max(low - room, 0.0) if low >= 0 else low - room
    return Axis(floor, high + room, BOTTOM, TOP)


def ticks(axis: Axis, *, whole: bool = False) -> list[float]:
    """Returns about `TICKS` round values within the axis; integers only if `whole`.

    A logarithmic axis gets powers of ten, and also 2 and 5 times these powers if it spans few of them. It has at most
    3 · `TICKS` ticks.
    """
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
    """Returns the SVG elements of both axes: grid lines, tick marks and numbers."""
    parts = []
    for value in ticks(y):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text class="left" x="{LEFT - 6}" y="{y(value) + 3.5:.1f}">{number(value)}</text>')
    for value in ticks(x, whole=True):
        parts.append(f'<line class="tick" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{BOTTOM}" y2="{BOTTOM + 4}"/>')
        middle = min(x(value), WIDTH - 3.6 * len(f"{value:.0f}"))  # keeps the last number inside the drawing
        parts.append(f'<text class="below" x="{middle:.1f}" y="{BOTTOM + 17}">{value:.0f}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>')
    return parts


def joined(points: Iterable[tuple[float, float]]) -> str:
    """Formats points for the SVG attribute `points`: "x,y x,y"."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def summary(labels: Iterable[str], values: Sequence[Sequence[float | None]]) -> str:
    """Describes the chart in words for screen readers: the first and the last value of each series."""
    ends = ([value for value in series if value is not None] for series in values)
    return "; ".join(
        f"{label} from {number(end[0])} to {number(end[-1])}" for label, end in zip(labels, ends, strict=True) if end
    )


def drawing(parts: Iterable[str], words: str) -> str:
    """Returns the `<svg>` element with these parts, a description, and the cursor line that the page's script moves."""
    cursor = f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{BOTTOM}"/>'
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{escape(words)}">'
        f"{''.join(parts)}{cursor}</svg>"
    )


def chart_data(rows: Rows, values: Sequence[Sequence[float | None]], x: Axis, y: Axis) -> dict[str, Any]:
    """Returns the data of a chart for the page's script.

    Returns:
        steps: the rows' steps [P].
        values: [series][P], with six significant digits; None if a row does not have the metric.
        x, y: the axes, each as [low, high, start, end, log].
    """
    return {
        "steps": [row["step"] for row in rows],
        "values": [[None if value is None else float(f"{value:.6g}") for value in series] for series in values],
        "x": [x.low, x.high, x.start, x.end, x.log],
        "y": [y.low, y.high, y.start, y.end, y.log],
    }
