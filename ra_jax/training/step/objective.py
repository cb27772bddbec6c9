"""The loss of a step, term by term; its diversity term is taken over all microbatches at once:

total = w_base·base + w_policy·policy + w_diversity·diversity + w_kl·mean_Ω ‖v_θ − v_ref‖²
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ra_jax.data.batch import Batch
from ra_jax.flow.path import interpolate
from ra_jax.flow.regions import region_mean
from ra_jax.flow.schedule import FlowSchedule
from ra_jax.models.conditioning import Condition
from ra_jax.models.fill_model import FillModel, Weights
from ra_jax.models.lora import Adapter
from ra_jax.models.router import diversity_loss
from ra_jax.parallel.collectives import all_mean, all_sum
from ra_jax.rl.estimators import repeat
from ra_jax.rl.losses import flow_matching_error
from ra_jax.rl.policy import OldPolicy, PolicyOutput, evaluate_policy, policy_cache, policy_loss, velocity_distance
from ra_jax.rl.rollouts import Sample
from ra_jax.training.step.encode import Context, Encoded, group_keys
from ra_jax.training.step.settings import ObjectiveSettings
from ra_jax.training.step.state import example_keys, stream_key

Metrics = dict[str, jax.Array]


@dataclass(frozen=True)
class Objective:
    """The loss as pure functions of arrays; the object itself is static.

    axis_name: of the replicas that means and sums are taken over, under `jax.pmap`; None under `jax.jit`.
    """

    model: FillModel
    schedule: FlowSchedule
    settings: ObjectiveSettings
    axis_name: str | None = None

    def mean(self, x: jax.Array, weights: jax.Array | None = None) -> jax.Array:
        """`all_mean` over the global batch."""
        return all_mean(x, self.axis_name, weights)

    def sum(self, x: jax.Array) -> jax.Array:
        """`all_sum` over the replicas."""
        return all_sum(x, self.axis_name)

    def velocity(self, trainable, frozen: Weights, x, t, condition: Condition, adapter: Adapter) -> jax.Array:
        """v_θ(x_t, t, c) [R, N, 4C] at the run's guidance; without gates that of the base."""
        guidance_scale = self.settings.guidance_scale
        return self.model.velocity(trainable, frozen, x, t, condition, adapter=adapter, guidance_scale=guidance_scale)

    def sample_noise(
        self, batch: Batch, clean: jax.Array, seed: jax.Array, update: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The base loss's draws, one a record and update of the run: noise [B, N, 4C], t [B], dropout keys [B]."""
        keys = example_keys(jax.random.fold_in(stream_key(seed, "base"), update), batch["record_id"])
        noise_key, time_key, dropout_key = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)
        tokens, features = clean.shape[1:]
        noise = jax.vmap(lambda key: jax.random.normal(key, (tokens, features), jnp.float32))(noise_key)
        return noise, jax.vmap(lambda key: self.schedule.training_time(key, tokens))(time_key), dropout_key

    def base(self, trainable, context: Context, update: jax.Array) -> tuple[jax.Array, Metrics]:
        """Weighted flow-matching loss of a microbatch's results, with its metric; `update`: its number in the run."""
        batch, encoded = context.batch, context.encoded
        gates, _ = self.model.gates(trainable, encoded.condition)
        noise, t, dropout_keys = self.sample_noise(batch, encoded.clean, context.seed, update)
        adapter = Adapter(gates, dropout_keys if self.settings.dropout else None)
        x = interpolate(encoded.clean, noise, t)
        predicted = self.velocity(trainable, context.frozen, x, t, encoded.condition, adapter)
        errors = flow_matching_error(predicted, encoded.clean, noise, encoded.region)
        base = self.mean(batch["sample_weight"] * errors)
        return self.settings.base_loss_weight * base, {"base_loss": base}

    def evaluate_policy(self, trainable, context: Context, sample: Sample, *, experts: bool = True) -> PolicyOutput:
        """What the policy `trainable` makes of a member; dropout off. Without `experts` the policy is the base."""
        encoded, frozen = context.encoded, context.frozen
        gates = self.model.gates(trainable, encoded.condition)[0] if experts else None
        routing = None
        if gates is not None and sample.experts is not None:
            routing = jnp.log(jnp.take_along_axis(gates, sample.experts[:, None], axis=1)[:, 0])
            gates = jax.nn.one_hot(sample.experts, gates.shape[-1])

        def velocity(params, x, t):
            points = len(x) // len(encoded.region)
            if self.settings.sequential_timesteps:
                adapter = Adapter(gates)
                return map_timesteps(
                    lambda x, t: self.velocity(params, frozen, x, t, encoded.condition, adapter), x, t, points
                )
            condition, point_gates = jax.tree.map(lambda leaf: repeat(leaf, points), (encoded.condition, gates))
            return self.velocity(params, frozen, x, t, condition, Adapter(point_gates))

        keys, settings = group_keys(context.batch, context.seed), self.settings.policy
        cache = policy_cache(sample, keys, encoded.region, settings)
        return evaluate_policy(
            velocity, trainable, cache, settings, temperature=context.temperature, routing_log_prob=routing
        )

    def policy(
        self,
        trainable,
        context: Context,
        sample: Sample,
        advantages: jax.Array,
        old: OldPolicy,
        *,
        on_policy: jax.Array,
    ) -> tuple[jax.Array, tuple[Metrics, OldPolicy]]:
        """Weighted policy (and KL) loss of a member of each group [B], with its metrics and what is to be remembered.

        fresh: θ_old *is* θ: its record is stop_gradient(θ's), so that ρ is exactly 1.
        """
        settings = self.settings
        output = self.evaluate_policy(trainable, context, sample)
        current = jax.lax.stop_gradient(output.values)
        old = jax.tree.map(lambda new, old: jnp.where(on_policy, new, old), current, old)
        loss, metrics = policy_loss(output, old, advantages, settings.policy, mean=self.mean)
        total, metrics = settings.policy_loss_weight * loss, metrics | {"policy_loss": loss}
        if settings.kl_weight:
            base = self.evaluate_policy(trainable, context, sample, experts=False)
            kl = velocity_distance(output.velocity, base.velocity, context.encoded.region, self.mean)
            total += settings.kl_weight * kl
            metrics["kl_loss"] = kl
        return total, (metrics, old)

    def features(self, encoded: Encoded) -> jax.Array | None:
        """What the router sees of a microbatch's conditions, [B, F]; None without a router."""
        return None if self.model.router is None else self.model.router_features(encoded.condition)

    def diversity(
        self, trainable, features: jax.Array, weights: jax.Array, router_mean: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        """Weighted diversity loss of all conditions of a step; with it the router's new running mean [E] and metrics.

        features: `router_features` [B, F] of every record; weights: [B], such that a condition counts once.
        """
        settings = self.settings
        gates, soft_gates = self.model.gates_from_features(trainable, features)
        loss, router_mean = diversity_loss(
            soft_gates,
            weights,
            router_mean,
            decay=settings.routing_decay,
            specialization=settings.routing_specialization,
            all_sum=self.sum,
        )
        metrics = {"diversity_loss": loss} | self.routing_metrics(gates, weights)
        return settings.diversity_loss_weight * loss, (router_mean, metrics)

    def routing_metrics(self, gates: jax.Array, weights: jax.Array) -> Metrics:
        """Over distinct conditions: the fraction whose largest gate is i (usage), and the mean gate (weight)."""
        largest = jax.nn.one_hot(gates.argmax(-1), gates.shape[-1])
        usage, weight = self.mean(largest, weights), self.mean(gates, weights)
        return {f"routing_expert_{i}_usage": usage[i] for i in range(gates.shape[-1])} | {
            f"routing_expert_{i}_weight": weight[i] for i in range(gates.shape[-1])
        }

    def drift(self, trainable, context: Context, clean: jax.Array, step: jax.Array) -> Metrics:
        """How far the velocity is from the base's (experts off), over images `clean` at the base loss's (t, ε):
        velocity_norm_ratio, the mean over records of ‖v_θ‖ / ‖v_base‖, and kl_to_base, of mean_Ω ‖v_θ − v_base‖².
        """
        condition, region = context.encoded.condition, context.encoded.region
        noise, t, _ = self.sample_noise(context.batch, clean, context.seed, step)
        gates, _ = self.model.gates(trainable, condition)
        x = interpolate(clean, noise, t)
        policy, base = self.policy_and_base_velocity(trainable, context.frozen, x, t, condition, gates)
        return {
            "velocity_norm_ratio": self.mean(norm_ratio(policy, base, region)),
            "kl_to_base": self.mean(region_mean((policy - base) ** 2, region)),
        }

    def policy_and_base_velocity(self, trainable, frozen, x, t, condition, gates) -> tuple[jax.Array, jax.Array]:
        """Velocities of the experts and of the base alone at the same R points, [R, N, 4C] each."""
        # Gates of 0 are the base: one pass of 2R rows leaves the compiler one copy of the network, not two.
        # A point's two rows are neighbours, so that they stay on the device where the point is.
        x, t, condition = jax.tree.map(lambda leaf: repeat(leaf, 2), (x, t, condition))
        both = jnp.stack([gates, jnp.zeros_like(gates)], axis=1).reshape(-1, gates.shape[-1])
        velocity = self.velocity(trainable, frozen, x, t, condition, Adapter(both))
        return velocity[0::2], velocity[1::2]


def map_timesteps(velocity: Callable, x: jax.Array, t: jax.Array, points: int) -> jax.Array:
    """`velocity` of x [R, N, 4C], t [R], where a record's `points` rows stand side by side, at a point of every record
    at a time; its backward pass begins with the forward pass of that point."""
    x_by_point, t_by_point = (jnp.moveaxis(a.reshape(-1, points, *a.shape[1:]), 1, 0) for a in (x, t))
    found = jax.lax.map(jax.checkpoint(lambda point: velocity(*point)), (x_by_point, t_by_point))
    return jnp.moveaxis(found, 0, 1).reshape(x.shape)


def norm_ratio(velocity: jax.Array, base: jax.Array, region: jax.Array) -> jax.Array:
    """‖v‖ / ‖v_base‖ [R], norms of velocities [R, N, 4C] over mean_Ω (`region` [R, N, 4])."""
    return jnp.sqrt(region_mean(velocity**2, region) / region_mean(base**2, region))
