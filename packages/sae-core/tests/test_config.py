from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sae_core.config import Schedule, describe_fields, option, require, structure, unstructure, value_at
from sae_core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    widths: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Example:
    width: int = option(help="how wide")
    rate: float = 1.0
    k: int | Schedule = 3
    mode: Literal["fast", "slow"] = "fast"
    name: str | None = None
    flag: bool = False
    path: Path | None = None
    inner: Inner = Inner()
    names: tuple[str, ...] = ()
    all_or_some: bool | list[str] = False
    rates: dict[str, float] = field(default_factory=dict[str, float])

    def __post_init__(self) -> None:
        require(self.width > 0, f"width must be positive, not {self.width}")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"width": 1, "widht": 2}, "unknown key 'widht'; did you mean 'width'? (known: width, rate"),
        ({}, "missing key 'width'"),
        ({"width": "3"}, "expected int, found str '3' at width"),
        ({"width": 2.0}, "expected int, found float 2.0 at width"),
        ({"width": True}, "expected int, found bool True at width"),
        ({"width": 1, "flag": 1}, "expected bool, found int 1 at flag"),
        ({"width": 1, "name": 3}, "expected str | None, found int 3 at name"),
        ({"width": 1, "mode": "quick"}, "quick"),
        ({"width": 1, "k": "4"}, "expected int | Schedule, found str '4' at k"),
        (
            {"width": 1, "k": {"from": 3, "too": 4}},
            "schedule: unknown key ['too'] (known: from, to, over, shape, restarts)",
        ),
        ({"width": 1, "k": {"from": 3, "to": 4, "over": 0}}, "'over' is a fraction of the run in (0, 1], not 0"),
        ({"width": 1, "inner": {"width": 3}}, "unknown key 'inner.width'"),
        ({"width": 1, "inner": {"widths": [1, "a"]}}, "expected int, found str 'a' at inner.widths[1]"),
        ({"width": 1, "names": "ab"}, "expected a list at names, found str 'ab'"),
        ({"width": 1, "all_or_some": "ab"}, "expected a list at all_or_some, found str 'ab'"),
        ({"width": 1, "rates": ["ab"]}, "expected a mapping at rates, found list ['ab']"),
        ({"width": 1, "rates": {"a": "b"}}, "expected float, found str 'b' at rates['a']"),
        ({"width": 1, "path": ""}, "expected Path | None, found str '' at path"),
        ({"width": 0}, "width must be positive, not 0"),
    ],
)
def test_wrong_config_is_refused_with_place_and_finding(data: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        structure(data, Example, where="run.yaml")
    assert str(caught.value).startswith("run.yaml: ")
    assert message in str(caught.value)


def test_all_problems_of_keys_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'a'.*missing key 'width'.*unknown key 'inner\.b'"):
        structure({"a": 1, "inner": {"b": 2}}, Example)


def test_something_other_than_a_mapping_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a mapping of settings, found list"):
        structure([1], Example)  # pyright: ignore[reportArgumentType]


schedules = st.builds(Schedule, st.floats(-10, 10), st.floats(-10, 10), st.floats(0.01, 1.0))
examples = st.builds(
    Example,
    width=st.integers(1, 1000),
    rate=st.floats(0, 10),
    k=st.integers(1, 5) | schedules,
    mode=st.sampled_from(["fast", "slow"]),
    name=st.none() | st.text(max_size=5),
    flag=st.booleans(),
    path=st.none() | st.just(Path("a/b")),
    inner=st.builds(Inner, widths=st.lists(st.integers(), max_size=3).map(tuple)),
)


@given(examples)
def test_plain_data_and_back_gives_an_equal_config(config: Example) -> None:
    assert structure(unstructure(config), Example) == config


@given(schedules, st.floats(0, 1))
def test_a_schedule_stays_between_its_ends_and_reaches_the_last(schedule: Schedule, progress: float) -> None:
    low, high = sorted((schedule.start, schedule.end))
    assert low - 1e-9 <= value_at(schedule, progress) <= high + 1e-9
    assert value_at(schedule, 0.0) == schedule.start
    assert value_at(schedule, 1.0) == pytest.approx(schedule.end)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "3", True])
def test_a_schedule_of_something_else_than_finite_numbers_is_refused(bad: object) -> None:
    with pytest.raises(ConfigError, match="'start' must be a finite number"):
        Schedule(bad, 1.0)  # pyright: ignore[reportArgumentType]


def test_fields_are_described_for_people() -> None:
    width, rate, k, *_ = describe_fields(Example)
    assert (width.name, width.type, width.required, width.help) == ("width", "int", True, "how wide")
    assert (rate.required, rate.default) == (False, 1.0)
    assert k.type == "int | Schedule"
