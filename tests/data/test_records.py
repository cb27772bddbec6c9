import json
import math

import numpy as np
import pytest
from PIL import Image

from ra_jax.data.records import check_records, load_records, scene_ids
from ra_jax.errors import DataError

HUMAN = {"use_human_scores": True}


def fail_to_load(path, **options):
    """Load records that must be refused, and return the message."""
    with pytest.raises(DataError) as caught:
        load_records(path, **options)
    return str(caught.value)


@pytest.fixture
def data(make_data_folder):
    """A data set with two scenes, 24 × 24 and 32 × 16 pixels, and two results per scene."""
    return make_data_folder(sizes=[(24, 24), (16, 32)])


def fail_after_change(data, options=None, **changes):
    """Change fields of record 1 (... deletes a field), load the records, and return the message that refuses them."""
    for name, value in changes.items():
        if value is ...:
            del data.records[1][name]
        else:
            data.records[1][name] = value
    return fail_to_load(data.write(), **(options or {}))


# --- valid data ------------------------------------------------------------------------------------------------------


def test_a_list_of_records_with_dict_scores_is_loaded(make_data_folder):
    data = make_data_folder(sizes=[(24, 24), (16, 32)])
    data.records[0] |= {"id": 7, "split": "val", "annotator": "a", "source": "gt", "ref": "gt/s0.png"}
    data.records[1] |= {"id": None, "split": None, "annotator": None, "source": None, "ref": None}
    records = load_records(data.write(), **HUMAN)
    assert [record.index for record in records] == [0, 1, 2, 3]
    first = records[0]
    assert (first.id, first.split, first.annotator, first.source) == ("7", "val", "a", "gt")
    assert first.ref == data.folder / "gt/s0.png" and records[1].ref is None
    assert first.src == data.folder / "input/s0.png" and first.result == data.folder / "result/s0_0.png"
    assert records[1].scores == (0.5, 1.0, 0.25)
    assert records[2].size == (16, 32)
    assert len({record.id for record in records}) == 4


def test_tensor_scores_are_loaded(make_data_folder):
    data = make_data_folder()
    for record in data.records:
        record["scores"] = [0, 0.5, 1]
    records = load_records(data.write(), use_human_scores=True, score_format="tensor")
    assert [record.scores for record in records] == [(0.0, 0.5, 1.0)] * 2


def test_a_byte_order_mark_is_accepted(make_data_folder):
    data = make_data_folder()
    path = data.write()
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert len(load_records(path)) == 2


def test_json_lines_are_recognized_by_file_name_or_content(make_data_folder):
    data = make_data_folder()
    text = "\n\n".join(json.dumps(record) for record in data.records)
    for name in ("data.jsonl", "data.json"):
        path = data.folder / name
        path.write_text(text, encoding="utf-8")
        assert [record.result.name for record in load_records(path)] == ["s0_0.png", "s0_1.png"]


def test_a_bare_mapping_a_mapping_key_and_a_folder_give_the_same_triplets(make_data_folder):
    data = make_data_folder(sizes=[(24, 24)] * 3)
    Image.open(data.folder / "mask/s1.png").save(data.folder / "mask/s1.bmp")
    (data.folder / "mask/s1.png").unlink()  # s1.bmp is found by the stem of s1.png
    (data.folder / "ref").mkdir()
    Image.new("RGB", (5, 5)).save(data.folder / "ref/s2.png")
    mapping = {f"s{i}.png": [f"s{i}.png"] for i in range(3)}
    for path in (data.write(mapping), data.write({"mapping": mapping, "made_by": "x"}), data.folder):
        records = load_records(path)
        assert [record.src.name for record in records] == ["s0.png", "s1.png", "s2.png"]
        assert [record.mask.name for record in records] == ["s0.png", "s1.bmp", "s2.png"]
        assert all(record.result == data.folder / "gt" / record.src.name for record in records)
        assert [record.ref and record.ref.parent.name for record in records] == [None, None, "ref"]


