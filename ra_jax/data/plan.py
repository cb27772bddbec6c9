"""The global plan of an epoch: which record stands in which row of which batch, for all processes together.

A pure function of (seed, epoch) and of the data set, computed alike by every process, which then reads its
own rows: all processes are in the same bucket at every step, none runs out first, and a run resumes on
another number of them.
"""

from dataclasses import dataclass

import numpy as np

PLAN_STREAM = 0
MASK_STREAM = 1


@dataclass(frozen=True)
class EpochPlan:
    """rows: [batches, B] int32 positions in the list of records; buckets: [batches] int32;
    condition_weight: [batches, B] float32, 1 / (rows of the same scene in the batch)."""

    rows: np.ndarray
    buckets: np.ndarray
    condition_weight: np.ndarray


def random_generator(seed: int, stream: int, *keys: int) -> np.random.Generator:
    """The generator of (seed, stream, keys), the same wherever and whenever it is asked for."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream, *keys)))


def batches_per_epoch(buckets: np.ndarray, batch_size: int) -> int:
    """Σ over buckets of ⌈records / batch_size⌉. buckets: [R], each record's."""
    counts = np.unique(buckets, return_counts=True)[1]
    return int((-(-counts // batch_size)).sum())


def epoch_plan(scenes: np.ndarray, buckets: np.ndarray, *, batch_size: int, seed: int, epoch: int) -> EpochPlan:
    """Shuffle the scenes, and the records of each; cut each bucket into batches; shuffle the batches.

    scenes, buckets: [R] ids, equal scenes in equal buckets. Records of a scene stay adjacent, though a batch
    may end between them. A bucket's last batch is filled from the bucket's beginning, as often as it takes.
    """
    rng = random_generator(seed, PLAN_STREAM, epoch)
    shuffled = rng.permutation(len(scenes))
    scene_order = rng.permutation(int(scenes.max()) + 1)
    order = shuffled[np.argsort(scene_order[scenes[shuffled]], kind="stable")]

    rows, batch_buckets = [], []
    for bucket in np.unique(buckets):
        members = order[buckets[order] == bucket]
        batches = -(-len(members) // batch_size)
        rows.append(np.resize(members, (batches, batch_size)))  # np.resize repeats from the beginning
        batch_buckets.append(np.full(batches, bucket))
    batch_order = rng.permutation(sum(map(len, rows)))
    rows = np.concatenate(rows)[batch_order].astype(np.int32)
    return EpochPlan(
        rows=rows,
        buckets=np.concatenate(batch_buckets)[batch_order].astype(np.int32),
        condition_weight=_condition_weight(scenes[rows]),
    )


def _condition_weight(scenes: np.ndarray) -> np.ndarray:
    """1 / (how often a scene stands in its batch), [batches, B] float32."""
    in_batch = scenes + np.arange(len(scenes), dtype=np.int64)[:, None] * (int(scenes.max()) + 1)
    _, inverse, counts = np.unique(in_batch.ravel(), return_inverse=True, return_counts=True)
    return (1.0 / counts[inverse]).reshape(scenes.shape).astype(np.float32)
