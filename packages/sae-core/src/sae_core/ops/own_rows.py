"""Some rows of a matrix used on their own, beside the matrix as a whole.

Autograd's gradient of ``W[rows]`` is a matrix as large as W, zero but for those rows, which is then added to the gradient
of W's other uses. Here the rows' gradient is added where it belongs, in the gradient that exists anyway.
"""

# F d_sae, D a width, N chosen rows

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["with_own_rows"]


def with_own_rows(W_FD: Tensor, rows_N: Tensor) -> tuple[Tensor, Tensor]:
    """`W_FD`, and a copy (N, width) of its rows `rows_N`, none twice; use these two and `W_FD` itself no more.

    The gradients of both are used up in the backward pass, so both must go into operations that hand theirs to nobody else,
    as products do and sums of tensors do not.

    >>> W = torch.ones(3, 2, requires_grad=True)
    >>> whole, own = with_own_rows(W, torch.tensor([1]))
    >>> ((torch.ones(1, 3) @ whole).sum() + (torch.full((1, 1), 4.0) @ own).sum()).backward()
    >>> W.grad
    tensor([[1., 1.],
            [5., 5.],
            [1., 1.]])
    """
    return cast("tuple[Tensor, Tensor]", _WithOwnRows.apply(W_FD, rows_N))


class _WithOwnRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W_FD: Tensor, rows_N: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows_N)
        ctx.shape = W_FD.shape
        ctx.set_materialize_grads(False)
        return W_FD, W_FD[rows_N]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, None]:
        grad_FD, grad_ND = cast("tuple[Tensor | None, Tensor | None]", grads)
        (rows_N,) = ctx.saved_tensors
        if grad_ND is None:
            return grad_FD, None
        if grad_FD is None:
            grad_FD = grad_ND.new_zeros(ctx.shape)
        grad_FD.index_add_(0, rows_N, grad_ND)
        return grad_FD, None
