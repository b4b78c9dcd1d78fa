"""Mixed precision: dense products in a short format, everything else in that of the parameters.

    with dense_products_in(torch.bfloat16):
        ...forward pass...

Weights, thresholds, gradients and losses keep their precision. A product's factors and its result are rounded, the sums inside
it are the hardware's, in float32; what comes back has the weights' format. The backward pass of a product is of the kind that
its forward pass was.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = ["dense_dtype", "dense_product", "dense_products_in"]

_dtype: ContextVar[torch.dtype | None] = ContextVar("format of dense products", default=None)


@contextmanager
def dense_products_in(dtype: torch.dtype | None) -> Generator[None]:
    """Dense products of the forward passes inside, and of their backward passes, are of this format; None: of their own."""
    token = _dtype.set(dtype)
    try:
        yield
    finally:
        _dtype.reset(token)


def dense_dtype() -> torch.dtype | None:
    """The format asked for; to be read in the forward pass."""
    return _dtype.get()


def dense_product(a: Tensor, b: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``a @ b`` in the format of `a`, computed in `dtype`.

    >>> one, third = torch.ones(1, 1), torch.full((1, 1), 1 / 3)
    >>> dense_product(one, third, torch.bfloat16).item() == float(torch.tensor(1 / 3, dtype=torch.bfloat16))
    True
    """
    return a @ b if dtype is None or dtype == a.dtype else (a.to(dtype) @ b.to(dtype)).to(a.dtype)
