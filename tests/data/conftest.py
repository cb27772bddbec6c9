"""Small random data sets on disk."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def make_image(seed, size, channels=3):
    """Draw a low-frequency image of size (height, width). Resizing hardly changes it."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, channels), np.uint8).squeeze())
    return coarse.resize(size[::-1], Image.Resampling.BICUBIC)


def make_mask_image(size, box):
    """Draw a mask of size (height, width) that is 255 inside `box` (left, top, right, bottom) and 0 elsewhere."""
    left, top, right, bottom = box
    mask = np.zeros(size, np.uint8)
    mask[top:bottom, left:right] = 255
    return Image.fromarray(mask)


class DataFolder:
    """A data set with scenes s0, s1, ... of the sizes `sizes` (height, width), and one record per result.

    Each scene has `results` results.
    """

    def __init__(self, folder: Path, sizes=((24, 24),), results=2):
        self.folder = folder
        self.records = []
        for subfolder in ("input", "mask", "gt", "result"):
            (folder / subfolder).mkdir(parents=True, exist_ok=True)
        for scene, size in enumerate(sizes):
            height, width = size
            make_image(scene, size).save(folder / f"input/s{scene}.png")
            make_image(1000 + scene, size).save(folder / f"gt/s{scene}.png")
            box = (width // 3, height // 3, width // 2, height // 2)
            make_mask_image(size, box).save(folder / f"mask/s{scene}.png")
            for k in range(results):
                make_image(2000 + 10 * scene + k, size).save(folder / f"result/s{scene}_{k}.png")
                self.records.append(
                    {
                        "src": f"input/s{scene}.png",
                        "mask": f"mask/s{scene}.png",
                        "result": f"result/s{scene}_{k}.png",
                        "scores": {"removal_score": 0.5, "background_score": 1, "smoothness_score": 0.25 * k},
                    }
                )

    def write(self, records=None, name="data.json"):
        """Write `records`, by default those of the data set, to the file `name`, and return its path."""
        path = self.folder / name
        path.write_text(json.dumps(self.records if records is None else records), encoding="utf-8")
        return path


@pytest.fixture
def make_data_folder(tmp_path):
    """make_data_folder(sizes=..., results=...) -> DataFolder."""
    return lambda **options: DataFolder(tmp_path / "set", **options)
