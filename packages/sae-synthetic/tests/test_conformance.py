"""What this package gives keeps the promises of its kind."""

from __future__ import annotations

from collections.abc import Callable

from sae_core.plugins import get_registry
from sae_core.testing import parametrize_with_checks


def ours(kind: str) -> list[str]:
    found = get_registry().contributions(kind)
    return [contribution.qualified for contribution in found if contribution.distribution == "sae-synthetic"]


@parametrize_with_checks(ours("architecture"), kind="architecture")
def test_our_architectures_conform(check: Callable[[], None]) -> None:
    check()


@parametrize_with_checks(ours("source"), kind="source")
def test_our_sources_conform(check: Callable[[], None]) -> None:
    check()


@parametrize_with_checks(ours("command"), kind="command")
def test_our_commands_conform(check: Callable[[], None]) -> None:
    check()


def test_there_is_something_to_check() -> None:
    assert all(ours(kind) for kind in ("architecture", "source", "command"))
