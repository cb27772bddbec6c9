import csv
import io

import numpy as np

from ra_jax.evaluation.table import COLUMNS, csv_text, summarize, table_text, worst_first

ROWS = [
    {
        "id": "a",
        "result": "a.png",
        "truth": None,
        "width": 4,
        "height": 3,
        "psnr": 10.0,
        "lpips": 0.1,
        "mask_area": 0.5,
    },
    {"id": "b, c", "result": "b.png", "truth": None, "width": 4, "height": 3, "psnr": 30.0, "lpips": 0.4},
    {"id": "d", "result": "d.png", "truth": None, "width": 4, "height": 3, "psnr": None, "lpips": 0.2, "ssim": None},
]


def test_statistics_are_of_the_values_that_are_there():
    summary = summarize(ROWS)
    assert summary["psnr"] == {"mean": 20.0, "median": 20.0, "std": 10.0, "count": 2}
    lpips = np.array([0.1, 0.4, 0.2])
    assert summary["lpips"] == {"mean": lpips.mean(), "median": 0.2, "std": lpips.std(), "count": 3}
    assert "ssim" not in summary


def test_the_csv_holds_every_picture_and_leaves_absent_values_empty():
    read = list(csv.DictReader(io.StringIO(csv_text(ROWS))))
    assert [row["id"] for row in read] == ["a", "b, c", "d"]
    assert [row["psnr"] for row in read] == ["10", "30", ""]
    assert [row["mask_area"] for row in read] == ["0.5", "", ""]
    assert read[0]["truth"] == "" and read[0]["width"] == "4"
    assert "ssim" not in read[0]


def test_worst_first_follows_the_direction_of_the_metric():
    assert worst_first(ROWS, "psnr") == [0, 1, 2]
    assert worst_first(ROWS, "lpips") == [1, 2, 0]


def test_the_table_is_aligned():
    summary = {column.name: {"mean": -0.5, "median": 100.0, "std": 0.25, "count": 12} for column in COLUMNS}
    lines = table_text(summary).splitlines()
    assert len(lines) == 1 + len(COLUMNS)
    end = lines[0].index("count") + len("count")
    assert all(line[:end].endswith(" 12") for line in lines[1:])
    psnr = next(line for line in lines if line.startswith("psnr "))
    assert psnr.split() == ["psnr", "[dB]", "-0.50", "100.00", "0.25", "12", "higher"]
