"""Tests the trainable and frozen parameters of a Fill model, the router's input, and the effect of experts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ra_jax.interop.diffusers import load_fill_model, load_flux, load_vae
from ra_jax.interop.hub import fingerprint
from ra_jax.models.conditioning import Condition
from ra_jax.models.fill_model import assemble_model
from ra_jax.models.lora import Adapter, LoRAConfig
from ra_jax.models.options import ModelOptions
from ra_jax.models.router import RouterConfig

GRID = (4, 8)
LORA = LoRAConfig(num_experts=2, rank=2, alpha=64.0)
ROUTER = RouterConfig(num_experts=2, floor=0.05, temperature=1.0, routing="soft", fixed_weights=(0.6, 0.4), hidden=8)
PLAIN = ModelOptions("float32", text_tokens=512)
MIXTURE = dataclasses.replace(PLAIN, lora=LORA, router=ROUTER)


def parameter_names(tree) -> set[str]:
    """Return the last name in the path of each parameter."""
    paths = (path for path, _ in jax.tree_util.tree_leaves_with_path(tree))
    return {[key.key for key in path if hasattr(key, "key")][-1] for path in paths}


def dtypes(tree) -> set[str]:
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


def assert_equal_trees(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def condition():
    rng = np.random.default_rng(0)
    latents, mask = rng.normal(size=(2, 32, 16)), np.zeros((2, *GRID, 64))
    mask[0, 1:3, 5:7] = 1
    mask[1, 2, 6] = 1
    fill = np.concatenate([latents, mask.reshape(2, 32, 64)], axis=-1)
    arrays = fill, rng.normal(size=(2, 8, 32)), np.zeros((2, 16))
    return Condition(*(jnp.asarray(array, jnp.float32) for array in arrays), GRID)


def test_experts_and_router_are_trained_and_the_base_is_frozen(load_tiny_experts):
    loaded = load_tiny_experts(jnp.dtype("bfloat16"))
    assert set(loaded.trainable) == {"flux", "router"}
    assert parameter_names(loaded.trainable["flux"]) == {"lora_a", "lora_b"}
    assert dtypes(loaded.trainable) == {"float32"}
    assert not {"lora_a", "lora_b"} & parameter_names(loaded.frozen)
    assert {part: dtypes(loaded.frozen[part]) for part in loaded.frozen} == {
        "flux": {"bfloat16"},
        "redux": {"bfloat16"},
        "vae": {"float32"},
    }


def test_a_trained_base_is_float32_and_leaves_no_frozen_transformer(tiny_fill):
    loaded = load_fill_model(str(tiny_fill), None, ModelOptions("bfloat16", text_tokens=512, train_base=True))
    assert dtypes(loaded.trainable) == {"float32"}
    assert not jax.tree.leaves(loaded.frozen["flux"])
    frozen = load_fill_model(str(tiny_fill), None, PLAIN)
    assert not jax.tree.leaves(frozen.trainable)
    assert_equal_trees(jax.tree.leaves(loaded.trainable["flux"]), jax.tree.leaves(frozen.frozen["flux"]))
    assert loaded.preprocess is None and loaded.image_tokens == 0


def test_new_experts_depend_on_the_seed_only_and_have_no_effect(tiny_fill, condition):
    first, again, other = (load_fill_model(str(tiny_fill), None, MIXTURE, seed=seed) for seed in (0, 0, 1))
    assert_equal_trees(first.trainable, again.trainable)
    a, b = (jax.tree.leaves(loaded.trainable["router"]) for loaded in (first, other))
    assert any((x != y).any() for x, y in zip(a, b, strict=True))
    for path, leaf in jax.tree_util.tree_leaves_with_path(first.trainable["flux"]):
        assert np.any(leaf) == ("lora_a" in jax.tree_util.keystr(path))  # B is zero
    gates, _ = first.model.gates(first.trainable, condition)
    np.testing.assert_allclose(gates, [[0.6, 0.4]] * 2, rtol=1e-5)


def test_experts_are_off_without_gates(tiny_experts, tiny_pipeline, condition):
    velocity = jax.jit(tiny_experts.model.velocity)
    arguments = condition.fill[..., :16], jnp.array([0.3, 0.9]), condition
    gates, _ = tiny_experts.model.gates(tiny_experts.trainable, condition)
    weights = tiny_experts.trainable, tiny_experts.frozen
    off = velocity(*weights, *arguments, adapter=Adapter(), guidance_scale=30.0)
    on = velocity(*weights, *arguments, adapter=Adapter(gates), guidance_scale=30.0)
    np.testing.assert_allclose(off, tiny_pipeline.velocity(*arguments, 30.0), atol=1e-5)
    assert np.abs(on - off).max() > 0.1
    other = velocity(*weights, *arguments, adapter=Adapter(gates[:, ::-1]), guidance_scale=30.0)
    assert np.abs(other - on).max() > 0.01


def test_the_router_reads_the_right_panel_of_a_diptych(tiny_experts, condition):
    def gates(fill, **panel):
        changed = dataclasses.replace(condition, fill=fill)
        return np.asarray(tiny_experts.model.gates(tiny_experts.trainable, changed, **panel)[0])

    by_column = condition.fill.reshape(2, *GRID, -1)
    left, right = (
        by_column.at[:, :, columns, :16].add(3.0).reshape(condition.fill.shape)
        for columns in (slice(0, 4), slice(4, 8))
    )
    unchanged = gates(condition.fill)
    np.testing.assert_array_equal(gates(left), unchanged)
    assert np.abs(gates(right) - unchanged).max() > 0.01
    assert np.abs(gates(left, panel=slice(None)) - gates(condition.fill, panel=slice(None))).max() > 0.01


def test_topk_routing_also_returns_the_soft_gates(tiny_fill, condition):
    router = dataclasses.replace(ROUTER, routing="topk")
    loaded = load_fill_model(str(tiny_fill), None, dataclasses.replace(MIXTURE, router=router))
    hard, soft = loaded.model.gates(loaded.trainable, condition)
    np.testing.assert_allclose(hard, [[1.0, 0.0]] * 2, atol=1e-6)
    np.testing.assert_allclose(soft, [[0.6, 0.4]] * 2, rtol=1e-5)


def test_a_model_without_experts_has_no_gates(tiny_pipeline, condition):
    assert tiny_pipeline.model.gates({}, condition) == (None, None)
    assert tiny_pipeline.model.num_experts == 0


def test_a_redux_folder_sets_image_tokens_preprocessing_and_fingerprint(tiny_experts, tiny_fill, tiny_redux):
    assert tiny_experts.image_tokens == 4
    assert tiny_experts.preprocess(Image.new("RGB", (9, 5))).shape == (28, 28, 3)
    assert tiny_experts.fingerprint == fingerprint(tiny_fill) + fingerprint(tiny_redux)


def test_a_transformer_and_a_vae_of_different_models_are_refused(make_tiny_fill):
    flux, vae = load_flux(make_tiny_fill(4)), load_vae(make_tiny_fill(8))
    with pytest.raises(
        ValueError, match=r"has 96 input channels and 16 output channels: .* \(4 latent channels, factor 8\) needs 288"
    ):
        assemble_model(flux, vae, None, None, text_tokens=8)
