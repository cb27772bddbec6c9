"""GRPO on automatic rewards: what a step generates, judges and learns, and what happens where rewards fail."""

import json
import logging
from dataclasses import replace
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ra_jax.config import ConfigError, RolloutConfig
from ra_jax.data.diptych import right_panel
from ra_jax.data.loader import Loader
from ra_jax.inference.sampling import initial_noise, make_remover
from ra_jax.rl.rewards import REWARDS, RewardInputs
from ra_jax.rl.rollouts import Member
from ra_jax.rl.user_rewards import Reward, RewardError
from ra_jax.training import programs
from ra_jax.training.checkpoints import CheckpointError, find_checkpoint, named_leaves, read_about, restore
from ra_jax.training.encoded import encode
from ra_jax.training.experience import collect
from ra_jax.training.generation import decode_panels, drawn_experts, roll_out_members
from ra_jax.training.loop import RunCheckpoints, train
from ra_jax.training.metrics import read_rows
from ra_jax.training.setup import refuse_another_base, set_up
from ra_jax.training.step import learn

GENERATIONS, CONDITIONS = 3, 2
STILL = {"learning_rate": 1e-30, "adam_weight_decay": 0.0}  # too small a step to change any weight


@pytest.fixture(scope="module")
def photos(scored_scenes, tmp_path_factory):
    """Photos and masks without results: nothing but rewards to learn from, which makes for small programs."""
    records = json.loads((scored_scenes / "labeled_dict.json").read_text())[::4]
    for record in records:
        del record["result"], record["scores"]
        for name in ("src", "mask", "ref"):
            record[name] = str(scored_scenes / record[name])
    path = tmp_path_factory.mktemp("photos") / "photos.json"
    path.write_text(json.dumps(records))
    return {"train_json_path": str(path), "base_loss_weight": 0.0}


@pytest.fixture(scope="module")
def automatic(config_in, scored_scenes, tmp_path_factory):
    """automatic(**flags) -> TrainConfig of a run in a folder of its own: 2 conditions of 3 rollouts of 6 steps."""

    def make(**flags):
        settings = {
            "train_json_path": str(scored_scenes / "triplets.json"),
            "use_human_scores": False,
            "num_generations": GENERATIONS,
            "rollout_steps": 6,
            "train_batch_size": CONDITIONS,
            "decode_batch_size": 8,
        }
        return config_in(tmp_path_factory.mktemp("automatic"), **settings | flags)

    return make


def copied(tree):
    return jax.tree.map(np.array, tree)


def steps_of(setup, count):
    """State after so many steps, and the metrics of each."""
    step, state, rows = setup.step_programs(), setup.state, []
    for number, batch in enumerate(islice(setup.loader.iterate(), count)):
        state, row = step(state, setup.loaded.frozen, batch, number)
        rows.append({name: float(value) for name, value in jax.device_get(row).items()})
    return state, rows


def changed(before, after):
    before, after = named_leaves(before), named_leaves(after)
    return {name for name in before if not np.array_equal(before[name], after[name])}


def updates_of(setup, steps=2, drift=0):
    """State after so many steps, and of each the metrics of every update [updates] and of the step."""
    settings, objective = setup.step_settings, setup.objective

    @jax.jit
    def step(state, frozen, batch):
        microbatches = jax.tree.map(lambda x: x[None], batch)
        experience, measured = collect(
            objective,
            settings.rollouts,
            state,
            frozen,
            microbatches,
            renewed=jnp.asarray(True),
            drift_interval=drift,
        )
        state, metrics = learn(
            objective, setup.optimizer, settings, state, frozen, microbatches, experience, fresh=jnp.asarray(True)
        )
        return replace(state, step=state.step + 1), metrics, measured

    state, rows = setup.state, []
    for batch in islice(setup.loader.iterate(), steps):
        state, *row = step(state, setup.loaded.frozen, batch)
        rows.append(jax.device_get(row))
    return state, rows


