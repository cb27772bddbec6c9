"""Ranges of fields: each kind of range, and the range of every numeric flag of training."""

import math
import typing
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

import pytest

from ra_jax.config.checks import find_problems
from ra_jax.config.parse import from_flat_dict
from ra_jax.config.ranges import (
    Range,
    above,
    above_and_at_most,
    at_least,
    at_least_and_below,
    between,
    field_ranges,
    finite,
    out_of_range,
)
from ra_jax.config.settings import TrainConfig

ABOVE_MILLIONTH, BELOW_THOUSAND = math.nextafter(1e-6, 1), math.nextafter(1000, 0)
TINY, BELOW_ONE, ABOVE_ONE = math.ulp(0.0), math.nextafter(1, 0), math.nextafter(1, 2)

# (range, its words, numbers inside with the edges first, numbers outside with the nearest first)
CASES = [
    (finite(), "a finite number", (0, -1e308, 1e308), ()),
    (at_least(0), "a value at least 0", (0, TINY, 7), (-TINY, -1)),
    (at_least(1), "a value at least 1", (1, 2, 1.5), (BELOW_ONE, 0, -1)),
    (at_least(1, or_exactly=-1), "a value -1 or at least 1", (-1, 1, 2), (BELOW_ONE, -BELOW_ONE, -ABOVE_ONE, 0, -2)),
    (above(0), "a value greater than 0", (TINY, 1), (0, -TINY, -1)),
    (at_least_and_below(0, 1), "a value at least 0 and below 1", (0, BELOW_ONE), (-TINY, 1, -1, 2)),
    (above_and_at_most(0, 1), "a value greater than 0 and at most 1", (TINY, 1), (0, ABOVE_ONE, -1, 2)),
    (between(0, 1), "a value between 0 and 1, both excluded", (TINY, BELOW_ONE), (0, 1, -1, 2)),
    (
        between(1e-6, 1000),
        "a value between 1e-06 and 1000, both excluded",
        (ABOVE_MILLIONTH, BELOW_THOUSAND),
        (1e-6, 1000, 0, -1),
    ),
]
NUMBERS = {words: (inside, (*outside, math.nan, math.inf, -math.inf)) for _, words, inside, outside in CASES}


@dataclass(frozen=True)
class Inner:
    """Settings within settings."""

    rate: Annotated[float, above(0)] = 0.1


@dataclass(frozen=True)
class Outer:
    """Every kind of field."""

    steps: Annotated[int | None, at_least(1)] = None
    temperature: Annotated[float | Literal["auto"], above(0)] = "auto"
    weights: Annotated[tuple[float, ...], at_least(0)] = ()
    metavar: Annotated[float, "an annotation for another library"] = -1.0
    name: str = "x"
    inner: Inner = Inner()


def number_type(hint: typing.Any) -> type | None:
    """Return float or int if the annotation `hint` is such a number, or a union or tuple with one; else None."""
    members = {hint, *typing.get_args(hint)}
    return next((kind for kind in (float, int) if kind in members), None)


def numeric_flags() -> dict[str, tuple[type, type]]:
    """Return the group and the type, int or float, of each numeric flag of training, by name."""
    hints = {group: typing.get_type_hints(group) for group in typing.get_type_hints(TrainConfig).values()}
    kinds = {name: (group, number_type(hint)) for group in hints for name, hint in hints[group].items()}
    return {name: (group, kind) for name, (group, kind) in kinds.items() if kind is not None}


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    """A configuration with default settings."""
    return from_flat_dict({"train_json_path": "data.json", "output_dir": "out"})


@pytest.mark.parametrize(("limit", "words"), [case[:2] for case in CASES], ids=[case[1] for case in CASES])
def test_edges(limit, words):
    inside, outside = NUMBERS[words]
    assert limit.expected == words
    assert [value for value in inside if not limit.contains(value)] == []
    assert [value for value in outside if limit.contains(value)] == []


