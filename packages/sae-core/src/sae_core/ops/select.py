"""Selections: which entries of a batch's pre-activations stay.

A selection gets the encoder product block by block and returns the entries to keep as codes. It decides; it does not
transform: the values it returns are the pre-activations themselves, so that the caller's activation function and its
gradient are ordinary elementwise code on the few entries that remain.

Where the product runs in low precision it only proposes, and `screen` is the same selection: of values in float32, computed
where they may matter, with a proof for everything left out (`sae_core.ops.screened`).
"""

# R rows, F d_sae, K kept entries a row

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import torch
from torch import Tensor

from sae_core.codes import SparseCodes
from sae_core.config import require
from sae_core.latent_ranks import LatentRanks, current_ranks
from sae_core.ops.certified import above_threshold, best_of_groups, largest_of_rows
from sae_core.ops.largest import above, first_largest
from sae_core.ops.merging import best_of_rows
from sae_core.ops.product import EncoderProduct
from sae_core.ops.screened import Screened

__all__ = ["Above", "AbsTopK", "CertifiedSelection", "GroupMax", "KeepsK", "Selection", "SelectsOverRanks", "TopK"]

_PIECE_BYTES = 4 * 2**20  # on a CPU rows are ranked in pieces that stay in the cache


class Selection(Protocol):
    """Chooses entries of pre-activations."""

    def __call__(self, product: EncoderProduct) -> SparseCodes:
        """The chosen entries, with their pre-activations as values."""
        ...


@runtime_checkable
class CertifiedSelection(Selection, Protocol):
    """A selection that can also be made from bounds."""

    @property
    def scale(self) -> Tensor | None:
        """(d_sae,) what entries are multiplied by to rank them, or None."""
        ...

    @property
    def threshold(self) -> Tensor | float | None:
        """What is subtracted from ranks, a number or (d_sae,), or None."""
        ...

    @property
    def wanted(self) -> float:
        """How many entries of a row are kept, as far as that is known."""
        ...

    def screen(self, product: Screened) -> SparseCodes:
        """As from a full product; see `sae_core.ops.screened` for where they may differ."""
        ...


@runtime_checkable
class SelectsOverRanks(Selection, Protocol):
    """A selection that can be made where latents are shared out over ranks."""

    def over_ranks(self, codes: SparseCodes, ranks: LatentRanks) -> SparseCodes:
        """What stays of `codes`, which it has chosen among the latents of this rank, beside those of the others."""
        ...


class _HasK(Protocol):
    @property
    def k(self) -> float: ...


class KeepsK:
    """What a selection that keeps `k` entries a row says as a `CertifiedSelection`."""

    __slots__ = ()

    @property
    def threshold(self) -> None:
        """Nothing is subtracted from ranks."""

    @property
    def wanted(self: _HasK) -> float:
        """k, of every row or on average."""
        return self.k


@final
@dataclass(frozen=True, slots=True, eq=False)
class TopK(KeepsK):
    """The k largest entries of every row, ranked by ``pre * scale`` (scale (d_sae,), say decoder norms) when given.

    Of equal entries the first latents stay, but for products that are screened.

    >>> pre = EncoderProduct(torch.eye(2), torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, -2.0]]).T, torch.zeros(3))
    >>> TopK(k=1)(pre).indices.tolist()
    [1, 0]
    """

    k: int
    scale: Tensor | None = None

    def __call__(self, product: EncoderProduct) -> SparseCodes:
        return _by_rank(product, self.k, self.scale, _identity)

    def screen(self, product: Screened) -> SparseCodes:
        return largest_of_rows(product, self.k, self.scale, signed=True, select=self)

    def over_ranks(self, codes: SparseCodes, ranks: LatentRanks) -> SparseCodes:
        return best_of_rows(codes, _ordering(codes, codes.values, self.scale), self.k, ranks)

    def among(self, codes: SparseCodes) -> SparseCodes:
        """The same choice among entries that are known already, the same number in every row."""
        assert codes.k is not None
        value_RK, index_RK = codes.values.view(-1, codes.k), codes.indices.view(-1, codes.k)
        rank_RK = value_RK if self.scale is None else value_RK * self.scale[index_RK]
        best = torch.topk(rank_RK, min(self.k, codes.k), dim=-1, sorted=False).indices
        return SparseCodes.regular(value_RK.gather(-1, best), index_RK.gather(-1, best), codes.d_sae)


@final
@dataclass(frozen=True, slots=True, eq=False)
class AbsTopK(KeepsK):
    """The k entries of every row that are largest in absolute value, ranked by ``|pre| * scale`` when given; signs stay.

    >>> pre = EncoderProduct(torch.eye(2), torch.tensor([[1.0, -3.0, 2.0], [0.5, -0.2, 0.0]]).T, torch.zeros(3))
    >>> AbsTopK(k=1)(pre).values.tolist()
    [-3.0, 0.5]
    """

    k: int
    scale: Tensor | None = None

    def __call__(self, product: EncoderProduct) -> SparseCodes:
        return _by_rank(product, self.k, self.scale, torch.abs)

    def screen(self, product: Screened) -> SparseCodes:
        return largest_of_rows(product, self.k, self.scale, signed=False, select=self)

    def over_ranks(self, codes: SparseCodes, ranks: LatentRanks) -> SparseCodes:
        return best_of_rows(codes, _ordering(codes, codes.values.abs(), self.scale), self.k, ranks)