def test_results_may_be_missing_if_they_are_not_needed(make_data_folder):
    data = make_data_folder()
    del data.records[0]["result"]
    path = data.write()
    assert "field 'result': missing" in fail_to_load(path)
    assert [record.result is None for record in load_records(path, need_result=False)] == [True, False]
    (data.folder / "gt/s0.png").unlink()
    assert "field 'result': missing" in fail_to_load(data.folder)
    assert load_records(data.folder, need_result=False)[0].result is None


def test_scores_may_be_absent_without_human_scores(make_data_folder):
    data = make_data_folder()
    data.records[0]["scores"] = None
    data.records[1]["scores"] = [0.1, 0.2, 0.3]  # the format matters only if scores are used
    assert [record.scores for record in load_records(data.write())] == [None, (0.1, 0.2, 0.3)]


def test_a_photo_turned_by_exif_may_have_a_mask_of_its_upright_size(make_data_folder):
    data = make_data_folder(sizes=[(20, 30)], results=1)
    exif = Image.Exif()
    exif[0x0112] = 6  # readers rotate the stored image by 90 degrees
    with Image.open(data.folder / "input/s0.png") as photo:
        photo.transpose(Image.Transpose.ROTATE_90).save(data.folder / "input/s0.jpg", exif=exif)
    data.records[0]["src"] = "input/s0.jpg"
    assert load_records(data.write())[0].size == (20, 30)


def test_scene_ids_are_numbered_by_first_appearance(make_data_folder):
    data = make_data_folder(sizes=[(24, 24)] * 3)
    data.records = [data.records[i] for i in (4, 0, 5, 2, 1)]
    ids = scene_ids(load_records(data.write()))
    np.testing.assert_array_equal(ids, [0, 1, 0, 2, 1])
    assert ids.dtype == np.int32


# --- invalid scores --------------------------------------------------------------------------------------------------


def test_scores_in_the_other_format_are_refused(data):
    message = fail_after_change(data, HUMAN, scores=[0.1, 0.2, 0.3])
    assert "record 1, field 'scores': Expected dict format for scores, got <class 'list'>" in message
    assert "--score_format tensor" in message
    message = fail_after_change(data, {**HUMAN, "score_format": "tensor"})
    assert "record 0, field 'scores': Expected tensor format for scores, got <class 'dict'>" in message


def test_records_without_scores_are_refused_with_human_scores(data):
    text = "use_human_scores=True but no 'scores' field found in data"
    assert f"record 1, field 'scores': {text}" in fail_after_change(data, HUMAN, scores=...)
    assert f"record 1, field 'scores': {text}" in fail_after_change(data, HUMAN, scores=None)


def test_a_data_set_without_any_scores_gives_one_error(make_data_folder):
    data = make_data_folder(sizes=[(24, 24)] * 3)
    message = fail_to_load(data.folder, **HUMAN)
    assert "1 error " in message
    assert "use_human_scores=True but no 'scores' field found in data" in message


VALID_SCORES = {"removal_score": 0.1, "background_score": 0.2, "smoothness_score": 0.3}


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({"removal_score": 0.1, "smoothness_score": 0.3}, "'scores.background_score': score missing"),
        (VALID_SCORES | {"removal_score": "0.9"}, "'scores.removal_score': not a number, got '0.9' (str)"),
        (VALID_SCORES | {"removal_score": True}, "'scores.removal_score': not a number, got True (bool)"),
        (VALID_SCORES | {"removal_score": None}, "'scores.removal_score': not a number, got None"),
        (VALID_SCORES | {"smoothness_score": math.nan}, "'scores.smoothness_score': NaN"),
        (VALID_SCORES | {"removal_score": 1.5}, "'scores.removal_score': out of range, got 1.5"),
        (VALID_SCORES | {"removal_score": -0.1}, "'scores.removal_score': out of range, got -0.1"),
        (VALID_SCORES | {"removal_score": math.inf}, "'scores.removal_score': out of range, got inf"),
        (VALID_SCORES | {"removel_score": 1}, "'scores.removel_score': unknown score"),
        ([0.1, 0.2], "'scores': 2 scores: expected 3"),
        ([0.1, 0.2, 7], "'scores[2]': out of range, got 7"),
        ([0.1, math.nan, 0.2], "'scores[1]': NaN"),
        ([0.1, False, 0.2], "'scores[1]': not a number, got False (bool)"),
        ("high", "'scores': Expected dict format for scores, got <class 'str'>"),
    ],
)
def test_invalid_scores_are_refused(data, scores, expected):
    message = fail_after_change(data, scores=scores)  # also without use_human_scores
    assert f"record 1, field {expected}" in message
    assert "expected" in message


