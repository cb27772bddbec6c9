"""Ranges of numeric settings, declared on the fields of a settings dataclass, and their check.

    @dataclass(frozen=True)
    class Settings:
        rate: Annotated[float, above(0)] = 1e-4
        steps: Annotated[int | None, at_least(1)] = None

    list(out_of_range(Settings(rate=0.0)))  # ["rate = 0.0: expected a value greater than 0"]

A range applies to the number in its field, or to each number of a tuple. None and text such as "auto" are not checked.
The parsers of the command line (tyro) and of TOML use only the annotated type and ignore the range.
"""

import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """The finite numbers between `low` and `high`, and the value `or_exactly`.

    Attributes:
        expected: the range in words, for error messages.
        low: lower bound, or minus infinity.
        high: upper bound, or infinity.
        includes_low: whether `low` itself is in the range.
        includes_high: whether `high` itself is in the range.
        or_exactly: one more valid value, outside the bounds; None for none.
    """

    expected: str
    low: float = -math.inf
    high: float = math.inf
    includes_low: bool = True
    includes_high: bool = True
    or_exactly: float | None = None

    def contains(self, value: float) -> bool:
        """Return whether `value` is in the range. NaN and the infinities are in no range."""
        if value == self.or_exactly:
            return True
        above_low = self.low <= value if self.includes_low else self.low < value
        below_high = value <= self.high if self.includes_high else value < self.high
        return math.isfinite(value) and above_low and below_high


def finite() -> Range:
    """Return the range of all numbers but NaN and the infinities."""
    return Range("a finite number")


def at_least(low: float, *, or_exactly: float | None = None) -> Range:
    """Return the range low <= x. `or_exactly` adds one value with a special meaning, such as -1 for "all"."""
    exactly = "" if or_exactly is None else f"{or_exactly} or "
    return Range(f"a value {exactly}at least {low}", low, or_exactly=or_exactly)


def above(low: float) -> Range:
    """Return the range low < x."""
    return Range(f"a value greater than {low}", low, includes_low=False)


def at_least_and_below(low: float, high: float) -> Range:
    """Return the range low <= x < high."""
    return Range(f"a value at least {low} and below {high}", low, high, includes_high=False)


def above_and_at_most(low: float, high: float) -> Range:
    """Return the range low < x <= high."""
    return Range(f"a value greater than {low} and at most {high}", low, high, includes_low=False)


def between(low: float, high: float) -> Range:
    """Return the range low < x < high."""
    expected = f"a value between {low} and {high}, both excluded"
    return Range(expected, low, high, includes_low=False, includes_high=False)


def field_ranges(kind: type) -> dict[str, Range]:
    """Return the ranges of a settings dataclass by field name. Fields without a range are left out."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {
        field.name: extra
        for field in fields(kind)
        for extra in getattr(hints[field.name], "__metadata__", ())
        if isinstance(extra, Range)
    }


def out_of_range(settings: Any) -> Iterator[str]:
    """Yield "name = value: expected ..." for each number that is outside its field's range.

    settings: a settings dataclass. Fields that are dataclasses themselves, such as the groups of a `TrainConfig`, are
    checked recursively.
    """
    limits = field_ranges(type(settings))
    for field in fields(settings):
        value, limit = getattr(settings, field.name), limits.get(field.name)
        if is_dataclass(value):
            yield from out_of_range(value)
        elif limit is not None:
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, int | float) and not limit.contains(item):
                    yield f"{field.name} = {item}: expected {limit.expected}"
