"""Automatic rewards: scores of a generated image, as pure functions of arrays; and from scores to one reward.

Each score s ∈ [0, 1] (removal, background, smoothness) is mapped to 2s − 1, weighed and summed.

`scripts/experiments/validate_rewards.py` measures every reward on photos: its rank correlation with the defect it is
there for, what the other defects take from it, and whether the truth comes out above other fillings of the hole.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps

import jax
import numpy as np

SCORES = ("removal", "background", "smoothness")


def total_reward(scores, weights):
    """Σ_i w_i·(2·s_i − 1) over the last axis; scores [..., n] in [0, 1] -> [...], in [−Σw, Σw]."""
    return (2.0 * scores - 1.0) @ np.asarray(weights, np.float32)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["image", "source", "mask", "target", "target_decoded"],
    meta_fields=[],
)
@dataclass(frozen=True)
class RewardInputs:
    """What a reward sees: the photo's panel of B generated images. Everything is float32 in [0, 1].

    image: generated, decoded, clipped [B, h, w, 3]; source: the photo [B, h, w, 3]; mask: [B, h, w], 1 = remove;
    target: the ground truth [B, h, w, 3], None where there is none; target_decoded: the ground truth after encoding
    and decoding, which is what a perfect generator shows of it; where None, `target` stands for it.
    """

    image: jax.Array
    source: jax.Array
    mask: jax.Array
    target: jax.Array | None = None
    target_decoded: jax.Array | None = None


RewardFunction = Callable[[RewardInputs], jax.Array]


@dataclass(frozen=True)
class RegisteredReward:
    """An entry of `REWARDS`. needs_target: it cannot be computed without a ground truth."""

    name: str
    function: RewardFunction
    needs_target: bool


REWARDS: dict[str, RegisteredReward] = {}


def register_reward(name: str, *, needs_target: bool) -> Callable[[RewardFunction], RewardFunction]:
    """Put a function RewardInputs -> [B] float32 in [0, 1] into `REWARDS`, under `name`.

    What is registered, and given back, raises ValueError where it needs a ground truth and gets none.

    Raises:
        ValueError: the name is taken.
    """
    if name in REWARDS:
        raise ValueError(f"reward {name!r} is registered already; choose another name")

    def register(function: RewardFunction) -> RewardFunction:
        @wraps(function)
        def checked(inputs: RewardInputs) -> jax.Array:
            if needs_target and inputs.target is None:
                raise ValueError(f"reward {name!r} needs a ground truth, but target is None")
            return function(inputs)

        REWARDS[name] = RegisteredReward(name, checked, needs_target)
        return checked

    return register


def default_rewards(has_target: bool) -> tuple[str, ...]:
    """Names in `REWARDS` of the three scores, in the order of `SCORES`, with or without a ground truth."""
    return SCORES if has_target else ("removal_without_target", "background_without_target", "smoothness")
