"""What is written for Neuronpedia has its keys and says what the study says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sae_core.cli import main
from sae_core.errors import ConfigError
from sae_explorer import NeuronpediaId, open_studied, write_upload
from sae_lm.studies import StudyFolder

# What SAEDashboard 0.8.0 writes, and the converter in Neuronpedia's repository reads.
FEATURE = {
    "feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
    "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson", "correlated_features_indices",
    "correlated_features_l1", "correlated_features_pearson", "neg_str", "neg_values", "pos_str", "pos_values",
    "frac_nonzero", "freq_hist_data_bar_values", "freq_hist_data_bar_heights", "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values", "n_prompts_total", "n_tokens_in_prompt", "dataset", "decoder_weights_dist",
    "activations", "vector",
}  # fmt: skip
ACTIVATION = {"bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_an_upload_says_what_the_study_says_under_neuronpedias_names(world: Path, tmp_path: Path) -> None:
    study = StudyFolder(world / "one" / "study")
    out = tmp_path / "deep" / "upload"
    given = ["dashboard", str(world / "one"), str(out), "--neuronpedia", "tiny/1-res__l0-4", "--device", "cpu"]
    assert main(given) == 0
    batch, skipped = read(out / "batch-0.json"), read(out / "skipped_indexes.json")
    about = {"model_id": "tiny", "sae_set": "res", "sae_id_suffix": "l0-4"}
    assert {key: batch[key] for key in batch if key != "features"} == {**about, "layer": 1}
    assert {key: skipped[key] for key in skipped if key != "skipped_indexes"} == {**about, "layer": "1"}
    shown = [feature["feature_index"] for feature in batch["features"]]
    count = study.latents["count"]
    assert shown == count.nonzero().squeeze(1).tolist()
    assert sorted([*shown, *skipped["skipped_indexes"]]) == list(range(96))
    for feature in batch["features"]:
        latent = feature["feature_index"]
        assert set(feature) == FEATURE
        assert sum(feature["freq_hist_data_bar_heights"]) == int(count[latent])
        for kind in ("freq", "logits"):  # a bar has a height and a place
            heights, places = (feature[f"{kind}_hist_data_bar_{what}"] for what in ("heights", "values"))
            assert len(heights) == len(places) > 0
            assert places == sorted(places)
        assert feature["pos_str"] == [text for text, _ in study.promoted(latent)]
        assert feature["frac_nonzero"] == pytest.approx(float(study.latents["density"][latent]))
        activations = feature["activations"]
        assert all(set(one) == ACTIVATION for one in activations)
        for one, example in zip(activations, study.examples(latent), strict=True):
            assert one["tokens"] == list(example.texts)
            assert one["values"][one["qualifying_token_index"]] == pytest.approx(example.value, rel=1e-2)
            assert (one["bin_min"] == one["bin_contains"] == -1) == (example.band == 0)
        assert max(one["bin_max"] for one in activations) == pytest.approx(
            float(study.latents["largest"][latent]), rel=1e-2
        )
        bands = {(one["bin_min"], one["bin_contains"]) for one in activations if one["bin_min"] != -1}
        assert sum(share for _, share in bands) == pytest.approx(1, abs=1e-2)
    with pytest.raises(ConfigError, match="exists"):
        write_upload(open_studied([str(world / "one")]).studied[str(world / "one")], out, NeuronpediaId.parse("a/1-b"))


def test_an_upload_has_128_latents_a_file_and_leaves_nothing_when_it_fails(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studied = open_studied([str(world / "one")], device="cpu", with_model=False).studied[str(world / "one")]
    monkeypatch.setattr("sae_explorer.upload._BATCH", 20)
    out = write_upload(studied, tmp_path / "few", NeuronpediaId.parse("tiny/1-res"), range(50))
    found = [len(read(path)["features"]) for path in sorted(out.glob("batch-*.json"))]
    assert found[:-1] == [20] * (len(found) - 1)
    assert sum(found) + len(read(out / "skipped_indexes.json")["skipped_indexes"]) == 50

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_upload(studied, tmp_path / "out", NeuronpediaId.parse("tiny/1-res"), progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["few"]


@pytest.mark.parametrize("text", ["", "gpt2-small", "gpt2-small/res-jb", "a/b/8-res", "a/8", "a/8-"])
def test_what_is_no_id_of_neuronpedia_is_refused_before_any_work(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dashboard", "nowhere", "out", "--neuronpedia", text]) == 1
    assert "is no id such as 'gpt2-small/8-res-jb'" in capsys.readouterr().err
