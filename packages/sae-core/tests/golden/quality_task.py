"""The task of `test_training_quality` and its reference: sparse sums of known directions, and scores against those.

Plain torch, so that the test and `make_sae_lens_quality` (under another library's Python) run the very same lines.
"""

# R rows, D d_in, G features, F latents

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

D_IN, FEATURES, D_SAE = 32, 96, 64
BATCH, STEPS, LR = 256, 400, 3e-3
DEAD_AFTER_STEPS = 100
FIRING = 0.05


def directions(seed: int) -> Tensor:
    """(features, d_in) unit vectors."""
    drawn = torch.randn(FEATURES, D_IN, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm(dim=-1, keepdim=True)


def activations(seed: int, stream: int, rows: int) -> Iterator[Tensor]:
    """Batches (rows, d_in): each feature fires with probability `FIRING`, with a strength of about 1 +- 0.3."""
    features_GD = directions(seed)
    generator = torch.Generator().manual_seed(1000 * seed + stream)
    while True:
        fires_RG = torch.rand(rows, FEATURES, generator=generator) < FIRING
        strength_RG = (1 + 0.3 * torch.randn(rows, FEATURES, generator=generator)).relu()
        yield (fires_RG * strength_RG) @ features_GD


def scores(x_RD: Tensor, y_RD: Tensor, latents_RF: Tensor, W_dec_FD: Tensor, seed: int) -> dict[str, float]:
    """Explained variance, mean number of active latents, and mean cosine of latents matched one to one with features."""
    left, spread = (x_RD - y_RD).square().sum(), (x_RD - x_RD.mean(0)).square().sum()
    cosines_FG = torch.nn.functional.normalize(W_dec_FD, dim=-1) @ directions(seed).T
    total = 0.0
    for _ in range(min(cosines_FG.shape)):  # greedily, the best pair first
        best = int(cosines_FG.argmax())
        latent, feature = divmod(best, FEATURES)
        total += float(cosines_FG[latent, feature])
        cosines_FG[latent] = -2.0
        cosines_FG[:, feature] = -2.0
    return {
        "explained_variance": float(1 - left / spread),
        "l0": float((latents_RF != 0).sum(-1).float().mean()),
        "mcc": total / min(cosines_FG.shape),
    }
