"""Parses a `TrainConfig` from a command line, a TOML file or a dictionary, and writes it as TOML.

`python -m ra_jax.train` uses `parse`. Callers that have settings in a dictionary use `from_flat_dict`. All functions
take the names and types of flags from the fields of `ra_jax.config.settings`, so that a new flag is added only there.
"""

import dataclasses
import difflib
import sys
import tomllib
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

import tomli_w
import tyro

from ra_jax.config.checks import find_problems
from ra_jax.config.settings import TrainConfig
from ra_jax.errors import ConfigError

_GROUPS: dict[str, type] = typing.get_type_hints(TrainConfig)  # group -> its dataclass
_TYPES: dict[str, Any] = {  # flat name of each flag and TOML key -> type, without its range
    name: hint for group in _GROUPS.values() for name, hint in typing.get_type_hints(group).items()
}
# Name in earlier versions -> present name. Flags, TOML files and checkpoints may still use the earlier name.
FORMER_NAMES = {"routing_specialisation": "routing_specialization"}
# Settings that were optional in earlier versions: what None meant. Checkpoints may still have it.
FORMER_NONE = {"checkpoints_total_limit": 0}
_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "none"}


def parse(argv: Sequence[str] | None = None) -> TrainConfig:
    """Parse a command line into a configuration.

    `--help` prints the help text and exits. A flag whose value cannot be parsed prints a message and exits.

    Args:
        argv: the arguments of the command; None for the arguments of this process.

    Raises:
        ConfigError: a flag or TOML key is unknown, a TOML value has the wrong type, a setting is out of range, or
            settings contradict each other.
    """
    argv, file = _split_config_file(_normalize_flags(sys.argv[1:] if argv is None else argv))
    config = tyro.cli(
        tyro.conf.OmitArgPrefixes[TrainConfig],
        args=argv,
        default=_build(load_toml(file) if file else {}),
        prog="python -m ra_jax.train",
        use_underscores=True,
    )
    return _validate(config)


def config_file(argv: Sequence[str] | None = None) -> Path | None:
    """Return the file of `--config FILE` in a command line; None if the flag is not given.

    argv: the arguments of the command; None for the arguments of this process.
    """
    _, file = _split_config_file(_normalize_flags(sys.argv[1:] if argv is None else argv))
    return None if file is None else Path(file)


def load_toml(path: str | Path) -> dict[str, Any]:
    """Read the settings of a TOML file, by flat name and with the types of the fields.

    Raises:
        ConfigError: the file cannot be read or is not TOML, a key is unknown, or a value has the wrong type. The
            message names the file and the key.
    """
    try:
        flat = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: no such file; expected a TOML file such as configs/tiny.toml") from None
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror}); expected a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not valid TOML: {error}") from None
    try:
        return _convert_settings(flat)
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}") from None


def from_flat_dict(flat: Mapping[str, Any]) -> TrainConfig:
    """Build and check a configuration from settings by flat name. Absent settings take their defaults.

    This is the inverse of `to_flat_dict`.

    Raises:
        ConfigError: as `parse` does.
    """
    return _validate(from_checkpoint(flat))


def from_checkpoint(flat: Mapping[str, Any]) -> TrainConfig:
    """Build the configuration of an earlier run from the settings in its checkpoint, without the checks of a new run.

    The checks could fail here, because the trackers of that run, such as wandb, need not be installed on this machine.

    Raises:
        ConfigError: a name is unknown, or a value has the wrong type.
    """
    return _build(_convert_settings(flat))


def to_flat_dict(config: TrainConfig) -> dict[str, Any]:
    """Return all settings by flat name. Tuples become lists, so that the result can be written as JSON."""
    flat: dict[str, Any] = {}
    for group in _GROUPS:
        flat |= dataclasses.asdict(getattr(config, group))
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}


def to_toml(config: TrainConfig) -> str:
    """Return the configuration as TOML that `--config` can read. Settings that are None are left out."""
    flat = to_flat_dict(config)
    sections = []
    for group, kind in _GROUPS.items():
        section = {field.name: flat[field.name] for field in dataclasses.fields(kind)}
        not_none = {name: value for name, value in section.items() if value is not None}
        sections.append(f"# {group}\n{tomli_w.dumps(not_none)}")
    return "\n".join(sections)


def convert_setting(name: str, value: Any, hint: Any) -> Any:
    """Convert `value` to the type `hint` of the setting `name`: 3 to 3.0 for a float, a list to a tuple.

    Raises:
        TypeError: the value has another type. The message names the setting, the value and the expected type.
    """
    try:
        return _convert(value, hint)
    except ValueError:
        raise TypeError(f"{name} = {value!r}: expected {_describe(hint)}") from None


