"""Held-out photos: whole photos, the same on every process, none of a few."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from ra_jax.data.split import split_photos


def make_records(photos, results=3):
    """`results` records for each of two masks of every photo."""
    return [
        SimpleNamespace(src=Path(f"{photo}.png"), mask=Path(f"{photo}_{mask}.png"), number=number)
        for number in range(results)
        for photo in range(photos)
        for mask in range(2)
    ]


@pytest.mark.parametrize(("photos", "fraction", "expected"), [(10, 0.1, 1), (24, 0.1, 2), (24, 0.01, 1), (40, 0.5, 20)])
def test_whole_photos_are_held_out(photos, fraction, expected):
    records = make_records(photos)
    train, held_out = split_photos(records, fraction, seed=0)
    held_out_photos = {record.src for record in held_out}
    assert len(held_out_photos) == expected and len(held_out) == 6 * expected
    assert not held_out_photos & {record.src for record in train}
    assert [record for record in records if record in train] == train
    assert len(train) + len(held_out) == len(records)


def test_the_split_depends_on_the_seed_alone():
    records = make_records(30)
    assert split_photos(records, 0.2, 1) == split_photos(records, 0.2, 1) != split_photos(records, 0.2, 2)


@pytest.mark.parametrize(("photos", "fraction"), [(9, 0.5), (30, 0.0)])
def test_few_photos_or_no_fraction_hold_nothing_out(photos, fraction):
    records = make_records(photos)
    assert split_photos(records, fraction, 0) == (records, [])
