"""Options for loading a model, and the options that a training configuration defines."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.typing import DTypeLike

from ra_jax.config.settings import ExpertsConfig, TrainConfig
from ra_jax.models.flux import FluxOptions
from ra_jax.models.lora import LoRAConfig
from ra_jax.models.router import RouterConfig


@dataclass(frozen=True)
class ModelOptions:
    """How a FLUX.1-Fill model is stored and computed, and its experts.

    Attributes:
        dtype: dtype of matmuls, and of the stored base if the base is frozen. The VAE is float32.
        text_tokens: length of the empty prompt, which is zeros before the image tokens.
        lora: experts on the transformer's layers; None: no experts.
        router: mixes the experts; None: no experts.
        remat: what is saved for the backward pass, a key of `blocks.REMAT_POLICIES`.
        train_base: whether the whole transformer is trained. If so, it is stored in float32.
        int8: whether the kernels of the blocks are stored in 8 bits (`quantization.quantize`).

    Raises:
        ValueError: if only one of `lora` and `router` is given.
    """

    dtype: DTypeLike
    text_tokens: int
    lora: LoRAConfig | None = None
    router: RouterConfig | None = None
    remat: str = "none"
    train_base: bool = False
    int8: bool = False

    def __post_init__(self):
        if (self.lora is None) != (self.router is None):
            raise ValueError(
                f"lora is {self.lora} and router {self.router}: expected both, or None for both (no experts)"
            )

    @property
    def flux(self) -> FluxOptions:
        """Options of the transformer."""
        param_dtype = jnp.float32 if self.train_base else self.dtype
        return FluxOptions(dtype=self.dtype, param_dtype=param_dtype, int8=self.int8, remat=self.remat)


def expert_configs(experts: ExpertsConfig) -> tuple[LoRAConfig, RouterConfig] | tuple[None, None]:
    """Build the LoRA and router configurations from the experts' flags; (None, None) without `--use_lora`."""
    if not experts.use_lora:
        return None, None
    target = {} if experts.target_modules is None else {"target_modules": experts.target_modules}
    lora = LoRAConfig(experts.num_experts, experts.lora_rank, experts.lora_alpha, experts.lora_dropout, **target)
    router = RouterConfig(
        num_experts=experts.num_experts,
        floor=experts.router_floor,
        temperature=experts.routing_temperature,
        routing=experts.routing,
        fixed_weights=experts.weights,
    )
    return lora, router


def model_options(config: TrainConfig) -> ModelOptions:
    """Build the options of the model that a configuration trains."""
    lora, router = expert_configs(config.experts)
    remat = config.model.gradient_checkpointing
    return ModelOptions(
        dtype=jnp.bfloat16 if config.model.mixed_precision == "bf16" else jnp.float32,
        text_tokens=config.model.max_sequence_length,
        lora=lora,
        router=router,
        remat="full" if remat == "points" else remat,
        train_base=not config.experts.use_lora,
        int8=config.model.base_precision == "int8",
    )
