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

from collections.abc import Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from typing_extensions import TypeIs

from sae_core.codes import SparseCodes
from sae_core.errors import ConfigError
from sae_core.latent_ranks import current_ranks, read_by_all_ranks
from sae_core.ops.bags import latent_bags, row_bags
from sae_core.ops.dispatch import entries_pay_in
from sae_core.ops.gradient_sums import GradientSum, open_sum, weight_gradient
from sae_core.ops.mixed import dense_dtype, dense_product
from sae_core.ops.product import EncoderProduct
from sae_core.ops.screened import Screened
from sae_core.ops.screening import ask, is_screened
from sae_core.ops.select import CertifiedSelection, Selection, SelectsOverRanks
from sae_core.ops.whole_batch import whole_batch

__all__ = ["encode_dense", "encode_entries"]

_certified: WeakKeyDictionary[type, bool] = WeakKeyDictionary()


def encode_dense(x_RD: Tensor, centre_D: Tensor | None, W_FD: Tensor, b_F: Tensor) -> Tensor:
    """All pre-activations, (rows, d_sae), for small widths and dense codes; differentiable in all four tensors."""
    x_RD, centre_D = read_by_all_ranks(x_RD), None if centre_D is None else read_by_all_ranks(centre_D)
    return cast("Tensor", _EncodeDense.apply(x_RD, centre_D, W_FD, b_F))


def encode_entries(
    x_RD: Tensor,
    centre_D: Tensor | None,
    W_FD: Tensor,
    b_F: Tensor,
    selection: Selection,
) -> SparseCodes:
    """Pre-activations of the selected entries, as codes whose values carry gradient to all four tensors.

    Where the hardware is made for it, or whoever calls asks for it by `encoder_products`, the large product is screened: it
    runs in bfloat16, gives bounds instead of values, and the selection is made among values in float32 nevertheless.

    Where latents are shared out over ranks, the selection is made among those of all, and what it keeps of this rank's is here.
    """
    x_RD, centre_D = read_by_all_ranks(x_RD), None if centre_D is None else read_by_all_ranks(centre_D)
    selected: list[SparseCodes] = []
    values = cast("Tensor", _EncodeEntries.apply(x_RD, centre_D, W_FD, b_F, selection, selected))
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
        centred, W_FD = ctx.saved_tensors
        return _gradients(cast("Tensor", grads[0]), centred, W_FD, ctx.needs_input_grad, ctx.sum, ctx.dtype)


class _EncodeEntries(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        centre_D: Tensor | None,
        W_FD: Tensor,
        b_F: Tensor,
        selection: Selection,
        selected: list[SparseCodes],
    ) -> Tensor:
        centred = x_RD if centre_D is None else x_RD - centre_D
        codes = _chosen(centred, W_FD, b_F, selection)
        ctx.save_for_backward(centred, W_FD)
        ctx.codes = codes  # shared with the caller, so that encoder and decoder sort the entries once between them
        selected.append(codes)
        return codes.values

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_values = cast("Tensor", grads[0])
        centred, W_FD = ctx.saved_tensors
        codes = cast("SparseCodes", ctx.codes)
        if not entries_pay_in(codes, W_FD):
            grad_RF = codes.with_values(grad_values).to_dense().view(codes.rows, codes.d_sae)
            return *_gradients(grad_RF, centred, W_FD, ctx.needs_input_grad), None, None
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
        return grad_x, grad_centre, grad_W, grad_b, None, None


def _gradients(
    grad_RF: Tensor,
    centred: Tensor,
    W_FD: Tensor,
    needs: Sequence[bool],
    into: GradientSum | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Those of x, centre, W and b, from the gradient of all pre-activations."""
    needs_x, needs_centre, needs_W, needs_b, *_rest = needs
    grad_x = grad_centre = grad_W = grad_b = None
    if needs_W:
        grad_W = weight_gradient(grad_RF, centred, into, dtype)
    if needs_b or needs_centre:
        grad_b = grad_RF.sum(0)
    if needs_centre and grad_b is not None:
        grad_centre = -(grad_b @ W_FD)
    if needs_x:
        grad_x = dense_product(grad_RF, W_FD, dtype)
    return grad_x, grad_centre, None if into else grad_W, grad_b


def _chosen(centred: Tensor, W_FD: Tensor, b_F: Tensor, selection: Selection) -> SparseCodes:
    ranks = current_ranks()
    if ranks is None:
        return _chosen_here(centred, W_FD, b_F, selection)
    if not isinstance(selection, SelectsOverRanks):
        raise ConfigError(
            f"{type(selection).__name__}: this selection does not say what stays of it among the latents of all ranks; give it "
            "the method over_ranks, or keep all latents on one rank"
        )
    if not len(W_FD):  # of dead latents, say, a rank may have none
        none = centred.new_zeros(len(centred), 0, dtype=W_FD.dtype)
        return selection.over_ranks(SparseCodes.regular(none, none.long(), 0), ranks)
    return selection.over_ranks(_chosen_here(centred, W_FD, b_F, selection), ranks)


def _chosen_here(centred: Tensor, W_FD: Tensor, b_F: Tensor, selection: Selection) -> SparseCodes:
    if _is_certified(selection):
        ask()
        if is_screened(
            rows=whole_batch().typical(centred.shape[0]),  # ranks choose alike
            d_sae=W_FD.shape[0],
            d_in=W_FD.shape[1],
            wanted=selection.wanted,
            dtype=torch.promote_types(centred.dtype, W_FD.dtype),
            device=centred.device,
        ):
            return selection.screen(Screened(centred, W_FD, b_F, scale=selection.scale, threshold=selection.threshold))
    return selection(EncoderProduct(centred, W_FD, b_F))


def _is_certified(selection: Selection) -> TypeIs[CertifiedSelection]:
    """Asked once for every class, as asking a protocol takes longer than a small selection's Python."""
    kind = type(selection)
    if kind not in _certified:
        _certified[kind] = isinstance(selection, CertifiedSelection)
    return _certified[kind]
