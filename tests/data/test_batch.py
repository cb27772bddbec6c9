"""The schema of a batch, and what is said of a batch that does not follow it."""

import ml_dtypes
import numpy as np
import pytest

from ra_jax.data.batch import FIELDS, LATENTS, LOADED, VALUES, batch_fields, check_schema, has_results

SIZES = {"B": 2, "h": 4, "w": 6, "s": 3, "N": 5, "C4": 8, "T": 7, "D": 9}
ALWAYS = {"mask", "group_id", "record_id", "epoch", "condition_weight"}


def zeros(parts, **changes):
    """A batch of zeros with these parts, some keys replaced."""
    fields = batch_fields(parts).items()
    return {name: np.zeros(field.sized(SIZES), field.dtypes[0]) for name, field in fields} | changes


@pytest.mark.parametrize(
    ("parts", "keys"),
    [
        (set(), set()),
        ({"photos", "redux"}, {"source", "reference", "redux_pixels"}),
        ({"photos", "redux", "results"}, {"source", "reference", "redux_pixels", "result"}),
        ({"latents", "results"}, {"masked_latents", "image_tokens", "result_latents"}),
        ({"photos", "latents"}, {"source", "reference", "masked_latents", "image_tokens"}),
        ({"training"}, {"sample_weight"}),
        ({"training", "rewards"}, set(VALUES)),
    ],
)
def test_the_keys_of_a_batch_follow_from_its_parts(parts, keys):
    assert set(batch_fields(parts)) == ALWAYS | keys
    letters = {side for name in keys | ALWAYS for side in FIELDS[name].shape if isinstance(side, str)}
    assert check_schema(zeros(parts), parts) == {letter: SIZES[letter] for letter in letters}


def test_latents_are_what_packs_hold():
    assert LATENTS == ("masked_latents", "image_tokens", "result_latents")
    assert not set(LOADED) & set(VALUES) and set(FIELDS) == set(LOADED) | set(VALUES)


def test_results_may_be_photos_or_latents():
    assert has_results(zeros({"photos", "results"})) and has_results(zeros({"latents", "results"}))
    assert not has_results(zeros({"photos", "latents"}))


PHOTOS = {"photos", "results"}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (zeros({"photos"}), r"parts \['photos', 'results'\]: missing keys \['result'\], unexpected keys \[\]"),
        (zeros(PHOTOS, reward=np.zeros(2)), r"missing keys \[\], unexpected keys \['reward'\]"),
        (zeros(PHOTOS, mask=np.zeros((2, 4, 6), bool)), "mask has dtype bool: expected uint8"),
        (zeros(PHOTOS, mask=np.zeros((2, 4), np.uint8)), r"mask has shape \(2, 4\): expected \('B', 'h', 'w'\)"),
        (zeros(PHOTOS, mask=np.zeros((2, 4, 5), np.uint8)), r"mask has shape \(2, 4, 5\): .*with sizes .*'w': 6"),
        (zeros(PHOTOS, source=np.zeros((2, 4, 6, 1), np.uint8)), r"source has shape .*expected \('B', 'h', 'w', 3\)"),
        (zeros(PHOTOS, epoch=np.zeros(3, np.int32)), r"epoch has shape \(3,\): expected \('B',\) with sizes .*'B': 2"),
    ],
)
def test_a_batch_that_does_not_follow_the_schema_is_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        check_schema(batch, PHOTOS)


def test_image_tokens_may_be_in_sixteen_bits():
    tokens = np.zeros((2, 7, 9), ml_dtypes.bfloat16)
    assert check_schema(zeros({"latents"}, image_tokens=tokens), {"latents"})["D"] == 9
    with pytest.raises(ValueError, match="image_tokens has dtype float16: expected float32 or bfloat16"):
        check_schema(zeros({"latents"}, image_tokens=tokens.astype(np.float16)), {"latents"})
