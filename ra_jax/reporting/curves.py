"""The charts of a run: which metrics share a chart, and the figure `curves.png`."""

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from ra_jax.outputs import replace_file
from ra_jax.reporting.trackers import METRICS_FILE, read_rows

DRIFT_TITLE, USAGE_TITLE, GATES_TITLE = "Held-out drift", "Expert usage", "Expert weight"
HELD_OUT_TITLE = "Held-out reward"
# Title of a chart -> names or patterns of its metrics. A chart is left out if none of its metrics is recorded.
# `recorded_charts` adds the charts of the experts.
CHARTS = {
    "Loss": ("train_loss", "base_loss"),
    "Policy loss": ("policy_loss",),
    "KL loss": ("kl_loss",),
    "Diversity loss": ("diversity_loss",),
    "Ratio": ("mean_ratio",),
    "Clipping and KL": ("clip_fraction", "clip_fraction_at_sync", "approx_kl"),
    "Policy temperature": ("policy_temperature",),
    HELD_OUT_TITLE: ("held_out_reward",),
    "Held-out scores": ("held_out_*_score",),
    "Reward": ("mean_reward", "reward_std"),
    "Scores": ("removal_score", "background_score", "smoothness_score", "*_score"),
    "Groups with equal rewards": ("frac_reward_zero_std",),
    "Reward fallbacks": ("reward_fallbacks",),
    "Velocity norm relative to the base": ("velocity_norm_ratio", "held_out_velocity_norm_ratio"),
    "KL to the base": ("kl_to_base",),
    "Distance from the reference": ("reference_distance",),
    "Held-out flow loss": ("held_out_flow_loss",),
    DRIFT_TITLE: ("held_out_flow_drift",),
    "Gradient norm": ("grad_norm",),
    "Learning rate": ("lr",),
    "Seconds per step": ("step_time",),
}
NUM_COLUMNS = 3


def recorded_charts(rows: Sequence[Mapping[str, float]], expert_names: Sequence[str] = ()) -> dict[str, dict[str, str]]:
    """Return the charts for which the rows of a run have metrics, as {title: {metric: label}}.

    The charts of `CHARTS` come first. The charts of the experts' usage and gates follow; in them, `expert_names` are
    the labels of experts 0, 1, ...
    """
    recorded = sorted(set().union(*rows))
    charts = {
        title: {
            metric: metric
            for pattern in patterns
            for metric in fnmatch.filter(recorded, pattern)
            if metric.startswith("held_out_") == pattern.startswith("held_out_")
        }
        for title, patterns in CHARTS.items()
    }
    for title, kind in ((USAGE_TITLE, "usage"), (GATES_TITLE, "weight")):
        labels = {f"routing_expert_{i}_{kind}": name for i, name in enumerate(expert_names)}
        charts[title] = {metric: label for metric, label in labels.items() if metric in recorded}
    return {title: labels for title, labels in charts.items() if labels}


def plot_curves(output_dir: Path, expert_names: Sequence[str] = ()) -> Path:
    """Draw the metrics of the run in `output_dir` as `curves.png` in this folder, and return the path of the figure."""
    rows = read_rows(output_dir / METRICS_FILE)
    charts = recorded_charts(rows, expert_names)
    num_rows = max(1, -(-len(charts) // NUM_COLUMNS))
    figure, axes = plt.subplots(num_rows, NUM_COLUMNS, figsize=(4.2 * NUM_COLUMNS, 2.6 * num_rows), squeeze=False)
    for axis in axes.flat[len(charts) :]:
        axis.axis("off")
    for axis, (title, labels) in zip(axes.flat, charts.items(), strict=False):
        for metric, label in labels.items():
            points = [(row["step"], row[metric]) for row in rows if metric in row]
            axis.plot(*zip(*points, strict=True), label=label, linewidth=1, marker="." if len(points) < 20 else None)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if len(labels) > 1:
            axis.legend(fontsize=7)
    figure.tight_layout()
    path = output_dir / "curves.png"
    with replace_file(path) as draft:
        figure.savefig(draft, dpi=110, format="png")
    plt.close(figure)
    return path
