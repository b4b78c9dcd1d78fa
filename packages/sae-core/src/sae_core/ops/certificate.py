"""What a product in bfloat16 says for certain about the same product in float32.

Let c be a row (D numbers in float32), w a latent's weights, b its bias, s >= 0 what it is ranked by and t what is subtracted
from its rank; c^ and w^ are c and s w in bfloat16. In real numbers

    s (c.w + b) - t  =  c^.w^ + (c - c^).(s w) + c^.(s w - w^) + (s b - t)

and by Cauchy and Schwarz the two terms in the middle are at most

    a p + n q         a = |c - c^|   n = |c^|   p = |s w|   q = |s w - w^|

Residuals are measured, not assumed to be as large as rounding may make them, and every norm is computed such that it is no
less than the true one (`norms_above`). Three more errors are to be covered:

-   The value in float32 that decides later is rounded too. Whatever the order of its sum, fused or not, it lies within
    g (|c| |s w| + |s b|) of the real one, g = gamma(D + 3) of float32, gamma(m) = m u / (1 - m u) (Higham 2002, sections
    3.1 and 4.2); |c| <= n + a.
-   The product in bfloat16 is summed up in float32 by the hardware. On a processor an addition errs by at most 2^-23 of its
    result, whether it rounds or cuts off; on a GPU several products are aligned to the largest and cut off (Fasi et al. 2021,
    PeerJ CS 7:e330), which is at most 2^-22 a term of the sum of absolute values. That is y times that sum.
-   Its result is rounded to bfloat16 where the hardware does not give float32: `Rounding.above` adds that where values are
    compared.

All this is put into four more columns of the product, so that **the product itself gives an upper bound**:

    U  =  c^.w^  +  a p'  +  n q'  +  1 b1  +  1 b2        p' = (p + g (p + q)) (1 + 2 y)
                                                          q' = (q + (g + y)(p + q)) (1 + 2 y)
                                                          b1 + b2 >= s b - t + its rounding

each of them rounded up to bfloat16. The last factor pays for the rounding of these columns themselves: y (a p' + n q') is in
it. Nothing here underflows unnoticed: hardware takes numbers below 2^-126 for zero, which is less than `Rows.tiny` for a whole
row; rows so large that anything may overflow, or that are not finite, have no certificate (`Rows.usable`).
"""

# R rows, D d_in, F d_sae

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

__all__ = ["COLUMNS", "Latents", "Rounding", "Rows", "gamma", "norms_above", "rounded_up"]

LOW = torch.bfloat16
COLUMNS = 8  # beside those of the weights: four are used, and with eight a GPU's tensor cores are fed
_UNIT = 2.0**-24  # of float32
_SUM_UNITS = {"cpu": 2.0**-23}  # an addition inside the product, by kind of device
_ANY_SUM_UNIT = 2.0**-22
_SMALLEST = 2.0**-120  # of what may be taken for zero, with room for some sixty of them
_LARGEST = 2.0**100
_CAST_ROWS = 1024


def gamma(terms: int, unit: float) -> float:
    """How far a sum of products may be from the real one, as a fraction of the sum of absolute values, after `terms`
    roundings of relative size `unit` one after the other.

    >>> gamma(1, 2.0**-24) > 2.0**-24
    True
    """
    return terms * unit / (1 - terms * unit)


def norms_above(x_ND: Tensor) -> Tensor:
    """(N,) Euclidean norms of rows of float32, no less than the true ones: squares that underflow are paid for.

    >>> norms_above(torch.tensor([[3.0, 4.0]])).item() >= 5
    True
    >>> norms_above(torch.full((1, 4), 1e-30)).item() >= 2e-30
    True
    """
    width = x_ND.shape[-1]
    norms = torch.linalg.vector_norm(x_ND, dim=-1)
    return norms * (1 + gamma(width + 8, _UNIT)) + width**0.5 * 2.0**-62


def rounded_up(x: Tensor) -> Tensor:
    """Numbers of bfloat16, no less than those given and at most a sixty-fourth of their size above them.

    >>> x = torch.tensor([1.001, -1.001])
    >>> bool((rounded_up(x).float() >= x).all())
    True
    """
    return (x + 2.0**-7 * x.abs()).to(LOW)


