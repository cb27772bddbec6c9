"""Builds the settings of objective, rollouts and step, and the initial train state, from the configuration."""

from dataclasses import replace

import optax

from ra_jax.config.settings import TrainConfig
from ra_jax.models.fill_model import Weights
from ra_jax.rewards.custom import Reward
from ra_jax.rl.policy import PolicySettings
from ra_jax.rl.strength import PolicyStrength
from ra_jax.training.step.settings import ObjectiveSettings, RolloutSettings, StepSettings
from ra_jax.training.step.state import TrainState, init_state

INITIAL_TEMPERATURE = 0.1  # initial τ with `--policy_temperature auto`


def objective_settings(config: TrainConfig) -> ObjectiveSettings:
    """Build the settings of the loss that the run's steps minimize."""
    losses = config.losses
    return ObjectiveSettings(
        guidance_scale=config.model.guidance_scale,
        base_guidance_scale=(
            config.model.guidance_scale if losses.base_guidance_scale is None else losses.base_guidance_scale
        ),
        loss_region=losses.loss_region,
        base_loss_weight=losses.base_loss_weight,
        policy_loss_weight=losses.policy_loss_weight,
        diversity_loss_weight=losses.diversity_loss_weight,
        kl_weight=config.grpo.kl_weight,
        norm_guard_weight=config.grpo.norm_guard_weight,
        policy=policy_settings(config) if config.uses_policy else None,
        sequential_timesteps=config.model.gradient_checkpointing == "points",
        dropout=config.experts.use_lora and config.experts.lora_dropout > 0,
        routing_decay=config.experts.routing_mean_decay,
        routing_specialization=config.experts.routing_specialization,
    )


def policy_settings(config: TrainConfig) -> PolicySettings:
    """Build the settings of the policy estimator."""
    grpo = config.grpo
    return PolicySettings(
        estimator=grpo.estimator,
        clip_range=grpo.clip_range,
        num_pairs=grpo.num_policy_timesteps,
        time_fraction=grpo.policy_timestep_fraction,
        anchor_rest=(
            grpo.estimator == "contrast" and grpo.policy_timestep_fraction < 1 and config.losses.base_loss_weight == 0
        ),
        pull_temperature=INITIAL_TEMPERATURE if grpo.policy_temperature == "auto" else None,
        noise_level=config.rollouts.sde_noise_level,
        sde_clip_range=grpo.sde_clip_range,
        nft_beta=grpo.nft_beta,
        nft_about=grpo.nft_about,
    )


def rollout_settings(config: TrainConfig, rewards: tuple[Reward, ...]) -> RolloutSettings | None:
    """Build the settings of the rollouts; None outside of automatic mode, since only that mode has rollouts."""
    if config.mode != "automatic":
        return None
    rollouts = config.rollouts
    return RolloutSettings(
        rewards=rewards,
        num_generations=rollouts.num_generations,
        num_steps=rollouts.rollout_steps,
        decode_batch_size=rollouts.decode_batch_size,
        num_noisy_steps=rollouts.sde_window if config.grpo.estimator == "sde" else 0,
        noise_level=rollouts.sde_noise_level,
        drop_negative=rollouts.drops_negative(config.grpo.estimator),
        sample_experts=config.experts.routing == "sample",
    )


def step_settings(config: TrainConfig, rewards: tuple[Reward, ...]) -> StepSettings:
    """Build the settings of everything that a step does besides its loss.

    Args:
        config: the run's configuration.
        rewards: the rewards of automatic mode; empty in the other modes.
    """
    return StepSettings(
        num_updates=config.updates,
        sync_steps=0 if config.mode == "automatic" else config.grpo.policy_sync_steps,
        adapt_temperature=config.adapts_temperature,
        ema_decay=config.optimization.ema_decay,
        drift_interval=config.logging.log_freq,
        rollouts=rollout_settings(config, rewards),
    )


def initial_state(
    config: TrainConfig, optimizer: optax.GradientTransformation, trainable: Weights, strength: PolicyStrength | None
) -> TrainState:
    """Build the train state before step 0.

    Args:
        config: the run's configuration.
        optimizer: the optimizer.
        trainable: the initial trainable weights. They may be donated.
        strength: weights of the policy loss; None unless the estimator is contrast.
    """
    temperature = config.grpo.policy_temperature
    state = init_state(
        trainable,
        optimizer,
        seed=config.run.seed,
        num_experts=config.experts.num_experts if config.experts.use_lora else 0,
        temperature=INITIAL_TEMPERATURE if temperature == "auto" else temperature,
        with_old_params=config.uses_policy and config.mode == "human",
        with_ema=config.optimization.ema_decay > 0,
    )
    return replace(state, strength=strength)
