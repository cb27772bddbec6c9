"""From the command line's `--reward_functions` to functions, the user's own among them.

A spec names a registered reward (`smoothness`) or a function in a module of the user's (`my_rewards:sharpness`); either
may end in `=weight`. A reward takes `RewardInputs` and returns an array [B] in [0, 1], higher for better images.

Best is a function of jax.numpy: it becomes a part of the train step. One of NumPy, PIL, ... works too (`check_reward`),
but is slower: at every step the device waits while the images are copied to the host and Python scores them there.
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


# What a function meets that treats traced arrays as NumPy's: JAX's refusals, and attributes that only NumPy's have.
UNTRACEABLE = (TypeError, jax.errors.JAXIndexError, AttributeError)


@dataclass(frozen=True)
class Reward:
    """name: as metrics show it; function: RewardInputs -> [B] in [0, 1]; weight: of 2·function − 1 in the total."""

    name: str
    function: RewardFunction
    weight: float


def parse_rewards(specs: Sequence[str], weights: Sequence[float], has_target: bool) -> tuple[Reward, ...]:
    """The rewards that specs ask for, in their order.

    specs: `name`, `module:function`, either with `=weight`; none at all = removal, background and smoothness.
    weights: of these three where a spec gives none; other rewards weigh 1. has_target: the data have a ground truth;
    without one, removal and background are computed as `removal_without_target` and `background_without_target`, and
    keep their names. A user's reward is named after its function; modules are found in the working directory too.

    Raises:
        RewardError: an unknown name, a module or function that cannot be imported, a weight that is no number of at
            least 0, a reward that needs a ground truth where there is none, or the same one twice.
    """
    score_weights = dict(zip(SCORES, weights, strict=True))
    rewards: dict[str, Reward] = {}
    for spec in specs or SCORES:
        where, separator, weight = spec.partition("=")
        where = where.strip()
        function = _imported(where) if ":" in where else _registered(where, has_target)
        name = where.rpartition(":")[2]
        weight = _weight(spec, weight) if separator else float(score_weights.get(name, 1.0))
        same = [other.name for other in rewards.values() if other.name == name or other.function is function]
        if same:
            raise RewardError(f"reward {spec!r}: there is {same[0]!r} already; name each reward once")
        rewards[name] = Reward(name, function, weight)
    if not any(reward.weight for reward in rewards.values()):
        raise RewardError(f"rewards {' '.join(rewards)} all weigh 0: expected one that weighs more")
    return tuple(rewards.values())


def _weight(spec: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise RewardError(f"reward {spec!r}: weight {text!r}, expected a number of at least 0, as in smoothness=0.3")
    return weight


def _registered(name: str, has_target: bool) -> RewardFunction:
    if not has_target and name in SCORES:
        name = default_rewards(False)[SCORES.index(name)]
    if name not in REWARDS:
        raise RewardError(
            f"unknown reward {name!r}: expected one of {', '.join(REWARDS)}, or module:function for one of your own"
        )
    if REWARDS[name].needs_target and not has_target:
        raise RewardError(
            f"reward {name!r} needs a ground truth, and these data have none: leave it out, or train on records with "
            f"their result"
        )
    return REWARDS[name].function


def _imported(where: str) -> RewardFunction:
    module_name, _, attribute = where.partition(":")
    if not (module_name and attribute):
        raise RewardError(f"reward {where!r}: expected module:function, as in my_rewards:sharpness")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` has it; a console script has not
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:  # anything else is a fault in their module, and its traceback says where
        raise RewardError(
            f"reward {where!r}: cannot import module {module_name!r}: {_cause(error)}; looked in the working directory "
            f"{here} and the installed packages"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        found = "has no such attribute" if function is None else f"holds a {type(function).__name__} under that name"
        raise RewardError(f"reward {where!r}: expected a function {attribute!r} in {module_name!r}, which {found}")
    return function


def check_reward(reward: Reward, *shapes: RewardInputs) -> Reward:
    """The reward made ready for the train step: traced, and found to return floats of shape [B].

    shapes: `RewardInputs` of jax.ShapeDtypeStruct, those of every bucket. A function that cannot be traced is called on
    grey pictures; if that works it is no function of JAX, and runs in Python through `jax.pure_callback` from then on,
    under jit, scan and map as well (slower: see above). It is given NumPy arrays there, and must be deterministic. The
    reward that is returned gives float32.

    Raises:
        RewardError: the function raises, or returns anything but a float array [B]. At run time an untraceable function
            that does so ends the step in a `jax.errors.JaxRuntimeError` that holds this error's text.
    """
    try:
        returned = [jax.eval_shape(partial(_named_call, reward, passing=UNTRACEABLE), inputs) for inputs in shapes]
    except UNTRACEABLE as reason:
        for inputs in shapes:
            _checked(reward, _named_call(reward, _gray_inputs(inputs)), _batch(inputs))
        log.warning(
            "reward '%s' is no function of JAX (%s): it runs in Python on the host at every step, which is slower",
            reward.name,
            _cause(reason).split("\n")[0],
        )
        return replace(reward, function=_on_host(reward))
    for inputs, value in zip(shapes, returned, strict=True):
        _checked(reward, value, _batch(inputs))
    return replace(reward, function=lambda inputs: jnp.asarray(reward.function(inputs), jnp.float32))


def _batch(inputs: RewardInputs) -> int:
    return inputs.image.shape[0]


def _gray_inputs(shapes: RewardInputs) -> RewardInputs:
    """NumPy arrays of these shapes: mid-grey pictures, and masks of the middle quarter."""
    gray = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float32), shapes)
    mask = np.zeros(shapes.mask.shape, np.float32)
    height, width = mask.shape[1:]
    mask[:, height // 4 : height - height // 4, width // 4 : width - width // 4] = 1.0
    return replace(gray, mask=mask)


def _named_call(reward: Reward, inputs: RewardInputs, passing: tuple[type[Exception], ...] = ()) -> object:
    """What the function returns. Raises RewardError, with its error as the cause, where it raises any but `passing`."""
    try:
        return reward.function(inputs)
    except passing:
        raise
    except Exception as error:  # a user's own function may raise anything
        # Raised again under the reward's name: of what a callback raises, a compiled step passes on the text alone.
        raise RewardError(f"reward {reward.name!r} raised {_cause(error)}") from error


def _checked(reward: Reward, returned: object, batch: int) -> None:
    """Raise RewardError unless `returned` is a float array of shape [batch]."""
    expected = f"expected a float array of shape ({batch},), one number in [0, 1] an image"
    if not (hasattr(returned, "shape") and hasattr(returned, "dtype")):
        raise RewardError(f"reward {reward.name!r} returned a {type(returned).__name__}: {expected}")
    if returned.shape != (batch,) or not jnp.issubdtype(returned.dtype, jnp.floating):
        raise RewardError(f"reward {reward.name!r} returned {returned.dtype} of shape {returned.shape}: {expected}")


def _on_host(reward: Reward) -> RewardFunction:
    def call(inputs: RewardInputs) -> np.ndarray:
        inputs = jax.tree.map(np.array, inputs)  # copies, which the function may write into
        returned = _named_call(reward, inputs)
        _checked(reward, returned, _batch(inputs))
        return np.asarray(returned, np.float32)

    def hosted(inputs: RewardInputs) -> jax.Array:
        shape = jax.ShapeDtypeStruct((_batch(inputs),), jnp.float32)
        # sequential: under vmap the function still sees one batch [B, h, w, 3] at a time
        return jax.pure_callback(call, shape, inputs, vmap_method="sequential")

    return hosted


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
