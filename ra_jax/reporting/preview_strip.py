"""The previews of a run as one HTML table for `report.html`.

Each row is a scene. The columns are source, mask, the result at each step, and ground truth.
"""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from ra_jax.reporting.contact_sheet import MARGIN

PANELS = ("source", "mask", "result", "ground truth")
RESULT = PANELS.index("result")
# (longer side of an image [pixels], number of steps), tried in this order until the table fits its budget.
SIZES = ((384, 12), (384, 8), (256, 8), (256, 5), (160, 5), (160, 3), (96, 2))
LOSSLESS = 30_000  # bytes: an image is stored as PNG if the PNG is at most this large, else as JPEG
QUALITY = 88  # JPEG quality


def preview_strip(folder: Path, budget: int) -> str:
    """Returns the HTML of the sheets step_<n>.png in `folder`, with notes on what is left out.

    The table has at most `budget` bytes: images become smaller and steps fewer until it fits.
    """
    paths, unreadable = find_sheets(folder)
    notes = [f"{name} could not be read." for name in unreadable]
    if not paths:
        return said(["This run has no previews.", *notes])
    sheets: dict[int, Image.Image] = {}
    for side, count in SIZES:
        steps = spread(list(paths), count)
        sheets |= {step: Image.open(paths[step]).convert("RGB") for step in steps if step not in sheets}
        columns = picture_columns({step: sheets[step] for step in steps})
        if columns is None:
            columns = {f"step {step}": [sheets[step]] for step in steps}
            side *= len(PANELS) // 2
        strip = table({caption: [picture(image, side) for image in images] for caption, images in columns.items()})
        if len(strip) <= budget:
            if len(steps) < len(paths):
                notes.insert(0, f"{len(steps)} of {len(paths)} steps shown; all are in previews/.")
            return strip + said(notes)
    return said(["The previews are too large for this page; they are in previews/.", *notes])


def find_sheets(folder: Path) -> tuple[dict[int, Path], list[str]]:
    """Finds the sheets step_<n>.png in `folder`.

    Returns:
        The paths of the readable sheets as {step: path}, sorted by step; the names of the files that cannot be read,
        such as an incomplete file that a killed run left.
    """
    paths, unreadable = {}, []
    for path in sorted(folder.glob("step_*.png")):
        try:
            step = int(path.stem.removeprefix("step_"))
            with Image.open(path) as image:
                image.verify()
        except (ValueError, OSError, SyntaxError, Image.DecompressionBombError):
            unreadable.append(path.name)
        else:
            paths[step] = path
    return dict(sorted(paths.items())), unreadable


def spread(steps: Sequence[int], count: int) -> list[int]:
    """Returns at most `count` of the steps, evenly spread, including the first and the last."""
    chosen = np.linspace(0, len(steps) - 1, min(count, len(steps))).round().astype(int)
    return [steps[i] for i in chosen]


def picture_columns(sheets: dict[int, Image.Image]) -> dict[str, list[Image.Image]] | None:
    """Cuts the sheets {step: sheet} into columns of images, {caption: [one image for each scene]}.

    Returns None if the sheets differ in size, or are not contact sheets with the columns of `PANELS`.
    """
    arrays = {step: np.asarray(sheet) for step, sheet in sheets.items()}
    if len({array.shape for array in arrays.values()}) > 1:
        return None
    boxes = scene_boxes(list(arrays.values()))
    if boxes is None:
        return None
    first, last = next(iter(sheets)), next(reversed(sheets))

    def column(step: int, panel: int) -> list[Image.Image]:
        return [sheets[step].crop(row[panel]) for row in boxes]

    columns = {name: column(first, panel) for panel, name in enumerate(PANELS[:RESULT])}
    columns |= {f"step {step}": column(step, RESULT) for step in sheets}
    return columns | {PANELS[-1]: column(last, len(PANELS) - 1)}


def scene_boxes(sheets: Sequence[np.ndarray]) -> list[list[tuple[int, int, int, int]]] | None:
    """Finds the images in sheets [h, w, 3] uint8 by the white margins between them.

    All columns are as wide as the widest scene, so their positions follow from the sheet's width. Rows are separated
    by margins that are white over the whole width in every sheet. The images of a narrower scene end where all of
    them are white up to the end of their columns.

    Returns:
        [scene][column] (left, top, right, bottom) in pixels; None if the margins are not those of this layout.
    """
    height, total, _ = sheets[0].shape
    inked = np.any([(sheet < 255).any(-1) for sheet in sheets], axis=0)  # [height, total]
    width, rest = divmod(total - MARGIN * (len(PANELS) + 1), len(PANELS))
    lefts = [MARGIN + i * (width + MARGIN) for i in range(len(PANELS))]
    margins = np.ones(total, bool)
    for left in lefts:
        margins[left : left + max(width, 0)] = False
    if rest or width <= 0 or inked[:, margins].any():
        return None
    edges = np.flatnonzero(np.diff(inked.any(1).astype(int))) + 1
    tops, bottoms = edges[::2], edges[1::2]
    gaps = np.append(tops, height) - np.insert(bottoms, 0, 0)
    if len(tops) == 0 or np.any(gaps != MARGIN):
        return None
    boxes = []
    for top, bottom in zip(tops.tolist(), bottoms.tolist(), strict=True):
        ink = np.any([inked[top:bottom, left : left + width].any(0) for left in lefts], axis=0)
        right = int(np.flatnonzero(ink)[-1]) + 1
        boxes.append([(left, top, left + right, bottom) for left in lefts])
    return boxes


def picture(image: Image.Image, side: int) -> str:
    """Encodes `image` as a data URI, scaled down if its longer side exceeds `side` pixels.

    The format is PNG if that takes at most `LOSSLESS` bytes, else JPEG.
    """
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    png, jpeg = io.BytesIO(), io.BytesIO()
    image.save(png, "PNG")
    if png.tell() <= LOSSLESS:
        return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    image.save(jpeg, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()


def table(columns: dict[str, list[str]]) -> str:
    """Returns a table of images in a box that scrolls sideways, one row for each scene.

    columns: {caption: [data URI of one image for each scene]}.
    """
    heads = "".join(f'<th scope="col">{escape(caption)}</th>' for caption in columns)
    rows = []
    for scene, uris in enumerate(zip(*columns.values(), strict=True), start=1):
        cells = (
            f'<td><button type="button" class="picture"><img src="{uri}" alt="Scene {scene}, {escape(caption)}">'
            "</button></td>"
            for caption, uri in zip(columns, uris, strict=True)
        )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        '<div class="strip" tabindex="0" role="region" aria-label="Previews by step">'
        f'<table style="--columns: {len(columns)}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def said(notes: Sequence[str]) -> str:
    """Returns the notes as one HTML paragraph; an empty string if there are none."""
    return f'<p class="note">{escape(" ".join(notes))}</p>' if notes else ""
