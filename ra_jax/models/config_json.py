"""Checks on the keys of diffusers' config.json."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any


def check_settings(config_json: Mapping[str, Any], known_keys: Collection[str], component: str) -> dict[str, Any]:
    """Check the keys of config.json. Returns its settings, without the keys that begin with "_".

    Raises:
        ValueError: if a key is not in `known_keys`; the message names `component` and the nearest known key.
    """
    values = {key: value for key, value in config_json.items() if not key.startswith("_")}
    for key in values:
        if key not in known_keys:
            nearest = difflib.get_close_matches(key, known_keys, n=1, cutoff=0) or list(known_keys)
            raise ValueError(f"{component} config: unknown key {key!r} (nearest known: {nearest[0]!r}).")
    return values
