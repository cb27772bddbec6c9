"""Compares mixtures of experts with PEFT's weighted adapters, and tests their layers, gradients, dtypes and dropout."""

import re
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ra_jax.interop.diffusers import load_flux
from ra_jax.models.blocks import MAX_UNROLLED_BLOCKS, scan_blocks
from ra_jax.models.conditioning import Condition
from ra_jax.models.flux import Flux, FluxConfig
from ra_jax.models.lora import BLOCK_LINEARS, Adapter, ExpertLinear, LoRAConfig, attach_experts, linear_layers

if find_spec("torch"):
    import peft
    import torch
    from diffusers import FluxTransformer2DModel

TINY = {
    "in_channels": 8,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 6,
    "axes_dims_rope": (4, 2, 2),
}
GRID = (2, 3)
GATES = np.array([[0.6, 0.3, 0.1], [0.05, 0.15, 0.8]], np.float32)
# All linear layers of the blocks. They get experts by default.
BLOCK_LAYERS = {
    *(f"transformer_blocks.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"transformer_blocks.attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"transformer_blocks.{name}.net.{i}" for name in ("ff", "ff_context") for i in ("0.proj", "2")),
    *(f"transformer_blocks.{name}.linear" for name in ("norm1", "norm1_context")),
    *(f"single_transformer_blocks.attn.{name}" for name in ("to_q", "to_k", "to_v")),
    *(f"single_transformer_blocks.{name}" for name in ("proj_mlp", "proj_out", "norm.linear")),
}


def make_inputs(batch=2):
    rng = np.random.default_rng(0)
    shapes = (6, TINY["in_channels"]), (3, TINY["joint_attention_dim"]), (TINY["pooled_projection_dim"],)
    t = np.linspace(0.4, 0.9, batch, dtype=np.float32)
    return [rng.normal(size=(batch, *shape)).astype(np.float32) for shape in shapes] + [t]


def call(flux, adapter):
    hidden, context, pooled, t = make_inputs()
    return flux(hidden[..., :4], t, Condition(hidden[..., 4:], context, pooled, GRID), None, adapter=adapter)


def lora_config(**changes) -> LoRAConfig:
    """Return the configuration of three experts of rank 64 on the layers of the blocks, with `changes`."""
    return LoRAConfig(**{"num_experts": 3, "rank": 64, "alpha": 64.0} | changes)


def randomize(module):
    """Set all parameters to random values, also experts' B and zero-initialized layers, and return the module."""
    rng = np.random.default_rng(0)
    nnx.update(module, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.2, x.dtype), nnx.state(module)))
    return module


def make_flux(**lora):
    lora = lora_config(rank=2, alpha=3.0, **lora)
    return randomize(nnx.eval_shape(lambda: Flux(FluxConfig(**TINY), lora=lora, rngs=nnx.Rngs(0))))


def make_linear(in_features=7, out_features=5, *, param_dtype=jnp.float32, dtype=jnp.float32, seed=0, **lora):
    """Return a linear layer with random experts; its module name is `layer`."""
    model = nnx.Dict(
        layer=ExpertLinear(in_features, out_features, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    )
    attach_experts(model, lora_config(target_modules="layer", **lora), nnx.Rngs(seed).params())
    return randomize(model).layer


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # several adapters are intended
def test_flux_mixture_matches_three_weighted_peft_adapters(tmp_path):
    rank, alpha = 4, 6.0
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**TINY).eval()
    model.save_pretrained(tmp_path / "transformer")
    flux = load_flux(tmp_path, lora=lora_config(rank=rank, alpha=alpha), rngs=nnx.Rngs(0))

    names = ["removal", "background", "smoothness"]
    linears = r"(single_)?transformer_blocks\.\d+\..*(to_\w|to_out\.0|add_\w+|proj\w*|net\.2|linear)"
    for name in names:
        model.add_adapter(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=linears), adapter_name=name)
    layers, adapted = linear_layers(flux), set()
    for path, module in model.named_modules():
        if not isinstance(module, peft.tuners.lora.Linear):
            continue
        stack, block, rest = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", path).groups()
        layer, block = layers[f"{stack}.{rest}"], int(block)
        adapted.add(f"{stack}.{rest}")
        for e, name in enumerate(names):
            torch.nn.init.normal_(module.lora_B[name].weight, std=0.2)
            columns = slice(e * rank, (e + 1) * rank)
            a, b = module.lora_A[name].weight.detach().numpy(), module.lora_B[name].weight.detach().numpy()
            layer.lora_a[...] = layer.lora_a[...].at[block, :, columns].set(a.T)
            layer.lora_b[...] = layer.lora_b[...].at[block, columns].set(b.T)
    assert adapted == BLOCK_LAYERS

    expected = []
    hidden, context, pooled, t = map(torch.from_numpy, make_inputs())
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(GRID[0]).float(), torch.arange(GRID[1]).float())
    for i, gates in enumerate(GATES):
        model.set_adapters(names, weights=gates.tolist())
        row = slice(i, i + 1)
        with torch.no_grad():
            out = model(hidden[row], context[row], pooled[row], t[row], img_ids=ids, txt_ids=torch.zeros(3, 3))
        expected.append(out.sample.numpy())
    expected = np.concatenate(expected)
    run = jax.jit(call)
    got, base = run(flux, Adapter(jnp.asarray(GATES))), run(flux, None)
    assert np.linalg.norm(got - expected) <= 1e-4 * np.linalg.norm(expected)
    assert np.linalg.norm(base - expected) > 0.1 * np.linalg.norm(expected)  # checks that the experts change the output


