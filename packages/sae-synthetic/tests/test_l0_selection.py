"""The L0 with the least decoder projection, among dictionaries that are there and by training as few as possible."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_core import SAE, TrainConfig, Trainer, create
from sae_core.errors import ConfigError
from sae_synthetic import (
    ActivationGenerator,
    FeatureDictionary,
    L0Path,
    SyntheticActivationIterator,
    best_l0,
    decoder_projection,
    find_l0,
    generate_random_low_rank_correlation_matrix,
)

FEATURES = FeatureDictionary(24, 32, seed=0)
X = FEATURES(ActivationGenerator(24, 0.25, 0.1, seed=1).sample_codes(2000)).detach()


def _mixed(k: int, right: int = 6) -> SAE:
    """The truth, with as much of the first feature in every direction as k is away from `right`."""
    sae = create("topk", d_in=32, d_sae=24, k=k, apply_b_dec_to_input=False)
    directions = FEATURES.feature_vectors.detach().clone()
    directions += 0.05 * abs(k - right) * directions[:1]
    with torch.no_grad():
        dict(sae.named_parameters())["W_dec"].copy_(directions)
    return sae


@pytest.mark.parametrize("right", [2, 5, 9, 14, 20])
def test_the_least_is_found_with_few_trainings_wherever_it_is(right: int) -> None:
    trained: list[int] = []

    def train(k: int) -> SAE:
        trained.append(k)
        return _mixed(k, right)

    found = find_l0(train, X, lowest=2, highest=20, places=[21, 22])
    assert found.k == right
    assert len(trained) == len(set(trained)) <= 13
    assert list(found.projections) == sorted(trained)
    least = found.projections[right]
    assert all(value > least for k, value in found.projections.items() if k != right)
    for neighbour in {right - 1, right + 1} & set(range(2, 21)):
        assert neighbour in found.projections, "no gap is left beside the least"


def test_dictionaries_that_are_there_are_compared() -> None:
    saes = {k: _mixed(k) for k in (3, 6, 9)}
    found = best_l0(saes, X, [12, 14])
    assert found.k == 6
    assert found.projections[3] == pytest.approx(
        (decoder_projection(saes[3], X, 12) + decoder_projection(saes[3], X, 14)) / 2
    )


def test_places_and_ranges_without_meaning_are_refused() -> None:
    with pytest.raises(ConfigError, match="places: 9 is not above every L0 compared, the highest of which is 9"):
        best_l0({3: _mixed(3), 9: _mixed(9)}, X, [9, 12])
    with pytest.raises(ConfigError, match="places: give at least one"):
        best_l0({3: _mixed(3)}, X, [])
    with pytest.raises(ConfigError, match="nothing to compare"):
        best_l0({}, X, [3])
    for bad in ({"lowest": 0, "highest": 4}, {"lowest": 4, "highest": 4}):
        with pytest.raises(ConfigError, match="need 1 <= lowest < highest"):
            find_l0(_mixed, X, places=[9], **bad)
    with pytest.raises(ConfigError, match="coarse must be at least 2"):
        find_l0(_mixed, X, lowest=1, highest=4, places=[9], coarse=1)


def test_the_true_l0_is_found_by_an_sae_whose_l0_falls() -> None:
    """The world of `sparse-but-wrong` in small: correlated features, the frequent ones first."""
    rates = torch.linspace(0.45, 0.1, 20)
    correlations = generate_random_low_rank_correlation_matrix(20, rank=4, correlation_scale=0.25, seed=1)
    generator = ActivationGenerator(20, rates, std_firing_magnitudes=0.15, correlation_matrix=correlations, seed=1)
    features = FeatureDictionary(20, 32, seed=0)
    true_l0 = float(generator.held_out().sample_codes(20_000).l0().double().mean())
    assert true_l0 == pytest.approx(5.5, abs=0.1)
    path = L0Path(features(generator.held_out().sample_codes(2000)).detach(), [10, 11, 12], 10)
    sae = create("batchtopk", d_in=32, d_sae=20, k={"from": 8.0, "to": 3.5, "over": 1.0}, seed=0)
    plan = TrainConfig(
        total_samples=110_000,
        batch_size=256,
        lr=1e-2,
        init_b_dec="zeros",
        dead_after_samples=20_000,
        progress_bar=False,
    )
    Trainer(sae, SyntheticActivationIterator(features, generator, 256), plan, callbacks=[path]).fit()
    found = path.best()
    assert abs(found.k - true_l0) <= 1
    assert len(found.projections) == 43
    assert found.projections[min(found.projections)] > 3 * found.projections[found.k]
    assert found.projections[max(found.projections)] > 3 * found.projections[found.k]


def _step(path: L0Path, sae: SAE, steps: int, l0: list[int]) -> None:
    progress: Any = SimpleNamespace(
        trainer=SimpleNamespace(steps=steps, sae=sae), result=SimpleNamespace(l0=torch.tensor(l0))
    )
    path(progress)


def test_a_path_looks_by_the_mean_l0_since_the_last_look_and_smooths_what_it_saw() -> None:
    path = L0Path(X, [12, 14], 2)
    for look, k in enumerate((9, 8, 7, 6, 5)):
        _step(path, _mixed(k), 2 * look + 1, [k + 1, k + 1])
        _step(path, _mixed(k), 2 * look + 2, [k - 1, k - 1])
    assert list(path.projections) == [9, 8, 7, 6, 5]
    for k, value in path.projections.items():
        wanted = sum(abs(decoder_projection(_mixed(int(k)), X, n)) for n in (12, 14)) / 2
        assert value == pytest.approx(wanted)
    path.projections |= {4.0: 0.5, 3.0: 0.0, 2.0: 0.5}  # one low value between high ones is noise
    assert path.best().k == 6
    assert list(path.best().projections) == [2, 3, 4, 5, 6, 7, 8, 9]


def test_a_path_compares_only_what_lies_below_its_places() -> None:
    path = L0Path(X, [6], 1)
    for step, k in enumerate((9, 8, 7, 5, 4)):
        _step(path, _mixed(k), step + 1, [k])
    with pytest.raises(ConfigError, match="2 looks below place 6; at least 3 are needed"):
        path.best()


@pytest.mark.parametrize(
    ("places", "every", "message"),
    [([], 1, "at least one place"), ([0], 1, "must be positive"), ([5], 0, "every_steps")],
)
def test_a_path_without_meaning_is_refused(places: list[int], every: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        L0Path(X, places, every)
