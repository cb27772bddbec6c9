"""Fixtures that tests share: tiny random models, a tiny data set, and tiny training runs.

Models and data:

    make_tiny_fill     function: factor (2, 4, 8) of the VAE -> folder of a FLUX-Fill model; cached per factor
    tiny_fill          Path: a FLUX-Fill model in diffusers' layout (transformer/ vae/ scheduler/), VAE factor 4
    tiny_redux         Path: a FLUX-Redux model (image_encoder/ image_embedder/ feature_extractor/), 28 px, 4 tokens
    tiny_pipeline      RemovalPipeline of tiny_fill and tiny_redux: float32, no experts, 8 prompt tokens
    load_tiny_experts  function: dtype -> LoadedModel of tiny_fill and tiny_redux with two experts per layer, random B,
                       a router and 8 prompt tokens; cached per dtype
    tiny_experts       LoadedModel that load_tiny_experts returns for float32
    scored_scenes      Path: a data set of 6 scenes of 32 px, each with four scored results, none of them clean

Training runs:

    make_config_in, make_config  functions: flags -> configuration of a run, human-scored by default
    make_automatic_config        function: flags -> configuration of a run with automatic rewards
    photo_flags                  dict: flags for photos without results
    run_steps                    function: runs the first steps of a run
    find_changed_leaves          function: finds the leaves in which two trees differ
    interrupt_at                 function: interrupts a run before a batch

All weights are random, also those that are zero in a new model (modulations, output layer, experts' B), so that every
layer affects every output. Tests must not write into these folders.
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
COMPILING_FOLDERS = ("training", "step", "experiments")  # their tests compile train steps


def _create_random(create: Callable[[], nnx.Module], seed: int) -> nnx.Module:
    """Create a module with random parameters: kernels of variance 1/inputs, norm scales near 1, biases near 0."""
    rng = np.random.default_rng(seed)
    module = nnx.eval_shape(create)

    def draw(path, value):
        noise = rng.normal(size=value.shape).astype(np.float32)
        name = [getattr(key, "key", None) for key in path]
        if "scale" in name:
            return jnp.asarray(1.0 + 0.1 * noise)
        if "bias" in name:
            return jnp.asarray(0.1 * noise)
        inputs = value.shape[:-1] if value.ndim == 4 else value.shape[-2:-1]  # of a convolution or of a linear layer
        return jnp.asarray(noise / np.sqrt(np.prod(inputs)))

    nnx.update(module, jax.tree_util.tree_map_with_path(draw, nnx.state(module)))
    return module


def pytest_configure():
    """Make XLA compile fusions with its older emitters, which take less time.

    jaxlib 0.11.1 has no older emitters, and an unknown flag aborts the process, so newer versions get no flag. The flag
    is set here because XLA reads its flags once, possibly already while pytest collects tests.
    """
    if jaxlib.version.__version_info__ < (0, 11, 1):
        os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {os.environ.get('XLA_FLAGS', '')}"


def pytest_collection_modifyitems(items):
    """Skip tests marked `torch` if torch is not installed, and sort the test files.

    Files with slow tests come first, then those of COMPILING_FOLDERS, which compile train steps. Otherwise one worker
    could start such a file last, while the other has nothing left to do. scripts/test.sh keeps this order.
    """
    if find_spec("torch") is None:
        for item in items:
            if item.get_closest_marker("torch"):
                item.add_marker(pytest.mark.skip(reason="torch is not installed: pip install -e '.[torch]'"))
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, item.path.parent.name not in COMPILING_FOLDERS))


@pytest.fixture(scope="session", autouse=True)
def compile_fast(tmp_path_factory):
    """Compile each program once for all tests of a session, without most of LLVM's optimizations.

    Compiling takes most of the suite's time. Running the tiny programs takes almost none.
    """
    folder = str(tmp_path_factory.mktemp("compiled"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder  # for processes that tests start
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Free the compiled programs after each test file, because those of the whole suite take gigabytes of memory."""
    yield
    jax.clear_caches()


@pytest.fixture
def with_optimizations():
    """Enable LLVM's optimizations for a test that depends on how the compiler optimizes a program."""
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
        save_flux(_create_random(lambda: Flux(transformer, rngs=nnx.Rngs(0)), seed=1), folder)
        save_vae(_create_random(lambda: AutoencoderKL(vae, rngs=nnx.Rngs(0)), seed=2), folder)
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
    save_redux(_create_random(lambda: Redux(vision, embedder, rngs=nnx.Rngs(0)), seed=3), folder)
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

        def add_noise(x):
            return jnp.asarray(np.asarray(x) + 0.3 * rng.normal(size=x.shape), x.dtype)

        return replace(loaded, trainable=jax.tree.map(add_noise, loaded.trainable))

    return load


@pytest.fixture(scope="session")
def tiny_experts(load_tiny_experts):
    return load_tiny_experts(jnp.dtype("float32"))


@pytest.fixture(scope="session")
def scored_scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "scored"
    return write_dataset(folder, DatasetSettings(scenes=6, size=32, mix="no_clean", seed=0))


@pytest.fixture(scope="session")
def make_checkpoint_files():
    """Return a function that makes a folder look like a complete checkpoint. It cannot be restored."""

    def make(folder: Path) -> None:
        for file in ("state/manifest.ocdbt", "state/d/0", "about/metadata"):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).touch()

    return make


FEW_LAYERS = r".*\.(to_q|to_add_out|proj_mlp)"  # layers of both kinds of blocks; all layers make a larger program
HUMAN = {"use_grpo": True, "use_human_scores": True, "enable_grpo_rewards": True, "enable_grpo_loss": True}


@pytest.fixture(scope="session")
def make_config_in(tiny_fill, tiny_redux, scored_scenes):
    """Return a function: (folder, **flags) -> TrainConfig, by default with human scores and three experts of rank 2."""

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
    """Return a function: **flags -> TrainConfig of a run in the test's own folder."""
    return lambda **flags: make_config_in(tmp_path, **flags)


@pytest.fixture(scope="session")
def photo_flags(scored_scenes, tmp_path_factory):
    """Return flags for photos and masks without results.

    A run then learns from rewards only, so that its programs are small.
    """
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
    """Return a function: **flags -> TrainConfig in a new folder, with 2 conditions and 3 rollouts of 6 steps each."""

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
    """Return a function: (setup, count) -> the state after `count` steps, and the metrics of each step."""

    def run(setup, count):
        step, state, rows = setup.compiled_steps(), setup.state, []
        for number, batch in enumerate(islice(setup.batches(), count)):
            state, row = step(state, setup.frozen, batch, number)
            rows.append({name: float(value) for name, value in jax.device_get(row).items()})
        return state, rows

    return run


@pytest.fixture(scope="session")
def find_changed_leaves():
    """Return a function: (before, after) -> names of the leaves that differ."""

    def find(before, after):
        before, after = named_leaves(before), named_leaves(after)
        assert before.keys() == after.keys()
        return {name for name in before if not np.array_equal(before[name], after[name])}

    return find


@pytest.fixture
def interrupt_at(monkeypatch):
    """Return a function: (index, run) -> None. It calls `run()` and interrupts it before batch `index` (from 0)."""

    def interrupt(index, run):
        iterate = Loader.iterate

        def iterate_until_index(self, start=0):
            for i, batch in enumerate(iterate(self, start), start):
                if i == index:
                    raise KeyboardInterrupt
                yield batch

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Loader, "iterate", iterate_until_index)
            run()

    return interrupt
