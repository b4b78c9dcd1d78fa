"""Encode: pre-activations ``(x - centre) W_enc + b_enc``, of which only selected entries are ever kept.

The product is the one part of a step whose cost is rows x d_in x d_sae. It runs in row chunks, each chunk is handed to a
selection, and what the selection leaves is all that exists afterwards: memory follows the number of active latents.

The backward pass is sparse too. With g the gradient of the kept pre-activations,

    dW_enc[:, j] = sum over entries e of latent j of  g_e (x[row e] - centre)      a weighted bag in latent-major order
    db_enc[j]    = sum over entries e of latent j of  g_e
    dcentre      = - W_enc db_enc                                                  summed over rows before the product
    dx[i]        = sum over entries e of row i of     g_e W_enc[:, latent e]       only when somebody asks for it

`W_enc` has shape (d_in, d_sae) as everywhere in the field, but is best stored latent-major (see `latent_major_parameter`),
so that the column of a latent is contiguous; nothing but speed depends on it.
"""

# R rows, D d_in, F d_sae, E entries

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from sae_core.codes import SparseCodes
from sae_core.ops.bags import entry_dots, latent_bags, row_bags
from sae_core.ops.gradient_sums import open_sum, weight_gradient
from sae_core.ops.product import EncoderProduct
from sae_core.ops.select import Selection

__all__ = ["encode_dense", "encode_entries", "latent_major_parameter"]


_CAST_ROWS = 1024


def latent_major_parameter(d_in: int, d_sae: int, **kwargs: Any) -> nn.Parameter:
    """An uninitialised (d_in, d_sae) parameter whose columns, one a latent, are contiguous in memory."""
    return nn.Parameter(torch.empty(d_sae, d_in, **kwargs).t())


def encode_dense(x_RD: Tensor, centre_D: Tensor | None, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """All pre-activations, (rows, d_sae), for small widths and dense codes; differentiable in all four tensors."""
    return cast("Tensor", _EncodeDense.apply(x_RD, centre_D, W_enc, b_enc))


def encode_entries(
    x_RD: Tensor,
    centre_D: Tensor | None,
    W_enc: Tensor,
    b_enc: Tensor,
    selection: Selection,
    *,
    product_dtype: torch.dtype | None = None,
) -> SparseCodes:
    """Pre-activations of the selected entries, as codes whose values carry gradient to all four tensors.

    With `product_dtype` (bfloat16, say) the large product runs in that dtype and proposes entries, somewhat more than asked
    for; these are recomputed in full precision, and the selection is made among them by their exact values.
    """
    selected: list[SparseCodes] = []
    values = cast("Tensor", _EncodeEntries.apply(x_RD, centre_D, W_enc, b_enc, selection, product_dtype, selected))
    return selected[0].with_values(values)


class _EncodeDense(torch.autograd.Function):
    """The product alone, with the gradients above for all entries: the centre's needs no product of its own."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, centre_D: Tensor | None, W_enc: Tensor, b_enc: Tensor) -> Tensor:
        centred = x_RD if centre_D is None else x_RD - centre_D
        ctx.save_for_backward(centred, W_enc)
        ctx.sum = open_sum(W_enc)
        return torch.addmm(b_enc, centred, W_enc)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_RF = cast("Tensor", grads[0])
        centred, W_enc = ctx.saved_tensors
        needs_x, needs_centre, needs_W, needs_b = ctx.needs_input_grad
        grad_x = grad_centre = grad_W = grad_b = None
        if needs_W:
            grad_W = weight_gradient(centred, grad_RF, W_enc, ctx.sum)
        if needs_b or needs_centre:
            grad_b = grad_RF.sum(0)
        if needs_centre and grad_b is not None:
            grad_centre = -(W_enc @ grad_b)
        if needs_x:
            grad_x = grad_RF @ W_enc.t()
        return grad_x, grad_centre, None if ctx.sum else grad_W, grad_b


class _EncodeEntries(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        centre_D: Tensor | None,
        W_enc: Tensor,
        b_enc: Tensor,
        selection: Selection,
        product_dtype: torch.dtype | None,
        selected: list[SparseCodes],
    ) -> Tensor:
        centred = x_RD if centre_D is None else x_RD - centre_D
        if product_dtype is None or product_dtype == W_enc.dtype:
            codes = selection(EncoderProduct(centred, W_enc, b_enc))
        else:
            product = EncoderProduct(centred, *_scaled(W_enc, b_enc, selection.scale, product_dtype))
            codes = selection.generous()(product)
            exact = entry_dots(centred, W_enc.t(), codes.latent_major()) + b_enc[codes.indices]
            codes = selection.refine(codes.with_values(exact))
        ctx.save_for_backward(centred, W_enc)
        ctx.codes = codes  # shared with the caller, so that encoder and decoder sort the entries once between them
        selected.append(codes)
        return codes.values

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_values = cast("Tensor", grads[0])
        centred, W_enc = ctx.saved_tensors
        codes = cast("SparseCodes", ctx.codes)
        needs_x, needs_centre, needs_W, needs_b, *_rest = ctx.needs_input_grad
        grad_x = grad_centre = grad_W = grad_b = None
        if needs_W:
            grad_W = latent_bags(grad_values, codes.latent_major(), centred).t()
        if needs_b or needs_centre:
            grad_b = torch.zeros(W_enc.shape[1], dtype=grad_values.dtype, device=grad_values.device)
            grad_b.index_add_(0, codes.indices, grad_values)
        if needs_centre and grad_b is not None:
            grad_centre = -(W_enc @ grad_b)
        if needs_x:
            grad_x = row_bags(grad_values, codes.indices, codes.row_offsets(), W_enc.t())
        return grad_x, grad_centre, grad_W, grad_b, None, None, None


def _scaled(W_enc: Tensor, b_enc: Tensor, scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Encoder weights and biases times `scale` (d_sae,), in `dtype`; no copy in full precision is made on the way."""
    if scale is None:
        return W_enc.to(dtype), b_enc.to(dtype)
    W_FD = torch.empty(W_enc.shape[::-1], dtype=dtype, device=W_enc.device)
    for out, rows, factors in zip(
        W_FD.split(_CAST_ROWS), W_enc.t().split(_CAST_ROWS), scale.unsqueeze(-1).split(_CAST_ROWS), strict=True
    ):
        out.copy_(rows * factors)
    return W_FD.t(), (b_enc * scale).to(dtype)
