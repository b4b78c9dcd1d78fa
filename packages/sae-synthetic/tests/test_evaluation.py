"""The evaluation of an SAE: against SAELens on the same samples, and what is promised about samples and baseline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_core import SAE, SparseCodes, create
from sae_core.errors import ConfigError
from sae_synthetic import (
    ActivationGenerator,
    ClassificationMetrics,
    FeatureDictionary,
    SyntheticDataEvalResult,
    eval_sae_on_synthetic_data,
    init_sae_to_match_feature_dict,
    untrained_like,
)
from safetensors.torch import load_file
from torch import Tensor

World = tuple[FeatureDictionary, ActivationGenerator]


class FixedSamples:
    """Stands where a generator is expected, and gives the golden samples in order."""

    def __init__(self, samples: Tensor) -> None:
        self.num_features = samples.shape[1]
        self._samples, self._given = samples, 0

    def held_out(self) -> FixedSamples:
        return FixedSamples(self._samples)

    def sample_codes(self, rows: int) -> SparseCodes:
        self._given += rows
        return SparseCodes.from_dense(self._samples[self._given - rows : self._given])


@pytest.fixture
def world() -> World:
    return FeatureDictionary(12, 16, seed=0), ActivationGenerator(12, 0.2, 0.1, seed=1)


@pytest.mark.parametrize("batch_size", [None, 77])
def test_every_score_agrees_with_sae_lens(golden_folder: Path, batch_size: int | None) -> None:
    tensors = load_file(golden_folder / "scores.safetensors")
    wanted = json.loads((golden_folder / "scores.json").read_text())["evaluation"]
    features = FeatureDictionary(20, 12, bias=True, initializer=None)
    with torch.no_grad():
        features.feature_vectors.copy_(tensors["feature_vectors"])
        features.bias.copy_(tensors["bias"])
    sae = SAE.load(golden_folder / "sae_lens_sae")
    samples: Any = FixedSamples(tensors["samples"])
    found = eval_sae_on_synthetic_data(sae, features, samples, num_samples=600, batch_size=batch_size)
    values = found.to_log_dict()
    assert {name: values[name] for name in wanted} == pytest.approx(wanted, abs=2e-5)


def test_an_sae_at_the_truth_is_perfect(world: World) -> None:
    features, generator = world
    sae = create("standard", d_in=16, d_sae=12)
    init_sae_to_match_feature_dict(sae, features)
    with torch.no_grad():
        sae.b_enc.fill_(-1e-3)
    found = eval_sae_on_synthetic_data(sae, features, generator, num_samples=3000)
    assert (found.mcc, found.signed_mcc, found.uniqueness) == pytest.approx((1.0, 1.0, 1.0), abs=1e-5)
    assert found.classification.f1_score == pytest.approx(1.0, abs=1e-3)
    assert found.sae_l0 == pytest.approx(found.true_l0, rel=1e-2)
    assert found.explained_variance > 0.999
    assert found.shrinkage == pytest.approx(1.0, abs=5e-3)
    assert (found.dead_latents, found.num_latents, found.num_samples) == (0, 12, 3000)
    assert found.baseline is not None
    assert found.baseline.mcc < 0.7
    assert found.baseline.classification.f1_score < 0.6


def test_the_baseline_is_the_evaluation_of_an_untrained_sae_on_the_same_samples(world: World) -> None:
    sae = create("topk", d_in=16, d_sae=20, k=3, seed=5)
    found = eval_sae_on_synthetic_data(sae, *world, num_samples=500)
    assert found.baseline == eval_sae_on_synthetic_data(untrained_like(sae), *world, num_samples=500, baseline=False)
    assert found.baseline is not None
    assert found.baseline.baseline is None
    assert found.baseline.true_l0 == found.true_l0


def test_an_untrained_sae_keeps_settings_and_normalisation_but_no_weight() -> None:
    sae = create("topk", d_in=16, d_sae=20, k=3, normalize_activations="expected_average_only_in", seed=5)
    sae.normalization.load_state_dict({"site.0.scale": torch.tensor(3.0)})
    random = untrained_like(sae)
    assert random.config == sae.config
    assert float(random.normalization.parts[0].scale) == 3.0
    assert not torch.equal(random.W_dec, sae.W_dec)
    assert torch.equal(random.W_dec, untrained_like(sae).W_dec)
    assert not torch.equal(random.W_dec, untrained_like(sae, seed=1).W_dec)


def test_samples_are_the_same_each_time_and_none_of_training(world: World) -> None:
    sae = create("topk", d_in=16, d_sae=20, k=3, seed=5)
    before = world[1].state_dict()
    first = eval_sae_on_synthetic_data(sae, *world, num_samples=500, baseline=False)
    assert world[1].state_dict() == before
    world[1].sample(10)
    assert eval_sae_on_synthetic_data(sae, *world, num_samples=500, baseline=False) == first


def test_the_saes_mode_is_given_back(world: World) -> None:
    sae = create("batchtopk", d_in=16, d_sae=20, k=3).train()
    eval_sae_on_synthetic_data(sae, *world, num_samples=50)
    assert sae.training


def test_results_become_dictionaries_that_json_takes(world: World) -> None:
    found = eval_sae_on_synthetic_data(create("topk", d_in=16, d_sae=20, k=3), *world, num_samples=50)
    flat = found.to_log_dict("eval/")
    assert flat["eval/classification/f1_score"] == found.classification.f1_score
    assert found.baseline is not None
    assert flat["eval/baseline/classification/recall"] == found.baseline.classification.recall
    assert all(isinstance(value, float | int) for value in flat.values())
    assert json.loads(json.dumps(found.to_dict()))["baseline"]["mcc"] == found.baseline.mcc
    alone = eval_sae_on_synthetic_data(create("topk", d_in=16, d_sae=20, k=3), *world, num_samples=50, baseline=False)
    assert not [name for name in alone.to_log_dict() if name.startswith("baseline")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"d_in": 15}, "the SAE has d_in 15, the dictionary 12 features in 16 dimensions"),
    ],
)
def test_what_does_not_fit_is_refused(world: World, arguments: dict[str, int], message: str) -> None:
    sae = create("topk", d_in=arguments.pop("d_in", 16), d_sae=20, k=3)
    with pytest.raises(ConfigError, match=message):
        eval_sae_on_synthetic_data(sae, *world, **arguments)


def test_a_scaler_scales_what_the_sae_reads_and_its_output_back(world: World) -> None:
    class Tenfold:
        def scale(self, acts: Tensor) -> Tensor:
            return 10 * acts

        def unscale(self, acts: Tensor) -> Tensor:
            return acts / 10

    features, generator = world
    sae = create("topk", d_in=16, d_sae=12, k=2, seed=0)
    with torch.no_grad():
        init_sae_to_match_feature_dict(sae, features)
        sae.b_dec.fill_(0.5)
        plain = eval_sae_on_synthetic_data(sae, features, generator, 500)
        sae.b_dec.mul_(10)  # the SAE of a world ten times as large
    scaled = eval_sae_on_synthetic_data(sae, features, generator, 500, activation_scaler=Tenfold())
    assert scaled.explained_variance == pytest.approx(plain.explained_variance, abs=1e-5)
    assert scaled.shrinkage == pytest.approx(plain.shrinkage, abs=1e-5)
    unscaled = eval_sae_on_synthetic_data(sae, features, generator, 500)
    assert unscaled.explained_variance < plain.explained_variance - 0.1
    with pytest.raises(ConfigError, match=r"activation_scaler: 10\.0 has no methods scale and unscale"):
        eval_sae_on_synthetic_data(sae, features, generator, 500, activation_scaler=10.0)  # pyright: ignore[reportArgumentType]


def test_a_result_is_made_of_what_sae_lens_measures() -> None:
    metrics = ClassificationMetrics(0.5, 0.5, 0.5, 0.5)
    result = SyntheticDataEvalResult(1.0, 2.0, 3, 0.9, 0.8, 0.7, 0.6, metrics)
    assert set(result.to_log_dict()) == {
        "true_l0", "sae_l0", "dead_latents", "shrinkage", "explained_variance", "mcc", "uniqueness",
        *(f"classification/{name}" for name in ("precision", "recall", "f1_score", "accuracy")),
    }  # fmt: skip


def test_an_sae_stays_in_train_mode_when_an_evaluation_fails(world: World) -> None:
    class Broken:
        def scale(self, acts: Tensor) -> Tensor:
            raise RuntimeError("broken")

        def unscale(self, acts: Tensor) -> Tensor:
            return acts

    sae = create("topk", d_in=16, d_sae=12, k=2, seed=0).train()
    with pytest.raises(RuntimeError, match="broken"):
        eval_sae_on_synthetic_data(sae, *world, 500, activation_scaler=Broken())
    assert sae.training
