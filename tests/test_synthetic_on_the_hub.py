"""Synthetic models sent to a Hub on this machine and fetched from there; the server is that of sae-pretrained's tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core.errors import ConfigError, FormatError
from sae_synthetic import (
    HierarchyConfig,
    LowRankCorrelationConfig,
    SyntheticHubError,
    SyntheticModel,
    SyntheticModelConfig,
    upload_synthetic_model_to_huggingface,
)

SERVER = Path(__file__).parents[1] / "packages" / "sae-pretrained" / "tests" / "conftest.py"
spec = importlib.util.spec_from_file_location("sae_pretrained_test_server", SERVER)
assert spec is not None
assert spec.loader is not None
server = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = server  # dataclasses look their module up there
spec.loader.exec_module(server)
hub = server.hub
private_settings = server._private_hub_settings
# huggingface_hub hands bytes to its HTTP library in a way that the library calls old; that is between the two.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")
FILES = {"synthetic_model_config.json", "synthetic_model.safetensors", "hierarchy.json"}


@pytest.fixture(autouse=True)
def _this_hub(hub: Any, private_settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library reads its endpoint when it is imported, and keeps it in several places."""
    import huggingface_hub
    from huggingface_hub import constants, hf_api

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert huggingface_hub.HfApi().endpoint == hub.url


def _world(hierarchy: bool = True) -> SyntheticModel:
    return SyntheticModel(
        SyntheticModelConfig(
            num_features=12,
            hidden_dim=6,
            hierarchy=HierarchyConfig(2, 2, 2, compensate_probabilities=False) if hierarchy else None,
            correlation=LowRankCorrelationConfig(rank=2),
            std_firing_magnitudes=0.1,
            seed=1,
        )
    )


def _same(one: SyntheticModel, other: SyntheticModel) -> bool:
    return one.hierarchy == other.hierarchy and torch.equal(one.sample(50), other.sample(50))


@pytest.mark.parametrize("folder", [None, "worlds/small"])
def test_a_model_that_was_sent_comes_back_as_it_was(hub: Any, folder: str | None) -> None:
    commit = upload_synthetic_model_to_huggingface(_world(), "lab/worlds", folder)
    there = hub.repositories["lab/worlds"]
    assert commit == there.commit
    prefix = f"{folder}/" if folder else ""
    assert set(there.files) == {prefix + name for name in FILES} | {"README.md"}
    assert _same(SyntheticModel.from_pretrained("lab/worlds", folder), _world())
    assert _same(SyntheticModel.load_from_source(f"lab/worlds:{folder}" if folder else "lab/worlds"), _world())
    readme = there.files["README.md"].decode()
    assert "12 features in 6 dimensions" in readme
    assert "2 trees over 12 features, 3 levels deep" in readme
    assert "correlated firing of rank 2" in readme
    assert ('model_path="worlds/small"' in readme) == (folder is not None)


def test_a_saved_folder_goes_in_one_commit_and_a_readme_that_is_there_stays(hub: Any, tmp_path: Path) -> None:
    _world(hierarchy=False).save(tmp_path / "world")
    (tmp_path / "world" / "notes.txt").write_text("mine")
    there = hub.add("lab/worlds", {"README.md": b"written by hand"})
    upload_synthetic_model_to_huggingface(tmp_path / "world", "lab/worlds")
    assert set(there.files) == FILES - {"hierarchy.json"} | {"README.md"}
    assert there.files["README.md"] == b"written by hand"
    assert len(there.history) == 2
    upload_synthetic_model_to_huggingface(str(tmp_path / "world"), "lab/others", add_default_readme=False, private=True)
    other = hub.repositories["lab/others"]
    assert "README.md" not in other.files
    assert other.private


def test_what_cannot_be_loaded_is_not_sent(hub: Any, tmp_path: Path) -> None:
    _world().save(tmp_path)
    (tmp_path / "hierarchy.json").unlink()
    with pytest.raises(FormatError, match=r"hierarchy\.json is missing"):
        upload_synthetic_model_to_huggingface(tmp_path, "lab/worlds")
    with pytest.raises(ConfigError, match="must be a folder inside the repository"):
        upload_synthetic_model_to_huggingface(_world(), "lab/worlds", "../elsewhere")
    assert hub.log == []


def test_refusals_say_what_to_do(hub: Any) -> None:
    with pytest.raises(SyntheticHubError, match="lab/nothing: there is no such repository, or it is private"):
        SyntheticModel.from_pretrained("lab/nothing")
    there = hub.add("lab/worlds", {"README.md": b""})
    with pytest.raises(FormatError, match=r"lab/worlds, folder small: no synthetic model there"):
        SyntheticModel.from_pretrained("lab/worlds", "small")
    with pytest.raises(SyntheticHubError, match="the Hub has no revision 'old'"):
        SyntheticModel.from_pretrained("lab/worlds", revision="old")
    hub.next("/commit/", status=403)
    with pytest.raises(SyntheticHubError, match="the Hub answered 403; writing needs a token"):
        upload_synthetic_model_to_huggingface(_world(), "lab/worlds")
    hub.next("PUT /staged/", times=9, status=400)
    with pytest.raises(SyntheticHubError, match=r"synthetic_model\.safetensors.*(?s:.)*no file of the model is there"):
        upload_synthetic_model_to_huggingface(_world(), "lab/worlds")
    assert set(there.files) == {"README.md"}


def test_a_model_that_was_fetched_once_is_there_without_a_hub(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    for hierarchy in (True, False):
        upload_synthetic_model_to_huggingface(_world(hierarchy), f"lab/{hierarchy}", "small")
        SyntheticModel.from_pretrained(f"lab/{hierarchy}", "small")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for hierarchy in (True, False):
        assert _same(SyntheticModel.from_pretrained(f"lab/{hierarchy}", "small"), _world(hierarchy))


def test_without_a_hub_the_message_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SyntheticHubError, match="lab/worlds@main: not in the cache, and the Hub cannot be reached"):
        SyntheticModel.from_pretrained("lab/worlds")
