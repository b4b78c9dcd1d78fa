"""What this package gives keeps the promises of its kind; test_loader_strictness has the loaders, with their files."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sae_core.plugins import get_registry
from sae_core.testing import parametrize_with_checks


def ours(kind: str) -> list[str]:
    found = get_registry().contributions(kind)
    return [contribution.qualified for contribution in found if contribution.distribution == "sae-pretrained"]


@parametrize_with_checks(ours("catalogue"), kind="catalogue")
def test_our_catalogues_conform(check: Callable[[], None]) -> None:
    check()


@parametrize_with_checks(ours("command"), kind="command")
def test_our_commands_conform(check: Callable[[], None]) -> None:
    check()


@parametrize_with_checks(ours("writer"), kind="writer")
def test_our_writers_conform(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("kind", ["catalogue", "command", "writer"])
def test_there_is_something_to_check(kind: str) -> None:
    assert ours(kind)
