"""Errors that a user can mend: every command prints the message of a `UserError` and exits with status 1."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_ERRORS_SHOWN = 20


@dataclass(frozen=True)
class RecordError:
    """One thing to mend. `record` counts from 0, `line` (of a JSONL or broken JSON file) from 1."""

    message: str
    record: int | None = None
    line: int | None = None
    field: str | None = None

    def __str__(self) -> str:
        where = []
        if self.record is not None:
            where.append(f"record {self.record}")
        if self.line is not None:
            where.append(f"line {self.line}")
        if self.field is not None:
            where.append(f"field '{self.field}'")
        return f"{', '.join(where)}: {self.message}" if where else self.message


class UserError(ValueError):
    """A flag, file or folder that a command cannot work with; the message says what to do."""


class DataError(UserError):
    """A data set, or a wish for one, that cannot be served; `faults` holds every one that was found."""

    def __init__(self, message: str, errors: Sequence[RecordError] = ()):
        super().__init__(message)
        self.errors = tuple(errors)

    @classmethod
    def from_errors(cls, path: str | Path, errors: Sequence[RecordError]) -> "DataError":
        """The report of a data file: 20 faults in full, the rest counted."""
        lines = [f"{path}: {len(errors)} fault{'s' * (len(errors) > 1)} (records count from 0, lines from 1)"]
        lines += [f"  {error}" for error in errors[:MAX_ERRORS_SHOWN]]
        hidden = len(errors) - MAX_ERRORS_SHOWN
        if hidden > 0:
            lines.append(f"  … and {hidden} more: `python -m ra_jax.data validate {path}` lists them all")
        return cls("\n".join(lines), errors)


class ConfigError(UserError):
    """A flag or TOML key that is unknown, of the wrong type, or contradicts another."""


class WeightError(UserError):
    """Weights that cannot be found, read, or fitted to the model; the message is the whole report."""


class TargetError(UserError):
    """`target_modules` names no layer of this model."""


class RewardError(UserError):
    """A reward that is not known, cannot be had, or does not do what a reward must."""


class CheckpointError(UserError):
    """A checkpoint that is not there, or does not belong to this model."""


class OutputError(UserError):
    """An output that is, holds or lies in what the command reads, or that would replace what no such command wrote."""
