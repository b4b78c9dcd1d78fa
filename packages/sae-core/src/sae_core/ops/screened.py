"""The encoder product in two steps: bfloat16 proposes, a certificate decides.

Of a top-k of 16,384 latents 32 are kept, and to know that a latent is not among them its value is not needed: a bound is
enough. A product in bfloat16 is two to sixteen times as fast where the hardware multiplies it, and here it gives upper bounds
(`sae_core.ops.certificate`). What may be among the largest by its bound is recomputed in float32, the selection is made among
these values, and if the least that is kept is no less than every bound left out, the row is *certain*:

    whatever was left out is, computed in float32 by any order of summation, no larger than what was kept.

Rows of which that cannot be said, say because hundreds of latents are copies of each other, are computed in full. So every row
is selected by values of float32, all of one kind: those recomputed in certain rows, those of the full product in the others.
Beside a full product, only entries can change places whose difference is less than float32's own rounding. Among values that
are equal, any may be kept, as with `torch.topk`.
"""

# R rows, D d_in, F d_sae, E entries

from __future__ import annotations

from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

from sae_core.codes import LatentMajor
from sae_core.ops.bags import entry_dots
from sae_core.ops.certificate import COLUMNS, LOW, Latents, Rounding, Rows, rounded_up
from sae_core.ops.product import EncoderProduct, rows_of_a_block

__all__ = ["Screened"]

_ROOM = (
    3  # candidates beside which the largest bound left out is below the k-th value in all but a few rows of real data
)
_MORE = 32
_CROWD = 8  # rows with more candidates than this part of the latents are cheaper in full


@final
class Screened:
    """Upper bounds of the ranks ``(centred W^T + b) * scale - threshold`` of all entries, and the values of some.

    `centred` (rows, d_in), `W_FD` and `b_F` are float32; `scale` (d_sae,) is not negative, `threshold` a number or (d_sae,).
    """

    def __init__(
        self,
        centred: Tensor,
        W_FD: Tensor,
        b_F: Tensor,
        *,
        scale: Tensor | None = None,
        threshold: Tensor | float | None = None,
    ) -> None:
        centred = centred.to(W_FD.dtype)
        self.centred, self.W_FD, self.b_F = centred, W_FD, b_F
        self.rows, self.d_sae = centred.shape[0], W_FD.shape[0]
        self.rows_per_block = rows_of_a_block(self.rows, self.d_sae)
        self.dtype = LOW if centred.device.type == "cpu" else torch.float32  # in which products come
        d_in = centred.shape[1]
        self.rounding = Rounding.of(d_in, centred.device, self.dtype)
        self.latents = Latents.of(W_FD, b_F, scale, threshold, self.rounding)
        low = centred.new_zeros(self.rows, d_in + COLUMNS, dtype=LOW)
        low[:, :d_in] = centred
        found = Rows.of(centred, low[:, :d_in], self.latents)
        low[:, d_in], low[:, d_in + 1] = a, n = rounded_up(found.a), rounded_up(found.n)
        low[:, d_in + 2 : d_in + 4] = 1.0
        self._low = low
        self.certified = found._replace(a=a.float(), n=n.float())

    @property
    def device(self) -> torch.device:
        return self.centred.device

    def blocks(self) -> Iterator[Tensor]:
        """Upper bounds of all ranks, but for `rounding`, in blocks (R, d_sae); each overwrites the one before."""
        memory = self.centred.new_empty(self.rows_per_block, self.d_sae, dtype=self.dtype)
        for start in range(0, self.rows, self.rows_per_block):
            rows = slice(start, min(start + self.rows_per_block, self.rows))
            yield self.bounds(rows, memory[: rows.stop - start])

    def bounds(self, rows: slice, out: Tensor | None = None) -> Tensor:
        """(R, d_sae) those of some rows."""
        if self.dtype == LOW:
            return torch.mm(self._low[rows], self.latents.low.t(), out=out)
        return torch.mm(self._low[rows], self.latents.low.t(), out_dtype=self.dtype, out=out)

    def errors(self, rows: Tensor, latents: Tensor) -> Tensor:
        """(entries,) E: a rank is at most its bound, and at least its bound less twice this."""
        found, of = self.certified, self.latents
        return found.a[rows] * of.p[latents] + found.n[rows] * of.q[latents] + of.spread[latents]

    def row_errors(self) -> Tensor:
        """(rows,) the largest of `errors` in every row."""
        found, of = self.certified, self.latents
        return found.a * of.p.amax() + found.n * of.q.amax() + of.spread.amax()

    def values(self, rows: Tensor, latents: Tensor) -> Tensor:
        """(entries,) pre-activations in float32 of these entries."""
        return entry_dots(self.centred, self.W_FD, LatentMajor.of(rows, latents, self.d_sae)) + self.b_F[latents]

    @property
    def tiny(self) -> Tensor:
        """The largest of `Rows.tiny` in usable rows."""
        found = self.certified
        return torch.where(found.usable, found.tiny, 0.0).amax() if self.rows else found.tiny.new_zeros(())

    def below(self, rank: Tensor) -> Tensor:
        """A bound, as proposed: entries up to it have ranks of at most `rank`, a tensor without dimensions, in usable rows."""
        return (rank - 2.0**-6 * rank.abs() - 4 * self.tiny).to(self.dtype)

    @property
    def nothing(self) -> Tensor:
        """The bound up to which ranks are not positive."""
        return self.below(self.certified.tiny.new_zeros(()))

    def full(self, rows: Tensor | None = None) -> EncoderProduct:
        """The product in float32, of all rows or of those with these indices."""
        return EncoderProduct(self.centred if rows is None else self.centred[rows], self.W_FD, self.b_F)

    def candidates(self, k: int) -> int:
        """How many entries to look at of which k are wanted."""
        return min(self.d_sae, _ROOM * k + _MORE)

    @property
    def crowd(self) -> int:
        """Candidates of a row from which on it is computed in full."""
        return max(self.d_sae // _CROWD, _MORE)
