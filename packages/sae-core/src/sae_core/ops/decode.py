"""Decode: ``f W_dec``, as a weighted sum of the rows of the active latents.

For sparse codes neither the forward nor the backward pass touches an inactive latent's row, and no (entries, width) copy of
decoder rows exists:

    y[i]      = sum over entries e of row i of     f_e W_dec[latent e]       a weighted bag
    dW_dec[j] = sum over entries e of latent j of  f_e dy[row e]             the transposed bag
    df_e      = dy[row e] . W_dec[latent e]                                  one dot product an entry

Where latents are shared out over ranks, y is the sum of what each decodes; the gradients need nothing from other ranks.
"""

# R rows, F d_sae, O width of the output, E entries

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from sae_core.codes import Codes, DenseCodes, SparseCodes
from sae_core.latent_ranks import current_ranks, summed_over_ranks
from sae_core.ops.bags import entry_dots, latent_bags, row_bags
from sae_core.ops.dispatch import entries_pay_in
from sae_core.ops.gradient_sums import open_sum, weight_gradient
from sae_core.ops.mixed import dense_dtype, dense_product

__all__ = ["decode", "decode_and_norms", "decode_prefixes"]


def decode(codes: Codes, W_dec: Tensor) -> Tensor:
    """(rows, width): the reconstruction without bias; differentiable in the values and in `W_dec` (d_sae, width)."""
    return summed_over_ranks(_decoded(codes, W_dec))


def _decoded(codes: Codes, W_dec: Tensor) -> Tensor:
    if isinstance(codes, DenseCodes):
        return cast("Tensor", _DecodeDense.apply(codes.values, W_dec))
    if not entries_pay_in(codes, W_dec):
        return cast("Tensor", _DecodeWritten.apply(codes.values, W_dec, codes))
    return cast("Tensor", _DecodeEntries.apply(codes.values, W_dec, codes))


