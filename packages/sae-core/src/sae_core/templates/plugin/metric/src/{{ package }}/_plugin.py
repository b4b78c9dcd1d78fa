"""What this package offers to sae-core. It is imported to list plugins, so it imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator

from sae_core.plugins import MetricSpec, hookimpl

SAE_CORE_HOOKSPEC = 1


@hookimpl
def sae_register_metrics() -> Iterator[MetricSpec]:
    """{{ what }}."""
    yield MetricSpec(
        name="{{ name }}",
        target="{{ package }}.metric:{{ class_name }}",
        summary="One line for `sae-core list metrics`",
    )
