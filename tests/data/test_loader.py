from itertools import islice

import numpy as np
import pytest
from PIL import Image

from ra_jax.data.batch import check_schema
from ra_jax.data.loader import Loader, LoaderOptions, parse_buckets
from ra_jax.data.masks import augment_mask
from ra_jax.data.panels import load_panels
from ra_jax.data.records import load_records
from ra_jax.errors import DataError

SIZES = [(24, 24), (16, 32), (20, 20), (32, 16), (24, 24), (17, 30), (48, 48)]
BUCKETS = ((16, 16), (16, 32))


@pytest.fixture
def records(make_data_folder):
    return load_records(make_data_folder(sizes=SIZES, results=3).write(), use_human_scores=True)


def make(records, extras=None, **changes):
    how = {"batch_size": 4, "buckets": BUCKETS, "seed": 0, "multiple": 8, "augment_masks": True}
    return Loader(records, LoaderOptions(**how | changes), extras=extras)


def small(image):
    return np.asarray(image.resize((7, 7)), np.float64) / 255


def take(loader, count, start=0):
    return list(islice(loader.iterate(start), count))


def same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_batch_has_what_the_step_needs(records):
    scores = np.array([record.scores for record in records], np.float32)
    loader = make(records, extras={"scores": scores}, preprocess_reference=small)
    for batch in take(loader, 2 * loader.batches_per_epoch):
        height, width = batch["source"].shape[1:3]
        assert (height, width) in BUCKETS
        loaded = {name: array for name, array in batch.items() if name != "scores"}
        assert check_schema(loaded, {"photos", "results", "redux"}) == {"B": 4, "h": height, "w": width, "s": 7}
        assert set(np.unique(batch["mask"])) <= {0, 1} and batch["mask"].any((1, 2)).all()
        np.testing.assert_array_equal(batch["scores"], scores[batch["record_id"]])
        np.testing.assert_array_equal(batch["group_id"], batch["record_id"] // 3)


def test_rows_are_the_records_panels(records):
    loader = make(records, augment_masks=False, preprocess_reference=small)
    for batch in take(loader, loader.batches_per_epoch):
        for row, at in enumerate(batch["record_id"]):
            panels = load_panels(records[at], batch["mask"].shape[1:])
            for name in ("source", "mask", "reference", "result"):
                np.testing.assert_array_equal(batch[name][row], getattr(panels, name))
            shown = small(Image.fromarray(panels.reference)).astype(np.float32)
            np.testing.assert_array_equal(batch["redux_pixels"][row], shown)


def test_an_epoch_sees_every_record_and_the_next_one_in_another_order(records):
    loader = make(records)
    count = loader.batches_per_epoch
    batches = take(loader, 2 * count)
    epochs = [batches[:count], batches[count:]]
    for number, epoch in enumerate(epochs):
        assert {int(at) for batch in epoch for at in batch["record_id"]} == set(range(len(records)))
        assert all((batch["epoch"] == number).all() for batch in epoch)
    orders = [np.concatenate([batch["record_id"] for batch in epoch]) for epoch in epochs]
    assert (orders[0] != orders[1]).any()


@pytest.mark.parametrize("process_count", [2, 4])
def test_slices_of_the_processes_make_up_the_global_batch(records, process_count):
    whole = take(make(records), 12)
    rows = np.split(np.arange(4), process_count)
    parts = [take(make(records, rows=mine), 12) for mine in rows]
    joined = [
        {name: np.concatenate([part[name] for part in slices]) for name in slices[0]}
        for slices in zip(*parts, strict=True)
    ]
    same(joined, whole)


def test_starting_at_a_batch_is_skipping_to_it(records):
    loader = make(records)
    same(
        take(make(records), 5, start=loader.batches_per_epoch - 2), take(loader, 14)[loader.batches_per_epoch - 2 :][:5]
    )


def test_threads_and_cache_change_nothing(records):
    plain = take(make(records, cache_bytes=0), 20)
    same(take(make(records, workers=3), 20), plain)
    same(take(make(records, workers=2, cache_bytes=3000), 20), plain)


def test_a_group_shares_crop_and_mask_within_an_epoch(records):
    loader = make(records)
    seen = {}
    for batch in take(loader, 4 * loader.batches_per_epoch):
        for row, key in enumerate(zip(batch["epoch"].tolist(), batch["group_id"].tolist(), strict=True)):
            shown = (batch["mask"][row].tobytes(), batch["source"][row].tobytes(), batch["source"].shape)
            assert seen.setdefault(key, shown) == shown
    per_epoch = [tuple(seen[epoch, group][0] for group in range(len(SIZES))) for epoch in range(4)]
    assert len(set(per_epoch)) == 4  # each epoch draws anew


def test_augmentation_only_adds_to_the_mask(records, monkeypatch):
    loader = make(records)
    drawn = []
    monkeypatch.setattr(
        "ra_jax.data.loader.augment_mask",
        lambda mask, rng: drawn.append((mask, augment_mask(mask, rng))) or drawn[-1][1],
    )
    batches = take(loader, loader.batches_per_epoch)
    shown = np.concatenate([batch["mask"].reshape(4, -1).sum(1) for batch in batches])
    assert shown.sum() == sum(grown.sum() for _, grown in drawn) > sum(mask.sum() for mask, _ in drawn)
    assert all((grown >= mask).all() for mask, grown in drawn)


def test_small_bucket_fills_a_batch_by_cycling(records):
    batch = take(make(records[:2], batch_size=5), 1)[0]
    order = batch["record_id"]
    np.testing.assert_array_equal(order, np.resize(order[:2], 5))
    np.testing.assert_allclose(batch["condition_weight"], 1 / 5)


def test_records_without_results(make_data_folder):
    data = make_data_folder()
    for record in data.records:
        del record["result"]
    records = load_records(data.write(), need_result=False)
    check_schema(take(make(records, batch_size=2), 1)[0], {"photos"})


def test_results_in_some_records_only_are_refused(make_data_folder):
    data = make_data_folder()
    del data.records[0]["result"]
    with pytest.raises(DataError, match="1 of 2 records have no result"):
        make(load_records(data.write(), need_result=False))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_vanishes_names_its_record(records, workers):
    records[4].result.unlink()
    loader = make(records, workers=workers)
    with pytest.raises(FileNotFoundError) as caught:
        take(loader, loader.batches_per_epoch)
    assert "while loading record 4" in caught.value.__notes__[0]


def test_parse_buckets():
    assert parse_buckets("512,512;448, 576;") == ((512, 512), (448, 576))
    for text in ("", "512", "512,512;a,b", "512,512,3", "0,16"):
        with pytest.raises(DataError, match='expected "height,width;height,width"'):
            parse_buckets(text)
    with pytest.raises(DataError, match="listed twice"):
        parse_buckets("16,16;16,16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"buckets": ((16, 20),)}, '16,20 has a side that is not a multiple of 8 .* the nearest valid size is "16,16"'),
        ({"batch_size": 0}, "batch_size 0: expected at least 1"),
        ({"batch_size": 3, "rows": [2, 3]}, r"rows \[2, 3\]: expected at least one of 0 to 2"),
        ({"extras": {"reward": np.zeros(3)}}, "3 values: expected 21, one per record"),
        ({"extras": {"mask": np.zeros(21)}}, "the loader uses this name"),
        ({"latents": True}, "latents=True with augment_masks=True: .*; set augment_masks=False"),
        ({"latents": True, "augment_masks": False}, "latents=True: expected records of a pack with latents"),
        ({"photos": False}, "photos=False and latents=False: expected at least one"),
    ],
)
def test_refusals(records, changes, message):
    with pytest.raises(ValueError, match=message):
        make(records, **changes)


def test_no_records_is_refused():
    with pytest.raises(DataError, match="no records"):
        make([])
