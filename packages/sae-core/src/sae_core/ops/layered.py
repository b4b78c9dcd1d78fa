"""Codes of dictionaries that are made of blocks of latents, one for each layer.

Block l holds `per` latents, and its own weights: it reads one site and writes the tail of the output that begins where that
site's layer begins. Between encode and decode flows one object over all latents, as everywhere; here it is put together from
the blocks' codes and taken apart again. Nothing has an entry for a latent that a block does not have.
"""

# R rows, E entries, O width of the whole output

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, cast, final

import torch
from torch import Tensor

from sae_core.codes import Codes, DenseCodes, SparseCodes
from sae_core.ops.product import EncoderProduct

__all__ = ["Given", "joined", "split", "sum_of_tails"]


def joined(parts: Sequence[Codes]) -> Codes:
    """The codes of all blocks side by side; dense where they all are. Differentiable in their values.

    >>> a, b = (SparseCodes.from_dense(torch.tensor([[0.0, value], [value, 0.0]])) for value in (1.0, 2.0))
    >>> joined([a, b]).to_dense().tolist()
    [[0.0, 1.0, 0.0, 2.0], [1.0, 0.0, 2.0, 0.0]]
    """
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, DenseCodes) for part in parts):
        return DenseCodes(torch.cat([part.values for part in parts], dim=-1), parts[0].leading_shape)
    sparse = [part if isinstance(part, SparseCodes) else part.to_sparse() for part in parts]
    rows, d_sae = sparse[0].rows, sum(part.d_sae for part in sparse)
    starts = accumulate([part.d_sae for part in sparse[:-1]], initial=0)
    indices = [part.indices + start for part, start in zip(sparse, starts, strict=True)]
    counts = [part.k for part in sparse if part.k is not None]
    if len(counts) == len(sparse):  # the same number in every row
        values = [part.values.view(rows, k) for part, k in zip(sparse, counts, strict=True)]
        index = [i.view(rows, k) for i, k in zip(indices, counts, strict=True)]
        return SparseCodes.regular(torch.cat(values, dim=-1), torch.cat(index, dim=-1), d_sae)
    order = torch.sort(torch.cat([part.row_ids() for part in sparse]), stable=True).indices
    offsets = torch.stack([part.row_offsets() for part in sparse]).sum(0)
    values = torch.cat([part.values for part in sparse])
    return SparseCodes(values[order], torch.cat(indices)[order], (rows,), d_sae, offsets)


def split(codes: Codes, sizes: Sequence[int]) -> list[Codes]:
    """What `joined` put together: the codes of every block. Differentiable in the values.

    >>> codes = SparseCodes.from_dense(torch.tensor([[0.0, 1.0, 0.0, 2.0]]))
    >>> [part.to_dense().tolist() for part in split(codes, [2, 2])]
    [[[0.0, 1.0]], [[0.0, 2.0]]]
    """
    if len(sizes) == 1:
        return [codes]
    if isinstance(codes, DenseCodes):
        return [DenseCodes(part, codes.leading_shape) for part in codes.values.split(list(sizes), dim=-1)]
    ends = torch.tensor(list(accumulate(sizes))).to(codes.device, non_blocking=True)
    block_E, row_E = torch.bucketize(codes.indices, ends, right=True), codes.row_ids()
    parts: list[Codes] = []
    for block, (start, size) in enumerate(zip(accumulate(sizes, initial=0), sizes, strict=False)):
        mine = (block_E == block).nonzero().squeeze(-1)
        offsets = torch.zeros(codes.rows + 1, dtype=torch.long, device=codes.device)
        offsets[1:].index_add_(0, row_E[mine], torch.ones_like(mine)).cumsum_(0)
        parts.append(SparseCodes(codes.values[mine], codes.indices[mine] - start, codes.leading_shape, size, offsets))
    return parts


def sum_of_tails(parts: Sequence[Tensor]) -> Tensor:
    """(rows, width): the sum of parts of falling width (rows, ...), each aligned with the end of the first, the widest.

    >>> sum_of_tails([torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0]])]).tolist()
    [[1.0, 2.0, 13.0]]
    """
    return cast("Tensor", _SumOfTails.apply(*parts))


@final
class Given:
    """A selection that was made before: of this product, exactly these entries."""

    def __init__(self, codes: SparseCodes) -> None:
        self.codes = codes

    def __call__(self, product: EncoderProduct) -> SparseCodes:
        return self.codes


class _SumOfTails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.widths = [part.shape[-1] for part in parts]
        out_RO = parts[0].clone()
        for part in parts[1:]:
            out_RO[:, out_RO.shape[-1] - part.shape[-1] :] += part
        return out_RO

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, ...]:
        grad_RO = cast("Tensor", grads[0])
        return tuple(grad_RO[:, grad_RO.shape[-1] - width :].contiguous() for width in ctx.widths)
