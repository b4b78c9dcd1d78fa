"""The L0 with the least decoder projection, among dictionaries that are there and by training as few as possible."""

from __future__ import annotations

import pytest
import torch
from sae_core import SAE, create
from sae_core.errors import ConfigError
from sae_synthetic import ActivationGenerator, FeatureDictionary, best_l0, decoder_projection, find_l0

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
