"""Help for those who write plugins: checks that a contribution keeps its word, and pretended installations."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_core.testing.kit import (
        CheckResult,
        NotApplicable,
        Subject,
        checks_of,
        parametrize_with_checks,
        run_checks,
    )
    from sae_core.testing.plugin_folder import PluginFolder

__all__ = [
    "CheckResult",
    "NotApplicable",
    "PluginFolder",
    "Subject",
    "checks_of",
    "parametrize_with_checks",
    "run_checks",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sae_core.testing' has no attribute {name!r}")
    home = "plugin_folder" if name == "PluginFolder" else "kit"  # neither imports torch
    return getattr(importlib.import_module(f"sae_core.testing.{home}"), name)
