"""The data of a run: its records, the weights and rewards of the records, and the rows that each process loads."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ra_jax.config.settings import TrainConfig
from ra_jax.data.batch import Part
from ra_jax.data.images import Size
from ra_jax.data.loader import Loader, LoaderOptions, pack_encoding, parse_buckets
from ra_jax.data.records import Record, load_records, scene_ids
from ra_jax.data.split import MIN_PHOTOS, photo_ids, split_photos
from ra_jax.errors import ConfigError, DataError
from ra_jax.interop.diffusers import LoadedModel, encoders_fingerprint
from ra_jax.parallel.partitioner import Partitioner
from ra_jax.rewards.registry import total_reward
from ra_jax.rl.advantages import group_means, human_advantages, sample_weights, zero_std_groups

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
        records: the records to train on.
        values: arrays [R, ...] by batch key: what a step needs for each record besides its images (`record_values`).
        held_out: the records on which looks and drift are measured.
        is_held_out: whether they are really held out. If not, they are the records to train on, and only previews are
            drawn from them.
        buckets: panel sizes (height, width) in pixels.
        latents: whether the records come from a pack with latents.
    """

    records: Sequence[Record]
    values: Mapping[str, np.ndarray]
    held_out: Sequence[Record]
    is_held_out: bool
    buckets: Sequence[Size]
    latents: bool

    @property
    def has_target(self) -> bool:
        """Whether the records have results. Automatic rewards use a record's result as the ground truth."""
        return self.records[0].result is not None


def load_run_data(config: TrainConfig) -> RunData:
    """Read and check all records of a run, without loading a model.

    Raises DataError, ConfigError, or WeightError if a pack has latents and the VAE or Redux cannot be found.
    """
    records = load_training_records(config)
    latents = has_latents(config, records)
    records, held_out = hold_out(config, records)
    return RunData(
        records=records,
        values=record_values(config, records),
        held_out=held_out or records,
        is_held_out=bool(held_out),
        buckets=parse_buckets(config.data.aspect_ratio_buckets),
        latents=latents,
    )


def hold_out(config: TrainConfig, records: list[Record]) -> tuple[list[Record], list[Record]]:
    """Return the records to train on and the held-out records.

    The held-out records are those of --val_json_path, or else of some photos of --train_json_path. There are none if
    there are too few photos.

    Raises:
        DataError: --val_json_path cannot be read.
        ConfigError: no photo is held out, but --patience needs some.
    """
    data = config.data
    if data.val_json_path is None and not config.logging.validation_steps:
        return records, []  # nothing needs held-out records
    if data.val_json_path is not None:
        held_out = load_records(data.val_json_path, need_result=config.run.max_drift is not None)
        warn_of_shared_photos(data.val_json_path, photo_ids(held_out), photo_ids(records))
        return records, held_out
    # Without a split the photos are only counted, and their files need not be read.
    photos = photo_ids(records) if data.validation_split else [str(record.src) for record in records]
    train, held_out = split_photos(records, photos, data.validation_split)
    count = len(set(photos))
    if held_out:
        of_record = dict(zip((record.index for record in records), photos, strict=True))
        log.info(
            "%d of %d photos of %s are held out (validation_split = %g): their removals are scored, nothing is trained "
            "on them",
            len({of_record[record.index] for record in held_out}),
            count,
            data.train_json_path,
            data.validation_split,
        )
        return train, held_out
    advice = "--val_json_path" if data.validation_split else "--val_json_path or --validation_split"
    if count < MIN_PHOTOS:
        advice += f", or at least {MIN_PHOTOS} photos"
    message = f"no photo is held out ({count} photos, validation_split = {data.validation_split:g})"
    if config.run.patience is not None:
        raise ConfigError(
            f"patience = {config.run.patience}: it counts looks at held-out photos, but {message}; give {advice}, or "
            "remove --patience"
        )
    log.warning(
        "%s: nothing measures how well the run removes, so that no best checkpoint is kept; give %s", message, advice
    )
    return train, held_out


def warn_of_shared_photos(path: str, held_out: Sequence[str], trained: Sequence[str]) -> None:
    """Warn if the data set `path` of held-out photos has photos that are trained on, both given by `photo_ids`."""
    shared = set(held_out) & set(trained)
    if shared:
        log.warning(
            "%d of %d photos of %s are also trained on: held_out_reward then shows what the run knows by heart, and "
            "best/ may come from a later step than it should; remove them from one of the two data sets",
            len(shared),
            len(set(held_out)),
            path,
        )


def training_loader(config: TrainConfig, data: RunData, loaded: LoadedModel, rows: np.ndarray) -> Loader:
    """Build the loader of the batches that the run's steps train on.

    Args:
        config: the run's configuration.
        data: the run's data.
        loaded: the model, whose token size and reference preprocessing the loader needs.
        rows: the rows of the global batch that this process loads (`step_rows`).
    """
    parts = batch_parts(config, results=data.has_target, latents=data.latents)
    options = LoaderOptions(
        batch_size=config.run.train_batch_size * config.run.gradient_accumulation_steps,
        buckets=data.buckets,
        seed=config.run.seed,
        multiple=loaded.model.size_multiple,
        augment_masks=config.data.mask_augmentation,
        file_masks="judged" in parts,
        preprocess_reference=loaded.preprocess,
        rows=rows,
        latents="latents" in parts,
        photos="photos" in parts,
        workers=config.data.data_workers,
    )
    return Loader(data.records, options, extras=data.values)


