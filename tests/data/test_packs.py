import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import islice

import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ra_jax.data import packs
from ra_jax.data.__main__ import main
from ra_jax.data.batch import check_schema
from ra_jax.data.loader import Loader, LoaderOptions
from ra_jax.data.pack_writer import write_pack
from ra_jax.data.packs import Encoding
from ra_jax.data.panels import Panels
from ra_jax.data.records import check_records, load_records, scene_ids
from ra_jax.errors import DataError

SIZES = [(24, 24), (16, 32), (20, 20), (32, 16), (48, 48)]
BUCKETS = ((16, 16), (16, 32))


@pytest.fixture
def files(make_data_folder):
    """A data file of 15 records in 5 scenes: of the first, two have one reference and one another."""
    folder = make_data_folder(sizes=SIZES, results=3)
    for record, ref in zip(folder.records, ("input/s1.png", "gt/s0.png", "input/s1.png"), strict=False):
        record["ref"] = ref
    folder.records[4] |= {"id": "the fifth", "annotator": "A", "source": "other", "split": "train"}
    return folder.write()


class Doubles:
    """An encoder that makes arrays which can be told apart."""

    encoding = Encoding("of nothing", "16,16;16,32", "no")
    buckets = BUCKETS

    def condition(self, panels):
        sums = panels.source[::8, ::8].reshape(-1, 3) + 1.0 * panels.reference[::8, ::8].reshape(-1, 3)
        return {"masked_latents": np.float32(sums), "image_tokens": np.full((5, 2), panels.mask.sum(), jnp.bfloat16)}

    def result(self, panels):
        return {"result_latents": 2.0 * np.float32(panels.result[::8, ::8].reshape(-1, 3))}


@pytest.fixture
def pack(files, tmp_path):
    write_pack(load_records(files), tmp_path / "packed")
    return tmp_path / "packed"


def batches(records, count, **changes):
    how = {"batch_size": 4, "buckets": BUCKETS, "seed": 3, "multiple": 8, "augment_masks": True}
    how |= {"preprocess_reference": lambda image: np.asarray(image.resize((7, 7)), np.float64), "workers": 2}
    return list(islice(Loader(records, LoaderOptions(**how | changes)).iterate(), count))


def test_the_same_batches_as_from_files(files, pack):
    written, packed = load_records(files), load_records(pack, use_human_scores=True)
    np.testing.assert_array_equal(scene_ids(packed), scene_ids(written))
    for one, other in zip(packed, written, strict=True):
        for name in ("index", "id", "scores", "split", "annotator", "source", "size"):
            assert getattr(one, name) == getattr(other, name)
    for one, other in zip(batches(packed, 12), batches(written, 12), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_scores_are_taken_in_either_form(pack):
    for form in ("dict", "tensor"):
        records = load_records(pack, use_human_scores=True, score_format=form)
        assert records[1].scores == (0.5, 1.0, 0.25)


def test_records_are_checked_as_those_of_files(make_data_folder, tmp_path):
    folder = make_data_folder(results=2)
    del folder.records[1]["result"], folder.records[1]["scores"]
    write_pack(load_records(folder.write(), need_result=False), tmp_path / "packed")
    _, errors = check_records(tmp_path / "packed", use_human_scores=True)
    assert [(fault.record, fault.field) for fault in errors] == [(1, "result"), (1, "scores")]


def test_pictures_that_records_share_are_written_once(files, pack):
    found = [tfds.builder_from_directory(pack / part / packs.VERSION) for part in packs.PARTS]
    assert [part.info.splits["train"].num_examples for part in found] == [6, 15]
    conditions, records = (part.as_data_source("train") for part in found)
    with Image.open(files.parent / "input/s1.png") as photo:
        np.testing.assert_array_equal(conditions[2]["src"], photo)
    with Image.open(files.parent / "result/s1_1.png") as result:
        np.testing.assert_array_equal(records[4]["result"], result)
    assert [int(records[i]["condition"]) for i in range(6)] == [0, 1, 0, 2, 2, 2]
    assert "tensorflow" not in sys.modules


def test_latents_stand_beside_panels_of_the_buckets(files, tmp_path):
    written, encoder = load_records(files), Doubles()
    write_pack(written, tmp_path / "packed", encoder=encoder)
    packed = load_records(tmp_path / "packed")
    how = {"augment_masks": False, "latents": True}
    steps = zip(
        batches(packed, 6, **how),
        batches(packed, 6, **how, photos=False),
        batches(written, 6, augment_masks=False),
        strict=True,
    )
    for whole, latents_alone, panels in steps:
        check_schema(whole, {"photos", "results", "latents"})
        check_schema(latents_alone, {"results", "latents"})
        check_schema(panels, {"photos", "results", "redux"})
        for row in range(4):
            names = ("source", "mask", "reference", "result")
            record = Panels(*(panels[name][row] for name in names))
            for name, value in {**encoder.condition(record), **encoder.result(record)}.items():
                np.testing.assert_array_equal(whole[name][row], value, err_msg=name)
        for name in set(panels) & set(whole):
            np.testing.assert_array_equal(whole[name], panels[name], err_msg=name)
        for name, value in latents_alone.items():
            np.testing.assert_array_equal(value, whole[name], err_msg=name)


def test_latents_want_masks_as_they_are_and_a_pack_that_has_them(files, pack, tmp_path):
    write_pack(load_records(files), tmp_path / "encoded", encoder=Doubles())
    for data in (files, pack):
        with pytest.raises(ValueError, match="latents=True: expected records of a pack with latents"):
            batches(load_records(data), 1, augment_masks=False, latents=True)
    with pytest.raises(ValueError, match="latents=True with augment_masks=True"):
        batches(load_records(tmp_path / "encoded"), 1, latents=True)


@pytest.mark.parametrize("without", [0, 4])
def test_latents_want_results_in_all_records_or_none(files, tmp_path, without):
    records = load_records(files)
    records[without] = replace(records[without], result=None)
    with pytest.raises(DataError, match="1 of 15 records have no result"):
        write_pack(records, tmp_path / "packed", encoder=Doubles())
    assert not list(tmp_path.glob("packed*"))


def test_another_process_reads_bfloat16(files, tmp_path):
    write_pack(load_records(files), tmp_path / "packed", encoder=Doubles())
    command = [sys.executable, "-m", "ra_jax.data", "validate", tmp_path / "packed"]
    assert "no errors" in subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("harm", ["deleted", "cut short"])
def test_a_pack_that_is_not_whole(pack, harm):
    (shard,) = (pack / "records").rglob("*array_record*")
    if harm == "deleted":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 20])
    with pytest.raises(DataError, match=r"packed: files of the pack are missing or truncated .*: copy or write"):
        load_records(pack)


