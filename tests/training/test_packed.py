"""Training on packs: with latents, steps equal those on the files, and their programs contain no encoder."""

from functools import partial
from itertools import islice

import jax
import numpy as np
import pytest

from ra_jax.data.pack_writer import write_pack
from ra_jax.data.records import load_records
from ra_jax.errors import ConfigError
from ra_jax.inference.encoder import PanelEncoder
from ra_jax.parallel.partitioner import abstract
from ra_jax.training.programs import CompiledSteps
from ra_jax.training.setup import set_up
from ra_jax.training.step.encode import encode

HUMAN = {"mask_augmentation": False, "policy_sync_steps": 2}


@pytest.fixture(scope="module")
def packed(scored_scenes, tiny_fill, tiny_redux, tmp_path_factory):
    """Packs with latents: one of the scored records and one of the triplets."""
    encoder = PanelEncoder(str(tiny_fill), str(tiny_redux), aspect_ratio_buckets="32,32", mixed_precision="no")
    folder = tmp_path_factory.mktemp("packs")
    for name in ("labeled_dict", "triplets"):
        write_pack(load_records(scored_scenes / f"{name}.json"), folder / name, encoder=encoder)
    return {name: str(folder / name) for name in ("labeled_dict", "triplets")}


def losses(setup, run_steps):
    return [(row["train_loss"], row["grad_norm"]) for row in run_steps(setup, 3)[1]]


def convolutions(setup) -> int:
    """Count the convolutions in the program of a step without rewards: the VAE and SigLIP have some."""
    batch = next(islice(setup.batches(), 1))
    programs: CompiledSteps = setup.compiled_steps()
    return programs._compile_plain(abstract((setup.state, setup.frozen, batch))).as_text().count(" convolution(")


def test_human_scored_steps(packed, make_config, run_steps):
    files = set_up(make_config(**HUMAN))
    pack = set_up(make_config(**HUMAN, train_json_path=packed["labeled_dict"], overwrite_output_dir=True))
    batch = next(islice(pack.loader.iterate(), 1))
    assert not {"source", "result", "reference", "redux_pixels"} & set(batch)
    np.testing.assert_allclose(losses(pack, run_steps), losses(files, run_steps), rtol=2e-5)
    assert convolutions(pack) == 0 < convolutions(files)


def test_steps_with_automatic_rewards_have_photos_and_equal_latents(packed, make_automatic_config):
    setups = [
        set_up(make_automatic_config(mask_augmentation=False, **flags))
        for flags in ({}, {"train_json_path": packed["triplets"]})
    ]
    results = []
    for setup in setups:
        batch = jax.tree.map(lambda x: x[0], next(islice(setup.batches(), 1)))
        encode_ = jax.jit(partial(encode, setup.objective.model, loss_region="balanced"))
        results.append((encode_(setup.frozen, batch), {name: batch[name] for name in ("source", "mask", "result")}))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), *results)


def test_batches_of_a_pack_without_latents_are_those_of_the_files(scored_scenes, make_config, tmp_path):
    """The batches are equal, including the augmented masks."""
    write_pack(load_records(scored_scenes / "labeled_dict.json"), tmp_path / "packed")
    loaders = [
        set_up(make_config(overwrite_output_dir=True, **flags)).loader
        for flags in ({}, {"train_json_path": str(tmp_path / "packed")})
    ]
    for one, other in zip(*(islice(loader.iterate(), 4) for loader in loaders), strict=True):
        np.testing.assert_equal(one, other)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"mask_augmentation": True}, "made with masks that are not augmented: give --no_mask_augmentation"),
        ({"aspect_ratio_buckets": "32,64"}, 'made with aspect_ratio_buckets "32,32", got "32,64": give --asp'),
        ({"mixed_precision": "bf16"}, 'made with mixed_precision "no", got "bf16": give --mixed_precision "no"'),
    ],
)
def test_latents_that_differ_from_those_of_training_are_refused(packed, make_config, flags, message):
    with pytest.raises(ConfigError, match=message):
        set_up(make_config(**HUMAN | {"train_json_path": packed["labeled_dict"]} | flags))


def test_latents_of_another_vae_are_refused(packed, make_config, make_tiny_fill):
    fill = str(make_tiny_fill(2))
    with pytest.raises(ConfigError, match=r"made with another VAE or Redux than those of .*: train with the models"):
        set_up(make_config(**HUMAN, train_json_path=packed["labeled_dict"], pretrained_model_name_or_path=fill))
