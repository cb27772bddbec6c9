"""Tests which keys of config.json are read, ignored or refused."""

import pytest

from ra_jax.models.config_json import check_settings


def test_metadata_keys_of_diffusers_are_ignored():
    content = {"_class_name": "Model", "_diffusers_version": "1", "width": 3}
    assert check_settings(content, ["width", "depth"], "transformer") == {"width": 3}


def test_an_unknown_key_is_refused_with_the_nearest_known_key():
    with pytest.raises(ValueError, match=r"vae config: unknown key 'widht' \(nearest known: 'width'\)"):
        check_settings({"widht": 3}, ["depth", "width"], "vae")
    with pytest.raises(ValueError, match=r"unknown key '0' \(nearest known: 'depth'\)"):
        check_settings({"0": 3}, ["depth"], "vae")
