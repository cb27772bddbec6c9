"""The schema of a batch, and the errors for batches that do not follow it."""

import ml_dtypes
import numpy as np
import pytest

from ra_jax.data.batch import (
    COMPUTED_FIELDS,
    FIELDS,
    LATENT_KEYS,
    LOADED_FIELDS,
    batch_fields,
    check_schema,
    has_results,
)

SIZES = {"B": 2, "h": 4, "w": 6, "s": 3, "N": 5, "C4": 8, "T": 7, "D": 9}
COMMON_KEYS = {"mask", "group_id", "record_id", "epoch", "condition_weight"}


def make_batch(parts, **changes):
    """Return a batch of zeros with these parts. `changes` replace or add keys."""
    fields = batch_fields(parts).items()
    return {name: np.zeros(field.shape_for(SIZES), field.dtypes[0]) for name, field in fields} | changes


@pytest.mark.parametrize(
    ("parts", "keys"),
    [
        (set(), set()),
        ({"photos", "redux"}, {"source", "reference", "redux_pixels"}),
        ({"photos", "redux", "results"}, {"source", "reference", "redux_pixels", "result"}),
        ({"latents", "results"}, {"masked_latents", "image_tokens", "result_latents"}),
        ({"photos", "latents"}, {"source", "reference", "masked_latents", "image_tokens"}),
        ({"training"}, {"sample_weight"}),
        ({"training", "rewards"}, set(COMPUTED_FIELDS)),
    ],
)
def test_parts_decide_the_keys_of_a_batch(parts, keys):
    assert set(batch_fields(parts)) == COMMON_KEYS | keys
    letters = {side for name in keys | COMMON_KEYS for side in FIELDS[name].shape if isinstance(side, str)}
    assert check_schema(make_batch(parts), parts) == {letter: SIZES[letter] for letter in letters}


def test_every_field_is_either_loaded_or_a_value_and_three_fields_are_latents():
    assert LATENT_KEYS == ("masked_latents", "image_tokens", "result_latents")
    assert not set(LOADED_FIELDS) & set(COMPUTED_FIELDS) and set(FIELDS) == set(LOADED_FIELDS) | set(COMPUTED_FIELDS)


def test_a_batch_has_results_if_it_has_result_images_or_result_latents():
    assert has_results(make_batch({"photos", "results"})) and has_results(make_batch({"latents", "results"}))
    assert not has_results(make_batch({"photos", "latents"}))


PARTS = {"photos", "results"}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (make_batch({"photos"}), r"parts \['photos', 'results'\]: missing keys \['result'\], unexpected keys \[\]"),
        (make_batch(PARTS, reward=np.zeros(2)), r"missing keys \[\], unexpected keys \['reward'\]"),
        (make_batch(PARTS, mask=np.zeros((2, 4, 6), bool)), "mask has dtype bool: expected uint8"),
        (make_batch(PARTS, mask=np.zeros((2, 4), np.uint8)), r"mask has shape \(2, 4\): expected \('B', 'h', 'w'\)"),
        (make_batch(PARTS, mask=np.zeros((2, 4, 5), np.uint8)), r"mask has shape \(2, 4, 5\): .*with sizes .*'w': 6"),
        (
            make_batch(PARTS, source=np.zeros((2, 4, 6, 1), np.uint8)),
            r"source has shape .*expected \('B', 'h', 'w', 3\)",
        ),
        (
            make_batch(PARTS, epoch=np.zeros(3, np.int32)),
            r"epoch has shape \(3,\): expected \('B',\) with sizes .*'B': 2",
        ),
    ],
)
def test_a_batch_that_does_not_follow_the_schema_is_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        check_schema(batch, PARTS)


def test_image_tokens_may_be_bfloat16_but_not_float16():
    tokens = np.zeros((2, 7, 9), ml_dtypes.bfloat16)
    assert check_schema(make_batch({"latents"}, image_tokens=tokens), {"latents"})["D"] == 9
    with pytest.raises(ValueError, match="image_tokens has dtype float16: expected float32 or bfloat16"):
        check_schema(make_batch({"latents"}, image_tokens=tokens.astype(np.float16)), {"latents"})
