"""Decode photos and masks from files, with EXIF orientation applied.

Transparent pixels become white in photos and black in masks. Sizes are (height, width) in pixels of the upright image.
A window is (left, top, right, bottom) in pixels of the upright image. An image file is a path or a `packs.PackedImage`.
"""

import io
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import ExifTags, Image, ImageOps

Size = tuple[int, int]
Window = tuple[int, int, int, int]


class ImageFile(Protocol):
    """Protocol of an encoded image: `Path` and `packs.PackedImage` implement it."""

    @property
    def name(self) -> str:
        """Name of the file."""

    @property
    def stem(self) -> str:
        """Name of the file without its suffix."""

    def read_bytes(self) -> bytes:
        """Return the bytes of the encoded image."""


SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
MASK_THRESHOLD = 127
MIN_DECODE_SCALE = 1.5  # a JPEG decoded at reduced size is at least this many times as high and wide as its panel

# Errors that Pillow raises for a file that is not an image, is truncated or is broken. A broken PNG chunk raises
# SyntaxError.
UNREADABLE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def open_image(path: ImageFile) -> Image.Image:
    """Open an image without decoding it.

    Raises:
        OSError, SyntaxError, Image.DecompressionBombError: the file is not a readable image.
        ValueError: the image has more than 8 bits per channel. Pillow would clip its values to white, not scale them.
    """
    image = Image.open(path if isinstance(path, Path) else io.BytesIO(path.read_bytes()))
    if image.mode.startswith(("I", "F")):
        image.close()
        raise ValueError(f"{path.name} has mode {image.mode}: expected 8 bits per channel; convert the file")
    return image


def width_by_height(size: Size) -> str:
    """Format a size (height, width) as "width × height" for messages."""
    return f"{size[1]} × {size[0]}"


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image: 1 is upright (default), 2 to 8 are rotated or mirrored."""
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def upright_size(image: Image.Image) -> Size:
    """Return (height, width) after EXIF orientation; orientations 5 to 8 swap height and width."""
    width, height = image.size
    return (width, height) if orientation(image) >= 5 else (height, width)


def read_photo_size(path: ImageFile) -> Size:
    """Read the size of a photo from the file header, without decoding it; raises one of `UNREADABLE_ERRORS`."""
    with open_image(path) as image:
        return upright_size(image)


def verify_photo(path: ImageFile) -> Size:
    """Decode a photo to check that its file is complete; returns its size, or raises one of `UNREADABLE_ERRORS`."""
    with open_image(path) as image:
        size = upright_size(image)
        # A JPEG is decoded at an eighth of its size. This reads every byte, so it detects a truncated file, but needs
        # little computation.
        image.draft(None, (1, 1))
        image.load()
    return size


def read_mask(path: ImageFile) -> np.ndarray:
    """Read a mask as [h, w] bool, True = remove: `read_soft_mask` > 127; raises one of `UNREADABLE_ERRORS`."""
    return read_soft_mask(path) > MASK_THRESHOLD


def read_soft_mask(path: ImageFile) -> np.ndarray:
    """Read a mask as [h, w] uint8: luminance, 0 where transparent; raises one of `UNREADABLE_ERRORS`."""
    with open_image(path) as image:
        return soft_mask(image)


def soft_mask(image: Image.Image) -> np.ndarray:
    """Convert an opened mask to [h, w] uint8, upright: luminance, 0 where transparent."""
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        upright = _composite_over(upright, "black")
    return np.asarray(upright.convert("L"))


def read_photo(path: ImageFile) -> Image.Image:
    """Read a whole photo as upright RGB, white where transparent; raises one of `UNREADABLE_ERRORS`."""
    with open_image(path) as image:
        return upright_rgb(image)


def read_panel(path: ImageFile, window: Window, size: Size) -> np.ndarray:
    """Read a window of a photo and resize it to `size`: [h, w, 3] uint8, bicubic with antialiasing.

    Raises one of `UNREADABLE_ERRORS`.
    """
    height, width = size
    with open_image(path) as image:
        divisor = _reduce_decode_size(image, window, size)
        photo = upright_rgb(image)
    box = tuple(side / divisor for side in window)
    return np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC, box))


def _reduce_decode_size(image: Image.Image, window: Window, size: Size) -> float:
    """Reduce the size at which a JPEG is decoded to 1/2, 1/4 or 1/8, and return this divisor as a float.

    The reduced window keeps at least 1.5 times the height and width of `size`. If it cannot, or if the file is not a
    JPEG, the image is decoded at full size, and the divisor is 1.0.

    Images that are not stored upright are decoded at full size, too. The decoder rounds the reduced size up, which pads
    the right and bottom edges. Turning the image upright would move this padding to the left or top edge.
    """
    left, top, right, bottom = window
    max_divisor = min((bottom - top) / size[0], (right - left) / size[1]) / MIN_DECODE_SCALE
    if max_divisor < 2 or orientation(image) != 1:
        return 1.0
    width, height = image.size
    draft = image.draft(None, (int(width / max_divisor), int(height / max_divisor)))
    return 1.0 if draft is None else width / draft[1][2]


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert an opened photo to upright RGB, white where transparent."""
    upright = ImageOps.exif_transpose(image)
    return _composite_over(upright, "white") if upright.has_transparency_data else upright.convert("RGB")


def _composite_over(image: Image.Image, color: str) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, color), image).convert("RGB")
