"""Errors that a user can fix. Every command prints the message of a `UserError` and exits with status 1."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_ERRORS_SHOWN = 20


@dataclass(frozen=True)
class RecordError:
    """One error in a data file.

    Attributes:
        message: what is wrong, and what is expected.
        record: number of the record, from 0; None if the error is not in one record.
        line: line of the file, from 1; only for JSONL files and malformed JSON, else None.
        field: name of the field; None if the error is not in one field.
    """

    message: str
    record: int | None = None
    line: int | None = None
    field: str | None = None

    def __str__(self) -> str:
        location = []
        if self.record is not None:
            location.append(f"record {self.record}")
        if self.line is not None:
            location.append(f"line {self.line}")
        if self.field is not None:
            location.append(f"field '{self.field}'")
        return f"{', '.join(location)}: {self.message}" if location else self.message


class UserError(ValueError):
    """A flag, file or folder that a command cannot use. The message says how to fix it."""


class DataError(UserError):
    """A data set that cannot be read or used, or invalid settings for a data set.

    Attributes:
        errors: all errors in the records; empty if the error is not in the records.
    """

    def __init__(self, message: str, errors: Sequence[RecordError] = ()):
        super().__init__(message)
        self.errors = tuple(errors)

    @classmethod
    def from_errors(cls, path: str | Path, errors: Sequence[RecordError]) -> "DataError":
        """Build the error for a data file. Its message lists the first 20 errors and gives the number of the others."""
        lines = [f"{path}: {len(errors)} error{'s' * (len(errors) > 1)} (records count from 0, lines from 1)"]
        lines += [f"  {error}" for error in errors[:MAX_ERRORS_SHOWN]]
        hidden = len(errors) - MAX_ERRORS_SHOWN
        if hidden > 0:
            lines.append(f"  … and {hidden} more: `python -m ra_jax.data validate {path}` lists all of them")
        return cls("\n".join(lines), errors)


class ConfigError(UserError):
    """A flag or TOML key that is unknown, has a wrong type or value, or contradicts another one."""


class WeightError(UserError):
    """Weights that are missing, cannot be read, or do not fit the model. The message lists every mismatch."""


class TargetError(UserError):
    """A setting `target_modules` that matches no layer of the model."""


class RewardError(UserError):
    """A reward that is unknown, cannot be imported or computed, or does not return [B] numbers."""


class CheckpointError(UserError):
    """A checkpoint that does not exist, or does not fit the model."""


class OutputError(UserError):
    """An output path that a command cannot use.

    The path is an input, contains an input or is inside an input. Or the command would replace files there that no
    earlier run of the command wrote. Or the path is not writable.
    """
