"""Matching pursuit: explain each row greedily, one latent at a time (Mallat & Zhang 1993; Costa et al. 2025, 2506.03093).

From the residual r, at first the row itself, the latent j with the largest projection takes what it explains:

    v = relu(r . w_j)        r <- r - v w_j

Rows finish one by one and leave the batch, so late steps cost what the last hard rows cost. Projections on all latents are
kept up to date by ``p <- p - v (w_j . W)``: the inner products of the dictionary with itself are computed once, if that
costs less than projecting anew. They only *choose* j; v is the exact projection of the residual that was carried along.

The backward pass stores no residuals. It starts from the last one and undoes step after step, r <- r + v w_j, while it
carries the gradient g of the residual: the step's value has the gradient dv = df_j - g . w_j, then

    dw_j += dv r - v g        g <- g + dv w_j
"""

# R rows, D d_in, F d_sae, E entries, S steps (all rows' steps laid end to end), N rows still active

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from sae_core.codes import SparseCodes

__all__ = ["PursuitLimits", "matching_pursuit"]

_GRAM_BYTES = 512 * 2**20  # no more memory than this for the inner products of the dictionary with itself
_GRAM_STEPS = 8  # a pursuit is assumed to take this many steps when the cost of those products is weighed
_BLOCK_BYTES = 32 * 2**20  # projections of one block of rows


@dataclass(frozen=True, slots=True)
class PursuitLimits:
    """When a row is finished: after `steps`, below a residual norm of `residual` (0: never for that reason), or, with
    `stop_on_repeat`, when a step chose a latent that was active already."""

    steps: int
    residual: float = 0.0
    stop_on_repeat: bool = True


def matching_pursuit(x_RD: Tensor, W_dec: Tensor, limits: PursuitLimits) -> SparseCodes:
    """Latents of every row, rows of any length; differentiable in `x_RD` and `W_dec` (d_sae, d_in).

    >>> codes = matching_pursuit(torch.tensor([[3.0, 1.0]]), torch.eye(2), PursuitLimits(steps=2))
    >>> codes.to_dense().tolist()
    [[3.0, 1.0]]
    """
    found: list[SparseCodes] = []
    values = cast("Tensor", _MatchingPursuit.apply(x_RD, W_dec, limits, found))
    return found[0].with_values(values)


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """One step of the rows that were still active: which (N,), the latents they chose (N,), the values (N,)."""

    rows: Tensor
    latents: Tensor
    values: Tensor


class _MatchingPursuit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, W_dec: Tensor, limits: PursuitLimits, found: list[SparseCodes]) -> Tensor:
        gram = W_dec @ W_dec.T if _gram_pays(x_RD.shape[0], W_dec, limits) else None
        residual_RD = x_RD.clone()
        steps: list[_Step] = []
        block = max(1, _BLOCK_BYTES // (W_dec.shape[0] * W_dec.element_size()))
        for rows in torch.arange(x_RD.shape[0], device=x_RD.device).split(block):
            steps.extend(_pursue(residual_RD, rows, W_dec, gram, limits))
        codes, entry_of_step = _collect(steps, x_RD.shape[0], W_dec.shape[0], x_RD)
        ctx.save_for_backward(residual_RD, W_dec, entry_of_step)
        ctx.steps = steps
        found.append(codes)
        return codes.values

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        final_RD, W_dec, entry_of_step = ctx.saved_tensors
        grad_steps = cast("Tensor", grads[0])[entry_of_step]
        residual_RD, grad_RD = final_RD.clone(), torch.zeros_like(final_RD)
        grad_W = torch.zeros_like(W_dec)
        end = grad_steps.numel()
        for step in reversed(cast("list[_Step]", ctx.steps)):
            start = end - step.rows.numel()
            w_ND, v_N = W_dec[step.latents], step.values.unsqueeze(-1)
            r_ND, g_ND = residual_RD[step.rows] + v_N * w_ND, grad_RD[step.rows]
            dv_N = grad_steps[start:end].unsqueeze(-1) - (g_ND * w_ND).sum(-1, keepdim=True)
            grad_W.index_add_(0, step.latents, dv_N * r_ND - v_N * g_ND)
            residual_RD[step.rows], grad_RD[step.rows] = r_ND, g_ND + dv_N * w_ND
            end = start
        return grad_RD, grad_W, None, None


def _gram_pays(rows: int, W_dec: Tensor, limits: PursuitLimits) -> bool:
    d_sae = W_dec.shape[0]
    fits = d_sae * d_sae * W_dec.element_size() <= _GRAM_BYTES
    return fits and d_sae <= rows * min(limits.steps, _GRAM_STEPS)


def _pursue(
    residual_RD: Tensor, rows: Tensor, W_dec: Tensor, gram: Tensor | None, limits: PursuitLimits
) -> list[_Step]:
    """All steps of one block of rows; `residual_RD` is left with what these rows do not explain."""
    steps: list[_Step] = []
    chosen = torch.zeros(rows.numel(), W_dec.shape[0], dtype=torch.bool, device=rows.device)
    projections = residual_RD[rows] @ W_dec.T
    for _ in range(limits.steps):
        latents = projections.argmax(-1)
        r_ND, w_ND = residual_RD[rows], W_dec[latents]
        v_N = (r_ND * w_ND).sum(-1)
        # A row whose largest projection is not positive is finished: nothing can change any more.
        active = v_N > 0
        r_ND = torch.where(active.unsqueeze(-1), r_ND - v_N.unsqueeze(-1) * w_ND, r_ND)
        residual_RD[rows] = r_ND
        goes_on = active
        if limits.stop_on_repeat:
            picked = latents.unsqueeze(-1)
            goes_on = goes_on & ~chosen.gather(-1, picked).squeeze(-1)
            chosen.scatter_(-1, picked, True)
        if limits.residual > 0:
            goes_on = goes_on & (r_ND.norm(dim=-1) >= limits.residual)
        steps.append(_Step(rows[active], latents[active], v_N[active]))
        left = goes_on.nonzero().squeeze(-1)
        if left.numel() == 0:
            break
        if left.numel() < rows.numel():
            rows, chosen, r_ND, latents, v_N = rows[left], chosen[left], r_ND[left], latents[left], v_N[left]
            projections = projections[left]
        if gram is None:
            projections = r_ND @ W_dec.T
        else:
            projections.addcmul_(gram[latents], v_N.unsqueeze(-1), value=-1)
    return steps


def _collect(steps: list[_Step], rows: int, d_sae: int, like: Tensor) -> tuple[SparseCodes, Tensor]:
    """Codes with one entry for each (row, latent), summed over repeats, and for every step the entry it went to."""
    nothing = torch.zeros(0, dtype=torch.long, device=like.device)
    row_S = torch.cat([step.rows for step in steps] or [nothing])
    latent_S = torch.cat([step.latents for step in steps] or [nothing])
    value_S = torch.cat([step.values for step in steps] or [like.new_zeros(0)])
    pair_E, entry_of_step = torch.unique(row_S * d_sae + latent_S, return_inverse=True)
    values = like.new_zeros(pair_E.numel()).index_add_(0, entry_of_step, value_S)
    return SparseCodes.of_rows(values, pair_E // d_sae, pair_E % d_sae, d_sae, (rows,)), entry_of_step
