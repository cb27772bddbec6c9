"""What is shared out over replicas."""

import pytest

from ra_jax.training.mesh import local_conditions


def test_conditions_are_shared_out_evenly_and_groups_are_not_divided():
    assert local_conditions(conditions=6, generations=8, replicas=2) == 3
    with pytest.raises(ValueError, match=r"3 conditions of 8 rollouts .* by 2 replicas.*--train_batch_size 4"):
        local_conditions(conditions=3, generations=8, replicas=2)
