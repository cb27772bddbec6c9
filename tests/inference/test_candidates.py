import json

import numpy as np
import pytest
from PIL import Image

from ra_jax.data.formats import RECORDS_FILE
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


def write_photo(path, color=(200, 100, 50)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE, color).save(path)
    return path


def write_mask(path, size=SIZE, value=255):
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas = np.zeros(size[::-1], np.uint8)
    canvas[5:15, 5:15] = value
    Image.fromarray(canvas).save(path)
    return path


@pytest.fixture
def workspace(tmp_path):
    """A folder with photos/ (a.jpg, b.jpg, notes.txt), masks/ (a.png, b.png) and refs/ (b.webp)."""
    for name in ("a", "b"):
        write_photo(tmp_path / "photos" / f"{name}.jpg")
        write_mask(tmp_path / "masks" / f"{name}.png")
    write_photo(tmp_path / "refs" / "b.webp")
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    return tmp_path


def paint_seed(photo, mask, reference, seed):
    """Stand in for the network: return an image of one color, whose red value is the seed."""
    return Image.new("RGB", photo.size, (seed, 0, 0))


def make_candidates(scenes, seeds, folder, remove=paint_seed, overwrite=False):
    """Plan, check and write candidates, and return their paths."""
    candidates = plan_candidates(scenes, seeds, folder)
    check_overwrite(candidates, overwrite=overwrite)
    return list(write_candidates(candidates, remove))


def test_a_single_photo_is_one_scene(workspace):
    src, reference = workspace / "photos/a.jpg", workspace / "refs/b.webp"
    (scene,) = find_scenes(src, workspace / "masks/a.png", reference)
    assert (scene.src, scene.mask, scene.ref, scene.result) == (src, workspace / "masks/a.png", reference, None)


