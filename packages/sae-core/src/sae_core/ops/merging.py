"""Selections over ranks: each has chosen among its own latents, and what all of them keep is decided from the ranks of those.

Rank by rank the k best of a row are among the k best of every rank's part of it, so k numbers a row from each rank say where
the last one that stays lies. They are exchanged, the entries themselves are not: every rank keeps its own. Of equal entries
the first latents stay, those of lower ranks before those of higher ones, so the choice is that of one process.
"""

# R rows, N ranks, K entries kept of a row, E entries, T entries kept of a batch

from __future__ import annotations

import torch
from torch import Tensor

from sae_core.codes import SparseCodes
from sae_core.latent_ranks import LatentRanks, gathered

__all__ = ["best_of_batch", "best_of_rows", "smallest_value"]


def best_of_rows(codes: SparseCodes, ordering: Tensor, k: int, ranks: LatentRanks) -> SparseCodes:
    """Of this rank's entries those among the `k` of every row that `ordering` (entries,) says are best on all ranks together.

    `codes` hold as many entries in every row, at least min(k, d_sae) of them, the best ones that this rank has.
    """
    assert codes.k is not None
    width, rows = codes.k, codes.rows
    index_RK, order = codes.indices.view(rows, width).sort(dim=1)
    value_RK = codes.values.view(rows, width).gather(1, order)
    rank_RK = ordering.detach().view(rows, width).gather(1, order)
    proposed_RK = torch.full((rows, k), -torch.inf, dtype=rank_RK.dtype, device=rank_RK.device)
    proposed_RK[:, :width] = rank_RK[:, :k]
    all_NRK = gathered(proposed_RK, ranks)
    flat_RM = all_NRK.transpose(0, 1).flatten(1)
    last_R1 = torch.topk(flat_RM, k, dim=1, sorted=False).values.amin(1, keepdim=True)
    better_R = (flat_RM > last_R1).sum(1)
    equal_NR = (all_NRK == last_R1).sum(-1)
    room_R1 = (k - better_R - equal_NR[: ranks.rank].sum(0)).unsqueeze(1)
    equal_RK = rank_RK == last_R1
    kept_RK = (rank_RK > last_R1) | rank_RK.isnan() | (equal_RK & (equal_RK.cumsum(1) <= room_R1))
    row_E, place_E = kept_RK.nonzero(as_tuple=True)
    return SparseCodes.of_rows(value_RK[row_E, place_E], row_E, index_RK[row_E, place_E], codes.d_sae, (rows,))


def best_of_batch(
    codes: SparseCodes, ordering: Tensor, position_E: Tensor, total: int, ranks: LatentRanks
) -> SparseCodes:
    """Of this rank's entries those among the `total` of the batch with the largest `ordering` (entries,) on all ranks together.

    `ordering` is positive, and `position_E` says where entries are in the batch: of equal ones the first stay. `codes` hold the
    `total` best that this rank has.
    """
    rank_E = ordering.detach()
    proposed_T = rank_E.new_zeros(total)
    proposed_T[: len(rank_E)] = rank_E
    all_NT = gathered(proposed_T, ranks)
    least = (
        torch.kthvalue(all_NT.flatten(), all_NT.numel() - total + 1).values if total else rank_E.new_tensor(torch.inf)
    )
    keep_E, equal_E = rank_E > least, rank_E == least
    room = total - (all_NT > least).sum()
    equal_N = (all_NT == least).sum(1)
    if not bool(least > 0) or not bool(equal_N.sum() > room):  # the same on every rank, as are the numbers
        keep_E |= equal_E
    else:
        tied = torch.full((int(equal_N.max()),), torch.iinfo(torch.long).max, device=position_E.device)
        mine = position_E[equal_E]
        tied[: len(mine)] = mine
        first = gathered(tied, ranks).flatten().sort().values[: int(room)]
        keep_E |= equal_E & torch.isin(position_E, first)
    chosen = keep_E.nonzero().squeeze(1)
    return SparseCodes.of_rows(
        codes.values[chosen], codes.row_ids()[chosen], codes.indices[chosen], codes.d_sae, codes.leading_shape
    )


def smallest_value(codes: SparseCodes, ranks: LatentRanks | None) -> Tensor:
    """The smallest value of all entries, on whichever rank, as a tensor without dimensions; infinity where there is none."""
    values = codes.values.detach()
    found = values.new_full((), torch.inf)
    if values.numel():
        found = torch.minimum(found, values.amin())
    return found if ranks is None else ranks.least(found)
