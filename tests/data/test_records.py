import json
import math

import numpy as np
import pytest
from PIL import Image

from ra_jax.data.records import check_records, load_records, scene_ids
from ra_jax.errors import DataError


def refusal(path, **how):
    with pytest.raises(DataError) as caught:
        load_records(path, **how)
    return str(caught.value)


@pytest.fixture
def refuse_spoilt(make_data_folder):
    """`spoilt(scores=...)`: the message about a data set whose record 1 has these fields changed (... = deleted)."""
    data = make_data_folder(sizes=[(24, 24), (16, 32)])

    def message(how=None, **changes):
        for name, value in changes.items():
            if value is ...:
                del data.records[1][name]
            else:
                data.records[1][name] = value
        return refusal(data.write(), **(how or {}))

    message.data = data
    return message


HUMAN = {"use_human_scores": True}


# --- what is accepted ------------------------------------------------------------------------------------------------


def test_list_with_dict_scores(make_data_folder):
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


def test_tensor_scores(make_data_folder):
    data = make_data_folder()
    for record in data.records:
        record["scores"] = [0, 0.5, 1]
    records = load_records(data.write(), use_human_scores=True, score_format="tensor")
    assert [record.scores for record in records] == [(0.0, 0.5, 1.0)] * 2


def test_byte_order_mark(make_data_folder):
    data = make_data_folder()
    path = data.write()
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert len(load_records(path)) == 2


def test_jsonl_by_name_and_by_content(make_data_folder):
    data = make_data_folder()
    text = "\n\n".join(json.dumps(record) for record in data.records)
    for name in ("data.jsonl", "data.json"):
        path = data.folder / name
        path.write_text(text, encoding="utf-8")
        assert [record.result.name for record in load_records(path)] == ["s0_0.png", "s0_1.png"]


def test_mapping_bare_mapping_and_folder_are_the_same_triplets(make_data_folder):
    data = make_data_folder(sizes=[(24, 24)] * 3)
    Image.open(data.folder / "mask/s1.png").save(data.folder / "mask/s1.bmp")
    (data.folder / "mask/s1.png").unlink()  # found by the input's name with another ending
    (data.folder / "ref").mkdir()
    Image.new("RGB", (5, 5)).save(data.folder / "ref/s2.png")
    mapping = {f"s{i}.png": [f"s{i}.png"] for i in range(3)}
    for path in (data.write(mapping), data.write({"mapping": mapping, "made_by": "x"}), data.folder):
        records = load_records(path)
        assert [record.src.name for record in records] == ["s0.png", "s1.png", "s2.png"]
        assert [record.mask.name for record in records] == ["s0.png", "s1.bmp", "s2.png"]
        assert all(record.result == data.folder / "gt" / record.src.name for record in records)
        assert [record.ref and record.ref.parent.name for record in records] == [None, None, "ref"]


def test_results_are_not_needed_to_remove(make_data_folder):
    data = make_data_folder()
    del data.records[0]["result"]
    path = data.write()
    assert "field 'result': missing" in refusal(path)
    assert [record.result is None for record in load_records(path, need_result=False)] == [True, False]
    (data.folder / "gt/s0.png").unlink()
    assert "field 'result': missing" in refusal(data.folder)
    assert load_records(data.folder, need_result=False)[0].result is None


def test_scores_may_be_absent_without_human_scores(make_data_folder):
    data = make_data_folder()
    data.records[0]["scores"] = None
    data.records[1]["scores"] = [0.1, 0.2, 0.3]  # the format matters only where scores are used
    assert [record.scores for record in load_records(data.write())] == [None, (0.1, 0.2, 0.3)]


def test_photo_and_mask_turned_by_exif_agree(make_data_folder):
    data = make_data_folder(sizes=[(20, 30)], results=1)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: shown after a quarter turn
    with Image.open(data.folder / "input/s0.png") as photo:
        photo.transpose(Image.Transpose.ROTATE_90).save(data.folder / "input/s0.jpg", exif=exif)
    data.records[0]["src"] = "input/s0.jpg"
    assert load_records(data.write())[0].size == (20, 30)


def test_scene_ids_follow_first_appearance(make_data_folder):
    data = make_data_folder(sizes=[(24, 24)] * 3)
    data.records = [data.records[i] for i in (4, 0, 5, 2, 1)]
    ids = scene_ids(load_records(data.write()))
    np.testing.assert_array_equal(ids, [0, 1, 0, 2, 1])
    assert ids.dtype == np.int32


# --- scores that are refused -----------------------------------------------------------------------------------------