def test_a_mixture_is_the_gated_sum_of_its_experts():
    layer = make_linear(rank=2, alpha=5.0)
    x = np.random.default_rng(1).normal(size=(2, 4, 7)).astype(np.float32)
    a, b = np.asarray(layer.lora_a[...]).reshape(7, 3, 2), np.asarray(layer.lora_b[...]).reshape(3, 2, 5)
    updates = np.einsum("bni,ier,ero->bnoe", x, a, b) * 5.0 / 2
    base = x @ layer.kernel[...] + layer.bias[...]
    gates = jnp.asarray(GATES)
    np.testing.assert_allclose(
        layer(x, Adapter(gates)), base + np.einsum("bnoe,be->bno", updates, GATES), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(layer(x[:, 0], Adapter(gates)), layer(x, Adapter(gates))[:, 0], rtol=1e-5, atol=1e-6)
    # The gradient of a gate is the dot product of the expert's output with the gradient of the layer's output.
    grad = jax.grad(lambda gates: layer(x, Adapter(gates)).sum())(gates)
    np.testing.assert_allclose(grad, updates.sum((1, 2)), rtol=1e-4, atol=1e-5)


def test_a_layer_with_experts_off_equals_the_base_bit_for_bit():
    layer = make_linear()
    plain = ExpertLinear(7, 5, rngs=nnx.Rngs(0))
    plain.kernel[...], plain.bias[...] = layer.kernel[...], layer.bias[...]
    x = jnp.ones((2, 7))
    for adapter in (None, Adapter(), Adapter(dropout_key=jax.random.key(0))):
        np.testing.assert_array_equal(layer(x, adapter), plain(x))
    np.testing.assert_array_equal(plain(x, Adapter(jnp.asarray(GATES))), plain(x))


@pytest.mark.torch
def test_new_experts_have_no_effect_and_the_initial_distribution_of_peft():
    layer = ExpertLinear(64, 8, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 64))
    base = layer(x)
    layer.add_experts(lora_config(rank=32), jax.random.key(0))
    np.testing.assert_array_equal(layer(x, Adapter(jnp.asarray(GATES))), base)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(64, 8)), peft.LoraConfig(r=96, target_modules=["0"])
    )
    theirs = next(p for name, p in theirs.named_parameters() if "lora_A" in name).detach().numpy()
    ours = np.asarray(layer.lora_a[...])
    assert ours.shape == theirs.T.shape
    np.testing.assert_allclose([ours.std(), ours.max()], [theirs.std(), theirs.max()], rtol=0.02)


def test_initial_values_of_a_layer_do_not_depend_on_other_target_layers():
    def experts(regex):
        flux = nnx.eval_shape(lambda: Flux(FluxConfig(**TINY), rngs=nnx.Rngs(0)))  # the base may be abstract
        attach_experts(flux, lora_config(rank=2, target_modules=regex), nnx.Rngs(3).params())
        return flux.transformer_blocks.attn

    one_target, two_targets = experts(r"attn\.to_q$"), experts(r"attn\.to_[qk]$")
    np.testing.assert_array_equal(one_target.to_q.lora_a[...], two_targets.to_q.lora_a[...])
    assert not np.array_equal(two_targets.to_q.lora_a[...], two_targets.to_k.lora_a[...])


