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
NUM_COLORS = 6  # CSS classes s0 to s5; the seventh series uses s0 again
MAX_MARKED_POINTS = 20  # a line with at most this many points shows each point as a circle
MAX_THICK_LINE_ROWS = 150  # a chart with more rows than this has thinner lines
MAX_POINTS = 500  # a chart with more rows than this shows only some of the rows (`thin_rows`)
NUM_TICKS = 4  # approximate number of ticks on an axis

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
        data: the result of `chart_data`; an area chart also has `stacked` = True.
    """

    svg: str
    data: dict[str, Any]


def format_number(value: float) -> str:
    """Format `value` with four significant digits for readers, such as −0.0123 or 1.5e−5."""
    text = f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.3e}"
    mantissa, _, exponent = text.partition("e")
    if exponent:
        text = f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    return text.replace("-", "−")


def color_class(i: int) -> str:
    """Return the CSS class of series `i`."""
    return f"s{i % NUM_COLORS}"


def line_chart(rows: Rows, names: Mapping[str, str], *, log: bool = False, reference: float | None = None) -> Chart:
    """Draw one line for each metric over the steps.

    Args:
        rows: rows of metrics.jsonl; a row need not have every metric.
        names: metric -> label.
        log: whether the value axis may be logarithmic. It is logarithmic if all values are positive and the largest
            is more than 20 times the smallest.
        reference: a value to compare with, drawn as a dashed horizontal line; None for no line.
    """
    rows = thin_rows(rows, names)
    values = [[row.get(name) for row in rows] for name in names]
    present = [value for series in values for value in series if value is not None]
    if reference is not None:
        present.append(reference)
    log = log and min(present) > 0 and max(present) > 20 * min(present)
    x, y = step_axis(rows), value_axis(min(present), max(present), log)
    parts = render_axes(x, y)
    if reference is not None:
        parts.append(
            f'<line class="reference" x1="{LEFT}" x2="{RIGHT}" y1="{y(reference):.1f}" y2="{y(reference):.1f}"/>'
        )
    thin_class = " fine" if len(rows) > MAX_THICK_LINE_ROWS else ""
    for i, series in enumerate(values):
        points = [(x(row["step"]), y(value)) for row, value in zip(rows, series, strict=True) if value is not None]
        parts.append(f'<polyline class="{color_class(i)}{thin_class}" points="{format_points(points)}"/>')
        if len(points) <= MAX_MARKED_POINTS:
            parts += [f'<circle class="{color_class(i)}" cx="{px:.1f}" cy="{py:.1f}" r="2.2"/>' for px, py in points]
    return Chart(render_svg(parts, describe_series(names.values(), values)), chart_data(rows, values, x, y))


def area_chart(rows: Rows, names: Mapping[str, str]) -> Chart:
    """Draw metrics that are shares of a whole as stacked areas, the first of `names` at the bottom.

    Rows that lack any of the metrics are left out.
    """
    rows = thin_rows([row for row in rows if all(name in row for name in names)], names)
    values = [[row[name] for row in rows] for name in names]
    x, y = step_axis(rows), Axis(0.0, max(1.0, *map(sum, zip(*values, strict=True))), BOTTOM, TOP)
    # An area needs two points, so a single row is drawn at the left and at the right edge.
    step_coordinates = [LEFT, RIGHT] if len(rows) == 1 else [x(row["step"]) for row in rows]
    repeats = len(step_coordinates) // len(rows)
    areas, lower = [], [0.0] * len(rows)
    for i, series in enumerate(values):
        upper = [a + b for a, b in zip(lower, series, strict=True)]
        outline = list(zip(step_coordinates, map(y, upper * repeats), strict=True))
        outline += reversed(list(zip(step_coordinates, map(y, lower * repeats), strict=True)))
        areas.append(f'<polygon class="{color_class(i)}" points="{format_points(outline)}"/>')
        lower = upper
    data = chart_data(rows, values, x, y) | {"stacked": True}
    return Chart(render_svg([*areas, *render_axes(x, y)], describe_series(names.values(), values)), data)


def thin_rows(rows: Rows, names: Iterable[str]) -> Rows:
    """Return the rows that have any metric of `names`, reduced to about `MAX_POINTS` rows if there are more.

    The reduction splits the rows into stretches of equal length. From each stretch it selects the rows with the
    smallest and the largest value of each metric, so that peaks stay visible. It always selects the first and the last
    row.
    """
    names = list(names)
    rows = [row for row in rows if any(name in row for name in names)]
    if len(rows) <= MAX_POINTS:
        return rows
    selected = {0, len(rows) - 1}
    num_stretches = max(1, MAX_POINTS // (2 * len(names)))
    for i in range(num_stretches):
        stretch = range(i * len(rows) // num_stretches, (i + 1) * len(rows) // num_stretches)
        for name in names:
            if measured := [j for j in stretch if name in rows[j]]:
                selected |= {min(measured, key=lambda j: rows[j][name]), max(measured, key=lambda j: rows[j][name])}
    return [rows[j] for j in sorted(selected)]


def step_axis(rows: Rows) -> Axis:
    """Return the horizontal axis for the rows' steps. For a single step, the axis extends one step to each side."""
    low, high = rows[0]["step"], rows[-1]["step"]
    return Axis(low, high, LEFT, RIGHT) if high > low else Axis(low - 1, high + 1, LEFT, RIGHT)


