"""The latents of a batch: `SparseCodes`, the active ones only, and `DenseCodes` for when most are active.

Between encode and decode flows one object that lists (row, latent, value) triples ordered by row: values and latent
indices laid end to end, plus where each row starts. When every row has the same number k of entries, as after a top-k,
the starts are implied. Work and memory then follow the number of active latents, not the width of the dictionary.

Early in training a ReLU dictionary is half active, and listing entries costs more than it saves. `DenseCodes` answers the
same few questions for that case, so that an objective is written once for both: `per_latent` lines a (d_sae,) parameter up
with the values, `row_sums` adds values over each row.

Where latents are shared out over ranks (`sae_core.latent_ranks`) codes hold those of this rank, and what is asked of a row,
sums and `l0`, is that of all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, final

import torch
from torch import Tensor

from sae_core.errors import ShapeError
from sae_core.latent_ranks import summed_over_ranks

__all__ = ["Codes", "DenseCodes", "LatentMajor", "SparseCodes"]

_COUNTED_IN_FLOAT = 2**24  # up to here float32 holds every whole number


class LatentMajor(NamedTuple):
    """The same entries ordered by latent: the transposed bags that gradients need.

    `order` (entries,) permutes row-major entries into latent-major ones, `rows` and `latents` (entries,) are the row and
    the latent of each, `offsets` (d_sae + 1,) is where each latent's run begins, with the number of entries at the end.
    """

    order: Tensor
    rows: Tensor
    latents: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, rows: Tensor, indices: Tensor, d_sae: int) -> LatentMajor:
        """Sort entries, given by row and latent, by latent; entries of one latent stay in their order."""
        keys = indices.to(torch.int16) if d_sae <= torch.iinfo(torch.int16).max else indices  # radix sort: fewer passes
        order = torch.sort(keys, stable=True).indices
        offsets = torch.zeros(d_sae + 1, dtype=torch.long, device=indices.device)
        offsets[1:].index_add_(0, indices, torch.ones_like(indices)).cumsum_(0)  # bincount would wait for a GPU
        return cls(order, rows[order], indices[order], offsets)


@dataclass(slots=True, eq=False)
class _Order:
    """What is known of the places of some entries, whatever their values."""

    latent_major: LatentMajor | None = None
    positions: Tensor | None = None


@final
@dataclass(eq=False)
class SparseCodes:
    """Sparse latent activations of shape `leading_shape` + (d_sae,).

    `values` and `indices` are (entries,); `indices` are latents in [0, d_sae), each at most once a row. `offsets` is
    (rows + 1,) with offsets[0] = 0, or None when every row has exactly `k` entries. Entries may hold the value zero (a
    top-k of a row with fewer positive pre-activations does); they count neither in `l0` nor as firing.

    >>> codes = SparseCodes.from_dense(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]]))
    >>> codes.indices.tolist(), codes.row_offsets().tolist(), codes.l0().tolist()
    ([1, 0, 2], [0, 1, 3], [1, 2])
    >>> codes.to_dense().tolist()
    [[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]]
    """

    values: Tensor
    indices: Tensor
    leading_shape: tuple[int, ...]
    d_sae: int
    offsets: Tensor | None = None
    k: int | None = None
    _shared: _Order = field(default_factory=lambda: _Order(), init=False, repr=False)

    def __post_init__(self) -> None:
        if self.values.shape != self.indices.shape or self.values.dim() != 1:
            raise ShapeError(
                f"SparseCodes: values {tuple(self.values.shape)} and indices {tuple(self.indices.shape)} "
                "must both be one-dimensional and of one length"
            )
        if (self.offsets is None) == (self.k is None):
            raise ShapeError("SparseCodes: give either offsets (rows + 1,) or k, the number of entries in every row")
        if self.k is not None and self.values.numel() != self.rows * self.k:
            raise ShapeError(f"SparseCodes: {self.values.numel()} entries are not {self.rows} rows of k = {self.k}")
        if self.offsets is not None and self.offsets.shape != (self.rows + 1,):
            raise ShapeError(f"SparseCodes: offsets {tuple(self.offsets.shape)} for {self.rows} rows")

    @classmethod
    def regular(
        cls, values: Tensor, indices: Tensor, d_sae: int, leading_shape: tuple[int, ...] | None = None
    ) -> SparseCodes:
        """Codes with k entries in every row, from `values` and `indices` of shape (rows, k)."""
        rows, k = values.shape
        return cls(values.reshape(-1), indices.reshape(-1), leading_shape or (rows,), d_sae, k=k)

    @classmethod
    def from_dense(cls, dense: Tensor) -> SparseCodes:
        """The non-zero entries of `dense`, shape (..., d_sae)."""
        flat = dense.reshape(-1, dense.shape[-1])
        rows, indices = flat.nonzero(as_tuple=True)
        return cls.of_rows(flat[rows, indices], rows, indices, dense.shape[-1], tuple(dense.shape[:-1]))

    @classmethod
    def of_rows(
        cls, values: Tensor, rows: Tensor, indices: Tensor, d_sae: int, leading_shape: tuple[int, ...]
    ) -> SparseCodes:
        """Codes from the row of every entry, in ascending order, instead of offsets; all are (entries,)."""
        count = math.prod(leading_shape)
        offsets = torch.zeros(count + 1, dtype=torch.long, device=rows.device)
        torch.cumsum(torch.bincount(rows, minlength=count), 0, out=offsets[1:])
        return cls(values, indices, leading_shape, d_sae, offsets)

    @property
    def rows(self) -> int:
        """Number of rows, the product of the leading shape."""
        return math.prod(self.leading_shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense form."""
        return (*self.leading_shape, self.d_sae)

    @property
    def device(self) -> torch.device:
        """Where the entries live."""
        return self.values.device

    def row_offsets(self) -> Tensor:
        """(rows + 1,) starts of the rows, the last one being the number of entries."""
        if self.offsets is not None:
            return self.offsets
        assert self.k is not None
        return torch.arange(self.rows + 1, device=self.device) * self.k

    def row_ids(self) -> Tensor:
        """(entries,) the row of every entry."""
        rows = torch.arange(self.rows, device=self.device)
        if self.k is not None:
            return rows.repeat_interleave(self.k)
        return rows.repeat_interleave(self.row_offsets().diff(), output_size=self.values.numel())

    def to_dense(self) -> Tensor:
        """(..., d_sae) with zeros elsewhere; differentiable in the values."""
        flat = self.values.new_zeros(self.rows * self.d_sae)
        differentiable = torch.is_grad_enabled() and self.values.requires_grad
        scatter = flat.scatter if differentiable else flat.scatter_
        return scatter(0, self.positions(), self.values).view(*self.leading_shape, self.d_sae)

    def l0(self) -> Tensor:
        """(...,) number of non-zero latents in each row."""
        on = self.values != 0
        if self.k is not None:
            return summed_over_ranks(on.view(self.rows, self.k).sum(-1)).view(self.leading_shape)
        counts = torch.zeros(self.rows, dtype=torch.long, device=self.device)
        counts.index_add_(0, self.row_ids(), on.long())
        return summed_over_ranks(counts).view(self.leading_shape)

    def fired(self) -> Tensor:
        """(d_sae,) bool: the latents that are non-zero anywhere in the batch."""
        return self.firing_counts() > 0

    def firing_counts(self) -> Tensor:
        """(d_sae,) number of rows in which each latent is non-zero."""
        counts = torch.zeros(self.d_sae, dtype=torch.long, device=self.device)
        return counts.index_add_(0, self.indices, (self.values != 0).long())

    def counts(self) -> tuple[Tensor, Tensor]:
        """`l0` and `firing_counts`."""
        return self.l0(), self.firing_counts()

    def with_values(self, values: Tensor) -> SparseCodes:
        """The same entries with other values; the latent-major order is shared."""
        other = SparseCodes(values, self.indices, self.leading_shape, self.d_sae, self.offsets, self.k)
        self.share_latent_major(other)
        return other

    def map(self, function: Callable[[Tensor], Tensor]) -> SparseCodes:
        """`function` applied to the values."""
        return self.with_values(function(self.values))

    def detach(self) -> SparseCodes:
        """The same codes without gradient."""
        return self.with_values(self.values.detach())

    def reshape(self, *leading_shape: int) -> SparseCodes:
        """The same rows under another leading shape."""
        if math.prod(leading_shape) != self.rows:
            raise ShapeError(f"SparseCodes: {self.rows} rows cannot take the leading shape {leading_shape}")
        other = SparseCodes(self.values, self.indices, tuple(leading_shape), self.d_sae, self.offsets, self.k)
        self.share_latent_major(other)
        return other

    def to(self, *args: object, **kwargs: object) -> SparseCodes:
        """Move or cast the values as `Tensor.to` does; indices and offsets follow the device."""
        values = self.values.to(*args, **kwargs)  # pyright: ignore[reportCallIssue, reportArgumentType]
        offsets = None if self.offsets is None else self.offsets.to(values.device)
        return SparseCodes(values, self.indices.to(values.device), self.leading_shape, self.d_sae, offsets, self.k)

    def per_latent(self, parameter: Tensor) -> Tensor:
        """(entries,) the value of a (d_sae,) parameter at each entry."""
        return parameter[self.indices]

    def row_sums(self, values: Tensor | None = None) -> Tensor:
        """(rows,) sums of `values` (entries,), by default the codes' own, over each row."""
        values = self.values if values is None else values
        if self.k is not None:
            return summed_over_ranks(values.view(self.rows, self.k).sum(-1))
        return summed_over_ranks(values.new_zeros(self.rows).index_add(0, self.row_ids(), values))

    def row_dots(self, parameter: Tensor) -> Tensor:
        """(rows,) sums over each row of the codes' values times a (d_sae,) parameter."""
        return self.row_sums(self.values * self.per_latent(parameter))

    def latent_major(self) -> LatentMajor:
        """The entries ordered by latent: computed once, kept, and shared by all codes with the same entries."""
        if self._shared.latent_major is None:
            self._shared.latent_major = LatentMajor.of(self.row_ids(), self.indices, self.d_sae)
        return self._shared.latent_major

    def positions(self) -> Tensor:
        """(entries,) where each entry is in the dense form, ``row * d_sae + latent``: computed once, kept, and shared alike."""
        if self._shared.positions is None:
            self._shared.positions = self.row_ids() * self.d_sae + self.indices
        return self._shared.positions

    def share_latent_major(self, other: SparseCodes) -> None:
        """Let `other`, which has the same entries, use the same latent-major order and `positions`."""
        other._shared = self._shared

    def __repr__(self) -> str:
        per_row = f"k={self.k}" if self.k is not None else f"entries={self.values.numel()}"
        return f"SparseCodes(shape={self.shape}, {per_row}, dtype={self.values.dtype}, device={self.device})"