def test_by_name(pack):
    tfds.core.add_data_dir(pack.parent)
    assert load_records("tfds:packed")[4].id == "the fifth"
    with pytest.raises(DataError, match=r"tfds:unheard_of: tensorflow-datasets has no data set .*data pack"):
        load_records("tfds:unheard_of")


def test_large_sets_are_shards(files, tmp_path, monkeypatch):
    monkeypatch.setattr("ra_jax.data.pack_writer.SHARD_BYTES", 1)
    monkeypatch.setattr("ra_jax.data.pack_writer.ENCODE_BATCH", 2)
    write_pack(load_records(files), tmp_path / "packed")
    assert len(list((tmp_path / "packed/records").rglob("*array_record*"))) == 15
    one, other = (batches(load_records(data), 5) for data in (tmp_path / "packed", files))
    np.testing.assert_equal(one, other)


def test_another_set_is_no_pack(pack):
    with pytest.raises(DataError, match="is a tensorflow-datasets set, but not a pack: expected a folder"):
        load_records(pack / "records" / packs.VERSION)


def test_without_the_library(pack, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match=r'packs need tensorflow-datasets .*run pip install "ra_jax\[packs\]"'):
        load_records(pack)


def test_a_pack_that_was_broken_off_is_made_anew(files, tmp_path):
    records = load_records(files)

    def dies(some):
        yield from islice(some, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pack(records, tmp_path / "packed", watch=dies)
    assert not (tmp_path / "packed").exists()
    write_pack(records, tmp_path / "packed")
    assert len(load_records(tmp_path / "packed")) == 15
    assert not (tmp_path / "packed.partial").exists()


class TestCommand:
    def test_packs(self, files, tmp_path, capsys):
        assert main(["pack", str(files), str(tmp_path / "packed")]) == 0
        assert "15 records written to" in capsys.readouterr().out
        assert main(["validate", str(tmp_path / "packed")]) == 0
        assert "no errors" in capsys.readouterr().out

    def test_refusals(self, files, tmp_path, capsys):
        assert main(["pack", str(files), str(tmp_path / "not-a-name")]) == 1
        assert "'not-a-name' is not a valid name for a pack; expected lower-case" in capsys.readouterr().err
        (tmp_path / "taken").mkdir()
        assert main(["pack", str(files), str(tmp_path / "taken")]) == 1
        assert "already exists: choose another folder" in capsys.readouterr().err
        shutil.rmtree(files.parent / "gt")
        assert main(["pack", str(files), str(tmp_path / "faulty")]) == 1
        assert "record 1, field 'ref': no such file" in capsys.readouterr().err
        assert not (tmp_path / "faulty").exists()
