"""Held-out photos: whole photos, the same on every process, none of a few."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from ra_jax.data.split import choose_scenes, photo_ids, shows_truth, split_photos, spread


def make_records(folder, photos, results=3):
    """`results` records for each of two masks of every photo; photos are files with different content."""
    folder.mkdir(exist_ok=True)
    for photo in range(photos):
        (folder / f"{photo}.png").write_text(f"photo {photo}")
    return [
        SimpleNamespace(src=folder / f"{photo}.png", mask=Path(f"{photo}_{mask}.png"), number=number)
        for number in range(results)
        for photo in range(photos)
        for mask in range(2)
    ]


def held_out_contents(records, fraction=0.2):
    """The contents of the photos that are held out."""
    return {record.src.read_text() for record in split_photos(records, photo_ids(records), fraction)[1]}


@pytest.mark.parametrize(
    ("photos", "fraction", "expected"),
    [(10, 0.1, 1), (24, 0.1, 2), (24, 0.01, 1), (40, 0.5, 20), (12, 0.99, 11)],
)
def test_whole_photos_are_held_out(tmp_path, photos, fraction, expected):
    records = make_records(tmp_path, photos)
    train, held_out = split_photos(records, photo_ids(records), fraction)
    held_out_photos = {record.src for record in held_out}
    assert len(held_out_photos) == expected and len(held_out) == 6 * expected
    assert not held_out_photos & {record.src for record in train}
    assert [record for record in records if record in train] == train
    assert len(train) + len(held_out) == len(records)


def test_the_split_depends_on_the_content_of_the_photos_alone(tmp_path):
    records = make_records(tmp_path / "a", 30)
    moved = make_records(tmp_path / "b", 30)
    for record in moved:
        new_name = record.src.with_name(f"moved_{record.src.name}")
        if record.src.exists():
            record.src.rename(new_name)
        record.src = new_name
    assert held_out_contents(records) == held_out_contents(moved[::-1])


def test_copies_of_a_photo_are_on_the_same_side(tmp_path):
    records = make_records(tmp_path / "a", 30) + make_records(tmp_path / "b", 30)
    train, held_out = split_photos(records, photo_ids(records), 0.2)
    assert len(held_out) == 2 * 6 * 6
    assert not {record.src.read_text() for record in train} & {record.src.read_text() for record in held_out}


def test_few_photos_change_sides_if_the_data_grow(tmp_path):
    before, after = (held_out_contents(make_records(tmp_path, photos)) for photos in (200, 300))
    assert len(before) == 40 and len(after) == 60
    assert len(after - before - {f"photo {i}" for i in range(200, 300)}) <= 10


@pytest.mark.parametrize(("photos", "fraction"), [(9, 0.5), (30, 0.0)])
def test_few_photos_or_no_fraction_hold_nothing_out(tmp_path, photos, fraction):
    records = make_records(tmp_path, photos)
    assert split_photos(records, photo_ids(records), fraction) == (records, [])


@pytest.mark.parametrize(
    ("scores", "source", "result", "expected"),
    [
        (None, None, "r.png", True),
        ((0.1, 0.2, 0.3), None, "r.png", False),  # people scored it: it is a candidate
        ((1.0, 1.0, 1.0), "gt", "r.png", True),
        (None, "policy", "r.png", False),
        (None, "other", "r.png", False),
        (None, None, None, False),
    ],
)
def test_a_result_is_the_truth_if_nobody_scored_it_or_if_it_says_so(scores, source, result, expected):
    assert shows_truth(SimpleNamespace(scores=scores, source=source, result=result)) is expected


@pytest.mark.parametrize(("total", "count", "expected"), [(10, 3, [0, 4, 9]), (2, 5, [0, 1]), (1, 1, [0])])
def test_scenes_are_spread_evenly(total, count, expected):
    assert spread(total, count).tolist() == expected


def test_the_truth_is_chosen_before_any_candidate():
    candidate = SimpleNamespace(src="a.png", mask="m.png", scores=(0.9, 0.9, 0.9), source="policy", result="r.png")
    truth = SimpleNamespace(src="a.png", mask="m.png", scores=None, source="gt", result="gt.png")
    assert choose_scenes([candidate, truth], (1.0, 0.0, 0.0), 4) == [truth]


def test_the_best_record_of_each_scene_is_chosen():
    records = [
        SimpleNamespace(src=f"{scene}.png", mask="m.png", scores=(score, 0.5, 0.5), source="policy", result="r.png")
        for scene in range(4)
        for score in (0.2, 0.9, 0.4)
    ]
    chosen = choose_scenes(records, (1.0, 0.0, 0.0), 2)
    assert [(record.src, record.scores[0]) for record in chosen] == [("0.png", 0.9), ("3.png", 0.9)]
