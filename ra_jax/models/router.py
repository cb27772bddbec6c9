"""The router, which computes the experts' gates from a condition, and the loss that keeps all experts in use.

The router reads only the condition, not the noise or the time. An image therefore has the same gates at every step of a
sampler. Experts can therefore be exported as LoRA files with these gates as fixed weights.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

RING_TOKENS = 2  # width of the ring around the mask, in tokens
SPECIALIZATION_NATS = 0.25  # the diversity loss makes an image's gates unequal up to this distance from uniform ones
GATE_EPS = 1e-6  # keeps log(gate) and its gradient finite for gates of 0, which `topk` returns


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How gates are computed from the router's logits.

    The values of `routing` are:

        uniform  1/E for each expert
        fixed    `fixed_weights`
        soft     f + (1 - E·f)·softmax(logits / temperature)
        topk     the `top_k` largest gates of soft, scaled to sum 1, with soft's gradient (straight-through)
        sample   the gates of soft; in rollouts they are the probabilities with which one expert is drawn

    Attributes:
        num_experts: E >= 1.
        floor: f in [0, 1/E), lower bound of the gates of "soft".
        temperature: number above 0 by which the logits are divided.
        routing: "uniform", "fixed", "soft", "topk" or "sample".
        fixed_weights: E weights that sum to 1. They are the gates of "fixed" and the initial gates of "soft", "topk"
            and "sample". For these three, each weight must exceed f.
        hidden: width of the hidden layer.
        top_k: number of experts that "topk" keeps, 1 to E.

    Raises:
        ValueError: if a value is out of range.
    """

    num_experts: int
    floor: float
    temperature: float
    routing: str
    fixed_weights: tuple[float, ...]
    hidden: int = 64
    top_k: int = 1

    def __post_init__(self):
        experts, weights = self.num_experts, tuple(self.fixed_weights)
        object.__setattr__(self, "fixed_weights", weights)
        if self.routing not in ROUTINGS:
            raise ValueError(f"routing {self.routing!r} is unknown: expected one of {', '.join(ROUTINGS)}.")
        if experts < 1 or self.hidden < 1:
            raise ValueError(f"num_experts is {experts} and hidden is {self.hidden}: expected 1 or more for both.")
        if self.floor < 0 or experts * self.floor >= 1:
            raise ValueError(
                f"router_floor is {self.floor} for {experts} experts: expected at least 0 and less than "
                f"1/num_experts = {1 / experts:g}."
            )
        if self.temperature <= 0:
            raise ValueError(f"routing_temperature is {self.temperature}: expected a number above 0.")
        if not 1 <= self.top_k <= experts:
            raise ValueError(f"top_k is {self.top_k}: expected 1 to num_experts, {experts}.")
        if len(weights) != experts:
            raise ValueError(f"fixed_expert_weights has {len(weights)} values: expected {experts}, one per expert.")
        if min(weights) < 0 or not math.isclose(sum(weights), 1, abs_tol=1e-6):
            raise ValueError(f"fixed_expert_weights {weights}: expected weights from 0 to 1 that sum to 1.")
        if self.routing in ("soft", "topk", "sample") and min(weights) <= self.floor:
            raise ValueError(
                f"fixed_expert_weights {weights}: they are the initial gates of {self.routing} routing, so each must "
                f"exceed router_floor, {self.floor}; use larger weights, a lower floor or --routing fixed."
            )


