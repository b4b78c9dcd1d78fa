"""What this package offers to sae-core. It is imported to list plugins, so it imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator

from sae_core.plugins import ActivationSourceSpec, hookimpl

SAE_CORE_HOOKSPEC = 1


@hookimpl
def sae_register_activation_sources() -> Iterator[ActivationSourceSpec]:
    """{{ what }}."""
    yield ActivationSourceSpec(
        name="{{ name }}",
        target="{{ package }}.source:{{ class_name }}",
        summary="One line for `sae-core list sources`",
    )
