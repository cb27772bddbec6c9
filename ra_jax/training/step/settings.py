"""The static settings of a train step: what it optimizes, generates and keeps. Their values come from `build`."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ra_jax.rewards.custom import Reward
from ra_jax.rl.policy import PolicySettings


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """What a step optimizes: the weights and options of its loss.

    policy: None without a policy term (it needs rewards and `--enable_grpo_loss`); sequential_timesteps: the policy's
    points in time are computed one after another: memory of one point, at the price of one more forward pass of each.
    """

    guidance_scale: float
    loss_region: str
    base_loss_weight: float
    policy_loss_weight: float
    diversity_loss_weight: float
    kl_weight: float
    policy: PolicySettings | None
    sequential_timesteps: bool
    dropout: bool
    routing_decay: float
    routing_specialization: float


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """What automatic mode generates for a condition, and by which rewards it is scored.

    generations: G, rollouts of a condition; steps: of the sampler; decode_batch_size: images that the VAE decodes at
    once on a device; noisy_steps: steps of a rollout that add noise (0: an ODE's); noise_level: η; drop_negative:
    members below their group's mean have no advantage; sample_experts: each rollout draws one expert.
    """

    rewards: tuple[Reward, ...]
    generations: int
    steps: int
    decode_batch_size: int
    noisy_steps: int
    noise_level: float
    drop_negative: bool
    sample_experts: bool

    @property
    def reward_weights(self) -> np.ndarray:
        """The rewards' weights [S] float32, in their order."""
        return np.asarray([reward.weight for reward in self.rewards], np.float32)


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What a step does around its loss.

    updates: of the weights in a step; sync_steps: steps between renewals of the old policy (0: none is kept, since the
    weights that a step begins with are its old policy); ema_decay: 0 = off; drift_interval: steps between measurements
    of drift (0 = never); rollouts: None where nothing is generated.
    """

    updates: int
    sync_steps: int
    adapt_temperature: bool
    ema_decay: float
    drift_interval: int
    rollouts: RolloutSettings | None

    def sync_due(self, step: jax.Array) -> jax.Array:
        """Whether a step's weights become the old policy before it."""
        return jnp.asarray(True) if not self.sync_steps else step % self.sync_steps == 0
