"""Studies: what is collected is what a naive count finds, in bounded memory, and a study that was stopped ends the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_core import create
from sae_core.cli import main
from sae_core.codes import SparseCodes
from sae_core.config import structure
from sae_core.errors import ConfigError, FormatError
from sae_lm.collect import BIN_EDGES, CoFiring, Kept, SnippetReader, Totals, hashed, peaks
from sae_lm.source import HuggingFaceSource, HuggingFaceSourceConfig
from sae_lm.studies import StudyConfig, StudyFolder, study

CPU = torch.device("cpu")


def random_codes(windows: int, positions: int = 6, d_sae: int = 5, seed: int = 0, density: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(windows, positions, d_sae, generator=generator)
    return values * (torch.rand(values.shape, generator=generator) < density)


@given(seed=st.integers(0, 50), batch=st.integers(1, 7), keep=st.integers(1, 4))
@settings(deadline=None, max_examples=25)
def test_kept_examples_are_the_best_of_all_however_they_come(seed: int, batch: int, keep: int) -> None:
    dense = random_codes(12, seed=seed)
    kept = Kept(5, keep, 4, CPU)
    for start in range(0, 12, batch):
        codes = SparseCodes.from_dense(dense[start : start + batch])
        found = peaks(codes)
        kept.offer(found, found.values.abs().double(), start, SnippetReader(codes, 4))
    for latent in range(5):
        largest = dense[..., latent].abs().amax(1)
        active = [int(w) for w in largest.argsort(descending=True, stable=True) if largest[w] > 0][:keep]
        assert [w for w in kept.windows[latent].tolist() if w >= 0] == active
        for slot, window in enumerate(active):
            position = int(kept.positions[latent, slot])
            assert abs(kept.values[latent, slot]) == largest[window]
            assert kept.values[latent, slot] == dense[window, position, latent]
            start = min(max(position - 2, 0), 2)
            assert torch.equal(kept.snippets[latent, slot], dense[window, start : start + 4, latent].half())


def test_a_sample_by_hash_is_uniform_and_does_not_depend_on_batches() -> None:
    numbers = hashed(torch.arange(200_000), 3) / (1 << 53)
    assert abs(float(numbers.mean()) - 0.5) < 0.003
    assert abs(float((numbers < 0.1).double().mean()) - 0.1) < 0.003
    assert not torch.equal(numbers, hashed(torch.arange(200_000), 4) / (1 << 53))
    pairs = torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1]
    assert abs(float(pairs)) < 0.01


def test_totals_and_partners_are_those_of_a_naive_count() -> None:
    dense = random_codes(40, d_sae=6, seed=1)
    totals, cofiring = Totals(6, CPU), CoFiring(6, 1.0, 1000, 0, CPU)
    for start in range(0, 40, 7):
        codes = SparseCodes.from_dense(dense[start : start + 7])
        totals.add(codes, peaks(codes))
        cofiring.add(codes, start)
    active = dense != 0
    assert totals.count.tolist() == active.sum((0, 1)).tolist()
    assert totals.windows.tolist() == active.any(1).sum(0).tolist()
    assert torch.allclose(totals.sum.float(), dense.sum((0, 1)), atol=1e-4)
    assert torch.equal(totals.largest, dense.abs().amax((0, 1)))
    for latent in range(6):
        values = dense[..., latent][active[..., latent]].abs()
        assert totals.histogram[latent].tolist() == torch.histogram(values, BIN_EDGES).hist.int().tolist()
    flat = active.view(-1, 6).double()
    together = flat.T @ flat
    partners, counts, jaccard = cofiring.partners(3)
    for latent in range(6):
        either = together.diagonal() + together[latent, latent] - together[latent]
        expected = together[latent] / either
        expected[latent] = -1
        assert torch.allclose(jaccard[latent].double(), expected.sort(descending=True).values[:3], atol=1e-6)
        for partner, count in zip(partners[latent].tolist(), counts[latent].tolist(), strict=True):
            assert count == together[latent, partner]


def test_the_table_of_pairs_is_bounded_and_says_what_it_gave_up() -> None:
    dense = torch.zeros(30, 4, 8)
    dense[:, :, 0] = dense[:, :, 1] = 1.0
    dense[:, 0, 2:5] = 1.0
    cofiring = CoFiring(8, 1.0, 2, 0, CPU)
    for start in range(0, 30, 10):
        cofiring.add(SparseCodes.from_dense(dense[start : start + 10]), start)
    assert len(cofiring.keys) == 2
    assert cofiring.partners(1)[1][0].tolist() == [120]
    assert cofiring.given_up >= 10


@pytest.fixture
def source(llama: Any, tokenizer: Any, tmp_path: Path) -> Callable[..., HuggingFaceSource]:
    (tmp_path / "text.txt").write_text("\n\n".join(f"Document {i}: {'word ' * (i % 7)}and {i * i}." for i in range(60)))

    def make(**changes: Any) -> HuggingFaceSource:
        given_ = {
            "model": "tiny", "hook": "model.layers.1", "context_size": 24, "batch_prompts": 4,
            "text": {"kind": "file", "path": str(tmp_path / "text.txt")}, **changes,
        }  # fmt: skip
        return HuggingFaceSource(structure(given_, HuggingFaceSourceConfig), model=llama, tokenizer=tokenizer)

    return make


CONFIG = StudyConfig(tokens=900, top=4, sampled=6, bands=3, snippet=8, partners=4, cofiring_positions=400, logits=5)


def dictionary(**config: Any) -> Any:
    return create("topk", d_in=32, d_sae=48, k=4, seed=2, **config)


def test_a_study_holds_what_the_model_and_the_dictionary_say(
    source: Callable[..., HuggingFaceSource], tmp_path: Path, llama: Any
) -> None:
    sae = dictionary().train()
    study(sae, source(), tmp_path / "study", CONFIG, facts={"sae_path": "here"})
    assert sae.training
    sae.eval()
    found = StudyFolder(tmp_path / "study")
    assert found.index["sae_path"] == "here"
    assert 900 <= found.index["positions"] < 1100
    windows = torch.cat([batch.tokens for batch in source().windows("all", rows=8)][: -(-found.index["windows"] // 8)])
    kept = source().rules.kept(windows, torch.ones_like(windows, dtype=torch.bool))
    with torch.no_grad():
        dense = sae.encode(llama(windows, output_hidden_states=True).hidden_states[2]) * kept.unsqueeze(-1)
    assert found.latents["count"].tolist() == (dense != 0).sum((0, 1)).tolist()
    assert torch.allclose(found.latents["largest"], dense.amax((0, 1)), rtol=1e-4)
    latent = int(found.latents["count"].argmax())
    examples = list(found.examples(latent))
    assert [example.band for example in examples] == [0] * 4 + [1, 1, 2, 2, 3, 3]
    top = dense[..., latent].amax(1).sort(descending=True).values[:4]
    assert torch.allclose(torch.tensor([example.value for example in examples[:4]]), top, rtol=1e-4)
    spectrum = [example.value for example in examples[4:]]
    assert spectrum == sorted(spectrum, reverse=True)
    for example in examples:
        assert len(example.tokens) == len(example.activations) == 8
        assert example.activations[example.peak] == pytest.approx(example.value, rel=1e-2)
        assert example.texts[example.peak] == found.tokens[example.tokens[example.peak]]
    partner, count, jaccard = found.partners(latent)[0]
    assert count > 0
    assert 0 < jaccard <= 1
    assert partner != latent
    direction = (sae.W_dec[latent] / sae.W_dec[latent].norm()).detach()  # what a latent of this TopK dictionary adds
    logits = ((direction * llama.model.norm.weight) @ llama.lm_head.weight.T).detach()
    (best, value), *_ = found.promoted(latent)
    assert value == pytest.approx(float(logits.max()), rel=1e-3)
    assert best == found.tokens[int(logits.argmax())]
    assert found.suppressed(latent)[0][1] == pytest.approx(float(logits.min()), rel=1e-3)
    with pytest.raises(ConfigError, match="there is no latent 48"):
        next(found.examples(48))


def test_a_study_that_was_stopped_goes_on_to_the_same_bits(
    source: Callable[..., HuggingFaceSource], tmp_path: Path
) -> None:
    sae = dictionary().eval()
    study(sae, source(), tmp_path / "whole", CONFIG)

    def stop(done: int) -> None:
        if done > 400:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(sae, source(), tmp_path / "stopped", CONFIG, progress=stop)
    assert not (tmp_path / "stopped" / "index.json").exists()
    with pytest.raises(ConfigError, match=r"a study with other settings \(study\)"):
        study(sae, source(), tmp_path / "stopped", StudyConfig(tokens=901, top=4, sampled=6, bands=3, snippet=8))
    with (tmp_path / "stopped" / "windows.part").open("ab") as file:
        file.write(b"half a window")  # the process was killed while it wrote
    seen: list[int] = []
    study(sae, source(), tmp_path / "stopped", CONFIG, progress=seen.append)
    assert seen[0] > 400
    for name in ("latents.safetensors", "examples.safetensors", "windows.safetensors", "tokens.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name
    assert sorted(file.name for file in (tmp_path / "stopped").iterdir()) == [
        "examples.safetensors", "index.json", "latents.safetensors", "tokens.json", "windows.safetensors",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="holds a finished study"):
        study(sae, source(), tmp_path / "stopped", CONFIG)


def test_a_folder_that_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="holds no finished study"):
        StudyFolder(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({"format": "sae-study", "version": 99}))
    with pytest.raises(FormatError, match="version 99; this reads 'sae-study', version 1"):
        StudyFolder(tmp_path)


def test_the_settings_are_documented() -> None:
    page = Path(__file__).parents[3] / "docs" / "study.md"
    if not page.is_file():
        pytest.skip("needs the repository")
    text = page.read_text()
    assert all(f"`{name}`" in text for name in StudyConfig.__dataclass_fields__)


def test_study_from_the_command_line(saved_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sae = dictionary()
    sae.metadata = {"model_name": str(saved_model), "hook_name": "model.layers.1", "context_size": 24}
    sae.save(tmp_path / "sae")
    (tmp_path / "text.txt").write_text("Some text of some words.\n\nAnd more of it.\n\n" * 9)
    arguments = ["lm", "study", str(tmp_path / "sae"), "--text", str(tmp_path / "text.txt"), "--tokens", "100"]
    assert main([*arguments, "--set", "study.top=3", "--device", "cpu"]) == 0
    assert "48 latents at model.layers.1 on 100 positions" in capsys.readouterr().out
    found = StudyFolder(tmp_path / "sae" / "study")
    assert found.index["study"]["top"] == 3
    assert main([*arguments, "--set", "study.topp=3"]) == 1
    assert "did you mean 'top'" in capsys.readouterr().err
