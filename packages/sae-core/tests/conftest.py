"""Fixtures shared by the tests of sae-core."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sae_core.plugins import ArchitectureSpec, get_registry, reset_registry
from sae_core.plugins.finding import find_plugins
from sae_core.plugins.records import CORE
from sae_core.testing import PluginFolder


@pytest.fixture
def site(tmp_path: Path) -> PluginFolder:
    """An empty folder of pretended installations; its processes see it before everything that is really installed."""
    folder = tmp_path / "site"
    folder.mkdir()
    really_installed = [plugin.qualified for plugin in find_plugins() if plugin.distribution != CORE]
    return PluginFolder(folder, without=tuple(really_installed))


@pytest.fixture
def rival(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Any]]:
    """A class of a package ``sae-rival`` that calls itself ``topk`` and is not the core's."""
    from sae_core.architectures.topk import TopKSAE

    module = ModuleType("a_rivals_topk")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    cls = type("RivalTopK", (TopKSAE,), {"__module__": module.__name__, "__qualname__": "RivalTopK"})
    module.__dict__[cls.__name__] = cls
    target = f"{module.__name__}:{cls.__name__}"
    get_registry().register(ArchitectureSpec(name="topk", target=target, summary="A test"), "sae-rival")
    yield cls
    reset_registry()
