"""Looks: at regular intervals the objects of held-out scenes are removed and the results are scored.

A look shows what the weights can do: `held_out_reward`, the mean total reward over the scenes, and a preview sheet with
some of them. The scenes and their noise stay the same during the whole run.
"""

import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ra_jax.data.batch import Batch
from ra_jax.data.diptych import right_panel
from ra_jax.data.loader import Loader
from ra_jax.data.split import spread
from ra_jax.flow.schedule import FlowSchedule
from ra_jax.inference.sampling import as_diptych, initial_noise, make_remover
from ra_jax.models.fill_model import FillModel, Weights
from ra_jax.outputs import replace_file
from ra_jax.parallel.partitioner import fetch
from ra_jax.parallel.processes import is_main_process
from ra_jax.reporting.contact_sheet import contact_sheet
from ra_jax.reporting.trackers import LOOK_SET
from ra_jax.rewards.custom import Reward
from ra_jax.rewards.registry import RewardInputs, total_reward
from ra_jax.training.step.state import example_keys, stream_key


@dataclass(frozen=True)
class Look:
    """The result of a look.

    Attributes:
        scores: mean of each reward's score over the scenes; empty if the scenes are not scored.
        reward: mean total reward over the scenes; None if the scenes are not scored.
        number: `Looks.number`.
        seconds: duration of the look.
        preview: path of the preview sheet.
    """

    scores: Mapping[str, float]
    reward: float | None
    number: int
    seconds: float
    preview: Path

    def metrics(self) -> dict[str, float]:
        """Return the measurements under their names in metrics.jsonl."""
        if self.reward is None:
            return {}
        scores = {f"held_out_{name}_score": score for name, score in self.scores.items()}
        return {
            "held_out_reward": self.reward,
            **scores,
            LOOK_SET: float(self.number),
            "look_seconds": self.seconds,
        }


@dataclass(frozen=True, kw_only=True)
class LookSettings:
    """Settings of the looks of a run.

    Attributes:
        num_inference_steps: sampling steps of a removal.
        guidance_scale: guidance scale of a removal.
        num_previews: number of scenes in a preview, at most.
        rewards: the rewards that score the removals; empty if they are not scored.
        with_truth: whether the records' results are the ground truth. The rewards then get it.
        seed: seed of the noise.
    """

    num_inference_steps: int
    guidance_scale: float
    num_previews: int
    rewards: tuple[Reward, ...]
    with_truth: bool
    seed: int


class Looks:
    """Removes the objects of held-out scenes, scores the results, and draws `previews/step_<n>.png`.

    Attributes:
        number: a number that is the same in all runs whose looks can be compared: with the same scenes, the same
            settings of the removal, and the same rewards.

    Args:
        output_dir: the run's folder.
        model: the model.
        schedule: times of the sampler.
        loader: yields every scene once per epoch, one in a batch.
        settings: settings of the looks.
    """

    def __init__(
        self, output_dir: Path, model: FillModel, schedule: FlowSchedule, loader: Loader, settings: LookSettings
    ):
        self.folder, self._model, self._settings = output_dir / "previews", model, settings
        self._remove = make_remover(
            model,
            schedule,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
        )
        self._score = jax.jit(self._score_images)
        self._key = stream_key(settings.seed, "previews")
        self._batches = list(islice(loader.iterate(0), loader.batches_per_epoch))
        names = ("source", "mask", "reference", *(["result"] if settings.with_truth else []))
        rewards = [(reward.name, reward.weight) for reward in settings.rewards]
        removal = (settings.num_inference_steps, settings.guidance_scale, settings.seed)
        self.number = batches_number(self._batches, names, (removal, rewards))

    @property
    def are_scored(self) -> bool:
        """Whether removals are scored."""
        return bool(self._settings.rewards)

    def take(self, step: int, trainable: Weights, frozen: Weights) -> Look:
        """Remove the objects of all scenes with these weights, score the results, and draw the preview of this step.

        All processes take part, and process 0 draws.
        """
        start = time.perf_counter()
        shown, rows, scores = set(spread(len(self._batches), self._settings.num_previews)), [], []
        for i, batch in enumerate(self._batches):
            panels = {name: batch[name] for name in ("source", "reference", "mask", "redux_pixels") if name in batch}
            keys = example_keys(self._key, batch["record_id"])
            noise = np.asarray(initial_noise(self._model, keys, *batch["mask"].shape[1:]))
            images = fetch(self._remove(trainable, frozen, panels, noise)[0])
            if self._settings.rewards:
                scores.append(fetch(self._score(frozen, batch, images)))
            if i in shown:
                rows.append(_preview_row(batch, images))
        path = self.folder / f"step_{step:06d}.png"
        if is_main_process():
            self.folder.mkdir(exist_ok=True)
            sheet = contact_sheet(rows)
            with replace_file(path) as draft:
                sheet.save(draft, "PNG")
        return self._summarize(scores, time.perf_counter() - start, path)

    def _summarize(self, scores: list[np.ndarray], seconds: float, preview: Path) -> Look:
        rewards = self._settings.rewards
        if not rewards:
            return Look({}, None, self.number, seconds, preview)
        means = np.concatenate(scores).mean(0)
        by_name = {reward.name: float(mean) for reward, mean in zip(rewards, means, strict=True)}
        reward = float(total_reward(means, [reward.weight for reward in rewards]))
        return Look(by_name, reward, self.number, seconds, preview)

    def _score_images(self, frozen: Weights, batch: Mapping[str, jax.Array], images: jax.Array) -> jax.Array:
        """Compute the scores [B, S] of images [B, h, w, 3] in [0, 1]."""
        source, mask = batch["source"].astype(jnp.float32) / 255.0, batch["mask"].astype(jnp.float32)
        inputs = {"image": images, "source": source, "mask": mask}
        if self._settings.with_truth:
            truth = as_diptych(batch, "result")
            grid = tuple(side // self._model.size_multiple for side in truth.shape[1:3])
            decoded = self._model.decode(frozen, self._model.encode(frozen, truth), grid)
            inputs |= {"target": right_panel(truth), "target_decoded": jnp.clip(right_panel(decoded), 0.0, 1.0)}
        return jnp.stack([reward.function(RewardInputs(**inputs)) for reward in self._settings.rewards], -1)


def batches_number(batches: Sequence[Batch], names: Sequence[str], settings: object) -> int:
    """Return a number that is equal for equal arrays `names` of the batches and equal settings."""
    number = zlib.crc32(repr(settings).encode())
    for batch in batches:
        for name in names:
            number = zlib.crc32(np.ascontiguousarray(batch[name]), number)
    return number


def _preview_row(batch: Mapping[str, np.ndarray], images: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the images of a scene's row: source, mask, removal and the record's result (white if it has none)."""
    removal = np.asarray(images[0] * 255.0 + 0.5, np.uint8)
    mask = np.repeat(batch["mask"][0][..., None] * np.uint8(255), 3, -1)
    return batch["source"][0], mask, removal, batch.get("result", np.full_like(batch["source"], 255))[0]
