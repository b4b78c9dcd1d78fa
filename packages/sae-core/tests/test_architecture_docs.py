"""docs/architectures.md cannot fall behind: every architecture has its section, and every field is in it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from sae_core.architectures.linear import LinearConfig
from sae_core.plugins import get_registry
from sae_core.sae import SAEConfig

PAGE = Path(__file__).parents[3] / "docs" / "architectures.md"
OURS = [c.spec.name for c in get_registry().contributions("architecture") if c.distribution == "sae-core"]
SHARED = {field.name for field in dataclasses.fields(SAEConfig)}
OF_THE_FRAME = {field.name for field in dataclasses.fields(LinearConfig)} - SHARED


def section(heading: str) -> str:
    """The text under the ``## heading`` that names this architecture."""
    for part in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        if heading in re.split(r",\s*", part.splitlines()[0]):
            return part
    raise AssertionError(f"docs/architectures.md has no section {heading!r}")


@pytest.mark.skipif(not PAGE.exists(), reason="the package is tested without the repository's docs")
@pytest.mark.parametrize("architecture", OURS)
def test_every_field_of_an_architecture_is_in_its_section(architecture: str) -> None:
    config_class = get_registry().resolve("architecture", architecture).config_class
    named = set(re.findall(r"`(\w+)`", section(architecture)))
    assert {field.name for field in dataclasses.fields(config_class)} - SHARED - OF_THE_FRAME - named == set()


@pytest.mark.skipif(not PAGE.exists(), reason="the package is tested without the repository's docs")
def test_every_shared_field_is_in_the_first_section() -> None:
    assert set(re.findall(r"`(\w+)`", section("Fields of all architectures"))) >= SHARED


@pytest.mark.skipif(not PAGE.exists(), reason="the package is tested without the repository's docs")
def test_every_field_of_the_linear_frame_is_in_its_section() -> None:
    assert set(re.findall(r"`(\w+)`", section("What is read and written"))) >= OF_THE_FRAME


@pytest.mark.skipif(not PAGE.exists(), reason="the package is tested without the repository's docs")
@pytest.mark.parametrize("architecture", OURS)
def test_the_table_of_shapes_says_what_an_architecture_can_be(architecture: str) -> None:
    (row,) = [
        line for line in section("What is read and written").splitlines() if re.match(rf"\|[^|]*`{architecture}`", line)
    ]
    _, sae, transcoder, skip, crosscoder = (cell.strip()[:3] for cell in row.strip("|").split("|"))
    config_class = get_registry().resolve("architecture", architecture).config_class
    fields = {field.name for field in dataclasses.fields(config_class)}
    if issubclass(config_class, LinearConfig):
        assert (sae, transcoder, skip, crosscoder) == ("yes",) * 4
    else:
        assert "–" in (sae, skip, crosscoder)
        assert (skip == "yes") is ("skip" in fields)
