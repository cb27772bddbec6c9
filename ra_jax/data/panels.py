"""From a record's files to panels of one size: the same crop and resize in training, previews and removal.

A photo is resized to cover the bucket and the rest cropped away, the mask as far inside as the photo lets it.
Where such a crop would cut the mask, the whole photo is stretched to the bucket instead: a distorted scene
still teaches removal, half an object does not.
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
from ra_jax.data.images import Picture, Size, Window, photo_size, read_mask, read_panel, read_photo
from ra_jax.data.masks import bounding_box
from ra_jax.data.records import Record


@dataclass(frozen=True)
class Panels:
    """One record in a bucket (h, w): photos [h, w, 3] uint8, mask [h, w] uint8, 1 = remove."""

    source: np.ndarray
    mask: np.ndarray
    reference: np.ndarray
    result: np.ndarray | None


class PanelCache:
    """The latest arrays that were asked for, `max_bytes` of them in all; threads may share it."""

    def __init__(self, max_bytes: int):
        self._max_bytes, self._bytes = max_bytes, 0
        self._values: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `key` stands for, kept or made: an array or a tuple with arrays, which become read-only."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        for part in _arrays(value):
            part.flags.writeable = False
        with self._lock:
            if key not in self._values:
                self._values[key] = value
                self._bytes += sum(part.nbytes for part in _arrays(value))
            while self._bytes > self._max_bytes:
                _, dropped = self._values.popitem(last=False)
                self._bytes -= sum(part.nbytes for part in _arrays(dropped))
        return value


def _arrays(value: Any) -> list[np.ndarray]:
    if isinstance(value, np.ndarray):
        return [value]
    return [part for part in value if isinstance(part, np.ndarray)]


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> int:
    """Index of the bucket of the nearest aspect ratio, argmin |log(h/w) − log(h_b/w_b)|.

    Of buckets with the same ratio, the nearest in area.
    """

    def distance(bucket: Size) -> tuple[float, float]:
        ratio = math.log(size[0] / size[1]) - math.log(bucket[0] / bucket[1])
        area = math.log(size[0] * size[1]) - math.log(bucket[0] * bucket[1])
        return round(abs(ratio), 9), abs(area)  # rounded: 3:2 and 6:4 are the same shape

    return min(range(len(buckets)), key=lambda i: distance(buckets[i]))


def crop_window(size: Size, bucket: Size, mask_box: Window) -> Window:
    """The part of a photo of `size` that a bucket shows, in whole pixels.

    The largest window of the bucket's shape, its centre on the mask's as far as the photo reaches; all of the
    photo if the mask does not fit into that.
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
    """[h, w] uint8: a pixel is 1 if any of the mask's falls into it, so that thin masks never vanish."""
    # Coverage in float32: in 8 bits a single pixel of a large photo rounds to nothing.
    coverage = Image.fromarray(mask.astype(np.float32)).resize(size[::-1], Image.Resampling.BOX, window)
    return (np.asarray(coverage) > 0).astype(np.uint8)


def load_mask(record: Record, bucket: Size, cache: PanelCache) -> np.ndarray:
    """The mask of `load_panels` alone."""
    return cache.get(("mask", record.mask, bucket), lambda: _fit_mask(record.mask, bucket))[1]


def load_panels(record: Record, bucket: Size, cache: PanelCache | None = None) -> Panels:
    """A record's panels of `bucket` = (height, width), decoded, cropped and resized alike.

    The reference is the record's `ref`: seen through the photo's window if it has the photo's size (the
    object then stays at its place), otherwise whole, centred on white. Without `ref` it is the masked object
    on white. With a cache, what records share (source, mask, reference) is decoded once.

    Raises:
        one of `images.UNREADABLE`: a file that has changed since the records were checked.
    """
    cache = cache or PanelCache(0)
    window, mask = cache.get(("mask", record.mask, bucket), lambda: _fit_mask(record.mask, bucket))

    def photo(path: Picture) -> np.ndarray:
        return cache.get(("photo", path, window, bucket), lambda: read_panel(path, window, bucket))

    def reference(path: Picture) -> np.ndarray:
        if photo_size(path) == record.size:
            return photo(path)
        return np.asarray(ImageOps.pad(read_photo(path), bucket[::-1], Image.Resampling.BICUBIC, color="white"))

    source = photo(record.src)
    ref = record.ref
    return Panels(
        source=source,
        mask=mask,
        reference=reference_on_white(source, mask)
        if ref is None
        else cache.get(("reference", ref, window, bucket), lambda: reference(ref)),
        result=None if record.result is None else photo(record.result),
    )


def _fit_mask(path: Picture, bucket: Size) -> tuple[Window, np.ndarray]:
    mask = read_mask(path)
    window = crop_window(mask.shape, bucket, bounding_box(mask))
    return window, resize_mask(mask, window, bucket)