class Router(nnx.Module):
    """MLP from `router_features` to gates [B, E], float32; each row sums to 1.

    The last layer is initialized with a kernel of zeros and the bias temperature·log((w_fixed - f)/(1 - E·f)). The
    initial "soft" gates of every image are therefore the fixed weights.
    """

    def __init__(self, config: RouterConfig, latent_channels: int, rngs: nnx.Rngs):
        """Initialize the MLP; `latent_channels` is 4C, the number of features of a packed latent token."""
        self.config = config
        self.hidden = nnx.Linear(feature_count(latent_channels), config.hidden, rngs=rngs)
        # A weight at the floor has no finite logit. Only routings that do not read the logits allow such a weight.
        above_floor = np.maximum(np.asarray(config.fixed_weights) - config.floor, GATE_EPS)
        initial_logits = config.temperature * np.log(above_floor / (1 - config.num_experts * config.floor))
        self.logits = nnx.Linear(
            config.hidden,
            config.num_experts,
            kernel_init=nnx.initializers.zeros,
            bias_init=nnx.initializers.constant(initial_logits),
            rngs=rngs,
        )

    def __call__(self, features: jax.Array) -> jax.Array:
        """Compute gates [B, E] from features [B, F] by `config.routing`; uniform and fixed gates have no gradient."""
        return ROUTINGS[self.config.routing](self, features)

    def probabilities(self, features: jax.Array) -> jax.Array:
        """Compute the soft gates w = f + (1 - E·f)·softmax(logits/temperature): [B, F] -> [B, E]."""
        config = self.config
        logits = self.logits(nnx.silu(self.hidden(features.astype(jnp.float32))))
        soft = jax.nn.softmax(logits / config.temperature, axis=-1)
        return config.floor + (1 - config.num_experts * config.floor) * soft

    def _top_k(self, features: jax.Array) -> jax.Array:
        soft = self.probabilities(features)
        values, experts = jax.lax.top_k(jax.lax.stop_gradient(soft), self.config.top_k)
        rows = jnp.arange(soft.shape[0])[:, None]
        hard = jnp.zeros_like(soft).at[rows, experts].set(values / values.sum(axis=-1, keepdims=True))
        return hard + (soft - jax.lax.stop_gradient(soft))

    def _fixed(self, features: jax.Array) -> jax.Array:
        weights = jnp.asarray(self.config.fixed_weights, jnp.float32)
        return jnp.broadcast_to(weights, (features.shape[0], self.config.num_experts))

    def _uniform(self, features: jax.Array) -> jax.Array:
        experts = self.config.num_experts
        return jnp.full((features.shape[0], experts), 1 / experts, jnp.float32)


ROUTINGS: dict[str, Callable[[Router, jax.Array], jax.Array]] = {
    "uniform": Router._uniform,
    "fixed": Router._fixed,
    "soft": Router.probabilities,
    "topk": Router._top_k,
    "sample": Router.probabilities,
}


def feature_count(latent_channels: int) -> int:
    """Return F, the number of `router_features`; `latent_channels` is 4C, the features of a packed latent token."""
    return 4 * latent_channels + 2


def router_features(
    masked_latents: jax.Array,
    token_mask: jax.Array,
    grid: tuple[int, int],
    *,
    panel_columns: slice = slice(None),
) -> jax.Array:
    """Compute the router's input from a condition.

    The features are, in this order:

        mean and standard deviation of each latent feature over a ring around the mask, two tokens wide
        mean and standard deviation of each latent feature over the tokens outside the ring and the mask
        √(fraction of the panel that the mask covers)
        complexity of the mask's edge, perimeter / (4·√(tokens in the mask)): 1 for a square of whole tokens

    Means and deviations over an empty region are 0.

    Args:
        masked_latents: [B, N, 4C] packed, normalized latents of the masked image.
        token_mask: [B, N] fraction of each token's pixels that is in the mask.
        grid: rows and columns of tokens, rows·columns = N.
        panel_columns: token columns to read, such as the right half of a diptych.

    Returns:
        [B, feature_count(4C)] float32.

    Raises:
        ValueError: if N is not rows·columns.
    """
    batch, tokens, channels = masked_latents.shape
    if tokens != grid[0] * grid[1]:
        raise ValueError(f"masked_latents has {tokens} tokens: expected {grid[0] * grid[1]} for token grid {grid}.")
    latents = masked_latents.astype(jnp.float32).reshape(batch, *grid, channels)[:, :, panel_columns]
    mask = token_mask.astype(jnp.float32).reshape(batch, *grid)[:, :, panel_columns]

    dilated = _dilate(mask, RING_TOKENS) > 0
    ring, outside = dilated & (mask == 0), ~dilated
    latent_statistics = [_mean_and_std(latents, region) for region in (ring, outside)]
    padded = jnp.pad(mask, ((0, 0), (1, 1), (1, 1)))
    perimeter = sum(jnp.abs(jnp.diff(padded, axis=axis)).sum(axis=(1, 2)) for axis in (1, 2))
    complexity = perimeter / (4 * jnp.sqrt(jnp.maximum(mask.sum(axis=(1, 2)), GATE_EPS)))
    mask_features = jnp.stack([jnp.sqrt(mask.mean(axis=(1, 2))), complexity], axis=-1)
    return jnp.concatenate([*latent_statistics, mask_features], axis=-1)


