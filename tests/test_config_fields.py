"""Every field of every config is read somewhere: a setting that is accepted and ignored cannot exist."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from sae_core.plugins import get_registry
from sae_core.run import RunConfig
from sae_core.training.config import TrainConfig


def config_classes() -> dict[str, type]:
    found: dict[str, type] = {"run": RunConfig, "train": TrainConfig}
    for kind in ("architecture", "source", "logger"):
        for contribution in get_registry().contributions(kind):
            component: Any = get_registry().resolve(kind, contribution.qualified)
            found[f"{kind} {contribution.spec.name}"] = component.config_class
    return found


@cache
def attributes_read(package: str) -> frozenset[str]:
    """Names that the package reads as attributes; checking a value in ``__post_init__`` is not reading it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    read: set[str] = set()
    for path in Path(next(iter(spec.submodule_search_locations))).rglob("*.py"):
        if "templates" not in path.parts:  # not Python before they are rendered
            read |= reads(ast.parse(path.read_text(encoding="utf-8")))
    return frozenset(read)


def reads(node: ast.AST) -> set[str]:
    if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
        return set()
    here = {node.attr} if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) else set[str]()
    return here.union(*(reads(child) for child in ast.iter_child_nodes(node)))


@pytest.mark.parametrize("name", sorted(config_classes()))
def test_every_field_is_read(name: str) -> None:
    config_class = config_classes()[name]
    fields = {field.name for field in dataclasses.fields(config_class)}
    read = attributes_read(config_class.__module__.split(".")[0]) | attributes_read("sae_core")
    assert fields - read == set()


@pytest.mark.parametrize("name", sorted(config_classes()))
def test_every_field_says_what_it_means(name: str) -> None:
    fields = dataclasses.fields(config_classes()[name])
    assert [field.name for field in fields if not field.metadata.get("help")] == []
