"""Parse `--reward_functions` into reward functions, including functions that the user wrote.

A spec names a registered reward (`smoothness`) or a function in a user's module (`my_rewards:sharpness`). Both forms
may end in `=weight`. A reward takes `RewardInputs` and returns an array [B] in [0, 1], higher for better images.

A function that uses jax.numpy becomes part of the compiled train step. A function that uses NumPy, PIL or other Python
code works too (see `check_reward`), but is slower: the device waits while the host copies and scores the images.
"""

import importlib
import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ra_jax.errors import RewardError
from ra_jax.rewards.registry import REWARDS, SCORES, RewardFunction, RewardInputs, default_rewards

log = logging.getLogger(__name__)


# Errors of a function that treats traced arrays as NumPy arrays: JAX's own errors, and AttributeError for attributes
# that only NumPy arrays have.
UNTRACEABLE = (TypeError, jax.errors.JAXIndexError, AttributeError)


@dataclass(frozen=True)
class Reward:
    """A reward and its weight.

    Attributes:
        name: name in the metrics.
        function: RewardInputs -> score s, [B] in [0, 1].
        weight: weight of 2s − 1 in the total reward.
    """

    name: str
    function: RewardFunction
    weight: float


def parse_rewards(specs: Sequence[str], weights: Sequence[float], has_target: bool) -> tuple[Reward, ...]:
    """Return the rewards that `specs` name, in the same order.

    A user's reward has the name of its function. Its module is searched in the working directory and among the
    installed packages.

    Args:
        specs: each `name` or `module:function`, with or without `=weight`. An empty sequence stands for removal,
            background and smoothness.
        weights: weights of removal, background and smoothness for specs without a weight. Other rewards without a
            weight get weight 1.
        has_target: whether the data have a ground truth. If not, removal and background are computed as
            `removal_without_target` and `background_without_target`, and keep their names.

    Raises:
        RewardError:
            if a name is unknown.
            if a module or function cannot be imported.
            if a weight is not a number of at least 0, or all weights are 0.
            if a reward needs a ground truth and the data have none.
            if a reward is named twice.
    """
    score_weights = dict(zip(SCORES, weights, strict=True))
    rewards: dict[str, Reward] = {}
    for spec in specs or SCORES:
        path, separator, weight_text = spec.partition("=")
        path = path.strip()
        function = _import_function(path) if ":" in path else _find_registered(path, has_target)
        name = path.rpartition(":")[2]
        weight = _parse_weight(spec, weight_text) if separator else float(score_weights.get(name, 1.0))
        duplicates = [other.name for other in rewards.values() if other.name == name or other.function is function]
        if duplicates:
            raise RewardError(
                f"reward {spec!r} is already given as {duplicates[0]!r}, with the same name or function: name each "
                "reward once"
            )
        rewards[name] = Reward(name, function, weight)
    if not any(reward.weight for reward in rewards.values()):
        raise RewardError(f"all rewards ({' '.join(rewards)}) have weight 0: expected at least one weight above 0")
    return tuple(rewards.values())


