"""Registry of automatic rewards, and the total reward of an image's scores.

A reward is a pure function of arrays that scores generated images with s ∈ [0, 1]. The total reward is the weighted sum
of 2s − 1 over the scores, by default removal, background and smoothness.

`scripts/experiments/validate_rewards.py` measures three properties of every reward on photos:

* the rank correlation of the reward with the defect that the reward should detect
* how much the other defects lower the reward
* whether the ground truth scores higher than other fillings of the hole
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps

import jax
import numpy as np

SCORES = ("removal", "background", "smoothness")


def total_reward(scores, weights):
    """Compute Σ_i w_i·(2·s_i − 1) over the last axis: scores [..., n] in [0, 1] -> [...] in [−Σw, Σw]."""
    return (2.0 * scores - 1.0) @ np.asarray(weights, np.float32)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["image", "source", "mask", "target", "target_decoded"],
    meta_fields=[],
)
@dataclass(frozen=True)
class RewardInputs:
    """Inputs of a reward for B generated images. All arrays are float32 in [0, 1] and show the right panel, the photo.

    Attributes:
        image: the generated images, decoded and clipped, [B, h, w, 3].
        source: the photos [B, h, w, 3].
        mask: [B, h, w], 1 = remove.
        target: the ground truth [B, h, w, 3]; None if the data have none.
        target_decoded: the ground truth after encoding and decoding by the VAE [B, h, w, 3], the best that a generator
            can reach. If None, `target` is used instead.
    """

    image: jax.Array
    source: jax.Array
    mask: jax.Array
    target: jax.Array | None = None
    target_decoded: jax.Array | None = None


RewardFunction = Callable[[RewardInputs], jax.Array]


@dataclass(frozen=True)
class RegisteredReward:
    """An entry of `REWARDS`.

    Attributes:
        name: key of the entry.
        function: RewardInputs -> [B] float32 in [0, 1].
        needs_target: whether the function needs a ground truth.
    """

    name: str
    function: RewardFunction
    needs_target: bool


REWARDS: dict[str, RegisteredReward] = {}


def register_reward(name: str, *, needs_target: bool) -> Callable[[RewardFunction], RewardFunction]:
    """Make a decorator that adds a function RewardInputs -> [B] float32 in [0, 1] to `REWARDS` under `name`.

    The decorated function raises ValueError if `needs_target` is true and its inputs have no ground truth.

    Raises:
        ValueError: if `name` is already registered.
    """
    if name in REWARDS:
        raise ValueError(f"reward {name!r} is already registered; choose another name")

    def register(function: RewardFunction) -> RewardFunction:
        @wraps(function)
        def checked_function(inputs: RewardInputs) -> jax.Array:
            if needs_target and inputs.target is None:
                raise ValueError(f"reward {name!r} needs a ground truth, but target is None")
            return function(inputs)

        REWARDS[name] = RegisteredReward(name, checked_function, needs_target)
        return checked_function

    return register


def default_rewards(has_target: bool) -> tuple[str, ...]:
    """Return the names of the rewards that compute the three `SCORES`, for data with or without a ground truth."""
    return SCORES if has_target else ("removal_without_target", "background_without_target", "smoothness")
