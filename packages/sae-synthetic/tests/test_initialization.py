"""An SAE that starts at the truth."""

from __future__ import annotations

import pytest
import torch
from sae_core import create
from sae_core.errors import ConfigError, ShapeError
from sae_synthetic import FeatureDictionary, init_sae_to_match_feature_dict, mean_correlation_coefficient


@pytest.fixture
def features() -> FeatureDictionary:
    return FeatureDictionary(10, 16, seed=0)


@pytest.mark.parametrize("architecture", ["standard", "topk", "batchtopk", "jumprelu", "gated", "matching_pursuit"])
def test_its_mcc_is_one(architecture: str, features: FeatureDictionary) -> None:
    sae = create(architecture, d_in=16, d_sae=10, **({"k": 2} if "topk" in architecture else {}))
    init_sae_to_match_feature_dict(sae, features)
    assert mean_correlation_coefficient(sae.W_dec, features.feature_vectors, signed=True) == pytest.approx(
        1.0, abs=1e-6
    )
    if hasattr(sae, "W_enc"):
        assert torch.equal(sae.W_enc, features.feature_vectors.T)


def test_latents_beyond_the_features_and_biases_stay_as_they_are(features: FeatureDictionary) -> None:
    sae, before = create("standard", d_in=16, d_sae=14, seed=1), create("standard", d_in=16, d_sae=14, seed=1)
    init_sae_to_match_feature_dict(sae, features)
    assert torch.equal(sae.W_dec[10:], before.W_dec[10:])
    assert torch.equal(sae.W_enc[:, 10:], before.W_enc[:, 10:])
    assert torch.equal(sae.b_enc, before.b_enc)


def test_a_smaller_sae_takes_the_first_in_the_order_given(features: FeatureDictionary) -> None:
    sae = create("standard", d_in=16, d_sae=3)
    init_sae_to_match_feature_dict(sae, features, feature_ordering=torch.tensor([7, 2, 5, 0]))
    assert torch.equal(sae.W_dec, features.feature_vectors[[7, 2, 5]])


def test_noise_has_the_level_asked_for_and_a_seed_repeats_it() -> None:
    features = FeatureDictionary(200, 100, initializer=None, seed=0)
    sae = create("standard", d_in=100, d_sae=200)
    init_sae_to_match_feature_dict(sae, features, noise_level=0.3, seed=4)
    noise = sae.W_dec.detach() - features.feature_vectors.detach()
    assert float(noise.std()) == pytest.approx(0.3, rel=0.02)
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    again = create("standard", d_in=100, d_sae=200)
    init_sae_to_match_feature_dict(again, features, noise_level=0.3, seed=4)
    assert torch.equal(again.W_dec, sae.W_dec)
    init_sae_to_match_feature_dict(again, features, noise_level=0.3)
    assert not torch.equal(again.W_dec, sae.W_dec)


def test_what_does_not_fit_is_refused(features: FeatureDictionary) -> None:
    with pytest.raises(ShapeError, match="d_in 15, the features have 16 dimensions"):
        init_sae_to_match_feature_dict(create("standard", d_in=15, d_sae=4), features)
    sae = create("standard", d_in=16, d_sae=4)
    with pytest.raises(ConfigError, match="noise_level must not be negative"):
        init_sae_to_match_feature_dict(sae, features, noise_level=-1.0)
    with pytest.raises(ConfigError, match="feature_ordering must be a row"):
        init_sae_to_match_feature_dict(sae, features, feature_ordering=torch.zeros(2, 2, dtype=torch.long))
    for ordering in ([0, 10], [0, -1]):
        with pytest.raises(ConfigError, match=r"feature_ordering: indices must be in \[0, 10\)"):
            init_sae_to_match_feature_dict(sae, features, feature_ordering=torch.tensor(ordering))
