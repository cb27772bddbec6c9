"""Global plan of an epoch: assigns a record to each row of each batch, for all processes together.

The plan is a pure function of (seed, epoch) and the data set. Every process computes the same plan and then reads its
own rows. All processes therefore use the same bucket at each step and finish an epoch at the same step. A run can also
resume with another number of processes.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Values of `stream` in `random_generator`.
PLAN_STREAM = 0
MASK_STREAM = 1


@dataclass(frozen=True)
class EpochPlan:
    """The batches of an epoch.

    Attributes:
        rows: [batches, B] int32, positions in the list of records.
        buckets: [batches] int32, bucket of each batch.
        condition_weight: [batches, B] float32, 1 / (number of rows with the same scene in the batch).
    """

    rows: np.ndarray
    buckets: np.ndarray
    condition_weight: np.ndarray


def random_generator(seed: int, stream: int, *keys: int) -> np.random.Generator:
    """Return a random generator that depends only on (seed, stream, keys)."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream, *keys)))


def batches_per_epoch(buckets: np.ndarray, batch_size: int) -> int:
    """Return the number of batches, Σ_b ⌈R_b / batch_size⌉ for R_b records of bucket b.

    Args:
        buckets: [R] bucket of each record.
        batch_size: number of records in a global batch.
    """
    counts = np.unique(buckets, return_counts=True)[1]
    return int((-(-counts // batch_size)).sum())


def epoch_plan(scenes: np.ndarray, buckets: np.ndarray, *, batch_size: int, seed: int, epoch: int) -> EpochPlan:
    """Shuffle scenes and the records within each scene, divide each bucket into batches, and shuffle the batches.

    The records of a scene stay adjacent and in one batch wherever they fit (`_pack_scenes`). If the last batch of a
    bucket is incomplete, records from the beginning of the bucket are repeated to fill it.

    Args:
        scenes: [R] scene id of each record. Records of one scene have the same bucket.
        buckets: [R] bucket of each record.
        batch_size: number of records in a global batch.
        seed: seed of the run.
        epoch: number of the epoch.
    """
    rng = random_generator(seed, PLAN_STREAM, epoch)
    shuffled = rng.permutation(len(scenes))
    scene_order = rng.permutation(int(scenes.max()) + 1)
    record_order = shuffled[np.argsort(scene_order[scenes[shuffled]], kind="stable")]

    rows, batch_buckets = [], []
    for bucket in np.unique(buckets):
        records = record_order[buckets[record_order] == bucket]
        records = _pack_scenes(np.split(records, np.flatnonzero(np.diff(scenes[records])) + 1), batch_size)
        batches = -(-len(records) // batch_size)
        rows.append(np.resize(records, (batches, batch_size)))  # np.resize repeats from the beginning
        batch_buckets.append(np.full(batches, bucket))
    batch_order = rng.permutation(sum(map(len, rows)))
    rows = np.concatenate(rows)[batch_order].astype(np.int32)
    return EpochPlan(
        rows=rows,
        buckets=np.concatenate(batch_buckets)[batch_order].astype(np.int32),
        condition_weight=_condition_weight(scenes[rows]),
    )


def _pack_scenes(scenes: Sequence[np.ndarray], batch_size: int) -> np.ndarray:
    """Order records such that batches of `batch_size` consecutive records have whole scenes wherever they fit.

    The advantages of a scene's records sum to 0, but those of half a scene do not. Each batch takes the first scenes
    that fit into its room. A scene is divided only if no waiting scene fits into what is left of a batch.

    Args:
        scenes: the records of each scene, in the order of the epoch.
        batch_size: number of records in a batch.
    """
    waiting: dict[int, deque[tuple[int, np.ndarray]]] = {}  # by size, each in the order of the epoch
    for rank, records in enumerate(scenes):
        waiting.setdefault(len(records), deque()).append((rank, records))
    order, room = [], batch_size
    while waiting:
        fitting = [size for size in waiting if size <= room]
        size = min(fitting or waiting, key=lambda size: waiting[size][0][0])
        rank, records = waiting[size].popleft()
        if not waiting[size]:
            del waiting[size]
        order.append(records[:room])
        if len(rest := records[room:]):
            waiting.setdefault(len(rest), deque()).appendleft((rank, rest))
        room = (room - len(order[-1])) or batch_size
    return np.concatenate(order)


def _condition_weight(scenes: np.ndarray) -> np.ndarray:
    """Return 1 / (number of rows with the same scene in the batch), [batches, B] float32."""
    scene_in_batch = scenes + np.arange(len(scenes), dtype=np.int64)[:, None] * (int(scenes.max()) + 1)
    _, inverse, counts = np.unique(scene_in_batch.ravel(), return_inverse=True, return_counts=True)
    return (1.0 / counts[inverse]).reshape(scenes.shape).astype(np.float32)
