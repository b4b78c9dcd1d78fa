"""Encode: pre-activations ``(x - centre) W^T + b``, of which only selected entries are ever kept.

The product is the one part of a step whose cost is rows x d_in x d_sae. It runs in row chunks, each chunk is handed to a
selection, and what the selection leaves is all that exists afterwards: memory follows the number of active latents.

The backward pass is sparse too. With g the gradient of the kept pre-activations,

    dW[j]    = sum over entries e of latent j of  g_e (x[row e] - centre)      a weighted bag in latent-major order
    db[j]    = sum over entries e of latent j of  g_e
    dcentre  = - db W                                                          summed over rows before the product
    dx[i]    = sum over entries e of row i of     g_e W[latent e]              only when somebody asks for it

The encoder is latent-major here, (d_sae, d_in), the transpose of the field's W_enc: the weights of a latent lie together.
"""

# R rows, D d_in, F d_sae, E entries

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor

from sae_core.codes import SparseCodes
from sae_core.ops.bags import entry_dots, latent_bags, row_bags
from sae_core.ops.gradient_sums import open_sum, weight_gradient
from sae_core.ops.mixed import dense_dtype, dense_product
from sae_core.ops.product import EncoderProduct
from sae_core.ops.select import Selection

__all__ = ["encode_dense", "encode_entries", "heeded", "heeds"]

_CAST_ROWS = 1024


_HEEDED: ContextVar[list[torch.dtype] | None] = ContextVar("precisions that products were asked for", default=None)


@contextmanager
def heeds() -> Generator[list[torch.dtype]]:
    """Collects every `product_dtype` that an op is given within: whoever offers one learns whether anybody took it."""
    found: list[torch.dtype] = []
    token = _HEEDED.set(found)
    try:
        yield found
    finally:
        _HEEDED.reset(token)


def heeded(product_dtype: torch.dtype | None) -> None:
    """Called by every op that takes a `product_dtype`."""
    found = _HEEDED.get()
    if found is not None and product_dtype is not None:
        found.append(product_dtype)


def encode_dense(x_RD: Tensor, centre_D: Tensor | None, W_FD: Tensor, b_F: Tensor) -> Tensor:
    """All pre-activations, (rows, d_sae), for small widths and dense codes; differentiable in all four tensors."""
    return cast("Tensor", _EncodeDense.apply(x_RD, centre_D, W_FD, b_F))


def encode_entries(
    x_RD: Tensor,
    centre_D: Tensor | None,
    W_FD: Tensor,
    b_F: Tensor,
    selection: Selection,
    *,
    product_dtype: torch.dtype | None = None,
) -> SparseCodes:
    """Pre-activations of the selected entries, as codes whose values carry gradient to all four tensors.

    With `product_dtype` (bfloat16, say) the large product runs in that dtype and proposes entries, somewhat more than asked
    for; these are recomputed in full precision, and the selection is made among them by their exact values.
    """
    heeded(product_dtype)
    selected: list[SparseCodes] = []
    values = cast("Tensor", _EncodeEntries.apply(x_RD, centre_D, W_FD, b_F, selection, product_dtype, selected))
    return selected[0].with_values(values)


class _EncodeDense(torch.autograd.Function):
    """The product alone, with the gradients above for all entries: the centre's needs no product of its own."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, centre_D: Tensor | None, W_FD: Tensor, b_F: Tensor) -> Tensor:
        centred = x_RD if centre_D is None else x_RD - centre_D
        ctx.save_for_backward(centred, W_FD)
        ctx.sum, ctx.dtype = open_sum(W_FD), dense_dtype()
        if ctx.dtype is not None:
            return dense_product(centred, W_FD.t(), ctx.dtype) + b_F
        return torch.addmm(b_F, centred, W_FD.t())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_RF = cast("Tensor", grads[0])
        centred, W_FD = ctx.saved_tensors
        needs_x, needs_centre, needs_W, needs_b = ctx.needs_input_grad
        grad_x = grad_centre = grad_W = grad_b = None
        if needs_W:
            grad_W = weight_gradient(grad_RF, centred, ctx.sum, ctx.dtype)
        if needs_b or needs_centre:
            grad_b = grad_RF.sum(0)
        if needs_centre and grad_b is not None:
            grad_centre = -(grad_b @ W_FD)
        if needs_x:
            grad_x = dense_product(grad_RF, W_FD, ctx.dtype)
        return grad_x, grad_centre, None if ctx.sum else grad_W, grad_b


class _EncodeEntries(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        centre_D: Tensor | None,
        W_FD: Tensor,
        b_F: Tensor,
        selection: Selection,
        product_dtype: torch.dtype | None,
        selected: list[SparseCodes],
    ) -> Tensor:
        centred = x_RD if centre_D is None else x_RD - centre_D
        if product_dtype is None or product_dtype == W_FD.dtype:
            codes = selection(EncoderProduct(centred, W_FD, b_F))
        else:
            product = EncoderProduct(centred, *_scaled(W_FD, b_F, selection.scale, product_dtype))
            codes = selection.generous()(product)
            exact = entry_dots(centred, W_FD, codes.latent_major()) + b_F[codes.indices]
            codes = selection.refine(codes.with_values(exact))
        ctx.save_for_backward(centred, W_FD)
        ctx.codes = codes  # shared with the caller, so that encoder and decoder sort the entries once between them
        selected.append(codes)
        return codes.values

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_values = cast("Tensor", grads[0])
        centred, W_FD = ctx.saved_tensors
        codes = cast("SparseCodes", ctx.codes)
        needs_x, needs_centre, needs_W, needs_b, *_rest = ctx.needs_input_grad
        grad_x = grad_centre = grad_W = grad_b = None
        if needs_W:
            grad_W = latent_bags(grad_values, codes.latent_major(), centred)
        if needs_b or needs_centre:
            grad_b = torch.zeros(W_FD.shape[0], dtype=grad_values.dtype, device=grad_values.device)
            grad_b.index_add_(0, codes.indices, grad_values)
        if needs_centre and grad_b is not None:
            grad_centre = -(grad_b @ W_FD)
        if needs_x:
            grad_x = row_bags(grad_values, codes.indices, codes.row_offsets(), W_FD)
        return grad_x, grad_centre, grad_W, grad_b, None, None, None


def _scaled(W_FD: Tensor, b_F: Tensor, scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Encoder weights and biases times `scale` (d_sae,), in `dtype`; no copy in full precision is made on the way."""
    if scale is None:
        return W_FD.to(dtype), b_F.to(dtype)
    scaled = torch.empty_like(W_FD, dtype=dtype)
    for out, rows, factors in zip(
        scaled.split(_CAST_ROWS), W_FD.split(_CAST_ROWS), scale.unsqueeze(-1).split(_CAST_ROWS), strict=True
    ):
        out.copy_(rows * factors)
    return scaled, (b_F * scale).to(dtype)