@final
@dataclass(frozen=True, slots=True, eq=False)
class GroupMax(KeepsK):
    """The largest entry of each of k equal groups of neighbouring latents; d_sae must be divisible by k.

    Cheaper than a top-k, since it is one pass (EleutherAI's sparsify introduced it). Ranked by ``pre * scale`` when given.

    >>> pre = EncoderProduct(torch.ones(1, 1), torch.tensor([[1.0, 3.0, 2.0, -1.0]]).T, torch.zeros(4))
    >>> GroupMax(k=2)(pre).indices.tolist()
    [1, 2]
    """

    k: int
    scale: Tensor | None = None

    def __call__(self, product: EncoderProduct) -> SparseCodes:
        values: list[Tensor] = []
        indices: list[Tensor] = []
        groups = self._groups_here()
        width = product.d_sae // groups
        starts = torch.arange(0, groups * width, width, device=product.centred.device)
        for pre_RF, ranked_RF in _ranked(product, self.scale, _identity):
            index_RK = ranked_RF.unflatten(-1, (groups, width)).argmax(-1) + starts
            values.append(pre_RF.gather(-1, index_RK).reshape(-1))
            indices.append(index_RK.reshape(-1))
        return SparseCodes(torch.cat(values), torch.cat(indices), (product.rows,), product.d_sae, k=groups)

    def screen(self, product: Screened) -> SparseCodes:
        return best_of_groups(product, self._groups_here(), self.scale, select=self)

    def over_ranks(self, codes: SparseCodes, ranks: LatentRanks) -> SparseCodes:
        return codes

    def _groups_here(self) -> int:
        """Groups stay whole on a rank."""
        ranks = current_ranks()
        if ranks is None:
            return self.k
        require(
            self.k % ranks.size == 0,
            f"k = {self.k} groups of latents cannot be shared out evenly over {ranks.size} ranks; choose a multiple as k",
        )
        return self.k // ranks.size


@final
@dataclass(frozen=True, slots=True, eq=False)
class Above:
    """All entries strictly above `threshold`, a number or (d_sae,); rows of any length.

    >>> pre = EncoderProduct(torch.eye(2), torch.tensor([[1.0, -3.0, 2.0], [0.0, -1.0, -2.0]]).T, torch.zeros(3))
    >>> Above(0.0)(pre).indices.tolist()
    [0, 2]
    """

    threshold: Tensor | float

    @property
    def scale(self) -> None:
        return None

    def __call__(self, product: EncoderProduct) -> SparseCodes:
        threshold = self.threshold
        if isinstance(threshold, Tensor):
            threshold = threshold.to(product.centred.dtype)
        values: list[Tensor] = []
        indices: list[Tensor] = []
        counts: list[Tensor] = []
        for pre_RF in product.blocks():
            position = above(pre_RF, threshold)
            row = position.div(product.d_sae, rounding_mode="floor")
            values.append(pre_RF.reshape(-1)[position])
            indices.append(position - row * product.d_sae)
            counts.append(torch.bincount(row, minlength=pre_RF.shape[0]))
        offsets = torch.zeros(product.rows + 1, dtype=torch.long, device=product.centred.device)
        torch.cumsum(torch.cat(counts), 0, out=offsets[1:])
        return SparseCodes(torch.cat(values), torch.cat(indices), (product.rows,), product.d_sae, offsets)

    @property
    def wanted(self) -> float:
        return 0.0

    def screen(self, product: Screened) -> SparseCodes:
        return above_threshold(product, keep=self._keeps, select=self)

    def over_ranks(self, codes: SparseCodes, ranks: LatentRanks) -> SparseCodes:
        return codes

    def _keeps(self, values_E: Tensor, latents_E: Tensor) -> Tensor:
        threshold = self.threshold
        return values_E > (threshold.to(values_E.dtype)[latents_E] if isinstance(threshold, Tensor) else threshold)


def _identity(pre: Tensor) -> Tensor:
    return pre


def _ordering(codes: SparseCodes, sizes: Tensor, scale: Tensor | None) -> Tensor:
    return sizes if scale is None else sizes * scale.to(sizes.dtype)[codes.indices]


def _ranked(
    product: EncoderProduct, scale: Tensor | None, size: Callable[[Tensor], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pre-activations in pieces of rows, and what they are ranked by, both valid until the next piece is asked for."""
    rows = product.rows_per_block
    if product.centred.device.type == "cpu":
        rows = min(rows, max(1, _PIECE_BYTES // (product.d_sae * product.centred.element_size())))
    memory = product.centred.new_empty(0 if scale is None else rows, product.d_sae)
    if scale is not None:
        scale = scale.to(memory.dtype)
    for block in product.blocks():
        for pre_RF in block.split(rows):
            sized_RF = size(pre_RF)
            yield pre_RF, sized_RF if scale is None else torch.mul(sized_RF, scale, out=memory[: len(pre_RF)])


def _by_rank(product: EncoderProduct, k: int, scale: Tensor | None, size: Callable[[Tensor], Tensor]) -> SparseCodes:
    values: list[Tensor] = []
    indices: list[Tensor] = []
    k = min(k, product.d_sae)
    for pre_RF, ranked_RF in _ranked(product, scale, size):
        value_RK, index_RK = first_largest(ranked_RF, k)
        values.append(value_RK if ranked_RF is pre_RF else pre_RF.gather(-1, index_RK))
        indices.append(index_RK)
    return SparseCodes.regular(torch.cat(values), torch.cat(indices), product.d_sae)