def _parse_weight(spec: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise RewardError(f"reward {spec!r} has weight {text!r}: expected a number of at least 0, as in smoothness=0.3")
    return weight


def _find_registered(name: str, has_target: bool) -> RewardFunction:
    if not has_target and name in SCORES:
        name = default_rewards(False)[SCORES.index(name)]
    if name not in REWARDS:
        raise RewardError(
            f"unknown reward {name!r}: expected one of {', '.join(REWARDS)}, or module:function for your own function"
        )
    if REWARDS[name].needs_target and not has_target:
        raise RewardError(
            f"reward {name!r} needs a ground truth, but the records have no result: remove it from --reward_functions, "
            "or train on records with results"
        )
    return REWARDS[name].function


def _import_function(path: str) -> RewardFunction:
    module_name, _, attribute = path.partition(":")
    if not (module_name and attribute):
        raise RewardError(f"reward {path!r}: expected module:function, as in my_rewards:sharpness")
    working_directory = os.getcwd()
    if working_directory not in sys.path:
        sys.path.insert(0, working_directory)  # `python -m` adds it, a console script does not
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:  # other exceptions are errors in the user's module; the traceback shows the line
        raise RewardError(
            f"reward {path!r}: cannot import module {module_name!r}: {_describe_error(error)}; searched the working "
            f"directory {working_directory} and the installed packages"
        ) from error
    function = getattr(module, attribute, None)
    if function is None:
        raise RewardError(f"reward {path!r}: module {module_name!r} has no function {attribute!r}")
    if not callable(function):
        kind = type(function).__name__
        raise RewardError(f"reward {path!r}: {attribute!r} in module {module_name!r} is of type {kind}, not a function")
    return function


def check_reward(reward: Reward, *shapes: RewardInputs) -> Reward:
    """Check that a reward returns floats of shape [B]. Returns the reward for the train step, with float32 scores.

    The function is traced. If it cannot be traced, it is called on gray images instead. If that call succeeds, the
    train step calls the function in Python through `jax.pure_callback`, also inside jit, scan and map. The function
    then receives NumPy arrays, and must be deterministic. This is slower (see the module docstring).

    Args:
        reward: the reward to check.
        *shapes: `RewardInputs` of jax.ShapeDtypeStruct, one for each bucket.

    Raises:
        RewardError: if the function raises an exception, or does not return a float array [B]. A function that runs in
            Python may also fail during a step. The step then ends with a `jax.errors.JaxRuntimeError` that contains
            the text of the RewardError.
    """
    try:
        outputs = [jax.eval_shape(partial(_call, reward, passthrough=UNTRACEABLE), inputs) for inputs in shapes]
    except UNTRACEABLE as trace_error:
        for inputs in shapes:
            _check_output(reward, _call(reward, _make_gray_inputs(inputs)), _batch_size(inputs))
        log.warning(
            "reward '%s' cannot be traced by JAX (%s): it runs in Python on the host in every step, which is slower",
            reward.name,
            _describe_error(trace_error).split("\n")[0],
        )
        return replace(reward, function=_make_host_function(reward))
    for inputs, output in zip(shapes, outputs, strict=True):
        _check_output(reward, output, _batch_size(inputs))
    return replace(reward, function=lambda inputs: jnp.asarray(reward.function(inputs), jnp.float32))


def build_rewards(
    specs: Sequence[str],
    weights: Sequence[float],
    panels: Sequence[tuple[int, int]],
    batch_size: int,
    *,
    has_target: bool,
) -> tuple[Reward, ...]:
    """Parse rewards (`parse_rewards`), and check each for batches of every panel size (height, width) in pixels.

    Raises RewardError for a reward that is unknown, raises an exception, or does not return numbers [B].
    """
    rewards, inputs = parse_rewards(specs, weights, has_target), []
    for height, width in panels:
        photo = jax.ShapeDtypeStruct((batch_size, height, width, 3), jnp.float32)
        truth = photo if has_target else None
        mask = jax.ShapeDtypeStruct(photo.shape[:-1], jnp.float32)
        inputs.append(RewardInputs(image=photo, source=photo, mask=mask, target=truth, target_decoded=truth))
    return tuple(check_reward(reward, *inputs) for reward in rewards)


def _batch_size(inputs: RewardInputs) -> int:
    return inputs.image.shape[0]


def _make_gray_inputs(shapes: RewardInputs) -> RewardInputs:
    """Return NumPy arrays of these shapes: images of value 0.5, and masks of the middle half of each side."""
    gray = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float32), shapes)
    mask = np.zeros(shapes.mask.shape, np.float32)
    height, width = mask.shape[1:]
    mask[:, height // 4 : height - height // 4, width // 4 : width - width // 4] = 1.0
    return replace(gray, mask=mask)


def _call(reward: Reward, inputs: RewardInputs, passthrough: tuple[type[Exception], ...] = ()) -> object:
    """Call the reward's function. Any exception that is not in `passthrough` is raised again as a RewardError."""
    try:
        return reward.function(inputs)
    except passthrough:
        raise
    except Exception as error:  # whatever type a user's function raises, it is raised again, with the reward's name
        # A compiled step keeps only the text of an exception in a callback, so that the text has to name the reward.
        raise RewardError(f"reward {reward.name!r} raised {_describe_error(error)}") from error


def _check_output(reward: Reward, output: object, batch_size: int) -> None:
    """Raise RewardError unless `output` is a float array of shape [batch_size]."""
    expected = f"expected a float array of shape ({batch_size},), one number in [0, 1] per image"
    if not (hasattr(output, "shape") and hasattr(output, "dtype")):
        raise RewardError(f"reward {reward.name!r} returned a {type(output).__name__}: {expected}")
    if output.shape != (batch_size,) or not jnp.issubdtype(output.dtype, jnp.floating):
        raise RewardError(f"reward {reward.name!r} returned {output.dtype} of shape {output.shape}: {expected}")


def _make_host_function(reward: Reward) -> RewardFunction:
    def call_python(inputs: RewardInputs) -> np.ndarray:
        inputs = jax.tree.map(np.array, inputs)  # copies, because the function may write into its arrays
        output = _call(reward, inputs)
        _check_output(reward, output, _batch_size(inputs))
        return np.asarray(output, np.float32)

    def call_on_host(inputs: RewardInputs) -> jax.Array:
        shape = jax.ShapeDtypeStruct((_batch_size(inputs),), jnp.float32)
        # sequential: under vmap the function still gets one batch [B, h, w, 3] per call.
        return jax.pure_callback(call_python, shape, inputs, vmap_method="sequential")

    return call_on_host


def _describe_error(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
