"""Small data sets on disk, drawn from a seed."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def picture(seed, size, channels=3):
    """Low-frequency colour of (height, width), so that resizing hardly changes it."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, channels), np.uint8).squeeze())
    return coarse.resize(size[::-1], Image.Resampling.BICUBIC)


def mask_picture(size, box):
    left, top, right, bottom = box
    mask = np.zeros(size, np.uint8)
    mask[top:bottom, left:right] = 255
    return Image.fromarray(mask)


class DataFolder:
    """A folder of scenes s0, s1, ... with `results` results each, and the records that describe them."""

    def __init__(self, folder: Path, sizes=((24, 24),), results=2):
        self.folder = folder
        self.records = []
        for room in ("input", "mask", "gt", "result"):
            (folder / room).mkdir(parents=True, exist_ok=True)
        for scene, size in enumerate(sizes):
            height, width = size
            picture(scene, size).save(folder / f"input/s{scene}.png")
            picture(1000 + scene, size).save(folder / f"gt/s{scene}.png")
            box = (width // 3, height // 3, width // 2, height // 2)
            mask_picture(size, box).save(folder / f"mask/s{scene}.png")
            for k in range(results):
                picture(2000 + 10 * scene + k, size).save(folder / f"result/s{scene}_{k}.png")
                self.records.append(
                    {
                        "src": f"input/s{scene}.png",
                        "mask": f"mask/s{scene}.png",
                        "result": f"result/s{scene}_{k}.png",
                        "scores": {"removal_score": 0.5, "background_score": 1, "smoothness_score": 0.25 * k},
                    }
                )

    def write(self, records=None, name="data.json"):
        path = self.folder / name
        path.write_text(json.dumps(self.records if records is None else records), encoding="utf-8")
        return path


@pytest.fixture
def make_data_folder(tmp_path):
    """`data_folder(sizes=..., results=...)` makes a `DataFolder`."""
    return lambda **how: DataFolder(tmp_path / "set", **how)
