"""Plugins and files: a saved SAE belongs to the plugin that wrote it, and one broken loader keeps no other from reading."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from sae_core import SAE, create
from sae_core.cli.new_plugin import render, variables_for
from sae_core.errors import UnknownNameError
from sae_core.plugins import ArchitectureSpec, LoaderSpec, PluginWarning, get_registry, reset_registry


@pytest.fixture(autouse=True)
def _fresh_registry() -> Iterator[None]:
    yield
    reset_registry()


def architecture(name: str, module: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ArchitectureSpec:
    """The template's architecture under this name, in a module of its own."""
    source = render(folder, {**variables_for(name), "distribution": module}) / "src" / f"sae_{name}" / "architecture.py"
    spec = importlib.util.spec_from_file_location(module, source)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module, made)
    spec.loader.exec_module(made)
    return ArchitectureSpec(name=name, target=f"{module}:{variables_for(name)['class_name']}", summary="A test")


def saved_by(sae: SAE, folder: Path) -> dict[str, str]:
    return json.loads((sae.save(folder) / "cfg.json").read_text())["metadata"]["sae_core"]["provider"]


def test_an_sae_of_a_name_that_two_plugins_give_is_saved_and_loaded_as_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for plugin in ("one", "two"):
        spec = architecture("cubic", f"cubic_{plugin}", tmp_path, monkeypatch)
        get_registry().register(spec, f"sae-{plugin}")
    sae = create("sae-two:cubic", d_in=4, d_sae=8)
    assert saved_by(sae, tmp_path / "saved")["distribution"] == "sae-two"
    loaded = SAE.load(tmp_path / "saved")
    assert type(loaded) is type(sae)
    assert torch.equal(loaded(torch.ones(4)), sae(torch.ones(4)))


def test_a_strangers_architecture_with_a_name_of_ours_is_not_loaded_as_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get_registry().register(architecture("standard", "their_standard", tmp_path, monkeypatch), "sae-theirs")
    theirs, ours = create("sae-theirs:standard", d_in=4, d_sae=8), create("standard", d_in=4, d_sae=8)
    assert type(theirs) is not type(ours)
    assert saved_by(theirs, tmp_path / "theirs")["distribution"] == "sae-theirs"
    assert saved_by(ours, tmp_path / "ours")["distribution"] == "sae-core"
    assert type(SAE.load(tmp_path / "theirs")) is type(theirs)
    assert type(SAE.load(tmp_path / "ours")) is type(ours)


def test_an_sae_whose_plugin_is_gone_is_not_loaded_by_another_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get_registry().register(architecture("cubic", "cubic_one", tmp_path, monkeypatch), "sae-one")
    create("cubic", d_in=4, d_sae=8).save(tmp_path / "saved")
    reset_registry()
    get_registry().register(architecture("cubic", "cubic_two", tmp_path, monkeypatch), "sae-two")
    with pytest.raises(UnknownNameError, match="is provided by 'sae-one' 'local', which is not installed"):
        SAE.load(tmp_path / "saved")


def test_a_notebooks_architecture_is_found_by_its_bare_name_in_the_next_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = architecture("cubic", "cubic_cell", tmp_path, monkeypatch)
    get_registry().register(spec)
    create("cubic", d_in=4, d_sae=8).save(tmp_path / "saved")
    reset_registry()
    get_registry().register(spec, "sae-cubic")  # it has become a package since
    assert SAE.load(tmp_path / "saved").architecture == "cubic"


def test_an_sae_of_a_class_that_nobody_registered_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    get_registry().register(architecture("cubic", "cubic_cell", tmp_path, monkeypatch))
    sae = create("cubic", d_in=4, d_sae=8)
    reset_registry()
    with pytest.raises(UnknownNameError, match="no plugin provides the architecture cubic_cell:CubicSAE"):
        sae.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


class Raising:
    """A loader that fails whatever it is asked."""

    def matches(self, source: object, folder: str = "") -> bool:
        raise RuntimeError("no idea")


@pytest.mark.parametrize("target", ["broken_loaders:Raising", "broken_loaders:Missing"])
def test_a_broken_loader_keeps_no_other_from_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    module = ModuleType("broken_loaders")
    module.__dict__["Raising"] = Raising
    monkeypatch.setitem(sys.modules, "broken_loaders", module)
    get_registry().register(LoaderSpec(name="odd", target=target), "sae-odd")
    sae = create("topk", d_in=4, d_sae=8, k=2)
    sae.save(tmp_path / "saved")
    with pytest.warns(PluginWarning, match="loader sae-odd:odd could not be asked about"):
        loaded = SAE.load(tmp_path / "saved")
    assert torch.allclose(loaded(torch.ones(4)), sae(torch.ones(4)))
