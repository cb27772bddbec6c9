"""The paths that are read for each form of a data set. Commands compare their outputs with these paths."""

from pathlib import Path

import pytest

from ra_jax.data.inputs import flag_inputs, image_paths, input_paths, record_paths
from ra_jax.data.packs import Pack, PackedImage
from ra_jax.data.records import load_records

RECORD_FOLDERS = ("input", "mask", "result")


@pytest.fixture
def data(make_data_folder, monkeypatch, tmp_path):
    """A data set in ./set with two scenes and one result per scene."""
    data = make_data_folder(sizes=[(24, 24)] * 2, results=1)
    monkeypatch.chdir(tmp_path)
    return data


def images_in(*subfolders):
    """Return the paths of the images of both scenes in these subfolders of ./set."""
    return {
        Path(f"set/{subfolder}/s{scene}{'_0' * (subfolder == 'result')}.png")
        for subfolder in subfolders
        for scene in (0, 1)
    }


def test_a_data_file_is_read_with_the_images_that_its_records_name(data):
    data.write()
    assert set(input_paths("set/data.json")) == {Path("set/data.json"), *images_in("input", "mask", "result")}
    (data.folder / "lines.jsonl").write_text('{"src": "/photos/x.png", "mask": "../m.png", "result": 3}\nno JSON\n')
    paths = input_paths("set/lines.jsonl")
    assert paths == [Path("set/lines.jsonl"), Path("/photos/x.png"), Path("set/../m.png")]


def test_images_of_a_mapping_and_of_a_folder_are_found_by_name(data):
    data.write({"mapping": {f"s{scene}.png": [f"s{scene}.png"] for scene in (0, 1)}}, "triplets.json")
    assert set(input_paths("set/triplets.json")) == {Path("set/triplets.json"), *images_in("input", "mask", "gt")}
    assert set(input_paths("set")) == {Path("set"), *images_in("input", "mask", "gt")}


def test_image_folders_beside_a_data_file_are_nested_inputs(data):
    data.write()
    inputs, nested = flag_inputs({"--a": "set/data.json", "--b": None, "--c": "set/mask/s0.png", "--d": "set"})
    assert inputs.keys() == nested.keys() == {"--a", "--c", "--d"}
    assert nested == {"--a": [Path("set/input"), Path("set/mask")], "--c": [], "--d": []}


def test_an_image_and_a_folder_of_images_are_read(data):
    assert input_paths("set/mask/s0.png") == [Path("set/mask/s0.png")]
    assert set(input_paths("set/mask")) == {Path("set/mask"), *images_in("mask")}
    assert input_paths("set/mask/none.png") == input_paths("owner/model") == []


def test_subfolders_of_a_folder_of_images_are_not_read(data):
    Path("set/mask/more").mkdir()
    Path("set/mask/results").symlink_to("../result")
    Path("set/mask/nowhere").symlink_to("none")
    Path("elsewhere.png").write_bytes(b"")
    Path("set/mask/link.png").symlink_to("../../elsewhere.png")
    expected = {Path("set/mask"), Path("set/mask/link.png"), *images_in("mask")}
    assert set(input_paths("set/mask")) == set(image_paths(Path("set/mask"))) == expected
    assert set(image_paths(Path("set"))) == {Path("set")}  # although the folder is a data set
    assert image_paths(Path("elsewhere.png")) == [Path("elsewhere.png")]


def test_record_paths_are_the_files_of_the_records_or_the_folder_of_their_pack(data, monkeypatch):
    records = load_records(data.write())
    assert set(record_paths(records)) == {data.folder / path.relative_to("set") for path in images_in(*RECORD_FOLDERS)}
    pack = object.__new__(Pack)
    pack.folder = Path("packed")
    packed = PackedImage(pack, "src", 0, (24, 24), content_id=0)
    monkeypatch.setattr("ra_jax.data.inputs.pack_folder", lambda path: pack.folder)
    assert input_paths("tfds:packed") == [pack.folder]
    fields = {"src": packed, "mask": packed, "ref": None, "result": None}
    assert record_paths([type("Record", (), fields)]) == [pack.folder]
