"""Model FLOPs of a training step, by which speed is reported."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from ra_jax.config.settings import TrainConfig
from ra_jax.data.batch import has_results
from ra_jax.models.flux import FluxConfig
from ra_jax.parallel.partitioning import named_leaves


def attention_flops(config: FluxConfig, image_tokens: int, context_tokens: int) -> float:
    """FLOPs of q kᵀ and of the weights by v in one forward pass of one image: 4·S²·D a block."""
    blocks = config.num_layers + config.num_single_layers
    return 4.0 * (image_tokens + context_tokens) ** 2 * config.inner_dim * blocks


def forward_flops(config: FluxConfig, image_tokens: int, context_tokens: int) -> float:
    """FLOPs of the transformer's matmuls in one forward pass of one image (2 a multiply-add).

    Per token and block: double 2·(4 + 8)·D² (4D² attention, 8D² MLP), single 2·12·D²; and `attention_flops`.
    """
    d, s = config.inner_dim, image_tokens + context_tokens
    blocks = config.num_layers + config.num_single_layers
    embed = image_tokens * d * (config.in_channels + config.out_channels) + context_tokens * d * (
        config.joint_attention_dim
    )
    return 2.0 * (12.0 * d * d * s * blocks + embed) + attention_flops(config, image_tokens, context_tokens)


def expert_flops(experts: Mapping[str, Sequence[int]], image_tokens: int, context_tokens: int) -> float:
    """FLOPs of the experts' products in one forward pass of one image: 2 · tokens · in · out a matrix.

    experts: shapes [L, in, out] of their parameters by name ("transformer_blocks/attn/to_q/lora_a"), or nothing.
    """
    total = 0.0
    for name, shape in experts.items():
        if "norm" in name or "time_text_embed" in name:  # of the time's embedding
            tokens = 1
        elif "single" in name:
            tokens = image_tokens + context_tokens
        else:
            tokens = context_tokens if "context" in name or "add_" in name else image_tokens
        total += 2.0 * tokens * math.prod(shape)
    return total


@dataclass(frozen=True)
class ForwardCost:
    """FLOPs of one forward pass of one image.

    base: of the base (`forward_flops`); attention: a part of it (`attention_flops`); experts: of their products
    (`expert_flops`); full_fine_tuning: the whole transformer is trained, and there are no experts.
    """

    base: float
    attention: float
    experts: float = 0.0
    full_fine_tuning: bool = False

    @property
    def total(self) -> float:
        """Of base and experts."""
        return self.base + self.experts

    @property
    def trained(self) -> float:
        """Of a pass with its gradients: as much again as the forward pass for the gradient with respect to activations,
        and the gradient of what is trained: `experts`, or what is not attention where that is the whole transformer.
        Both factors of attention's products are activations, so that their gradient costs `attention` once more.
        """
        return (
            2.0 * self.total + self.attention + (self.base - self.attention if self.full_fine_tuning else self.experts)
        )


@dataclass(frozen=True)
class StepPasses:
    """The passes of a step.

    records: of the step's batch; updates: of the weights; base_loss: each update takes a trained pass a record for it;
    members: of a group, each of which takes `policy_points` trained passes an update, with `kl` as many forward passes
    by the base, and in an `old_policy_share` of the steps as many by the old policy; rollout_steps: forward passes a
    member in its rollout.
    """

    records: int
    policy_points: int
    kl: bool = False
    old_policy_share: float = 0.0
    updates: int = 1
    samples: int = 1
    rollout_steps: int = 0
    base_loss: bool = True


def step_flops(cost: ForwardCost, passes: StepPasses) -> float:
    """Model FLOPs of a training step: what the mathematics needs, neither rematerialisation nor frozen gradients."""
    policy = cost.trained + passes.kl * cost.base + passes.old_policy_share * cost.total
    policy = policy * passes.policy_points * passes.samples
    update = cost.trained * passes.base_loss + policy
    return passes.records * (passes.updates * update + passes.rollout_steps * passes.samples * cost.total)


@dataclass(frozen=True)
class ModelSizes:
    """What the FLOPs of a model depend on. trainable: parameters of the transformer that are trained, or their shapes;
    multiple: pixels a side of a token; image_tokens: of the reference."""

    flux: FluxConfig
    trainable: Any
    multiple: int
    image_tokens: int


def flops_of_step(
    config: TrainConfig, sizes: ModelSizes, batch: Mapping[str, jax.ShapeDtypeStruct | jax.Array], step: int
) -> float:
    """`step_flops` over all devices of step number `step` (from 0) on such a batch: arrays [..., h, w] of the global
    batch."""
    height, width = batch["mask"].shape[-2:]
    automatic, sde = config.mode == "automatic", config.grpo.policy_estimator == "sde"
    points = config.rollouts.sde_window if sde else config.grpo.num_policy_timesteps
    learns = config.uses_policy and (not automatic or config.rollouts.due(step))
    tokens = 2 * height * width // sizes.multiple**2, config.model.max_sequence_length + sizes.image_tokens
    experts = {name: x.shape for name, x in named_leaves(sizes.trainable).items() if config.experts.use_lora}
    cost = ForwardCost(
        base=forward_flops(sizes.flux, *tokens),
        attention=attention_flops(sizes.flux, *tokens),
        experts=expert_flops(experts, *tokens),
        full_fine_tuning=not config.experts.use_lora,
    )
    passes = StepPasses(
        records=config.run.train_batch_size * config.run.gradient_accumulation_steps,
        policy_points=points if learns else 0,
        kl=config.grpo.kl_weight > 0.0,
        old_policy_share=0.0 if automatic else 1.0 - 1.0 / config.grpo.policy_sync_steps,
        updates=config.updates,
        samples=config.rollouts.num_generations if automatic else 1,
        rollout_steps=config.rollouts.rollout_steps if automatic and config.rollouts.due(step) else 0,
        base_loss=has_results(batch),
    )
    return step_flops(cost, passes)
