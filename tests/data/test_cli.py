"""The commands `validate` and `synth` of `python -m ra_jax.data`."""

import math

import pytest

from ra_jax.data.__main__ import main
from ra_jax.data.records import load_records


def test_validate_prints_counts_and_score_statistics(make_data_folder, capsys):
    data = make_data_folder(sizes=[(24, 24), (24, 24), (16, 32)], results=3)
    data.records.pop()
    assert main(["validate", str(data.write()), "--use-human-scores", "--score_format", "dict"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["records", "8"] in lines and ["scenes", "3"] in lines
    assert ["of", "2", "results", "1"] in lines and ["of", "3", "results", "2"] in lines
    # The smoothness scores are 3 × 0, 3 × 0.25 and 2 × 0.5. A score of 1 counts in the last of ten bins.
    assert ["smoothness_score", "8", "0.219", "0.195", *"3030020000"] in lines
    assert ["background_score", "8", "1.000", "0.000", *"0000000008"] in lines
    assert ["no", "errors"] in lines


def test_validate_prints_every_error_and_exits_1(make_data_folder, capsys):
    data = make_data_folder(sizes=[(24, 24)] * 13)
    for record in data.records[:25]:
        record["scores"]["removal_score"] = math.nan
    assert main(["validate", str(data.write()), "--use_human_scores"]) == 1
    out = capsys.readouterr().out
    assert out.count("field 'scores.removal_score': NaN") == 25
    assert "25 errors" in out
    assert ["records", "1"] in [line.split() for line in out.splitlines()]


def test_validate_of_a_data_set_without_records_exits_1(make_data_folder, capsys):
    data = make_data_folder(results=1)
    assert main(["validate", str(data.write([])), "--no-need-result"]) == 1
    assert "no records" in capsys.readouterr().out


def test_validate_of_a_missing_file_exits_1(tmp_path, capsys):
    assert main(["validate", str(tmp_path / "none.json")]) == 1
    assert "no such file or folder" in capsys.readouterr().err


def test_validate_requires_results_unless_no_need_result_is_set(make_data_folder):
    data = make_data_folder(results=1)
    del data.records[0]["result"]
    path = str(data.write())
    assert main(["validate", path]) == 1
    assert main(["validate", path, "--no_need_result"]) == 0


def test_unknown_flags_are_refused(make_data_folder):
    with pytest.raises(SystemExit) as caught:
        main(["validate", str(make_data_folder().write()), "--use_humane_scores"])
    assert caught.value.code == 2


def test_synth_writes_a_valid_data_set(tmp_path, capsys):
    folder = tmp_path / "made"
    assert main(["synth", str(folder), "--scenes", "2", "--size", "32", "--mix", "no_clean", "--candidates", "3"]) == 0
    assert "2 scenes written" in capsys.readouterr().out
    assert main(["validate", str(folder / "labeled_dict.json"), "--use_human_scores"]) == 0
    assert main(["validate", str(folder / "labeled_tensor.json"), "--use_human_scores", "--score_format=tensor"]) == 0
    assert main(["validate", str(folder / "triplets.json")]) == 0
    assert len(load_records(folder / "labeled_dict.json", use_human_scores=True)) == 6
    assert len(load_records(folder)) == 2


def test_synth_refuses_a_folder_with_other_files(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["synth", str(tmp_path), "--scenes", "1", "--size", "32"]) == 1
    assert "error: " in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_synth_does_not_replace_an_edited_file_of_its_data_set(tmp_path, capsys):
    folder = tmp_path / "made"
    command = ["synth", str(folder), "--scenes", "1", "--size", "32"]
    assert main(command) == main(command) == 0
    (folder / "labeled_dict.json").write_text("[]")
    assert main(command) == 1
    assert "labeled_dict.json differs from the file that would replace it" in capsys.readouterr().err
    assert (folder / "labeled_dict.json").read_text() == "[]"