def _normalize_flags(argv: Sequence[str]) -> list[str]:
    """Return `argv` with underscores for hyphens in flags, and with present names for former ones.

    Raises:
        ConfigError: a flag does not exist, or is given under both its present and its former name.
    """
    tokens, names = [], set()
    for token in argv:
        if not token.startswith("--"):
            tokens.append(token)
            continue
        flag, *value = token[2:].split("=", 1)
        name = flag.replace("-", "_")
        names.add(name)
        name = FORMER_NAMES.get(name, name)
        positive = name.removeprefix("no_")
        is_switched_off = positive != name and _TYPES.get(positive) is bool
        if not (name in _TYPES or is_switched_off or name in ("config", "help")):
            raise _unknown_name_error(name, f"flag --{flag}")
        tokens.append("=".join([f"--{name}", *value]))
    _check_former_names(names, prefix="--")
    return tokens


def to_present_names(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with present names for former ones (`FORMER_NAMES`)."""
    return {FORMER_NAMES.get(name, name): value for name, value in flat.items()}


def _check_former_names(names: Collection[str], prefix: str = "") -> None:
    """Raise ConfigError if a setting is given under both its present and its former name.

    prefix: text in front of the names in the message.
    """
    for former, name in FORMER_NAMES.items():
        if former in names and name in names:
            raise ConfigError(
                f"{prefix}{former} is the former name of {prefix}{name}, and both are given: give {prefix}{name} only"
            )


def _split_config_file(argv: list[str]) -> tuple[list[str], str | None]:
    """Return `argv` without `--config FILE`, and that file or None.

    Raises:
        ConfigError: no file follows the flag.
    """
    rest, file = [], None
    tokens: Iterator[str] = iter(argv)
    for token in tokens:
        if token == "--config":
            file = next(tokens, None)
            if file is None or file.startswith("--"):
                raise ConfigError("--config: no file given; expected a TOML file such as configs/tiny.toml")
        elif token.startswith("--config="):
            file = token.removeprefix("--config=")
        else:
            rest.append(token)
    return rest, file


def _build(settings: Mapping[str, Any]) -> TrainConfig:
    """Build a TrainConfig from settings of the right types. An absent required setting becomes `tyro.MISSING`."""
    groups: dict[str, dict[str, Any]] = {group: {} for group in _GROUPS}
    for group, kind in _GROUPS.items():
        for field in dataclasses.fields(kind):
            default = tyro.MISSING if field.default is dataclasses.MISSING else field.default
            groups[group][field.name] = settings.get(field.name, default)
    return TrainConfig(**{group: kind(**groups[group]) for group, kind in _GROUPS.items()})


def _validate(config: TrainConfig) -> TrainConfig:
    """Return `config` if it is complete and free of problems.

    Raises:
        ConfigError: one line for each missing setting or, if none is missing, for each problem.
    """
    required = [name for name, value in to_flat_dict(config).items() if value is tyro.MISSING]
    missing = [f"{name}: not given; add --{name} PATH" for name in required]
    if lines := missing or list(find_problems(config)):
        raise ConfigError("\n".join(lines))
    return config


def _convert_settings(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings `flat` with the types of the fields, and with present names for former ones.

    Raises:
        ConfigError: a name is unknown, a value has the wrong type, or a setting has a value under both its present
            and its former name (`FORMER_NAMES`).
    """
    _check_former_names(flat)
    flat = {name: FORMER_NONE.get(name) if value is None else value for name, value in to_present_names(flat).items()}
    for name, value in flat.items():
        if name not in _TYPES:
            if isinstance(value, dict):
                raise ConfigError(f"table [{name}]: settings are not in tables; write them without [{name}]")
            raise _unknown_name_error(name, f"key {name}")
    try:
        return {name: convert_setting(name, value, _TYPES[name]) for name, value in flat.items()}
    except TypeError as error:
        raise ConfigError(str(error)) from None


def _unknown_name_error(name: str, label: str) -> ConfigError:
    """Return the error for an unknown setting `name`, with the most similar known name.

    label: the flag or key as the user wrote it, such as "flag --num_exprts".
    """
    nearest = difflib.get_close_matches(name, [*_TYPES, "config"], n=1, cutoff=0.0)[0]
    return ConfigError(f"unknown {label}; the most similar name is {nearest}; --help lists all flags")


def _convert(value: Any, hint: Any) -> Any:
    """Convert `value` to the type `hint`, or to the first member of a union that it fits.

    Raises:
        ValueError: the value does not fit the type.
    """
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, UnionType):
        for option in options:
            try:
                return _convert(value, option)
            except ValueError:
                continue
    elif origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(item, options[0]) for item in value)
    elif origin is typing.Literal and value in options:
        return value
    elif hint is float and type(value) is int:
        return float(value)
    elif type(value) is hint:  # not isinstance(): bool is a subclass of int, and true is not a number here
        return value
    raise ValueError(value)


def _describe(hint: Any) -> str:
    """Return the type `hint` in words, for an error message."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, UnionType):
        return " or ".join(_describe(option) for option in options if option is not NoneType)
    if origin is tuple:
        return f"a list, each item {_describe(options[0])}"
    if origin is typing.Literal:
        return f"one of {', '.join(options)}" if len(options) > 1 else f'"{options[0]}"'
    return _TYPE_NAMES[hint]
