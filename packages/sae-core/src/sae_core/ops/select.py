"""Selections: which entries of a batch's pre-activations stay.

A selection gets the encoder product block by block and returns the entries to keep as codes. It decides; it does not
transform: the values it returns are the pre-activations themselves, so that the caller's activation function and its
gradient are ordinary elementwise code on the few entries that remain.

When the product runs in low precision it may only propose: `generous` is the same selection with room for error, and
`refine` makes the choice among what that one kept, whose values are exact by then.
"""

# R rows, F d_sae, K kept entries a row

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, final

import torch
from torch import Tensor

from sae_core.codes import SparseCodes
from sae_core.ops.largest import above, largest
from sae_core.ops.product import EncoderProduct

__all__ = ["Above", "AbsTopK", "GroupMax", "Selection", "TopK"]

_PIECE_BYTES = 4 * 2**20  # on a CPU rows are ranked in pieces that stay in the cache
_GENEROUS = 1.125  # of 16 384 entries chosen by a bfloat16 product, 1.2 % differ without room, and none with this much
_TOLERANCE = 2.0**-6


class Selection(Protocol):
    """Chooses entries of pre-activations."""

    @property
    def scale(self) -> Tensor | None:
        """(d_sae,) what entries are multiplied by to rank them, or None."""
        ...

    def __call__(self, product: EncoderProduct) -> SparseCodes:
        """The chosen entries, with their pre-activations as values."""
        ...

    def generous(self) -> Selection:
        """A selection from a product that is scaled already; almost surely it keeps what this one would, were that exact."""
        ...

    def refine(self, codes: SparseCodes) -> SparseCodes:
        """The choice among the entries that `generous` kept, by their exact values."""
        ...


@final
@dataclass(frozen=True, slots=True, eq=False)
class TopK:
    """The k largest entries of every row, ranked by ``pre * scale`` (scale (d_sae,), say decoder norms) when given.

    >>> pre = EncoderProduct(torch.eye(2), torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, -2.0]]).T, torch.zeros(3))
    >>> TopK(k=1)(pre).indices.tolist()
    [1, 0]
    """

    k: int
    scale: Tensor | None = None

    def __call__(self, product: EncoderProduct) -> SparseCodes:
        return _by_rank(product, self.k, self.scale, _identity)

    def generous(self) -> TopK:
        return replace(self, k=_wider(self.k), scale=None)

    def refine(self, codes: SparseCodes) -> SparseCodes:
        return _refine_by_rank(codes, self.k, self.scale, _identity)


@final
@dataclass(frozen=True, slots=True, eq=False)
class AbsTopK:
    """The k entries of every row that are largest in absolute value, ranked by ``|pre| * scale`` when given; signs stay.

    >>> pre = EncoderProduct(torch.eye(2), torch.tensor([[1.0, -3.0, 2.0], [0.5, -0.2, 0.0]]).T, torch.zeros(3))
    >>> AbsTopK(k=1)(pre).values.tolist()
    [-3.0, 0.5]
    """

    k: int
    scale: Tensor | None = None

    def __call__(self, product: EncoderProduct) -> SparseCodes:
        return _by_rank(product, self.k, self.scale, torch.abs)

    def generous(self) -> AbsTopK:
        return replace(self, k=_wider(self.k), scale=None)

    def refine(self, codes: SparseCodes) -> SparseCodes:
        return _refine_by_rank(codes, self.k, self.scale, torch.abs)


@final
@dataclass(frozen=True, slots=True, eq=False)
class GroupMax:
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
        width = product.d_sae // self.k
        starts = torch.arange(0, self.k * width, width, device=product.centred.device)
        for pre_RF, ranked_RF in _ranked(product, self.scale, _identity):
            index_RK = ranked_RF.unflatten(-1, (self.k, width)).argmax(-1) + starts
            values.append(pre_RF.gather(-1, index_RK).reshape(-1))
            indices.append(index_RK.reshape(-1))
        return SparseCodes(torch.cat(values), torch.cat(indices), (product.rows,), product.d_sae, k=self.k)

    def generous(self) -> GroupMax:
        return replace(
            self, scale=None
        )  # a group's runner-up in low precision is as good as its winner; no more than one may stay

    def refine(self, codes: SparseCodes) -> SparseCodes:
        return codes


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

    def generous(self) -> Above:
        return Above(self.threshold - _TOLERANCE * abs(self.threshold))

    def refine(self, codes: SparseCodes) -> SparseCodes:
        return codes  # some lie below the threshold; whoever asks for entries above one handles those anyway


def _identity(pre: Tensor) -> Tensor:
    return pre


def _wider(k: int) -> int:
    return int(k * _GENEROUS) + 1


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
        value_RK, index_RK = largest(ranked_RF, k)
        values.append(value_RK if ranked_RF is pre_RF else pre_RF.gather(-1, index_RK))
        indices.append(index_RK)
    return SparseCodes.regular(torch.cat(values), torch.cat(indices), product.d_sae)


def _refine_by_rank(codes: SparseCodes, k: int, scale: Tensor | None, size: Callable[[Tensor], Tensor]) -> SparseCodes:
    assert codes.k is not None
    value_RK, index_RK = codes.values.view(-1, codes.k), codes.indices.view(-1, codes.k)
    rank_RK = size(value_RK) if scale is None else size(value_RK) * scale[index_RK]
    best = torch.topk(rank_RK, min(k, codes.k), dim=-1, sorted=False).indices
    return SparseCodes.regular(value_RK.gather(-1, best), index_RK.gather(-1, best), codes.d_sae)
