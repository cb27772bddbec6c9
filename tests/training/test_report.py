"""The figure of a run's curves."""

import json

from matplotlib import pyplot as plt

from ra_jax.training.report import plot_curves


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
