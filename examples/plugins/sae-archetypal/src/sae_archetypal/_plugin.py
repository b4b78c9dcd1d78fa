"""What this package offers to sae-core; read to list plugins, so nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterator

from sae_core.plugins import ArchitectureSpec, hookimpl

SAE_CORE_HOOKSPEC = 1


@hookimpl
def sae_register_architectures() -> Iterator[ArchitectureSpec]:
    """One architecture."""
    yield ArchitectureSpec(
        name="archetypal",
        target="sae_archetypal.archetypal:ArchetypalSAE",
        summary="Decoder rows are mixtures of data points",
    )