@final
@dataclass(frozen=True, slots=True)
class Rounding:
    """How the product rounds: `width` terms are added with errors of `sum_unit`, results have errors of `result_unit`."""

    width: int
    sum_unit: float
    result_unit: float

    @classmethod
    def of(cls, d_in: int, device: torch.device, result: torch.dtype) -> Rounding:
        """That of a product over `d_in` on this kind of device, whose result has this type."""
        unit = 2.0**-8 if result == LOW else _UNIT
        return cls(d_in, _SUM_UNITS.get(device.type, _ANY_SUM_UNIT), unit)

    @property
    def exact(self) -> float:
        """g: the error of a value in float32, as a fraction of the product of norms."""
        return gamma(self.width + 3, _UNIT)

    @property
    def summed(self) -> float:
        """y: the error of the sum inside the product, as a fraction of the sum of absolute values."""
        return gamma(self.width + COLUMNS + 1, self.sum_unit)

    def above(self, results: Tensor, times: int = 1) -> Tensor:
        """What results of the product were at most before they were rounded, `times` times; in float32.

        >>> Rounding(8, 2.0**-23, 2.0**-8).above(torch.tensor([1.0])).item() > 1 + 2.0**-8
        True
        """
        results = results.float().clamp(min=-3e38)
        return results + self._slack(times) * results.abs()

    def beneath(self, results: Tensor, times: int = 1) -> Tensor:
        """What they were at least."""
        results = results.float().clamp(max=3e38)
        return results - self._slack(times) * results.abs()

    def _slack(self, times: int) -> float:
        return times * self.result_unit * (1 + 2.0**-10) + 2.0**-22


class Rows(NamedTuple):
    """Of every row (R,): the norms `a` and `n`, how much at most was taken for zero, `tiny`, and whether it is `usable`."""

    a: Tensor
    n: Tensor
    tiny: Tensor
    usable: Tensor

    @classmethod
    def of(cls, c_RD: Tensor, low_RD: Tensor, latents: Latents) -> Rows:
        """Of rows in float32 and in bfloat16."""
        low = low_RD.float()
        n = norms_above(low)
        a = norms_above(low.neg_().add_(c_RD))  # exact: both are multiples of the last place of the finer one
        size, width = n + a, c_RD.shape[-1] + COLUMNS
        tiny = _SMALLEST * (width + width**0.5 * (latents.largest + size)) * (1 + latents.largest_scale)
        usable = (size + 1) * (latents.largest + 1) < _LARGEST
        return cls(a, n, tiny, usable)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Latents:
    """Of every latent: its columns `low` (F, D + COLUMNS) of the product, and what bounds its error.

    `p` and `q` (F,) are those of the columns, `spread` (F,) is how far b1 + b2 lies above s b - t. `largest` and
    `largest_scale` are the largest norm and scale, tensors without dimensions.
    """

    low: Tensor
    p: Tensor
    q: Tensor
    spread: Tensor
    largest: Tensor
    largest_scale: Tensor

    @classmethod
    def of(
        cls, W_FD: Tensor, b_F: Tensor, scale: Tensor | None, threshold: Tensor | float | None, rounding: Rounding
    ) -> Latents:
        """Of weights and biases in float32. No copy in full precision is made on the way."""
        d_sae, width = W_FD.shape
        low = W_FD.new_zeros(d_sae, width + COLUMNS, dtype=LOW)
        p, q, raw = W_FD.new_empty(d_sae), W_FD.new_empty(d_sae), W_FD.new_zeros(d_sae)
        for start in range(0, d_sae, _CAST_ROWS):
            part = slice(start, start + _CAST_ROWS)
            weights = W_FD[part]
            if scale is not None:
                raw[part] = norms_above(weights)
                weights = weights * scale[part].unsqueeze(-1)
            p[part] = norms_above(weights)
            low[part, :width] = weights
            q[part] = norms_above(weights - low[part, :width])
        if scale is not None:  # s w itself was rounded
            p, q = p * (1 + 2.0**-22), q + 2.0**-22 * p
        g, y = rounding.exact, rounding.summed
        p_up = rounded_up((p + g * (p + q)) * (1 + 2 * y))
        q_up = rounded_up((q + (g + y) * (p + q)) * (1 + 2 * y))
        scaled = b_F if scale is None else b_F * scale
        shift = scaled if threshold is None else scaled - threshold
        size = scaled.abs() + shift.abs() + (0.0 if threshold is None else (scaled - shift).abs())
        known = shift.isfinite()
        b1 = shift.to(LOW)
        b2 = rounded_up(torch.where(known, (shift - b1) + 2 * (g + y + 2.0**-22) * size, 0.0))
        for column, values in enumerate((p_up, q_up, b1, b2), start=width):
            low[:, column] = values
        spread = torch.where(known, ((b1 - shift) + b2) * (1 + 2.0**-8), 0.0)
        sizes = p + q + p_up + q_up + torch.where(known, size, 0.0) + raw
        none = W_FD.new_zeros(())
        largest = sizes.amax() if d_sae else none
        return cls(
            low, p_up.float(), q_up.float(), spread, largest, none if scale is None or not d_sae else scale.amax()
        )
