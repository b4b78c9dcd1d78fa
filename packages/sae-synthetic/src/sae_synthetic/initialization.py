"""Start an SAE at the truth, to see whether training keeps it there."""

from __future__ import annotations

import torch
from sae_core import SAE
from sae_core.config import require
from sae_core.errors import ShapeError
from torch import Tensor

from sae_synthetic._random import generator_for
from sae_synthetic.features import FeatureDictionary

__all__ = ["init_sae_to_match_feature_dict"]


@torch.no_grad()
def init_sae_to_match_feature_dict(
    sae: SAE,
    feature_dict: FeatureDictionary,
    noise_level: float = 0.0,
    feature_ordering: Tensor | None = None,
    seed: int | None = None,
) -> None:
    """Set the first latents' decoder and encoder directions to the true features, in place.

    Latent i gets feature i, or feature `feature_ordering[i]`, plus normal noise of standard deviation `noise_level` in
    every coordinate; encoder and decoder get the same vector. Latents beyond the features, and all biases, stay as they
    are. Raises ShapeError when the widths differ.

    >>> from sae_core import create
    >>> features, sae = FeatureDictionary(4, 8, seed=0), create("standard", d_in=8, d_sae=4)
    >>> init_sae_to_match_feature_dict(sae, features)
    >>> torch.equal(sae.directions(), features.feature_vectors)
    True
    """
    if sae.d_in != feature_dict.hidden_dim:
        raise ShapeError(f"the SAE has d_in {sae.d_in}, the features have {feature_dict.hidden_dim} dimensions")
    require(noise_level >= 0, f"noise_level must not be negative, found {noise_level}")
    vectors = feature_dict.feature_vectors.detach().cpu()
    if feature_ordering is not None:
        require(feature_ordering.dim() == 1, "feature_ordering must be a row of feature indices")
        outside = (feature_ordering < 0) | (feature_ordering >= len(vectors))
        require(not bool(outside.any()), f"feature_ordering: indices must be in [0, {len(vectors)})")
        vectors = vectors[feature_ordering.cpu()]
    count = min(sae.d_sae, len(vectors))
    vectors = vectors[:count].clone()
    if noise_level:
        vectors += noise_level * torch.randn(vectors.shape, generator=generator_for(seed))
    vectors = vectors.to(sae.device, sae.dtype)
    for name, weight in sae.tensors().items():
        if sae.axis(name).latent == 0 and weight.shape == (sae.d_sae, sae.d_in):
            weight[:count] = vectors
