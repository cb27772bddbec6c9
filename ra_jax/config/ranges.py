"""The range of a number, written where the flag is declared, and the check of a whole settings object.

    @dataclass(frozen=True)
    class Settings:
        rate: Annotated[float, above(0)] = 1e-4
        steps: Annotated[int | None, at_least(1)] = None

    list(out_of_range(Settings(rate=0.0)))  # ["rate = 0.0: expected a value greater than 0"]

A range applies to the numbers of its field: to the value itself, or to each item of a tuple. None and text such as
"auto" are not checked. The command line (tyro) and TOML see the annotated type only.
"""

import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`, and `or_exactly`.

    Attributes:
        expected: the range in words, as an error message gives it.
        low, high: the bounds; infinite where there is none.
        includes_low, includes_high: whether the bounds belong to the range.
        or_exactly: one value outside the bounds that is valid too.
    """

    expected: str
    low: float = -math.inf
    high: float = math.inf
    includes_low: bool = True
    includes_high: bool = True
    or_exactly: float | None = None

    def holds(self, value: float) -> bool:
        """Whether `value` lies in the range; NaN and the infinities never do."""
        if value == self.or_exactly:
            return True
        above_low = self.low <= value if self.includes_low else self.low < value
        below_high = value <= self.high if self.includes_high else value < self.high
        return math.isfinite(value) and above_low and below_high


def finite() -> Range:
    """Every number but NaN and the infinities."""
    return Range("a finite number")


def at_least(low: float, *, or_exactly: float | None = None) -> Range:
    """low <= x, or x = or_exactly: a value, such as -1, that has a meaning of its own."""
    exactly = "" if or_exactly is None else f"{or_exactly} or "
    return Range(f"a value {exactly}at least {low}", low, or_exactly=or_exactly)


def above(low: float) -> Range:
    """low < x."""
    return Range(f"a value greater than {low}", low, includes_low=False)


def at_least_and_below(low: float, high: float) -> Range:
    """low <= x < high."""
    return Range(f"a value at least {low} and below {high}", low, high, includes_high=False)


def above_and_at_most(low: float, high: float) -> Range:
    """low < x <= high."""
    return Range(f"a value greater than {low} and at most {high}", low, high, includes_low=False)


def between(low: float, high: float) -> Range:
    """low < x < high."""
    words = f"a value between {low} and {high}, both excluded"
    return Range(words, low, high, includes_low=False, includes_high=False)


def field_ranges(kind: type) -> dict[str, Range]:
    """The ranges of a settings dataclass by field name; fields without one are left out."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {
        field.name: extra
        for field in fields(kind)
        for extra in getattr(hints[field.name], "__metadata__", ())
        if isinstance(extra, Range)
    }


def out_of_range(settings: Any) -> Iterator[str]:
    """Yields "name = value: expected ..." for each number of a settings dataclass outside its field's range.

    Fields that are dataclasses, such as the groups of a `TrainConfig`, are checked in turn.
    """
    limits = field_ranges(type(settings))
    for field in fields(settings):
        value, limit = getattr(settings, field.name), limits.get(field.name)
        if is_dataclass(value):
            yield from out_of_range(value)
        elif limit is not None:
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, int | float) and not limit.holds(item):
                    yield f"{field.name} = {item}: expected {limit.expected}"
