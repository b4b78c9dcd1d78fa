"""Fewer false alarms from the same dictionary: leave-one-out pruning of codes, at inference, for any SAE that is loaded.

An encoder is one matrix product and a threshold, so latents fire that explain next to nothing of a row: their directions are
not orthogonal to those of latents that are there, or the sparsity asked for so many. What each is good for can be asked of the
row itself. With the residual r = z - y(f) and the directions d_j, the error without latent j would be |r + f_j d_j|^2, that is

    g_j = 2 f_j (r . d_j) + f_j^2 |d_j|^2

more than it is. The latent of the least g_j is dropped if that is small or negative, the residual takes in its part, and so on:
one at a time, for two latents that resemble each other may both seem useless while both are there.

This works in the space the decoder writes to, and on dictionaries that reconstruct their input: of a transcoder's target
nothing is known at inference.
"""

# R rows, E entries, F latents, O d_out

from __future__ import annotations

from collections.abc import Iterator

import torch
from sae_core import SAE, SparseCodes
from sae_core.config import require
from sae_core.errors import ConfigError, ShapeError
from torch import Tensor

__all__ = ["prune_codes"]

_ENTRIES_AT_ONCE = 1 << 14


@torch.no_grad()
def prune_codes(sae: SAE, x: Tensor, codes: SparseCodes | None = None, *, least: float = 0.1) -> SparseCodes:
    """Codes (..., d_sae) of `x` (..., d_in) without the entries that explain little; values that stay are not changed.

    Entries of a row go, the least useful first, until every g_j is at least `least` times the mean of |f_i d_i|^2 over the
    entries that were active. `codes` None are what the encoder finds. Raises ConfigError unless `least` is in (0, 1], and for
    transcoders; ShapeError for codes of other rows or latents.

    >>> from sae_core import create
    >>> sae = create("topk", d_in=2, d_sae=3, k=2, apply_b_dec_to_input=False)
    >>> _ = sae.W_dec.data.copy_(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]))
    >>> _ = sae.encoder.data.copy_(sae.W_dec.data)
    >>> x = torch.tensor([[1.0, 0.0]])  # the first latent alone; the second fires because it resembles it
    >>> sae.encode_sparse(x).indices.tolist(), prune_codes(sae, x).indices.tolist()
    ([0, 1], [0])
    """
    require(0 < least <= 1, f"prune_codes: least must be in (0, 1], not {least}")
    if not sae.reconstructs_input:
        raise ConfigError(
            "prune_codes: a transcoder's target is not known at inference, so nothing tells what a latent explains"
        )
    prepared = sae.prepare(x)
    found = sae.encode_sparse(x) if codes is None else codes
    if found.leading_shape != prepared.leading_shape or found.d_sae != sae.d_sae:
        raise ShapeError(
            f"prune_codes: codes {found.shape} are not ({', '.join(map(str, prepared.leading_shape))}, {sae.d_sae})"
        )
    flat = found.reshape(found.rows)
    residual_RO = prepared.z - sae.decode_rows(flat, prepared)
    rows_E, kept_E = flat.row_ids(), flat.values != 0
    power_E = torch.cat(
        [part.square().sum(dim=1) for _, part in _parts(sae, flat, torch.arange(len(rows_E), device=flat.device))]
    )
    wanted_R = least * power_E.new_zeros(flat.rows).index_add(0, rows_E, power_E) / flat.l0().clamp_min(1)
    open_R = torch.ones(flat.rows, dtype=torch.bool, device=flat.device)
    while True:
        entries = (kept_E & open_R[rows_E]).nonzero().squeeze(1)
        rows = rows_E[entries]
        along = [(residual_RO[rows_E[some]] * part).sum(dim=1) for some, part in _parts(sae, flat, entries)]
        gain = 2 * torch.cat(along) + power_E[entries]
        least_R = wanted_R.scatter_reduce(0, rows, gain, "amin")  # at most what is wanted
        going = (gain < wanted_R[rows]) & (gain == least_R[rows])
        entries, rows = entries[going], rows[going]
        open_R = torch.zeros_like(open_R).index_fill(0, rows, True)
        if not len(rows):
            break
        first_R = torch.full_like(wanted_R, len(rows_E), dtype=torch.long).scatter_reduce(0, rows, entries, "amin")
        entries = entries[entries == first_R[rows]]  # of equals one only
        kept_E[entries] = False
        for some, part in _parts(sae, flat, entries):
            residual_RO.index_add_(0, rows_E[some], part)
    offsets = torch.zeros(flat.rows + 1, dtype=torch.long, device=flat.device)
    offsets[1:] = torch.bincount(rows_E[kept_E], minlength=flat.rows).cumsum(0)
    return SparseCodes(flat.values[kept_E], flat.indices[kept_E], found.leading_shape, found.d_sae, offsets=offsets)


def _parts(sae: SAE, codes: SparseCodes, entries: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some entries at a time, and (n, O) what each adds to the reconstruction: f_j d_j, in whatever units latents are."""
    offset = sae.offset()
    for some in entries.split(_ENTRIES_AT_ONCE):
        alone = SparseCodes.regular(codes.values[some, None], codes.indices[some, None], codes.d_sae)
        yield some, sae.decode_rows(alone, None) - offset
