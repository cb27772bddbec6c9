"""Draws removals as pairs "before | after": the picture of README.

    python scripts/experiments/before_after.py output/tiny_removals docs/images/before_after.png

The folder is one that `python -m ra_jax.infer` wrote. The first scenes of its `records.json` are drawn, in their order,
enlarged without smoothing.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image

GAP = 4  # pixels between before and after; twice as many between pairs


@dataclass(frozen=True)
class Settings:
    """What to draw, and where to write it."""

    removals: Annotated[Path, tyro.conf.Positional]  # output folder of `python -m ra_jax.infer`
    image: Annotated[Path, tyro.conf.Positional]  # PNG file to write
    scenes: int = 6
    columns: int = 3  # pairs in a row
    side: int = 128  # of an image in the picture, in pixels


def draw_pairs(pairs: list[tuple[Image.Image, Image.Image]], columns: int, side: int) -> Image.Image:
    """Arrange pairs of images in rows of `columns` pairs, on white, each image `side` pixels high and wide."""
    width, height = 2 * side + 3 * GAP, side + 2 * GAP
    rows = -(-len(pairs) // columns)
    sheet = Image.new("RGB", (min(columns, len(pairs)) * width - 2 * GAP, rows * height - 2 * GAP), "white")
    for number, pair in enumerate(pairs):
        row, column = divmod(number, columns)
        for place, image in enumerate(pair):
            enlarged = image.convert("RGB").resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (column * width + place * (side + GAP), row * height))
    return sheet


def main(settings: Settings) -> None:
    """Draw the first scenes of a folder of removals."""
    records = json.loads((settings.removals / "records.json").read_text(encoding="utf-8"))[: settings.scenes]
    pairs = [tuple(Image.open(settings.removals / record[name]) for name in ("src", "result")) for record in records]
    settings.image.parent.mkdir(parents=True, exist_ok=True)
    draw_pairs(pairs, settings.columns, settings.side).save(settings.image, optimize=True)
    print(settings.image)


if __name__ == "__main__":
    main(tyro.cli(Settings))
