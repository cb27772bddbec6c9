"""The router: from an image's condition to the experts' weights, and the loss that keeps experts in use.

The router sees the condition only, never noise or time: gates are constant per image, and exported experts
with these weights reproduce the model.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

RING_TOKENS = 2  # how far the ring around the mask reaches
GATE_EPS = 1e-6  # keeps log(gate) and its gradient finite where `topk` gives a gate of 0


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How gates are made; E = num_experts.

    Attributes:
        num_experts: E >= 1.
        floor: f in [0, 1/E), the least weight that `soft` leaves to an expert.
        temperature: > 0; the logits are divided by it.
        routing: "uniform", 1/E each; "fixed", the `fixed_weights`; "soft", f + (1 - E·f)·softmax(logits /
            temperature); "topk", the `top_k` largest of "soft", scaled to sum 1, with the gradient of "soft"
            (straight through); "sample", the probabilities that rollouts draw one expert with, equal to "soft" wherever
            nothing is drawn.
        fixed_weights: E weights that sum to 1; all but "uniform" start from them, and exceed f but for "fixed".
        hidden: width of the hidden layer.
        top_k: experts that "topk" keeps, 1 to E.

    Raises:
        ValueError: if a value is out of its range.
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
            raise ValueError(f"num_experts is {experts} and hidden {self.hidden}: expected 1 or more of each.")
        if self.floor < 0 or experts * self.floor >= 1:
            raise ValueError(f"router floor {self.floor} for {experts} experts: expected 0 to below {1 / experts:g}.")
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
                f"fixed_expert_weights {weights}: {self.routing} routing starts from them, so each must exceed "
                f"the router's floor, {self.floor}; give larger weights, a lower floor or --routing fixed."
            )


class Router(nnx.Module):
    """MLP from `router_features` to gates [B, E], float32; each row sums to 1.

    The last layer's kernel is zero and its bias temperature·log((w_fixed - f)/(1 - E·f)), so that "soft" gates
    begin at the fixed weights for every image.
    """

    def __init__(self, config: RouterConfig, latent_channels: int, rngs: nnx.Rngs):
        """`latent_channels`: features of a packed latent token, 4C."""
        self.config = config
        self.hidden = nnx.Linear(feature_count(latent_channels), config.hidden, rngs=rngs)
        # A weight at the floor has no finite logit; only routings that do not read the logits allow it.
        above_floor = np.maximum(np.asarray(config.fixed_weights) - config.floor, GATE_EPS)
        start = config.temperature * np.log(above_floor / (1 - config.num_experts * config.floor))
        self.logits = nnx.Linear(
            config.hidden,
            config.num_experts,
            kernel_init=nnx.initializers.zeros,
            bias_init=nnx.initializers.constant(start),
            rngs=rngs,
        )

    def __call__(self, features: jax.Array) -> jax.Array:
        """features [B, F] -> gates [B, E] by `config.routing`; uniform and fixed gates have no gradient."""
        return ROUTINGS[self.config.routing](self, features)

    def probabilities(self, features: jax.Array) -> jax.Array:
        """The soft gates w = f + (1 - E·f)·softmax(logits/temperature): [B, F] -> [B, E]."""
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
    """F of `router_features`, for packed latent tokens of `latent_channels` features, 4C."""
    return 4 * latent_channels + 2


def router_features(
    masked_latents: jax.Array,
    token_mask: jax.Array,
    grid: tuple[int, int],
    *,
    panel_columns: slice = slice(None),
) -> jax.Array:
    """What the router sees of a condition.

    Per latent feature the mean and the standard deviation over a ring of two tokens around the mask, then
    over the tokens beyond the ring (0 where a region is empty); √(the mask's fraction of the panel); the
    complexity of its edge, perimeter / (4·√(tokens in the mask)), 1 for a square of whole tokens.

    Args:
        masked_latents: [B, N, 4C] packed, standardised latents of the masked image.
        token_mask: [B, N] fraction of each token's pixels that is in the mask.
        grid: rows and columns of tokens, rows·columns = N.
        panel_columns: the token columns to look at: the right panel's of a diptych.

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

    near = _dilate(mask, RING_TOKENS) > 0
    pooled = [_mean_and_std(latents, region) for region in (near & (mask == 0), ~near)]
    padded = jnp.pad(mask, ((0, 0), (1, 1), (1, 1)))
    perimeter = sum(jnp.abs(jnp.diff(padded, axis=axis)).sum(axis=(1, 2)) for axis in (1, 2))
    complexity = perimeter / (4 * jnp.sqrt(jnp.maximum(mask.sum(axis=(1, 2)), GATE_EPS)))
    shape = jnp.stack([jnp.sqrt(mask.mean(axis=(1, 2))), complexity], axis=-1)
    return jnp.concatenate([*pooled, shape], axis=-1)


def _dilate(mask: jax.Array, radius: int) -> jax.Array:
    window = (1, 2 * radius + 1, 2 * radius + 1)
    return jax.lax.reduce_window(mask, -jnp.inf, jax.lax.max, window, (1, 1, 1), "SAME")


def _mean_and_std(latents: jax.Array, region: jax.Array) -> jax.Array:
    """latents [B, h, w, D] over region [B, h, w] -> [B, 2D]; zeros where the region is empty."""
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
    """Negative mutual information of conditions and experts: L = -H(m̂) + λ·mean_b H(w_b), in nats.

        m̂ = sg(β·m + (1 - β)·m_b) + (m_b - sg(m_b))

    with m_b the batch's mean gate and m its running mean: the value of the running mean, the whole gradient
    of the batch's. Mixing without the straight-through form scales the gradient of balance by 1 - β, and the
    router collapses to one expert. Experts whose gates are equal for every image get equal gradients here: only
    what they compute tells them apart.

    Args:
        gates: [B, E], rows that sum to 1. With "topk" give `Router.probabilities`: the entropy of a hard gate
            is 0, whatever the router does.
        weights: [B] >= 0, weight of each row, such that members of one condition together count once.
        running_mean: [E], m.
        decay: β in [0, 1).
        specialisation: λ.
        all_sum: sum over the devices that share the batch (a psum); the identity where a program sees it all.

    Returns:
        the loss, and β·m + (1 - β)·m_b, the running mean for the next step, without gradient.
    """
    count = all_sum(weights.sum())
    batch_mean = all_sum(weights @ gates) / count
    mean_entropy = all_sum(weights @ _entropy(gates)) / count
    new_mean = jax.lax.stop_gradient(decay * running_mean + (1 - decay) * batch_mean)
    mean = new_mean + (batch_mean - jax.lax.stop_gradient(batch_mean))
    return specialization * mean_entropy - _entropy(mean), new_mean


def _entropy(p: jax.Array) -> jax.Array:
    return -(p * jnp.log(jnp.maximum(p, GATE_EPS))).sum(axis=-1)
