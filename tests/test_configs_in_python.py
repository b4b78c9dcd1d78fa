"""Configs made in Python are checked as those of run files are."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
from sae_core import TrainConfig, create
from sae_core.errors import ConfigError
from sae_core.plugins import get_registry
from sae_core.run import RunConfig
from sae_lm.hooks import HookPoint
from sae_lm.text import DatasetConfig, TextConfig
from sae_lm.tokens import TokenPolicy

KINDS = ("architecture", "source", "logger")


def config_classes() -> list[type]:
    registry = get_registry()
    found = [registry.usable(kind, name).config_class for kind in KINDS for name in registry.names(kind)]
    return [*dict.fromkeys(found), TrainConfig, RunConfig, TokenPolicy, TextConfig, DatasetConfig, HookPoint]


def choices_in(hint: Any) -> list[Any]:
    members = [hint, *typing.get_args(hint)]
    return [c for m in members if typing.get_origin(m) is typing.Literal for c in typing.get_args(m)]


def needed(config_class: type) -> dict[str, Any]:
    """Something of the right type for every field without a default."""
    made = {int: 1, str: "x", float: 1.0, Path: Path("x")}
    hints = typing.get_type_hints(config_class)
    return {
        field.name: made.get(hints[field.name])
        for field in dataclasses.fields(config_class)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }


def fields_of(choose: Any) -> list[tuple[type, str]]:
    return [
        (each, field.name)
        for each in config_classes()
        for field in dataclasses.fields(each)
        if field.init and choose(typing.get_type_hints(each)[field.name])
    ]


def test_a_choice_that_there_is_not_is_refused_by_every_config() -> None:
    found = fields_of(choices_in)
    assert len(found) > 30
    for config_class, name in found:
        choices = choices_in(typing.get_type_hints(config_class)[name])
        with pytest.raises(ConfigError, match=f"{name} must be one of .*{choices[0]}.*, not 'float32x'"):
            config_class(**{**needed(config_class), name: "float32x"})


def test_text_is_no_number_and_a_number_no_flag_in_any_config() -> None:
    numbers = fields_of(lambda hint: hint in (int, float))
    flags = fields_of(lambda hint: hint is bool)
    assert len(numbers) > 30
    assert len(flags) > 20
    for wrong, found in (("64", numbers), (True, numbers), (1, flags), ("no", flags)):
        for config_class, name in found:
            with pytest.raises(ConfigError, match=f"{name} must be (int|float|bool), not {wrong!r}"):
                config_class(**{**needed(config_class), name: wrong})


def test_all_that_is_wrong_is_in_one_error() -> None:
    with pytest.raises(ConfigError) as error:
        TrainConfig(total_samples=1.5, precision="float32x", lr=None)  # type: ignore[arg-type]
    precision = "precision must be one of 'full' | 'bfloat16', not 'float32x'"
    for part in ("total_samples must be int, not 1.5", precision, "lr must be float | Schedule, not None"):
        assert part in str(error.value)
    with pytest.raises(ConfigError, match=r"expected 'none' . 'layer_norm' .* found str 'l2' at normalize_activations"):
        create("topk", d_in=4, d_sae=8, k=2, normalize_activations="l2")