def test_relative_paths_are_relative_to_the_working_folder(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    (scene,) = find_scenes("photos/a.jpg", "masks/a.png")
    assert scene.src.exists()


def test_masks_and_references_of_a_folder_of_photos_are_found_by_name(workspace):
    scenes = find_scenes(workspace / "photos", workspace / "masks", workspace / "refs")
    assert [(scene.src.name, scene.mask.name, scene.ref and scene.ref.name) for scene in scenes] == [
        ("a.jpg", "a.png", None),
        ("b.jpg", "b.png", "b.webp"),
    ]


def test_photos_that_differ_only_in_their_extension_are_separate_scenes(workspace):
    write_photo(workspace / "photos/a.png")
    write_mask(workspace / "masks/a.jpg")
    scenes = find_scenes(workspace / "photos", workspace / "masks")
    assert [(scene.src.name, scene.mask.name) for scene in scenes] == [
        ("a.jpg", "a.jpg"),
        ("a.png", "a.png"),
        ("b.jpg", "b.png"),
    ]


def test_each_scene_of_a_data_set_is_listed_once(workspace):
    records = [
        {"src": f"photos/{name}.jpg", "mask": f"masks/{name}.png", "result": f"photos/{name}.jpg", "id": f"{name}{i}"}
        for name in ("b", "a")
        for i in range(3)
    ]
    (workspace / "set.json").write_text(json.dumps(records))
    assert [scene.id for scene in find_scenes(workspace / "set.json")] == ["b0", "a0"]


def test_a_data_set_may_be_a_folder(tmp_path):
    write_photo(tmp_path / "input/x.png")
    write_mask(tmp_path / "mask/x.png")
    assert [scene.src.name for scene in find_scenes(tmp_path)] == ["x.png"]


def fail_to_find_scenes(*arguments):
    """Call `find_scenes`, which must refuse its arguments, and return the message."""
    with pytest.raises(DataError) as caught:
        find_scenes(*arguments)
    return str(caught.value)


def test_missing_masks_and_other_invalid_inputs_are_refused(workspace):
    photos, masks = workspace / "photos", workspace / "masks"
    assert "--source_mask is missing" in fail_to_find_scenes(photos)
    assert "--source_mask is missing" in fail_to_find_scenes(photos / "a.jpg")
    assert "expected folders" in fail_to_find_scenes(photos, masks / "a.png")
    assert "expected folders" in fail_to_find_scenes(photos, masks, workspace / "refs/b.webp")
    write_photo(photos / "c.jpg")
    assert "no mask for 1 of 3 photos" in fail_to_find_scenes(photos, masks)
    (workspace / "empty").mkdir()
    assert "no images" in fail_to_find_scenes(workspace / "empty", masks)
    assert "no such file" in fail_to_find_scenes(photos / "none.jpg", masks / "a.png")
    (workspace / "set.json").write_text("[]")
    assert "--ref_image cannot be used with a data set" in fail_to_find_scenes(
        workspace / "set.json", None, workspace / "refs"
    )


def test_one_message_lists_all_invalid_scenes(workspace):
    write_mask(workspace / "masks/a.png", size=(41, 30))
    write_mask(workspace / "masks/b.png", value=127)
    message = fail_to_find_scenes(workspace / "photos", workspace / "masks")
    assert "41 × 30" in message
    assert "empty mask" in message


def test_candidates_form_a_data_set_without_scores(workspace):
    scenes = find_scenes(workspace / "photos", workspace / "masks", workspace / "refs")
    paths = make_candidates(scenes, [7, 8], workspace / "out/run")
    assert [path.name for path in paths] == ["a_7.png", "a_8.png", "b_7.png", "b_8.png"]
    assert Image.open(paths[1]).getpixel((0, 0)) == (8, 0, 0)
    records = load_records(workspace / "out/run" / RECORDS_FILE)
    assert [record.id for record in records] == ["a_7", "a_8", "b_7", "b_8"]
    assert {record.source for record in records} == {"policy"}
    assert [record.result.resolve() for record in records] == paths
    assert records[2].src.samefile(workspace / "photos/b.jpg")
    assert records[2].ref.samefile(workspace / "refs/b.webp")
    assert records[0].ref is None
    assert "../../photos/a.jpg" in (workspace / "out/run" / RECORDS_FILE).read_text()


def test_remove_gets_the_soft_mask_and_the_reference(workspace):
    write_mask(workspace / "masks/b.png", value=180)
    calls = []

    def remove(photo, soft, reference, seed):
        calls.append((photo.size, int(soft.max()), reference and reference.size, seed))
        return photo

    make_candidates(
        find_scenes(workspace / "photos", workspace / "masks", workspace / "refs"), [3], workspace / "out", remove
    )
    assert calls == [(SIZE, 255, None, 3), (SIZE, 180, SIZE, 3)]


def test_existing_results_are_replaced_only_with_overwrite(workspace):
    scenes = find_scenes(workspace / "photos/a.jpg", workspace / "masks/a.png")
    make_candidates(scenes, [0, 1], workspace / "out")
    with pytest.raises(DataError, match=r"a_1\.png: 1 of the images .* or add --overwrite"):
        make_candidates(scenes, [1, 2], workspace / "out")
    make_candidates(scenes, [2], workspace / "out")
    make_candidates(scenes, [1], workspace / "out", overwrite=True)
    assert [record.id for record in load_records(workspace / "out" / RECORDS_FILE)] == ["a_0", "a_1", "a_2"]


def test_the_message_suggests_overwrite_only_for_earlier_results(workspace):
    """If results are written beside the photos, `a_1.png` may be another photo of the user."""
    scenes = find_scenes(workspace / "photos/a.jpg", workspace / "masks/a.png")
    write_photo(workspace / "photos/a_1.png")
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"a_1\.png: already exists, .*records\.json does not name it") as caught:
            make_candidates(scenes, [0, 1], workspace / "photos", overwrite=overwrite)
        assert "overwrite" not in str(caught.value)
        assert not (workspace / "photos/a_0.png").exists()


def test_an_image_is_not_written_through_a_link(workspace):
    scenes = find_scenes(workspace / "photos/a.jpg", workspace / "masks/a.png")
    other_image = write_photo(workspace / "album/theirs.png")
    make_candidates(scenes, [0], workspace / "out")
    (workspace / "out/a_0.png").unlink()
    (workspace / "out/a_0.png").symlink_to(other_image)
    before = other_image.read_bytes()
    (path,) = make_candidates(scenes, [0], workspace / "out", overwrite=True)
    assert other_image.read_bytes() == before
    assert not path.is_symlink() and Image.open(path).getpixel((0, 0)) == (0, 0, 0)