def test_wrong_score_format(refuse_spoilt):
    message = refuse_spoilt(HUMAN, scores=[0.1, 0.2, 0.3])
    assert "record 1, field 'scores': Expected dict format for scores, got <class 'list'>" in message
    assert "--score_format tensor" in message
    message = refuse_spoilt({**HUMAN, "score_format": "tensor"})
    assert "record 0, field 'scores': Expected tensor format for scores, got <class 'dict'>" in message


def test_no_scores_field(refuse_spoilt):
    text = "use_human_scores=True but no 'scores' field found in data"
    assert f"record 1, field 'scores': {text}" in refuse_spoilt(HUMAN, scores=...)
    assert f"record 1, field 'scores': {text}" in refuse_spoilt(HUMAN, scores=None)


def test_no_scores_at_all_is_one_fault(make_data_folder):
    data = make_data_folder(sizes=[(24, 24)] * 3)
    message = refusal(data.folder, **HUMAN)
    assert "1 error " in message
    assert "use_human_scores=True but no 'scores' field found in data" in message


GOOD = {"removal_score": 0.1, "background_score": 0.2, "smoothness_score": 0.3}


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({"removal_score": 0.1, "smoothness_score": 0.3}, "'scores.background_score': score missing"),
        (GOOD | {"removal_score": "0.9"}, "'scores.removal_score': not a number, got '0.9' (str)"),
        (GOOD | {"removal_score": True}, "'scores.removal_score': not a number, got True (bool)"),
        (GOOD | {"removal_score": None}, "'scores.removal_score': not a number, got None"),
        (GOOD | {"smoothness_score": math.nan}, "'scores.smoothness_score': NaN"),
        (GOOD | {"removal_score": 1.5}, "'scores.removal_score': out of range, got 1.5"),
        (GOOD | {"removal_score": -0.1}, "'scores.removal_score': out of range, got -0.1"),
        (GOOD | {"removal_score": math.inf}, "'scores.removal_score': out of range, got inf"),
        (GOOD | {"removel_score": 1}, "'scores.removel_score': unknown score"),
        ([0.1, 0.2], "'scores': 2 scores: expected 3"),
        ([0.1, 0.2, 7], "'scores[2]': out of range, got 7"),
        ([0.1, math.nan, 0.2], "'scores[1]': NaN"),
        ([0.1, False, 0.2], "'scores[1]': not a number, got False (bool)"),
        ("high", "'scores': Expected dict format for scores, got <class 'str'>"),
    ],
)
def test_bad_scores(refuse_spoilt, scores, expected):
    message = refuse_spoilt(scores=scores)  # in training without human scores as well
    assert f"record 1, field {expected}" in message
    assert "expected" in message


# --- pictures that are refused ---------------------------------------------------------------------------------------


def test_missing_picture(refuse_spoilt):
    message = refuse_spoilt(src="input/none.png")
    assert "record 1, field 'src': no such file: " in message and "input/none.png" in message


@pytest.mark.parametrize("field", ["src", "mask", "result", "ref"])
def test_unreadable_picture(refuse_spoilt, field):
    (refuse_spoilt.data.folder / "words.png").write_text("these are words")
    assert f"record 1, field '{field}': unreadable image" in refuse_spoilt(**{field: "words.png"})


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png"])
def test_picture_cut_short(refuse_spoilt, name):
    """Its head is sound: only decoding finds out."""
    path = refuse_spoilt.data.folder / name
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    assert "record 1, field 'result': unreadable image" in refuse_spoilt(result=name)


def test_sixteen_bit_picture(refuse_spoilt):
    Image.fromarray(np.full((24, 24), 40000, np.uint16)).save(refuse_spoilt.data.folder / "deep.png")
    assert "record 1, field 'result': unreadable image" in (message := refuse_spoilt(result="deep.png"))
    assert "expected 8 bits per channel" in message


@pytest.mark.parametrize("field", ["mask", "result"])
def test_picture_of_another_size(refuse_spoilt, field):
    Image.new("L", (30, 20), 255).save(refuse_spoilt.data.folder / "wide.png")
    message = refuse_spoilt(**{field: "wide.png"})
    assert f"record 1, field '{field}': size 30 × 20, but src is 24 × 24" in message


def test_empty_mask(refuse_spoilt):
    Image.new("L", (24, 24), 127).save(refuse_spoilt.data.folder / "dim.png")
    message = refuse_spoilt(mask="dim.png")
    assert "record 1, field 'mask': empty mask" in message and "at least one pixel > 127" in message


def test_mask_threshold_is_above_127(make_data_folder):
    data = make_data_folder(results=1)
    Image.new("L", (24, 24), 128).save(data.folder / "mask/s0.png")
    assert len(load_records(data.write())) == 1