# --- invalid images --------------------------------------------------------------------------------------------------


def test_a_missing_image_is_refused(data):
    message = fail_after_change(data, src="input/none.png")
    assert "record 1, field 'src': no such file: " in message and "input/none.png" in message


@pytest.mark.parametrize("field", ["src", "mask", "result", "ref"])
def test_an_unreadable_image_is_refused(data, field):
    (data.folder / "words.png").write_text("these are words")
    assert f"record 1, field '{field}': unreadable image" in fail_after_change(data, **{field: "words.png"})


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png"])
def test_a_truncated_image_is_refused(data, name):
    """The header of the file is valid, so that only decoding finds the error."""
    path = data.folder / name
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    assert "record 1, field 'result': unreadable image" in fail_after_change(data, result=name)


def test_a_sixteen_bit_image_is_refused(data):
    Image.fromarray(np.full((24, 24), 40000, np.uint16)).save(data.folder / "deep.png")
    assert "record 1, field 'result': unreadable image" in (message := fail_after_change(data, result="deep.png"))
    assert "expected 8 bits per channel" in message


@pytest.mark.parametrize("field", ["mask", "result"])
def test_mask_or_result_of_another_size_is_refused(data, field):
    Image.new("L", (30, 20), 255).save(data.folder / "wide.png")
    message = fail_after_change(data, **{field: "wide.png"})
    assert f"record 1, field '{field}': size 30 × 20, but src is 24 × 24" in message


def test_an_empty_mask_is_refused(data):
    Image.new("L", (24, 24), 127).save(data.folder / "dim.png")
    message = fail_after_change(data, mask="dim.png")
    assert "record 1, field 'mask': empty mask" in message and "at least one pixel > 127" in message


def test_a_mask_of_value_128_is_not_empty(make_data_folder):
    data = make_data_folder(results=1)
    Image.new("L", (24, 24), 128).save(data.folder / "mask/s0.png")
    assert len(load_records(data.write())) == 1


# --- invalid records and files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mask": ...}, "field 'mask': missing"),
        ({"src": None}, "field 'src': missing"),
        ({"src": 3}, "field 'src': got 3 (int): expected the path of an image"),
        ({"result": ""}, "field 'result': got '' (str)"),
        ({"scoers": {}}, "field 'scoers': unknown field"),
        ({"zzz": 1}, "field 'zzz': unknown field: expected one of ref, src, mask"),
        ({"source": "policies"}, "field 'source': got 'policies': expected one of policy, other, gt"),
        ({"split": 3}, "field 'split': got 3 (int): expected a string"),
        ({"id": 1.5}, "field 'id': got 1.5 (float)"),
    ],
)
def test_invalid_fields_are_refused(data, changes, expected):
    assert f"record 1, {expected}" in fail_after_change(data, **changes)


def test_the_message_for_an_unknown_name_suggests_the_nearest_known_one(data):
    message = fail_after_change(data, scoers={}, scores=VALID_SCORES | {"removel_score": 1})
    assert "'scoers': unknown field: expected one of ref, src, " in message
    assert "; did you mean 'scores'?" in message
    assert "; did you mean 'removal_score'?" in message


def test_a_duplicate_id_is_refused(data):
    data.records[3]["id"] = "x"
    message = fail_after_change(data, id="x")
    assert "record 3, field 'id': duplicate id 'x', first used by record 1" in message