def test_a_step_leaves_the_base_and_changes_every_expert_and_the_router(automatic):
    """ρ is exactly 1 in the first update, whose parameters are the old policy, and moves in the second."""
    setup = set_up(automatic(adam_weight_decay=0.0))
    frozen, before = copied(setup.loaded.frozen), copied(setup.state.trainable)
    state, rows = updates_of(setup, drift=1)
    assert changed(frozen, setup.loaded.frozen) == set()
    assert changed(before, state.trainable) == set(named_leaves(before))
    assert state.snapshot is None  # the weights that a step begins with are its old policy
    for updates, _ in rows:
        assert updates["mean_ratio"][0] == 1.0 != updates["mean_ratio"][1]
        assert updates["approx_kl"][0] == 0.0 < updates["approx_kl"][1]
    assert rows[0][1]["kl_to_base"] == 0.0 < rows[1][1]["kl_to_base"]


def test_the_draw_of_an_expert_joins_the_ratio_and_teaches_the_router(automatic, photos):
    """With one-hot gates and without the other losses, nothing else reaches the router."""
    setup = set_up(automatic(routing="sample", diversity_loss_weight=0.0, adam_weight_decay=0.0, **photos))
    before = copied(setup.state.trainable)
    state, rows = updates_of(setup, steps=1)
    assert rows[0][0]["mean_ratio"][0] == 1.0 != rows[0][0]["mean_ratio"][1]
    assert "router/logits/kernel" in changed(before, state.trainable)


@pytest.mark.parametrize("estimator", ["matching", "sde"])
@pytest.mark.parametrize(("precision", "bound"), [("no", 1e-6), ("bf16", 1e-3)])
def test_equal_parameters_give_equal_log_probabilities(automatic, photos, optimised, estimator, precision, bound):
    """The second update by weights that the first did not move, against the record that it left."""
    flags = {"policy_estimator": estimator, "mixed_precision": precision, "policy_temperature": 1.0}
    for updates, _ in updates_of(set_up(automatic(**flags, **STILL, **photos)))[1]:
        assert updates["mean_ratio"][0] == 1.0
        assert abs(np.log(updates["mean_ratio"][1])) <= bound
        assert updates["clip_fraction"][1] == 0.0


@pytest.fixture(scope="module")
def rolled_out(automatic):
    """(setup, batch, encoded, members, scores) of random experts, as the first step generates them."""
    setup = set_up(automatic())
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), setup.state.trainable)
    setup = replace(setup, state=replace(setup.state, trainable=noisy))
    batch = next(setup.loader.iterate())
    return setup, batch, *generated(setup, batch)


def generated(setup, batch, **changes):
    settings = replace(setup.step_settings.rollouts, **changes)

    @jax.jit
    def generate(state, frozen, batch):
        encoded = encode(setup.loaded.model, frozen, batch, "balanced")
        return encoded, *roll_out_members(setup.objective, settings, state, frozen, batch, encoded)

    return generate(setup.state, setup.loaded.frozen, batch)


