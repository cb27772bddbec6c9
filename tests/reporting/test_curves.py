"""`curves.png`, the figure of a run's curves, and which metrics share a chart."""

import json

from matplotlib import pyplot as plt

from ra_jax.reporting.curves import plot_curves, recorded_charts


def test_experts_bear_their_names_and_what_was_not_recorded_has_no_panel(tmp_path, monkeypatch):
    row = {"train_loss": 1.0} | {f"routing_expert_{i}_usage": 0.5 for i in range(2)}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": step} | row) + "\n" for step in (1, 2)))
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    assert plot_curves(tmp_path, ("fast", "careful")).exists()
    titles = [axis.get_title() for axis in drawn[0].axes if axis.axison]
    assert titles == ["Loss", "Expert usage"]
    legend = drawn[0].axes[1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["fast", "careful"]


def test_scores_are_known_by_their_ending_and_drawn_once():
    rows = [
        {"step": 1, "removal_score": 0.5},
        {"step": 2, "lpips_score": 0.5, "background_score": 0.5, "held_out_flow_loss": 1},
    ]
    panels = recorded_charts(rows)
    assert list(panels) == ["Scores", "Held-out flow loss"]
    assert list(panels["Scores"]) == ["removal_score", "background_score", "lpips_score"]


def test_a_run_without_rows_has_no_panels(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert recorded_charts([], ("fast",)) == {}
    assert plot_curves(tmp_path, ("fast",)).exists()
