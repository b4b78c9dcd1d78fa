"""A card says how to load what it lists: with the packages that this takes, and with SAELens only where that can."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
from sae_core import SAE, create
from sae_core.plugins import ArchitectureSpec, get_registry, reset_registry
from sae_pretrained.model_card import SharedSAE, updated_card


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Iterator[SAE]:
    """A dictionary of another package, which calls its architecture as sae-core calls one."""
    from sae_core.architectures.topk import TopKSAE

    module = ModuleType("their_topk")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.__dict__["Theirs"] = type("Theirs", (TopKSAE,), {"__module__": module.__name__, "__qualname__": "Theirs"})
    get_registry().register(ArchitectureSpec(name="topk", target="their_topk:Theirs", summary="A test"), "sae-theirs")
    yield create("sae-theirs:topk", d_in=4, d_sae=8, k=2)
    reset_registry()


def card(*saes: SAE) -> str:
    return updated_card(None, "lab/saes", [SharedSAE.describe(f"s{n}", sae) for n, sae in enumerate(saes)]) or ""


def test_both_libraries_are_shown_for_what_both_read() -> None:
    text = card(create("topk", d_in=4, d_sae=8, k=2))
    assert "library_name: saelens" in text
    assert "pip install sae-core sae-pretrained`" in text
    assert "| `s0` | topk |" in text
    assert text.count('SAE.from_pretrained("lab/saes", "s0")') == 2


def test_what_another_package_reads_names_that_package_and_not_saelens(theirs: SAE) -> None:
    text = card(theirs)
    assert "saelens" not in text.lower()
    assert "pip install sae-core sae-pretrained sae-theirs`" in text
    assert "| `s0` | sae-theirs:topk |" in text


def test_saelens_is_shown_one_that_it_reads(theirs: SAE) -> None:
    text = card(theirs, create("groupmax", d_in=4, d_sae=8, k=2), create("standard", d_in=4, d_sae=8))
    assert 'from sae_lens import SAE\n\nsae = SAE.from_pretrained("lab/saes", "s2")' in text
