"""The batches of each training mode match the schema."""

from types import SimpleNamespace

import numpy as np
import pytest

from ra_jax.aot.abstract_step import batch_shapes, read_geometry
from ra_jax.data.batch import COMPUTED_FIELDS, batch_fields, check_schema
from ra_jax.data.pack_writer import write_pack
from ra_jax.data.packs import LatentEncoding
from ra_jax.data.records import load_records
from ra_jax.errors import ConfigError
from ra_jax.interop.diffusers import encoders_fingerprint
from ra_jax.training.dataset import batch_parts, load_run_data, single_record_loader, training_loader

LOADED = SimpleNamespace(
    model=SimpleNamespace(size_multiple=8), preprocess=lambda image: np.zeros((28, 28, 3), np.float32)
)


def first_batch(config):
    """Return the first training batch of a run, and the parts that it must have."""
    data = load_run_data(config)
    rows = np.arange(config.run.train_batch_size)
    batch = next(training_loader(config, data, LOADED, rows).iterate())
    return batch, batch_parts(config, results=data.has_target, latents=data.latents)


@pytest.fixture(scope="module")
def standard(scored_scenes):
    off = dict.fromkeys(("use_grpo", "use_human_scores", "enable_grpo_rewards", "enable_grpo_loss"), False)
    return off | {"train_json_path": str(scored_scenes / "triplets.json")}


@pytest.fixture(scope="module")
def packed(scored_scenes, tiny_fill, tiny_redux, tmp_path_factory):
    """A pack of the triplets whose latents are zeros, with the metadata of training with "32,32" and float32."""
    encoding = LatentEncoding(encoders_fingerprint(str(tiny_fill), str(tiny_redux)), "32,32", "no")
    condition = {"masked_latents": np.zeros((32, 16), np.float32), "image_tokens": np.zeros((4, 32), np.float32)}
    encoder = SimpleNamespace(
        encoding=encoding,
        buckets=((32, 32),),
        condition=lambda panels: condition,
        result=lambda panels: {"result_latents": np.zeros((32, 16), np.float32)},
    )
    folder = tmp_path_factory.mktemp("packs") / "triplets"
    write_pack(load_records(scored_scenes / "triplets.json"), folder, encoder=encoder)
    return {"train_json_path": str(folder), "mask_augmentation": False}


def test_human_scored_batches(make_config):
    batch, parts = first_batch(make_config())
    assert parts == {"photos", "results", "redux", "training", "rewards"}
    assert check_schema(batch, parts) == {"B": 8, "h": 32, "w": 32, "s": 28}


def test_scores_without_rewards_only_weight_the_base_loss(make_config):
    batch, parts = first_batch(make_config(enable_grpo_rewards=False, enable_grpo_loss=False))
    assert parts == {"photos", "results", "redux", "training"}
    check_schema(batch, parts)


def test_standard_batches(make_config, standard):
    batch, parts = first_batch(make_config(**standard))
    assert parts == {"photos", "results", "redux", "training"}
    check_schema(batch, parts)


def test_automatic_batches(make_automatic_config, photo_flags):
    batch, parts = first_batch(make_automatic_config())
    assert parts == {"photos", "results", "redux", "judged", "training"}
    check_schema(batch, parts)
    batch, parts = first_batch(make_automatic_config(**photo_flags))
    assert parts == {"photos", "redux", "judged", "training"}
    check_schema(batch, parts)


def test_batches_of_a_pack_with_latents(make_config, make_automatic_config, standard, packed):
    batch, parts = first_batch(make_config(**standard | packed))
    assert parts == {"results", "latents", "training"}
    sizes = check_schema(batch, parts)
    assert {letter: sizes[letter] for letter in ("N", "C4", "T", "D")} == {"N": 32, "C4": 16, "T": 4, "D": 32}
    batch, parts = first_batch(make_automatic_config(**packed))  # rewards need the photos
    assert parts == {"photos", "results", "latents", "judged", "training"}
    check_schema(batch, parts)


def test_batches_outside_of_steps(make_config):
    config = make_config()
    batch = next(single_record_loader(config, load_run_data(config).held_out, LOADED).iterate())
    check_schema(batch, {"photos", "results", "redux"})


@pytest.mark.parametrize("flags", [{}, {"enable_grpo_rewards": False, "enable_grpo_loss": False}])
def test_values_of_records_are_those_of_the_schema(make_config, flags):
    config = make_config(**flags)
    data, parts = load_run_data(config), batch_parts(config, results=True, latents=False)
    assert data.values.keys() == batch_fields(parts).keys() & COMPUTED_FIELDS.keys()
    for name, values in data.values.items():
        assert str(values.dtype) in COMPUTED_FIELDS[name].dtypes
        assert values.shape == COMPUTED_FIELDS[name].shape_for({"B": len(data.records)})


def test_batch_shapes_of_ahead_of_time_compilation_are_those_of_the_loader(make_config):
    config = make_config(gradient_accumulation_steps=1)
    batch, _ = first_batch(config)
    shapes = {name: (x.shape, x.dtype) for name, x in batch_shapes(config, read_geometry(config)).items()}
    assert shapes == {name: ((1, *array.shape), array.dtype) for name, array in batch.items()}


def test_a_few_photos_cannot_be_held_out(make_config, caplog):
    load_run_data(make_config(validation_steps=1))
    assert "no photo is held out (6 photos, validation_split = 0.1)" in caplog.text
    assert "give --val_json_path, or at least 10 photos" in caplog.text
    with pytest.raises(ConfigError, match=r"patience = 2: .*no photo is held out \(6 photos.*or remove --patience"):
        load_run_data(make_config(validation_steps=1, patience=2))


def test_advice_without_a_split_names_it(make_config, caplog):
    load_run_data(make_config(validation_steps=1, validation_split=0.0))
    assert "give --val_json_path or --validation_split, or at least 10 photos" in caplog.text


def test_held_out_photos_that_are_trained_on_are_named(make_config, scored_scenes, caplog):
    path = scored_scenes / "triplets.json"  # the same photos in another file
    load_run_data(make_config(val_json_path=str(path), validation_steps=1))
    assert f"6 of 6 photos of {path} are also trained on" in caplog.text
