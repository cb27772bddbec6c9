"""The config.json of diffusers' models, before it becomes a model's own configuration."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any


def known_values(config_json: Mapping[str, Any], known: Collection[str], component: str) -> dict[str, Any]:
    """The values of config.json without the keys that begin with "_", which are information only.

    Raises:
        ValueError: for a key that is not known; it names `component` and the nearest known key.
    """
    values = {key: value for key, value in config_json.items() if not key.startswith("_")}
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0) or list(known)
            raise ValueError(f"{component} config: unknown key {key!r} (nearest known: {nearest[0]!r}).")
    return values
