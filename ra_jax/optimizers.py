"""Optax optimizers and learning-rate schedules by name. A schedule counts steps; a step makes one or more updates."""

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon, prodigy

from ra_jax.config.settings import OptimizationConfig

MATRICES = ("kernel", "lora_a", "lora_b")


def learning_rate_schedule(config: OptimizationConfig, peak: float, total_steps: int) -> optax.Schedule:
    """Build the learning-rate schedule: step number (from 0) -> learning rate.

    Every schedule but `constant` starts with a linear warm-up to `peak`. Then `constant_with_warmup` stays at `peak`;
    `linear`, `cosine` and `polynomial` decay to 0 at `total_steps`.
    """
    if config.lr_scheduler == "constant":
        return optax.constant_schedule(peak)
    warmup_steps, decay_steps = config.lr_warmup_steps, max(total_steps - config.lr_warmup_steps, 1)
    decay = {
        "constant_with_warmup": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, 0.0, decay_steps),
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay_steps),
        "polynomial": lambda: optax.polynomial_schedule(peak, 0.0, config.lr_power, decay_steps),
    }[config.lr_scheduler]()
    # The warm-up starts at peak/(warmup_steps + 1) and not at 0, so that the first step changes the weights.
    warmup = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
    return optax.join_schedules([warmup, decay], [warmup_steps]) if warmup_steps else decay


def _leaf_names(params):
    """Replace every leaf by its name (kernel, bias, lora_a, …)."""

    def name(path, _):
        keys = [str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path]
        return next(key for key in reversed(keys) if key not in ("value", ""))

    return jax.tree_util.tree_map_with_path(name, params)


def weight_decay_mask(params):
    """Replace every leaf by whether weight decay applies to it: to matrices, but not to biases, norms and scales."""
    return jax.tree.map(lambda name: name in MATRICES, _leaf_names(params))


def muon_dimensions(params):
    """Replace every leaf that Muon updates by its matrix axes, and every leaf that Adam updates by None.

    Muon orthogonalizes every matrix, including matrices that are stacked on leading axes. Without these axes, Optax
    would give stacked matrices [L, in, out] to Adam and treat stacked biases [L, out] as matrices.
    """

    def dimensions(name, leaf):
        if name not in MATRICES:
            return None
        return MuonDimensionNumbers(reduction_axis=leaf.ndim - 2, output_axis=leaf.ndim - 1)

    return jax.tree.map(dimensions, _leaf_names(params), params)


def _make_optimizer(config: OptimizationConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    b1, b2, eps, decay = config.adam_beta1, config.adam_beta2, config.adam_epsilon, config.adam_weight_decay
    match config.optimizer:
        case "adamw":
            return optax.adamw(schedule, b1, b2, eps, weight_decay=decay, mask=weight_decay_mask)
        case "adafactor":
            # Optax's adafactor does not multiply weight decay by the learning rate. Here the decay is added before
            # the schedule, which multiplies it, so that the setting means the same as for AdamW.
            return optax.chain(
                optax.adafactor(None, multiply_by_parameter_scale=False),
                # Without a learning rate adafactor returns negated gradients, so the decay is negated as well.
                optax.add_decayed_weights(-decay, mask=weight_decay_mask),
                optax.scale_by_schedule(schedule),
            )
        case "muon":
            return muon(
                schedule,
                beta=b1,
                weight_decay=decay,
                weight_decay_mask=weight_decay_mask,
                adam_b1=b1,
                adam_b2=b2,
                eps=eps,
                muon_weight_dimension_numbers=muon_dimensions,
                consistent_rms=0.2,  # makes updates as large as AdamW's, so that the same learning rates fit
            )
        case "prodigy":
            return prodigy(schedule, (b1, b2), eps=eps, weight_decay=decay)
    raise ValueError(f"optimizer={config.optimizer!r}: expected adamw, adafactor, muon or prodigy")


def build_optimizer(
    config: OptimizationConfig, total_steps: int, updates: int = 1
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Build the optimizer of a {"flux": …, "router": …} tree, and the learning-rate schedule that metrics report.

    Gradients are first scaled down to a global norm of at most `max_grad_norm`. The router may have its own learning
    rate. The schedules count steps, but Optax counts updates. A step makes `updates` updates.
    """

    def by_update(schedule: optax.Schedule) -> optax.Schedule:
        return lambda count: schedule(count // updates)

    schedule = learning_rate_schedule(config, config.learning_rate, total_steps)
    optimizer = _make_optimizer(config, by_update(schedule))
    if config.router_learning_rate is not None:
        router_schedule = learning_rate_schedule(config, config.router_learning_rate, total_steps)
        optimizers = {"flux": optimizer, "router": _make_optimizer(config, by_update(router_schedule))}
        optimizer = optax.partition(optimizers, lambda params: {name: name for name in params})
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optimizer), schedule
