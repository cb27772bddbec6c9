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


def make_loader(records, extras=None, **changes):
    options = {"batch_size": 4, "buckets": BUCKETS, "seed": 0, "multiple": 8, "augment_masks": True}
    return Loader(records, LoaderOptions(**options | changes), extras=extras)


def shrink(image):
    return np.asarray(image.resize((7, 7)), np.float64) / 255


def take_batches(loader, count, start=0):
    return list(islice(loader.iterate(start), count))


def assert_equal_batches(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_batches_follow_the_schema_and_have_the_extra_values_of_their_records(records):
    scores = np.array([record.scores for record in records], np.float32)
    loader = make_loader(records, extras={"scores": scores}, preprocess_reference=shrink)
    for batch in take_batches(loader, 2 * loader.batches_per_epoch):
        height, width = batch["source"].shape[1:3]
        assert (height, width) in BUCKETS
        loaded = {name: array for name, array in batch.items() if name != "scores"}
        assert check_schema(loaded, {"photos", "results", "redux"}) == {"B": 4, "h": height, "w": width, "s": 7}
        assert set(np.unique(batch["mask"])) <= {0, 1} and batch["mask"].any((1, 2)).all()
        np.testing.assert_array_equal(batch["scores"], scores[batch["record_id"]])
        np.testing.assert_array_equal(batch["group_id"], batch["record_id"] // 3)


def test_rows_are_the_panels_of_their_records(records):
    loader = make_loader(records, augment_masks=False, preprocess_reference=shrink)
    for batch in take_batches(loader, loader.batches_per_epoch):
        for row, record_id in enumerate(batch["record_id"]):
            panels = load_panels(records[record_id], batch["mask"].shape[1:])
            for name in ("source", "mask", "reference", "result"):
                np.testing.assert_array_equal(batch[name][row], getattr(panels, name))
            redux_pixels = shrink(Image.fromarray(panels.reference)).astype(np.float32)
            np.testing.assert_array_equal(batch["redux_pixels"][row], redux_pixels)


def test_each_epoch_has_every_record_in_another_order(records):
    loader = make_loader(records)
    count = loader.batches_per_epoch
    batches = take_batches(loader, 2 * count)
    epochs = [batches[:count], batches[count:]]
    for number, epoch in enumerate(epochs):
        assert {int(record_id) for batch in epoch for record_id in batch["record_id"]} == set(range(len(records)))
        assert all((batch["epoch"] == number).all() for batch in epoch)
    orders = [np.concatenate([batch["record_id"] for batch in epoch]) for epoch in epochs]
    assert (orders[0] != orders[1]).any()


@pytest.mark.parametrize("process_count", [2, 4])
def test_batches_of_the_processes_join_to_the_global_batches(records, process_count):
    global_batches = take_batches(make_loader(records), 12)
    rows = np.split(np.arange(4), process_count)
    process_batches = [take_batches(make_loader(records, rows=process_rows), 12) for process_rows in rows]
    joined = [
        {name: np.concatenate([process_batch[name] for process_batch in slices]) for name in slices[0]}
        for slices in zip(*process_batches, strict=True)
    ]
    assert_equal_batches(joined, global_batches)


def test_starting_at_a_batch_equals_skipping_the_batches_before_it(records):
    loader = make_loader(records)
    assert_equal_batches(
        take_batches(make_loader(records), 5, start=loader.batches_per_epoch - 2),
        take_batches(loader, 14)[loader.batches_per_epoch - 2 :][:5],
    )


def test_threads_and_cache_do_not_change_the_batches(records):
    expected = take_batches(make_loader(records, cache_bytes=0), 20)
    assert_equal_batches(take_batches(make_loader(records, workers=3), 20), expected)
    assert_equal_batches(take_batches(make_loader(records, workers=2, cache_bytes=3000), 20), expected)


def test_records_of_a_scene_share_crop_and_mask_within_an_epoch(records):
    loader = make_loader(records)
    panels_of_scene = {}
    for batch in take_batches(loader, 4 * loader.batches_per_epoch):
        for row, key in enumerate(zip(batch["epoch"].tolist(), batch["group_id"].tolist(), strict=True)):
            panels = (batch["mask"][row].tobytes(), batch["source"][row].tobytes(), batch["source"].shape)
            assert panels_of_scene.setdefault(key, panels) == panels
    masks_of_epochs = [tuple(panels_of_scene[epoch, scene][0] for scene in range(len(SIZES))) for epoch in range(4)]
    assert len(set(masks_of_epochs)) == 4  # each epoch has other masks


def test_augmentation_only_adds_pixels_to_masks(records, monkeypatch):
    loader = make_loader(records)
    mask_pairs = []
    monkeypatch.setattr(
        "ra_jax.data.loader.augment_mask",
        lambda mask, rng: mask_pairs.append((mask, augment_mask(mask, rng))) or mask_pairs[-1][1],
    )
    batches = take_batches(loader, loader.batches_per_epoch)
    batch_areas = np.concatenate([batch["mask"].reshape(4, -1).sum(1) for batch in batches])
    assert (
        batch_areas.sum()
        == sum(augmented.sum() for _, augmented in mask_pairs)
        > sum(mask.sum() for mask, _ in mask_pairs)
    )
    assert all((augmented >= mask).all() for mask, augmented in mask_pairs)


def test_few_records_of_a_bucket_are_repeated_to_fill_a_batch(records):
    batch = take_batches(make_loader(records[:2], batch_size=5), 1)[0]
    record_ids = batch["record_id"]
    np.testing.assert_array_equal(record_ids, np.resize(record_ids[:2], 5))
    np.testing.assert_allclose(batch["condition_weight"], 1 / 5)


def test_batches_of_records_without_results_follow_the_schema(make_data_folder):
    data = make_data_folder()
    for record in data.records:
        del record["result"]
    records = load_records(data.write(), need_result=False)
    check_schema(take_batches(make_loader(records, batch_size=2), 1)[0], {"photos"})


def test_results_in_some_records_only_are_refused(make_data_folder):
    data = make_data_folder()
    del data.records[0]["result"]
    with pytest.raises(DataError, match="1 of 2 records have no result"):
        make_loader(load_records(data.write(), need_result=False))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_error_for_a_deleted_file_names_its_record(records, workers):
    records[4].result.unlink()
    loader = make_loader(records, workers=workers)
    with pytest.raises(FileNotFoundError) as caught:
        take_batches(loader, loader.batches_per_epoch)
    assert "while loading record 4" in caught.value.__notes__[0]


def test_buckets_are_parsed_and_invalid_ones_refused():
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
        ({"batch_size": 3, "rows": [2, 3]}, r"rows \[2, 3\]: expected at least one row, each from 0 to 2"),
        ({"extras": {"reward": np.zeros(3)}}, "3 values: expected 21, one per record"),
        ({"extras": {"mask": np.zeros(21)}}, "batches already have this key"),
        ({"latents": True}, "latents=True with augment_masks=True: .*; set augment_masks=False"),
        ({"latents": True, "augment_masks": False}, "latents=True: expected records of a pack with latents"),
        ({"photos": False}, "photos=False and latents=False: expected at least one"),
    ],
)
def test_invalid_options_are_refused(records, changes, message):
    with pytest.raises(ValueError, match=message):
        make_loader(records, **changes)


def test_an_empty_list_of_records_is_refused():
    with pytest.raises(DataError, match="no records"):
        make_loader([])
