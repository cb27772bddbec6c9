"""Parse human scores of a result: {"removal_score": s, ...} or [removal, background, smoothness], each in [0, 1]."""

import difflib
import math
from collections.abc import Iterable, Iterator
from typing import Literal

SCORE_NAMES = ("removal_score", "background_score", "smoothness_score")

ScoreFormat = Literal["dict", "tensor"]
Scores = tuple[float, float, float]

_FORMATS = {
    "dict": (dict, "an object with " + ", ".join(SCORE_NAMES)),
    "tensor": (list, "a list [removal, background, smoothness]"),
}


def parse_scores(value: object, score_format: ScoreFormat | None) -> tuple[Scores | None, list[tuple[str, str]]]:
    """Return the three scores, and the errors in them as pairs (field, message); with errors, the scores are None.

    Args:
        value: scores as written in the data set.
        score_format: expected format; None accepts both.
    """
    value_format = next((name for name, (kind, _) in _FORMATS.items() if isinstance(value, kind)), None)
    expected = score_format or value_format or "dict"
    if value_format != expected:
        advice = f"; pass --score_format {value_format}" if value_format else ""
        text = f"Expected {expected} format for scores, got {type(value)}"
        return None, [("scores", f"{text}: expected {_FORMATS[expected][1]}{advice}")]
    problems = list(_dict_problems(value) if value_format == "dict" else _list_problems(value))
    if problems:
        return None, problems
    numbers = [value[name] for name in SCORE_NAMES] if value_format == "dict" else value
    return tuple(float(number) for number in numbers), []


def suggest_name(name: str, known: Iterable[str]) -> str:
    """Return advice for an unknown name: a text with the known names and, if one is similar, a suggestion."""
    known = list(known)
    similar = difflib.get_close_matches(name, known, n=1)
    return f"expected one of {', '.join(known)}" + (f"; did you mean '{similar[0]}'?" if similar else "")


def _dict_problems(value: dict) -> Iterator[tuple[str, str]]:
    for name in value:
        if name not in SCORE_NAMES:
            yield f"scores.{name}", f"unknown score: {suggest_name(name, SCORE_NAMES)}"
    for name in SCORE_NAMES:
        if name not in value:
            yield f"scores.{name}", "score missing: expected a number in [0, 1]"
        elif problem := _number_problem(value[name]):
            yield f"scores.{name}", problem


def _list_problems(value: list) -> Iterator[tuple[str, str]]:
    if len(value) != len(SCORE_NAMES):
        yield "scores", f"{len(value)} scores: expected {len(SCORE_NAMES)}, [removal, background, smoothness]"
        return
    for i, number in enumerate(value):
        if problem := _number_problem(number):
            yield f"scores[{i}]", problem


def _number_problem(number: object) -> str | None:
    # bool is a subclass of int, but "true" is not a score.
    if isinstance(number, bool) or not isinstance(number, int | float):
        return f"not a number, got {number!r} ({type(number).__name__}): expected a number in [0, 1]"
    if math.isnan(number):
        return "NaN: expected a number in [0, 1]"
    if not 0 <= number <= 1:
        return f"out of range, got {number}: expected a number in [0, 1]"
    return None
