"""Contact sheets: rows of images on one sheet, with or without captions."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN = 4  # pixels between images
SEEN = 96  # pixels: smaller images are enlarged by a whole factor, so that their longer side is about this long
LINE = 14  # pixels from one line of a caption to the next


def contact_sheet(rows: Sequence[Sequence[np.ndarray]]) -> Image.Image:
    """Draws rows of images [h, w, 3] uint8 on white; their sizes may differ.

    Small images are enlarged by repeating their pixels.
    """
    rows = [[_enlarged(panel) for panel in row] for row in rows]
    heights = [max(panel.shape[0] for panel in row) for row in rows]
    widths = [max(panel.shape[1] for panel in column) for column in zip(*rows, strict=True)]
    size = (sum(widths) + MARGIN * (len(widths) + 1), sum(heights) + MARGIN * (len(heights) + 1))
    sheet = Image.new("RGB", size, "white")
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        left = MARGIN
        for panel, width in zip(row, widths, strict=True):
            sheet.paste(Image.fromarray(panel), (left, top))
            left += width + MARGIN
        top += height + MARGIN
    return sheet


def captioned(
    captions: Sequence[Sequence[str]], rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str]
) -> Image.Image:
    """Draws a contact sheet with a caption before each row and a title above each column.

    Args:
        captions: for each row, the lines of its caption.
        rows: for each row, its images [h, w, 3] uint8.
        titles: one for each column of images.
    """
    width = max(_text_width(line) for caption in captions for line in caption)
    height = LINE * max(len(caption) for caption in captions)
    side = max(width, height, SEEN)  # at least SEEN, since contact_sheet enlarges smaller images
    panels = [[_text(caption, side, LINE * len(caption)), *row] for caption, row in zip(captions, rows, strict=True)]
    heads = [_text(["worst first"], side, LINE), *(_text([title], SEEN, LINE) for title in titles)]
    return contact_sheet([heads, *panels])


def thumbnail(image: Image.Image, side: int) -> np.ndarray:
    """Returns the image as [h, w, 3] uint8, scaled down if its height or width exceeds `side` pixels."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    return np.asarray(small)


def _text(lines: Sequence[str], width: int, height: int) -> np.ndarray:
    panel = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(panel)
    for number, line in enumerate(lines):
        draw.text((0, number * LINE), line, fill="black", font=_FONT)
    return np.asarray(panel)


def _text_width(line: str) -> int:
    return int(_FONT.getlength(line)) + 1


def _enlarged(panel: np.ndarray) -> np.ndarray:
    factor = max(1, round(SEEN / max(panel.shape[:2])))
    return panel.repeat(factor, axis=0).repeat(factor, axis=1)


_FONT = ImageFont.load_default(11)
