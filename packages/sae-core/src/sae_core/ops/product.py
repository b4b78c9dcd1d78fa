"""The encoder product ``centred W^T + b``, handed out in blocks of rows so that it never exists as a whole.

It is the one part of a step whose cost is rows x d_in x d_sae. Every block is written into the same memory: a block is
valid until the next one is asked for.
"""

# R rows of a block, D d_in, F d_sae

from __future__ import annotations

from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

__all__ = ["EncoderProduct", "rows_of_a_block"]

# Smaller blocks slow the matrix product down, larger ones only take more memory.
_BLOCK_ENTRIES = 8 * 2**20


@final
class EncoderProduct:
    """Pre-activations (rows, d_sae) of `centred` (rows, d_in), computed block by block in W_FD's dtype."""

    def __init__(self, centred: Tensor, W_FD: Tensor, b_F: Tensor) -> None:
        self.centred, self.W_FD, self.b_F = centred.to(W_FD.dtype), W_FD, b_F
        self.rows, self.d_sae = centred.shape[0], W_FD.shape[0]
        self.rows_per_block = rows_of_a_block(self.rows, self.d_sae)

    def blocks(self) -> Iterator[Tensor]:
        """All blocks (R, d_sae) in row order; each one overwrites the one before."""
        memory = self.centred.new_empty(self.rows_per_block, self.d_sae)
        for chunk in self.centred.split(self.rows_per_block):
            yield torch.addmm(self.b_F, chunk, self.W_FD.t(), out=memory[: chunk.shape[0]])

    def of_rows(self, rows: Tensor) -> Tensor:
        """The pre-activations (R, d_sae) of the rows with these indices, computed anew."""
        return torch.addmm(self.b_F, self.centred[rows], self.W_FD.t())


def rows_of_a_block(rows: int, d_sae: int) -> int:
    """Rows that are computed at a time: as many in every block, and not more than memory should be taken for.

    >>> rows_of_a_block(2048, 16384)
    512
    """
    most = max(1, _BLOCK_ENTRIES // d_sae)
    blocks = max(1, -(-rows // most))
    return max(1, -(-rows // blocks))
