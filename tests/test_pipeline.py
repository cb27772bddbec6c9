"""`RemovalPipeline` on photos: what changes, what may not, and what is refused."""

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
PANEL = 32  # pixels a side of the panel that the photo's window is resized to


@pytest.fixture(scope="module")
def photo():
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def mask():
    painted = np.zeros((HEIGHT, WIDTH), np.uint8)
    painted[29:43, 44:56] = 100  # a soft edge
    painted[BOX] = 255
    painted[:, ::7] |= 9  # and what JPEG leaves
    return Image.fromarray(painted)


@pytest.fixture(scope="module")
def remove(tiny_experts, photo, mask):
    """Two images of the photo by a pipeline with experts, in two steps."""
    pipe = RemovalPipeline(tiny_experts, FlowSchedule(), tiny_experts.trainable, panel_area=PANEL**2)
    usual = {"image": photo, "mask": mask, "num_inference_steps": 2, "num_images": 2}
    return lambda **how: pipe(**usual | how)


@pytest.fixture(scope="module")
def first(remove):
    return remove()


def arrays(output) -> np.ndarray:
    return np.stack([np.asarray(image) for image in output.images])


def noise(*shape) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def test_pixels_beyond_the_feathered_mask_are_the_photos_own(first, photo, mask):
    painted = np.argwhere(np.asarray(mask) > SOFT_FLOOR)
    pixels = np.argwhere(np.ones((HEIGHT, WIDTH)))
    distance = np.sqrt(((pixels[:, None] - painted) ** 2).sum(-1)).min(1).reshape(HEIGHT, WIDTH)
    assert [image.size for image in first.images] == [photo.size] * 2
    for image in arrays(first):
        changed = (image != np.asarray(photo)).any(-1)
        assert not changed[distance >= FEATHER].any()
        assert changed[BOX].mean() > 0.9
        assert changed[(distance > 1) & (distance < FEATHER - 2)].mean() > 0.5  # it is feathered


def test_a_seed_gives_the_same_images_and_another_others(first, remove):
    same, other = arrays(remove(seed=0)), arrays(remove(seed=1))
    np.testing.assert_array_equal(same, arrays(first))
    assert (other[0] != same[0]).any() and (other[0] != same[1]).any()
    assert (same[0] != same[1]).any()


def test_latents_take_the_place_of_the_seeds_noise(remove):
    tokens = 2 * (PANEL // 8) ** 2
    latents = noise(2, tokens, 16)
    given = arrays(remove(latents=latents))
    np.testing.assert_array_equal(arrays(remove(latents=latents, seed=5)), given)
    np.testing.assert_array_equal(arrays(remove(latents=latents[::-1])), given[::-1])  # one image, one noise
    with pytest.raises(ValueError, match=rf"latents of shape \(1, 5, 16\): expected \(2, {tokens}, 16\), .* 32 × 32"):
        remove(latents=noise(1, 5, 16))


def test_gates_are_the_experts_weights(first, remove):
    assert first.gates.shape == (2, 2)
    np.testing.assert_allclose(first.gates.sum(1), 1, rtol=1e-5)
    assert (first.gates >= 0.05).all()
    np.testing.assert_array_equal(first.gates[0], first.gates[1])  # of the condition alone, never of the noise
    np.testing.assert_array_equal(remove(seed=1).gates, first.gates)


def test_the_reference_counts(first, remove):
    red = Image.new("RGB", (20, 30), "red")
    assert (arrays(remove(ref=red)) != arrays(first)).any()


def test_without_experts_it_is_condition_denoise_and_decode_of_the_diptych(tiny_pipeline, tiny_redux):
    """A photo of the panel's size is edited whole, and inside the mask the panel replaces it."""
    photo = np.random.default_rng(2).integers(0, 256, (PANEL, PANEL, 3), np.uint8)
    mask = np.zeros((PANEL, PANEL), np.uint8)
    mask[12:24, 8:20] = 255
    inside = mask > 127
    pipe = RemovalPipeline(tiny_pipeline._loaded, tiny_pipeline.schedule, tiny_pipeline._weights, PANEL**2)
    settings = {"num_inference_steps": 2, "guidance_scale": 7.0}
    latents = noise(1, 32, 16)
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


def test_pictures_of_other_modes_are_taken(remove, photo, mask):
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
def test_faults_are_told(tiny_pipeline, photo, mask, change, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(**{"image": photo, "mask": mask} | change)


def test_faults_of_loading_are_told(tiny_fill, tiny_redux):
    with pytest.raises(ValueError, match="dtype='float16': expected one of bfloat16, float32"):
        RemovalPipeline.from_pretrained(tiny_fill, dtype="float16")
    pipe = RemovalPipeline.from_pretrained(tiny_fill, dtype="float32")
    with pytest.raises(ValueError, match=r"no Redux: load it with from_pretrained\(..., redux=FOLDER\)"):
        pipe.redux(np.zeros((1, 28, 28, 3), np.float32))
    with pytest.raises(ValueError, match="image of 20x32 pixels: both sides must be multiples of 8"):
        pipe.condition(np.zeros((1, 20, 32, 3), np.float32), np.zeros((1, 20, 32), np.float32))


def test_photos_are_taken_upright_and_masks_black_where_transparent(remove, first, photo, mask):
    """As the command does: a turned photo with its EXIF orientation, a mask whose object is its opaque part."""
    lying = photo.transpose(Image.Transpose.ROTATE_90)
    lying.getexif()[ExifTags.Base.Orientation] = 6  # to be turned clockwise by 90 degrees
    painted = Image.new("RGBA", mask.size, "white")
    painted.putalpha(mask)
    again = remove(image=lying, mask=painted)
    np.testing.assert_array_equal(arrays(again), arrays(first))