def test_a_rollout_is_what_removal_makes_of_the_same_noise(rolled_out, monkeypatch):
    """By `make_remover`, and by the scores of its pictures."""
    setup, batch, _, members, scores = rolled_out
    noise = "ra_jax.training.generation.panel_noise"

    def fixed(group_keys, member_keys, grid, features):
        keys = jax.vmap(jax.random.key)(jnp.arange(CONDITIONS))
        return initial_noise(setup.loaded.model, keys, 32, 32)

    monkeypatch.setattr(noise, fixed)
    encoded, members, scores = generated(setup, batch)
    keys = jax.vmap(jax.random.key)(jnp.arange(CONDITIONS))
    remove = make_remover(setup.loaded.model, setup.objective.schedule, num_inference_steps=6, guidance_scale=30.0)
    images, _ = remove(
        setup.state.trainable, setup.loaded.frozen, batch, initial_noise(setup.loaded.model, keys, 32, 32)
    )
    for member in range(GENERATIONS):
        made = decode_panels(
            setup.objective,
            setup.step_settings.rollouts,
            setup.loaded.frozen,
            members.clean[member],
            encoded.condition.grid,
        )
        np.testing.assert_allclose(made, images, atol=1e-4)
    truth = batch["result"] / np.float32(255)
    decoded = jnp.clip(
        right_panel(setup.loaded.model.decode(setup.loaded.frozen, encoded.clean, encoded.condition.grid)), 0, 1
    )
    inputs = RewardInputs(images, batch["source"] / np.float32(255), batch["mask"].astype(np.float32), truth, decoded)
    for i, name in enumerate(("removal", "background", "smoothness")):
        np.testing.assert_allclose(scores[0, :, i], REWARDS[name].function(inputs), atol=1e-3)


def test_members_share_the_left_panels_noise_and_differ_on_the_right(rolled_out, monkeypatch):
    """The initial noise, seen where a rollout would begin."""
    setup, batch, encoded, _, _ = rolled_out
    monkeypatch.setattr(
        "ra_jax.training.generation.roll_out", lambda velocity, noise, times, noisy: Member(noise(jnp.asarray(0)))
    )
    rows, columns = encoded.condition.grid
    noise = np.asarray(generated(setup, batch)[1].clean).reshape(GENERATIONS, CONDITIONS, rows, columns, -1)
    left, right = noise[:, :, :, : columns // 2], noise[:, :, :, columns // 2 :]
    np.testing.assert_array_equal(left[0], left[1])
    assert not np.any(left[0, 0] == left[0, 1])  # another condition's
    flat = right.reshape(GENERATIONS * CONDITIONS, -1)
    assert np.abs(np.corrcoef(flat) - np.eye(len(flat))).max() < 0.3
    assert abs(noise.std() - 1) < 0.05


def test_decoding_in_microbatches_gives_the_same_scores(rolled_out):
    setup, batch, _, _, scores = rolled_out
    np.testing.assert_allclose(generated(setup, batch, decode_batch_size=1)[2], scores, atol=1e-5)


def test_rollouts_depend_on_step_record_and_member_alone(rolled_out):
    """Conditions in another order generate the same, another step something else."""
    setup, batch, _, members, _ = rolled_out
    turned = {name: values[::-1] for name, values in batch.items()}
    np.testing.assert_allclose(generated(setup, turned)[1].clean[:, ::-1], members.clean, atol=1e-4)
    later = replace(setup, state=replace(setup.state, step=jnp.asarray(1)))
    assert np.abs(generated(later, batch)[1].clean - members.clean).max() > 0.1


def test_drawn_experts_follow_the_gates(rolled_out):
    settings = replace(rolled_out[0].step_settings.rollouts, sample_experts=True)
    gates = jnp.tile(jnp.asarray([[0.6, 0.3, 0.1]]), (4000, 1))
    weights, experts = drawn_experts(settings, gates, jax.vmap(jax.random.key)(jnp.arange(4000)))
    np.testing.assert_allclose(weights.mean(0), gates[0], atol=0.03)
    np.testing.assert_array_equal(weights.argmax(1), experts)


def test_nothing_is_learnt_from_rollouts_that_are_worth_the_same(automatic, photos):
    """A constant reward: advantages are 0, so that without the other losses no weight moves."""
    setup = set_up(automatic(diversity_loss_weight=0.0, adam_weight_decay=0.0, **photos))
    constant = (Reward("constant", lambda inputs: jnp.full(inputs.image.shape[:1], 0.7), 1.0),)
    _, rows = steps_of(with_rewards(setup, constant), 1)
    assert rows[0]["grad_norm"] == 0.0
    assert rows[0]["frac_reward_zero_std"] == 1.0
    assert rows[0]["mean_reward"] == pytest.approx(0.4)


def with_rewards(setup, rewards):
    rollouts = replace(setup.step_settings.rollouts, rewards=rewards)
    return replace(setup, step_settings=replace(setup.step_settings, rollouts=rollouts))


def test_without_the_grpo_loss_rewards_are_only_looked_at(automatic):
    _, rows = steps_of(set_up(automatic(enable_grpo_loss=False)), 1)
    assert "mean_reward" in rows[0] and "policy_loss" not in rows[0]


def broken(inputs):
    return jnp.where(inputs.image.mean((1, 2, 3)) > -1.0, jnp.nan, 0.0)


@pytest.mark.parametrize("estimator", ["matching", "sde"])
def test_rewards_that_are_not_finite_drop_the_policy_term_for_that_step(automatic, estimator):
    """The weights then are those of a step without rewards; what only rewards could tell is not told."""
    flags = {"policy_estimator": estimator, "log_freq": 100, "adam_weight_decay": 0.0}
    setups = [set_up(automatic(**flags)) for _ in range(2)]
    state, rows = steps_of(with_rewards(setups[0], (Reward("broken", broken, 1.0),)), 1)
    assert rows[0]["reward_fallbacks"] == 1.0
    assert np.isfinite(rows[0]["train_loss"])
    assert all(np.isnan(rows[0][name]) for name in ("mean_reward", "policy_loss", "mean_ratio"))
    assert np.isnan(state.clip_at_sync) and state.temperature == setups[1].state.temperature
    without = replace(setups[1], rewarded=lambda step: False).step_programs()
    reference, row = without(setups[1].state, setups[1].loaded.frozen, next(setups[1].loader.iterate()))
    assert "mean_reward" not in row
    ours, theirs = named_leaves(state.trainable), named_leaves(reference.trainable)
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5, err_msg=name)


