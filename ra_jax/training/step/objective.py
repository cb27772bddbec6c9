"""The loss of a step, DESIGN §5, term by term; its diversity term is taken over all microbatches at once:

total = w_base·base + w_policy·policy + w_diversity·diversity + w_kl·mean_Ω ‖v_θ − v_ref‖²
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp

from ra_jax.data.batch import Batch
from ra_jax.flow.path import interpolate
from ra_jax.flow.regions import region_mean
from ra_jax.flow.schedule import FlowSchedule
from ra_jax.models.fill_model import FillModel, Weights
from ra_jax.models.router import diversity_loss
from ra_jax.parallel.collectives import all_mean, all_sum
from ra_jax.rl.estimators import repeat
from ra_jax.rl.losses import flow_matching_error
from ra_jax.rl.policy import Judgement, PolicySettings, Record, distance, judge, policy_loss
from ra_jax.rl.rollouts import Member
from ra_jax.training.step.encode import Encoded, group_keys_of
from ra_jax.training.step.state import TrainState, keys_for, stream

Metrics = dict[str, jax.Array]


@dataclass(frozen=True)
class ObjectiveSettings:
    """What a step optimises. policy: None without a policy term (rewards and `--enable_grpo_loss`); points_apart: its
    points in time are visited one after another, so that memory is that of one, for a forward pass more of each."""

    guidance_scale: float = 30.0
    loss_region: str = "balanced"
    base_loss_weight: float = 1.0
    policy_loss_weight: float = 0.1
    diversity_loss_weight: float = 0.05
    kl_weight: float = 0.0
    policy: PolicySettings | None = None
    points_apart: bool = False
    dropout: bool = False
    routing_decay: float = 0.9
    routing_specialisation: float = 0.5


@dataclass(frozen=True)
class Objective:
    """The loss as pure functions of arrays; the object itself is static."""

    model: FillModel
    schedule: FlowSchedule
    settings: ObjectiveSettings = field(default_factory=ObjectiveSettings)

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

    def noised(
        self, batch: Batch, clean: jax.Array, seed: jax.Array, update: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The base loss's draws, one a record and update of the run: noise [B, N, 4C], t [B], dropout keys [B]."""
        keys = keys_for(jax.random.fold_in(stream(seed, "base"), update), batch["record_id"])
        noise_key, time_key, dropout_key = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)
        tokens, features = clean.shape[1:]
        noise = jax.vmap(lambda key: jax.random.normal(key, (tokens, features), jnp.float32))(noise_key)
        return noise, jax.vmap(lambda key: self.schedule.training_time(key, tokens))(time_key), dropout_key

    def base(
        self, trainable, frozen: Weights, batch: Batch, encoded: Encoded, seed, update: jax.Array, *, axis_name=None
    ) -> tuple[jax.Array, Metrics]:
        """Weighted flow-matching loss of a microbatch's results, with its metric; `update`: its number in the run."""
        gates, _ = self.model.gates(trainable, encoded.condition)
        noise, t, dropout_keys = self.noised(batch, encoded.clean, seed, update)
        predicted = self.velocity(
            trainable,
            frozen,
            interpolate(encoded.clean, noise, t),
            t,
            encoded.condition,
            gates,
            dropout_keys if self.settings.dropout else None,
        )
        errors = flow_matching_error(predicted, encoded.clean, noise, encoded.region)
        base = all_mean(batch["imitation_weight"] * errors, axis_name)
        return self.settings.base_loss_weight * base, {"base_loss": base}

    def judge(
        self,
        trainable,
        frozen: Weights,
        batch: Batch,
        encoded: Encoded,
        member: Member,
        state: TrainState,
        *,
        experts: bool = True,
    ) -> Judgement:
        """What the policy `trainable` makes of a member; dropout off. Without `experts` the policy is the base.

        Of `state` the seed and the temperature are read.
        """
        gates = self.model.gates(trainable, encoded.condition)[0] if experts else None
        routing = None
        if gates is not None and member.experts is not None:
            routing = jnp.log(jnp.take_along_axis(gates, member.experts[:, None], axis=1)[:, 0])
            gates = jax.nn.one_hot(member.experts, gates.shape[-1])

        def velocity(params, x, t):
            points = len(x) // len(encoded.region)
            if self.settings.points_apart:
                return one_by_one(
                    lambda x, t: self.velocity(params, frozen, x, t, encoded.condition, gates), x, t, points
                )
            condition, point_gates = jax.tree.map(lambda leaf: repeat(leaf, points), (encoded.condition, gates))
            return self.velocity(params, frozen, x, t, condition, point_gates)

        return judge(
            velocity,
            trainable,
            member,
            group_keys_of(batch, state.seed),
            encoded.region,
            self.settings.policy,
            temperature=state.temperature,
            routing_log_prob=routing,
        )

    def policy(
        self,
        trainable,
        frozen: Weights,
        batch: Batch,
        encoded: Encoded,
        member: Member,
        advantages: jax.Array,
        old: Record,
        state: TrainState,
        *,
        fresh: jax.Array,
        axis_name: str | None = None,
    ) -> tuple[jax.Array, tuple[Metrics, Record]]:
        """Weighted policy (and KL) loss of a member of each group [B], with its metrics and what is to be remembered.

        fresh: θ_old *is* θ: its record is stop_gradient(θ's), so that ρ is exactly 1.
        """
        set_, mean = self.settings, partial(all_mean, axis_name=axis_name)
        judgement = self.judge(trainable, frozen, batch, encoded, member, state)
        record = jax.lax.stop_gradient(judgement.record)
        old = jax.tree.map(lambda new, old: jnp.where(fresh, new, old), record, old)
        loss, metrics = policy_loss(judgement, old, advantages, set_.policy, mean=mean)
        total, metrics = set_.policy_loss_weight * loss, metrics | {"policy_loss": loss}
        if set_.kl_weight:
            base = self.judge(trainable, frozen, batch, encoded, member, state, experts=False)
            kl = distance(judgement.velocity, base.velocity, encoded.region, mean)
            total += set_.kl_weight * kl
            metrics["kl_loss"] = kl
        return total, (metrics, old)

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

    def drift(
        self, frozen: Weights, batch: Batch, encoded: Encoded, clean: jax.Array, state: TrainState, *, axis_name=None
    ) -> Metrics:
        """How far the velocity is from the base's (experts off), over images `clean` at the base loss's (t, ε):
        velocity_norm_ratio, the mean over records of ‖v_θ‖ / ‖v_base‖, and kl_to_base, of mean_Ω ‖v_θ − v_base‖².
        """
        noise, t, _ = self.noised(batch, clean, state.seed, state.step)
        gates, _ = self.model.gates(state.trainable, encoded.condition)
        x = interpolate(clean, noise, t)
        policy, base = self.with_and_without_experts(state.trainable, frozen, x, t, encoded.condition, gates)
        return {
            "velocity_norm_ratio": all_mean(norm_ratio(policy, base, encoded.region), axis_name),
            "kl_to_base": all_mean(region_mean((policy - base) ** 2, encoded.region), axis_name),
        }

    def with_and_without_experts(self, trainable, frozen, x, t, condition, gates) -> tuple[jax.Array, jax.Array]:
        """Velocities of the experts and of the base alone at the same R points, [R, N, 4C] each."""
        # Gates of 0 are the base: one pass of 2R rows leaves the compiler one copy of the network, not two.
        # A point's two rows are neighbours, so that they stay on the device where the point is.
        x, t, condition = jax.tree.map(lambda leaf: repeat(leaf, 2), (x, t, condition))
        both = jnp.stack([gates, jnp.zeros_like(gates)], axis=1).reshape(-1, gates.shape[-1])
        velocity = self.velocity(trainable, frozen, x, t, condition, both)
        return velocity[0::2], velocity[1::2]


