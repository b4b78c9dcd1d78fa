"""What a dictionary of several sites says about each of them: crosscoders across layers or models, and what they write.

The norm of a latent's decoder at a site tells how much it writes there, so that a latent of a crosscoder between two models
with all its norm on one side seems to belong to that model alone. Often it does not: a sparsity penalty shrinks a small norm
to zero, or splits one concept into a latent for each model. Latent scaling (Minder et al. 2025, arXiv 2504.02922) asks the
activations instead. Take the latent f_j and its direction d_j at its own site, and find for every site the factor beta by
which they explain best what is left over there, or what the other latents already explain:

    beta = argmin sum over rows |beta f_j d_j - t|^2 = sum f_j (d_j . t) / sum f_j^2 |d_j|^2

with t the error (target less reconstruction, without the latent's own part in it) or the reconstruction less its bias. The
ratio nu of the betas of another site and of its own is near zero for a latent that is truly exclusive. With errors it is large
for latents whose norm was shrunk away, with reconstructions for latents that are one half of a split concept.

Everything is in the space that the decoder writes to: that of normalised activations, if the dictionary normalises.
"""

# R rows, N chosen latents, F d_sae, S sites, O width of all sites, W width of one

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from sae_core.codes import SparseCodes
from sae_core.config import distinct_numbers
from sae_core.errors import ConfigError, DataError, ShapeError, did_you_mean
from sae_core.protocols import ActivationBatch
from sae_core.sites import Sites

if TYPE_CHECKING:
    from sae_core.sae import SAE

__all__ = [
    "LatentScaling",
    "cosine_between",
    "decoder_site_norms",
    "latent_scaling",
    "least_squares_beta",
    "relative_norms",
]


def decoder_site_norms(directions_FO: Tensor, sites: Mapping[str, int]) -> dict[str, Tensor]:
    """Norms (d_sae,) of what every latent writes to each site; `sites` are widths, as ``sae.writes``.

    >>> norms = decoder_site_norms(torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]]), {"base": 2, "chat": 1})
    >>> norms["base"].tolist(), norms["chat"].tolist()
    ([5.0, 0.0], [0.0, 2.0])
    """
    norms_SF = _sites(directions_FO, sites).per_site_norms(directions_FO)
    return dict(zip(sites, norms_SF, strict=True))


def relative_norms(directions_FO: Tensor, sites: Mapping[str, int]) -> dict[str, Tensor]:
    """Norm of every latent at each site over its norms at all of them, (d_sae,) in [0, 1]; NaN for latents that write nothing.

    Between two models, 0.5 is a latent of both and 0 or 1 one of a single model, as far as norms can tell.

    >>> relative_norms(torch.tensor([[3.0, 4.0, 15.0]]), {"base": 2, "chat": 1})["chat"].item()
    0.75
    """
    norms = decoder_site_norms(directions_FO, sites)
    total_F = torch.stack(list(norms.values())).sum(0)
    return {site: norm_F / total_F for site, norm_F in norms.items()}


def cosine_between(directions_FO: Tensor, sites: Mapping[str, int], one: str, other: str) -> Tensor:
    """(d_sae,) cosine of a latent's directions at two sites of one width; NaN where it writes nothing to either.

    Raises ConfigError for a site that there is not, ShapeError for two of different widths.

    >>> W = torch.tensor([[1.0, 0.0, 2.0, 0.0], [1.0, 0.0, 0.0, 3.0]])
    >>> cosine_between(W, {"base": 2, "chat": 2}, "base", "chat").tolist()
    [1.0, 0.0]
    """
    slices = _sites(directions_FO, sites).slices()
    a_FW, b_FW = (directions_FO[:, slices[_known(name, sites)]] for name in (one, other))
    if a_FW.shape != b_FW.shape:
        raise ShapeError(
            f"sites {one!r} and {other!r} are {a_FW.shape[1]} and {b_FW.shape[1]} wide; no cosine between them"
        )
    return (a_FW * b_FW).sum(-1) / (a_FW.norm(dim=-1) * b_FW.norm(dim=-1))


def least_squares_beta(latents_RN: Tensor, directions_NW: Tensor, targets_RNW: Tensor) -> Tensor:
    """(latents,) the factor by which each latent times its direction explains its target best; NaN for latents never active.

    `targets_RNW` is (rows, latents, width), or (rows, 1, width) for one target of all.

    >>> f, d = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 0.0]])
    >>> least_squares_beta(f, d, torch.tensor([[[0.5, 9.0]], [[1.0, 9.0]]])).tolist()
    [0.5]
    """
    along_RN = (targets_RNW * directions_NW).sum(-1)
    return (latents_RN * along_RN).sum(0) / (latents_RN.square().sum(0) * directions_NW.square().sum(-1))


@final
@dataclass(frozen=True, slots=True, eq=False)
class LatentScaling:
    """Betas (latents,) of each site, by name, for `latents`, whose own site is `own`; NaN for latents that never fired.

    `error` explains the error without the latent's own part in the reconstruction, `reconstruction` what latents reconstruct.
    """

    latents: Tensor
    own: str
    error: Mapping[str, Tensor]
    reconstruction: Mapping[str, Tensor]

    def error_ratio(self, other: str) -> Tensor:
        """(latents,) nu of errors: near 1, what it finds is at `other` too and was left out there; near 0, it is not there."""
        return self.error[_known(other, self.error)] / self.error[self.own]

    def reconstruction_ratio(self, other: str) -> Tensor:
        """(latents,) nu of reconstructions: large where other latents at `other` explain the same; near 0 where none do."""
        return self.reconstruction[_known(other, self.reconstruction)] / self.reconstruction[self.own]


