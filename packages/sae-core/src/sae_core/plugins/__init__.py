"""The plugin host.

`hookimpl` and the specs are for plugin authors. `get_registry` and `list_plugins` are for those who use what plugins
provide. The modules beside this one are how it is done: finding, switches, manager, registry.
"""

from __future__ import annotations

from sae_core.plugins.errors import PluginWarning
from sae_core.plugins.hookspecs import ENTRY_POINT_GROUP, HOOKSPEC_VERSION, hookimpl
from sae_core.plugins.records import Contribution, PluginInfo
from sae_core.plugins.registry import Registry, get_registry, list_plugins, reset_registry
from sae_core.plugins.specs import (
    ActivationSourceSpec,
    ArchitectureSpec,
    CatalogueSpec,
    CommandSpec,
    LoaderSpec,
    LoggerSpec,
    MetricSpec,
    Spec,
    WriterSpec,
)

__all__ = [
    "ENTRY_POINT_GROUP",
    "HOOKSPEC_VERSION",
    "ActivationSourceSpec",
    "ArchitectureSpec",
    "CatalogueSpec",
    "CommandSpec",
    "Contribution",
    "LoaderSpec",
    "LoggerSpec",
    "MetricSpec",
    "PluginInfo",
    "PluginWarning",
    "Registry",
    "Spec",
    "WriterSpec",
    "get_registry",
    "hookimpl",
    "list_plugins",
    "reset_registry",
]
