"""Compares the FLUX transformer with diffusers' on random weights, read from a folder that diffusers writes."""

import dataclasses
import re
import tempfile
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ra_jax.interop.diffusers import load_flux
from ra_jax.models.attention import rope_table
from ra_jax.models.blocks import MAX_UNROLLED_BLOCKS, REMAT_POLICIES, unstack_blocks
from ra_jax.models.conditioning import Condition
from ra_jax.models.flux import Flux, FluxConfig, FluxOptions, RotaryNorm, gelu, modulate

if find_spec("torch"):
    import torch
    from diffusers import FluxTransformer2DModel

TINY = {
    "in_channels": 20,
    "out_channels": 8,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 12,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
FILL = {"in_channels": 384, "out_channels": 64, "guidance_embeds": True}  # FLUX.1-Fill; the rest are defaults


def create_reference(folder, dtype: str = "float32", **geometry) -> "FluxTransformer2DModel":
    """Create a random diffusers model, with random biases and norms too, and save it to `folder`/transformer."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel.from_config(geometry).eval()
    for name, value in model.named_parameters():
        if value.ndim == 1:
            torch.nn.init.normal_(value, mean=float(name.endswith("weight")), std=0.3)
    model.to(getattr(torch, dtype)).save_pretrained(folder / "transformer")
    return model


def make_inputs(config: FluxConfig, grid, context_length=5, batch=2):
    """Return random arguments of `Flux`: latents, t, condition, guidance."""
    rng = np.random.default_rng(0)
    shapes = (grid[0] * grid[1], config.in_channels), (context_length, config.joint_attention_dim)
    hidden, context = (rng.normal(size=(batch, *shape)).astype(np.float32) for shape in shapes)
    pooled = rng.normal(size=(batch, config.pooled_projection_dim)).astype(np.float32)
    t = np.linspace(0.3, 0.97, batch, dtype=np.float32)
    guidance = np.linspace(30, 3.5, batch, dtype=np.float32) if config.guidance_embeds else None
    latents, fill = np.split(hidden, [config.out_channels], axis=-1)
    return latents, t, Condition(fill, context, pooled, grid), guidance


def run_reference(model, inputs) -> "torch.Tensor":
    latents, t, condition, guidance = inputs
    rows, columns = condition.grid
    arguments = {
        "hidden_states": np.concatenate([latents, condition.fill], axis=-1),
        "encoder_hidden_states": condition.context,
        "pooled_projections": condition.pooled,
        "timestep": t,
        "guidance": guidance,
    }
    arguments = {name: None if x is None else torch.as_tensor(x) for name, x in arguments.items()}
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())
    return model(img_ids=ids, txt_ids=torch.zeros(condition.context.shape[1], 3), **arguments).sample


def relative_error(got, expected) -> float:
    return float(np.linalg.norm(np.asarray(got) - expected) / np.linalg.norm(expected))


@pytest.mark.torch
@pytest.mark.parametrize(
    ("changes", "grid"),
    [
        ({}, (3, 5)),
        ({"num_layers": 0, "guidance_embeds": False}, (3, 2)),
        ({"num_single_layers": 0, "out_channels": None, "num_attention_heads": 3}, (1, 4)),
        ({"num_layers": MAX_UNROLLED_BLOCKS + 1, "num_single_layers": MAX_UNROLLED_BLOCKS + 2}, (2, 3)),
    ],
    ids=["both kinds", "single blocks, no guidance", "double blocks, out = in", "rolled loops"],
)
def test_tiny_models_match_diffusers(tmp_path, changes, grid):
    model = create_reference(tmp_path, **(TINY | changes))
    flux = load_flux(tmp_path)
    inputs = make_inputs(flux.config, grid)
    with torch.no_grad():
        expected = run_reference(model, inputs).numpy()
    got = jax.jit(lambda flux, *inputs: flux(*inputs))(flux, *inputs)
    assert got.dtype == jnp.float32
    assert got.shape == expected.shape
    assert relative_error(got, expected) <= 1e-4


@pytest.mark.torch
def test_unstacked_blocks_compute_the_same_as_stacked_blocks(tmp_path):
    create_reference(tmp_path, **(TINY | {"num_layers": 2, "num_single_layers": MAX_UNROLLED_BLOCKS + 1}))
    flux = load_flux(tmp_path)
    inputs = make_inputs(flux.config, (2, 3))
    graph, stacked = nnx.split(flux)
    unstacked = unstack_blocks(stacked)
    # Only the 2 double blocks are unstacked. There are more single blocks than MAX_UNROLLED_BLOCKS.
    double_leaves = len(jax.tree.leaves(stacked["transformer_blocks"]))
    assert len(jax.tree.leaves(unstacked)) == len(jax.tree.leaves(stacked)) + double_leaves
    run = jax.jit(lambda params: nnx.merge(graph, params)(*inputs))
    np.testing.assert_allclose(run(unstacked), run(stacked), rtol=1e-5, atol=1e-5)


@pytest.mark.torch
def test_a_model_with_the_widths_of_flux_matches_diffusers(with_optimizations):
    # The model has half a billion parameters. Its file is bfloat16, and only one model is in memory at a time.
    config = FluxConfig(**FILL, num_layers=1, num_single_layers=1)
    inputs = make_inputs(config, (2, 3), context_length=4, batch=1)
    with tempfile.TemporaryDirectory() as folder:
        model = create_reference(Path(folder), dtype="bfloat16", **config.to_dict()).float()
        with torch.no_grad():
            expected = run_reference(model, inputs).numpy()
        del model
        flux = load_flux(folder)
    assert flux.config == config
    assert (config.inner_dim, config.joint_attention_dim) == (3072, 4096)
    got = jax.jit(lambda flux, *inputs: flux(*inputs))(flux, *inputs)
    assert relative_error(got, expected) <= 1e-4


@pytest.mark.torch
def test_gradients_match_diffusers(tmp_path):
    model = create_reference(tmp_path, **(TINY | {"num_layers": 1, "num_single_layers": 1}))
    flux = load_flux(tmp_path)
    inputs = make_inputs(flux.config, (3, 4))
    run_reference(model, inputs).square().mean().backward()

    grads = jax.jit(jax.grad(lambda flux: jnp.square(flux(*inputs)).mean()))(flux)
    double, single = grads.transformer_blocks, grads.single_transformer_blocks
    pairs = {
        "x_embedder": (grads.x_embedder, model.x_embedder),
        "pooled": (grads.time_text_embed.text_embedder.linear_1, model.time_text_embed.text_embedder.linear_1),
        "to_k": (double.attn.to_k, model.transformer_blocks[0].attn.to_k),
        "norm1_context": (double.norm1_context.linear, model.transformer_blocks[0].norm1_context.linear),
        "proj_out": (single.proj_out, model.single_transformer_blocks[0].proj_out),
    }
    for name, (got, expected) in pairs.items():
        kernel = got.kernel[...].reshape(got.kernel.shape[-2:])  # without the block axis
        assert relative_error(kernel.T, expected.weight.grad.numpy()) <= 1e-4, name


def random_flux(config=TINY, attention="xla", **options) -> Flux:
    """Create a model whose zero-initialized layers are random too; values are the same for every dtype."""
    flux = nnx.eval_shape(
        lambda: Flux(FluxConfig(**config), FluxOptions(**options), attention=attention, rngs=nnx.Rngs(0))
    )
    rng = np.random.default_rng(1)

    def draw(x):
        scale = (x.shape[-2] if x.ndim > 1 else 100) ** -0.5
        return jnp.asarray(rng.normal(size=x.shape) * scale, x.dtype)

    nnx.update(flux, jax.tree.map(draw, nnx.state(flux)))
    return flux


def test_bfloat16_models_keep_times_and_outputs_in_float32():
    inputs = make_inputs(FluxConfig(**TINY), (4, 4))
    call = jax.jit(lambda flux, *inputs: flux(*inputs))
    expected = np.asarray(call(random_flux(), *inputs))
    flux = random_flux(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(flux))} == {jnp.dtype(jnp.bfloat16)}
    got = call(flux, *inputs)
    assert got.dtype == jnp.float32
    assert relative_error(got, expected) < 0.03
    # 1000·0.97 and 1000·0.9705 are the same number in bfloat16.
    latents, t, condition, guidance = inputs
    moved = call(flux, latents, t + 5e-4, condition, guidance)
    assert float(jnp.abs(moved - got)[1].max()) > 0


def test_norms_of_bfloat16_are_computed_in_float32():
    x = jnp.asarray(3 + np.random.default_rng(0).normal(size=(2, 3, 512)) / 8, jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    unrotated = rope_table((0, 0), 3, (256, 128, 128))  # context tokens
    norm = RotaryNorm(512, jnp.bfloat16)(x[:, :, None], unrotated)[:, :, 0]
    assert norm.dtype == jnp.bfloat16
    expected = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(np.asarray(norm, np.float64), expected, rtol=1.01 * 2**-8)  # rounded once
    shift, scale = (jnp.full((2, 512), value, jnp.bfloat16) for value in (0.5, 2.0))
    centered = exact - exact.mean(-1, keepdims=True)
    expected = 3 * centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6) + 0.5
    got = modulate(x, shift, scale)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=2**-8)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gelu_and_its_gradient_match_torch(dtype):
    x = jnp.linspace(-8, 8, 1001).astype(dtype)
    theirs = torch.from_numpy(np.asarray(x, np.float64)).requires_grad_()
    out = torch.nn.functional.gelu(theirs, approximate="tanh")
    out.sum().backward()
    got, pullback = jax.vjp(gelu, x)
    slope = pullback(jnp.ones_like(got))[0]
    assert got.dtype == slope.dtype == dtype
    ulp = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(got, np.float64), out.detach().numpy(), rtol=ulp, atol=2e-6)
    np.testing.assert_allclose(np.asarray(slope, np.float64), theirs.grad.numpy(), rtol=ulp, atol=2e-6)


def test_padding_of_a_sequence_changes_neither_output_nor_gradients():
    config = TINY | {"num_layers": 1, "num_single_layers": 1}
    inputs = make_inputs(FluxConfig(**config), (3, 3))
    assert (inputs[0].shape[1] + inputs[2].context.shape[1]) % 8

    def loss_and_gradients(multiple):
        flux = random_flux(config)
        flux.sequence_multiple = multiple
        graphdef, state = nnx.split(flux)

        def loss(state):
            return jnp.square(nnx.merge(graphdef, state)(*inputs)).mean()

        return jax.jit(jax.value_and_grad(loss))(state)

    unpadded, padded = loss_and_gradients(1), loss_and_gradients(8)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), unpadded, padded)


def test_a_new_model_returns_zeros():
    flux = Flux(FluxConfig(**(TINY | {"num_layers": 1, "num_single_layers": 0})), rngs=nnx.Rngs(0))
    inputs = make_inputs(flux.config, (2, 2))
    assert not np.any(jax.jit(lambda flux: flux(*inputs))(flux))


def test_remat_policies_give_the_same_gradients_with_less_memory():
    config = TINY | {"num_layers": 0, "num_single_layers": MAX_UNROLLED_BLOCKS + 4}
    inputs = make_inputs(FluxConfig(**config), (8, 8), batch=4)
    grads, memory = {}, {}
    for remat in REMAT_POLICIES:
        graphdef, state = nnx.split(random_flux(config, remat=remat))

        def loss(state, graphdef=graphdef):
            return jnp.square(nnx.merge(graphdef, state)(*inputs)).mean()

        compiled = jax.jit(jax.grad(loss)).lower(state).compile()
        memory[remat] = compiled.memory_analysis().temp_size_in_bytes
        grads[remat] = compiled(state)
    for remat in ("products", "blocks", "full"):
        close = jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-4, atol=1e-6), grads["none"], grads[remat])
        assert jax.tree.all(close), remat
    assert memory["full"] < memory["blocks"] < memory["products"] < memory["none"]
    assert memory["blocks"] < 0.7 * memory["none"]


@pytest.mark.parametrize(
    ("attention", "operation"), [("by_head", "exp"), ("cudnn", "dot_product_attention_fwd_wrapper")]
)
def test_blocks_and_products_save_the_residuals_of_attention(monkeypatch, attention, operation):
    """The program computes the forward pass of attention once with `blocks` and `products`, and twice with `full`."""
    fused = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{fused}.check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(f"{fused}.check_compute_capability", lambda capability: True)
    config = TINY | {"num_layers": 0, "num_single_layers": MAX_UNROLLED_BLOCKS + 1}
    inputs = make_inputs(FluxConfig(**config), (3, 3))

    def count(remat):
        graphdef, state = nnx.split(random_flux(config, remat=remat, attention=attention, dtype=jnp.bfloat16))
        loss = jax.grad(lambda state: jnp.square(nnx.merge(graphdef, state)(*inputs)).mean())
        return len(re.findall(rf"\b{operation}\b", str(jax.make_jaxpr(loss)(state))))

    assert count("blocks") == count("products") == count("none") < count("full")


def test_program_does_not_grow_with_depth_and_compiles_once():
    def program_length(depth):
        config = FluxConfig(**(TINY | {"num_layers": depth, "num_single_layers": depth}))
        flux = nnx.eval_shape(lambda: Flux(config, rngs=nnx.Rngs(0)))
        inputs = make_inputs(config, (2, 2))
        return len(str(jax.make_jaxpr(lambda flux: flux(*inputs))(flux)))

    assert program_length(40) < 1.02 * program_length(20)

    graphdef, state = nnx.split(random_flux())
    call = jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs))
    inputs = make_inputs(FluxConfig(**TINY), (2, 2))
    for scale in (1, 2):
        call(jax.tree.map(lambda x, scale=scale: x * scale, state), *inputs)
    assert call._cache_size() == 1


@pytest.mark.torch
def test_flux_fill_has_as_many_parameters_as_in_diffusers():
    with torch.device("meta"):
        expected = sum(x.numel() for x in FluxTransformer2DModel(**FILL).parameters())
    flux = nnx.eval_shape(lambda: Flux(FluxConfig(**FILL), rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(flux))) == expected
    assert round(expected / 1e9, 1) == 11.9


@pytest.mark.torch
def test_config_round_trip_with_diffusers():
    with torch.device("meta"):
        theirs = FluxTransformer2DModel(**(TINY | {"out_channels": None})).config
    config = FluxConfig.from_dict(dict(theirs))
    assert config.out_channels == TINY["in_channels"]
    assert FluxConfig.from_dict(config.to_dict()) == config
    with torch.device("meta"):
        again = FluxTransformer2DModel.from_config(config.to_dict()).config
    assert {k: v for k, v in again.items() if k in theirs and k != "out_channels"}.items() <= {
        **theirs,
        "axes_dims_rope": [4, 6, 6],
    }.items()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"patch_size": 2}, "patch_size is 2"),
        ({"num_layer": 2}, "unknown key 'num_layer' .nearest known: 'num_layers'"),
        ({"axes_dims_rope": [16, 56, 57]}, r"axes_dims_rope is \[16, 56, 57\]: expected three even numbers"),
        ({"attention_head_dim": 64}, "add up to attention_head_dim, 64"),
    ],
)
def test_a_wrong_config_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        FluxConfig.from_dict(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (3, 4)}, r"latents with fill has shape \(2, 6, 20\): expected \(2, 12, 20\) for token grid \(3, 4\)"),
        ({"context": np.zeros((2, 5, 7))}, r"context has shape .*expected \(2, 5, 24\)"),
        ({"pooled": np.zeros((3, 12))}, r"pooled has shape .*expected \(2, 12\)"),
    ],
)
def test_wrong_shapes_are_refused(change, message):
    flux = Flux(FluxConfig(**TINY), rngs=nnx.Rngs(0))
    latents, t, condition, guidance = make_inputs(flux.config, (2, 3))
    with pytest.raises(ValueError, match=message):
        flux(latents, t, dataclasses.replace(condition, **change), guidance)
    with pytest.raises(ValueError, match="guidance is None, but this model embeds"):
        flux(latents, t, condition, None)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="remat 'all' is unknown: expected one of none, products, blocks, full"):
        FluxOptions(remat="all")
    with pytest.raises(ValueError, match="attention 'flash' is unknown: expected one of xla"):
        Flux(FluxConfig(**TINY), attention="flash", rngs=nnx.Rngs(0))
