"""A linear layer with E LoRA experts, weighted for each example by a router's gates.

    y = W x + b + (alpha/r) · Σ_e w_e · B_e A_e x                (LoRA, arXiv:2106.09685, with E experts)

One pair of matmuls computes all E experts. A is [in, E·r], its output is scaled by the gates w_e, and B is [E·r, out].
Columns e·r … (e+1)·r of `lora_a` and the same rows of `lora_b` belong to expert e.
"""

import dataclasses
import re
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from ra_jax.errors import TargetError
from ra_jax.models.initializers import lecun_normal
from ra_jax.models.products import expert_product, save_for_backward
from ra_jax.parallel.partitioning import parameter_name

# Matches every linear layer of the blocks: attention, MLPs and modulations.
BLOCK_LINEARS = r"^(single_)?transformer_blocks\."
# `jax.checkpoint` policies save arrays by name. This name marks products with kernels and with experts' weights.
PRODUCT = "product"


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Experts on the linear layers whose name `target_modules` matches.

    Attributes:
        num_experts: E >= 1.
        rank: r >= 1, of each expert.
        alpha: an expert's output is multiplied by alpha/r.
        dropout: rate in [0, 1) at which the experts' input is dropped, if the `Adapter` has a dropout key.
        target_modules: regular expression, searched (`re.search`) in diffusers' module names without the block
            index: "transformer_blocks.ff.net.0.proj", "single_transformer_blocks.attn.to_q", "x_embedder" …

    Raises:
        ValueError: if a value is out of range, or `target_modules` is not a regular expression.
    """

    num_experts: int
    rank: int
    alpha: float
    dropout: float = 0.0
    target_modules: str = BLOCK_LINEARS

    def __post_init__(self):
        if self.num_experts < 1:
            raise ValueError(f"num_experts is {self.num_experts}: expected 1 or more.")
        if self.rank < 1:
            raise ValueError(f"lora_rank is {self.rank}: expected 1 or more.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora_dropout is {self.dropout}: expected a rate in [0, 1).")
        try:
            re.compile(self.target_modules)
        except re.error as error:
            raise ValueError(
                f"target_modules {self.target_modules!r} is not a regular expression ({error}): expected one "
                r"such as '\.attn\.to_[qkv]$'."
            ) from error


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """Gates and dropout keys of the experts for one forward pass.

    Attributes:
        gates: [B, E] float32 weights of the experts, per example; None switches the experts off.
        dropout_key: typed keys (`jax.random.key`) [B], one per example, so that draws do not depend on how a batch is
            split. If there is only one key, `per_example` folds the row of each example into it. None: no dropout.
    """

    gates: jax.Array | None = None
    dropout_key: jax.Array | None = None

    def per_example(self, batch_size: int) -> "Adapter":
        """Return the same adapter with one dropout key per example, [B]."""
        if self.dropout_key is None or self.dropout_key.ndim == 1:
            return self
        rows = jnp.arange(batch_size)
        return dataclasses.replace(self, dropout_key=jax.vmap(jax.random.fold_in, (None, 0))(self.dropout_key, rows))

    def fold_in(self, data: int | jax.Array) -> "Adapter":
        """Return the same adapter with `data` (a block's index, a layer's number) folded into every key."""
        if self.dropout_key is None:
            return self
        return dataclasses.replace(self, dropout_key=jax.vmap(jax.random.fold_in, (0, None))(self.dropout_key, data))


class ExpertLinear(nnx.Module):
    """A linear layer y = x W + b to which `attach_experts` can add LoRA experts. Matmuls run in `dtype`.

    In stacked blocks every parameter has a leading block axis.

    Attributes:
        kernel: [in, out], `nnx.Param`. If `param_dtype` is int8, it is quantized by `quantization.quantize`.
        kernel_scale: [out], `nnx.Param`, scale of an int8 kernel; absent otherwise.
        bias: [out], `nnx.Param`.
        lora_a: [in, E·r], float32 `nnx.LoRAParam`; absent without experts.
        lora_b: [E·r, out], float32 `nnx.LoRAParam`; absent without experts.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kernel_init: Callable = lecun_normal,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.quantized = jnp.dtype(param_dtype) == jnp.int8
        if self.quantized:  # these zeros are placeholders: int8 kernels are loaded from files
            self.kernel = nnx.Param(jnp.zeros((in_features, out_features), jnp.int8))
            self.kernel_scale = nnx.Param(jnp.ones((out_features,), jnp.float32))
        else:
            self.kernel = nnx.Param(kernel_init(rngs.params(), (in_features, out_features), param_dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype if self.quantized else param_dtype))
        self.dtype = jnp.dtype(dtype)
        self.lora: LoRAConfig | None = None
        self.stream = 0  # folded into dropout keys, so that each layer draws different values

    def add_experts(self, lora: LoRAConfig, key: jax.Array, *, stream: int = 0) -> None:
        """Add experts, in place. They do not change the output at first.

        A is uniform in ±1/√in, as in PEFT. B is zero.

        Args:
            lora: number, rank, scale and dropout of the experts.
            key: key from which A is drawn.
            stream: number of this layer, folded into dropout keys.
        """
        *blocks, in_features, out_features = self.kernel.shape
        width = lora.num_experts * lora.rank
        bound = in_features**-0.5
        shape = (*blocks, in_features, width)
        self.lora_a = nnx.LoRAParam(jax.random.uniform(key, shape, jnp.float32, -bound, bound))
        self.lora_b = nnx.LoRAParam(jnp.zeros((*blocks, width, out_features), jnp.float32))
        self.lora, self.stream = lora, stream

    def __call__(self, x: jax.Array, adapter: Adapter | None = None) -> jax.Array:
        """Compute x [B, ..., in] -> [B, ..., out] in `dtype`.

        The experts are used only if the layer has them and `adapter` has gates.

        Raises:
            ValueError: if the adapter's gates do not have shape [B, E].
        """
        x = x.astype(self.dtype)
        y = x @ self.kernel[...].astype(self.dtype)
        if self.quantized:
            y = (y.astype(jnp.float32) * self.kernel_scale[...]).astype(self.dtype)
        y = y + self.bias[...].astype(self.dtype)
        if self.lora is None or adapter is None or adapter.gates is None:
            return checkpoint_name(y, PRODUCT)
        return checkpoint_name(y + self._expert_output(x, adapter), PRODUCT)

    def _expert_output(self, x: jax.Array, adapter: Adapter) -> jax.Array:
        lora, gates = self.lora, adapter.gates
        if gates.shape != (x.shape[0], lora.num_experts):
            raise ValueError(
                f"gates have shape {gates.shape}: expected {(x.shape[0], lora.num_experts)}, one gate per example and "
                "expert."
            )
        if lora.dropout and adapter.dropout_key is not None:
            x = _dropout(x, adapter.per_example(x.shape[0]).fold_in(self.stream).dropout_key, lora.dropout)
        weights = jnp.repeat(gates.astype(jnp.float32) * (lora.alpha / lora.rank), lora.rank, axis=-1)
        weights = weights.reshape(x.shape[0], *[1] * (x.ndim - 2), -1)
        h = checkpoint_name(expert_product(save_for_backward(x), self.lora_a[...]), PRODUCT)
        # h is scaled in float32, because the gradient of a gate is a sum over all tokens.
        h = (h.astype(jnp.float32) * weights).astype(self.dtype)
        return expert_product(h, self.lora_b[...])


