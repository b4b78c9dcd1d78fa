"""Selections of every row, from a screened product: candidates, their values, and which rows are certain.

All three work alike. Bounds are proposed; entries whose bounds are the largest are candidates; from these, less their errors,
follows how large the k-th value is at least, so that most candidates need not be computed. The choice is made among the
values that were, and checked against the largest bound of all others: that check is the proof, and how candidates were found
is no part of it.
"""

# R rows, F d_sae, K kept entries a row, M candidates a row, G groups, E entries

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sae_core.codes import SparseCodes
from sae_core.ops.largest import above, largest
from sae_core.ops.product import EncoderProduct
from sae_core.ops.screened import Screened
from sae_core.ops.screening import count

__all__ = ["Proposed", "above_threshold", "best_of_groups", "largest_of_rows", "proposed_above"]

_PIECE_BYTES = 2 * 2**20  # bounds are half as wide as values
_SPARE = 2**20  # candidates that may gather before they are cut
FullSelection = Callable[[EncoderProduct], SparseCodes]


def largest_of_rows(
    product: Screened, k: int, scale: Tensor | None, *, signed: bool, select: FullSelection
) -> SparseCodes:
    """The k entries of every row with the largest ranks ``pre * scale``, or ``|pre| * scale`` unless `signed`.

    `select` is the same selection from a full product, for rows that are uncertain. On a GPU one wait: for which rows are.
    """
    k = min(k, product.d_sae)
    wanted = product.candidates(k)
    error_R = None if signed else product.row_errors() * (2 * (1 + 2.0**-5))
    bounds: list[Tensor] = []
    indices: list[Tensor] = []
    for bound_RF, start in _pieces(product):
        if error_R is not None:  # the absolute value is at most the larger of both
            error = error_R[start : start + len(bound_RF), None].to(bound_RF.dtype)
            bound_RF = torch.maximum(bound_RF, error - bound_RF)
        bound_RM, index_RM = largest(bound_RF, min(wanted + 1, product.d_sae))
        bounds.append(bound_RM)
        indices.append(index_RM)
    if not bounds:
        return select(product.full())
    index_RM = torch.cat(indices)
    times, bound_RM = 1 if signed else 3, torch.cat(bounds)
    above_RM = product.rounding.above(bound_RM, times)
    all_are = index_RM.shape[1] == product.d_sae
    left_R = torch.full_like(above_RM[:, 0], -torch.inf) if all_are else above_RM.amin(1)
    row_RM = torch.arange(product.rows, device=product.device).unsqueeze(1).expand_as(index_RM)
    twice_RM = 2 * product.errors(row_RM, index_RM) if error_R is None else error_R[:, None]
    least_RM = product.rounding.beneath(bound_RM, times) - twice_RM
    floor_R1 = torch.topk(least_RM, k, dim=1, sorted=False).values.amin(1, keepdim=True)
    needed_RM = above_RM >= floor_R1
    value_RM, candidates = _values(product, index_RM, needed_RM)
    rank_RM = value_RM if signed else value_RM.abs()
    if scale is not None:
        rank_RM = rank_RM * scale.to(rank_RM.dtype)[index_RM]
    if product.device.type == "cpu":  # where those not needed were not computed
        left_R = torch.maximum(left_R, above_RM.masked_fill(needed_RM, -torch.inf).amax(1))
        rank_RM = rank_RM.masked_fill(~needed_RM, -torch.inf)
    best_RK = torch.topk(rank_RM, k, dim=1, sorted=False)
    certain_R = product.certified.usable & (best_RK.values.amin(1) >= left_R + product.certified.tiny)
    value_RK, index_RK = value_RM.gather(1, best_RK.indices), index_RM.gather(1, best_RK.indices)
    return _settled(product, value_RK, index_RK, certain_R, candidates, select)


def best_of_groups(product: Screened, groups: int, scale: Tensor | None, *, select: FullSelection) -> SparseCodes:
    """The entry of every group of neighbouring latents with the largest rank ``pre * scale``; otherwise as above."""
    width = product.d_sae // groups
    wanted = product.candidates(groups)
    distances: list[Tensor] = []
    indices: list[Tensor] = []
    tops: list[Tensor] = []
    for bound_RF, _ in _pieces(product):
        grouped = bound_RF.unflatten(1, (groups, width))
        top_RG = grouped.amax(2)
        distance_RM, index_RM = largest((grouped - top_RG.unsqueeze(2)).flatten(1), min(wanted + 1, product.d_sae))
        distances.append(distance_RM)
        indices.append(index_RM)
        tops.append(top_RG)
    if not indices:
        return select(product.full())
    index_RM, top_RG = torch.cat(indices), torch.cat(tops).float()
    farthest_R1 = product.rounding.above(torch.cat(distances)).amin(
        1, keepdim=True
    )  # no farther from the top is left out
    left_RG = product.rounding.above(top_RG + farthest_R1)
    if index_RM.shape[1] == product.d_sae:
        left_RG = torch.full_like(top_RG, -torch.inf)
    value_RM, candidates = _values(product, index_RM, None)
    rank_RM = value_RM if scale is None else value_RM * scale.to(value_RM.dtype)[index_RM]
    group_RM = index_RM // width
    best_RG = torch.full_like(top_RG, -torch.inf).scatter_reduce(1, group_RM, rank_RM, "amax")
    position_RM = torch.arange(index_RM.shape[1], device=product.device).expand_as(index_RM)
    is_best_RM = rank_RM == best_RG.gather(1, group_RM)
    first_RG = torch.full_like(top_RG, index_RM.shape[1] - 1, dtype=torch.long).scatter_reduce(
        1, group_RM, torch.where(is_best_RM, position_RM, index_RM.shape[1] - 1), "amin"
    )
    left_RG = left_RG + product.certified.tiny.unsqueeze(1)
    found_RG = best_RG.isfinite() & (best_RG >= left_RG)
    certain_R = product.certified.usable & found_RG.all(1) & ~rank_RM.isnan().any(1)
    return _settled(product, value_RM.gather(1, first_RG), index_RM.gather(1, first_RG), certain_R, candidates, select)


