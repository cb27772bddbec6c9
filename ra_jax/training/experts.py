"""From the configuration's experts to the model's."""

from ra_jax.config import ExpertsConfig
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
