import json

import numpy as np
import pytest
from PIL import Image

from ra_jax.data.formats import RECORDS
from ra_jax.data.records import load_records
from ra_jax.errors import DataError
from ra_jax.inference.candidates import (
    check_overwrite,
    find_scenes,
    plan_candidates,
    scene_names,
    write_candidates,
)

SIZE = (40, 30)


def photo(path, color=(200, 100, 50)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE, color).save(path)
    return path


def mask(path, size=SIZE, value=255):
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas = np.zeros(size[::-1], np.uint8)
    canvas[5:15, 5:15] = value
    Image.fromarray(canvas).save(path)
    return path


@pytest.fixture
def folders(tmp_path):
    for name in ("a", "b"):
        photo(tmp_path / "photos" / f"{name}.jpg")
        mask(tmp_path / "masks" / f"{name}.png")
    photo(tmp_path / "refs" / "b.webp")
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    return tmp_path


def constant(photo, mask, reference, seed):
    return Image.new("RGB", photo.size, (seed, 0, 0))


def make(scenes, seeds, folder, remove=constant, overwrite=False):
    candidates = plan_candidates(scenes, seeds, folder)
    check_overwrite(candidates, overwrite=overwrite)
    return list(write_candidates(candidates, remove))


def test_a_single_photo(folders):
    src, reference = folders / "photos/a.jpg", folders / "refs/b.webp"
    (scene,) = find_scenes(src, folders / "masks/a.png", reference)
    assert (scene.src, scene.mask, scene.ref, scene.result) == (src, folders / "masks/a.png", reference, None)


def test_relative_paths_stay_relative_to_the_working_folder(folders, monkeypatch):
    monkeypatch.chdir(folders)
    (scene,) = find_scenes("photos/a.jpg", "masks/a.png")
    assert scene.src.exists()


def test_a_folder_of_photos_finds_masks_and_references_by_name(folders):
    scenes = find_scenes(folders / "photos", folders / "masks", folders / "refs")
    assert [(s.src.name, s.mask.name, s.ref and s.ref.name) for s in scenes] == [
        ("a.jpg", "a.png", None),
        ("b.jpg", "b.png", "b.webp"),
    ]


def test_photos_that_differ_in_their_endings_are_scenes_of_their_own(folders):
    photo(folders / "photos/a.png")
    mask(folders / "masks/a.jpg")
    scenes = find_scenes(folders / "photos", folders / "masks")
    assert [(scene.src.name, scene.mask.name) for scene in scenes] == [
        ("a.jpg", "a.jpg"),
        ("a.png", "a.png"),
        ("b.jpg", "b.png"),
    ]


def test_a_data_set_counts_each_scene_once(folders):
    records = [
        {"src": f"photos/{name}.jpg", "mask": f"masks/{name}.png", "result": f"photos/{name}.jpg", "id": f"{name}{i}"}
        for name in ("b", "a")
        for i in range(3)
    ]
    (folders / "set.json").write_text(json.dumps(records))
    assert [scene.id for scene in find_scenes(folders / "set.json")] == ["b0", "a0"]


def test_a_folder_data_set(tmp_path):
    photo(tmp_path / "input/x.png")
    mask(tmp_path / "mask/x.png")
    assert [scene.src.name for scene in find_scenes(tmp_path)] == ["x.png"]


def refusal(*arguments):
    with pytest.raises(DataError) as caught:
        find_scenes(*arguments)
    return str(caught.value)


def test_inputs_that_cannot_be_used(folders):
    photos, masks = folders / "photos", folders / "masks"
    assert "--source_mask is missing" in refusal(photos)
    assert "--source_mask is missing" in refusal(photos / "a.jpg")
    assert "expected folders" in refusal(photos, masks / "a.png")
    assert "expected folders" in refusal(photos, masks, folders / "refs/b.webp")
    photo(photos / "c.jpg")
    assert "no mask for 1 of 3 photos" in refusal(photos, masks)
    (folders / "empty").mkdir()
    assert "no images" in refusal(folders / "empty", masks)
    assert "no such file" in refusal(photos / "none.jpg", masks / "a.png")
    (folders / "set.json").write_text("[]")
    assert "--ref_image cannot be used with a data set" in refusal(folders / "set.json", None, folders / "refs")


