"""The loss of a step, term by term.

    total = w_base·base + w_policy·policy + w_diversity·diversity + w_kl·mean_Ω ‖v_θ − v_ref‖² + w_norm·norm_excess

v_ref is the velocity of the reference: of the base without experts, or of the weights that the run started with, if
they are not the base (`reference_velocity`). The diversity term is computed once over all microbatches of a
step, the other terms per microbatch.
"""

from dataclasses import dataclass, replace

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
from ra_jax.rl.estimators import MatchingCache, TransitionCache, map_timesteps, repeat_rows
from ra_jax.rl.losses import flow_matching_error
from ra_jax.rl.policy import (
    OldPolicy,
    PolicyOutput,
    evaluate_policy,
    norm_excess,
    norm_ratio,
    policy_cache,
    policy_loss,
    velocity_distance,
)
from ra_jax.rl.rollouts import Sample
from ra_jax.training.step.encode import EncodedBatch, LossContext, group_keys
from ra_jax.training.step.settings import ObjectiveSettings
from ra_jax.training.step.state import example_keys, stream_key

Metrics = dict[str, jax.Array]


@dataclass(frozen=True)
class Objective:
    """The loss as pure functions of arrays; the object itself is static.

    Attributes:
        model: static part of the network. The weights are arguments of the methods.
        schedule: times of the sampler and of the base loss.
        settings: weights and options of the loss.
        axis_name: name of the mapped axis under `jax.pmap`. Means and sums are also over this axis. None under
            `jax.jit`.
    """

    model: FillModel
    schedule: FlowSchedule
    settings: ObjectiveSettings
    axis_name: str | None = None

    def mean(self, x: jax.Array, weights: jax.Array | None = None) -> jax.Array:
        """Compute `all_mean`, the weighted mean over the global batch."""
        return all_mean(x, self.axis_name, weights)

    def sum(self, x: jax.Array) -> jax.Array:
        """Compute `all_sum`, the sum over the replicas."""
        return all_sum(x, self.axis_name)

    def velocity(
        self,
        trainable,
        frozen: Weights,
        x,
        t,
        condition: Condition,
        adapter: Adapter,
        guidance_scale: float | None = None,
    ) -> jax.Array:
        """Compute v_θ(x_t, t, c) [R, N, 4C], by default at the run's guidance scale."""
        guidance_scale = self.settings.guidance_scale if guidance_scale is None else guidance_scale
        return self.model.velocity(trainable, frozen, x, t, condition, adapter=adapter, guidance_scale=guidance_scale)

    def sample_noise(
        self, batch: Batch, clean: jax.Array, seed: jax.Array, update: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Draw noise ε [B, N, 4C], times t [B] and dropout keys [B] of the base loss.

        Each draw depends only on (seed, update, record). `update` counts the updates of the run.
        """
        keys = example_keys(jax.random.fold_in(stream_key(seed, "base"), update), batch["record_id"])
        noise_key, time_key, dropout_key = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)
        tokens, features = clean.shape[1:]
        noise = jax.vmap(lambda key: jax.random.normal(key, (tokens, features), jnp.float32))(noise_key)
        return noise, jax.vmap(lambda key: self.schedule.draw_training_time(key, tokens))(time_key), dropout_key

    def base_loss(self, trainable, context: LossContext, update: jax.Array) -> tuple[jax.Array, Metrics]:
        """Compute w_base·base of a microbatch, and the metric base_loss, which is base without the factor w_base.

            base = mean( sample_weight · mean_Ω ‖v_θ(x_t, t, c) − (ε − x0)‖² )

        x0 is the record's result. `update` counts the updates of the run. The random draws depend on it.
        """
        batch, encoded = context.batch, context.encoded
        gates, _ = self.model.gates(trainable, encoded.condition)
        noise, t, dropout_keys = self.sample_noise(batch, encoded.clean, context.seed, update)
        adapter = Adapter(gates, dropout_keys if self.settings.dropout else None)
        x = interpolate(encoded.clean, noise, t)
        predicted = self.velocity(
            trainable, context.frozen, x, t, encoded.condition, adapter, self.settings.base_guidance_scale
        )
        errors = flow_matching_error(predicted, encoded.clean, noise, encoded.region)
        loss = self.mean(batch["sample_weight"] * errors)
        return self.settings.base_loss_weight * loss, {"base_loss": loss}

    def policy_cache(self, context: LossContext, sample: Sample) -> MatchingCache | TransitionCache:
        """Return the points (x_t, t) at which policies are compared on a sample (`rl.policy.policy_cache`)."""
        keys = group_keys(context.batch, context.seed)
        return policy_cache(sample, keys, context.encoded.region, self.settings.policy)

    def velocity_at_points(self, trainable, context: LossContext, x, t, gates: jax.Array | None) -> jax.Array:
        """Compute the velocity [R, N, 4C] at R = B·P points, without dropout; gates [B, E] are those of the samples."""
        encoded, num_points = context.encoded, len(x) // len(context.encoded.region)
        if self.settings.sequential_timesteps:
            adapter = Adapter(gates)
            return map_timesteps(
                lambda x, t: self.velocity(trainable, context.frozen, x, t, encoded.condition, adapter),
                x,
                t,
                num_points,
            )
        condition, point_gates = jax.tree.map(lambda leaf: repeat_rows(leaf, num_points), (encoded.condition, gates))
        return self.velocity(trainable, context.frozen, x, t, condition, Adapter(point_gates))

    def evaluate_policy(
        self, trainable, context: LossContext, sample: Sample, reference: jax.Array | None
    ) -> PolicyOutput:
        """Evaluate the policy with parameters `trainable` on a sample, without dropout.

        With `sample` routing, one drawn expert e generated the sample. The gates are then one-hot at e, and log w_e,
        the log of the router's gate, adds to the log-probability.

        Args:
            trainable: θ.
            context: the microbatch and the frozen weights.
            sample: one sample of each of B conditions.
            reference: `reference_velocity` of the sample; None if nothing depends on the reference.
        """
        settings, cache = self.settings.policy, self.policy_cache(context, sample)
        if settings.uses_reference:
            cache = replace(cache, reference=reference)
        gates, _ = self.model.gates(trainable, context.encoded.condition)
        routing = None
        if sample.experts is not None:
            routing = jnp.log(jnp.take_along_axis(gates, sample.experts[:, None], axis=1)[:, 0])
        output = evaluate_policy(
            lambda params, x, t: self.velocity_at_points(params, context, x, t, sample_gates(gates, sample)),
            trainable,
            cache,
            settings,
            temperature=context.temperature,
            routing_log_prob=routing,
        )
        if routing is None or output.anchor is None:
            return output
        initial_gates = self.reference_gates(trainable, context)
        return replace(output, anchor=output.anchor + (gates * jnp.log(gates / initial_gates)).sum(-1))

    def reference_velocity(self, trainable, context: LossContext, sample: Sample) -> jax.Array:
        """Compute v_ref [R, N, 4C] at the points of a sample.

        The reference is `frozen["reference"]`: the experts and the router that the run started with, or the whole
        transformer that it started with. Without this entry it is the base. The base runs as the same graph as the
        policy, with gates of 0, so that equal velocities are equal in every bit. `trainable` then only has the shapes.
        """
        x, t = self.policy_cache(context, sample).points()
        reference = context.frozen.get("reference")
        if reference is not None:
            gates, _ = self.model.gates(reference, context.encoded.condition)
            return self.velocity_at_points(reference, context, x, t, sample_gates(gates, sample))
        gates = jnp.zeros((len(context.encoded.region), self.model.num_experts))
        return self.velocity_at_points(trainable, context, x, t, gates)

    def reference_gates(self, trainable, context: LossContext) -> jax.Array:
        """Compute the gates [B, E] that the run started with."""
        reference = context.frozen.get("reference")
        if reference is None:
            initial = jnp.asarray(self.model.initial_gates, jnp.float32)
            return jnp.broadcast_to(initial, (len(context.encoded.region), len(initial)))
        return self.model.gates(reference, context.encoded.condition)[0]

    def policy_loss(
        self,
        trainable,
        context: LossContext,
        sample: Sample,
        advantages: jax.Array,
        old: OldPolicy,
        reference: jax.Array | None,
        *,
        on_policy: jax.Array,
    ) -> tuple[jax.Array, tuple[Metrics, OldPolicy]]:
        """Compute w_policy·policy + w_kl·mean_Ω ‖v_θ − v_ref‖² + w_norm·norm_excess for one sample of each condition.

        With the estimator contrast, w_policy·policy is the whole `losses.contrast_policy_loss`.

        Args:
            trainable: θ.
            context: the microbatch, the frozen weights, and the temperature τ of the log-probability.
            sample: one sample of each of B conditions.
            advantages: A [B].
            old: terms of the old policy for the sample (`PolicyOutput.terms`).
            reference: `reference_velocity` of the sample; None if the loss does not depend on it.
            on_policy: bool scalar, whether θ_old equals θ. If so, the current policy's terms, without gradient, replace
                `old`, so that ρ is exactly 1.

        Returns:
            The loss, and (metrics, the terms of the old policy that the loss used).
        """
        settings = self.settings
        output = self.evaluate_policy(trainable, context, sample, reference)
        current = jax.lax.stop_gradient(output.terms)
        old = jax.tree.map(lambda new, old: jnp.where(on_policy, new, old), current, old)
        loss, metrics = policy_loss(
            output,
            old,
            advantages,
            settings.policy,
            temperature=context.temperature,
            strength=context.strength,
            mean=self.mean,
        )
        if settings.policy.estimator == "contrast":  # κ has the factor w_policy already
            loss /= settings.policy_loss_weight
        total, metrics = settings.policy_loss_weight * loss, metrics | {"policy_loss": loss}
        if settings.norm_guard_weight:
            excess = norm_excess(output.velocity, reference, context.encoded.region, self.mean)
            total += settings.norm_guard_weight * excess
            metrics["norm_guard_loss"] = excess
        if settings.kl_weight:
            kl = velocity_distance(output.velocity, reference, context.encoded.region, self.mean)
            total += settings.kl_weight * kl
            metrics["kl_loss"] = kl
        return total, (metrics, old)

    def router_features(self, encoded: EncodedBatch) -> jax.Array | None:
        """Compute the router's input [B, F] from a microbatch's conditions; None without a router."""
        return None if self.model.router is None else self.model.router_features(encoded.condition)

    def diversity_loss(
        self, trainable, features: jax.Array, weights: jax.Array, router_mean: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        """Compute w_diversity·diversity over all conditions of a step.

        Args:
            trainable: θ.
            features: `router_features` of every record of the step, [B, F].
            weights: [B], 1 / (records of the scene in the batch), so that a scene counts once.
            router_mean: running mean of the gates [E].

        Returns:
            The loss, and (the new running mean [E], metrics).
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
        """Compute metrics of the gates over distinct scenes.

        Returns:
            routing_expert_i_usage: how often gate i is the largest.
            routing_expert_i_weight: mean of gate i.
        """
        largest = jax.nn.one_hot(gates.argmax(-1), gates.shape[-1])
        usage, weight = self.mean(largest, weights), self.mean(gates, weights)
        return {f"routing_expert_{i}_usage": usage[i] for i in range(gates.shape[-1])} | {
            f"routing_expert_{i}_weight": weight[i] for i in range(gates.shape[-1])
        }

    def drift(self, trainable, context: LossContext, clean: jax.Array, step: jax.Array) -> Metrics:
        """Measure how far v_θ is from v_base on the images `clean` [B, N, 4C].

        (t, ε) are drawn as in the base loss, with `step` as the number of the update.

        Returns:
            velocity_norm_ratio: mean over records of ‖v_θ‖ / ‖v_base‖ (`norm_ratio`).
            kl_to_base: mean over records of mean_Ω ‖v_θ − v_base‖².
        """
        condition, region = context.encoded.condition, context.encoded.region
        noise, t, _ = self.sample_noise(context.batch, clean, context.seed, step)
        gates, _ = self.model.gates(trainable, condition)
        x = interpolate(clean, noise, t)
        velocity, base_velocity = self.policy_and_base_velocity(trainable, context.frozen, x, t, condition, gates)
        return {
            "velocity_norm_ratio": self.mean(norm_ratio(velocity, base_velocity, region)),
            "kl_to_base": self.mean(region_mean((velocity - base_velocity) ** 2, region)),
        }

    def policy_and_base_velocity(self, trainable, frozen, x, t, condition, gates) -> tuple[jax.Array, jax.Array]:
        """Compute v_θ and v_base at the same R points (x_t, t), [R, N, 4C] each."""
        # With gates of 0 the network is the base. The program of one pass over 2R rows has one copy of the network. Two
        # passes would need two copies. The two rows of a point are adjacent, so that both are on the same device.
        x, t, condition = jax.tree.map(lambda leaf: repeat_rows(leaf, 2), (x, t, condition))
        paired_gates = jnp.stack([gates, jnp.zeros_like(gates)], axis=1).reshape(-1, gates.shape[-1])
        velocity = self.velocity(trainable, frozen, x, t, condition, Adapter(paired_gates))
        return velocity[0::2], velocity[1::2]


def sample_gates(gates: jax.Array | None, sample: Sample) -> jax.Array | None:
    """Return the gates [B, E] that generated a sample: one-hot at the drawn expert with `sample` routing."""
    if gates is None or sample.experts is None:
        return gates
    return jax.nn.one_hot(sample.experts, gates.shape[-1])