def above_threshold(
    product: Screened, *, keep: Callable[[Tensor, Tensor], Tensor], select: FullSelection
) -> SparseCodes:
    """All entries above the product's threshold; `keep` says of values and latents which of them are."""
    proposed = proposed_above(product, product.nothing)
    row_E = proposed.positions.div(product.d_sae, rounding_mode="floor")
    latent_E = proposed.positions % product.d_sae
    value_E = product.values(row_E, latent_E)
    kept = keep(value_E, latent_E).nonzero().squeeze(1)
    codes = SparseCodes.of_rows(value_E[kept], row_E[kept], latent_E[kept], product.d_sae, (product.rows,))
    rows = proposed.full.nonzero().squeeze(1)
    count(product.rows, len(rows), len(value_E))
    return _merged(codes, select(product.full(rows)), rows) if len(rows) else codes


class Proposed(NamedTuple):
    """Entries whose bounds are above `floor`: their `positions` ``row * d_sae + latent`` in order, and their `bounds`.

    `full` (rows,) says which rows have none here and are to be computed in full.
    """

    positions: Tensor
    bounds: Tensor
    full: Tensor
    floor: Tensor


def proposed_above(product: Screened, floor: Tensor, most: int | None = None) -> Proposed:
    """Entries with bounds above `floor`, of about the type that bounds have; with `most`, the floor rises when there are more.

    Rows without a certificate are to be computed in full, as are, without `most`, those with so many candidates that it is
    cheaper.
    """
    positions: list[Tensor] = [torch.zeros(0, dtype=torch.long, device=product.device)]
    bounds: list[Tensor] = [torch.zeros(0, dtype=product.dtype, device=product.device)]
    full_R = ~product.certified.usable
    for bound_RF, start in _pieces(product):
        rows = len(bound_RF)
        position_E = above(bound_RF, floor)
        row_E = position_E.div(product.d_sae, rounding_mode="floor")
        if most is None:
            full_R[start : start + rows] |= torch.bincount(row_E, minlength=rows) > product.crowd
        position_E = position_E[~full_R[start : start + rows][row_E]]
        bounds.append(bound_RF.reshape(-1)[position_E])
        positions.append(position_E + start * product.d_sae)
        if most is not None and sum(map(len, bounds)) > most + _SPARE:
            position_E, bound_E = torch.cat(positions), torch.cat(bounds)
            floor = torch.maximum(floor, torch.kthvalue(bound_E, max(len(bound_E) - most, 1)).values)
            stays = bound_E > floor
            positions, bounds = [position_E[stays]], [bound_E[stays]]
    return Proposed(torch.cat(positions), torch.cat(bounds), full_R, floor)


def _merged(codes: SparseCodes, other: SparseCodes, rows: Tensor) -> SparseCodes:
    """`codes`, with the rows of `other` in the places of those with these numbers, of which `codes` has no entries."""
    row_E = torch.cat([codes.row_ids(), rows[other.row_ids()]])
    order = torch.sort(row_E, stable=True).indices
    values, indices = torch.cat([codes.values, other.values]), torch.cat([codes.indices, other.indices])
    return SparseCodes.of_rows(values[order], row_E[order], indices[order], codes.d_sae, (codes.rows,))


def _pieces(product: Screened) -> Iterator[tuple[Tensor, int]]:
    """Bounds in pieces of rows that stay in a processor's cache, and the number of the first row of each."""
    rows = product.rows_per_block
    if product.device.type == "cpu":
        rows = min(rows, max(1, _PIECE_BYTES // (2 * product.d_sae)))
    start = 0
    for block in product.blocks():
        for piece in block.split(rows):
            yield piece, start
            start += len(piece)


def _values(product: Screened, index_RM: Tensor, needed_RM: Tensor | None) -> tuple[Tensor, int | Tensor]:
    """Values of candidates, on a processor of those needed only, and how many were computed.

    On a GPU how many are needed would have to be read back, and all are computed.
    """
    row_RM = torch.arange(product.rows, device=product.device).unsqueeze(1).expand_as(index_RM)
    if needed_RM is None or product.device.type != "cpu":
        return product.values(row_RM.flatten(), index_RM.flatten()).view_as(index_RM), index_RM.numel()
    value_RM = torch.zeros(index_RM.shape, dtype=product.W_FD.dtype)
    row_E, candidate_E = needed_RM.nonzero(as_tuple=True)
    value_RM[row_E, candidate_E] = product.values(row_E, index_RM[row_E, candidate_E])
    return value_RM, len(row_E)


def _settled(
    product: Screened,
    value_RK: Tensor,
    index_RK: Tensor,
    certain_R: Tensor,
    candidates: int | Tensor,
    select: FullSelection,
) -> SparseCodes:
    """Codes with k entries a row; of rows that are not certain, those that `select` chooses."""
    rows = (~certain_R).nonzero().squeeze(1)  # waits for a GPU: how many rows there are decides what is computed
    count(product.rows, len(rows), candidates)
    if len(rows):
        exact = select(product.full(rows))
        value_RK[rows] = exact.values.view(len(rows), -1)
        index_RK[rows] = exact.indices.view(len(rows), -1)
    return SparseCodes.regular(value_RK, index_RK, product.d_sae)
