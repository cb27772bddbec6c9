"""Models and data sets that tests share, all random and tiny.

    make_tiny_fill     function: factor (2, 4, 8) of the VAE -> folder of a FLUX-Fill model; made once a factor
    tiny_fill          Path: a FLUX-Fill model in diffusers' layout (transformer/ vae/ scheduler/), VAE factor 4
    tiny_redux         Path: a FLUX-Redux model (image_encoder/ image_embedder/ feature_extractor/), 28 px, 4 tokens
    tiny_pipeline      RemovalPipeline of both in float32, without experts, 8 prompt tokens
    load_tiny_experts  function: dtype -> LoadedModel of both with two experts a layer, B random, and a router, 8
                       prompt tokens; loaded once a dtype
    tiny_experts       the same in float32
    scored_scenes      Path: a data set of 6 scenes of 32 px with four scored results each, no result clean

Configurations of tiny runs on them, and what tests of steps and runs do with those:

    make_config_in, make_config  configurations of human-scored runs, or what flags make of them
    make_automatic_config        configurations of runs on automatic rewards
    photo_flags                  flags for photos without results
    run_steps                    takes some steps of a set-up
    find_changed_leaves          which leaves of two trees differ
    interrupt_at                 interrupts a run before a batch

Weights are random everywhere, where a fresh model has zeros too (modulations, output layer, experts' B), so that
every layer counts in every output. Nobody may write into these folders.
"""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest
from flax import nnx

from ra_jax.config.parse import from_flat_dict
from ra_jax.data.loader import Loader
from ra_jax.data.synthetic import DatasetSettings, write_dataset
from ra_jax.interop.diffusers import load_fill_model, save_fill_pipeline_config, save_flux, save_redux, save_vae
from ra_jax.models.flux import Flux, FluxConfig
from ra_jax.models.lora import LoRAConfig
from ra_jax.models.options import ModelOptions
from ra_jax.models.router import RouterConfig
from ra_jax.models.siglip import Redux, ReduxConfig, SiglipConfig
from ra_jax.models.vae import AutoencoderKL, VAEConfig
from ra_jax.parallel.partitioning import named_leaves
from ra_jax.pipeline import RemovalPipeline

LATENT_CHANNELS = 4
JOINT_DIM = 32
TEXT_TOKENS = 8


def _random(make: Callable[[], nnx.Module], seed: int) -> nnx.Module:
    """A module with every parameter random: kernels of variance 1/inputs, norms about 1, biases about 0."""
    rng = np.random.default_rng(seed)
    module = nnx.eval_shape(make)

    def draw(path, value):
        noise = rng.normal(size=value.shape).astype(np.float32)
        name = [getattr(key, "key", None) for key in path]
        if "scale" in name:
            return jnp.asarray(1.0 + 0.1 * noise)
        if "bias" in name:
            return jnp.asarray(0.1 * noise)
        inputs = value.shape[:-1] if value.ndim == 4 else value.shape[-2:-1]  # a convolution's, or a linear layer's
        return jnp.asarray(noise / np.sqrt(np.prod(inputs)))

    nnx.update(module, jax.tree_util.tree_map_with_path(draw, nnx.state(module)))
    return module


def pytest_configure():
    """Fusions are compiled by XLA's older emitters, which take less time, where there are some: jaxlib 0.11.1 has none,
    and a flag that it does not know aborts the process. XLA reads its flags once, which may be when tests are
    collected."""
    if jaxlib.version.__version_info__ < (0, 11, 1):
        os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {os.environ.get('XLA_FLAGS', '')}"


def pytest_collection_modifyitems(items):
    """Tests marked `torch` are skipped where it is not installed.

    Files with slow tests come first, then those that compile steps, so that no worker ends up alone with one
    (scripts/test.sh keeps the order)."""
    if find_spec("torch") is None:
        for item in items:
            if item.get_closest_marker("torch"):
                item.add_marker(pytest.mark.skip(reason="torch is not installed: pip install -e '.[torch]'"))
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, item.path.parent.name != "training"))