def value_axis(low: float, high: float, log: bool) -> Axis:
    """Return the vertical axis for values from `low` to `high`, with a margin at both ends.

    The margin is 6 % of the range. For a constant value it is 10 % of the value, or 1 if the value is 0. If
    `low` is at least 0, the axis does not extend below 0. A logarithmic axis has a margin of a factor of 1.2 instead.
    """
    if log:
        return Axis(low / 1.2, high * 1.2, BOTTOM, TOP, log=True)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    start = max(low - margin, 0.0) if low >= 0 else low - margin
    return Axis(start, high + margin, BOTTOM, TOP)


def ticks(axis: Axis, *, whole: bool = False) -> list[float]:
    """Return about `NUM_TICKS` round values within the axis; integers only if `whole`.

    The ticks of a logarithmic axis are powers of ten. If the axis spans only few powers, 2 and 5 times these powers are
    added. A logarithmic axis has at most 3 · `NUM_TICKS` ticks.
    """
    if axis.log:
        powers = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
        digits = (1, 2, 5) if len(powers) <= 3 else (1,)
        values = [digit * 10.0**power for power in powers for digit in digits]
        values = values[:: 1 + len(values) // (3 * NUM_TICKS)]
    else:
        min_step = (axis.high - axis.low) / NUM_TICKS
        power = 10.0 ** math.floor(math.log10(min_step))
        digits = (1, 2, 5, 10) if whole and power < 10 else (1, 2, 2.5, 5, 10)
        step = next(digit * power for digit in digits if digit * power >= min_step)
        step = max(1.0, step) if whole else step
        first, last = math.ceil(axis.low / step), math.floor(axis.high / step)
        values = [i * step for i in range(first, last + 1)]
    return [value for value in values if axis.low <= value <= axis.high]


def render_axes(x: Axis, y: Axis) -> list[str]:
    """Return the SVG elements of both axes: grid lines, tick marks and numbers."""
    parts = []
    for value in ticks(y):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text class="left" x="{LEFT - 6}" y="{y(value) + 3.5:.1f}">{format_number(value)}</text>')
    for value in ticks(x, whole=True):
        parts.append(f'<line class="tick" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{BOTTOM}" y2="{BOTTOM + 4}"/>')
        center = min(x(value), WIDTH - 3.6 * len(f"{value:.0f}"))  # keeps the last number inside the drawing
        parts.append(f'<text class="below" x="{center:.1f}" y="{BOTTOM + 17}">{value:.0f}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>')
    return parts


def format_points(points: Iterable[tuple[float, float]]) -> str:
    """Format points for the SVG attribute `points`: "x,y x,y"."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def describe_series(labels: Iterable[str], values: Sequence[Sequence[float | None]]) -> str:
    """Describe the chart in words for screen readers: the first and the last value of each series."""
    recorded = ([value for value in series if value is not None] for series in values)
    return "; ".join(
        f"{label} from {format_number(series[0])} to {format_number(series[-1])}"
        for label, series in zip(labels, recorded, strict=True)
        if series
    )


def render_svg(parts: Iterable[str], description: str) -> str:
    """Return the `<svg>` element with these parts, a description, and the cursor line that the page's script moves."""
    cursor = f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{BOTTOM}"/>'
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{escape(description)}">'
        f"{''.join(parts)}{cursor}</svg>"
    )


def chart_data(rows: Rows, values: Sequence[Sequence[float | None]], x: Axis, y: Axis) -> dict[str, Any]:
    """Return the data of a chart for the page's script.

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
