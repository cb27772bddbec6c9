import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ra_jax.data.diptych import join, join_mask, reference_on_white, right_panel

PHOTO = np.random.default_rng(0).integers(0, 255, (2, 4, 6, 3), np.uint8)
MASK = np.random.default_rng(1).integers(0, 2, (2, 4, 6), np.uint8)


@pytest.mark.parametrize("to_array", [np.asarray, jnp.asarray])
def test_join_puts_panels_side_by_side_and_right_panel_returns_the_right_one(to_array):
    photo, mask = to_array(PHOTO), to_array(MASK)
    joined = join(255 - photo, photo)
    assert joined.shape == (2, 4, 12, 3) and type(joined) is type(photo) and joined.dtype == np.uint8
    np.testing.assert_array_equal(joined[..., :6, :], 255 - PHOTO)
    np.testing.assert_array_equal(right_panel(joined), PHOTO)
    joined_mask = join_mask(mask)
    assert joined_mask.shape == (2, 4, 12) and not np.asarray(joined_mask)[..., :6].any()
    np.testing.assert_array_equal(right_panel(joined_mask, axis=-1), MASK)


@pytest.mark.parametrize("to_array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize(("dtype", "white"), [(np.uint8, 255), (np.float32, 1.0)])
def test_reference_shows_only_the_masked_object_on_white(to_array, dtype, white):
    photo = to_array(PHOTO.astype(dtype) if dtype == np.uint8 else (PHOTO / 255).astype(dtype))
    reference = reference_on_white(photo, to_array(MASK))
    assert reference.dtype == dtype and type(reference) is type(photo)
    inside = MASK.astype(bool)
    np.testing.assert_array_equal(np.asarray(reference)[inside], np.asarray(photo)[inside])
    assert (np.asarray(reference)[~inside] == white).all()


def test_images_without_batch_axis_are_accepted_under_jit():
    joined = jax.jit(lambda photo, mask: right_panel(join(reference_on_white(photo, mask), photo)))(PHOTO[0], MASK[0])
    np.testing.assert_array_equal(joined, PHOTO[0])


def test_arrays_of_wrong_shape_are_refused():
    with pytest.raises(ValueError, match="expected equal shapes"):
        join(PHOTO, PHOTO[:, :3])
    with pytest.raises(ValueError, match="mask has shape"):
        reference_on_white(PHOTO, MASK[0])
    with pytest.raises(ValueError, match="expected an even width"):
        right_panel(PHOTO[:, :, :5])