@torch.no_grad()
def latent_scaling(
    sae: SAE, batches: Iterable[Tensor | ActivationBatch], latents: Sequence[int] | None = None, *, own: str
) -> LatentScaling:
    """Latent scaling of some latents (None: of all) over batches of activations, in one pass that keeps no rows.

    `own` is the site at which the latents' directions are taken, the one that they seem to be exclusive to; sites must all
    have its width. Raises ConfigError for a site that the dictionary does not write, for sites of other widths, and for
    normalisations of each row, under which a latent has no one direction, and for latents that there are not; DataError
    without a batch.

    >>> from sae_core import create
    >>> sae = create("standard", d_in=4, d_sae=2, reads={"base": 2, "chat": 2}, apply_b_dec_to_input=False)
    >>> _ = sae.W_dec.data.copy_(torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]))
    >>> _ = sae.encoder.data.copy_(sae.W_dec.data)
    >>> x = torch.tensor([[0.9, 0.0, 1.0, 2.0]])  # both look exclusive to chat, but the first one's direction is in base too
    >>> found = latent_scaling(sae, [x], [0, 1], own="chat")
    >>> found.error_ratio("base")
    tensor([0.9000, 0.0000], dtype=torch.float64)
    """
    sites = Sites(sae.writes)
    slices = sites.slices()
    _known(own, slices)
    if others := {name: width for name, width in sites.widths.items() if width != sites.widths[own]}:
        raise ConfigError(
            f"latent scaling compares sites of one width; {own!r} is {sites.widths[own]} wide, but {others}"
        )
    if sae.normalization.per_row:
        raise ConfigError(
            f"latent scaling needs one direction for a latent; with {sae.config.normalize_activations} it differs by row"
        )
    chosen = torch.as_tensor(_numbers(latents, sae.d_sae), device=sae.device)
    rows_NO = _unit_latents(sae, chosen).double()
    own_NW = rows_NO[:, slices[own]]
    power_N = torch.zeros(len(chosen), dtype=torch.float64, device=sae.device)
    along = {kind: {name: torch.zeros_like(power_N) for name in slices} for kind in ("error", "reconstruction")}
    bias_O = sae.offset().double()
    was_training, seen = sae.training, 0
    sae.eval()
    try:
        for batch in batches:
            inputs, targets = (batch.inputs, batch.targets) if isinstance(batch, ActivationBatch) else (batch, None)
            prepared = sae.prepare(inputs)
            codes = sae.encode_rows(prepared)
            y_RO = sae.decode_rows(codes, prepared).double()
            error_RO = sae.target_rows(prepared, targets).double() - y_RO
            explained_RO = y_RO - bias_O
            f_RN = codes.to_dense().reshape(-1, sae.d_sae)[:, chosen].double()
            squares_N = f_RN.square().sum(0)
            power_N += squares_N * own_NW.square().sum(-1)
            for name, part in slices.items():
                own_part_N = squares_N * (own_NW * rows_NO[:, part]).sum(-1)  # leaving it out adds this to the error
                along["error"][name] += (f_RN * (error_RO[:, part] @ own_NW.t())).sum(0) + own_part_N
                along["reconstruction"][name] += (f_RN * (explained_RO[:, part] @ own_NW.t())).sum(0)
            seen += len(y_RO)
    finally:
        sae.train(was_training)
    if not seen:
        raise DataError("latent scaling: there was no batch")
    betas = {kind: {name: sums_N / power_N for name, sums_N in found.items()} for kind, found in along.items()}
    return LatentScaling(chosen, own, betas["error"], betas["reconstruction"])


def _numbers(latents: Sequence[int] | None, d_sae: int) -> list[int]:
    if latents is None:
        return list(range(d_sae))
    found = distinct_numbers(latents, "latents")
    if max(found) >= d_sae:
        raise ConfigError(f"latents must lie in [0, d_sae = {d_sae}), not {max(found)}")
    return found


def _unit_latents(sae: SAE, latents_N: Tensor) -> Tensor:
    """(n, d_out) what one unit of each latent adds to the output: its decoder row, in units of the latents as reported."""
    ones = torch.ones(len(latents_N), 1, dtype=sae.dtype, device=sae.device)
    return sae.decode_rows(SparseCodes.regular(ones, latents_N.unsqueeze(-1), sae.d_sae), None) - sae.offset()


def _sites(directions_FO: Tensor, sites: Mapping[str, int]) -> Sites:
    found = Sites(sites)
    if directions_FO.dim() != 2 or directions_FO.shape[1] != found.total:
        raise ShapeError(
            f"directions {tuple(directions_FO.shape)} are not (d_sae, {found.total}), as sites {dict(sites)} ask"
        )
    return found


def _known(name: str, sites: Iterable[str]) -> str:
    known = list(sites)
    if name not in known:
        raise ConfigError(f"there is no site {name!r}{did_you_mean(name, known)} (known: {', '.join(known)})")
    return name