def _dilate(mask: jax.Array, radius: int) -> jax.Array:
    window = (1, 2 * radius + 1, 2 * radius + 1)
    return jax.lax.reduce_window(mask, -jnp.inf, jax.lax.max, window, (1, 1, 1), "SAME")


def _mean_and_std(latents: jax.Array, region: jax.Array) -> jax.Array:
    """Compute mean and standard deviation of latents [B, h, w, D] over region [B, h, w]: [B, 2D].

    Both are zero if the region is empty.
    """
    weights = region.astype(jnp.float32)
    weights = weights / jnp.maximum(weights.sum(axis=(1, 2), keepdims=True), 1)
    mean = jnp.einsum("bhwd,bhw->bd", latents, weights)
    variance = jnp.einsum("bhwd,bhw->bd", jnp.square(latents - mean[:, None, None]), weights)
    return jnp.concatenate([mean, jnp.sqrt(variance)], axis=-1)


def diversity_loss(
    gates: jax.Array,
    weights: jax.Array,
    running_mean: jax.Array,
    *,
    decay: float = 0.9,
    specialization: float = 0.5,
    all_sum: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> tuple[jax.Array, jax.Array]:
    """Compute the diversity loss, and the new running mean of the gates.

        L = -H(m̂) + λ·mean_b max(H(w_b), ln E - I)           in nats; w_b are the gates of row b, I = 0.25
        m̂ = sg(β·m + (1 - β)·m_b) + (m_b - sg(m_b))          sg: stop_gradient

    With λ = 1 and without the lower bound, L estimates the negative mutual information of conditions and experts.

    The bound ends the push towards unequal gates once an image's gates are I nats below uniform, as (0.68, 0.2, 0.12)
    are. Without it, the loss has its minimum at gates of one expert each, and thousands of steps harden all gates: an
    optimizer such as Adam moves by its full step whatever the weight of the loss.

    m_b is the mean of the batch's gates, and m is the running mean of m_b. m̂ has the value of the new running mean and
    the full gradient of m_b. A plain mixture β·m + (1 - β)·m_b would scale the gradient of the balance term -H(m̂) by
    1 - β, and the router would collapse to one expert.

    If two experts have equal gates for every image, this loss gives both gates the same gradient. Only the other
    losses can then make the gates differ, through the experts' outputs.

    Args:
        gates: [B, E], rows that sum to 1. For "topk" routing pass `Router.probabilities`, since the entropy of a
            one-hot gate is always 0.
        weights: [B] >= 0, weight of each row, such that rows with the same condition have weight 1 together.
        running_mean: m, [E].
        decay: β in [0, 1).
        specialization: λ.
        all_sum: function that sums over the devices that each have a part of the batch (a psum). By default the
            identity, for a program that has the whole batch.

    Returns:
        the loss, and the running mean for the next step, β·m + (1 - β)·m_b [E], which has no gradient.
    """
    count = all_sum(weights.sum())
    batch_mean = all_sum(weights @ gates) / count
    least_entropy = math.log(gates.shape[-1]) - SPECIALIZATION_NATS
    mean_entropy = all_sum(weights @ jnp.maximum(_entropy(gates), least_entropy)) / count
    new_mean = jax.lax.stop_gradient(decay * running_mean + (1 - decay) * batch_mean)
    mean = new_mean + (batch_mean - jax.lax.stop_gradient(batch_mean))
    return specialization * mean_entropy - _entropy(mean), new_mean


def _entropy(p: jax.Array) -> jax.Array:
    return -(p * jnp.log(jnp.maximum(p, GATE_EPS))).sum(axis=-1)
