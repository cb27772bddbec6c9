"""Checks on the keys of diffusers' config.json."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any


def known_values(config_json: Mapping[str, Any], known: Collection[str], component: str) -> dict[str, Any]:
    """Return the values of config.json without the keys that begin with "_".

    Keys that begin with "_" carry no settings.

    Raises:
        ValueError: if a key is not in `known`; the message names `component` and the nearest known key.
    """
    values = {key: value for key, value in config_json.items() if not key.startswith("_")}
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0) or list(known)
            raise ValueError(f"{component} config: unknown key {key!r} (nearest known: {nearest[0]!r}).")
    return values
