"""Load the images of a record as panels of one size. Training and previews use the same crop and resize.

A photo is resized so that it covers the bucket, and the pixels outside the bucket are cropped off. The crop is centered
on the mask as far as the borders of the photo allow. If the crop would cut the mask, the whole photo is stretched to
the bucket instead. A distorted scene is still useful for training, but half an object is not.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ra_jax.data.diptych import reference_on_white
from ra_jax.data.images import ImageFile, Size, Window, read_mask, read_panel, read_photo, read_photo_size
from ra_jax.data.masks import bounding_box
from ra_jax.data.records import Record


@dataclass(frozen=True)
class Panels:
    """The images of one record in a bucket (h, w): photos [h, w, 3] uint8, mask [h, w] uint8 with 1 = remove."""

    source: np.ndarray
    mask: np.ndarray
    reference: np.ndarray
    result: np.ndarray | None


class PanelCache:
    """Thread-safe cache of arrays. When they exceed `max_bytes` in total, the least recently used ones are dropped."""

    def __init__(self, max_bytes: int):
        self._max_bytes, self._bytes = max_bytes, 0
        self._values: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return the cached value of `key`, or compute it with `make`.

        The value is an array or a tuple that contains arrays. The arrays become read-only.
        """
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        for array in _arrays(value):
            array.flags.writeable = False
        with self._lock:
            if key not in self._values:
                self._values[key] = value
                self._bytes += sum(array.nbytes for array in _arrays(value))
            while self._bytes > self._max_bytes:
                _, evicted = self._values.popitem(last=False)
                self._bytes -= sum(array.nbytes for array in _arrays(evicted))
        return value


def _arrays(value: Any) -> list[np.ndarray]:
    if isinstance(value, np.ndarray):
        return [value]
    return [item for item in value if isinstance(item, np.ndarray)]


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> int:
    """Return the index of the bucket with the nearest aspect ratio, argmin |log(h/w) − log(h_b/w_b)|.

    Among buckets with the same ratio, the one with the nearest area is chosen.
    """

    def distance(bucket: Size) -> tuple[float, float]:
        ratio = math.log(size[0] / size[1]) - math.log(bucket[0] / bucket[1])
        area = math.log(size[0] * size[1]) - math.log(bucket[0] * bucket[1])
        return round(abs(ratio), 9), abs(area)  # rounded so that 3:2 and 6:4 compare equal

    return min(range(len(buckets)), key=lambda i: distance(buckets[i]))


def crop_window(size: Size, bucket: Size, mask_box: Window) -> Window:
    """Return the window of a photo that becomes the panel, in whole pixels.

    The window is the largest one with the bucket's aspect ratio. It is centered on the mask as far as the borders of
    the photo allow. If the mask does not fit into this window, the window is the whole photo.

    Args:
        size: size of the photo.
        bucket: size of the panel.
        mask_box: bounding box of the mask.
    """
    scale = min(size[0] / bucket[0], size[1] / bucket[1])
    height, width = (min(size[i], max(1, round(bucket[i] * scale))) for i in (0, 1))
    left, top, right, bottom = mask_box
    if right - left > width or bottom - top > height:
        return 0, 0, size[1], size[0]
    x = min(max((left + right - width) // 2, 0), size[1] - width)
    y = min(max((top + bottom - height) // 2, 0), size[0] - height)
    return x, y, x + width, y + height


def resize_mask(mask: np.ndarray, window: Window, size: Size) -> np.ndarray:
    """Resize a window of a mask to [h, w] uint8; a pixel is 1 if it covers any mask pixel, so thin masks remain."""
    # Coverage is float32: in 8 bits, a single pixel of a large photo would be rounded to 0.
    coverage = Image.fromarray(mask.astype(np.float32)).resize(size[::-1], Image.Resampling.BOX, window)
    return (np.asarray(coverage) > 0).astype(np.uint8)


def load_mask(record: Record, bucket: Size, cache: PanelCache) -> np.ndarray:
    """Load the mask of a record as `load_panels` does, without the other panels."""
    return cache.get(("mask", record.mask, bucket), lambda: _load_window_and_mask(record.mask, bucket))[1]


def load_panels(record: Record, bucket: Size, cache: PanelCache | None = None) -> Panels:
    """Load the panels of a record: all images decoded, cropped and resized to `bucket` = (height, width).

    The reference panel is made from the record's `ref`. If `ref` has the size of the photo, it is cropped to the same
    window, so that the object keeps its position. If `ref` has another size, the whole of `ref` is resized to fit the
    bucket and centered on white. If there is no `ref`, the reference panel is the masked object on white.

    With a cache, files that several records share are decoded once. If a file is no longer readable, one of
    `images.UNREADABLE_ERRORS` is raised.
    """
    cache = cache or PanelCache(0)
    window, mask = cache.get(("mask", record.mask, bucket), lambda: _load_window_and_mask(record.mask, bucket))

    def load_photo(path: ImageFile) -> np.ndarray:
        return cache.get(("photo", path, window, bucket), lambda: read_panel(path, window, bucket))

    def load_reference(path: ImageFile) -> np.ndarray:
        if read_photo_size(path) == record.size:
            return load_photo(path)
        return np.asarray(ImageOps.pad(read_photo(path), bucket[::-1], Image.Resampling.BICUBIC, color="white"))

    source, ref = load_photo(record.src), record.ref
    if ref is None:
        reference = reference_on_white(source, mask)
    else:
        reference = cache.get(("reference", ref, window, bucket), lambda: load_reference(ref))
    result = None if record.result is None else load_photo(record.result)
    return Panels(source=source, mask=mask, reference=reference, result=result)


def _load_window_and_mask(path: ImageFile, bucket: Size) -> tuple[Window, np.ndarray]:
    mask = read_mask(path)
    window = crop_window(mask.shape, bucket, bounding_box(mask))
    return window, resize_mask(mask, window, bucket)
