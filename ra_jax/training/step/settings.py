"""Static settings of the train step: its loss, its rollouts and its updates.

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
        guidance_scale: guidance scale that the network embeds.
        base_guidance_scale: the same for the base loss.
        loss_region: the region Ω, one of `flow.regions.LOSS_REGIONS`.
        base_loss_weight: w_base.
        policy_loss_weight: w_policy.
        diversity_loss_weight: w_diversity.
        kl_weight: w_kl.
        norm_guard_weight: w_norm.
        policy: settings of the policy term; None without this term. It needs rewards and `--enable_grpo_loss`.
        sequential_timesteps: whether the points (x_t, t) of a log-probability are computed one after another. This
            needs the memory of only one point, but one more forward pass per point.
        dropout: whether the experts' dropout is on, in the base loss only.
        routing_decay: β, decay of the running mean of the gates in the diversity loss.
        routing_specialization: λ, weight of the mean entropy of the gates in the diversity loss.
    """

    guidance_scale: float
    base_guidance_scale: float
    loss_region: str
    base_loss_weight: float
    policy_loss_weight: float
    diversity_loss_weight: float
    kl_weight: float
    norm_guard_weight: float
    policy: PolicySettings | None
    sequential_timesteps: bool
    dropout: bool
    routing_decay: float
    routing_specialization: float

    @property
    def uses_reference(self) -> bool:
        """Whether the loss depends on the velocity of the reference."""
        weights = self.kl_weight + self.norm_guard_weight
        return self.policy is not None and (self.policy.uses_reference or weights > 0)


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """How automatic mode generates and scores rollouts.

    Attributes:
        rewards: the S rewards.
        num_generations: G, rollouts per condition.
        num_steps: sampling steps of a rollout.
        decode_batch_size: largest number of images that the VAE decodes at once on each device.
        num_noisy_steps: W, steps of a rollout that add noise (0: ODE sampler).
        noise_level: η of the noisy steps.
        drop_negative: whether negative advantages are replaced by 0.
        sample_experts: whether each rollout draws one expert (`sample` routing).
    """

    rewards: tuple[Reward, ...]
    num_generations: int
    num_steps: int
    decode_batch_size: int
    num_noisy_steps: int
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
        num_updates: updates of the weights per step.
        sync_steps: steps from one sync of the old policy to the next. 0: the state has no separate old policy, because
            the weights at the start of each step are the old policy.
        adapt_temperature: whether τ is adapted to the clip fraction.
        ema_decay: decay of the averaged weights (0: off).
        drift_interval: steps from one measurement of drift to the next (0: never).
        rollouts: settings of the rollouts; None outside of automatic mode.
    """

    num_updates: int
    sync_steps: int
    adapt_temperature: bool
    ema_decay: float
    drift_interval: int
    rollouts: RolloutSettings | None

    def sync_due(self, step: jax.Array) -> jax.Array:
        """Return whether the old policy is synced at the start of step `step`."""
        return jnp.asarray(True) if not self.sync_steps else step % self.sync_steps == 0
