"""Several catalogues side by side: the public one, the user's, and those of plugins."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest
from sae_core.errors import UnknownNameError
from sae_core.plugins import CatalogueSpec, PluginWarning, Registry, get_registry, reset_registry
from sae_core.pretrained import all_catalogues, describe_origin, find_entry
from sae_core.protocols import Catalogue, CatalogueEntry, FileSource
from sae_pretrained import lookup, releases


class LabCatalogue:
    """A plugin's catalogue, as plain as the protocol allows."""

    def releases(self) -> Sequence[str]:
        return ["lab-saes"]

    def sae_ids(self, release: str) -> Sequence[str]:
        return ["one"]

    def lookup(self, release: str, sae_id: str) -> CatalogueEntry:
        if (release, sae_id) != ("lab-saes", "one"):
            raise UnknownNameError(f"the lab has no {release} {sae_id}")
        return CatalogueEntry(release=release, sae_id=sae_id, repo_id="lab/saes", path="one", model="lab/m")

    def files(self, entry: CatalogueEntry) -> FileSource:
        raise NotImplementedError


class BrokenCatalogue(LabCatalogue):
    def __init__(self) -> None:
        raise RuntimeError("no network drive")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    module = ModuleType("lab_catalogues")
    module.__dict__.update(LabCatalogue=LabCatalogue, BrokenCatalogue=BrokenCatalogue)
    monkeypatch.setitem(sys.modules, "lab_catalogues", module)
    reset_registry()
    yield get_registry()
    reset_registry()


def test_a_plugins_catalogue_is_asked_too(registry: Registry):
    registry.register(CatalogueSpec(name="lab", target="lab_catalogues:LabCatalogue"))
    assert "lab-saes" in releases()
    assert lookup("lab-saes", "one").repo_id == "lab/saes"
    with pytest.raises(UnknownNameError, match="the lab has no lab-saes two"):
        lookup("lab-saes", "two")
    with pytest.raises(UnknownNameError, match="did you mean 'lab-saes'"):
        lookup("lab-sae", "one")


def test_a_broken_catalogue_is_left_out_with_a_warning(registry: Registry):
    registry.register(CatalogueSpec(name="broken", target="lab_catalogues:BrokenCatalogue"))
    with pytest.warns(PluginWarning, match="the catalogue 'broken' cannot be used: no network drive"):
        assert set(all_catalogues()) == {"public", "user"}


def test_a_malformed_file_of_the_user_does_not_hide_public_releases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("lab: [\n")
    monkeypatch.setenv("SAE_CORE_CATALOGUE", str(tmp_path / "mine.yaml"))
    with pytest.warns(PluginWarning, match=r"mine\.yaml: not valid YAML"):
        assert find_entry("gpt2-small-res-jb", "blocks.8.hook_resid_pre")[0].layer == 8


def test_two_catalogues_that_list_one_release_are_both_named():
    catalogues: dict[str, Catalogue] = {"a": LabCatalogue(), "b": LabCatalogue()}
    with pytest.raises(UnknownNameError, match="listed by several catalogues: a, b"):
        find_entry("lab-saes", "one", catalogues)


def test_without_any_catalogue_it_is_said_where_one_would_come_from(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UnknownNameError, match="public, user are installed; sae-core doctor says whether they work"):
        find_entry("gpt2-small-res-jb", "x", {})
    monkeypatch.setenv("SAE_CORE_PLUGINS", "")
    reset_registry()
    try:
        with pytest.raises(UnknownNameError, match="'public' comes with sae-pretrained, which is disabled"):
            find_entry("gpt2-small-res-jb", "x")
    finally:
        reset_registry()


def test_what_the_files_say_is_kept_and_what_they_lack_is_added():
    class Files:
        location = "lab/saes@0123"

    entry = CatalogueEntry(release="r", sae_id="i", repo_id="lab/saes", path="p", model="lab/m", l0=7.0)
    described = describe_origin(entry, LabCatalogue(), Files(), {"l0": 8.0, "sae_core": {"format_version": 1}})  # pyright: ignore[reportArgumentType]
    assert described == {
        "l0": 8.0,
        "model_name": "lab/m",
        "sae_core": {
            "format_version": 1,
            "base_model": "lab/m",
            "base_model_revision": None,
            "origin": {"release": "r", "sae_id": "i", "repository": "lab/saes", "path": "p", "revision": "0123"},
        },
    }
