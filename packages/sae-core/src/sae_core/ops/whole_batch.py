"""What belongs to a whole batch, where several processes have some of its rows each.

Most objectives are means over rows, and their gradients add up. A few things are not: a selection over the batch, its
smallest latent, a ratio of means. They ask here, and get the answer for the whole batch; a process alone has all of it.

The k-th largest number of all ranks is found without sending the numbers. Positive floating point numbers are ordered as
their bits are, so their bits are found eleven at a time from the top: each rank counts which ones occur next behind those
found so far, and the counts are added up.
"""

# E entries of this rank

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from sae_core.parallel.ranks import ALONE, Ranks

__all__ = ["ALL_HERE", "WholeBatch", "divided", "mean_over_batch", "smallest_in_batch", "whole_batch"]

_BITS: Final = 11


@final
@dataclass(frozen=True, slots=True)
class WholeBatch:
    """The batch of which this rank has every `ranks.size`-th item; an item is `together` rows, the positions of a sequence.

    `rows` are those of all ranks; None where this process has them all, however many there are.
    """

    ranks: Ranks = ALONE
    rows: int | None = None
    together: int = 1

    def count(self, rows: int) -> int:
        """Rows of the whole batch, of which `rows` are here."""
        return rows if self.rows is None else self.rows

    def typical(self, rows: int) -> int:
        """A number of rows that is the same on every rank, near to `rows`, those that are here."""
        return rows if self.rows is None else -(-self.rows // self.ranks.size)

    def numbers(self, row_E: Tensor) -> Tensor:
        """(E,) numbers in the whole batch of rows (E,) of this rank."""
        if self.ranks.size == 1:
            return row_E
        item_E = row_E.div(self.together, rounding_mode="floor")
        return (item_E * self.ranks.size + self.ranks.rank) * self.together + row_E % self.together

    def all_rows(self, x_R: Tensor) -> Tensor:
        """(rows, ...) of the whole batch, from what every rank has of its rows."""
        if self.ranks.size == 1:
            return x_R
        items = x_R.unflatten(0, (-1, self.together))
        return self.ranks.whole(items, self.count(len(x_R)) // self.together).flatten(0, 1)

    def chosen(self, x_R: Tensor, row_N: Tensor) -> Tensor:
        """(n, ...) those of the whole batch with these row numbers (n,)."""
        if self.ranks.size == 1:
            return x_R[row_N]
        item_N = row_N.div(self.together, rounding_mode="floor")
        mine_N = item_N % self.ranks.size == self.ranks.rank
        local_N = item_N.div(self.ranks.size, rounding_mode="floor") * self.together + row_N % self.together
        found = x_R.new_zeros(len(row_N), *x_R.shape[1:])
        found[mine_N] = x_R[local_N[mine_N]]
        self.ranks.add([found])
        return found

    def kth_largest(self, value_E: Tensor, k: int) -> Tensor:
        """The k-th largest of the positive values of all ranks; 0 where there are fewer, infinity for k = 0."""
        if not k:
            return value_E.new_tensor(torch.inf)
        if self.ranks.size == 1:
            if value_E.numel() < k:
                return value_E.new_zeros(())
            return torch.kthvalue(value_E, value_E.numel() - k + 1).values.clamp_min(0)
        wide = value_E.dtype == torch.float64
        bits_E = value_E.to(torch.float64 if wide else torch.float32).view(torch.int64 if wide else torch.int32)
        bits_E = bits_E[value_E > 0]
        found, left, low = 0, k, 63 if wide else 31
        while low:
            width = min(_BITS, low)
            low -= width
            next_E = (bits_E >> low).sub_(found << width)
            count = torch.bincount(next_E, minlength=2**width)
            self.ranks.add([count])
            above = count.flip(0).cumsum(0).flip(0).tolist()  # how many have these bits or larger ones
            if not found and above[0] < left:
                return value_E.new_zeros(())
            digit = sum(number >= left for number in above) - 1
            left -= above[digit + 1] if digit + 1 < 2**width else 0
            found = found << width | digit
            bits_E = bits_E[next_E == digit]
        whole = torch.tensor(found, dtype=torch.int64 if wide else torch.int32)
        return whole.view(torch.float64 if wide else torch.float32).to(value_E)

    def first_of(self, holds_E: Tensor, position_E: Tensor, wanted: Tensor | int) -> Tensor:
        """(E,) which of the entries for which `holds_E` are the `wanted` first of all ranks by their positions (E,)."""
        if self.ranks.size == 1:
            return holds_E & (holds_E.cumsum(0) <= wanted)
        places = self.ranks.concatenated(position_E[holds_E]).sort().values
        wanted = int(wanted)
        if wanted >= len(places):
            return holds_E
        return holds_E & (position_E < places[wanted])


ALL_HERE: Final = WholeBatch()
"""A batch that this process has whole."""

_current: ContextVar[WholeBatch] = ContextVar("whole batch", default=ALL_HERE)


def whole_batch() -> WholeBatch:
    """What batch the rows at hand belong to; to be asked for in the forward pass."""
    return _current.get()


@contextmanager
def divided(batch: WholeBatch) -> Generator[None]:
    """Within the block, rows are those of this rank of `batch`."""
    token = _current.set(batch)
    try:
        yield
    finally:
        _current.reset(token)


def mean_over_batch(x_R: Tensor) -> Tensor:
    """The mean (without gradient) of a number of every row, over all rows of the batch.

    >>> mean_over_batch(torch.tensor([1.0, 3.0]))
    tensor(2.)
    """
    batch = _current.get()
    if batch.ranks.size == 1:
        return x_R.detach().mean()
    total = x_R.detach().sum(0, keepdim=True)
    batch.ranks.add([total])
    return total[0] / batch.count(len(x_R))


def smallest_in_batch(x: Tensor) -> Tensor:
    """`x` (...,) without gradient, or for each number the smallest of all ranks of the batch.

    >>> smallest_in_batch(torch.tensor(2.0))
    tensor(2.)
    """
    ranks = _current.get().ranks
    return x if ranks.size == 1 else ranks.least(x.detach().clone())
