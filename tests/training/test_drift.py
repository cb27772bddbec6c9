"""The guard of --max_drift: its measurements, its choice of the best checkpoint, and a run that it stops."""

import jax
import numpy as np
import pytest

from ra_jax.reporting.trackers import read_rows
from ra_jax.training.drift import Drift, DriftGuard
from ra_jax.training.loop import train
from ra_jax.training.setup import set_up

WITHIN = Drift(flow_loss=0.3, flow_drift=0.01, velocity_norm_ratio=1.0)


@pytest.fixture(scope="module")
def guard(make_automatic_config, scored_scenes):
    """(a guard on the ground truths of the scenes, the set-up of its run)."""
    setup = set_up(make_automatic_config(val_json_path=str(scored_scenes / "triplets.json"), max_drift=0.05))
    return setup.guard, setup


@pytest.fixture
def bare_guard():
    """A guard without data: it can compare drifts, but not measure any."""
    guard = DriftGuard.__new__(DriftGuard)
    guard.limit, guard.best_score = 0.05, -np.inf
    return guard


def test_fresh_experts_have_not_drifted_and_others_have(guard):
    guard, setup = guard
    fresh = guard.measure(setup.state.trainable, setup.frozen)
    assert fresh.flow_drift == pytest.approx(0.0, abs=1e-6)
    assert fresh.velocity_norm_ratio == pytest.approx(1.0, abs=1e-6)
    moved = guard.measure(jax.tree.map(lambda x: x + 1.0, setup.state.trainable), setup.frozen)
    assert moved.flow_loss / fresh.flow_loss - 1 == pytest.approx(moved.flow_drift, rel=1e-4)
    assert abs(moved.flow_drift) > 0.01 and abs(moved.velocity_norm_ratio - 1) > 0.01


def test_the_limit_applies_to_both_measurements_and_nan_exceeds_it():
    assert WITHIN.excess(0.05) is None
    assert "6.0% above the base's" in Drift(0.3, 0.06, 1.0).excess(0.05)
    assert "velocity_norm_ratio on held-out results is 1.060" in Drift(0.3, 0.0, 1.06).excess(0.05)
    assert Drift(0.3, -0.5, 0.5).excess(0.05) is None  # a lower loss and a lower norm are allowed
    for broken in (Drift(np.nan, np.nan, 1.0), Drift(0.3, 0.0, np.nan)):
        assert "nan" in broken.excess(0.05)


def test_the_best_has_the_highest_reward_within_the_limit(bare_guard):
    def best(reward, drift=WITHIN):
        return bare_guard.update_best(drift, {} if reward is None else {"mean_reward": reward}, "automatic")

    assert [best(None), best(-0.4), best(-0.5), best(-0.35), best(None), best(0.9, Drift(0.3, 0.2, 1.0))] == [
        *(False, True, False, True, False, False)
    ]


def test_without_generated_images_the_best_has_the_lowest_flow_loss(bare_guard):
    results = [bare_guard.update_best(Drift(loss, 0.0, 1.0), {"mean_reward": 0.5}, "human") for loss in (0.3, 0.4, 0.2)]
    assert results == [True, False, True]


def test_the_best_score_of_earlier_rows_is_restored(bare_guard):
    row = {f"held_out_{name}": value for name, value in vars(WITHIN).items()}
    bare_guard.restore_best_score(
        [row | {"mean_reward": 0.2}, {"mean_reward": 0.9}, {"held_out_flow_loss": 0.1}], "automatic"
    )
    assert bare_guard.best_score == 0.2


def test_drift_beyond_the_limit_stops_the_run_and_keeps_its_best(make_automatic_config, scored_scenes):
    """The weight of the policy loss is a hundred times too large."""
    config = make_automatic_config(
        val_json_path=str(scored_scenes / "triplets.json"),
        max_drift=0.05,
        drift_steps=1,
        max_train_steps=30,
        policy_loss_weight=100.0,
        negative_advantages="keep",
        learning_rate=0.03,
    )
    output = train(config)
    rows = read_rows(output / "metrics.jsonl")
    assert rows[-1]["step"] < 30
    assert rows[-1]["held_out_flow_drift"] > 0.05 or rows[-1]["held_out_velocity_norm_ratio"] > 1.05
    within = [row for row in rows if row["held_out_flow_drift"] <= 0.05 and row["held_out_velocity_norm_ratio"] <= 1.05]
    best = max(within, key=lambda row: row["mean_reward"])["step"]
    assert [path.name for path in (output / "best").iterdir()] == [str(best)]
    assert "max_drift = 0.05" in (output / "report.html").read_text()
