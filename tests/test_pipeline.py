"""`RemovalPipeline` on photos: which pixels change, what the images depend on, and which arguments are refused."""

import numpy as np
import pytest
from PIL import ExifTags, Image

from ra_jax.data.diptych import join, join_mask, reference_on_white, right_panel
from ra_jax.flow.schedule import FlowSchedule
from ra_jax.inference.blend import FEATHER
from ra_jax.inference.crop import SOFT_FLOOR
from ra_jax.models.siglip import preprocess
from ra_jax.pipeline import RemovalPipeline

HEIGHT, WIDTH = 72, 96
BOX = np.s_[30:42, 45:55]
PANEL = 32  # side in pixels of the panel that the photo's window is resized to


@pytest.fixture(scope="module")
def photo():
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def mask():
    painted = np.zeros((HEIGHT, WIDTH), np.uint8)
    painted[29:43, 44:56] = 100  # a soft edge
    painted[BOX] = 255
    painted[:, ::7] |= 9  # noise such as JPEG leaves
    return Image.fromarray(painted)


@pytest.fixture(scope="module")
def remove(tiny_experts, photo, mask):
    """remove(**changes): call a pipeline with experts for two images of the photo, with two steps."""
    pipe = RemovalPipeline(tiny_experts, FlowSchedule(), tiny_experts.trainable, panel_area=PANEL**2)
    arguments = {"image": photo, "mask": mask, "num_inference_steps": 2, "num_images": 2}
    return lambda **changes: pipe(**arguments | changes)


@pytest.fixture(scope="module")
def default_output(remove):
    return remove()


def to_arrays(output) -> np.ndarray:
    return np.stack([np.asarray(image) for image in output.images])


def draw_noise(*shape) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def test_pixels_outside_the_feathered_mask_keep_the_photos_values(default_output, photo, mask):
    painted = np.argwhere(np.asarray(mask) > SOFT_FLOOR)
    pixels = np.argwhere(np.ones((HEIGHT, WIDTH)))
    distance = np.sqrt(((pixels[:, None] - painted) ** 2).sum(-1)).min(1).reshape(HEIGHT, WIDTH)
    assert [image.size for image in default_output.images] == [photo.size] * 2
    for image in to_arrays(default_output):
        changed = (image != np.asarray(photo)).any(-1)
        assert not changed[distance >= FEATHER].any()
        assert changed[BOX].mean() > 0.9
        assert changed[(distance > 1) & (distance < FEATHER - 2)].mean() > 0.5  # the feathered edge


def test_equal_seeds_give_equal_images_and_other_seeds_others(default_output, remove):
    same, other = to_arrays(remove(seed=0)), to_arrays(remove(seed=1))
    np.testing.assert_array_equal(same, to_arrays(default_output))
    assert (other[0] != same[0]).any() and (other[0] != same[1]).any()
    assert (same[0] != same[1]).any()


