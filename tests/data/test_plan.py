"""The plan of an epoch: which records form which batch, and their weights."""

import numpy as np
import pytest

from ra_jax.data.plan import batches_per_epoch, epoch_plan

SCENES = np.repeat(np.arange(11), [5, 4, 1, 5, 5, 2, 3, 5, 1, 1, 4])
BUCKETS = np.array([0, 0, 1, 0, 2, 0, 0, 2, 0, 2, 0])[SCENES]


def make_plan(epoch=0, seed=0, batch_size=4):
    return epoch_plan(SCENES, BUCKETS, batch_size=batch_size, seed=seed, epoch=epoch)


def test_every_record_occurs_and_repeats_only_fill_batches():
    for epoch in range(5):
        plan = make_plan(epoch)
        counts = np.bincount(plan.rows.ravel(), minlength=len(SCENES))
        assert (counts >= 1).all()
        for bucket in range(3):
            bucket_counts = counts[bucket == BUCKETS]
            assert bucket_counts.sum() == -(-len(bucket_counts) // 4) * 4
            assert bucket_counts.max() - bucket_counts.min() <= 1


def test_all_records_of_a_batch_have_the_same_bucket():
    plan = make_plan()
    assert plan.rows.shape == (batches_per_epoch(BUCKETS, 4), 4) == (6 + 1 + 3, 4)
    np.testing.assert_array_equal(BUCKETS[plan.rows], np.repeat(plan.buckets[:, None], 4, 1))


def test_records_of_a_scene_are_adjacent():
    """Each bucket has one batch here. Its rows, without the repeats that fill it, list the scenes one after another."""
    plan = make_plan(batch_size=64)
    for rows in plan.rows:
        scenes = SCENES[rows[: len(np.unique(rows))]]
        assert (np.diff(scenes) != 0).sum() == len(np.unique(scenes)) - 1


def test_scenes_that_fill_batches_are_never_divided():
    scenes = np.repeat(np.arange(10), 4)
    for epoch in range(4):
        plan = epoch_plan(scenes, np.zeros(40, int), batch_size=8, seed=0, epoch=epoch)
        assert (
            np.sort(scenes[plan.rows], axis=1) == np.sort(scenes[plan.rows], axis=1)[:, [0, 0, 0, 0, 4, 4, 4, 4]]
        ).all()
        np.testing.assert_array_equal(plan.condition_weight, 0.25)


@pytest.mark.parametrize("sizes", [[1, 3, 4, 2, 2] * 6, [8, 3, 5, 1, 7, 8, 4, 4] * 3])
def test_few_scenes_are_divided_between_batches(sizes):
    """If batches were filled in the order of the epoch, most batches would end inside a scene."""
    scenes, counts = np.repeat(np.arange(len(sizes)), sizes), []
    for epoch in range(10):
        plan = epoch_plan(scenes, np.zeros_like(scenes), batch_size=8, seed=0, epoch=epoch)
        counts.append(sum((scenes[plan.rows] == scene).any(1).sum() > 1 for scene in range(len(sizes))))
    assert np.mean(counts) < 0.4 * len(plan.rows)


def test_a_scene_larger_than_a_batch_is_divided():
    scenes = np.repeat([0, 1, 2], [10, 3, 3])
    plan = epoch_plan(scenes, np.zeros(16, int), batch_size=4, seed=1, epoch=0)
    assert sorted(plan.rows.ravel()) == list(range(16))


def test_order_depends_on_epoch_and_seed_alone():
    np.testing.assert_array_equal(make_plan(3, 1).rows, make_plan(3, 1).rows)
    plans = [make_plan(epoch, seed) for seed in range(2) for epoch in range(2)]
    for i, plan in enumerate(plans):
        for other in plans[:i]:
            assert (plan.rows != other.rows).any()
    assert len({tuple(make_plan(epoch).buckets) for epoch in range(6)}) > 1  # the batches are shuffled too
    rows_of_epochs = [
        epoch_plan(np.zeros(5, int), np.zeros(5, int), batch_size=2, seed=0, epoch=epoch).rows for epoch in range(4)
    ]
    # Each epoch divides the records of a scene over its batches differently.
    assert len({frozenset(map(frozenset, rows.tolist())) for rows in rows_of_epochs}) > 1


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_condition_weights_of_a_scene_sum_to_one_in_each_batch(batch_size):
    plan = make_plan(batch_size=batch_size)
    for row, weights in zip(SCENES[plan.rows], plan.condition_weight, strict=True):
        np.testing.assert_allclose(weights, [1 / (row == scene).sum() for scene in row])
        np.testing.assert_allclose(weights.sum(), len(np.unique(row)), rtol=1e-6)


def test_few_records_are_repeated_to_fill_a_batch():
    plan = epoch_plan(np.array([0, 1, 2]), np.zeros(3, int), batch_size=8, seed=0, epoch=0)
    row = plan.rows[0]
    np.testing.assert_array_equal(row, np.resize(row[:3], 8))
    assert sorted(row[:3]) == [0, 1, 2]
