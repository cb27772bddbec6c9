import json
import shutil

import numpy as np
import pytest
from PIL import Image

from ra_jax.errors import DataError
from ra_jax.evaluation.pairs import find_pairs

NAMES = ("street", "beach")


@pytest.fixture
def data(tmp_path):
    """A folder with two scenes in input/ mask/ gt/, triplets.json, and removed/.

    removed/ has two results for each scene and a records.json as infer writes it.
    """
    for room in ("input", "mask", "gt", "removed"):
        (tmp_path / room).mkdir()
    mask = np.zeros((12, 16), np.uint8)
    records = []
    for number, name in enumerate(NAMES):
        mask[2 + 5 * number : 6 + 5 * number, 3:9] = 255
        picture(tmp_path / f"input/{name}.jpg")
        picture(tmp_path / f"gt/{name}_empty.jpg")
        Image.fromarray(mask).save(tmp_path / f"mask/{name}.png")
        for seed in (0, 1):
            picture(tmp_path / f"removed/{name}_{seed}.png")
            fields = {"id": f"{name}_{seed}", "result": f"{name}_{seed}.png", "source": "policy"}
            records.append(fields | {"src": f"../input/{name}.jpg", "mask": f"../mask/{name}.png"})
    write(tmp_path / "removed/records.json", records)
    write(tmp_path / "triplets.json", {"mapping": {f"{name}_empty.jpg": [f"{name}.jpg"] for name in NAMES}})
    return tmp_path


def picture(path, size=(16, 12)):
    Image.new("RGB", size, "grey").save(path)


def write(path, content):
    path.write_text(json.dumps(content))


def found(pairs):
    return {pair.id: None if pair.truth is None else pair.truth.name for pair in pairs}


EXPECTED = {f"{name}_{seed}": f"{name}_empty.jpg" for name in NAMES for seed in (0, 1)}


@pytest.mark.parametrize("results", ["removed", "removed/records.json"])
def test_what_infer_wrote_with_triplets(data, results):
    pairs = find_pairs(data / results, data / "triplets.json")
    assert found(pairs) == EXPECTED
    assert pairs[0].src.name == "street.jpg" and pairs[0].mask.name == "street.png" and pairs[0].size == (12, 16)


def test_without_ground_truth(data):
    assert found(find_pairs(data / "removed")) == dict.fromkeys(EXPECTED)


def test_by_name_where_the_photos_lie_elsewhere(data):
    shutil.copytree(data / "input", data / "copy/input")
    shutil.copytree(data / "mask", data / "copy/mask")
    shutil.copytree(data / "gt", data / "copy/gt")
    for name in NAMES:
        (data / f"copy/gt/{name}_empty.jpg").rename(data / f"copy/gt/{name}.jpg")
    assert found(find_pairs(data / "removed", data / "copy")) == {key: f"{key[:-2]}.jpg" for key in EXPECTED}
    assert found(find_pairs(data / "removed", data / "copy/gt")) == {key: f"{key[:-2]}.jpg" for key in EXPECTED}


def test_the_same_name_with_another_object_is_no_match(data):
    shutil.copytree(data / "input", data / "copy/input")
    shutil.copytree(data / "input", data / "copy/gt")
    (data / "copy/mask").mkdir()
    shutil.copy(data / "mask/street.png", data / "copy/mask/street.png")
    mask = np.zeros((12, 16), np.uint8)
    mask[:2] = 255
    Image.fromarray(mask).save(data / "copy/mask/beach.png")
    with pytest.raises(DataError, match=r"no ground truth for 2 of 4 results") as caught:
        find_pairs(data / "removed", data / "copy")
    assert "beach_0.png" in str(caught.value) and "shows another object" in str(caught.value)


