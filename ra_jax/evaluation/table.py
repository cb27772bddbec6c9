"""The columns of an evaluation, and its output: a CSV with all results, a summary and a printed table."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Row = Mapping[str, float | str | None]


@dataclass(frozen=True)
class Column:
    """A metric and how to print it.

    Attributes:
        name: the name in the CSV, the summary and the printed table.
        better: the direction in which results are better: "higher", "lower", or "" for neither.
        unit: the unit, if any.
        digits: the number of decimal places in the printed table and on the contact sheet.
        why_missing: why a result may have no value.
    """

    name: str
    better: str
    unit: str = ""
    digits: int = 4
    why_missing: str = ""


_NO_OUTSIDE = "the mask covers the whole image"
_NO_WINDOW = "no window of 11 × 11 pixels is centered in the region"
_ZERO_FEATURES = "all features are 0"

COLUMNS = (
    Column("total_reward", "higher"),
    Column("removal", "higher"),
    Column("background", "higher"),
    Column("smoothness", "higher"),
    Column("removal_without_target", "higher"),
    Column("background_without_target", "higher"),
    Column("psnr", "higher", "dB", 2),
    Column("psnr_mask", "higher", "dB", 2),
    Column("psnr_outside", "higher", "dB", 2, _NO_OUTSIDE),
    Column("psnr_seam", "higher", "dB", 2, _NO_OUTSIDE),
    Column("ssim", "higher", why_missing=_NO_WINDOW),
    Column("ssim_mask", "higher", why_missing=_NO_WINDOW),
    Column("ssim_outside", "higher", why_missing=_NO_WINDOW),
    Column("ssim_seam", "higher", why_missing=_NO_WINDOW),
    Column("lpips", "lower", why_missing="the image is too small for the network"),
    Column("clip_similarity", "higher", why_missing=_ZERO_FEATURES),
    Column("dino_similarity", "higher", why_missing=_ZERO_FEATURES),
    Column("mask_area", "", "of photo"),
    Column("psnr_source_outside", "higher", "dB", 2, _NO_OUTSIDE),
)
COLUMN_BY_NAME = {column.name: column for column in COLUMNS}
INFO_COLUMNS = ("id", "result", "truth", "width", "height")  # first columns of the CSV, before the metrics
STATISTICS = ("mean", "median", "std", "count")


def measured_columns(rows: Sequence[Row]) -> list[Column]:
    """Return the columns in which at least one row has a value."""
    return [column for column in COLUMNS if any(row.get(column.name) is not None for row in rows)]


def summarize(rows: Sequence[Row]) -> dict[str, dict[str, float | int]]:
    """Compute mean, median, standard deviation (divisor n) and count of each metric, over the rows that have it."""
    summary = {}
    for column in measured_columns(rows):
        values = np.array([row[column.name] for row in rows if row.get(column.name) is not None], np.float64)
        statistics = (float(values.mean()), float(np.median(values)), float(values.std()), len(values))
        summary[column.name] = dict(zip(STATISTICS, statistics, strict=True))
    return summary


def csv_text(rows: Sequence[Row]) -> str:
    """Format the rows as CSV, with one line per row in the same order. The cell of a missing value is empty."""
    names = [*INFO_COLUMNS, *(column.name for column in measured_columns(rows))]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _format_cell(row.get(name)) for name in names})
    return text.getvalue()


def table_text(summary: Mapping[str, Mapping[str, float | int]]) -> str:
    """Format the result of `summarize` as aligned text, with one line per metric."""
    lines = [f"{'metric':<27}{'mean':>10}{'median':>10}{'std':>10}{'count':>8}  better"]
    for name, values in summary.items():
        column = COLUMN_BY_NAME[name]
        numbers = "".join(f"{values[statistic]:>10.{column.digits}f}" for statistic in STATISTICS[:3])
        lines.append(f"{_format_label(column):<27}{numbers}{values['count']:>8}  {column.better}".rstrip())
    return "\n".join(lines)


def worst_first(rows: Sequence[Row], name: str) -> list[int]:
    """Return the indices of the rows, from the worst value of metric `name` to the best.

    Rows without a value come last. If neither high nor low values are better (`mask_area`), the largest
    value comes first.
    """
    sign = 1.0 if COLUMN_BY_NAME[name].better == "higher" else -1.0
    values = [row.get(name) for row in rows]
    return sorted(range(len(rows)), key=lambda i: (values[i] is None, 0.0 if values[i] is None else sign * values[i]))


def _format_cell(value: float | str | None) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _format_label(column: Column) -> str:
    return f"{column.name} [{column.unit}]" if column.unit else column.name
