"""What this package offers to sae-core; read to list plugins, so nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterator

from sae_core.plugins import ArchitectureSpec, hookimpl

SAE_CORE_HOOKSPEC = 1


@hookimpl
def sae_register_architectures() -> Iterator[ArchitectureSpec]:
    """One architecture."""
    yield ArchitectureSpec(
        name="dedicated",
        target="sae_dedicated.crosscoder:DedicatedCrosscoder",
        summary="Crosscoder with latents that belong to one site alone",
    )
