"""Static settings of the train step: objective, rollouts, and the updates around them.

`ra_jax.training.build` creates them from the configuration.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ra_jax.rewards.custom import Reward
from ra_jax.rl.policy import PolicySettings


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """Weights and options of the loss.

    Attributes:
        guidance_scale: embedded guidance of every velocity.
        loss_region: the region Ω, one of `flow.regions.LOSS_REGIONS`.
        base_loss_weight: w_base.
        policy_loss_weight: w_policy.
        diversity_loss_weight: w_diversity.
        kl_weight: w_kl.
        policy: None without a policy term, which needs rewards and `--enable_grpo_loss`.
        sequential_timesteps: compute the points of a log-probability one after another. This needs the memory of one
            point, at the cost of one more forward pass per point.
        dropout: whether the experts' dropout is on, in the base loss only.
        routing_decay: β, decay of the running mean of the gates in the diversity loss.
        routing_specialization: λ, weight of the mean entropy of the gates in the diversity loss.
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
    """How automatic mode generates and scores rollouts.

    Attributes:
        rewards: the S rewards.
        generations: G, rollouts per condition.
        steps: sampling steps of a rollout.
        decode_batch_size: images that the VAE decodes at once on each device.
        noisy_steps: W, steps of a rollout that add noise (0: ODE sampler).
        noise_level: η of the noisy steps.
        drop_negative: replace negative advantages by 0.
        sample_experts: each rollout draws one expert.
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
        """Weights of the rewards [S] float32, in the order of `rewards`."""
        return np.asarray([reward.weight for reward in self.rewards], np.float32)


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Settings of a step apart from its loss.

    Attributes:
        updates: updates of the weights per step.
        sync_steps: steps from one sync of the old policy to the next. 0: the state has no separate old policy, because
            the weights at the start of each step are the old policy.
        adapt_temperature: adapt τ to the clip fraction.
        ema_decay: decay of the averaged weights (0: off).
        drift_interval: steps from one measurement of drift to the next (0: never).
        rollouts: None if nothing is generated.
    """

    updates: int
    sync_steps: int
    adapt_temperature: bool
    ema_decay: float
    drift_interval: int
    rollouts: RolloutSettings | None

    def sync_due(self, step: jax.Array) -> jax.Array:
        """Return whether the old policy is synced at the start of step `step`."""
        return jnp.asarray(True) if not self.sync_steps else step % self.sync_steps == 0
