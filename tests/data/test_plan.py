import numpy as np
import pytest

from ra_jax.data.plan import batches_per_epoch, epoch_plan

SCENES = np.repeat(np.arange(11), [5, 4, 1, 5, 5, 2, 3, 5, 1, 1, 4])
BUCKETS = np.array([0, 0, 1, 0, 2, 0, 0, 2, 0, 2, 0])[SCENES]


def plan(epoch=0, seed=0, batch_size=4):
    return epoch_plan(SCENES, BUCKETS, batch_size=batch_size, seed=seed, epoch=epoch)


def test_every_record_is_seen_and_repeats_only_fill_up():
    for epoch in range(5):
        drawn = plan(epoch)
        seen = np.bincount(drawn.rows.ravel(), minlength=len(SCENES))
        assert (seen >= 1).all()
        for bucket in range(3):
            of_bucket = seen[bucket == BUCKETS]
            assert of_bucket.sum() == -(-len(of_bucket) // 4) * 4
            assert of_bucket.max() - of_bucket.min() <= 1


def test_batches_lie_in_one_bucket():
    drawn = plan()
    assert drawn.rows.shape == (batches_per_epoch(BUCKETS, 4), 4) == (6 + 1 + 3, 4)
    np.testing.assert_array_equal(BUCKETS[drawn.rows], np.repeat(drawn.buckets[:, None], 4, 1))


def test_groups_stay_adjacent():
    """With one batch a bucket, each group is one run of rows before the batch is filled up."""
    drawn = plan(batch_size=64)
    for rows in drawn.rows:
        groups = SCENES[rows[: len(np.unique(rows))]]
        assert (np.diff(groups) != 0).sum() == len(np.unique(groups)) - 1


def test_order_is_drawn_anew_each_epoch_and_seed_and_is_a_function_of_them():
    np.testing.assert_array_equal(plan(3, 1).rows, plan(3, 1).rows)
    drawn = [plan(epoch, seed) for seed in range(2) for epoch in range(2)]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert (a.rows != b.rows).any()
    assert len({tuple(plan(epoch).buckets) for epoch in range(6)}) > 1  # batches of the buckets are mixed
    one_scene = [
        epoch_plan(np.zeros(5, int), np.zeros(5, int), batch_size=2, seed=0, epoch=epoch).rows for epoch in range(4)
    ]
    # A batch's edge parts other members of a group each time.
    assert len({frozenset(map(frozenset, rows.tolist())) for rows in one_scene}) > 1


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_condition_weight_counts_a_group_within_its_batch(batch_size):
    drawn = plan(batch_size=batch_size)
    for row, weights in zip(SCENES[drawn.rows], drawn.condition_weight, strict=True):
        np.testing.assert_allclose(weights, [1 / (row == scene).sum() for scene in row])
        np.testing.assert_allclose(weights.sum(), len(np.unique(row)), rtol=1e-6)


def test_few_records_fill_a_batch_by_cycling():
    drawn = epoch_plan(np.array([0, 1, 2]), np.zeros(3, int), batch_size=8, seed=0, epoch=0)
    row = drawn.rows[0]
    np.testing.assert_array_equal(row, np.resize(row[:3], 8))
    assert sorted(row[:3]) == [0, 1, 2]