def one_by_one(velocity: Callable, x: jax.Array, t: jax.Array, points: int) -> jax.Array:
    """`velocity` of x [R, N, 4C], t [R], where a record's `points` rows stand side by side, at a point of every record
    at a time; its backward pass begins with the forward pass of that point."""
    x_by_point, t_by_point = (jnp.moveaxis(a.reshape(-1, points, *a.shape[1:]), 1, 0) for a in (x, t))
    found = jax.lax.map(jax.checkpoint(lambda point: velocity(*point)), (x_by_point, t_by_point))
    return jnp.moveaxis(found, 0, 1).reshape(x.shape)


def norm_ratio(velocity: jax.Array, base: jax.Array, region: jax.Array) -> jax.Array:
    """‖v‖ / ‖v_base‖ [R], norms of velocities [R, N, 4C] over mean_Ω (`region` [R, N, 4])."""
    return jnp.sqrt(region_mean(velocity**2, region) / region_mean(base**2, region))


def routing_metrics(gates: jax.Array, weights: jax.Array, axis_name: str | None) -> Metrics:
    """Over distinct conditions: the fraction whose largest gate is i (usage), and the mean gate (weight)."""
    largest = jax.nn.one_hot(gates.argmax(-1), gates.shape[-1])
    usage, weight = all_mean(largest, axis_name, weights), all_mean(gates, axis_name, weights)
    return {f"routing_expert_{i}_usage": usage[i] for i in range(gates.shape[-1])} | {
        f"routing_expert_{i}_weight": weight[i] for i in range(gates.shape[-1])
    }