def test_a_plain_folder_named_as_the_photos(data):
    (data / "plain").mkdir()
    for name in NAMES:
        picture(data / f"plain/{name}.png")
    pairs = find_pairs(data / "plain", data / "triplets.json")
    assert found(pairs) == {name: f"{name}_empty.jpg" for name in sorted(NAMES)}
    assert {pair.id: pair.mask.name for pair in pairs} == {name: f"{name}.png" for name in NAMES}
    with pytest.raises(DataError, match="does not say which photos and masks they were made from; give a data set"):
        find_pairs(data / "plain")
    picture(data / "plain/forest.png")
    with pytest.raises(DataError, match=r"no scene for 1 of 3 results\n.*forest\.png: no scenes"):
        find_pairs(data / "plain", data / "triplets.json")
    assert list(found(find_pairs(data / "plain", data / "triplets.json", "[!f]*"))) == ["beach", "street"]
    picture(data / "plain/street.jpg")
    pairs = find_pairs(data / "plain", data / "triplets.json", "street*")
    assert found(pairs) == {"street.jpg": "street_empty.jpg", "street.png": "street_empty.jpg"}


def test_a_record_of_source_gt_is_the_ground_truth_of_its_scene(data):
    records = json.loads((data / "removed/records.json").read_text())
    for name in NAMES:
        scene = next(record for record in records if record["id"] == f"{name}_0")
        records.append(scene | {"id": name, "result": f"../gt/{name}_empty.jpg", "source": "gt"})
    write(data / "removed/scored.json", records)
    assert found(find_pairs(data / "removed/scored.json")) == EXPECTED
    assert found(find_pairs(data / "removed", data / "removed/scored.json")) == EXPECTED
    write(data / "removed/scored.json", records[:-1])
    with pytest.raises(DataError, match="no ground truth for 2 of 4 results"):
        find_pairs(data / "removed/scored.json")
    write(data / "removed/scored.json", records[-1:])
    with pytest.raises(DataError, match="every record is of source gt"):
        find_pairs(data / "removed/scored.json")


def test_several_results_are_no_ground_truth(data):
    with pytest.raises(DataError, match="2 results could be its ground truth"):
        find_pairs(data / "removed", data / "removed/records.json")


def test_only_chooses_by_file_name(data):
    assert list(found(find_pairs(data / "removed", data / "triplets.json", "*_1"))) == ["street_1", "beach_1"]
    assert list(found(find_pairs(data / "removed", data / "triplets.json", "beach*.png"))) == ["beach_0", "beach_1"]
    with pytest.raises(DataError, match=r"--only '\*model\*': matches none of 4 results, such as street_0.png"):
        find_pairs(data / "removed", data / "triplets.json", "*model*")


def test_sizes_that_differ_name_both_files(data):
    picture(data / "gt/beach_empty.jpg", (20, 12))
    (data / "truth").mkdir()
    picture(data / "truth/street.jpg")
    picture(data / "truth/beach.jpg", (20, 12))
    with pytest.raises(DataError, match=r"beach_0\.png is 16 × 12, but its ground truth .*beach\.jpg is 20 × 12"):
        find_pairs(data / "removed", data / "truth")
    with pytest.raises(DataError, match="size 20 × 12, but src is 16 × 12"):
        find_pairs(data / "removed", data / "triplets.json")


def test_many_that_cannot_be_matched_are_counted(data):
    records = json.loads((data / "removed/records.json").read_text())
    write(data / "removed/records.json", [records[0] | {"id": str(i)} for i in range(30)])
    write(data / "triplets.json", {"mapping": {"beach_empty.jpg": ["beach.jpg"]}})
    with pytest.raises(DataError, match="30 of 30 results") as caught:
        find_pairs(data / "removed", data / "triplets.json")
    lines = str(caught.value).splitlines()
    assert len(lines) == 22 and lines[-1] == "  … and 10 more"


def test_what_is_no_data_set(data):
    (data / "empty").mkdir()
    with pytest.raises(DataError, match=r"no records\.json, no input/ and no images"):
        find_pairs(data / "empty")
    with pytest.raises(DataError, match="neither input/ mask/ gt/ nor images"):
        find_pairs(data / "removed", data / "empty")
    with pytest.raises(DataError, match=r"--results .*: is an image; expected a data set or a folder"):
        find_pairs(data / "gt/beach_empty.jpg")
    with pytest.raises(DataError, match="nowhere"):
        find_pairs(data / "nowhere")


def test_a_ground_truth_that_cannot_be_read(data):
    (data / "truth").mkdir()
    picture(data / "truth/street.png")
    (data / "truth/beach.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"cannot be compared with the results\n  image .*beach\.png cannot be read"):
        find_pairs(data / "removed", data / "truth")
