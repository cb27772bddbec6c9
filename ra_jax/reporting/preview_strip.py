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

COLUMNS = ("source", "mask", "result", "ground truth")
RESULT_COLUMN = COLUMNS.index("result")
# (longer side of an image [pixels], number of steps), tried in this order until the table fits its budget.
SIZES = ((384, 12), (384, 8), (256, 8), (256, 5), (160, 5), (160, 3), (96, 2))
MAX_PNG_BYTES = 30_000  # an image is stored as PNG if that takes at most this many bytes, else as JPEG
JPEG_QUALITY = 88


def preview_strip(folder: Path, budget: int) -> str:
    """Return the sheets step_<n>.png in `folder` as an HTML table, with notes on the steps that are left out.

    The table has at most `budget` bytes. Until it fits, the images become smaller and the steps fewer.
    """
    paths, unreadable = find_sheets(folder)
    notes = [f"{name} could not be read." for name in unreadable]
    if not paths:
        return render_notes(["This run has no previews.", *notes])
    sheets: dict[int, Image.Image] = {}
    for side, count in SIZES:
        steps = select_steps(list(paths), count)
        sheets |= {step: Image.open(paths[step]).convert("RGB") for step in steps if step not in sheets}
        columns = split_columns({step: sheets[step] for step in steps})
        if columns is None:
            columns = {f"step {step}": [sheets[step]] for step in steps}
            side *= len(COLUMNS) // 2
        table = render_table(
            {caption: [encode_image(image, side) for image in images] for caption, images in columns.items()}
        )
        if len(table) <= budget:
            if len(steps) < len(paths):
                notes.insert(0, f"{len(steps)} of {len(paths)} steps are shown. The folder previews/ has all of them.")
            return table + render_notes(notes)
    return render_notes(["The previews are too large for this page. They are in the folder previews/.", *notes])


def find_sheets(folder: Path) -> tuple[dict[int, Path], list[str]]:
    """Find the sheets step_<n>.png in `folder`.

    Returns:
        The paths of the readable sheets as {step: path}, sorted by step.
        The names of the files that cannot be read, such as an incomplete file that a killed run left.
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


def select_steps(steps: Sequence[int], count: int) -> list[int]:
    """Return at most `count` of the steps, evenly spread, including the first and the last."""
    indices = np.linspace(0, len(steps) - 1, min(count, len(steps))).round().astype(int)
    return [steps[i] for i in indices]


def split_columns(sheets: dict[int, Image.Image]) -> dict[str, list[Image.Image]] | None:
    """Cut the sheets {step: sheet} into columns of images, {caption: [one image for each scene]}.

    Returns None if the sheets differ in size, or are not contact sheets with the columns of `COLUMNS`.
    """
    arrays = {step: np.asarray(sheet) for step, sheet in sheets.items()}
    if len({array.shape for array in arrays.values()}) > 1:
        return None
    boxes = find_image_boxes(list(arrays.values()))
    if boxes is None:
        return None
    first, last = next(iter(sheets)), next(reversed(sheets))

    def crop_column(step: int, index: int) -> list[Image.Image]:
        return [sheets[step].crop(row[index]) for row in boxes]

    columns = {name: crop_column(first, index) for index, name in enumerate(COLUMNS[:RESULT_COLUMN])}
    columns |= {f"step {step}": crop_column(step, RESULT_COLUMN) for step in sheets}
    return columns | {COLUMNS[-1]: crop_column(last, len(COLUMNS) - 1)}


def find_image_boxes(sheets: Sequence[np.ndarray]) -> list[list[tuple[int, int, int, int]]] | None:
    """Find the images in sheets [h, w, 3] uint8 by the white margins between them.

    All columns are as wide as the widest scene, so their positions follow from the sheet's width. Rows are separated
    by margins that are white over the whole width in every sheet. If a scene is narrower than the columns, its images
    end at the last column of pixels in which any of them is not white.

    Returns:
        [scene][column] (left, top, right, bottom) in pixels; None if the sheets do not have these margins.
    """
    height, total_width, _ = sheets[0].shape
    not_white = np.any([(sheet < 255).any(-1) for sheet in sheets], axis=0)  # [height, total_width]
    width, remainder = divmod(total_width - MARGIN * (len(COLUMNS) + 1), len(COLUMNS))
    lefts = [MARGIN + i * (width + MARGIN) for i in range(len(COLUMNS))]
    in_margin = np.ones(total_width, bool)
    for left in lefts:
        in_margin[left : left + max(width, 0)] = False
    if remainder or width <= 0 or not_white[:, in_margin].any():
        return None
    edges = np.flatnonzero(np.diff(not_white.any(1).astype(int))) + 1
    tops, bottoms = edges[::2], edges[1::2]
    gaps = np.append(tops, height) - np.insert(bottoms, 0, 0)
    if len(tops) == 0 or np.any(gaps != MARGIN):
        return None
    boxes = []
    for top, bottom in zip(tops.tolist(), bottoms.tolist(), strict=True):
        used = np.any([not_white[top:bottom, left : left + width].any(0) for left in lefts], axis=0)
        scene_width = int(np.flatnonzero(used)[-1]) + 1
        boxes.append([(left, top, left + scene_width, bottom) for left in lefts])
    return boxes


def encode_image(image: Image.Image, side: int) -> str:
    """Encode `image` as a data URI, scaled down if its longer side exceeds `side` pixels.

    The format is PNG if that takes at most `MAX_PNG_BYTES`, else JPEG.
    """
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    png, jpeg = io.BytesIO(), io.BytesIO()
    image.save(png, "PNG")
    if png.tell() <= MAX_PNG_BYTES:
        return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    image.save(jpeg, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()


def render_table(columns: dict[str, list[str]]) -> str:
    """Return an HTML table of images with one row for each scene, in a box that scrolls sideways.

    columns: {caption: [data URI of one image for each scene]}.
    """
    header = "".join(f'<th scope="col">{escape(caption)}</th>' for caption in columns)
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
        f'<table style="--columns: {len(columns)}"><thead><tr>{header}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def render_notes(notes: Sequence[str]) -> str:
    """Return the notes as one HTML paragraph; an empty string if there are none."""
    return f'<p class="note">{escape(" ".join(notes))}</p>' if notes else ""
