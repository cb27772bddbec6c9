"""Tests the model options for given flags."""

import jax.numpy as jnp
import pytest

from ra_jax.config.parse import from_flat_dict
from ra_jax.config.settings import ExpertsConfig
from ra_jax.models.flux import FluxOptions
from ra_jax.models.lora import BLOCK_LINEARS, LoRAConfig
from ra_jax.models.options import ModelOptions, expert_configs, model_options
from ra_jax.models.router import RouterConfig


def options_for_flags(**flags) -> ModelOptions:
    return model_options(from_flat_dict({"train_json_path": "none", "output_dir": "none"} | flags))


def test_expert_flags_set_the_configs_of_experts_and_router():
    lora, router = expert_configs(
        ExpertsConfig(
            use_lora=True,
            num_experts=2,
            lora_rank=4,
            lora_alpha=6.0,
            lora_dropout=0.1,
            target_modules="to_q",
            routing="topk",
            routing_temperature=0.5,
            router_floor=0.02,
            fixed_expert_weights=(0.7, 0.3),
        )
    )
    assert lora == LoRAConfig(num_experts=2, rank=4, alpha=6.0, dropout=0.1, target_modules="to_q")
    assert router == RouterConfig(num_experts=2, floor=0.02, temperature=0.5, routing="topk", fixed_weights=(0.7, 0.3))


def test_default_flags_give_the_default_configs_of_experts_and_router():
    experts = ExpertsConfig(use_lora=True)
    lora, router = expert_configs(experts)
    assert (lora.num_experts, lora.rank, lora.alpha) == (experts.num_experts, experts.lora_rank, experts.lora_alpha)
    assert lora.target_modules == BLOCK_LINEARS
    assert router.fixed_weights == experts.weights == (0.4, 0.3, 0.3)
    assert expert_configs(ExpertsConfig()) == (None, None)


def test_the_base_of_a_model_with_experts_is_frozen_and_has_the_compute_dtype():
    options = options_for_flags(use_lora=True, base_precision="int8", max_sequence_length=7)
    assert (options.text_tokens, options.train_base, options.int8) == (7, False, True)
    assert options.flux == FluxOptions(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, int8=True, remat="blocks")


def test_a_model_without_experts_is_trained_and_stored_in_float32():
    options = options_for_flags(use_lora=False)
    assert (options.lora, options.router, options.train_base) == (None, None, True)
    assert options.flux == FluxOptions(dtype=jnp.bfloat16, param_dtype=jnp.float32, remat="blocks")
    assert options_for_flags(use_lora=False, mixed_precision="no").flux.dtype == jnp.float32


@pytest.mark.parametrize(("flag", "remat"), [("none", "none"), ("products", "products"), ("points", "full")])
def test_gradient_checkpointing_sets_the_remat_policy(flag, remat):
    assert options_for_flags(use_lora=True, gradient_checkpointing=flag).remat == remat


def test_experts_without_a_router_are_refused():
    lora = LoRAConfig(num_experts=2, rank=2, alpha=2.0)
    with pytest.raises(ValueError, match=r"lora is LoRAConfig\(.*\) and router None: expected both, or None for both"):
        ModelOptions("float32", text_tokens=8, lora=lora)