@pytest.mark.parametrize(
    ("regex", "names"),
    [
        (BLOCK_LINEARS, BLOCK_LAYERS),
        (r"single.*attn\.to_[qv]$", {f"single_transformer_blocks.attn.to_{name}" for name in "qv"}),
        (r"^(x_embedder|proj_out)$", {"x_embedder", "proj_out"}),
        ("ff_context", {f"transformer_blocks.ff_context.net.{name}" for name in ("0.proj", "2")}),
    ],
    ids=["blocks", "single q and v", "outside blocks", "ff_context"],
)
def test_experts_are_added_to_layers_that_match_the_regex(regex, names):
    lora = lora_config(target_modules=regex)
    flux = nnx.eval_shape(lambda: Flux(FluxConfig(**TINY), lora=lora, rngs=nnx.Rngs(0)))
    assert {name for name, layer in linear_layers(flux).items() if layer.lora is not None} == names
    experts, base = nnx.state(flux, nnx.LoRAParam, ...)
    assert len(jax.tree.leaves(experts)) == 2 * len(names)
    assert not any("lora" in str(path[-1]) for path, _ in nnx.to_flat_state(base))


def test_a_regex_that_matches_no_layer_is_refused_with_a_list_of_names():
    lora = lora_config(target_modules="to_query")
    names = linear_layers(nnx.eval_shape(lambda: Flux(FluxConfig(**TINY), rngs=nnx.Rngs(0))))
    with pytest.raises(ValueError, match=f"'to_query' matches none of the {len(names)} linear layers") as error:
        nnx.eval_shape(lambda: Flux(FluxConfig(**TINY), lora=lora, rngs=nnx.Rngs(0)))
    listed = str(error.value).split("such as ")[1].rstrip(".").split(", ")
    assert len(listed) > 4
    assert set(listed) <= set(names)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts": 0}, "num_experts is 0: expected 1 or more"),
        ({"rank": 0}, "lora_rank is 0: expected 1 or more"),
        ({"dropout": 1.0}, r"lora_dropout is 1.0: expected a rate in \[0, 1\)"),
        ({"target_modules": "to_(q"}, r"target_modules 'to_\(q' is not a regular expression"),
    ],
)
def test_a_wrong_config_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        lora_config(**values)


def test_gates_for_another_number_of_experts_are_refused():
    with pytest.raises(ValueError, match=r"gates have shape \(2, 2\): expected \(2, 3\)"):
        make_linear()(jnp.ones((2, 7)), Adapter(jnp.ones((2, 2))))


def test_only_experts_and_gates_have_gradients_and_the_base_does_not_change():
    graphdef, experts, base = nnx.split(make_flux(), nnx.LoRAParam, ...)
    before = jax.tree.map(np.array, base)

    @jax.jit
    def step(experts, base, gates):
        def loss(trained):
            experts, gates = trained
            return jnp.square(call(nnx.merge(graphdef, experts, base), Adapter(gates))).mean()

        grads = jax.grad(loss)((experts, gates))
        return jax.tree.map(lambda p, g: p - 0.1 * g, (experts, gates), grads), grads

    (new_experts, _), (grads, gate_grads) = step(experts, base, jnp.asarray(GATES))
    assert jax.tree.structure(grads) == jax.tree.structure(experts)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    assert np.all(gate_grads != 0)
    assert not jax.tree.all(jax.tree.map(np.array_equal, new_experts, experts))
    assert jax.tree.all(jax.tree.map(np.array_equal, base, before))
    step(new_experts, base, jnp.asarray(GATES))
    assert step._cache_size() == 1


def test_experts_of_a_bfloat16_base_are_float32():
    layer = make_linear(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rank=8)
    assert {x.dtype for x in (layer.kernel[...], layer.bias[...])} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in (layer.lora_a[...], layer.lora_b[...])} == {jnp.dtype(jnp.float32)}
    assert layer(jnp.ones((2, 7)), Adapter(jnp.asarray(GATES))).dtype == jnp.bfloat16
    # In bfloat16, the sum over tokens in a gate's gradient would stop growing after 256 equal tokens.
    x = jnp.ones((2, 2000, 7), jnp.bfloat16)
    grad = jax.grad(lambda gates: layer(x, Adapter(gates)).astype(jnp.float32).sum())(jnp.asarray(GATES))
    one = jax.grad(lambda gates: layer(x[:, :1], Adapter(gates)).astype(jnp.float32).sum())(jnp.asarray(GATES))
    np.testing.assert_allclose(grad, 2000 * one, rtol=1e-3)


def make_dropout_layer(rate):
    """Create a layer whose output is the experts' input after dropout."""
    layer = make_linear(16, 16, num_experts=1, rank=16, alpha=16.0, dropout=rate)
    layer.kernel[...], layer.bias[...] = jnp.zeros((16, 16)), jnp.zeros(16)
    layer.lora_a[...] = layer.lora_b[...] = jnp.eye(16)
    return layer


