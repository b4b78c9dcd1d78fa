"""Latent scaling: is a latent that a crosscoder writes at one site only really absent from the other (arXiv 2504.02922)?

A crosscoder's decoder norm at a site may be zero although the feature is there: a sparsity penalty shrinks what is weak
(complete shrinkage), and other latents may hold the feature at that site (latent decoupling). So the latent's direction at
the site where it is written is looked for in the other site's activations. With activations f of latent j, its direction u at
the reference site and a quantity y of a site, the best multiple is

    beta = argmin_b sum |b f u - y|^2 = sum f <u, y> / (|u|^2 sum f^2).

Two quantities are asked, with the latent's own part w f there (w is its decoder row at that site):

    error           y = x - reconstruction + w f     what nobody else explains: found there after complete shrinkage
    reconstruction  y = reconstruction - bias        what is explained, by whomever: found there after latent decoupling

`nu_error` and `nu_reconstruction` are beta at the other site over beta at the reference site: near 0 for a feature that is
exclusive, near the ratio of its strengths for one that is there. Sites are compared in the crosscoder's own normalised
units, and directions must mean the same at both, as in a model and its fine-tuned sibling.
"""

# R rows, F d_sae, D width of a site

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sae_core.config import require
from sae_core.errors import DataError, ShapeError
from sae_core.sae import SAE
from sae_core.sites import Sites

__all__ = ["LatentScaling", "latent_scaling"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class LatentScaling:
    """Betas (F,) at the reference and at the other site; NaN for latents that never fired."""

    reference_error: Tensor
    reference_reconstruction: Tensor
    other_error: Tensor
    other_reconstruction: Tensor

    @property
    def nu_error(self) -> Tensor:
        """(F,) ratio of the errors' betas, the other site over the reference."""
        return self.other_error / self.reference_error

    @property
    def nu_reconstruction(self) -> Tensor:
        """(F,) ratio of the reconstructions' betas, the other site over the reference."""
        return self.other_reconstruction / self.reference_reconstruction


@torch.no_grad()
def latent_scaling(sae: SAE, batches: Iterable[Tensor], reference: str, other: str) -> LatentScaling:
    """Betas of all latents, from batches (rows, d_in) of a crosscoder's inputs, in one pass.

    Raises ConfigError unless `sae` is a crosscoder that has both sites, ShapeError when their widths differ, DataError
    without a batch.
    """
    require(
        sae.reconstructs_input,
        "latent_scaling: a transcoder has no two sites to compare; give a crosscoder",
    )
    widths = sae.writes
    for site in (reference, other):
        require(site in widths, f"latent_scaling: no site {site!r}; the dictionary has {', '.join(map(repr, widths))}")
    require(reference != other, f"latent_scaling: reference and other are both {reference!r}")
    if widths[reference] != widths[other]:
        raise ShapeError(
            f"latent_scaling: {reference!r} is {widths[reference]} wide, {other!r} {widths[other]}; a direction of one means "
            "nothing at the other"
        )
    columns = Sites(widths).slices()
    directions_FO, offset_O = sae.directions().double(), sae.offset().double()
    u_FD = directions_FO[:, columns[reference]]
    square_F = u_FD.square().sum(dim=1)
    power_F = torch.zeros_like(square_F)
    found = {
        (site, kind): torch.zeros_like(square_F) for site in (reference, other) for kind in ("error", "reconstruction")
    }
    was_training, seen = sae.training, 0
    sae.eval()
    try:
        for batch in batches:
            prepared = sae.prepare(batch)
            f_RF = sae.encode_sparse(batch).to_dense().reshape(-1, sae.d_sae).double()
            y_RO = f_RF @ directions_FO
            x_RO = prepared.z.double() - offset_O
            power_F += f_RF.square().sum(dim=0)
            for site in (reference, other):
                y_RD, x_RD = y_RO[:, columns[site]], x_RO[:, columns[site]]
                own_F = (u_FD * directions_FO[:, columns[site]]).sum(dim=1) * f_RF.square().sum(dim=0)
                found[site, "error"] += (f_RF * ((x_RD - y_RD) @ u_FD.T)).sum(dim=0) + own_F
                found[site, "reconstruction"] += (f_RF * (y_RD @ u_FD.T)).sum(dim=0)
            seen += len(f_RF)
    finally:
        sae.train(was_training)
    if not seen:
        raise DataError("latent_scaling: there was no batch")
    betas = {key: torch.where(power_F > 0, value / (square_F * power_F), torch.nan) for key, value in found.items()}
    return LatentScaling(
        betas[reference, "error"],
        betas[reference, "reconstruction"],
        betas[other, "error"],
        betas[other, "reconstruction"],
    )