def test_latents_replace_the_noise_of_the_seed(remove):
    tokens = 2 * (PANEL // 8) ** 2
    latents = draw_noise(2, tokens, 16)
    images = to_arrays(remove(latents=latents))
    np.testing.assert_array_equal(to_arrays(remove(latents=latents, seed=5)), images)
    # Each image depends only on its own noise.
    np.testing.assert_array_equal(to_arrays(remove(latents=latents[::-1])), images[::-1])
    with pytest.raises(ValueError, match=rf"latents of shape \(1, 5, 16\): expected \(2, {tokens}, 16\), .* 32 × 32"):
        remove(latents=draw_noise(1, 5, 16))


def test_gates_sum_to_one_and_depend_only_on_the_condition(default_output, remove):
    assert default_output.gates.shape == (2, 2)
    np.testing.assert_allclose(default_output.gates.sum(1), 1, rtol=1e-5)
    assert (default_output.gates >= 0.05).all()
    # Gates depend on the condition, not on the noise.
    np.testing.assert_array_equal(default_output.gates[0], default_output.gates[1])
    np.testing.assert_array_equal(remove(seed=1).gates, default_output.gates)


def test_the_reference_changes_the_images(default_output, remove):
    red = Image.new("RGB", (20, 30), "red")
    assert (to_arrays(remove(ref=red)) != to_arrays(default_output)).any()


def test_a_call_without_experts_equals_condition_denoise_and_decode(tiny_pipeline, tiny_redux):
    """A photo of the panel's size is edited as a whole. The edited panel replaces it inside the mask."""
    photo = np.random.default_rng(2).integers(0, 256, (PANEL, PANEL, 3), np.uint8)
    mask = np.zeros((PANEL, PANEL), np.uint8)
    mask[12:24, 8:20] = 255
    inside = mask > 127
    pipe = RemovalPipeline(tiny_pipeline._loaded, tiny_pipeline.schedule, tiny_pipeline._weights, PANEL**2)
    settings = {"num_inference_steps": 2, "guidance_scale": 7.0}
    latents = draw_noise(1, 32, 16)
    output = pipe(Image.fromarray(photo), Image.fromarray(mask), latents=latents, **settings)
    assert output.gates is None

    reference = reference_on_white(photo, inside)
    diptych = join(reference, photo)[None].astype(np.float32) / 255
    pixels = preprocess(tiny_redux)(Image.fromarray(reference))[None]
    context = np.concatenate([np.zeros((1, 8, 32), np.float32), tiny_pipeline.redux(pixels)], axis=1)
    cond = tiny_pipeline.condition(diptych, join_mask(inside)[None].astype(np.float32), context)
    edited = tiny_pipeline.decode(tiny_pipeline.denoise(latents, cond, **settings), PANEL, 2 * PANEL)
    panel = np.asarray(right_panel(edited))[0].clip(0, 1) * 255
    assert np.abs(np.asarray(output.images[0]) - panel)[inside].max() <= 1
    assert np.abs(photo - panel)[inside].mean() > 10


def test_photos_and_masks_of_other_modes_are_accepted(remove, photo, mask):
    output = remove(image=photo.convert("L"), mask=mask.point(lambda value: 255 * (value > 127)).convert("1"))
    assert {(image.mode, image.size) for image in output.images} == {("RGB", photo.size)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": Image.new("L", (WIDTH, 71))}, r"mask of size \(96, 71\) for an image of size \(96, 72\): expected"),
        ({"mask": Image.new("L", (WIDTH, HEIGHT), 127)}, "empty mask of 96 × 72 pixels: expected at least one pixel"),
        ({"num_images": 0}, "num_images=0: expected at least 1"),
        ({"num_inference_steps": 0}, "num_inference_steps=0: a sampler needs at least 1 step"),
    ],
    ids=["another size", "empty", "no images", "no steps"],
)
def test_invalid_arguments_are_refused(tiny_pipeline, photo, mask, change, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(**{"image": photo, "mask": mask} | change)


def test_invalid_dtypes_a_missing_redux_and_invalid_sizes_are_refused(tiny_fill, tiny_redux):
    with pytest.raises(ValueError, match="dtype='float16': expected one of bfloat16, float32"):
        RemovalPipeline.from_pretrained(tiny_fill, dtype="float16")
    pipe = RemovalPipeline.from_pretrained(tiny_fill, dtype="float32")
    with pytest.raises(ValueError, match=r"no Redux: load it with from_pretrained\(..., redux=FOLDER\)"):
        pipe.redux(np.zeros((1, 28, 28, 3), np.float32))
    with pytest.raises(ValueError, match="image of 20x32 pixels: both sides must be multiples of 8"):
        pipe.condition(np.zeros((1, 20, 32, 3), np.float32), np.zeros((1, 20, 32), np.float32))


def test_photos_are_turned_upright_and_transparent_mask_pixels_are_black(remove, default_output, photo, mask):
    """The photo is stored rotated, with an EXIF orientation. The mask is white, and opaque only at the object."""
    rotated = photo.transpose(Image.Transpose.ROTATE_90)
    rotated.getexif()[ExifTags.Base.Orientation] = 6  # readers rotate it clockwise by 90 degrees
    transparent_mask = Image.new("RGBA", mask.size, "white")
    transparent_mask.putalpha(mask)
    output = remove(image=rotated, mask=transparent_mask)
    np.testing.assert_array_equal(to_arrays(output), to_arrays(default_output))
