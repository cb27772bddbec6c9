"""Model FLOPs of a training step, from which the reported TFLOP/s are computed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from ra_jax.config.settings import TrainConfig
from ra_jax.data.batch import has_results
from ra_jax.models.flops import ForwardCost, StepPasses, attention_flops, expert_flops, forward_flops, step_flops
from ra_jax.models.flux import FluxConfig
from ra_jax.parallel.partitioning import named_leaves
from ra_jax.training.build import objective_settings, policy_settings


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model that its FLOPs depend on.

    Attributes:
        flux: configuration of the transformer.
        trainable: trained parameters of the transformer, or their shapes.
        token_side: side of a token in pixels.
        image_tokens: number of tokens of the reference image.
    """

    flux: FluxConfig
    trainable: Any
    token_side: int
    image_tokens: int


def points_per_sample(config: TrainConfig) -> int:
    """Return the number of points (x_t, t) at which the policy loss evaluates a sample."""
    if config.grpo.estimator == "sde":
        return config.rollouts.sde_window
    return config.grpo.num_policy_timesteps + policy_settings(config).anchor_rest


def flops_from_config(
    config: TrainConfig, sizes: ModelSizes, batch: Mapping[str, jax.ShapeDtypeStruct | jax.Array], step: int
) -> float:
    """Compute `step_flops` for a step of a run, summed over all devices.

    Args:
        config: the run's configuration.
        sizes: the sizes of the model.
        batch: the global batch, or its shapes. Only the keys and the shape of `mask` [..., h, w] are read.
        step: number of the step, from 0.
    """
    height, width = batch["mask"].shape[-2:]
    automatic = config.mode == "automatic"
    has_policy_loss = config.uses_policy and (not automatic or config.rollouts.due(step))
    tokens = 2 * height * width // sizes.token_side**2, config.model.max_sequence_length + sizes.image_tokens
    experts = {name: x.shape for name, x in named_leaves(sizes.trainable).items() if config.experts.use_lora}
    cost = ForwardCost(
        base=forward_flops(sizes.flux, *tokens),
        attention=attention_flops(sizes.flux, *tokens),
        experts=expert_flops(experts, *tokens),
        full_fine_tuning=not config.experts.use_lora,
    )
    passes = StepPasses(
        records=config.run.train_batch_size * config.run.gradient_accumulation_steps,
        policy_passes=points_per_sample(config) if has_policy_loss else 0,
        reference=objective_settings(config).uses_reference,
        old_policy_share=0.0 if automatic else 1.0 - 1.0 / config.grpo.policy_sync_steps,
        updates=config.updates,
        samples=config.rollouts.num_generations if automatic else 1,
        rollout_steps=config.rollouts.rollout_steps if automatic and config.rollouts.due(step) else 0,
        base_loss=has_results(batch),
    )
    return step_flops(cost, passes)