@final
@dataclass(eq=False)
class DenseCodes:
    """Latent activations as one (rows, d_sae) tensor, with the questions of `SparseCodes`."""

    values: Tensor
    leading_shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Number of rows, the product of the leading shape."""
        return math.prod(self.leading_shape)

    @property
    def d_sae(self) -> int:
        """Width of the dictionary."""
        return self.values.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense form."""
        return (*self.leading_shape, self.d_sae)

    @property
    def device(self) -> torch.device:
        """Where the values live."""
        return self.values.device

    def to_dense(self) -> Tensor:
        """(..., d_sae)."""
        return self.values.view(*self.leading_shape, self.d_sae)

    def to_sparse(self) -> SparseCodes:
        """The non-zero entries."""
        return SparseCodes.from_dense(self.to_dense())

    def l0(self) -> Tensor:
        """(...,) number of non-zero latents in each row."""
        return summed_over_ranks(self._active().sum(-1).long()).view(self.leading_shape)

    def fired(self) -> Tensor:
        """(d_sae,) bool: the latents that are non-zero anywhere in the batch."""
        return (self.values != 0).any(0)

    def firing_counts(self) -> Tensor:
        """(d_sae,) number of rows in which each latent is non-zero."""
        return self._active().sum(0).long()

    def counts(self) -> tuple[Tensor, Tensor]:
        """`l0` and `firing_counts`, from one look at the values."""
        active_RF = self._active()
        return summed_over_ranks(active_RF.sum(-1).long()).view(self.leading_shape), active_RF.sum(0).long()

    def _active(self) -> Tensor:
        """(rows, d_sae) one where a latent is not zero; where exact as float32, summed eight times as fast as bools."""
        if max(self.values.shape) > _COUNTED_IN_FLOAT:
            return self.values != 0
        return torch.ne(self.values.detach(), 0, out=torch.empty_like(self.values, dtype=torch.float32))

    def with_values(self, values: Tensor) -> DenseCodes:
        """Other values of the same shape."""
        return DenseCodes(values, self.leading_shape)

    def map(self, function: Callable[[Tensor], Tensor]) -> DenseCodes:
        """`function` applied to the values."""
        return self.with_values(function(self.values))

    def detach(self) -> DenseCodes:
        """The same codes without gradient."""
        return self.with_values(self.values.detach())

    def per_latent(self, parameter: Tensor) -> Tensor:
        """A (d_sae,) parameter, which broadcasts against the values."""
        return parameter

    def row_sums(self, values: Tensor | None = None) -> Tensor:
        """(rows,) sums of `values` (rows, d_sae), by default the codes' own, over each row."""
        return summed_over_ranks((self.values if values is None else values).sum(-1))

    def row_dots(self, parameter: Tensor) -> Tensor:
        """(rows,) sums over each row of the codes' values times a (d_sae,) parameter."""
        return summed_over_ranks(self.values @ parameter)


Codes = SparseCodes | DenseCodes
