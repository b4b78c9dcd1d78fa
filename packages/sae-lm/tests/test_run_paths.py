"""What a run was trained on is found again from any directory, however its file named it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from sae_core import SAE
from sae_core.cli import main
from sae_lm.source import HuggingFaceSource


@pytest.fixture
def elsewhere(saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory beside one, the working directory, whose run.yaml names model, tokenizer and texts relative to it."""
    here = tmp_path / "here"
    shutil.copytree(saved_model, here / "models" / "tiny")
    for part in "ab":
        documents = (f"Document {part}{i}: {'word ' * (i % 7)}and {i * i} or {i**3}." for i in range(60))
        (here / f"text-{part}.txt").write_text("\n\n".join(documents))
    run = {
        "output": "out",
        "sae": {"architecture": "topk", "d_sae": 64, "k": 8},
        "source": {
            "name": "huggingface", "model": "models/tiny", "tokenizer": "models/tiny", "hook": "model.layers.1",
            "device": "cpu", "context_size": 32, "batch_prompts": 4, "buffer_rows": 512, "on_exhausted": "cycle",
            "text": {"kind": "mixture", "mixture": [
                {"kind": "file", "path": "text-*.txt"},
                {"kind": "dataset", "path": "text", "data_files": ["text-[a].txt"], "split": "train"},
            ]},
        },
        "train": {"total_samples": 1024, "batch_size": 128, "lr": 0.003, "progress_bar": False},
    }  # fmt: skip
    (here / "run.yaml").write_text(yaml.safe_dump(run))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(here)
    return tmp_path / "elsewhere"


def test_a_run_goes_on_and_is_evaluated_in_another_directory(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "run.yaml"]) == 0
    monkeypatch.chdir(elsewhere)
    assert main(["train", "--resume", "../here/out", "--set", "train.total_samples=2048"]) == 0
    assert main(["eval", "../here/out", "--tokens", "200"]) == 0
    assert "cross-entropy" in capsys.readouterr().out
    assert not list(elsewhere.iterdir())
    text = HuggingFaceSource.from_metadata(SAE.load("../here/out").metadata).config.text
    assert text.mixture[1].path == "text"  # a name and no path, since nothing is there


def test_a_cache_says_what_it_was_made_of_in_another_directory(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["lm", "cache", "run.yaml", "cache"]) == 0
    source = '{"name": "activation_cache", "path": "cache", "on_exhausted": "cycle"}'
    assert main(["train", "run.yaml", "--set", f"source={source}"]) == 0
    monkeypatch.chdir(elsewhere)
    assert main(["eval", "../here/out", "--tokens", "200"]) == 0
