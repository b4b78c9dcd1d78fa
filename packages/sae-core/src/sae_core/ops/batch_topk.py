"""BatchTopK: of all (row, latent) pairs of a batch, the ``k * rows`` largest (Bussmann et al. 2024, arXiv 2412.06410).

The pairs compete across rows, yet the (rows, d_sae) matrix need not exist. Whatever threshold ``k * rows`` pairs seen so far
reach, the final one is no lower, so pairs below it are out. It is guessed low from the first few rows, raised whenever too
many candidates have gathered, and proved at the end: if at least ``k * rows`` candidates passed the guess, nothing that it
kept out belongs to the result. If not (the first rows were unlike the rest), all is done again without a guess.

Where several processes have some rows each, the batch is theirs together: every one finds candidates among its rows, and how
large the last one is that stays, and whether that proves the guesses, is asked of the whole batch.
"""

# R rows, F d_sae, E candidates, T the number of entries to keep

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sae_core.codes import SparseCodes
from sae_core.latent_ranks import LatentRanks
from sae_core.ops.certified import Proposed, proposed_above
from sae_core.ops.largest import above
from sae_core.ops.merging import best_of_batch
from sae_core.ops.product import EncoderProduct
from sae_core.ops.screened import Screened
from sae_core.ops.screening import count
from sae_core.ops.select import KeepsK
from sae_core.ops.whole_batch import whole_batch

__all__ = ["BatchTopK"]

_SAMPLE_ROWS = 32
_GUESS_ROOM = 2.0  # the guess lets through this many times what is wanted of the sample
_MAX_CANDIDATES = 4  # times what is wanted; more are cut back to what is wanted
_PIECE_ENTRIES = 2**20
_BOUNDS_GUESS_ROOM = 4.0  # bounds lie above ranks, so that more of them exceed the same number
_WIDE = 3  # of this many times what is wanted, the largest bounds stay when there are too many candidates


