"""Contact sheets: rows of images on one sheet, with or without captions."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN = 4  # pixels between images
VISIBLE_SIDE = 96  # pixels: smaller images are enlarged by an integer factor to a longer side of about this length
LINE_HEIGHT = 14  # pixels from one line of a caption to the next


def contact_sheet(rows: Sequence[Sequence[np.ndarray]]) -> Image.Image:
    """Draw rows of images [h, w, 3] uint8 on a white sheet. The images may have different sizes.

    Small images are enlarged by repeating their pixels.
    """
    rows = [[_enlarge(image) for image in row] for row in rows]
    heights = [max(image.shape[0] for image in row) for row in rows]
    widths = [max(image.shape[1] for image in column) for column in zip(*rows, strict=True)]
    size = (sum(widths) + MARGIN * (len(widths) + 1), sum(heights) + MARGIN * (len(heights) + 1))
    sheet = Image.new("RGB", size, "white")
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        left = MARGIN
        for image, width in zip(row, widths, strict=True):
            sheet.paste(Image.fromarray(image), (left, top))
            left += width + MARGIN
        top += height + MARGIN
    return sheet


def captioned_sheet(
    captions: Sequence[Sequence[str]], rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str]
) -> Image.Image:
    """Draw a contact sheet with a caption before each row and a title above each column.

    Args:
        captions: for each row, the lines of its caption.
        rows: for each row, its images [h, w, 3] uint8.
        titles: one for each column of images.
    """
    width = max(_text_width(line) for caption in captions for line in caption)
    height = LINE_HEIGHT * max(len(caption) for caption in captions)
    side = max(width, height, VISIBLE_SIDE)  # at least VISIBLE_SIDE, since contact_sheet enlarges smaller images
    captioned_rows = [
        [_draw_text(caption, side, LINE_HEIGHT * len(caption)), *row]
        for caption, row in zip(captions, rows, strict=True)
    ]
    title_row = [_draw_text(["worst first"], side, LINE_HEIGHT)]
    title_row += [_draw_text([title], VISIBLE_SIDE, LINE_HEIGHT) for title in titles]
    return contact_sheet([title_row, *captioned_rows])


def thumbnail(image: Image.Image, side: int) -> np.ndarray:
    """Return the image as [h, w, 3] uint8, scaled down if its height or width exceeds `side` pixels."""
    scaled = image.convert("RGB")
    scaled.thumbnail((side, side))
    return np.asarray(scaled)


def _draw_text(lines: Sequence[str], width: int, height: int) -> np.ndarray:
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for index, line in enumerate(lines):
        draw.text((0, index * LINE_HEIGHT), line, fill="black", font=_FONT)
    return np.asarray(image)


def _text_width(line: str) -> int:
    return int(_FONT.getlength(line)) + 1


def _enlarge(image: np.ndarray) -> np.ndarray:
    factor = max(1, round(VISIBLE_SIDE / max(image.shape[:2])))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


_FONT = ImageFont.load_default(11)
