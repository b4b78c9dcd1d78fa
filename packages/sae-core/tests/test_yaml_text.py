"""YAML as people write it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sae_core.errors import ConfigError
from sae_core.yaml_text import parse_yaml, set_by_override, to_yaml


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1e-4", 1e-4),
        ("3E5", 300_000),
        ("-2e+3", -2000),
        ("+.5e1", 5),
        ("1.e2", 100),
        ("1.5e3", 1500),
        ("1.5e0", 1.5),
        ("2.0", 2.0),
        ("1e400", float("inf")),
        ("1.0e-4", 1e-4),
    ],
)
def test_numbers_with_an_exponent_are_numbers_and_whole_where_they_have_no_fraction(
    text: str, number: int | float
) -> None:
    assert parse_yaml(text) == number
    assert type(parse_yaml(text)) is type(number)


@pytest.mark.parametrize("text", ["e5", "1e", "1e5x", "layer1e5", "1e-4-5", "'1e-4'", "v1.2e3"])
def test_names_that_only_resemble_numbers_stay_text(text: str) -> None:
    assert isinstance(parse_yaml(text), str)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_that_python_writes_is_read_back(value: float) -> None:
    assert parse_yaml(repr(value)) == value


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from(["1e5", "-2.e3", "yes", "null", "1_000", "0x1f", "2020-01-01", "1:30"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=4))
def test_what_is_written_is_read_back(data: dict[str, Any]) -> None:
    assert parse_yaml(to_yaml(data)) == data


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: the key 'a' is given twice"),
        ("x: {k: 1, k: 1}", "line 1: the key 'k' is given twice"),
        ("? [1, 2]\n: x\n", "cannot be a key"),
        ("a: [", "not valid YAML"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_what_would_be_lost_or_run_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_yaml(text)


def test_an_override_reaches_nested_settings_and_makes_missing_groups() -> None:
    settings: dict[str, Any] = {"train": {"lr": 0.1, "batch_size": 8}, "empty": None}
    for override in ("train.lr=1e-3", "sae.k=[1, 2]", "empty.x=a=b"):
        set_by_override(settings, override)
    assert settings == {"train": {"lr": 0.001, "batch_size": 8}, "sae": {"k": [1, 2]}, "empty": {"x": "a=b"}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr", "write key=value"),
        ("=3", "write key=value"),
        ("a..b=3", "write key=value"),
        ("lr.x=3", "'lr' is one value"),
        ("lr=[", "not valid YAML"),
    ],
)
def test_an_override_that_cannot_be_followed_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        set_by_override({"lr": 0.1}, override)
