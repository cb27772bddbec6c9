"""Measure how many records per second one core loads from image files, from a pack, and from a pack with latents.

    python scripts/benchmarks/input_pipeline.py DATA [--bucket 512 512] [--rounds 5] [--seconds 10]

DATA is any data set with results. The process is bound to one core, loads with one thread, and caches nothing between
batches. Latents and image tokens are random arrays of the sizes that FLUX.1-Fill and FLUX.1-Redux need, because only
reading is timed. The forms of the data take turns. The medians of the rounds are printed.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import ml_dtypes
import numpy as np
import tyro
from PIL import Image

from ra_jax.data.images import Size
from ra_jax.data.loader import Loader, LoaderOptions
from ra_jax.data.pack_writer import write_pack
from ra_jax.data.packs import LatentEncoding
from ra_jax.data.panels import Panels
from ra_jax.data.records import Record, load_records

BATCH = 4
MULTIPLE, FEATURES = 16, 64  # side of a token in pixels; features of its latents
# Sizes of FLUX.1-Redux: number of image tokens, their features, side of its input in pixels.
IMAGE_TOKENS, JOINT_DIM, SIGLIP_SIZE = 729, 4096, 384


@dataclass(frozen=True)
class Measurement:
    """Settings of the measurement."""

    data: Annotated[Path, tyro.conf.Positional]  # a data set with results
    bucket: Size = (512, 512)  # height and width of a panel in pixels
    rounds: int = 5  # number of rounds; each loads every form once
    seconds: float = 10.0  # loading time of a form in a round


class RandomEncoder:
    """Encoder for `write_pack` that returns random arrays of the right sizes."""

    def __init__(self, bucket: Size):
        self.buckets = (bucket,)
        self.encoding = LatentEncoding("random", f"{bucket[0]},{bucket[1]}", "bf16")
        self._tokens = 2 * bucket[0] * bucket[1] // MULTIPLE**2
        self._rng = np.random.default_rng(0)

    def condition(self, panels: Panels) -> dict[str, np.ndarray]:
        """Return latents of the masked photo and image tokens for one condition."""
        tokens = self._rng.normal(size=(IMAGE_TOKENS, JOINT_DIM)).astype(ml_dtypes.bfloat16)
        return {"masked_latents": self._latents(), "image_tokens": tokens}

    def result(self, panels: Panels) -> dict[str, np.ndarray]:
        """Return latents for one result."""
        return {"result_latents": self._latents()}

    def _latents(self) -> np.ndarray:
        return self._rng.normal(size=(self._tokens, FEATURES)).astype(np.float32)


def siglip_pixels(image: Image.Image) -> np.ndarray:
    """Resize and scale a reference image as Redux does: [384, 384, 3] in [-1, 1]."""
    resized = image.resize((SIGLIP_SIZE, SIGLIP_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(resized, np.float32) / 127.5 - 1.0


def load_batches(records: Sequence[Record], measurement: Measurement, **more_options: object) -> Iterator:
    """Return an endless iterator over batches of `BATCH` records. `more_options`: fields of `LoaderOptions`."""
    options = LoaderOptions(
        batch_size=BATCH,
        buckets=(measurement.bucket,),
        seed=0,
        multiple=MULTIPLE,
        preprocess_reference=siglip_pixels,
        cache_bytes=0,
        **more_options,
    )
    return Loader(records, options).iterate()


def measure_rate(batches: Iterator, seconds: float) -> float:
    """Measure the records per second of an iterator over batches. The first batch is not counted."""
    next(batches)
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        next(batches)
        count += BATCH
    return count / elapsed


def write_forms(measurement: Measurement, folder: Path) -> dict[str, Callable[[], Iterator]]:
    """Write the packs to `folder`; return for each form of the data a function that starts to load it."""
    records = load_records(measurement.data)
    write_pack(records, folder / "pack")
    write_pack(records, folder / "latents", encoder=RandomEncoder(measurement.bucket))
    packed, encoded = load_records(folder / "pack"), load_records(folder / "latents")
    with_latents = {"augment_masks": False, "latents": True}
    return {
        "files": lambda: load_batches(records, measurement, augment_masks=True),
        "pack": lambda: load_batches(packed, measurement, augment_masks=True),
        "pack with latents, photos too (automatic rewards)": lambda: load_batches(encoded, measurement, **with_latents),
        "pack with latents": lambda: load_batches(encoded, measurement, **with_latents, photos=False),
    }


def main(measurement: Measurement) -> None:
    """Load the forms in turn on one core, and print the medians."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        forms = write_forms(measurement, Path(folder))
        rates = {name: [] for name in forms}
        for _ in range(measurement.rounds):
            for name, load in forms.items():
                rates[name].append(measure_rate(load(), measurement.seconds))
    height, width = measurement.bucket
    print(f"records per second on one core, diptychs of {height} x {2 * width}; median (min, max) of the rounds\n")
    print("| | records/s | ratio to files |\n| --- | --- | --- |")
    files = np.median(rates["files"])
    for name, values in rates.items():
        median = np.median(values)
        print(f"| {name} | {median:.1f} ({min(values):.1f}, {max(values):.1f}) | {median / files:.1f} |")


if __name__ == "__main__":
    main(tyro.cli(Measurement, description=__doc__))