def _dropout(x: jax.Array, keys: jax.Array, rate: float) -> jax.Array:
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def linear_layers(model: nnx.Module) -> dict[str, ExpertLinear]:
    """Return every `ExpertLinear` of `model` by its module name, such as "transformer_blocks.attn.to_q"."""
    return {
        parameter_name(path, "."): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, ExpertLinear)
    }


def attach_experts(model: nnx.Module, lora: LoRAConfig, key: jax.Array) -> list[str]:
    """Add experts, in place, to every linear layer whose name `lora.target_modules` matches (`re.search`).

    Only the shapes of the base are read, so the model may be abstract (`nnx.eval_shape`) or have loaded weights. The
    initial values of a layer depend only on `key` and the layer's name, not on which other layers are targeted.

    Returns:
        the names of the targeted layers.

    Raises:
        TargetError: if no layer matches; the message lists example names.
    """
    layers = linear_layers(model)
    targets = [name for name in layers if re.search(lora.target_modules, name)]
    if not targets:
        examples = ", ".join(sorted(layers)[:: max(1, len(layers) // 6)])
        raise TargetError(
            f"target_modules {lora.target_modules!r} matches none of the {len(layers)} linear layers: "
            f"use a regular expression that matches names such as {examples}."
        )
    for name in targets:
        stream = zlib.crc32(name.encode()) >> 1  # fits int32
        layers[name].add_experts(lora, jax.random.fold_in(key, stream), stream=stream)
    return targets
