"""Weight gradients that are summed where they are computed.

The gradient of a product by its weights is as large as the weights. Whoever goes backward several times, say block of rows
by block of rows, and wants the sum needs no second matrix for it: ``sum += a^T b`` is one call that reads and writes the sum.

    with summed(parameters) as sums:
        ...forward and backward passes...
    sums[i].total    what dense products contributed to the gradient of parameters[i], or None if nothing

Inside, autograd itself finds no gradient for these contributions. Everything else reaches it as always.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sae_core.ops.mixed import dense_product

__all__ = ["GradientSum", "open_sum", "summed", "weight_gradient"]


@final
@dataclass(eq=False)
class GradientSum:
    """The sum so far of a weight's gradients; None before the first."""

    weight: Tensor
    total: Tensor | None = None


_open: ContextVar[tuple[GradientSum, ...]] = ContextVar("open gradient sums", default=())


@contextmanager
def summed(parameters: Sequence[Tensor]) -> Generator[list[GradientSum]]:
    """Dense products of the forward passes inside add their weights' gradients to these sums."""
    sums = [GradientSum(parameter) for parameter in parameters]
    token = _open.set(tuple(sums))
    try:
        yield sums
    finally:
        _open.reset(token)


def open_sum(weight: Tensor) -> GradientSum | None:
    """The sum that gradients of `weight` are to be added to, if there is one; to be asked for in the forward pass."""
    return next((entry for entry in _open.get() if entry.weight is weight), None)


def weight_gradient(a_RN: Tensor, b_RM: Tensor, into: GradientSum | None, dtype: torch.dtype | None = None) -> Tensor:
    """``a^T b``, the weight's (N, M) gradient, computed in `dtype`; or all of `into`, once added there."""
    if into is None or into.total is None:
        gradient = dense_product(a_RN.t(), b_RM, dtype)
        if into is not None:
            into.total = gradient
        return gradient
    if dtype is None:
        return into.total.addmm_(a_RN.t(), b_RM)
    return into.total.add_(dense_product(a_RN.t(), b_RM, dtype))