# --- records and files that are refused ------------------------------------------------------------------------------


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
def test_bad_fields(refuse_spoilt, changes, expected):
    assert f"record 1, {expected}" in refuse_spoilt(**changes)


def test_unknown_names_get_the_nearest_known_one(refuse_spoilt):
    message = refuse_spoilt(scoers={}, scores=GOOD | {"removel_score": 1})
    assert "'scoers': unknown field: expected one of ref, src, " in message
    assert "; did you mean 'scores'?" in message
    assert "; did you mean 'removal_score'?" in message


def test_duplicate_id(refuse_spoilt):
    refuse_spoilt.data.records[3]["id"] = "x"
    message = refuse_spoilt(id="x")
    assert "record 3, field 'id': duplicate id 'x', first used by record 1" in message


def test_record_that_is_no_object(make_data_folder):
    data = make_data_folder()
    message = refusal(data.write([*data.records, "input/s0.png"]))
    assert "record 2: got <class 'str'>: expected an object with src, mask and result" in message


@pytest.mark.parametrize("content", [[], {}, {"mapping": {}}])
def test_no_records(make_data_folder, content):
    assert "no records: expected at least one" in refusal(make_data_folder().write(content))


def test_empty_jsonl(tmp_path):
    (tmp_path / "data.jsonl").write_text("\n")
    assert "no records" in refusal(tmp_path / "data.jsonl")


def test_broken_json_names_the_line(tmp_path):
    (tmp_path / "data.json").write_text('[\n {"src": "a.png"},\n {"src" "b.png"}\n]')
    assert "line 3: broken JSON" in refusal(tmp_path / "data.json")


def test_comments_in_json_are_named(tmp_path):
    (tmp_path / "data.json").write_text('[\n{"src": "a.png",  // the photo\n "mask": "b.png"}]')
    assert "JSON has no // comments, remove them" in refusal(tmp_path / "data.json")


def test_data_of_the_demo_says_how_to_make_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "`python -m ra_jax.demo` creates it" in refusal("output/demo/data/train/labeled_dict.json")


def test_broken_jsonl_names_record_and_line_and_reads_on(make_data_folder):
    data = make_data_folder()
    lines = [json.dumps(data.records[0]), "", '{"src": ', json.dumps(data.records[1] | {"mask": "none.png"})]
    path = data.folder / "data.jsonl"
    path.write_text("\n".join(lines))
    message = refusal(path)
    assert "2 errors" in message
    assert "record 1, line 3: broken JSON" in message
    assert "record 2, line 4, field 'mask': no such file" in message


def test_single_record_at_the_top(make_data_folder):
    data = make_data_folder()
    assert "put records into a list" in refusal(data.write(data.records[0]))


def test_bad_mapping(make_data_folder):
    data = make_data_folder(sizes=[(24, 24)] * 2)
    message = refusal(data.write({"mapping": {"s0.png": "s0.png", "s1.png": ["none.png"]}}))
    assert "field 'mapping': 's0.png' maps to 's0.png': expected a list of file names in input/" in message
    assert "record 0, field 'mask': no mask for input/none.png" in message


def test_no_such_file_and_no_such_form(tmp_path):
    assert "no such file or folder" in refusal(tmp_path / "none.json")
    assert "a folder without input/ and mask/" in refusal(tmp_path)
    (tmp_path / "picture.json").write_bytes(b"\xff\xd8\xff\xe0")
    assert "not UTF-8 text" in refusal(tmp_path / "picture.json")


def test_all_faults_together_twenty_in_full(make_data_folder):
    data = make_data_folder(sizes=[(24, 24)] * 12)
    for record in data.records[:-1]:
        record["mask"] = "mask/none.png"
    data.records[-1] |= {"src": "none.png", "scores": [2, 3, 4], "extra": 1}
    path = data.write()
    message = refusal(path)
    assert message.startswith(f"{path}: 28 errors")
    assert sum("no such file" in line for line in message.splitlines()) == 20
    assert "and 8 more: `python -m ra_jax.data validate" in message
    records, errors = check_records(path)
    assert not records and len(errors) == 28
    fields = {fault.field for fault in errors if fault.record == 23}
    assert fields == {"extra", "src", "scores[0]", "scores[1]", "scores[2]"}


def test_sound_records_survive_the_check(make_data_folder):
    data = make_data_folder(sizes=[(24, 24)] * 2)
    data.records[2]["mask"] = "none.png"
    records, errors = check_records(data.write())
    assert [record.index for record in records] == [0, 1, 3]
    assert len(errors) == 1
