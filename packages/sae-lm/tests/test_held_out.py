"""Dictionaries measured on held-out text while they are trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sae_core import SAE
from sae_core.cli import main
from sae_core.config import structure
from sae_core.errors import ConfigError
from sae_core.protocols import MeasuresHeldOut
from sae_core.run import execute, read_run
from sae_lm import CachedActivations, CachedActivationsConfig, evaluate_sae
from sae_lm.source import HeldOutConfig, HuggingFaceSource, HuggingFaceSourceConfig


@pytest.fixture
def run_file(saved_model: Path, tmp_path: Path) -> Path:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Document {i}: {'word ' * (i % 7)}and {i * i} or {i**3}." for i in range(120)))
    run = {
        "output": str(tmp_path / "out"),
        "sae": {"architecture": "batchtopk", "d_sae": 64, "k": 8},
        "source": {
            "name": "huggingface", "model": str(saved_model), "hook": "model.layers.1", "device": "cpu",
            "context_size": 32, "batch_prompts": 4, "buffer_rows": 512, "on_exhausted": "cycle",
            "text": {"kind": "file", "path": str(text), "held_out": 0.2},
        },
        "train": {"total_samples": 4096, "batch_size": 128, "lr": 0.003, "progress_bar": False, "log_every_steps": 4},
        "eval": {"every_samples": 1024, "tokens": 300, "batch_prompts": 3},
    }  # fmt: skip
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run))
    return file


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_log_says_what_is_recovered_on_held_out_text_and_training_is_not_touched(
    run_file: Path, tmp_path: Path
) -> None:
    assert main(["train", str(run_file)]) == 0
    assert main(["train", str(run_file), "--set", "eval={}", "--set", f"output={tmp_path / 'alone'}"]) == 0
    measured, alone = SAE.load(tmp_path / "out"), SAE.load(tmp_path / "alone")
    assert all(
        torch.equal(a, b) for a, b in zip(measured.state_dict().values(), alone.state_dict().values(), strict=True)
    )

    log = records(tmp_path / "out")
    assert [record["samples"] for record in log if "held_out.ce_recovered" in record] == [1024, 2048, 3072, 4096]
    assert records(tmp_path / "alone") == [
        {key: value for key, value in record.items() if not key.startswith("held_out.")} for record in log
    ]
    # The last one is what an evaluation of the same windows says of the dictionary that was saved.
    source = HuggingFaceSource.from_metadata(measured.metadata)
    expected = evaluate_sae(measured, source, tokens=300, batch_prompts=3, baseline=False).candidates["sae"]
    last = {key.removeprefix("held_out."): value for key, value in log[-1].items() if key.startswith("held_out.")}
    assert set(last) == {"explained_variance", "l0", "ce", "ce_clean", "ce_recovered", "ce_recovered_mean"}
    assert last == pytest.approx({key: expected[key] for key in last}, rel=1e-4)
    assert log[-1]["held_out.ce_recovered"] > 0.5


def test_a_run_that_goes_on_measures_where_it_would_have(run_file: Path, tmp_path: Path) -> None:
    def places(folder: Path) -> list[tuple[int, bool]]:
        return [(record["samples"], "held_out.ce_recovered" in record) for record in records(folder)]

    half = [f"output={tmp_path / 'half'}"]
    execute(read_run(run_file))
    execute(read_run(run_file, [*half, "train.total_samples=2560"]))
    assert places(tmp_path / "half")[-1] == (2560, True)  # the last one, in any case
    execute(read_run(run_file, half), resume=True)
    whole = places(tmp_path / "out")
    assert places(tmp_path / "half") == [(samples, due or samples == 2560) for samples, due in whole]


def test_training_from_a_cache_is_measured_in_the_model_that_was_cached(run_file: Path, tmp_path: Path) -> None:
    assert main(["lm", "cache", str(run_file), str(tmp_path / "cache")]) == 0
    source = json.dumps({"name": "activation_cache", "path": str(tmp_path / "cache"), "on_exhausted": "cycle"})
    assert main(["train", str(run_file)]) == 0
    live = [record.get("held_out.ce_recovered") for record in records(tmp_path / "out")]
    assert main(["train", str(run_file), "--set", f"source={source}", "--set", f"output={tmp_path / 'cached'}"]) == 0
    assert [record.get("held_out.ce_recovered") for record in records(tmp_path / "cached")] == live


def test_a_thread_that_reads_ahead_never_sees_the_hooks_of_a_measurement(
    llama: Any, tokenizer: Any, tmp_path: Path
) -> None:
    from sae_core import create

    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Document {i}: {'word ' * (i % 7)}and {i * i}." for i in range(60)))

    def make(prefetch: int) -> HuggingFaceSource:
        settings = {
            "model": "tiny", "hook": "model.layers.1", "context_size": 16, "batch_prompts": 2, "buffer_rows": 100,
            "prefetch": prefetch, "text": {"kind": "file", "path": str(text), "held_out": 0.2},
        }  # fmt: skip
        return HuggingFaceSource(structure(settings, HuggingFaceSourceConfig), model=llama, tokenizer=tokenizer)

    expected = list(make(0).batches(16))
    source = make(2)
    sae = create("topk", d_in=32, d_sae=16, k=1, seed=0)
    measure = source.held_out(HeldOutConfig(tokens=60, batch_prompts=2))
    found: list[torch.Tensor] = []
    for number, batch in enumerate(source.batches(16)):
        assert isinstance(batch, torch.Tensor)
        found.append(batch)
        if number % 8 == 0:
            measure(sae)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["eval={tokens: 5}"], "eval: missing key 'every_samples'"),
        (["eval.every_samples=0"], "every_samples is a number of samples, or a fraction"),
        (["eval.every_samples=1.5"], "every_samples is a number of samples, or a fraction"),
        (["eval.tokens=0"], "eval: tokens must be positive"),
        (["eval.token=3"], "did you mean 'tokens'"),
        (["source.text.held_out=0"], "no text is held out from training"),
    ],
)
def test_what_cannot_be_measured_is_one_message_before_training(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: list[str], message: str
) -> None:
    assert main(["train", str(run_file), *(word for setting in settings for word in ("--set", setting))]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_a_source_without_held_out_data_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    save_file({"activations": torch.randn(64, 8)}, tmp_path / "x.safetensors")
    run = {
        "output": str(tmp_path / "out"), "sae": {"architecture": "topk", "d_sae": 16, "k": 2},
        "source": {"name": "tensor_files", "paths": [str(tmp_path / "x.safetensors")]},
        "train": {"total_samples": 64, "batch_size": 16, "lr": 0.001}, "eval": {"every_samples": 32},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    assert main(["train", str(tmp_path / "run.yaml")]) == 1
    assert "eval: no rows are held out from training (source.held_out is 0)" in capsys.readouterr().err


def test_a_cache_of_unknown_origin_cannot_be_measured(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"blocks.1.hook_resid_post": datasets.Array2D((4, 8), "float32")})
    datasets.Dataset.from_dict({"blocks.1.hook_resid_post": [[[0.0] * 8] * 4] * 2}, features=features).save_to_disk(
        tmp_path / "theirs"
    )
    source = CachedActivations(CachedActivationsConfig(path=tmp_path / "theirs"))
    assert isinstance(source, MeasuresHeldOut)
    with pytest.raises(ConfigError, match="do not say what it was trained on"):
        source.held_out(HeldOutConfig())
