"""Tests which keys of config.json are read, ignored or refused."""

import pytest

from ra_jax.models.config_json import known_values


def test_metadata_keys_of_diffusers_are_ignored():
    content = {"_class_name": "Model", "_diffusers_version": "1", "width": 3}
    assert known_values(content, ["width", "depth"], "transformer") == {"width": 3}


def test_an_unknown_key_is_refused_with_the_nearest_known_key():
    with pytest.raises(ValueError, match=r"vae config: unknown key 'widht' \(nearest known: 'width'\)"):
        known_values({"widht": 3}, ["depth", "width"], "vae")
    with pytest.raises(ValueError, match=r"unknown key '0' \(nearest known: 'depth'\)"):
        known_values({"0": 3}, ["depth"], "vae")