def test_a_failed_run_leaves_the_records_of_the_candidates_it_wrote(workspace):
    def fail_at_seed_1(photo, soft, reference, seed):
        if seed == 1:
            raise MemoryError
        return photo

    with pytest.raises(MemoryError):
        make_candidates(
            find_scenes(workspace / "photos", workspace / "masks"), [0, 1], workspace / "out", fail_at_seed_1
        )
    assert [record.id for record in load_records(workspace / "out" / RECORDS_FILE)] == ["a_0"]


def test_a_records_file_with_other_content_is_not_replaced(workspace):
    scenes = find_scenes(workspace / "photos", workspace / "masks")
    (workspace / "out").mkdir()
    for text in ('{"mapping": {}}', '{"a": {"id": "a"}}', '[{"src": "a.png"}]', '[{"id": 3}]', "3", "no JSON", "[[]]"):
        (workspace / "out" / RECORDS_FILE).write_text(text)
        with pytest.raises(DataError, match="not a list of records with ids"):
            make_candidates(scenes, [0], workspace / "out", overwrite=True)
        assert (workspace / "out" / RECORDS_FILE).read_text() == text
    (workspace / "out" / RECORDS_FILE).unlink()
    (workspace / "out" / RECORDS_FILE).symlink_to("later.json")
    with pytest.raises(DataError, match=r"not a list of records with ids .*No such file"):
        make_candidates(scenes, [0], workspace / "out", overwrite=True)


def test_a_records_file_with_a_duplicate_id_is_not_replaced(workspace):
    scenes = find_scenes(workspace / "photos", workspace / "masks")
    make_candidates(scenes, [0], workspace / "out")
    records = json.loads((workspace / "out" / RECORDS_FILE).read_text())
    text = json.dumps([*records, records[1] | {"scores": [1, 1, 1]}])
    (workspace / "out" / RECORDS_FILE).write_text(text)
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"records\.json: several records have the id 'b_0', expected unique ids"):
            make_candidates(scenes, [1], workspace / "out", overwrite=overwrite)
        assert (workspace / "out" / RECORDS_FILE).read_text() == text


def test_a_record_whose_image_was_deleted_is_replaced_only_with_overwrite(workspace):
    scenes = find_scenes(workspace / "photos/a.jpg", workspace / "masks/a.png")
    (image,) = make_candidates(scenes, [0], workspace / "out")
    (record,) = json.loads((workspace / "out" / RECORDS_FILE).read_text())
    (workspace / "out" / RECORDS_FILE).write_text(json.dumps([record | {"scores": [1, 1, 1]}]))
    image.unlink()
    with pytest.raises(DataError, match=r"a_0\.png: 1 of the images .* or have records .* or add --overwrite"):
        make_candidates(scenes, [0], workspace / "out")
    make_candidates(scenes, [0], workspace / "out", overwrite=True)  # the new image has no scores yet
    assert load_records(workspace / "out" / RECORDS_FILE)[0].scores is None


@pytest.mark.parametrize("result", ["../album/a_0.png", "a_00.png", None])
def test_a_record_of_another_image_is_not_replaced(workspace, result):
    scenes = find_scenes(workspace / "photos/a.jpg", workspace / "masks/a.png")
    (workspace / "out").mkdir()
    text = json.dumps([{"id": "a_0", "result": result}])
    (workspace / "out" / RECORDS_FILE).write_text(text)
    with pytest.raises(DataError, match=r"the result of record 'a_0' is not a_0\.png; choose another"):
        make_candidates(scenes, [0], workspace / "out", overwrite=True)
    assert (workspace / "out" / RECORDS_FILE).read_text() == text


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_broken_link_is_not_replaced(workspace, overwrite):
    scenes = find_scenes(workspace / "photos/a.jpg", workspace / "masks/a.png")
    (workspace / "out").mkdir()
    (workspace / "out/a_0.png").symlink_to("later.png")
    with pytest.raises(DataError, match=r"a_0\.png: already exists"):
        make_candidates(scenes, [0], workspace / "out", overwrite=overwrite)
    assert (workspace / "out/a_0.png").is_symlink()


def test_photos_of_the_same_name_get_different_scene_names(tmp_path):
    records = []
    for folder in ("one", "two"):
        write_photo(tmp_path / folder / "street.png")
        write_mask(tmp_path / folder / "mask.png")
        records.append({"src": f"{folder}/street.png", "mask": f"{folder}/mask.png"})
    (tmp_path / "set.json").write_text(json.dumps(records))
    assert scene_names(find_scenes(tmp_path / "set.json")) == ["street", "street-2"]
