"""Previews: sheets with one row per scene and the columns source, mask, result and ground truth.

The scenes and their noise stay the same during the whole run.
"""

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from ra_jax.data.loader import Loader
from ra_jax.data.records import Record, scene_ids
from ra_jax.inference.sampling import initial_noise
from ra_jax.models.fill_model import FillModel
from ra_jax.outputs import replace_file
from ra_jax.parallel.partitioner import fetch
from ra_jax.parallel.processes import is_main_process
from ra_jax.reporting.contact_sheet import contact_sheet
from ra_jax.rewards.registry import total_reward
from ra_jax.training.step.state import example_keys, stream_key


def preview_records(records: Sequence[Record], reward_weights, count: int) -> list[Record]:
    """Choose at most `count` scenes, evenly spread over the data, and return the best record of each.

    The best record has the highest reward. Its result is shown as the ground truth.
    """
    scenes = scene_ids(records)
    distinct = np.unique(scenes)

    def reward(i: int) -> float:
        return 0.0 if records[i].scores is None else float(total_reward(np.asarray(records[i].scores), reward_weights))

    chosen_scenes = distinct[np.linspace(0, len(distinct) - 1, min(count, len(distinct))).astype(int)]
    return [records[max(np.flatnonzero(scenes == scene), key=reward)] for scene in chosen_scenes]


class Previews:
    """Draws `previews/step_<n>.png` in the run's folder.

    Args:
        output_dir: the run's folder.
        model: the model, which determines the size of the noise.
        remove: the function that `inference.sampling.make_remover` returns.
        loader: yields every preview scene once per epoch.
        seed: seed of the noise.
    """

    def __init__(self, output_dir: Path, model: FillModel, remove: Callable, loader: Loader, seed: int):
        self.folder = output_dir / "previews"
        self._model, self._remove, self._key = model, remove, stream_key(seed, "previews")
        self._batches = list(islice(loader.iterate(0), loader.batches_per_epoch))

    def draw(self, step: int, trainable, frozen) -> Path:
        """Generate a removal for each preview scene with these weights, and return the path of the sheet.

        All processes take part, and process 0 writes the sheet.
        """
        rows = []
        for batch in self._batches:
            panels = {name: batch[name] for name in ("source", "reference", "mask", "redux_pixels") if name in batch}
            keys = example_keys(self._key, batch["record_id"])
            noise = np.asarray(initial_noise(self._model, keys, *batch["mask"].shape[1:]))
            images, _ = self._remove(trainable, frozen, panels, noise)
            images = np.asarray(fetch(images) * 255.0 + 0.5, np.uint8)
            masks = np.repeat(batch["mask"][..., None] * np.uint8(255), 3, -1)
            truth = batch.get("result", np.full_like(batch["source"], 255))  # white if there is no result
            rows += zip(batch["source"], masks, images, truth, strict=True)
        path = self.folder / f"step_{step:06d}.png"
        if is_main_process():
            self.folder.mkdir(exist_ok=True)
            sheet = contact_sheet(rows)
            with replace_file(path) as draft:
                sheet.save(draft, "PNG")
        return path
