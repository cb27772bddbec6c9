"""Policy estimators: the log-probability ℓ [B] of samples under a policy, float32.

A flow model has no cheap exact likelihood, so ℓ is estimated:

    contrast  ℓ is the change of minus the flow-matching error from a fixed reference v_ref to v_θ, to first order in
              v_θ − v_ref, at K pairs (t, ε), divided by the temperature τ. The policy ratio is ρ = 1 + (ℓ_θ − ℓ_old),
              to first order, too. The loss also has an anchor, the squared distance to the reference.
    matching  ℓ is minus the flow-matching error at K pairs (t, ε), divided by the temperature τ (FPO, McAllister et al.
              2507.21053, eq. 9; AWM, Xue et al. 2509.25050). It needs no trajectory of the sampler. It therefore also
              works for stored images that people scored. ρ = exp(ℓ_θ − ℓ_old).
    sde       ℓ is the log-probability of the noisy steps of the stochastic sampler (Flow-GRPO, Liu et al. 2505.05470,
              eq. 13). It needs the trajectory of the sampler. It therefore works only for generated images.
              ρ = exp(ℓ_θ − ℓ_old).

All are deterministic functions of a cache, which has the points to evaluate. A point is a pair (x_t, t) at which the
velocity of a sample is evaluated. θ and θ_old run the same graph, so that equal parameters give equal ℓ.

The estimator `nft` (DiffusionNFT, Zheng et al. 2509.16117) has no ratio. It compares the velocity of θ with that of
the reference or of θ_old at the pairs (t, ε) of `matching`; see `losses.nft_loss`.

Shapes: B samples, N packed latent tokens of 4C features. Each sample has P points: one for each of K pairs (t, ε), and
one more if the anchor has a point of its own; or one for each of W noisy steps. x0 is a clean latent,
x_t = (1 − t)·x0 + t·ε, and mean_Ω the mean over a region (`flow.regions.region_mean`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ra_jax.flow.path import interpolate, velocity_target
from ra_jax.flow.regions import region_mean
from ra_jax.flow.samplers import sde_transition
from ra_jax.flow.schedule import stratified_times

# (params, x [B·P, N, 4C], t [B·P]) -> [B·P, N, 4C]. Row b·P + k is point k of sample b.
PolicyVelocity = Callable[[Any, jax.Array, jax.Array], jax.Array]


def repeat_rows(x: jax.Array, count: int) -> jax.Array:
    """Repeat every row `count` times: [B, ...] -> [B·count, ...]. The copies of a row are adjacent."""
    # broadcast_to() instead of indexing: a gather over sharded rows would copy all rows to every device.
    return jnp.broadcast_to(x[:, None], (len(x), count, *x.shape[1:])).reshape(-1, *x.shape[1:])


def map_timesteps(velocity: Callable, x: jax.Array, t: jax.Array, num_points: int) -> jax.Array:
    """Compute `velocity` in a loop over the points of a record. Returns the velocities [R, N, 4C].

    A point is a pair (x_t, t), and each record has `num_points` of them. Pass k of the loop computes point k of all
    records. The backward pass recomputes the forward pass of each point. The memory is therefore the same as for one
    point, and the cost is one more forward pass per point.

    Args:
        velocity: (x [B, N, 4C], t [B]) -> [B, N, 4C].
        x: [R, N, 4C] with R = B·num_points. The rows of a record are adjacent.
        t: [R].
        num_points: number of points per record.
    """
    x_by_point, t_by_point = (jnp.moveaxis(a.reshape(-1, num_points, *a.shape[1:]), 1, 0) for a in (x, t))
    by_point = jax.lax.map(jax.checkpoint(lambda point: velocity(*point)), (x_by_point, t_by_point))
    return jnp.moveaxis(by_point, 0, 1).reshape(x.shape)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["clean", "times", "noise", "region", "reference"],
    meta_fields=["num_pairs"],
)
@dataclass(frozen=True)
class MatchingCache:
    """The pairs (t, ε) at which `contrast`, `matching` and `nft` evaluate both the old and the current policy.

    Attributes:
        clean: x0 [B, N, 4C].
        times: t [B, P], for P points per sample.
        noise: ε [B, P, N, 4C].
        region: weights of mean_Ω [B, N, 4].
        num_pairs: K, the number of points for the log-probability. The other P − K points are for the anchor alone.
        reference: v_ref at the points, [B·P, N, 4C]; None if the estimator has no reference.
    """

    clean: jax.Array
    times: jax.Array
    noise: jax.Array
    region: jax.Array
    num_pairs: int
    reference: jax.Array | None = None

    @property
    def num_points(self) -> int:
        """P, the number of points per sample."""
        return self.times.shape[1]

    def points(self) -> tuple[jax.Array, jax.Array]:
        """Return the points of all samples: x_t [B·P, N, 4C] and t [B·P]."""
        times = self.times.reshape(-1)
        return interpolate(repeat_rows(self.clean, self.num_points), self.flat_noise(), times), times

    def target(self) -> jax.Array:
        """Return v* = ε − x0 at every point, [B·P, N, 4C]."""
        return velocity_target(repeat_rows(self.clean, self.num_points), self.flat_noise())

    def errors(self, predicted: jax.Array) -> jax.Array:
        """Compute mean_Ω ‖v − v*‖² [B, P] for velocities v [B·P, N, 4C] at the points."""
        return self.mean((predicted - self.target()) ** 2)

    def mean(self, values: jax.Array) -> jax.Array:
        """Compute mean_Ω of values [B·P, N, 4C] at the points: [B, P]."""
        return region_mean(values, repeat_rows(self.region, self.num_points)).reshape(self.times.shape)

    def flat_noise(self) -> jax.Array:
        """Return the noise of every point, [B·P, N, 4C]."""
        return self.noise.reshape(-1, *self.noise.shape[2:])


def matching_cache(
    keys: jax.Array,
    clean: jax.Array,
    region: jax.Array,
    *,
    count: int,
    fraction: float,
    with_rest: bool = False,
) -> MatchingCache:
    """Draw K pairs (t, ε) for each sample from its key. Samples with equal keys get equal pairs.

    Args:
        keys: [B], equal for all samples of a group.
        clean: x0 [B, N, 4C].
        region: weights of mean_Ω [B, N, 4].
        count: K.
        fraction: t is drawn from [1 − fraction, 1], the noisiest part of the schedule (`stratified_times`).
        with_rest: whether each sample has one more point, with t from the rest of the schedule, for the anchor alone.
    """

    def draw_pairs(key):
        time_key, noise_key = jax.random.split(key)
        times = stratified_times(time_key, count, fraction)
        if with_rest:
            rest_key = jax.random.fold_in(time_key, 1)
            rest = (1.0 - fraction) * (1.0 - jax.random.uniform(rest_key, (1,), jnp.float32))
            times = jnp.concatenate([times, rest])
        return times, jax.random.normal(noise_key, (len(times), *clean.shape[1:]), jnp.float32)

    times, noise = jax.vmap(draw_pairs)(keys)
    return MatchingCache(clean, times, noise, region, count)


def contrast_log_prob(
    velocity: PolicyVelocity, params: Any, cache: MatchingCache, *, temperature: jax.Array | float, fraction: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute the log-probability to first order about the reference, and the distance from the reference.

        ℓ = (2/τ)·mean_k mean_Ω ⟨v_θ − v_ref, v* − v_ref⟩        v* = ε_k − x0
        distance = mean_k mean_Ω ‖v_θ − v_ref‖²

    With d = v_θ − v_ref and u = v* − v_ref, minus the flow-matching error is −‖d − u‖² = −‖u‖² + 2⟨d, u⟩ − ‖d‖². ℓ is
    the linear term: the change of the log-probability of `matching`, to first order. The log-probability itself is not
    used, because its negative quadratic term makes the loss of samples with A < 0 unbounded from below.

    If the cache has a point for the anchor alone, it is added to the distance with the weight (1 − f)/f: the K points
    stand for a part f of the schedule and this point for the rest, and each part counts by its length.

    Args:
        velocity: v_θ.
        params: θ.
        cache: the points, with `reference`.
        temperature: τ.
        fraction: f.

    Returns:
        ℓ [B].
        The distance [B].
        The velocities v_θ [B·P, N, 4C].
    """
    predicted = velocity(params, *cache.points())
    change = predicted - cache.reference
    alignments = cache.mean(change * (cache.target() - cache.reference))[:, : cache.num_pairs]
    distances = cache.mean(change**2)
    of_pairs, of_rest = jnp.split(distances, [cache.num_pairs], axis=1)
    distance = of_pairs.mean(1) + (1.0 - fraction) / fraction * of_rest.sum(1)
    return 2.0 * alignments.mean(1) / temperature, distance, predicted