def test_out_of_range_names_field_value_and_range():
    wrong = Outer(steps=0, temperature=-0.5, weights=(0.5, -0.1, math.nan), inner=Inner(rate=math.inf))
    assert list(out_of_range(wrong)) == [
        "steps = 0: expected a value at least 1",
        "temperature = -0.5: expected a value greater than 0",
        "weights = -0.1: expected a value at least 0",
        "weights = nan: expected a value at least 0",
        "rate = inf: expected a value greater than 0",
    ]
    assert list(out_of_range(Outer(metavar=math.nan))) == []


def test_none_text_and_empty_tuples_are_in_every_range():
    assert list(out_of_range(Outer())) == []
    assert list(out_of_range(Outer(steps=1, temperature=0.5, weights=(0.0, 1.0)))) == []


def test_field_ranges_are_found_by_name():
    assert field_ranges(Outer) == {"steps": at_least(1), "temperature": above(0), "weights": at_least(0)}
    assert field_ranges(Inner) == {"rate": Range("a value greater than 0", 0, includes_low=False)}


def test_every_numeric_flag_has_a_range_and_no_other_has():
    ranged = {name for group in typing.get_type_hints(TrainConfig).values() for name in field_ranges(group)}
    assert ranged == set(numeric_flags())


def test_numeric_flags_are_recognized():
    found = {name: kind for name, (_, kind) in numeric_flags().items()}
    assert found["lora_rank"] is found["max_train_steps"] is int
    assert found["lora_alpha"] is found["policy_temperature"] is found["fixed_expert_weights"] is float
    assert not {"use_lora", "optimizer", "output_dir", "expert_names", "report_to"} & set(found)


@pytest.mark.parametrize("name", numeric_flags())
def test_every_flags_edges(name, config):
    group, kind = numeric_flags()[name]
    limit = field_ranges(group)[name]
    (field,) = (field.name for field in fields(config) if isinstance(getattr(config, field.name), group))
    many = isinstance(getattr(getattr(config, field), name), tuple)

    def messages(value):
        changed = replace(getattr(config, field), **{name: (value,) if many else value})
        return list(find_problems(replace(config, **{field: changed})))

    def message(value):
        return f"{name} = {value}: expected {limit.expected}"

    inside, outside = ([kind(x) for x in numbers if kind is float or x % 1 == 0] for numbers in NUMBERS[limit.expected])
    assert inside and outside
    assert [value for value in inside if message(value) in messages(value)] == []
    assert [value for value in outside if messages(value) != [message(value)]] == []


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--num_generations", "0"], "num_generations = 0: expected a value at least 1"),
        (["--learning_rate", "0"], "learning_rate = 0.0: expected a value greater than 0"),
        (["--learning_rate", "nan"], "learning_rate = nan: expected a value greater than 0"),
        (["--max_train_steps", "-3"], "max_train_steps = -3: expected a value at least 1"),
        (["--policy_temperature", "inf"], "policy_temperature = inf: expected a value greater than 0"),
        (["--fixed_expert_weights", "-1", "1", "1"], "fixed_expert_weights = -1.0: expected a value at least 0"),
        (["--mesh_data", "0"], "mesh_data = 0: expected a value -1 or at least 1"),
        (["--clip_range", "1"], "clip_range = 1.0: expected a value between 0 and 1, both excluded"),
    ],
)
def test_a_command_line_out_of_range_is_refused(flags, expected, catch_parse_error):
    assert catch_parse_error(["--train_json_path", "data.json", "--output_dir", "out", *flags]) == expected


def test_values_out_of_range_are_named_together_and_without_contradictions(catch_parse_error):
    flags = [
        "--clip_range",
        "2",
        "--lora_rank",
        "0",
        "--use_human_scores",
        "--train_json_path",
        "d",
        "--output_dir",
        "o",
    ]
    assert [line.split(" =")[0] for line in catch_parse_error(flags).splitlines()] == ["lora_rank", "clip_range"]


def test_a_toml_value_out_of_range_is_refused(catch_parse_error, write_toml):
    flags = write_toml('train_json_path = "d"\noutput_dir = "o"\nema_decay = 1\n')
    assert catch_parse_error(flags) == "ema_decay = 1.0: expected a value at least 0 and below 1"
