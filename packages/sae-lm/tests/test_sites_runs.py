"""Dictionaries of several places, trained from run files alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from sae_core import SAE
from sae_core.cli import main

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture
def small(saved_model: Path, tmp_path: Path) -> list[str]:
    """Settings that make a run of a few steps on the tiny model out of an example."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Document {i}: {'word ' * (i % 7)}and {i * i} or {i**3}." for i in range(200)))
    source = json.dumps({"kind": "file", "path": str(text), "held_out": 0.1})
    settings = {
        "output": str(tmp_path / "out"), "sae.d_sae": 96, "sae.k": 8, "source.model": str(saved_model), "source.text": source,
        "source.context_size": 32, "source.batch_prompts": 4, "source.buffer_rows": 1024, "train.total_samples": 20_000,
        "train.batch_size": 256, "train.lr": 0.003, "train.lr_warmup_samples": 0, "train.lr_decay_samples": 0,
        "train.dead_after_samples": 5_000, "train.progress_bar": "false",
    }  # fmt: skip
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def explained(tmp_path: Path) -> float:
    records = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    return records[-1]["explained_variance"]


def test_the_example_of_a_skip_transcoder_learns_an_mlp(small: list[str], tmp_path: Path) -> None:
    places = ["--set", "source.reads=[model.layers.1.mlp:input]", "--set", "source.writes=[model.layers.1.mlp]"]
    assert main(["train", str(EXAMPLES / "smollm2-transcoder.yaml"), *small, *places]) == 0
    sae = SAE.load(tmp_path / "out")
    assert (sae.d_in, sae.d_out) == (32, 32)
    assert explained(tmp_path) > 0.7
    assert sae.metadata["hook_name"] == "model.layers.1.mlp:input"
    assert sae.metadata["hook_name_out"] == "model.layers.1.mlp"


def test_the_example_of_a_crosscoder_reads_and_writes_three_layers(small: list[str], tmp_path: Path) -> None:
    layers = ["model.layers.0", "model.layers.1", "model.layers.2"]
    places = ["--set", f"source.reads=[{', '.join(layers)}]"]
    assert main(["train", str(EXAMPLES / "smollm2-crosscoder.yaml"), *small, *places]) == 0
    sae = SAE.load(tmp_path / "out")
    assert dict(sae.reads) == dict(sae.writes) == dict.fromkeys(layers, 32)
    assert explained(tmp_path) > 0.5
    assert list(sae.metadata["sae_lm"]["sites"]) == layers


def test_a_temporal_dictionary_is_trained_on_whole_windows_and_refused_shuffled_rows(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = yaml.safe_load((EXAMPLES / "smollm2.yaml").read_text())
    run["sae"] = {"architecture": "temporal", "n_heads": 2, "bottleneck_factor": 4}
    run["source"] |= {"hook": "model.layers.1", "cache_activations": False}
    file = tmp_path / "temporal.yaml"
    file.write_text(yaml.safe_dump(run))
    arguments = list(small)
    position = arguments.index("sae.k=8")
    del arguments[position - 1 : position + 1]
    assert main(["train", str(file), *arguments, "--set", "train.total_samples=2000"]) == 1
    assert "sequence" in capsys.readouterr().err
    assert (
        main(["train", str(file), *arguments, "--set", "train.total_samples=2000", "--set", "source.sequences=true"])
        == 0
    )
    assert SAE.load(tmp_path / "out").architecture == "temporal"
