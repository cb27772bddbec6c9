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
from ra_jax.data.packs import LatentEncoding, PackedImage
from ra_jax.data.panels import Panels
from ra_jax.data.records import check_records, load_records, scene_ids
from ra_jax.data.split import photo_ids
from ra_jax.errors import DataError

SIZES = [(24, 24), (16, 32), (20, 20), (32, 16), (48, 48)]
BUCKETS = ((16, 16), (16, 32))


@pytest.fixture
def data_file(make_data_folder):
    """A data file of 15 records in 5 scenes. Two records of scene 0 share a reference, the third has another."""
    folder = make_data_folder(sizes=SIZES, results=3)
    for record, ref in zip(folder.records, ("input/s1.png", "gt/s0.png", "input/s1.png"), strict=False):
        record["ref"] = ref
    folder.records[4] |= {"id": "the fifth", "annotator": "A", "source": "other", "split": "train"}
    return folder.write()


class FakeEncoder:
    """An encoder whose arrays depend on the panels, so that rows can be distinguished."""

    encoding = LatentEncoding("of nothing", "16,16;16,32", "no")
    buckets = BUCKETS

    def condition(self, panels):
        sums = panels.source[::8, ::8].reshape(-1, 3) + 1.0 * panels.reference[::8, ::8].reshape(-1, 3)
        return {"masked_latents": np.float32(sums), "image_tokens": np.full((5, 2), panels.mask.sum(), jnp.bfloat16)}

    def result(self, panels):
        return {"result_latents": 2.0 * np.float32(panels.result[::8, ::8].reshape(-1, 3))}


@pytest.fixture
def pack(data_file, tmp_path):
    """The folder of a pack of `data_file`, without latents."""
    write_pack(load_records(data_file), tmp_path / "packed")
    return tmp_path / "packed"


def load_batches(records, count, **changes):
    options = {"batch_size": 4, "buckets": BUCKETS, "seed": 3, "multiple": 8, "augment_masks": True}
    options |= {"preprocess_reference": lambda image: np.asarray(image.resize((7, 7)), np.float64), "workers": 2}
    return list(islice(Loader(records, LoaderOptions(**options | changes)).iterate(), count))


def test_a_pack_gives_the_same_records_and_batches_as_its_files(data_file, pack):
    from_files, from_pack = load_records(data_file), load_records(pack, use_human_scores=True)
    np.testing.assert_array_equal(scene_ids(from_pack), scene_ids(from_files))
    for record, expected in zip(from_pack, from_files, strict=True):
        for name in ("index", "id", "scores", "split", "annotator", "source", "size"):
            assert getattr(record, name) == getattr(expected, name)
    for batch, expected in zip(load_batches(from_pack, 12), load_batches(from_files, 12), strict=True):
        assert batch.keys() == expected.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], expected[name], err_msg=name)


def test_scores_of_a_pack_are_loaded_with_either_score_format(pack):
    for score_format in ("dict", "tensor"):
        records = load_records(pack, use_human_scores=True, score_format=score_format)
        assert records[1].scores == (0.5, 1.0, 0.25)


def test_records_of_a_pack_are_checked_like_records_of_files(make_data_folder, tmp_path):
    folder = make_data_folder(results=2)
    del folder.records[1]["result"], folder.records[1]["scores"]
    write_pack(load_records(folder.write(), need_result=False), tmp_path / "packed")
    _, errors = check_records(tmp_path / "packed", use_human_scores=True)
    assert [(error.record, error.field) for error in errors] == [(1, "result"), (1, "scores")]


def test_images_that_records_share_are_written_once(data_file, pack):
    builders = [tfds.builder_from_directory(pack / part / packs.VERSION) for part in packs.PARTS]
    assert [builder.info.splits["train"].num_examples for builder in builders] == [6, 15]
    conditions, records = (builder.as_data_source("train") for builder in builders)
    with Image.open(data_file.parent / "input/s1.png") as photo:
        np.testing.assert_array_equal(conditions[2]["src"], photo)
    with Image.open(data_file.parent / "result/s1_1.png") as result:
        np.testing.assert_array_equal(records[4]["result"], result)
    assert [int(records[i]["condition"]) for i in range(6)] == [0, 1, 0, 2, 2, 2]
    assert "tensorflow" not in sys.modules


def test_a_pack_with_latents_gives_the_encoders_arrays_and_the_panels_of_the_files(data_file, tmp_path):
    from_files, encoder = load_records(data_file), FakeEncoder()
    write_pack(from_files, tmp_path / "packed", encoder=encoder)
    from_pack = load_records(tmp_path / "packed")
    options = {"augment_masks": False, "latents": True}
    batches = zip(
        load_batches(from_pack, 6, **options),
        load_batches(from_pack, 6, **options, photos=False),
        load_batches(from_files, 6, augment_masks=False),
        strict=True,
    )
    for batch, latents_batch, file_batch in batches:
        check_schema(batch, {"photos", "results", "latents"})
        check_schema(latents_batch, {"results", "latents"})
        check_schema(file_batch, {"photos", "results", "redux"})
        for row in range(4):
            names = ("source", "mask", "reference", "result")
            panels = Panels(*(file_batch[name][row] for name in names))
            for name, value in {**encoder.condition(panels), **encoder.result(panels)}.items():
                np.testing.assert_array_equal(batch[name][row], value, err_msg=name)
        for name in set(file_batch) & set(batch):
            np.testing.assert_array_equal(batch[name], file_batch[name], err_msg=name)
        for name, value in latents_batch.items():
            np.testing.assert_array_equal(value, batch[name], err_msg=name)


