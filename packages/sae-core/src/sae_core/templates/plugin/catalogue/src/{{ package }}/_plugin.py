"""What this package offers to sae-core. It is imported to list plugins, so it imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator

from sae_core.plugins import CatalogueSpec, hookimpl

SAE_CORE_HOOKSPEC = 1


@hookimpl
def sae_register_catalogues() -> Iterator[CatalogueSpec]:
    """{{ what }}."""
    yield CatalogueSpec(
        name="{{ name }}",
        target="{{ package }}.catalogue:{{ class_name }}",
        summary="One line for `sae-core list catalogues`",
    )
