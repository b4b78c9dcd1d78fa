"""What this package gives keeps the promises of its kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sae_core.config import structure
from sae_core.plugins import get_registry
from sae_core.testing import CheckResult, parametrize_with_checks, run_checks
from sae_lm.caching import write_cache
from sae_lm.source import HuggingFaceSource, HuggingFaceSourceConfig


def ours(kind: str) -> list[str]:
    found = get_registry().contributions(kind)
    return [contribution.qualified for contribution in found if contribution.distribution == "sae-lm"]


@parametrize_with_checks(ours("command"), kind="command")
def test_our_commands_conform(check: Callable[[], None]) -> None:
    check()


@pytest.fixture
def settings(saved_model: Path, tmp_path: Path) -> dict[str, Any]:
    """A tiny model on a short text."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Document {i}: {'word ' * (i % 7)}and {i * i}." for i in range(60)))
    return {
        "model": str(saved_model), "context_size": 16, "batch_prompts": 4, "buffer_rows": 200, "device": "cpu",
        "text": {"kind": "file", "path": str(text)},
    }  # fmt: skip


def broken(results: list[CheckResult]) -> list[CheckResult]:
    return [result for result in results if not result.ok]


@pytest.mark.parametrize(
    "places",
    [
        {"hook": "model.layers.1"},
        {"reads": ["model.layers.0", "model.layers.2"], "writes": ["model.layers.3"]},
        {"hook": "model.layers.1", "sequences": True},
    ],
    ids=["one", "several", "sequences"],
)
def test_activations_of_a_model_conform(settings: dict[str, Any], places: dict[str, Any]) -> None:
    assert broken(run_checks("source", "sae-lm:huggingface", config=settings | places)) == []


def test_activations_of_a_cache_conform(settings: dict[str, Any], tmp_path: Path) -> None:
    config = structure(settings | {"hook": "model.layers.1"}, HuggingFaceSourceConfig)
    write_cache(HuggingFaceSource(config), tmp_path / "cache")
    results = run_checks("source", "sae-lm:activation_cache", config={"path": str(tmp_path / "cache")})
    assert broken(results) == []


def test_all_of_ours_are_checked() -> None:
    elsewhere = {"sae-lm:huggingface_columns"}  # in test_columns, with pictures
    assert set(ours("source")) == {"sae-lm:huggingface", "sae-lm:activation_cache", *elsewhere}
    assert ours("command")
    assert all(not ours(kind) for kind in ("architecture", "loader", "catalogue", "metric", "logger", "writer"))