def test_photos_of_a_pack_have_the_ids_of_their_files(data_file, pack, tmp_path, monkeypatch):
    from_files = load_records(data_file)
    write_pack(from_files, tmp_path / "encoded", encoder=FakeEncoder())
    expected = photo_ids(from_files)
    assert len(set(expected)) == 5
    assert photo_ids(load_records(pack)) == photo_ids(load_records(tmp_path / "encoded")) == expected
    monkeypatch.setattr(PackedImage, "photo_id", None)  # as in packs that were written before these ids
    assert photo_ids(load_records(pack)) == expected


def test_latents_need_a_pack_with_latents_and_masks_without_augmentation(data_file, pack, tmp_path):
    write_pack(load_records(data_file), tmp_path / "encoded", encoder=FakeEncoder())
    for data in (data_file, pack):
        with pytest.raises(ValueError, match="latents=True: expected records of a pack with latents"):
            load_batches(load_records(data), 1, augment_masks=False, latents=True)
    with pytest.raises(ValueError, match="latents=True with augment_masks=True"):
        load_batches(load_records(tmp_path / "encoded"), 1, latents=True)


@pytest.mark.parametrize("index", [0, 4])
def test_a_pack_with_latents_needs_results_in_all_records_or_in_none(data_file, tmp_path, index):
    records = load_records(data_file)
    records[index] = replace(records[index], result=None)
    with pytest.raises(DataError, match="1 of 15 records have no result"):
        write_pack(records, tmp_path / "packed", encoder=FakeEncoder())
    assert not list(tmp_path.glob("packed*"))


def test_another_process_can_read_bfloat16_arrays(data_file, tmp_path):
    write_pack(load_records(data_file), tmp_path / "packed", encoder=FakeEncoder())
    command = [sys.executable, "-m", "ra_jax.data", "validate", tmp_path / "packed"]
    assert "no errors" in subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("damage", ["deleted", "cut short"])
def test_a_pack_with_missing_or_truncated_files_is_refused(pack, damage):
    (shard,) = (pack / "records").rglob("*array_record*")
    if damage == "deleted":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 20])
    with pytest.raises(DataError, match=r"packed: files of the pack are missing or truncated .*: copy or write"):
        load_records(pack)


def test_a_pack_can_be_loaded_by_its_name_in_tensorflow_datasets(pack):
    tfds.core.add_data_dir(pack.parent)
    assert load_records("tfds:packed")[4].id == "the fifth"
    with pytest.raises(DataError, match=r"tfds:unheard_of: tensorflow-datasets has no data set .*data pack"):
        load_records("tfds:unheard_of")


def test_a_large_pack_is_written_in_shards(data_file, tmp_path, monkeypatch):
    monkeypatch.setattr("ra_jax.data.pack_writer.SHARD_BYTES", 1)
    monkeypatch.setattr("ra_jax.data.pack_writer.EXAMPLES_PER_WRITE", 2)
    write_pack(load_records(data_file), tmp_path / "packed")
    assert len(list((tmp_path / "packed/records").rglob("*array_record*"))) == 15
    from_pack, from_files = (load_batches(load_records(data), 5) for data in (tmp_path / "packed", data_file))
    np.testing.assert_equal(from_pack, from_files)


def test_another_tensorflow_datasets_set_is_refused(pack):
    with pytest.raises(DataError, match="is a tensorflow-datasets set, but not a pack: expected a folder"):
        load_records(pack / "records" / packs.VERSION)


def test_a_pack_cannot_be_loaded_without_tensorflow_datasets(pack, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match=r'packs need tensorflow-datasets .*run pip install "ra_jax\[packs\]"'):
        load_records(pack)


def test_an_interrupted_pack_can_be_written_again(data_file, tmp_path):
    records = load_records(data_file)

    def interrupt_after_two(items):
        yield from islice(items, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pack(records, tmp_path / "packed", progress=interrupt_after_two)
    assert not (tmp_path / "packed").exists()
    write_pack(records, tmp_path / "packed")
    assert len(load_records(tmp_path / "packed")) == 15
    assert not (tmp_path / "packed.partial").exists()


class TestCommand:
    def test_pack_writes_a_valid_pack(self, data_file, tmp_path, capsys):
        assert main(["pack", str(data_file), str(tmp_path / "packed")]) == 0
        assert "15 records written to" in capsys.readouterr().out
        assert main(["validate", str(tmp_path / "packed")]) == 0
        assert "no errors" in capsys.readouterr().out

    def test_invalid_names_existing_folders_and_invalid_records_are_refused(self, data_file, tmp_path, capsys):
        assert main(["pack", str(data_file), str(tmp_path / "not-a-name")]) == 1
        assert "'not-a-name' is not a valid name for a pack; expected lower-case" in capsys.readouterr().err
        (tmp_path / "taken").mkdir()
        assert main(["pack", str(data_file), str(tmp_path / "taken")]) == 1
        assert "already exists: choose another folder" in capsys.readouterr().err
        shutil.rmtree(data_file.parent / "gt")
        assert main(["pack", str(data_file), str(tmp_path / "faulty")]) == 1
        assert "record 1, field 'ref': no such file" in capsys.readouterr().err
        assert not (tmp_path / "faulty").exists()
