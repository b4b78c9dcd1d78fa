"""Caches and pretokenised windows sent to a Hub on this machine and used from there: that of sae-pretrained's tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sae_core.cli import main
from sae_lm import CachedActivations, CachedActivationsConfig

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


@pytest.fixture(autouse=True)
def _this_hub(hub: Any, private_settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library reads its endpoint when it is imported, and keeps it in several places."""
    from huggingface_hub import constants, hf_api

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.setenv("HF_TOKEN", hub.token)


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run on a tiny model and documents that are token ids already."""
    import json

    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    rows = [{"tokens": [2 + (7 * i + j * j) % 60 for j in range(20 + i)]} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "output": str(tmp_path / "out"), "sae": {"architecture": "topk", "d_sae": 32, "k": 4},
        "source": {
            "name": "huggingface", "model": str(tmp_path / "model"), "hook": "model.layers.0", "tokenizer": "none",
            "device": "cpu", "context_size": 16, "batch_prompts": 4, "buffer_rows": 256,
            "text": {"kind": "file", "path": str(tmp_path / "rows.jsonl"), "held_out": 0.2},
        },
        "train": {"total_samples": 256, "batch_size": 32, "lr": 0.001, "progress_bar": False},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    return tmp_path / "run.yaml"


def fetched(hub: Any, repository: str, folder: Path) -> Path:
    from huggingface_hub import hf_hub_download

    for name in hub.repositories[f"datasets/{repository}"].files:
        hf_hub_download(repository, name, repo_type="dataset", local_dir=folder)
    return folder


def test_a_cache_from_the_hub_gives_the_batches_of_the_one_on_disk(
    hub: Any, run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cache"
    arguments = ["lm", "cache", str(run_file), str(out), "--shard-mb", "0.01", "--hub", "lab/activations", "--private"]
    assert main(arguments) == 0
    repository = hub.repositories["datasets/lab/activations"]
    assert repository.private
    assert set(repository.files) == {path.name for path in out.iterdir()} > {"cache.json", "shard-00001.safetensors"}
    assert all(repository.files[path.name] == path.read_bytes() for path in out.iterdir())
    assert f"Uploaded: {hub.url}/datasets/lab/activations" in capsys.readouterr().out

    there = fetched(hub, "lab/activations", tmp_path / "there")
    pairs = [list(CachedActivations(CachedActivationsConfig(path=path)).batches(16)) for path in (out, there)]
    assert len(pairs[0]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))  # pyright: ignore[reportArgumentType]


def test_an_upload_that_fails_loses_nothing_and_is_repeated_by_the_same_command(
    hub: Any, run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["lm", "cache", str(run_file), str(tmp_path / "cache"), "--rows", "64", "--hub", "lab/again"]
    hub.next("commit", times=1, status=403, body=b'{"error": "no right to write here"}')
    assert main(arguments) == 1
    assert "cannot be uploaded to 'lab/again'" in (said := capsys.readouterr().err)
    assert "it is complete, and the command can be repeated" in said
    assert "Traceback" not in said
    assert hub.repositories["datasets/lab/again"].files == {}
    assert main(arguments) == 0
    assert "cache.json" in hub.repositories["datasets/lab/again"].files


def test_pretokenised_windows_from_the_hub_are_the_text_of_a_run(hub: Any, run_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "windows"
    assert main(["lm", "pretokenize", str(run_file), str(out), "--hub", "lab/windows"]) == 0
    assert "pretokenized.json" in hub.repositories["datasets/lab/windows"].files
    there = fetched(hub, "lab/windows", tmp_path / "there")
    text = ["--set", f"source.text={{kind: pretokenized, path: '{there}', held_out: 0.2}}"]
    assert main(["train", str(run_file), *text]) == 0