def test_all_faulty_scenes_are_told_together(folders):
    mask(folders / "masks/a.png", size=(41, 30))
    mask(folders / "masks/b.png", value=127)
    message = refusal(folders / "photos", folders / "masks")
    assert "41 × 30" in message
    assert "empty mask" in message


def test_candidates_are_a_data_set_that_lacks_only_scores(folders):
    scenes = find_scenes(folders / "photos", folders / "masks", folders / "refs")
    paths = make(scenes, [7, 8], folders / "out/run")
    assert [path.name for path in paths] == ["a_7.png", "a_8.png", "b_7.png", "b_8.png"]
    assert Image.open(paths[1]).getpixel((0, 0)) == (8, 0, 0)
    records = load_records(folders / "out/run" / RECORDS)
    assert [record.id for record in records] == ["a_7", "a_8", "b_7", "b_8"]
    assert {record.source for record in records} == {"policy"}
    assert [record.result.resolve() for record in records] == paths
    assert records[2].src.samefile(folders / "photos/b.jpg")
    assert records[2].ref.samefile(folders / "refs/b.webp")
    assert records[0].ref is None
    assert "../../photos/a.jpg" in (folders / "out/run" / RECORDS).read_text()


def test_remove_is_given_the_soft_mask_and_the_reference(folders):
    mask(folders / "masks/b.png", value=180)
    seen = []

    def remove(photo, soft, reference, seed):
        seen.append((photo.size, int(soft.max()), reference and reference.size, seed))
        return photo

    make(find_scenes(folders / "photos", folders / "masks", folders / "refs"), [3], folders / "out", remove)
    assert seen == [(SIZE, 255, None, 3), (SIZE, 180, SIZE, 3)]


def test_pictures_that_are_there_are_not_replaced_unasked(folders):
    scenes = find_scenes(folders / "photos/a.jpg", folders / "masks/a.png")
    make(scenes, [0, 1], folders / "out")
    with pytest.raises(DataError, match=r"a_1\.png: 1 of the images .* or add --overwrite"):
        make(scenes, [1, 2], folders / "out")
    make(scenes, [2], folders / "out")
    make(scenes, [1], folders / "out", overwrite=True)
    assert [record.id for record in load_records(folders / "out" / RECORDS)] == ["a_0", "a_1", "a_2"]


def test_overwriting_is_recommended_for_earlier_results_only(folders):
    """`a_1.png` may be another photo of the user's, who looks for results beside the photos."""
    scenes = find_scenes(folders / "photos/a.jpg", folders / "masks/a.png")
    photo(folders / "photos/a_1.png")
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"a_1\.png: already exists, .*records\.json does not name it") as caught:
            make(scenes, [0, 1], folders / "photos", overwrite=overwrite)
        assert "overwrite" not in str(caught.value)
        assert not (folders / "photos/a_0.png").exists()


def test_a_picture_is_not_written_through_a_link(folders):
    scenes = find_scenes(folders / "photos/a.jpg", folders / "masks/a.png")
    theirs = photo(folders / "album/theirs.png")
    make(scenes, [0], folders / "out")
    (folders / "out/a_0.png").unlink()
    (folders / "out/a_0.png").symlink_to(theirs)
    before = theirs.read_bytes()
    (path,) = make(scenes, [0], folders / "out", overwrite=True)
    assert theirs.read_bytes() == before
    assert not path.is_symlink() and Image.open(path).getpixel((0, 0)) == (0, 0, 0)


def test_a_run_that_stops_leaves_the_records_of_what_it_made(folders):
    def fails_at_1(photo, soft, reference, seed):
        if seed == 1:
            raise MemoryError
        return photo

    with pytest.raises(MemoryError):
        make(find_scenes(folders / "photos", folders / "masks"), [0, 1], folders / "out", fails_at_1)
    assert [record.id for record in load_records(folders / "out" / RECORDS)] == ["a_0"]


