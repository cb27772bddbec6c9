"""From the configuration to the static settings of objective, rollouts and step, and to a step's arithmetic."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ra_jax.config import TrainConfig
from ra_jax.models.fill_model import Weights
from ra_jax.models.flux import FluxConfig
from ra_jax.rl.policy import PolicySettings
from ra_jax.rl.user_rewards import Reward
from ra_jax.training.checkpoints import named_leaves
from ra_jax.training.experts import expert_configs
from ra_jax.training.generation import RolloutSettings
from ra_jax.training.metrics import attention_flops, expert_flops, forward_flops, step_flops
from ra_jax.training.objective import ObjectiveSettings
from ra_jax.training.state import TrainState, init_state
from ra_jax.training.step import StepSettings

INITIAL_TEMPERATURE = 0.1  # where `--policy_temperature auto` starts


def objective_settings(config: TrainConfig) -> ObjectiveSettings:
    losses = config.losses
    return ObjectiveSettings(
        guidance_scale=config.model.guidance_scale,
        loss_region=losses.loss_region,
        base_loss_weight=losses.base_loss_weight,
        policy_loss_weight=losses.policy_loss_weight,
        diversity_loss_weight=losses.diversity_loss_weight,
        kl_weight=config.grpo.kl_weight,
        policy=policy_settings(config) if config.uses_policy else None,
        points_apart=config.model.gradient_checkpointing == "points",
        dropout=config.experts.use_lora and config.experts.lora_dropout > 0,
        routing_decay=config.experts.routing_mean_decay,
        routing_specialisation=config.experts.routing_specialisation,
    )


def policy_settings(config: TrainConfig) -> PolicySettings:
    grpo = config.grpo
    return PolicySettings(
        estimator=grpo.policy_estimator,
        clip_range=grpo.clip_range,
        pairs=grpo.num_policy_timesteps,
        fraction=grpo.policy_timestep_fraction,
        noise_level=config.rollouts.sde_noise_level,
        sde_clip_range=grpo.sde_clip_range,
        nft_beta=grpo.nft_beta,
    )


def rollout_settings(config: TrainConfig, rewards: tuple[Reward, ...]) -> RolloutSettings | None:
    """None where nothing is generated."""
    if config.mode != "automatic":
        return None
    rollouts = config.rollouts
    return RolloutSettings(
        rewards=rewards,
        generations=rollouts.num_generations,
        steps=rollouts.rollout_steps,
        decode_batch_size=rollouts.decode_batch_size,
        noisy_steps=rollouts.sde_window if config.grpo.policy_estimator == "sde" else 0,
        noise_level=rollouts.sde_noise_level,
        drop_negative=rollouts.drops_negative(config.grpo.policy_estimator),
        sample_experts=config.experts.routing == "sample",
    )


def step_settings(config: TrainConfig, rewards: tuple[Reward, ...] = ()) -> StepSettings:
    return StepSettings(
        updates=config.updates,
        sync_steps=0 if config.mode == "automatic" else config.grpo.policy_sync_steps,
        adapt_temperature=config.grpo.policy_temperature == "auto",
        ema_decay=config.optimization.ema_decay,
        drift_interval=config.logging.log_freq,
        rollouts=rollout_settings(config, rewards),
    )


def model_options(config: TrainConfig) -> dict[str, Any]:
    """What `load_fill_model`, and `abstract_fill_model` for shapes, are told beside the model's place or sizes."""
    lora, router = expert_configs(config.experts)
    return {
        "lora": lora,
        "router": router,
        "dtype": jnp.bfloat16 if config.model.mixed_precision == "bf16" else jnp.float32,
        "text_tokens": config.model.max_sequence_length,
        "remat": "full" if config.model.gradient_checkpointing == "points" else config.model.gradient_checkpointing,
        "train_base": not config.experts.use_lora,
        "int8": config.model.base_precision == "int8",
    }


def first_state(config: TrainConfig, optimizer: optax.GradientTransformation, trainable: Weights) -> TrainState:
    """The state before step 0 of training these weights."""
    temperature = config.grpo.policy_temperature
    return init_state(
        trainable,
        optimizer,
        seed=config.run.seed,
        num_experts=config.experts.num_experts if config.experts.use_lora else 0,
        temperature=INITIAL_TEMPERATURE if temperature == "auto" else temperature,
        with_snapshot=config.uses_policy and config.mode == "human",
        with_ema=config.optimization.ema_decay > 0,
    )


def flops_of_step(
    config: TrainConfig,
    flux: FluxConfig,
    trainable: Weights,
    multiple: int,
    image_tokens: int,
    batch: Mapping[str, jax.ShapeDtypeStruct | jax.Array],
    step: int,
) -> float:
    """Model FLOPs (`metrics.step_flops`) over all devices of step number `step` (from 0) on such a batch.

    trainable: its shapes; multiple: pixels a side of a token; image_tokens: of the reference; batch: arrays [..., h, w]
    of global batches.
    """
    height, width = batch["mask"].shape[-2:]
    automatic, sde = config.mode == "automatic", config.grpo.policy_estimator == "sde"
    points = config.rollouts.sde_window if sde else config.grpo.num_policy_timesteps
    learns = config.uses_policy and (not automatic or config.rollouts.due(step))
    tokens = 2 * height * width // multiple**2, config.model.max_sequence_length + image_tokens
    experts = {name: x.shape for name, x in named_leaves(trainable["flux"]).items() if config.experts.use_lora}
    return step_flops(
        forward_flops(flux, *tokens),
        attention=attention_flops(flux, *tokens),
        experts=expert_flops(experts, *tokens),
        records=config.run.train_batch_size * config.run.gradient_accumulation_steps,
        updates=config.updates,
        members=config.rollouts.num_generations if automatic else 1,
        rollout_steps=config.rollouts.rollout_steps if automatic and config.rollouts.due(step) else 0,
        policy_points=points if learns else 0,
        old_policy_share=0.0 if automatic else 1.0 - 1.0 / config.grpo.policy_sync_steps,
        base_loss="result" in batch or "result_latents" in batch,
        kl=config.grpo.kl_weight > 0.0,
        full_fine_tuning=not config.experts.use_lora,
    )