@final
@dataclass(frozen=True, slots=True, eq=False)
class BatchTopK(KeepsK):
    """The ``int(k * rows)`` largest positive entries of a batch, ranked by ``pre * scale`` when given.

    `scale` is (d_sae,) and not negative, say decoder norms. Entries that are not positive are never kept, so fewer remain
    when fewer are positive. Of equal values at the threshold the first, row by row, are kept.

    >>> pre = EncoderProduct(torch.eye(2), torch.tensor([[4.0, 3.0, 2.0], [1.0, -1.0, -2.0]]).T, torch.zeros(3))
    >>> BatchTopK(k=1)(pre).to_dense().tolist()
    [[4.0, 3.0, 0.0], [0.0, 0.0, 0.0]]
    """

    k: float
    scale: Tensor | None = None

    def __call__(self, product: EncoderProduct) -> SparseCodes:
        batch, total = whole_batch(), self._total(product.rows, product.d_sae)
        found, guessed = self._gather(product, total, guess=True)
        least = batch.kth_largest(found.rank, total)
        if not batch.ranks.everywhere((least > guessed) | (guessed <= 0)):
            found, _ = self._gather(product, total, guess=False)
            least = batch.kth_largest(found.rank, total)
        return found.in_batch(least, total, product.d_sae).codes(product.rows, product.d_sae)

    def screen(self, product: Screened) -> SparseCodes:
        """Entries whose bounds are above a guess are candidates. If the least value kept of them is above all other bounds,
        that is proved; if not, it says how low the guess must be.
        """
        batch, total = whole_batch(), self._total(product.rows, product.d_sae)
        if not total:
            return self(product.full())
        floor = torch.maximum(product.nothing, self._guessed_bound(product))
        proposed = proposed_above(product, floor, most=int(_WIDE * total))
        best, left, (entries, full) = self._best_of(product, proposed, total, all_of_them=False)
        least = batch.kth_largest(best.rank, total)
        if not batch.ranks.everywhere(least >= product.rounding.above(left) + product.tiny):
            proposed = proposed_above(product, torch.maximum(product.nothing, product.below(least)))
            best, _, (more, full) = self._best_of(product, proposed, total, all_of_them=True)
            entries += more
            least = batch.kth_largest(best.rank, total)
        count(product.rows, full, entries)
        return best.in_batch(least, total, product.d_sae).codes(product.rows, product.d_sae)

    def over_ranks(self, codes: SparseCodes, ranks: LatentRanks) -> SparseCodes:
        rank = codes.values if self.scale is None else codes.values * self.scale.to(codes.values.dtype)[codes.indices]
        batch, d_sae = whole_batch(), codes.d_sae * ranks.size
        position = batch.numbers(codes.row_ids()) * d_sae + ranks.rank * codes.d_sae + codes.indices
        choosing = ranks if batch.ranks.size == 1 else batch.ranks.world
        return best_of_batch(codes, rank, position, self._total(codes.rows, d_sae), choosing)

    def among(self, codes: SparseCodes) -> SparseCodes:
        """The same choice among entries that are known already."""
        position = codes.row_ids() * codes.d_sae + codes.indices
        rank = codes.values if self.scale is None else codes.values * self.scale[codes.indices]
        found, total = _Candidates(rank, codes.values, position), self._total(codes.rows, codes.d_sae)
        best = found.in_batch(whole_batch().kth_largest(rank, total), total, codes.d_sae)
        return best.codes(codes.rows, codes.d_sae)

    def _total(self, rows: int, d_sae: int) -> int:
        rows = whole_batch().count(rows)
        return min(int(self.k * rows), rows * d_sae)

    def _gather(self, product: EncoderProduct, total: int, *, guess: bool) -> tuple[_Candidates, Tensor]:
        """Candidates for the `total` largest entries, and the rank guessed: those with a larger one are all among them."""
        d_sae = product.d_sae
        scale = None if self.scale is None else self.scale.to(product.centred.dtype)
        floor, guessed, row = 0.0, 0.0, 0
        found: list[_Candidates] = [_Candidates.none(product.centred)]
        for block in product.blocks():
            if guess and row == 0:
                floor = guessed = self._guess(block[:_SAMPLE_ROWS], scale)
            for pre_RF in block.split(max(1, _PIECE_ENTRIES // d_sae)):
                position = above(pre_RF, _per_latent(floor, scale))
                value = pre_RF.reshape(-1)[position]
                rank = value if scale is None else value * scale[position % d_sae]
                found.append(_Candidates(rank, value, position + row * d_sae))
                row += pre_RF.shape[0]
                if sum(part.rank.numel() for part in found) > max(_MAX_CANDIDATES * total, _PIECE_ENTRIES):
                    found = [_Candidates.joined(found).best(total)]
                    if 0 < total == found[0].rank.numel():
                        floor = max(floor, float(found[0].rank.min()))
        candidates = _Candidates.joined(found)
        return candidates, candidates.rank.new_tensor(guessed)

    def _guess(self, pre_RF: Tensor, scale: Tensor | None) -> float:
        """A rank that ``_GUESS_ROOM`` times as many of these entries exceed as are wanted of as many rows, or zero."""
        wanted = int(self.k * pre_RF.shape[0] * _GUESS_ROOM) + 1
        if wanted >= pre_RF.numel():
            return 0.0
        rank_RF = pre_RF if scale is None else pre_RF * scale
        return max(0.0, float(_kth_largest(rank_RF.reshape(-1), wanted)))

    def _guessed_bound(self, product: Screened) -> Tensor:
        """The same for bounds, with more room; it need not be right."""
        bounds = product.bounds(slice(0, _SAMPLE_ROWS)).reshape(-1)
        wanted = int(self.k * min(_SAMPLE_ROWS, product.rows) * _BOUNDS_GUESS_ROOM) + 1
        return product.nothing if wanted >= bounds.numel() else _kth_largest(bounds, wanted)

    def _best_of(
        self, product: Screened, proposed: Proposed, total: int, *, all_of_them: bool
    ) -> tuple[_Candidates, Tensor, tuple[int, int]]:
        """The `total` best by their values, the largest bound left out, how many entries and rows were computed."""
        position, left = proposed.positions, proposed.floor
        row, latent = position.div(product.d_sae, rounding_mode="floor"), position % product.d_sae
        if not all_of_them:
            least = product.rounding.beneath(proposed.bounds) - 2 * product.errors(row, latent)
            needed = proposed.bounds >= product.below(whole_batch().kth_largest(least, total))
            if position.numel():
                left = torch.maximum(left, proposed.bounds.masked_fill(needed, -torch.inf).amax())
            position, row, latent = position[needed], row[needed], latent[needed]
        full = proposed.full | (torch.bincount(row, minlength=product.rows) > product.crowd)
        stays = ~full[row]
        position, row, latent = position[stays], row[stays], latent[stays]
        value = product.values(row, latent)
        rank = value if self.scale is None else value * self.scale.to(value.dtype)[latent]
        found = _Candidates(rank, value, position)
        rows = full.nonzero().squeeze(1)
        if len(rows):
            found = _Candidates.joined([found, self._best_of_rows(product, rows, total)]).in_order()
        return found.best(total), left, (len(value), len(rows))

    def _best_of_rows(self, product: Screened, rows: Tensor, total: int) -> _Candidates:
        """Of rows that are computed in full, all that may be among the `total` best."""
        full = product.full(rows)
        best = self._gather(full, total, guess=False)[0].best(total)
        row = best.position.div(product.d_sae, rounding_mode="floor")
        return _Candidates(best.rank, best.value, rows[row] * product.d_sae + best.position % product.d_sae)


@dataclass(frozen=True, slots=True, eq=False)
class _Candidates:
    """Entries (E,): what they are ranked by, their values, and where they are, ``row * d_sae + latent``, in order."""

    rank: Tensor
    value: Tensor
    position: Tensor

    @classmethod
    def none(cls, like: Tensor) -> _Candidates:
        return cls(like.new_zeros(0), like.new_zeros(0), torch.zeros(0, dtype=torch.long, device=like.device))

    @classmethod
    def joined(cls, parts: Sequence[_Candidates]) -> _Candidates:
        return cls(
            torch.cat([part.rank for part in parts]),
            torch.cat([part.value for part in parts]),
            torch.cat([part.position for part in parts]),
        )

    def in_order(self) -> _Candidates:
        order = self.position.argsort()
        return _Candidates(self.rank[order], self.value[order], self.position[order])

    def best(self, total: int) -> _Candidates:
        """The `total` largest that are positive; of those equal to the smallest, the first."""
        keep = self.rank > 0
        if self.rank.numel() > total:
            threshold = _kth_largest(self.rank, total) if total else self.rank.new_tensor(torch.inf)
            larger, equal = keep & (self.rank > threshold), keep & (self.rank == threshold)
            keep = larger | (equal & (equal.cumsum(0) <= total - larger.sum()))
        return self._those(keep)

    def in_batch(self, least: Tensor, total: int, d_sae: int) -> _Candidates:
        """Those among the `total` largest of the whole batch, of which the last is `least`; 0 where there are fewer."""
        batch = whole_batch()
        larger, equal = self.rank > least, (self.rank == least) & (self.rank > 0)
        above = larger.sum().reshape(1)
        batch.ranks.add([above])
        position = self.position
        if batch.ranks.size > 1:
            row = position.div(d_sae, rounding_mode="floor")
            position = batch.numbers(row) * d_sae + position % d_sae
        return self._those(larger | batch.first_of(equal, position, (total - above)[0]))

    def _those(self, keep: Tensor) -> _Candidates:
        chosen = keep.nonzero().squeeze(-1)
        return _Candidates(self.rank[chosen], self.value[chosen], self.position[chosen])

    def codes(self, rows: int, d_sae: int) -> SparseCodes:
        row = self.position.div(d_sae, rounding_mode="floor")
        return SparseCodes.of_rows(self.value, row, self.position - row * d_sae, d_sae, (rows,))


def _per_latent(floor: float, scale: Tensor | None) -> Tensor | float:
    """Pre-activations above this may have a rank above `floor`: a little less than floor / scale, for rounding's sake."""
    if scale is None:
        return floor
    lowest = torch.where(scale > 0, floor / scale, torch.inf)
    return lowest - 4 * torch.finfo(scale.dtype).eps * lowest if floor else lowest


def _kth_largest(rank: Tensor, k: int) -> Tensor:
    return torch.kthvalue(rank, rank.numel() - k + 1).values