def decode_and_norms(codes: Codes, W_dec: Tensor, sizes: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """What `decode` gives, and the norms (d_sae,) of the decoder's rows, for penalties that depend on both.

    With `sizes`, the norms are those of the parts of these widths, summed. Their gradient, g_j W_dec[j] / |W_dec[j]| in
    every part, is added to the reconstruction's where that lies; alone it would be one more tensor of the decoder's size.
    At a zero row it is zero.

    >>> y, norms = decode_and_norms(SparseCodes.from_dense(torch.tensor([[0.0, 2.0]])), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    >>> y.tolist(), norms.tolist()
    ([[0.0, 2.0]], [5.0, 1.0])
    """
    y_RO, norms_F = cast(
        "tuple[Tensor, Tensor]", _DecodeAndNorms.apply(codes.values, W_dec, codes, tuple(sizes or W_dec.shape[1:]))
    )
    return summed_over_ranks(y_RO), norms_F


def decode_prefixes(codes: SparseCodes, W_dec: Tensor, widths: Sequence[int]) -> Tensor:
    """(levels, rows, width): for every level the reconstruction, without bias, from the latents below its width alone.

    `widths` increase and end at d_sae or below; latents beyond the last width contribute nowhere. Each level adds its own
    latents to the level before, and in the backward pass a latent sees the summed gradients of all levels that contain it,
    so all levels together cost what one decode does. Differentiable in the values and in `W_dec`.

    >>> codes = SparseCodes.from_dense(torch.tensor([[1.0, 2.0, 3.0]]))
    >>> decode_prefixes(codes, torch.ones(3, 1), (1, 3)).flatten().tolist()
    [1.0, 6.0]
    """
    ranks = current_ranks()
    before = 0 if ranks is None else ranks.rank * codes.d_sae  # latents of lower ranks
    return summed_over_ranks(
        cast("Tensor", _DecodePrefixes.apply(codes.values, W_dec, codes, [width - before for width in widths]))
    )


class _DecodeDense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_RF: Tensor, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(values_RF, W_dec)
        ctx.sum, ctx.dtype = open_sum(W_dec), dense_dtype()
        return dense_product(values_RF, W_dec, ctx.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        values_RF, W_dec = ctx.saved_tensors
        grad_RO = cast("Tensor", grads[0])
        grad_values = dense_product(grad_RO, W_dec.t(), ctx.dtype) if ctx.needs_input_grad[0] else None
        grad_W = weight_gradient(values_RF, grad_RO, ctx.sum, ctx.dtype) if ctx.needs_input_grad[1] else None
        return grad_values, None if ctx.sum else grad_W


class _DecodeWritten(torch.autograd.Function):
    """Entries with the zeros between them written out, which `_DecodeDense` multiplies."""

    @staticmethod
    def forward(ctx: Any, values_E: Tensor, W_dec: Tensor, codes: SparseCodes) -> Tensor:
        values_RF = codes.to_dense().view(codes.rows, codes.d_sae)
        ctx.codes = codes.detach()
        return _DecodeDense.forward(ctx, values_RF, W_dec)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_RF, grad_W = _DecodeDense.backward(ctx, *grads)
        codes = cast("SparseCodes", ctx.codes)
        return None if grad_RF is None else grad_RF.view(-1)[codes.positions()], grad_W, None


class _DecodeEntries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_E: Tensor, W_dec: Tensor, codes: SparseCodes) -> Tensor:
        ctx.save_for_backward(values_E, W_dec)
        ctx.codes = codes.detach()
        return row_bags(values_E, codes.indices, codes.row_offsets(), W_dec)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        values_E, W_dec = ctx.saved_tensors
        codes, grad_RO = cast("SparseCodes", ctx.codes), cast("Tensor", grads[0])
        grad_values = grad_W = None
        if ctx.needs_input_grad[0]:
            grad_values = entry_dots(grad_RO, W_dec, codes.latent_major()).to(values_E.dtype)
        if ctx.needs_input_grad[1]:
            grad_W = latent_bags(values_E, codes.latent_major(), grad_RO)
        return grad_values, grad_W, None


class _DecodeAndNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, codes: Codes, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        norms_SF = torch.stack([torch.linalg.vector_norm(part, dim=-1) for part in W_dec.split(sizes, dim=-1)])
        norms_F = norms_SF.sum(0)
        ctx.save_for_backward(values, W_dec, norms_SF)
        ctx.codes, ctx.sizes, ctx.dtype = codes.detach(), sizes, dense_dtype()
        ctx.sum = open_sum(W_dec) if isinstance(codes, DenseCodes) else None
        if isinstance(codes, DenseCodes):
            return dense_product(values, W_dec, ctx.dtype), norms_F
        return row_bags(values, codes.indices, codes.row_offsets(), W_dec), norms_F

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        values, W_dec, norms_SF = ctx.saved_tensors
        codes = cast("Codes", ctx.codes)
        grad_RO, grad_F = cast("tuple[Tensor, Tensor]", grads)
        grad_values = grad_W = None
        if ctx.needs_input_grad[0]:
            if isinstance(codes, DenseCodes):
                grad_values = dense_product(grad_RO, W_dec.t(), ctx.dtype)
            else:
                grad_values = entry_dots(grad_RO, W_dec, codes.latent_major()).to(values.dtype)
        if ctx.needs_input_grad[1]:
            if isinstance(codes, DenseCodes):
                grad_W = weight_gradient(values, grad_RO, ctx.sum, ctx.dtype)
            else:
                grad_W = latent_bags(values, codes.latent_major(), grad_RO)
            parts = zip(grad_W.split(ctx.sizes, dim=-1), W_dec.split(ctx.sizes, dim=-1), norms_SF, strict=True)
            for grad_part, W_part, norms_F in parts:
                grad_part.addcmul_(W_part, torch.where(norms_F > 0, grad_F / norms_F, 0.0).unsqueeze(-1))
        return grad_values, None if ctx.sum else grad_W, None, None


class _DecodePrefixes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_E: Tensor, W_dec: Tensor, codes: SparseCodes, widths: list[int]) -> Tensor:
        levels, rows = len(widths), codes.rows
        boundaries = torch.tensor(widths).to(codes.device, non_blocking=True)
        level_E = torch.bucketize(codes.indices, boundaries, right=True)
        kept_E = level_E < levels
        bag_E = (level_E * rows + codes.row_ids()).where(kept_E, 0)  # one bag a level and row, levels outermost
        bags, order = torch.sort(bag_E, stable=True)
        offsets = torch.zeros(levels * rows + 1, dtype=torch.long, device=codes.device)
        offsets[1:].index_add_(0, bags, torch.ones_like(bags)).cumsum_(0)  # bincount would wait for a GPU
        weights_E = values_E.where(kept_E, 0.0)
        y_LRO = row_bags(weights_E[order], codes.indices[order], offsets, W_dec).view(levels, rows, -1)
        for level in range(1, levels):
            y_LRO[level] += y_LRO[level - 1]
        ctx.save_for_backward(weights_E, W_dec, bag_E, kept_E)
        ctx.codes = codes.detach()
        return y_LRO

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        weights_E, W_dec, bag_E, kept_E = ctx.saved_tensors
        codes = cast("SparseCodes", ctx.codes)
        grad_LRO = cast("Tensor", grads[0]).clone(memory_format=torch.contiguous_format)
        for level in reversed(range(grad_LRO.shape[0] - 1)):
            grad_LRO[level] += grad_LRO[level + 1]
        grad_BO = grad_LRO.flatten(0, 1)
        order = codes.latent_major()
        order = order._replace(rows=bag_E[order.order])
        grad_values = grad_W = None
        if ctx.needs_input_grad[0]:
            grad_values = entry_dots(grad_BO, W_dec, order).where(kept_E, 0.0).to(weights_E.dtype)
        if ctx.needs_input_grad[1]:
            grad_W = latent_bags(weights_E, order, grad_BO)
        return grad_values, grad_W, None, None