def test_ten_steps_without_rewards_stop_the_run(automatic, monkeypatch, caplog):
    monkeypatch.setitem(REWARDS, "removal", replace(REWARDS["removal"], function=broken))
    config = automatic(max_train_steps=14, num_iterations=1, rollout_steps=1)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(
            FloatingPointError, match=r"falling back.*step 10 for the 10th time in a row.*removal_score is nan"
        ),
    ):
        train(config)
    told = [record.message for record in caplog.records if "falling back to simple loss" in record.message]
    assert len(told) == 10 and "removal_score is nan" in told[0]
    assert "lower --learning_rate" in told[0]
    output = Path(config.run.output_dir)
    rows = read_rows(output / "metrics.jsonl")
    assert rows[-1]["step"] == 9 and rows[-1]["reward_fallbacks"] == 9.0
    assert "falling back" in (output / "report.html").read_text()


class Compiled:
    """Stands for a compiled step: says which settings it was made with."""

    def __init__(self, settings):
        self.settings = settings

    def __call__(self, state, frozen, batch):
        return state, {} if self.settings.rollouts is None else {"mean_reward": 0.0}


@pytest.fixture
def uncompiled(automatic, monkeypatch):
    """(setup, its programs, the settings they were compiled with so far), nothing really compiled."""
    setup, tried = set_up(automatic(decode_batch_size=8, train_batch_size=4)), []

    def compile_(self, settings, arguments):
        tried.append(settings)
        return Compiled(settings)

    monkeypatch.setattr(programs.StepPrograms, "_compile", compile_)
    monkeypatch.setattr(programs, "memory_needed", lambda program: 10**9 * program.settings.rollouts.decode_batch_size)

    def run(memory, steps=1, interval=1, warmup=0, results=True):
        monkeypatch.setattr(programs, "device_memory", lambda: memory)
        due = RolloutConfig(reward_interval=interval, reward_warmup_steps=warmup).due
        step, batch = replace(setup, rewarded=due).step_programs(), dict(next(setup.loader.iterate()))
        if not results:
            del batch["result"]
        rows = [step(setup.state, setup.loaded.frozen, batch, number)[1] for number in range(steps)]
        return rows, [None if settings.rollouts is None else settings.rollouts.decode_batch_size for settings in tried]

    return run


