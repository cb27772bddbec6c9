"""From a command line, a TOML file or a checkpoint to a `TrainConfig`, and back to TOML.

`parse` serves `python -m ra_jax.train`; `from_flat_dict` serves callers with settings in a dictionary. Everything here
reads the flags from the fields of `ra_jax.config.settings`: a flag that is added there needs no other entry.
"""

import dataclasses
import difflib
import sys
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

import tomli_w
import tyro

from ra_jax.config.checks import find_problems
from ra_jax.config.settings import TrainConfig
from ra_jax.errors import ConfigError

_GROUPS: dict[str, type] = typing.get_type_hints(TrainConfig)  # group -> its dataclass
_TYPES: dict[str, Any] = {  # flat name -> type, without its range: every flag and TOML key there is
    name: hint for group in _GROUPS.values() for name, hint in typing.get_type_hints(group).items()
}
# Settings by a name of earlier versions: flags, TOML files and checkpoints may still say these.
FORMER_NAMES = {"routing_specialisation": "routing_specialization"}
_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "none"}


def parse(argv: Sequence[str] | None = None) -> TrainConfig:
    """The configuration that a command line asks for (default: this process's).

    Raises ConfigError for unknown flags and TOML keys, TOML values of the wrong type, settings out of range
    and contradictory ones; exits with a message, as command lines do, for `--help` and for flags whose value
    cannot be read.
    """
    argv, file = _split_config_file(_known_flags(sys.argv[1:] if argv is None else argv))
    config = tyro.cli(
        tyro.conf.OmitArgPrefixes[TrainConfig],
        args=argv,
        default=_build(load_toml(file) if file else {}),
        prog="python -m ra_jax.train",
        use_underscores=True,
    )
    return _checked(config)


def config_file(argv: Sequence[str] | None = None) -> Path | None:
    """The file that `--config` names on a command line (default: this process's); None without it."""
    _, file = _split_config_file(_known_flags(sys.argv[1:] if argv is None else argv))
    return None if file is None else Path(file)


def load_toml(path: str | Path) -> dict[str, Any]:
    """Settings of a TOML file by flat name, typed as the fields are.

    Raises ConfigError, naming file and key, for keys that do not exist and values of the wrong type.
    """
    try:
        flat = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: no such file; expected TOML like configs/tiny.toml") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--config {path}: not valid TOML: {error}") from None
    try:
        return _typed_settings(flat)
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}") from None


def from_flat_dict(flat: Mapping[str, Any]) -> TrainConfig:
    """The inverse of `to_flat_dict`; absent settings take their defaults. Raises ConfigError like `parse`."""
    return _checked(from_checkpoint(flat))


def from_checkpoint(flat: Mapping[str, Any]) -> TrainConfig:
    """The settings of a run that has been trained, without a new one's checks: its trackers may be missing here."""
    return _build(_typed_settings(flat))


def to_flat_dict(config: TrainConfig) -> dict[str, Any]:
    """Every setting by its flat name; tuples become lists, so that the result is JSON."""
    flat: dict[str, Any] = {}
    for group in _GROUPS:
        flat |= dataclasses.asdict(getattr(config, group))
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}


def to_toml(config: TrainConfig) -> str:
    """The resolved configuration as TOML that `--config` reads back; settings that are None are left out."""
    flat = to_flat_dict(config)
    sections = []
    for group, kind in _GROUPS.items():
        section = {field.name: flat[field.name] for field in dataclasses.fields(kind)}
        given = {name: value for name, value in section.items() if value is not None}
        sections.append(f"# {group}\n{tomli_w.dumps(given)}")
    return "\n".join(sections)


def typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the annotation `hint` of the setting `name` has it: 3 as 3.0 for a float, a list as a tuple.

    Raises TypeError that names the setting, the value and what is expected.
    """
    try:
        return _converted(value, hint)
    except ValueError:
        raise TypeError(f"{name} = {value!r}: expected {_described(hint)}") from None


def _known_flags(argv: Sequence[str]) -> list[str]:
    """`argv` with flags spelt with underscores. Raises ConfigError for a flag that does not exist."""
    spelt = []
    for token in argv:
        if not token.startswith("--"):
            spelt.append(token)
            continue
        flag, *value = token[2:].split("=", 1)
        name = flag.replace("-", "_")
        name = FORMER_NAMES.get(name, name)
        positive = name.removeprefix("no_")
        switched_off = positive != name and _TYPES.get(positive) is bool
        if not (name in _TYPES or switched_off or name in ("config", "help")):
            raise _unknown(name, f"flag --{flag}")
        spelt.append("=".join([f"--{name}", *value]))
    return spelt


def _split_config_file(argv: list[str]) -> tuple[list[str], str | None]:
    """`argv` without `--config FILE`, and that file. Raises ConfigError where no file follows the flag."""
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
    """TrainConfig from typed settings; those that have neither value nor default are `tyro.MISSING`."""
    groups: dict[str, dict[str, Any]] = {group: {} for group in _GROUPS}
    for group, kind in _GROUPS.items():
        for field in dataclasses.fields(kind):
            default = tyro.MISSING if field.default is dataclasses.MISSING else field.default
            groups[group][field.name] = settings.get(field.name, default)
    return TrainConfig(**{group: kind(**groups[group]) for group, kind in _GROUPS.items()})


def _checked(config: TrainConfig) -> TrainConfig:
    """`config`, or a ConfigError with a line for each setting that is missing, else for each of its problems."""
    required = [name for name, value in to_flat_dict(config).items() if value is tyro.MISSING]
    missing = [f"{name}: not given; expected a path; add --{name} PATH" for name in required]
    if lines := missing or list(find_problems(config)):
        raise ConfigError("\n".join(lines))
    return config


def _typed_settings(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`flat` with the fields' types and present names (`FORMER_NAMES`).

    Raises ConfigError for an unknown name, for a value of the wrong type, and for a setting under both its names.
    """
    for former, name in FORMER_NAMES.items():
        if former in flat and name in flat:
            raise ConfigError(f"{former} and {name} are the same setting: give {name} only")
    flat = {FORMER_NAMES.get(name, name): value for name, value in flat.items()}
    for name, value in flat.items():
        if name not in _TYPES:
            is_table = isinstance(value, dict)
            raise _unknown(name, f"table [{name}], settings stand outside tables" if is_table else f"key {name}")
    try:
        return {name: typed(name, value, _TYPES[name]) for name, value in flat.items()}
    except TypeError as error:
        raise ConfigError(str(error)) from None


def _unknown(name: str, what: str) -> ConfigError:
    """The error for `what`, a flag, key or table called `name`, with the most similar name there is."""
    nearest = difflib.get_close_matches(name, [*_TYPES, "config"], n=1, cutoff=0.0)[0]
    return ConfigError(f"unknown {what}; the nearest known one is {nearest}; --help lists them all")


def _converted(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`; of a union, as the first member that takes it. Raises ValueError if none does."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, UnionType):
        for option in options:
            try:
                return _converted(value, option)
            except ValueError:
                continue
    elif origin is tuple and isinstance(value, list | tuple):
        return tuple(_converted(item, options[0]) for item in value)
    elif origin is typing.Literal and value in options:
        return value
    elif hint is float and type(value) is int:
        return float(value)
    elif type(value) is hint:  # not isinstance: true is no whole number
        return value
    raise ValueError(value)


def _described(hint: Any) -> str:
    """The type `hint` in words, for an error message."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, UnionType):
        return " or ".join(_described(option) for option in options if option is not NoneType)
    if origin is tuple:
        return f"a list, each item {_described(options[0])}"
    if origin is typing.Literal:
        return f"one of {', '.join(options)}" if len(options) > 1 else f'"{options[0]}"'
    return _TYPE_NAMES[hint]
