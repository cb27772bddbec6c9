"""Tests `--reward_functions`: specs, user functions with and without JAX, and all errors."""

import logging
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ra_jax.errors import RewardError
from ra_jax.rewards.custom import Reward, check_reward, parse_rewards
from ra_jax.rewards.registry import REWARDS, RewardInputs

WEIGHTS = (0.5, 0.2, 0.1)
BATCH, SIZE = 3, 16

MODULE = """
import numpy as np

def brightness(inputs):
    return inputs.image.mean((1, 2, 3))

def removal(inputs):
    return 1 - inputs.image.mean((1, 2, 3))

constant = 3
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Create a user's module in the working directory, and return its name."""
    (tmp_path / "users_own.py").write_text(MODULE)
    (tmp_path / "users_broken.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    yield "users_own"
    for name in ("users_own", "users_broken"):
        sys.modules.pop(name, None)


def input_shapes(batch=BATCH):
    image, mask = (jax.ShapeDtypeStruct((batch, SIZE, SIZE, *c), jnp.float32) for c in ((3,), ()))
    return RewardInputs(image, image, mask, image)


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    image, source, target = rng.uniform(size=(3, BATCH, SIZE, SIZE, 3)).astype(np.float32)
    return RewardInputs(image, source, (image[..., 0] > 0.5).astype(np.float32), target)


def check(function, name="mine"):
    return check_reward(Reward(name, function, 1.0), input_shapes())


def summarize(rewards):
    return [(reward.name, reward.function, reward.weight) for reward in rewards]


def test_without_specs_the_rewards_are_the_three_scores_with_their_weights():
    scores = [("removal", 0.5), ("background", 0.2), ("smoothness", 0.1)]
    assert summarize(parse_rewards([], WEIGHTS, True)) == [(name, REWARDS[name].function, w) for name, w in scores]


def test_scores_without_a_ground_truth_have_the_same_names():
    functions = [REWARDS[f"{name}_without_target"].function for name in ("removal", "background")]
    expected = [("removal", functions[0], 0.5), ("background", functions[1], 0.2)]
    assert summarize(parse_rewards([], WEIGHTS, False))[:2] == expected
    assert summarize(parse_rewards(["background", "removal"], WEIGHTS, False)) == expected[::-1]


def test_specs_select_rewards_and_set_their_weights():
    specs = ["smoothness", "lpips=0.25", "removal = 2", "background_without_target"]
    expected = [("smoothness", 0.1), ("lpips", 0.25), ("removal", 2.0), ("background_without_target", 1.0)]
    assert summarize(parse_rewards(specs, WEIGHTS, True)) == [(name, REWARDS[name].function, w) for name, w in expected]


def test_user_functions_are_imported_from_the_working_directory(user_module, inputs):
    first, second = parse_rewards([f"{user_module}:brightness=0.7", f"{user_module}:removal"], WEIGHTS, False)
    assert (first.name, first.weight, second.name, second.weight) == ("brightness", 0.7, "removal", 0.5)
    np.testing.assert_allclose(first.function(inputs), inputs.image.mean((1, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize(
    ("specs", "has_target", "message"),
    [
        (["sharpness"], True, r"unknown reward 'sharpness': expected one of removal, background, .*or module:function"),
        (["lpips"], False, "reward 'lpips' needs a ground truth, but the records have no result"),
        (["removal=lots"], True, "reward 'removal=lots' has weight 'lots': expected a number of at least 0"),
        (["removal=-1"], True, "weight '-1': expected a number of at least 0"),
        (["removal=nan"], True, "weight 'nan': expected a number of at least 0"),
        (["removal="], True, "weight '': expected a number of at least 0"),
        (["removal", "removal=0.3"], True, "reward 'removal=0.3' is already given as 'removal'"),
        (["removal", "removal_without_target"], False, "reward 'removal_without_target' is already given as 'removal'"),
        (["users_own:removal", "removal"], True, "reward 'removal' is already given as 'removal'"),
        (["no_such_module:f"], True, "cannot import module 'no_such_module': ModuleNotFoundError"),
        (["users_broken:f"], True, "cannot import module 'users_broken': ModuleNotFoundError: .*no_such_package"),
        (["users_own:sharpness"], True, "module 'users_own' has no function 'sharpness'"),
        (["users_own:constant"], True, "'constant' in module 'users_own' is of type int, not a function"),
        (["users_own:"], True, "reward 'users_own:': expected module:function"),
    ],
)
def test_wrong_specs_are_refused(user_module, specs, has_target, message):
    with pytest.raises(RewardError, match=message):
        parse_rewards(specs, WEIGHTS, has_target)


def test_a_jax_function_is_traced_and_returns_float32(inputs):
    reward = check(lambda inputs: inputs.image.mean((1, 2, 3)).astype(jnp.bfloat16))
    program = str(jax.make_jaxpr(reward.function)(inputs))
    assert "callback" not in program
    assert jax.jit(reward.function)(inputs).dtype == jnp.float32


def numpy_median(inputs):
    image = np.asarray(inputs.image)
    assert isinstance(inputs.mask, np.ndarray)
    return np.median(image, axis=(1, 2, 3)).astype(np.float64)


def pillow_median(inputs):
    return np.array([np.median(Image.fromarray(np.uint8(255 * x))) for x in inputs.image]) / 255


def branch_on_mask(inputs):
    return np.array([1.0 if mask.mean() > 0.5 else 0.25 for mask in inputs.mask])


def write_into_input(inputs):
    inputs.image[:, 0] = 0
    return inputs.image.mean((1, 2, 3))


@pytest.mark.parametrize("function", [numpy_median, pillow_median, branch_on_mask, write_into_input])
def test_python_functions_run_under_jit_scan_map_and_vmap(inputs, function, caplog):
    with caplog.at_level(logging.WARNING):
        reward = check(function)
    assert "reward 'mine' cannot be traced by JAX" in caplog.text and "slower" in caplog.text
    expected = function(jax.tree.map(np.array, inputs))
    assert "pure_callback" in str(jax.make_jaxpr(reward.function)(inputs))
    np.testing.assert_allclose(jax.jit(reward.function)(inputs), expected, rtol=1e-6)
    two_inputs = jax.tree.map(lambda x: np.stack([x, x[::-1]]), inputs)
    expected_of_both = np.stack([expected, expected[::-1]])
    programs = {
        "scan": lambda xs: jax.lax.scan(lambda _, x: (None, reward.function(x)), None, xs)[1],
        "map": lambda xs: jax.lax.map(reward.function, xs),
        "vmap": jax.vmap(reward.function),
    }
    for program in programs.values():
        got = jax.jit(program)(two_inputs)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected_of_both, rtol=1e-6)


@pytest.mark.parametrize("convert", [jnp.asarray, np.asarray], ids=["jax", "numpy"])
@pytest.mark.parametrize(
    ("compute", "result"),
    [
        (lambda x: x.mean((1, 2)), r"float32 of shape \(3, 3\)"),
        (lambda x: x.mean(), r"float32 of shape \(\)"),
        (lambda x: x.mean((1, 2, 3)) > 0.5, r"bool of shape \(3,\)"),
        (lambda x: (x.mean((1, 2, 3)) > 0.5).astype(np.int32), r"int32 of shape \(3,\)"),
        (lambda x: "good", "a str"),
        (lambda x: None, "a NoneType"),
        (lambda x: list(x.mean((1, 2, 3))), "a list"),
    ],
)
def test_a_result_other_than_one_float_per_image_is_refused(convert, compute, result):
    message = rf"reward 'mine' returned {result}: expected a float array of shape \(3,\)"
    with pytest.raises(RewardError, match=message):
        check(lambda inputs: compute(convert(inputs.image)))


def test_an_error_in_a_reward_is_reported_with_the_name_and_the_cause():
    def broken(inputs):
        return inputs.image["red"]

    with pytest.raises(RewardError, match="reward 'mine' raised IndexError") as error:
        check(broken)
    assert isinstance(error.value.__cause__, IndexError)


def raise_key_error(inputs):
    if np.asarray(inputs.image).std() > 0:
        raise KeyError("no face found")
    return np.zeros(len(inputs.image), np.float32)


def return_another_shape(inputs):
    return np.zeros(len(inputs.image) + (np.asarray(inputs.image).std() > 0), np.float32)


@pytest.mark.parametrize(
    ("function", "cause"),
    [
        (raise_key_error, "raised KeyError: 'no face found'"),
        (return_another_shape, r"returned float32 of shape \(4,\)"),
    ],
)
def test_an_error_at_run_time_is_reported_with_the_name_of_the_reward(inputs, function, cause):
    reward = check(function)
    with pytest.raises(jax.errors.JaxRuntimeError, match=rf"(?s)RewardError: reward 'mine' {cause}"):
        jax.block_until_ready(jax.jit(reward.function)(inputs))


def test_gray_test_inputs_have_a_mask_and_only_the_optional_images_that_exist():
    calls = []

    def record_inputs(inputs):
        calls.append(inputs)
        return np.asarray(inputs.image).mean((1, 2, 3))

    check(record_inputs)
    gray = calls[-1]
    assert np.all(gray.image == 0.5) and np.all(gray.target == 0.5) and gray.target_decoded is None
    assert set(np.unique(gray.mask)) == {0, 1} and gray.mask[:, SIZE // 2, SIZE // 2].all()
    assert not gray.mask[:, 0].any()


def test_weights_that_are_all_0_are_refused():
    with pytest.raises(RewardError, match=r"all rewards \(smoothness\) have weight 0"):
        parse_rewards(["smoothness=0"], (0.4, 0.3, 0.3), True)


def test_a_function_that_cannot_be_traced_for_one_bucket_runs_on_the_host_for_all(caplog):
    """The order of the buckets does not matter."""

    def picky(inputs):
        if inputs.image.shape[2] > 32:
            return np.asarray(inputs.image).mean((1, 2, 3))
        return inputs.image.mean((1, 2, 3))

    def shapes_of_width(width):
        photo = jax.ShapeDtypeStruct((2, 32, width, 3), jnp.float32)
        return RewardInputs(image=photo, source=photo, mask=jax.ShapeDtypeStruct((2, 32, width), jnp.float32))

    for widths in ((32, 40), (40, 32)):
        checked_reward = check_reward(Reward("picky", picky, 1.0), *map(shapes_of_width, widths))
        for width in widths:
            image = jnp.full((2, 32, width, 3), 0.25)
            inputs = RewardInputs(image=image, source=image, mask=jnp.ones((2, 32, width)))
            np.testing.assert_allclose(jax.jit(checked_reward.function)(inputs), 0.25)
