"""Photos and masks as files hold them: upright by their EXIF orientation, on white where transparent.

Sizes are (height, width) in pixels of the upright picture. A window is (left, top, right, bottom) in those
pixels. A picture is a file's path, or what reads like one (`packs.PackedPicture`).
"""

import io
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import ExifTags, Image, ImageOps

Size = tuple[int, int]
Window = tuple[int, int, int, int]


class Picture(Protocol):
    """An encoded picture: a Path is one."""

    @property
    def name(self) -> str:
        """The file's name."""

    @property
    def stem(self) -> str:
        """The file's name without its ending."""

    def read_bytes(self) -> bytes:
        """The encoded picture."""


SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
MASK_THRESHOLD = 127
MIN_DECODE_SCALE = 1.5  # a photo is decoded at no less than this factor of the size it is resized to

# What Pillow raises for a file that is no picture, is cut short or broken: SyntaxError comes from PNG chunks.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def open_image(path: Picture) -> Image.Image:
    """Open without decoding.

    Raises:
        OSError, SyntaxError, Image.DecompressionBombError: no readable picture.
        ValueError: more than 8 bits a channel, which Pillow would clip to white rather than scale.
    """
    image = Image.open(path if isinstance(path, Path) else io.BytesIO(path.read_bytes()))
    if image.mode.startswith(("I", "F")):
        image.close()
        raise ValueError(f"{path.name} has pixels of mode {image.mode}: expected 8 bits a channel; save it as such")
    return image


def width_by_height(size: Size) -> str:
    """A size in words, for messages."""
    return f"{size[1]} × {size[0]}"


def orientation(image: Image.Image) -> int:
    """EXIF orientation of an opened picture: 1 upright, 2 to 8 turned or mirrored; 1 where none is noted."""
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def upright_size(image: Image.Image) -> Size:
    """(height, width) once the EXIF orientation is applied; orientations 5 to 8 lie on their side."""
    width, height = image.size
    return (width, height) if orientation(image) >= 5 else (height, width)


def photo_size(path: Picture) -> Size:
    """Size of a photo, from the file's head alone; raises one of `UNREADABLE`."""
    with open_image(path) as image:
        return upright_size(image)


def probe_photo(path: Picture) -> Size:
    """Size of a photo, after decoding all of it; raises one of `UNREADABLE`."""
    with open_image(path) as image:
        size = upright_size(image)
        # JPEG at an eighth of the size reads every byte, so it finds a cut file, but skips most of the
        # arithmetic.
        image.draft(None, (1, 1))
        image.load()
    return size


def read_mask(path: Picture) -> np.ndarray:
    """[h, w] bool, True = remove: `read_soft_mask` above 127; raises one of `UNREADABLE`."""
    return read_soft_mask(path) > MASK_THRESHOLD


def read_soft_mask(path: Picture) -> np.ndarray:
    """[h, w] uint8: luminance, black where transparent; raises one of `UNREADABLE`."""
    with open_image(path) as image:
        return soft_mask(image)


def soft_mask(image: Image.Image) -> np.ndarray:
    """[h, w] uint8 of an opened mask, upright: luminance, black where transparent."""
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        upright = _over(upright, "black")
    return np.asarray(upright.convert("L"))


def read_photo(path: Picture) -> Image.Image:
    """The whole photo, RGB, upright, on white where it is transparent; raises one of `UNREADABLE`."""
    with open_image(path) as image:
        return upright_rgb(image)


def read_panel(path: Picture, window: Window, size: Size) -> np.ndarray:
    """[h, w, 3] uint8: the window of a photo resized to `size`, bicubic with antialiasing."""
    height, width = size
    with open_image(path) as image:
        shrink = _decode_smaller(image, window, size)
        photo = upright_rgb(image)
    box = tuple(side / shrink for side in window)
    return np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC, box))


def _decode_smaller(image: Image.Image, window: Window, size: Size) -> float:
    """Decode JPEG at 1/2, 1/4 or 1/8 if 1.5 times the panel's side remains; returns the divisor of coordinates.

    Only for pictures stored upright: the smaller size is rounded up, and turning would move that padding to
    the front.
    """
    left, top, right, bottom = window
    spare = min((bottom - top) / size[0], (right - left) / size[1]) / MIN_DECODE_SCALE
    if spare < 2 or orientation(image) != 1:
        return 1.0
    width, height = image.size
    drafted = image.draft(None, (int(width / spare), int(height / spare)))
    return 1.0 if drafted is None else width / drafted[1][2]


def upright_rgb(image: Image.Image) -> Image.Image:
    """An opened photo, RGB, upright, on white where it is transparent."""
    upright = ImageOps.exif_transpose(image)
    return _over(upright, "white") if upright.has_transparency_data else upright.convert("RGB")


def _over(image: Image.Image, color: str) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, color), image).convert("RGB")
