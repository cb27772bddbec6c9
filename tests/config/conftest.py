"""Fixtures for rejected command lines and for TOML files."""

from collections.abc import Callable, Sequence

import pytest

from ra_jax.config.parse import parse
from ra_jax.errors import ConfigError


@pytest.fixture
def catch_parse_error() -> Callable[[Sequence[str]], str]:
    """A function that parses a command line that must raise ConfigError, and returns the message."""

    def parse_and_catch(argv):
        with pytest.raises(ConfigError) as caught:
            parse(argv)
        return str(caught.value)

    return parse_and_catch


@pytest.fixture
def write_toml(tmp_path) -> Callable[[str], list[str]]:
    """A function that writes text to run.toml and returns the flags to read it."""

    def write(text):
        path = tmp_path / "run.toml"
        path.write_text(text, encoding="utf-8")
        return ["--config", str(path)]

    return write
