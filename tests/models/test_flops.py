"""FLOPs of a step, compared with counts by hand."""

from ra_jax.models.flops import ForwardCost, StepPasses, attention_flops, expert_flops, step_flops
from ra_jax.models.flux import FluxConfig


def test_human_scored_step():
    """3 records. Each takes 1 + 4 trained passes, which cost two forward passes each, and 4 passes of the reference.

    In 7 of 8 steps it also takes 4 forward passes of the old policy.
    """
    cost = ForwardCost(base=10.0, attention=0.0)
    passes = StepPasses(records=3, policy_passes=4, reference=True, old_policy_share=7 / 8)
    assert step_flops(cost, passes) == 30 * (5 * 2 + 3.5 + 4)
    whole = ForwardCost(base=10.0, attention=0.0, full_fine_tuning=True)
    assert step_flops(whole, StepPasses(records=3, policy_passes=0)) == 30 * 3


def test_automatic_step():
    """3 conditions with 8 rollouts of 6 forward passes.

    Each of the 2 updates takes one trained pass for the base loss and 4 trained passes per rollout.
    """
    cost = ForwardCost(base=10.0, attention=0.0)
    count = {"records": 3, "samples": 8, "rollout_steps": 6, "updates": 2, "policy_passes": 4}
    assert step_flops(cost, StepPasses(**count)) == 30 * (8 * 6 + 2 * (2 + 8 * 4 * 2))
    assert step_flops(cost, StepPasses(**count, reference=True, base_loss=False)) == 30 * (
        8 * 6 + 2 * 8 * 4 * 2 + 8 * 4
    )


def test_attention():
    """Per head and block, q·kᵀ takes S²·D multiply-adds, and weights·v as many. Both products have two gradients."""
    config = FluxConfig(
        num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=4, axes_dims_rope=(4, 6, 6)
    )
    attention = attention_flops(config, image_tokens=10, context_tokens=7)
    assert attention == 5 * 4 * (2 * 17 * 17 * 16 + 2 * 17 * 17 * 16)
    human = StepPasses(records=3, policy_passes=4)
    assert step_flops(ForwardCost(base=10.0, attention=4.0), human) == 3 * 5 * (10 + 10 + 4)
    whole = ForwardCost(base=10.0, attention=4.0, full_fine_tuning=True)
    assert step_flops(whole, human) == 3 * 5 * (10 + 10 + 4 + 6)


def test_experts():
    """The experts' products count in a forward pass, twice more in a backward pass, and not in the reference's."""
    cost = ForwardCost(base=10.0, attention=0.0, experts=1.0)
    flops = step_flops(cost, StepPasses(records=3, policy_passes=4, reference=True, old_policy_share=7 / 8))
    assert flops == 3 * (5 * (2 * 11 + 1) + 3.5 * 11 + 4 * 10)
    shapes = {
        "transformer_blocks/attn/to_q/lora_a": (2, 4, 3),
        "transformer_blocks/attn/add_q_proj/lora_b": (2, 3, 4),
        "transformer_blocks/ff_context/net/2/lora_a": (2, 16, 3),
        "transformer_blocks/norm1_context/linear/lora_a": (2, 4, 3),
        "single_transformer_blocks/proj_out/lora_a": (5, 20, 3),
    }
    by_hand = 2 * (10 * 24 + 7 * 24 + 7 * 96 + 1 * 24 + 17 * 300)
    assert expert_flops(shapes, image_tokens=10, context_tokens=7) == by_hand