def batch_parts(config: TrainConfig, *, results: bool, latents: bool) -> frozenset[Part]:
    """Return the parts of the schema (`data.batch`) that the training batches of the run have.

    `results` says whether the records have results, `latents` whether they come from a pack with latents.
    """
    automatic = config.mode == "automatic"
    parts: dict[Part, bool] = {
        "photos": automatic or not latents,
        "results": results,
        "latents": latents,
        "redux": not latents,
        "judged": automatic,
        "training": True,
        "rewards": config.mode == "human" and config.grpo.enable_grpo_rewards,
    }
    return frozenset(part for part, present in parts.items() if present)


def step_rows(config: TrainConfig, partitioner: Partitioner) -> np.ndarray:
    """Return the indices of the rows that this process loads, out of the A·B rows of a step.

    A step has A microbatches of B rows each. Its rows are ordered by microbatch.
    """
    microbatch_size = config.run.train_batch_size
    rows = partitioner.rows(microbatch_size)
    return np.concatenate(
        [rows + microbatch * microbatch_size for microbatch in range(config.run.gradient_accumulation_steps)]
    )


def load_training_records(config: TrainConfig) -> list[Record]:
    """Load the records of --train_json_path.

    Every record must have a result, because the base loss trains on results and human scores rate them. Automatic mode
    with a base loss of weight 0 is the exception. In automatic mode a scene with several records causes a warning.
    """
    automatic = config.mode == "automatic"
    records = load_records(
        config.data.train_json_path,
        need_result=not automatic or config.losses.base_loss_weight > 0,
        use_human_scores=config.mode == "human",
        score_format=config.data.score_format,
    )
    scenes = len(np.unique(scene_ids(records)))
    if automatic and scenes < len(records):
        log.warning(
            "%s has %d records of %d scenes: automatic rewards use each record's result as the ground truth of its "
            "scene; give one record per scene, with the ground truth as its result",
            config.data.train_json_path,
            len(records),
            scenes,
        )
    return records


def has_latents(config: TrainConfig, records: Sequence[Record]) -> bool:
    """Return whether the records come from a pack with latents.

    Raises ConfigError if training would compute other latents than the pack has. That is the case with other buckets,
    with another dtype, with augmented masks, and with another VAE or Redux.
    """
    encoding = pack_encoding(records)
    if encoding is None:
        return False
    model, path = config.model, config.data.train_json_path
    for name, value, parse in (
        ("aspect_ratio_buckets", config.data.aspect_ratio_buckets, lambda text: set(parse_buckets(text))),
        ("mixed_precision", model.mixed_precision, str),
    ):
        if parse(packed_value := getattr(encoding, name)) != parse(value):
            raise ConfigError(
                f'{path}: the latents of this pack were made with {name} "{packed_value}", got "{value}": give '
                f'--{name} "{packed_value}", or make the pack again'
            )
    if config.data.mask_augmentation:
        raise ConfigError(
            f"{path}: the latents of this pack were made with masks that are not augmented: give "
            "--no_mask_augmentation, or make the pack again without --latents"
        )
    fill, redux = model.pretrained_model_name_or_path, model.pretrained_redux_model_name_or_path
    if encoders_fingerprint(fill, redux) != encoding.encoders:
        raise ConfigError(
            f"{path}: the latents of this pack were made with another VAE or Redux than those of {fill} and {redux}: "
            "train with the models that the pack was made with, or make the pack again"
        )
    return True


def record_values(config: TrainConfig, records: Sequence[Record]) -> dict[str, np.ndarray]:
    """Compute what a step needs for each record besides its images: the arrays [R, ...] of `batch.COMPUTED_FIELDS`.

    Raises DataError if the base loss would give every record weight 0.
    """
    if config.mode != "human":
        return {"sample_weight": np.ones(len(records), np.float32)}
    scenes = scene_ids(records)
    weights = config.grpo.reward_weights
    scores = np.asarray([record.scores for record in records], np.float32)
    rewards = total_reward(scores, weights).astype(np.float32)
    try:
        sample_weight = sample_weights(
            rewards,
            scenes,
            config.base_loss_weighting,
            limit=sum(weights),
            temperature=config.losses.base_loss_softmax_temperature,
        )
    except ValueError as error:
        raise DataError(f"{config.data.train_json_path}: {error}") from None
    values = {"sample_weight": sample_weight}
    if config.grpo.enable_grpo_rewards:
        warn_of_single_results(config, scenes)
        group_std = np.sqrt(group_means((rewards - group_means(rewards, scenes)) ** 2, scenes))
        values |= {
            "scores": scores,
            "reward": rewards,
            "advantage": human_advantages(scores, scenes, weights),
            "group_reward_std": group_std.astype(np.float32),
            "zero_std_group": zero_std_groups(rewards, scenes).astype(np.float32),
        }
    return values


def warn_of_single_results(config: TrainConfig, scenes: np.ndarray) -> None:
    """Warn of scenes with one result; `scenes` [R] is the scene of each record."""
    counts = np.bincount(scenes)
    single, total = int((counts == 1).sum()), int((counts > 0).sum())
    if single and config.uses_policy:
        log.warning(
            "%d of %d scenes (%.0f %%) have a single result: it is compared with the mean of all results, so that it "
            "counts as good where the photo is easy; several results of each scene teach more",
            single,
            total,
            100.0 * single / total,
        )


def single_record_loader(config: TrainConfig, records: Sequence[Record], loaded: LoadedModel) -> Loader:
    """Build a loader of batches of one record each, without mask augmentation."""
    options = LoaderOptions(
        batch_size=1,
        buckets=parse_buckets(config.data.aspect_ratio_buckets),
        seed=config.run.seed,
        multiple=loaded.model.size_multiple,
        preprocess_reference=loaded.preprocess,
    )
    return Loader(records, options)