def test_a_strange_records_file_is_not_replaced(folders):
    scenes = find_scenes(folders / "photos", folders / "masks")
    (folders / "out").mkdir()
    for text in ('{"mapping": {}}', '{"a": {"id": "a"}}', '[{"src": "a.png"}]', '[{"id": 3}]', "3", "no JSON", "[[]]"):
        (folders / "out" / RECORDS).write_text(text)
        with pytest.raises(DataError, match="not a list of records with ids"):
            make(scenes, [0], folders / "out", overwrite=True)
        assert (folders / "out" / RECORDS).read_text() == text
    (folders / "out" / RECORDS).unlink()
    (folders / "out" / RECORDS).symlink_to("later.json")
    with pytest.raises(DataError, match=r"not a list of records with ids .*No such file"):
        make(scenes, [0], folders / "out", overwrite=True)


def test_records_of_one_id_are_not_replaced_by_one_of_them(folders):
    scenes = find_scenes(folders / "photos", folders / "masks")
    make(scenes, [0], folders / "out")
    records = json.loads((folders / "out" / RECORDS).read_text())
    text = json.dumps([*records, records[1] | {"scores": [1, 1, 1]}])
    (folders / "out" / RECORDS).write_text(text)
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"records\.json: several records have the id 'b_0', expected unique ids"):
            make(scenes, [1], folders / "out", overwrite=overwrite)
        assert (folders / "out" / RECORDS).read_text() == text


def test_a_record_is_kept_though_its_picture_is_elsewhere(folders):
    scenes = find_scenes(folders / "photos/a.jpg", folders / "masks/a.png")
    (picture,) = make(scenes, [0], folders / "out")
    (record,) = json.loads((folders / "out" / RECORDS).read_text())
    (folders / "out" / RECORDS).write_text(json.dumps([record | {"scores": [1, 1, 1]}]))
    picture.unlink()
    with pytest.raises(DataError, match=r"a_0\.png: 1 of the images .* or have records .* or add --overwrite"):
        make(scenes, [0], folders / "out")
    make(scenes, [0], folders / "out", overwrite=True)  # a new picture, which has no scores yet
    assert load_records(folders / "out" / RECORDS)[0].scores is None


@pytest.mark.parametrize("result", ["../album/a_0.png", "a_00.png", None])
def test_a_record_of_another_picture_is_not_replaced(folders, result):
    scenes = find_scenes(folders / "photos/a.jpg", folders / "masks/a.png")
    (folders / "out").mkdir()
    text = json.dumps([{"id": "a_0", "result": result}])
    (folders / "out" / RECORDS).write_text(text)
    with pytest.raises(DataError, match=r"the result of record 'a_0' is not a_0\.png; choose another"):
        make(scenes, [0], folders / "out", overwrite=True)
    assert (folders / "out" / RECORDS).read_text() == text


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_link_that_leads_nowhere_is_kept(folders, overwrite):
    scenes = find_scenes(folders / "photos/a.jpg", folders / "masks/a.png")
    (folders / "out").mkdir()
    (folders / "out/a_0.png").symlink_to("later.png")
    with pytest.raises(DataError, match=r"a_0\.png: already exists"):
        make(scenes, [0], folders / "out", overwrite=overwrite)
    assert (folders / "out/a_0.png").is_symlink()


def test_photos_of_one_name_get_names_that_differ(tmp_path):
    records = []
    for folder in ("one", "two"):
        photo(tmp_path / folder / "street.png")
        mask(tmp_path / folder / "mask.png")
        records.append({"src": f"{folder}/street.png", "mask": f"{folder}/mask.png"})
    (tmp_path / "set.json").write_text(json.dumps(records))
    assert scene_names(find_scenes(tmp_path / "set.json")) == ["street", "street-2"]
