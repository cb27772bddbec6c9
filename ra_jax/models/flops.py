"""Model FLOPs of a pass of the transformer, and of the passes of a training step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ra_jax.models.flux import FluxConfig


def attention_flops(config: FluxConfig, image_tokens: int, context_tokens: int) -> float:
    """Compute the FLOPs of the attention products q·kᵀ and weights·v in a forward pass of one image.

    These are 4·S²·D per block, for S tokens and the width D.
    """
    blocks = config.num_layers + config.num_single_layers
    return 4.0 * (image_tokens + context_tokens) ** 2 * config.inner_dim * blocks


def forward_flops(config: FluxConfig, image_tokens: int, context_tokens: int) -> float:
    """Compute the FLOPs of the transformer's matrix products in a forward pass of one image.

    A multiply-add counts as 2. Per token, a double block takes 2·(4 + 8)·D² (4D² attention, 8D² MLP) and a single
    block 2·12·D². The input and output layers and `attention_flops` are added.
    """
    d, s = config.inner_dim, image_tokens + context_tokens
    blocks = config.num_layers + config.num_single_layers
    input_and_output = image_tokens * d * (config.in_channels + config.out_channels) + context_tokens * d * (
        config.joint_attention_dim
    )
    return 2.0 * (12.0 * d * d * s * blocks + input_and_output) + attention_flops(config, image_tokens, context_tokens)


def expert_flops(experts: Mapping[str, Sequence[int]], image_tokens: int, context_tokens: int) -> float:
    """Compute the FLOPs of the experts' products in a forward pass of one image: 2 · tokens · in · out per matrix.

    `experts` maps the name of each expert parameter, such as "transformer_blocks/attn/to_q/lora_a", to the parameter's
    shape [L, in, out]. It is empty if the model has no experts.
    """
    total = 0.0
    for name, shape in experts.items():
        if "norm" in name or "time_text_embed" in name:  # these layers take the time embedding: one row per image
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

    Attributes:
        base: FLOPs of the base (`forward_flops`).
        attention: the part of `base` for the attention products (`attention_flops`).
        experts: FLOPs of the experts' products (`expert_flops`).
        full_fine_tuning: whether the whole transformer is trained. Then there are no experts.
    """

    base: float
    attention: float
    experts: float = 0.0
    full_fine_tuning: bool = False

    @property
    def total(self) -> float:
        """FLOPs of base and experts together."""
        return self.base + self.experts

    @property
    def forward_and_backward(self) -> float:
        """FLOPs of a forward pass and its backward pass.

        The gradient with respect to activations costs `total`, as much as the forward pass. The attention products
        cost `attention` once more, because both of their factors are activations. The gradient with respect to the
        trained weights costs `experts`, or `base` − `attention` if the whole transformer is trained.
        """
        return (
            2.0 * self.total + self.attention + (self.base - self.attention if self.full_fine_tuning else self.experts)
        )


@dataclass(frozen=True)
class StepPasses:
    """The forward and backward passes in a step. A policy pass is a forward and a backward pass for the policy loss.

    Attributes:
        records: number of records in the step's batch.
        policy_passes: number of policy passes per sample and update.
        reference: whether each policy pass of a step's first update also needs a forward pass of the reference.
        old_policy_share: fraction of steps in which each policy pass also needs a forward pass of the old policy.
        updates: number of updates of the weights.
        samples: number of samples per condition.
        rollout_steps: number of forward passes in the rollout of a sample.
        base_loss: whether the base loss takes a forward and a backward pass per record and update.
    """

    records: int
    policy_passes: int
    reference: bool = False
    old_policy_share: float = 0.0
    updates: int = 1
    samples: int = 1
    rollout_steps: int = 0
    base_loss: bool = True


def step_flops(cost: ForwardCost, passes: StepPasses) -> float:
    """Compute the model FLOPs of a training step.

    Recomputation of activations and gradients of frozen weights do not count.
    """
    policy_passes = passes.policy_passes * passes.samples
    policy_pass = cost.forward_and_backward + passes.old_policy_share * cost.total
    update = cost.forward_and_backward * passes.base_loss + policy_pass * policy_passes
    once = cost.base * passes.reference * policy_passes + cost.total * passes.rollout_steps * passes.samples
    return passes.records * (passes.updates * update + once)
