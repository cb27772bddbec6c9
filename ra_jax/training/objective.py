"""The loss of a step, DESIGN §5; its diversity term is taken over all microbatches at once:

total = w_base·base + w_policy·policy + w_diversity·diversity + w_kl·mean_Ω ‖v_θ − v_ref‖²
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ra_jax.flow.path import interpolate
from ra_jax.flow.regions import region_mean, region_weights
from ra_jax.flow.schedule import FlowSchedule
from ra_jax.inference.sampling import Batch, as_diptych, diptych_condition, diptych_mask
from ra_jax.models.conditioning import Condition
from ra_jax.models.fill_model import FillModel, Weights
from ra_jax.models.router import diversity_loss
from ra_jax.rl.estimators import MatchingCache, matching_cache, matching_log_prob
from ra_jax.rl.losses import clipped_policy_loss, flow_matching_error
from ra_jax.training.mesh import all_mean, all_sum
from ra_jax.training.state import TrainState, keys_for, stream

Metrics = dict[str, jax.Array]


@dataclass(frozen=True)
class ObjectiveSettings:
    """What a step optimises. learn_policy: whether there is a policy term (rewards and `--enable_grpo_loss`)."""

    guidance_scale: float = 30.0
    loss_region: str = "balanced"
    base_loss_weight: float = 1.0
    policy_loss_weight: float = 0.1
    diversity_loss_weight: float = 0.05
    kl_weight: float = 0.0
    learn_policy: bool = False
    clip_range: float = 0.2
    policy_pairs: int = 4
    policy_fraction: float = 0.7
    dropout: bool = False
    routing_decay: float = 0.9
    routing_specialisation: float = 0.5


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Encoded:
    """A microbatch as the network sees it, and what the old policy thought of it.

    condition; clean: x0 of the results [B, N, 4C]; region: mean_Ω's weights [B, N, 4]; cache and old_log_prob [B]:
    None without a policy term.
    """

    condition: Condition
    clean: jax.Array
    region: jax.Array
    cache: MatchingCache | None = None
    old_log_prob: jax.Array | None = None


@dataclass(frozen=True)
class Objective:
    """The loss as pure functions of arrays; the object itself is static."""

    model: FillModel
    schedule: FlowSchedule
    settings: ObjectiveSettings

    def encode(self, frozen: Weights, batch: Batch, seed: jax.Array) -> Encoded:
        """Images to latents, by frozen weights: nothing here is differentiated. The VAE's mean is used.

        The policy's (t, ε) derive from (seed, epoch, group): a group shares them wherever its members stand.
        """
        set_ = self.settings
        condition = diptych_condition(self.model, frozen, batch)
        clean = self.model.encode(frozen, as_diptych(batch, "result"))
        region = region_weights(diptych_mask(batch), self.model.factor, set_.loss_region)
        if not set_.learn_policy:
            return Encoded(condition, clean, region)
        keys = keys_for(stream(seed, "policy"), batch["epoch"], batch["group_id"])
        cache = matching_cache(keys, clean, region, count=set_.policy_pairs, fraction=set_.policy_fraction)
        return Encoded(condition, clean, region, cache)

    def velocity(self, trainable, frozen, x, t, condition, gates, dropout_key=None) -> jax.Array:
        return self.model.velocity(
            trainable,
            frozen,
            x,
            t,
            condition,
            gates=gates,
            guidance_scale=self.settings.guidance_scale,
            dropout_key=dropout_key,
        )

    def log_prob(
        self, trainable, frozen: Weights, encoded: Encoded, temperature, *, experts: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """ℓ [B] and the velocities it took [B·K, N, 4C]: one graph for θ and θ_old, dropout off."""

        def velocity(params, x, t, records):
            gates = self.model.gates(params, encoded.condition)[0] if experts else None
            condition = jax.tree.map(lambda leaf: leaf[records], encoded.condition)
            return self.velocity(params, frozen, x, t, condition, None if gates is None else gates[records])

        return matching_log_prob(velocity, trainable, encoded.cache, temperature=temperature)

    def noised(self, batch: Batch, encoded: Encoded, state: TrainState) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The base loss's draws, one a record and step: noise [B, N, 4C], t [B], dropout keys [B]."""
        keys = keys_for(jax.random.fold_in(stream(state.seed, "base"), state.step), batch["record_id"])
        noise_key, time_key, dropout_key = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)
        tokens, features = encoded.clean.shape[1:]
        noise = jax.vmap(lambda key: jax.random.normal(key, (tokens, features), jnp.float32))(noise_key)
        return noise, jax.vmap(lambda key: self.schedule.training_time(key, tokens))(time_key), dropout_key

    def __call__(
        self, trainable, frozen: Weights, batch: Batch, encoded: Encoded, state: TrainState, *, fresh, axis_name=None
    ) -> tuple[jax.Array, Metrics]:
        """Loss of a microbatch, base and policy, with its metrics; `diversity` is the whole step's.

        Of `state` the seed, step and temperature are read; `fresh`: θ_old *is* θ, so that
        ℓ_old = stop_gradient(ℓ_θ) and ρ is exactly 1.
        """
        set_ = self.settings
        gates, _ = self.model.gates(trainable, encoded.condition)
        noise, t, dropout_keys = self.noised(batch, encoded, state)
        predicted = self.velocity(
            trainable,
            frozen,
            interpolate(encoded.clean, noise, t),
            t,
            encoded.condition,
            gates,
            dropout_keys if set_.dropout else None,
        )
        errors = flow_matching_error(predicted, encoded.clean, noise, encoded.region)
        base = all_mean(batch["imitation_weight"] * errors, axis_name)
        total, metrics = set_.base_loss_weight * base, {"base_loss": base}
        if set_.learn_policy:
            policy, policy_metrics = self.policy(trainable, frozen, batch, encoded, state, fresh, axis_name)
            total += policy
            metrics |= policy_metrics
        return total, metrics | {"train_loss": total}

    def features(self, encoded: Encoded) -> jax.Array | None:
        """What the router sees of a microbatch's conditions, [B, F]; None without a router."""
        return None if self.model.router is None else self.model.router_features(encoded.condition)

    def diversity(
        self, trainable, features: jax.Array, weights: jax.Array, router_mean: jax.Array, *, axis_name=None
    ) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        """Weighted diversity loss of all conditions of a step; with it the router's new running mean [E] and metrics.

        features: `router_features` [B, F] of every record; weights: [B], such that a condition counts once.
        """
        set_ = self.settings
        gates, soft_gates = self.model.gates_of(trainable, features)
        loss, router_mean = diversity_loss(
            soft_gates,
            weights,
            router_mean,
            decay=set_.routing_decay,
            specialisation=set_.routing_specialisation,
            all_sum=lambda x: all_sum(x, axis_name),
        )
        metrics = {"diversity_loss": loss} | routing_metrics(gates, weights, axis_name)
        return set_.diversity_loss_weight * loss, (router_mean, metrics)

    def policy(self, trainable, frozen, batch, encoded, state, fresh, axis_name) -> tuple[jax.Array, Metrics]:
        """Weighted policy (and KL) loss of a microbatch, with its metrics."""
        set_ = self.settings
        log_prob, predicted = self.log_prob(trainable, frozen, encoded, state.temperature)
        old = jnp.where(fresh, jax.lax.stop_gradient(log_prob), encoded.old_log_prob)
        loss, metrics = clipped_policy_loss(
            log_prob,
            old,
            batch["advantage"],
            clip_range=set_.clip_range,
            mean=lambda x: all_mean(x, axis_name),
        )
        total = set_.policy_loss_weight * loss
        metrics["policy_loss"] = loss
        if set_.kl_weight:
            _, reference = self.log_prob(trainable, frozen, encoded, state.temperature, experts=False)
            pairs = jnp.repeat(encoded.region, set_.policy_pairs, axis=0)
            kl = all_mean(region_mean((predicted - jax.lax.stop_gradient(reference)) ** 2, pairs), axis_name)
            total += set_.kl_weight * kl
            metrics["kl_loss"] = kl
        return total, metrics

    def velocity_norm_ratio(self, state: TrainState, frozen: Weights, batch: Batch, encoded: Encoded, axis_name=None):
        """Drift: the mean over records of ‖v_θ‖ / ‖v_base‖ at the base loss's (t, ε); v_base has the experts off."""
        noise, t, _ = self.noised(batch, encoded, state)
        x = interpolate(encoded.clean, noise, t)
        gates, _ = self.model.gates(state.trainable, encoded.condition)
        # Gates of 0 are the base: one pass of 2B rows leaves the compiler one copy of the network, not two.
        x, t, condition = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), (x, t, encoded.condition))
        both = jnp.concatenate([gates, jnp.zeros_like(gates)])
        velocity = self.velocity(state.trainable, frozen, x, t, condition, both)
        policy, base = jnp.split(velocity, 2)
        norms = (jnp.sqrt(region_mean(v**2, encoded.region)) for v in (policy, base))
        return all_mean(jnp.divide(*norms), axis_name)


def routing_metrics(gates: jax.Array, weights: jax.Array, axis_name: str | None) -> Metrics:
    """Over distinct conditions: the fraction whose largest gate is i (usage), and the mean gate (weight)."""
    largest = jax.nn.one_hot(gates.argmax(-1), gates.shape[-1])
    usage, weight = all_mean(largest, axis_name, weights), all_mean(gates, axis_name, weights)
    return {f"routing_expert_{i}_usage": usage[i] for i in range(gates.shape[-1])} | {
        f"routing_expert_{i}_weight": weight[i] for i in range(gates.shape[-1])
    }