def test_dropout_zeros_a_fraction_of_values_and_scales_the_others():
    layer, gates = make_dropout_layer(0.25), jnp.ones((8, 1))
    x = jnp.ones((8, 500, 16))
    np.testing.assert_array_equal(layer(x, Adapter(gates)), x)
    out = np.asarray(layer(x, Adapter(gates, jax.random.key(0))))
    assert set(np.unique(out)) == {0, np.float32(1 / 0.75)}
    np.testing.assert_allclose((out == 0).mean(axis=(1, 2)), 0.25, atol=0.02)


def test_dropout_of_an_example_does_not_depend_on_its_batch():
    layer, keys = make_dropout_layer(0.5), jax.random.split(jax.random.key(0), 4)
    x, gates = jnp.ones((4, 10, 16)), jnp.ones((4, 1))
    whole = layer(x, Adapter(gates, keys))
    parts = [layer(x[part], Adapter(gates[part], keys[part])) for part in (slice(0, 1), slice(1, 4))]
    np.testing.assert_array_equal(whole, jnp.concatenate(parts))
    assert len({np.asarray(row).tobytes() for row in whole}) == 4


@pytest.mark.parametrize("count", [2, MAX_UNROLLED_BLOCKS + 1], ids=["unrolled", "rolled"])
def test_every_block_layer_and_example_has_a_different_dropout(count):
    class Probe(nnx.Module):
        """A block of two equal layers that appends ones after their dropout to the queue `carry` [B, count, 2, 16]."""

        def __init__(self):
            lora = LoRAConfig(num_experts=1, rank=16, alpha=16.0, dropout=0.5, target_modules="layer")
            self.layer_1, self.layer_2 = (ExpertLinear(16, 16, rngs=nnx.Rngs(0)) for _ in range(2))
            attach_experts(self, lora, nnx.Rngs(0).params())
            for layer in (self.layer_1, self.layer_2):
                layer.kernel[...] = jnp.zeros((16, 16))
                layer.lora_a[...] = layer.lora_b[...] = jnp.eye(16)

        def __call__(self, carry, embedding, rope, adapter):
            drops = [layer(jnp.ones((carry.shape[0], 16)), adapter) for layer in (self.layer_1, self.layer_2)]
            return jnp.concatenate([carry[:, 1:], jnp.stack(drops, axis=1)[:, None]], axis=1)

    blocks = Probe()
    nnx.update(blocks, jax.tree.map(lambda x: jnp.stack([x] * count), nnx.state(blocks)))
    adapter = Adapter(jnp.ones((2, 1)), jax.random.key(0)).per_example(2)
    carry = jnp.full((2, count, 2, 16), jnp.nan)
    drops = scan_blocks(blocks, carry, embedding=None, rope=None, adapter=adapter, remat="none")
    patterns = {np.asarray(row).tobytes() for row in drops.reshape(-1, 16)}
    assert len(patterns) == 2 * count * 2
    assert not np.isnan(drops).any()


def test_gradients_of_experts_are_summed_in_float32():
    """Uses 4096 tokens in bfloat16. A sum rounded to its 8 bits would be wrong by up to 0.4 %."""
    rngs = nnx.Rngs(0)
    layer = ExpertLinear(8, 8, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs)
    layer.add_experts(LoRAConfig(num_experts=1, rank=4, alpha=4.0), rngs.params())
    layer.lora_b[...] = jax.random.normal(rngs.params(), layer.lora_b.shape)
    x = jax.random.normal(rngs.params(), (1, 4096, 8)).astype(jnp.bfloat16)
    graph, experts, base = nnx.split(layer, nnx.LoRAParam, ...)

    def total(experts):
        return nnx.merge(graph, experts, base)(x, Adapter(jnp.ones((1, 1)))).astype(jnp.float32).sum()

    gradient = jax.grad(total)(experts)
    # The loss is the sum of all outputs. B's gradient is the sum of x A over tokens. A's gradient is the sum of x over
    # tokens times B's row sums.
    b = np.asarray(layer.lora_b[...].astype(jnp.bfloat16), np.float64)
    hidden = np.asarray((x @ layer.lora_a[...].astype(jnp.bfloat16)), np.float64)[0].sum(0)
    np.testing.assert_allclose(gradient["lora_b"][...], np.repeat(hidden[:, None], 8, 1), rtol=1e-4, atol=1e-3)
    rows = np.asarray(jnp.asarray(b.sum(1), jnp.bfloat16), np.float64)
    expected = np.asarray(x, np.float64)[0].sum(0)[:, None] * rows
    np.testing.assert_allclose(gradient["lora_a"][...], expected, rtol=1e-4, atol=1e-3)
