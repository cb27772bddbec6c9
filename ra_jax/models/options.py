"""From the configuration's experts to the model's."""

from typing import Any

import jax.numpy as jnp

from ra_jax.config.settings import ExpertsConfig, TrainConfig
from ra_jax.models.lora import LoRAConfig
from ra_jax.models.router import RouterConfig


def expert_configs(experts: ExpertsConfig) -> tuple[LoRAConfig, RouterConfig] | tuple[None, None]:
    """LoRA and router as `--use_lora` and the flags beside it ask for; (None, None) without it."""
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


def model_options(config: TrainConfig) -> dict[str, Any]:
    """What `load_fill_model`, and `abstract_fill_model` for shapes, are told beside the model's place or sizes."""
    lora, router = expert_configs(config.experts)
    return {
        "lora": lora,
        "router": router,
        "dtype": jnp.bfloat16 if config.model.mixed_precision == "bf16" else jnp.float32,
        "text_tokens": config.model.max_sequence_length,
        "remat": "full" if config.model.gradient_checkpointing == "points" else config.model.gradient_checkpointing,
        "train_base": not config.experts.use_lora,
        "int8": config.model.base_precision == "int8",
    }
