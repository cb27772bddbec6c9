"""What a finished run shows: a figure of its curves."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from ra_jax.training.metrics import FILE, read_rows

# One panel each, left out where none of its metrics was recorded; two more show the experts.
PANELS = {
    "Loss": ("train_loss", "base_loss"),
    "Policy loss": ("policy_loss",),
    "KL loss": ("kl_loss",),
    "Diversity loss": ("diversity_loss",),
    "Ratio": ("mean_ratio",),
    "Clipping and KL": ("clip_fraction", "clip_fraction_at_sync", "approx_kl"),
    "Policy temperature": ("policy_temperature",),
    "Reward": ("mean_reward", "reward_std"),
    "Scores": ("removal_score", "background_score", "smoothness_score"),
    "Gradient norm": ("grad_norm",),
    "Velocity norm, to the base": ("velocity_norm_ratio",),
    "Learning rate": ("lr",),
    "Seconds a step": ("step_time",),
}
COLUMNS = 3


def plot_curves(output_dir: Path, expert_names: Sequence[str] = ()) -> Path:
    """Draw the run's metrics.jsonl as `curves.png` in its folder; returns the picture's path."""
    rows = read_rows(output_dir / FILE)
    recorded = set().union(*rows) if rows else set()
    experts = {
        f"Expert {kind}": {f"routing_expert_{i}_{kind}": name for i, name in enumerate(expert_names)}
        for kind in ("usage", "weight")
    }
    labels = {title: {name: name for name in names} for title, names in PANELS.items()} | experts
    panels = {title: {k: v for k, v in names.items() if k in recorded} for title, names in labels.items()}
    panels = {title: names for title, names in panels.items() if names}
    height = max(1, -(-len(panels) // COLUMNS))
    figure, axes = plt.subplots(height, COLUMNS, figsize=(4.2 * COLUMNS, 2.6 * height), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=False):
        for name, label in names.items():
            points = [(row["step"], row[name]) for row in rows if name in row]
            axis.plot(*zip(*points, strict=True), label=label, linewidth=1, marker="." if len(points) < 20 else None)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=7)
    figure.tight_layout()
    path = output_dir / "curves.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