def matching_log_prob(
    velocity: PolicyVelocity, params: Any, cache: MatchingCache, *, temperature: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """Compute ℓ = −(1/τ)·mean_k mean_Ω ‖v_θ(x_{t_k}) − (ε_k − x0)‖² with τ = `temperature`.

    Returns ℓ [B] and the velocities v_θ [B·K, N, 4C].
    """
    predicted = velocity(params, *cache.points())
    return -cache.errors(predicted).mean(1) / temperature, predicted


@partial(jax.tree_util.register_dataclass, data_fields=["states", "times", "region"], meta_fields=["noise_level"])
@dataclass(frozen=True)
class TransitionCache:
    """W noisy steps of the stochastic sampler, at which `sde` evaluates both the old and the current policy.

    Attributes:
        states: x [B, W + 1, N, 4C] before each step and after the last.
        times: t [W + 1] of the states, decreasing. The diffusion coefficient g is above 0 at the first W of them.
        region: weights of mean_Ω [B, N, 4].
        noise_level: η in g(t) = η·√(t/(1 − t)).
    """

    states: jax.Array
    times: jax.Array
    region: jax.Array
    noise_level: float

    @property
    def num_points(self) -> int:
        """W, the number of points per sample."""
        return self.states.shape[1] - 1

    def points(self) -> tuple[jax.Array, jax.Array]:
        """Return the points of all samples: the states before each step x [B·W, N, 4C], and t [B·W]."""
        states = self.states[:, :-1].reshape(-1, *self.states.shape[2:])
        return states, jnp.tile(self.times[:-1], len(self.states))


def sde_log_prob(
    velocity: PolicyVelocity, params: Any, cache: TransitionCache
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Compute ℓ, the mean over steps and over Ω of log N(x'; μ_θ(x), std²), the log-density of each element of x'.

    x and x' are the states before and after a step. `sde_transition` gives μ_θ and std.

    Returns:
        ℓ [B].
        The means μ_θ [B·W, N, 4C].
        The standard deviations std [B·W].
        The velocities v_θ [B·W, N, 4C].
    """
    x, t = cache.points()
    predicted = velocity(params, x, t)
    mean, std = sde_transition(x, predicted, t, jnp.tile(cache.times[1:], len(cache.states)), cache.noise_level)
    next_x = cache.states[:, 1:].reshape(x.shape)
    squared_error = region_mean((next_x - mean) ** 2, repeat_rows(cache.region, cache.num_points))
    log_density = -0.5 * squared_error / std**2 - jnp.log(std) - 0.5 * jnp.log(2.0 * jnp.pi)
    return log_density.reshape(-1, cache.num_points).mean(1), mean, std, predicted


def normalized_log_ratio(
    log_ratio: jax.Array, mean: jax.Array, old_mean: jax.Array, std: jax.Array, region: jax.Array
) -> jax.Array:
    """Remove the bias of an `sde` log-ratio and make its scale independent of the image size. Returns log ρ̂ [B].

        log ρ̂ = √D·(ℓ_θ − ℓ_old + ½·mean δ²)        δ = (μ_θ − μ_old)/std        D = W·C / Σ w²

    The means are over steps and over Ω. w are the weights of mean_Ω, and D is the effective number of elements in ℓ. If
    mean_Ω is a uniform mean over n latent cells, D is W·C·n.

    ℓ_θ − ℓ_old is a mean over D elements. For steps drawn from the old policy, it equals mean(z·δ) − ½·mean δ² with
    z ~ N(0, I). With r² = mean δ², its expectation is −r²/2 and its standard deviation is only r/√D. Without a
    correction, nearly every ratio would therefore be below 1, and clipping would act on that side only. Adding
    ½·mean δ² removes the bias (RatioNorm of GRPO-Guard, 2510.22319). Multiplying by √D gives mean 0 and standard
    deviation r for every image size.

    Args:
        log_ratio: ℓ_θ − ℓ_old [B].
        mean: μ_θ [B·W, N, 4C].
        old_mean: μ_old [B·W, N, 4C]; no gradient flows into it.
        std: [B·W].
        region: w, weights of mean_Ω [B, N, 4].
    """
    samples = log_ratio.shape[0]
    steps = mean.shape[0] // samples
    squared_shift = region_mean((mean - jax.lax.stop_gradient(old_mean)) ** 2, repeat_rows(region, steps)) / std**2
    channels = mean.shape[-1] // 4
    elements = steps * channels / (region**2).sum((1, 2))
    return jnp.sqrt(elements) * (log_ratio + 0.5 * squared_shift.reshape(samples, steps).mean(1))
