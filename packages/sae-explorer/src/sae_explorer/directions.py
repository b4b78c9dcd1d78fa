"""What the decoder says of latents: which ones write alike, where they write, and how their effect on logits is spread."""

# F d_sae, O width of all that is written, N chosen latents, V vocabulary

from __future__ import annotations

from typing import Any

import torch
from sae_core import SAE
from sae_core.site_analysis import decoder_site_norms
from sae_lm.lens import Lens, directions
from torch import Tensor

__all__ = ["logit_histograms", "nearest", "site_norms", "unit_directions"]

_AT_ONCE = 1 << 24


@torch.no_grad()
def unit_directions(sae: SAE[Any]) -> Tensor:
    """(d_sae, d_out) the directions of all latents with length one, those that write nothing with zero; float32, on the CPU."""
    blocks = torch.arange(sae.d_sae).split(8192)
    return torch.cat([torch.nn.functional.normalize(directions(sae, block).cpu(), dim=-1) for block in blocks])


@torch.no_grad()
def nearest(unit_FO: Tensor, latents_N: Tensor, k: int, among_GO: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cosines (N, k) and numbers (N, k) of the latents whose directions are nearest to those of `latents_N`, nearest first.

    With `among_GO` they are looked for there; otherwise among `unit_FO`, itself left out.

    >>> cosines, found = nearest(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]]), torch.tensor([0]), 2)
    >>> found.tolist(), [round(c, 2) for c in cosines[0].tolist()]
    ([[2, 1]], [0.8, 0.0])
    """
    others_GO = unit_FO if among_GO is None else among_GO
    k = min(k, len(others_GO) - (among_GO is None))
    values: list[Tensor] = []
    indices: list[Tensor] = []
    for block in latents_N.split(max(1, _AT_ONCE // len(others_GO))):
        cosines = unit_FO[block] @ others_GO.T
        if among_GO is None:
            cosines[torch.arange(len(block)), block] = -torch.inf
        best = cosines.topk(max(k, 0))
        values.append(best.values)
        indices.append(best.indices)
    return torch.cat(values), torch.cat(indices)


@torch.no_grad()
def site_norms(sae: SAE[Any], latent: int) -> dict[str, float]:
    """The norm of what a latent writes at each site; empty for a dictionary that writes one."""
    if len(sae.writes) < 2:
        return {}
    direction = directions(sae, torch.tensor([latent])).cpu()
    return {name: float(norm) for name, norm in decoder_site_norms(direction, sae.writes).items()}


@torch.no_grad()
def logit_histograms(sae: SAE[Any], lens: Lens, latents: Tensor, bins: int = 40) -> tuple[Tensor, Tensor]:
    """Counts (N, bins) of tokens by what one unit of each latent adds to their logits, and the two ends (N, 2) of the bins."""
    counts: list[Tensor] = []
    ends: list[Tensor] = []
    for block in latents.split(max(1, _AT_ONCE // lens.unembed.shape[0])):
        logits_NV = lens.logits(directions(sae, block).to(lens.weight.device)).float()
        low, high = logits_NV.amin(1, keepdim=True), logits_NV.amax(1, keepdim=True)
        place = ((logits_NV - low) / (high - low).clamp_min(1e-30) * bins).long().clamp(0, bins - 1)
        counts.append(
            torch.zeros(len(block), bins, device=place.device).scatter_add_(1, place, torch.ones_like(logits_NV)).cpu()
        )
        ends.append(torch.cat([low, high], 1).cpu())
    return torch.cat(counts).long(), torch.cat(ends)