def test_rewards_every_other_step(uncompiled):
    rows, tried = uncompiled(10**12, steps=3, interval=2)
    assert rows == [{"mean_reward": 0.0}, {}, {"mean_reward": 0.0}]
    assert tried == [4, None]


def test_rewards_after_a_warm_up(uncompiled):
    rows, tried = uncompiled(10**12, steps=4, interval=2, warmup=1)
    assert rows == [{}, {"mean_reward": 0.0}, {}, {"mean_reward": 0.0}]
    assert tried == [None, 4]


def test_a_step_that_does_not_fit_decodes_less_at_once(uncompiled):
    assert uncompiled(2 * 10**9) == ([{"mean_reward": 0.0}], [4, 2])


def test_a_step_that_never_fits_goes_on_without_rewards(uncompiled, caplog):
    with caplog.at_level(logging.WARNING):
        rows, tried = uncompiled(10**8, steps=2)
    assert rows == [{"reward_fallbacks": 1.0}, {}]
    assert tried == [4, 2, 1, None]
    assert "Failed to compute GRPO rewards, falling back to simple loss" in caplog.text
    assert "needs 1.0 GB with one image decoded at a time, the device has 0.1 GB" in caplog.text
    assert "--gradient_checkpointing full" in caplog.text


def test_a_step_that_never_fits_has_nothing_to_go_on_with_without_results(uncompiled):
    with pytest.raises(ConfigError, match=r"needs 1.0 GB .*no simple loss to fall back to"):
        uncompiled(10**8, results=False)


def test_a_compiler_that_finds_no_room_counts_as_not_fitting(automatic, monkeypatch, caplog):
    setup = set_up(automatic(decode_batch_size=1))

    def compile_(self, settings, arguments):
        if settings.rollouts is not None:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return Compiled(settings)

    monkeypatch.setattr(programs.StepPrograms, "_compile", compile_)
    _, row = setup.step_programs()(setup.state, setup.loaded.frozen, next(setup.loader.iterate()))
    assert row == {"reward_fallbacks": 1.0} and "falling back to simple loss" in caplog.text


@pytest.mark.slow
def test_memory_grows_with_the_group_by_its_latents_alone(automatic, photos):
    """Temporaries of the compiled step: from 2 to 8 rollouts a condition."""

    def temporaries(generations):
        setup = set_up(automatic(num_generations=generations, log_freq=100, **photos))
        step = setup.step_programs()
        batch = next(setup.loader.iterate())
        step.prepare(setup.state, setup.loaded.frozen, batch)
        (program,) = (future.result() for future in step._programs.values())
        latents = 4 * 32 * setup.loaded.model.latent_features * CONDITIONS  # bytes of one member of each condition
        return program.memory_analysis().temp_size_in_bytes, latents

    (few, latents), (many, _) = temporaries(2), temporaries(8)
    assert many - few < 6 * 4 * latents


