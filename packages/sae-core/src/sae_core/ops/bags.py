"""Weighted sums over entries, and dot products at entries: the only loops over active latents that there are.

A step needs four sums over its entries e = (row, latent, value): decoded rows, the gradients of both weight matrices, and
the gradients of the values. None of them gathers an (entries, width) copy; each runs over the entries in the order in which
its *larger* operand is read or written once, front to back:

    row_bags     out[i] = sum over e of row i of     value_e W[latent e]        rows in order
    latent_bags  out[j] = sum over e of latent j of  value_e source[row e]      latents in order
    entry_dots   out_e  = a[row e] . b[latent e]                                latents in order, as b is the larger one

On a GPU they are Triton kernels where those can run (`sae_core.ops.device`), elsewhere torch's operations.
"""

# R rows, F d_sae, E entries, B bags, D a width

from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_core.codes import LatentMajor
from sae_core.ops.device import kernels_for

__all__ = ["entry_dots", "latent_bags", "row_bags"]


def row_bags(values_E: Tensor, indices_E: Tensor, offsets: Tensor, W_FD: Tensor) -> Tensor:
    """(bags, width): for every bag the sum over its entries of value times row `index` of `W_FD`.

    Bag i holds the entries from offsets[i] up to offsets[i + 1]; `offsets` is (bags + 1,).
    """
    if values_E.numel() == 0:
        return W_FD.new_zeros(offsets.numel() - 1, W_FD.shape[1])
    if (kernels := kernels_for(W_FD)) is not None:
        return kernels.row_bags(values_E, indices_E, offsets, W_FD)
    weights = values_E.to(W_FD.dtype)
    return F.embedding_bag(indices_E, W_FD, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def latent_bags(weights_E: Tensor, order: LatentMajor, source_RD: Tensor) -> Tensor:
    """(d_sae, width): for every latent the sum over its entries of weight times the row of `source_RD` it occurs in.

    `weights_E` are in the order of the codes, row by row.
    """
    shape = (order.offsets.numel() - 1, source_RD.shape[1])
    if weights_E.numel() == 0:
        return source_RD.new_zeros(shape)
    if (kernels := kernels_for(source_RD)) is not None:
        return kernels.latent_bags(weights_E, order, source_RD)
    weights = weights_E.to(source_RD.dtype)[order.order]
    if _has_sparse_product(source_RD):
        matrix = torch.sparse_csr_tensor(order.offsets, order.rows, weights, (shape[0], source_RD.shape[0]))
        out = source_RD.new_empty(shape)
        return torch.addmm(out, matrix, source_RD.contiguous(), beta=0, out=out)
    return F.embedding_bag(
        order.rows, source_RD, order.offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def entry_dots(a_RD: Tensor, b_FD: Tensor, order: LatentMajor) -> Tensor:
    """(entries,) dot products ``a[row] . b[latent]`` in the order of the codes, row by row."""
    if order.order.numel() == 0:
        return a_RD.new_empty(0)
    if (kernels := kernels_for(a_RD, b_FD)) is not None:
        return kernels.entry_dots(a_RD, b_FD, order)
    # The gradient of an embedding bag's weights is just this product; "gradient" and "bag" are b and its latent here.
    none = order.rows[:0]
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        b_FD.contiguous(), a_RD.contiguous(), order.rows, none, order.latents, 0
    )
    return torch.empty_like(dots).scatter_(0, order.order, dots)


def _has_sparse_product(like: Tensor) -> bool:
    return like.device.type == "cpu" and like.dtype in (torch.float32, torch.float64) and _mkl_sparse_works()


@functools.cache
def _mkl_sparse_works() -> bool:
    """Whether this build multiplies CSR matrices with MKL: it fills memory that exists, which embedding_bag cannot."""
    if not torch.backends.mkl.is_available():
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that CSR tensors are in beta; this is where it does
        matrix = torch.sparse_csr_tensor(torch.tensor([0, 0, 1]), torch.tensor([0]), torch.ones(1), (2, 1))
        out = torch.full((2, 1), float("nan"))
        try:
            torch.addmm(out, matrix, torch.ones(1, 1), beta=0, out=out)
        except RuntimeError:
            return False
    return out.flatten().tolist() == [0.0, 1.0]
