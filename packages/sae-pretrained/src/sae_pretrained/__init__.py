"""Published sparse autoencoders for sae-core: catalogue, Hub access and file formats."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_pretrained.catalogue import FolderCatalogue, PublicCatalogue, UserCatalogue, lookup, releases
    from sae_pretrained.hub import HubFiles
    from sae_pretrained.hub_errors import HubError
    from sae_pretrained.models import base_model, hook_point_from_hf, hook_point_to_hf

__all__ = [
    "FolderCatalogue",
    "HubError",
    "HubFiles",
    "PublicCatalogue",
    "UserCatalogue",
    "base_model",
    "hook_point_from_hf",
    "hook_point_to_hf",
    "lookup",
    "releases",
]

_HOMES = {
    "HubError": "hub_errors",
    "HubFiles": "hub",
    "FolderCatalogue": "catalogue",
    "PublicCatalogue": "catalogue",
    "UserCatalogue": "catalogue",
    "base_model": "models",
    "hook_point_from_hf": "models",
    "hook_point_to_hf": "models",
    "lookup": "catalogue",
    "releases": "catalogue",
}


def __getattr__(name: str) -> Any:
    """Public names are imported at their first use, so that listing this package costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"sae_pretrained.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