def test_a_record_that_is_no_object_is_refused(make_data_folder):
    data = make_data_folder()
    message = fail_to_load(data.write([*data.records, "input/s0.png"]))
    assert "record 2: got <class 'str'>: expected an object with src, mask and result" in message


@pytest.mark.parametrize("content", [[], {}, {"mapping": {}}])
def test_a_data_set_without_records_is_refused(make_data_folder, content):
    assert "no records: expected at least one" in fail_to_load(make_data_folder().write(content))


def test_an_empty_jsonl_file_is_refused(tmp_path):
    (tmp_path / "data.jsonl").write_text("\n")
    assert "no records" in fail_to_load(tmp_path / "data.jsonl")


def test_the_message_for_broken_json_names_the_line(tmp_path):
    (tmp_path / "data.json").write_text('[\n {"src": "a.png"},\n {"src" "b.png"}\n]')
    assert "line 3: broken JSON" in fail_to_load(tmp_path / "data.json")


def test_the_message_for_comments_in_json_says_to_remove_them(tmp_path):
    (tmp_path / "data.json").write_text('[\n{"src": "a.png",  // the photo\n "mask": "b.png"}]')
    assert "JSON has no // comments, remove them" in fail_to_load(tmp_path / "data.json")


def test_the_message_for_missing_demo_data_names_the_command_that_creates_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "`python -m ra_jax.demo` creates it" in fail_to_load("output/demo/data/train/labeled_dict.json")


def test_errors_in_jsonl_name_record_and_line_and_do_not_stop_the_check(make_data_folder):
    data = make_data_folder()
    lines = [json.dumps(data.records[0]), "", '{"src": ', json.dumps(data.records[1] | {"mask": "none.png"})]
    path = data.folder / "data.jsonl"
    path.write_text("\n".join(lines))
    message = fail_to_load(path)
    assert "2 errors" in message
    assert "record 1, line 3: broken JSON" in message
    assert "record 2, line 4, field 'mask': no such file" in message


def test_a_record_outside_a_list_is_refused(make_data_folder):
    data = make_data_folder()
    assert "put records into a list" in fail_to_load(data.write(data.records[0]))


def test_an_invalid_mapping_is_refused(make_data_folder):
    data = make_data_folder(sizes=[(24, 24)] * 2)
    message = fail_to_load(data.write({"mapping": {"s0.png": "s0.png", "s1.png": ["none.png"]}}))
    assert "field 'mapping': 's0.png' maps to 's0.png': expected a list of file names in input/" in message
    assert "record 0, field 'mask': no mask for input/none.png" in message


def test_missing_files_and_unknown_formats_are_refused(tmp_path):
    assert "no such file or folder" in fail_to_load(tmp_path / "none.json")
    assert "a folder without input/ and mask/" in fail_to_load(tmp_path)
    (tmp_path / "picture.json").write_bytes(b"\xff\xd8\xff\xe0")
    assert "not UTF-8 text" in fail_to_load(tmp_path / "picture.json")


def test_the_message_counts_all_errors_and_lists_twenty(make_data_folder):
    data = make_data_folder(sizes=[(24, 24)] * 12)
    for record in data.records[:-1]:
        record["mask"] = "mask/none.png"
    data.records[-1] |= {"src": "none.png", "scores": [2, 3, 4], "extra": 1}
    path = data.write()
    message = fail_to_load(path)
    assert message.startswith(f"{path}: 28 errors")
    assert sum("no such file" in line for line in message.splitlines()) == 20
    assert "and 8 more: `python -m ra_jax.data validate" in message
    records, errors = check_records(path)
    assert not records and len(errors) == 28
    fields = {error.field for error in errors if error.record == 23}
    assert fields == {"extra", "src", "scores[0]", "scores[1]", "scores[2]"}


def test_check_records_returns_the_valid_records(make_data_folder):
    data = make_data_folder(sizes=[(24, 24)] * 2)
    data.records[2]["mask"] = "none.png"
    records, errors = check_records(data.write())
    assert [record.index for record in records] == [0, 1, 3]
    assert len(errors) == 1
