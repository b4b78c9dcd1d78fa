"""Parts that architectures are composed of: initialisation, losses, the auxiliary loss of dead latents, units of latents."""

# R rows, D d_in, F d_sae, O d_out

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from sae_core.codes import Codes, SparseCodes
from sae_core.latent_ranks import count_over_ranks, current_ranks
from sae_core.ops.decode import decode
from sae_core.ops.encode import encode_entries
from sae_core.ops.own_rows import with_own_rows
from sae_core.ops.select import Selection, TopK

__all__ = [
    "DeadLatents",
    "auxiliary_loss",
    "init_decoder",
    "kaiming_rows",
    "squared_error",
    "times_norms",
    "with_dead",
    "without_norms",
]

_DRAWN_AT_ONCE = 2**20  # numbers
SomeCodes = TypeVar("SomeCodes", SparseCodes, Codes)


@torch.no_grad()
def kaiming_rows(weight: Tensor, generator: torch.Generator) -> None:
    """Fill with uniform values of variance 2 / fan_in, fan_in being the last dimension (He et al., 1502.01852).

    Rows are latents: where these are shared out over ranks, the rows get what one process would give them.
    """
    bound = (6.0 / weight.shape[-1]) ** 0.5
    ranks = current_ranks()
    here, total = (0, len(weight)) if ranks is None else (ranks.rank * len(weight), ranks.size * len(weight))
    at_once = max(1, _DRAWN_AT_ONCE // weight[:1].numel())
    for first in range(0, total, at_once):
        shape = (min(at_once, total - first), *weight.shape[1:])
        drawn = torch.rand(shape, generator=generator, dtype=torch.float64) * (2 * bound) - bound
        start, stop = max(first, here), min(first + len(drawn), here + len(weight))
        if start < stop:
            weight[start - here : stop - here].copy_(drawn[start - first : stop - first])


@torch.no_grad()
def init_decoder(W_dec: Tensor, norm: float | None, generator: torch.Generator) -> None:
    """Random decoder rows, scaled to `norm` unless it is None."""
    kaiming_rows(W_dec, generator)
    if norm is not None:
        W_dec.mul_(norm / W_dec.norm(dim=-1, keepdim=True))


def squared_error(y_RO: Tensor, target_RO: Tensor) -> Tensor:
    """Squared error summed over the width and averaged over rows."""
    return (y_RO - target_RO).square().sum(-1).mean()


class DeadLatents(NamedTuple):
    """The dead latents: their indices (n_dead,) and their part of the weights, (n_dead, d_in), (n_dead,), (n_dead, d_out).

    `total` counts them, with those that other ranks hold.
    """

    indices: Tensor
    encoder: Tensor
    b_enc: Tensor
    W_dec: Tensor
    total: int

    def where(self, mask: Tensor) -> DeadLatents:
        """Those for which `mask` (n_dead,) holds."""
        chosen = self.indices[mask]
        total = count_over_ranks(chosen.numel())
        return DeadLatents(chosen, self.encoder[mask], self.b_enc[mask], self.W_dec[mask], total)


def with_dead(
    encoder: Tensor, b_enc: Tensor, W_dec: Tensor, dead: Tensor | None, elsewhere: int = 0
) -> tuple[Tensor, Tensor, DeadLatents | None]:
    """`encoder` and `W_dec` for the main path of a step, and the dead latents for its auxiliary loss, if there are any.

    Gradients of the dead latents are added to those of the main path, which must use what is returned here. Other ranks hold
    `elsewhere` more.
    """
    if dead is None or dead.numel() + elsewhere == 0:
        return encoder, W_dec, None
    encoder, dead_enc = with_own_rows(encoder, dead)
    W_dec, dead_dec = with_own_rows(W_dec, dead)
    return encoder, W_dec, DeadLatents(dead, dead_enc, b_enc[dead], dead_dec, dead.numel() + elsewhere)


def auxiliary_loss(
    z_RD: Tensor,
    residual_RO: Tensor,
    dead: DeadLatents,
    *,
    centre_D: Tensor | None,
    k_aux: int,
    scale: Tensor | None = None,
    selection: Callable[[int, Tensor | None], Selection] = TopK,
) -> Tensor:
    """Aux-k (2406.04093, A.2): dead latents reconstruct what the living ones left over.

    Of the dead latents, the `k_aux` that `selection` ranks first (by ``pre * scale``) predict `residual_RO`, which is
    detached; no ReLU is applied, so that latents below zero learn too. Returns the squared error summed over the width and
    averaged over rows, times min(n_dead / k_aux, 1). Only rows of the dead latents are touched.
    """
    n_dead = dead.total
    chosen = selection(min(k_aux, n_dead), None if scale is None else scale[dead.indices])
    codes = encode_entries(z_RD, centre_D, dead.encoder, dead.b_enc, chosen)
    return min(n_dead / k_aux, 1.0) * squared_error(decode(codes, dead.W_dec), residual_RO.detach())


def times_norms(codes: SomeCodes, norms: Tensor | None) -> SomeCodes:
    """Latents as lengths of their contributions: times their decoder norm (d_sae,), or unchanged without norms."""
    return codes if norms is None else codes.with_values(codes.values * codes.per_latent(norms))


def without_norms(codes: SomeCodes, norms: Tensor | None) -> SomeCodes:
    """The inverse of `times_norms`; latents with a zero decoder row, which decode to nothing, stay as they are."""
    if norms is None:
        return codes
    return codes.with_values(codes.values / codes.per_latent(torch.where(norms > 0, norms, 1.0)))