@pytest.fixture(scope="session", autouse=True)
def compile_fast(tmp_path_factory):
    """Programs that several tests need are compiled by the first of them; LLVM's optimisations are left out.

    Compiling takes most of the suite's time, running the tiny programs almost none.
    """
    folder = str(tmp_path_factory.mktemp("compiled"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder  # of programs that tests start
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """A file's programs leave memory with it: all of the suite's together take gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def with_optimizations():
    """For tests whose subject is what the compiler makes of a program: with LLVM's optimisations."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def make_tiny_fill(tmp_path_factory):
    @cache
    def make(factor: int):
        vae = VAEConfig(
            block_out_channels=(8,) * factor.bit_length(),
            norm_num_groups=4,
            latent_channels=LATENT_CHANNELS,
            scaling_factor=0.8,
            shift_factor=0.1,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
        )
        transformer = FluxConfig(
            in_channels=8 * LATENT_CHANNELS + 4 * factor**2,
            out_channels=4 * LATENT_CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=JOINT_DIM,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )
        folder = tmp_path_factory.mktemp(f"tiny_fill_{factor}")
        save_flux(_random(lambda: Flux(transformer, rngs=nnx.Rngs(0)), seed=1), folder)
        save_vae(_random(lambda: AutoencoderKL(vae, rngs=nnx.Rngs(0)), seed=2), folder)
        save_fill_pipeline_config(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_fill(make_tiny_fill):
    return make_tiny_fill(4)


@pytest.fixture(scope="session")
def tiny_redux(tmp_path_factory):
    vision = SiglipConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    embedder = ReduxConfig(redux_dim=16, txt_in_features=JOINT_DIM)
    folder = tmp_path_factory.mktemp("tiny_redux")
    save_redux(_random(lambda: Redux(vision, embedder, rngs=nnx.Rngs(0)), seed=3), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_fill, tiny_redux):
    return RemovalPipeline.from_pretrained(tiny_fill, tiny_redux, dtype="float32", max_sequence_length=TEXT_TOKENS)


@pytest.fixture(scope="session")
def load_tiny_experts(tiny_fill, tiny_redux):
    @cache
    def load(dtype):
        loaded = load_fill_model(
            str(tiny_fill),
            str(tiny_redux),
            ModelOptions(
                dtype=dtype,
                text_tokens=TEXT_TOKENS,
                lora=LoRAConfig(num_experts=2, rank=2, alpha=2.0),
                router=RouterConfig(
                    num_experts=2, floor=0.05, temperature=1.0, routing="soft", fixed_weights=(0.6, 0.4), hidden=8
                ),
            ),
        )
        rng = np.random.default_rng(4)

        def noisy(x):
            return jnp.asarray(np.asarray(x) + 0.3 * rng.normal(size=x.shape), x.dtype)

        return replace(loaded, trainable=jax.tree.map(noisy, loaded.trainable))

    return load


@pytest.fixture(scope="session")
def tiny_experts(load_tiny_experts):
    return load_tiny_experts(jnp.dtype("float32"))


@pytest.fixture(scope="session")
def scored_scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "scored"
    return write_dataset(folder, DatasetSettings(scenes=6, size=32, mix="no_clean", seed=0))


FEW_LAYERS = r".*\.(to_q|to_add_out|proj_mlp)"  # of both kinds of blocks: a smaller program than with all of them
HUMAN = {"use_grpo": True, "use_human_scores": True, "enable_grpo_rewards": True, "enable_grpo_loss": True}


@pytest.fixture(scope="session")
def make_config_in(tiny_fill, tiny_redux, scored_scenes):
    """make_config_in(folder, **flags) -> TrainConfig: three experts of rank 2, human scores, unless flags differ."""

    def make(folder: Path, **flags):
        settings = {
            "train_json_path": str(scored_scenes / "labeled_dict.json"),
            "output_dir": str(folder / "run"),
            "pretrained_model_name_or_path": str(tiny_fill),
            "pretrained_redux_model_name_or_path": str(tiny_redux),
            "aspect_ratio_buckets": "32,32",
            "mixed_precision": "no",
            "gradient_checkpointing": "none",
            "max_sequence_length": 8,
            "train_batch_size": 8,
            "max_train_steps": 4,
            "learning_rate": 0.01,
            "policy_sync_steps": 3,
            "num_policy_timesteps": 2,
            "policy_loss_weight": 1.0,
            "validation_steps": 0,
            "checkpointing_steps": 0,
            "report_to": ["none"],
            "log_freq": 1,
            "data_workers": 0,
        }
        experts = {"use_lora": True, "lora_rank": 2, "lora_alpha": 2.0, "target_modules": FEW_LAYERS}
        experts = experts if flags.get("use_lora", True) else {}
        return from_flat_dict(settings | experts | HUMAN | flags)

    return make


@pytest.fixture
def make_config(make_config_in, tmp_path):
    """make_config(**flags) -> TrainConfig of a run in the test's own folder."""
    return lambda **flags: make_config_in(tmp_path, **flags)


@pytest.fixture(scope="session")
def photo_flags(scored_scenes, tmp_path_factory):
    """Photos and masks without results: nothing but rewards to learn from, which makes for small programs."""
    records = json.loads((scored_scenes / "labeled_dict.json").read_text())[::4]
    for record in records:
        del record["result"], record["scores"]
        for name in ("src", "mask", "ref"):
            record[name] = str(scored_scenes / record[name])
    path = tmp_path_factory.mktemp("photos") / "photos.json"
    path.write_text(json.dumps(records))
    return {"train_json_path": str(path), "base_loss_weight": 0.0}


@pytest.fixture(scope="session")
def make_automatic_config(make_config_in, scored_scenes, tmp_path_factory):
    """make_automatic_config(**flags) -> TrainConfig in a new folder: 2 conditions, 3 rollouts each of 6 steps."""

    def make(**flags):
        settings = {
            "train_json_path": str(scored_scenes / "triplets.json"),
            "use_human_scores": False,
            "num_generations": 3,
            "rollout_steps": 6,
            "train_batch_size": 2,
            "decode_batch_size": 8,
        }
        return make_config_in(tmp_path_factory.mktemp("automatic"), **settings | flags)

    return make


@pytest.fixture(scope="session")
def run_steps():
    """run_steps(setup, count) -> the state after so many steps, and the metrics of each."""

    def run(setup, count):
        step, state, rows = setup.compiled_steps(), setup.state, []
        for number, batch in enumerate(islice(setup.batches(), count)):
            state, row = step(state, setup.frozen, batch, number)
            rows.append({name: float(value) for name, value in jax.device_get(row).items()})
        return state, rows

    return run


@pytest.fixture(scope="session")
def find_changed_leaves():
    """find_changed_leaves(before, after) -> names of the leaves that differ."""

    def names(before, after):
        before, after = named_leaves(before), named_leaves(after)
        assert before.keys() == after.keys()
        return {name for name in before if not np.array_equal(before[name], after[name])}

    return names


@pytest.fixture
def interrupt_at(monkeypatch):
    """dies_at(batch, run): `run()` is interrupted when it asks for that batch (from 0)."""

    def interrupted(batch, run):
        iterate = Loader.iterate

        def dies(self, start=0):
            for i, found in enumerate(iterate(self, start), start):
                if i == batch:
                    raise KeyboardInterrupt
                yield found

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Loader, "iterate", dies)
            run()

    return interrupted
