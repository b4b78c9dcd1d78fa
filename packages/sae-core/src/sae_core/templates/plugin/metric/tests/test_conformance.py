"""What sae-core expects of every metric. Install the package first: it is found by its entry point."""

from __future__ import annotations

from collections.abc import Callable

from sae_core.testing import parametrize_with_checks


@parametrize_with_checks(["{{ name }}"], kind="metric")
def test_{{ name }}_conforms(check: Callable[[], None]) -> None:
    check()