def test_a_python_function_as_reward(automatic, photos, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "import numpy as np\n\n\ndef dark(inputs):\n    return 1.0 - np.asarray(inputs.image).mean((1, 2, 3))\n\n\n"
        "def wrong(inputs):\n    return inputs.image\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    setup = set_up(automatic(reward_functions=["my_rewards:dark=0.5", "smoothness=0.5"], log_freq=100, **photos))
    _, rows = steps_of(setup, 1)
    assert 0.0 < rows[0]["dark_score"] < 1.0
    assert rows[0]["mean_reward"] == pytest.approx(
        0.5 * (2 * rows[0]["dark_score"] - 1) + 0.5 * (2 * rows[0]["smoothness_score"] - 1), abs=1e-5
    )
    with pytest.raises(RewardError, match=r"wrong.*\(2, 32, 32, 3\)"):
        set_up(automatic(reward_functions=["my_rewards:wrong"]))


def test_photos_without_results_are_learnt_from_by_the_rewards_that_need_none(automatic, photos):
    """A whole run by nft, with previews, which have no truth to show."""
    flags = {"max_train_steps": 1, "policy_estimator": "nft", "kl_weight": 0.1}
    output = train(automatic(validation_steps=1, num_inference_steps=2, **flags, **photos))
    (row,) = read_rows(output / "metrics.jsonl")
    assert "base_loss" not in row
    promised = {"removal_score", "background_score", "smoothness_score", "policy_loss", "kl_loss", "policy_change"}
    assert promised <= row.keys()
    assert (output / "previews" / "step_000001.png").exists()


def test_too_short_a_rollout_for_the_stochastic_steps(automatic):
    with pytest.raises(ConfigError, match=r"rollout_steps = 2 with sde_window = 2.*raise --rollout_steps"):
        set_up(automatic(policy_estimator="sde", rollout_steps=2))


def test_several_results_of_a_scene_are_warned_of(automatic, scored_scenes, caplog):
    with caplog.at_level(logging.WARNING):
        set_up(automatic(train_json_path=str(scored_scenes / "labeled_dict.json")))
    assert "24 records of 6 scenes" in caplog.text


def test_drift_beyond_the_limit_stops_the_run_and_keeps_its_best(automatic, scored_scenes):
    """A policy that pulls a hundred times too hard."""
    config = automatic(
        val_json_path=str(scored_scenes / "triplets.json"),
        max_drift=0.05,
        drift_steps=1,
        max_train_steps=30,
        policy_loss_weight=100.0,
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


def test_a_run_begins_with_another_runs_experts(automatic, config_in, scored_scenes, tmp_path):
    """Human-scored GRPO, then automatic GRPO from its experts, on the same base; another base is refused."""
    human = config_in(tmp_path / "human")
    trained = set_up(human)
    noisy = jax.tree.map(lambda x: x + 0.1, trained.state.trainable)
    checkpoints = RunCheckpoints(human, trained)
    checkpoints.save(1, replace(trained.state, trainable=noisy))
    checkpoints.close()
    setup = set_up(automatic(init_experts_from=human.run.output_dir))
    trained = restore(find_checkpoint(human.run.output_dir), setup.state.trainable, prefix="trainable")
    for name, leaf in named_leaves(trained).items():
        np.testing.assert_array_equal(leaf, named_leaves(setup.state.trainable)[name], err_msg=name)
    assert changed(trained, set_up(automatic()).state.trainable) != set()
    assert int(setup.state.step) == 0
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        set_up(automatic(init_experts_from=str(tmp_path)))
    about = read_about(find_checkpoint(human.run.output_dir))
    with pytest.raises(CheckpointError, match="was trained on another base"):
        refuse_another_base(Path("there"), about, "another")


@pytest.mark.slow
def test_an_interrupted_run_resumes_bit_for_bit(automatic, monkeypatch):
    """With rewards every other step, drawn experts, averages, several updates and a schedule."""
    flags = {"routing": "sample", "reward_interval": 2, "ema_decay": 0.9, "lr_scheduler": "cosine"}
    flags |= {"max_train_steps": 4, "checkpointing_steps": 2}
    straight = automatic(**flags)
    train(straight)
    stopped = automatic(**flags)
    iterate = Loader.iterate

    def dies(self, start=0):
        for i, batch in enumerate(iterate(self, start)):
            if start + i == 3:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(Loader, "iterate", dies)
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    monkeypatch.undo()
    resumed = replace(stopped, run=replace(stopped.run, resume_from_checkpoint="latest"))
    train(resumed)
    like = set_up(resumed).state
    ours, theirs = (
        named_leaves(restore(find_checkpoint(config.run.output_dir), like)) for config in (resumed, straight)
    )
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
