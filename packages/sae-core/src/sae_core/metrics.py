"""How good a dictionary is, measured over a stream: one small class a metric, each with its definition.

x is an input row, x̂ its reconstruction (or, for a transcoder, the target and the prediction), f its latents, E the mean
over all rows seen. Sums are kept in float64 and no metric keeps rows, so the result is that of one big batch whatever
the batches were. `update` takes any leading shape.

Two formulas go by the name explained variance, and this module has both:

- `ExplainedVariance`: 1 - E‖x - x̂‖² / E‖x - E x‖². What is left of the squared error against always answering the mean.
  This is the number meant wherever the project says explained variance.
- `ExplainedVariance` also reports ``explained_variance_centered``: 1 - E‖r - E r‖² / E‖x - E x‖² with r = x - x̂. It
  forgives a constant offset, so a gap between the two is a bias in the reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from sae_core.codes import SparseCodes
from sae_core.errors import ShapeError

__all__ = ["L0", "CosineSimilarity", "DeadFraction", "ExplainedVariance", "MeanSquaredError"]


@final
class ExplainedVariance:
    """1 - E‖x - x̂‖² / E‖x - E x‖², and the same with the residual centred; NaN while the inputs have no variance.

    >>> metric, x = ExplainedVariance(), torch.tensor([[0.0, 1.0], [2.0, 5.0]])
    >>> metric.update(x, x.mean(0).expand(2, 2), None)
    >>> metric.compute()["explained_variance"]
    0.0
    """

    order_independent: ClassVar[bool] = True

    def __init__(self) -> None:
        self._inputs = _Spread()
        self._residuals = _Spread()

    def update(self, inputs: Tensor, outputs: Tensor, codes: Any) -> None:
        """Add rows: `inputs` and `outputs` of shape (..., d)."""
        x, reconstruction = _rows(inputs, outputs)
        self._inputs.add(x)
        self._residuals.add(x - reconstruction)

    def compute(self) -> Mapping[str, float]:
        """``explained_variance`` and ``explained_variance_centered``."""
        total = self._inputs.about_mean()
        return {
            "explained_variance": 1 - _ratio(self._residuals.about_zero(), total),
            "explained_variance_centered": 1 - _ratio(self._residuals.about_mean(), total),
        }


@final
class MeanSquaredError:
    """E‖x - x̂‖²: squared error summed over the width, averaged over rows."""

    order_independent: ClassVar[bool] = True

    def __init__(self) -> None:
        self._sum = 0.0
        self._count = 0

    def update(self, inputs: Tensor, outputs: Tensor, codes: Any) -> None:
        """Add rows: `inputs` and `outputs` of shape (..., d)."""
        x, reconstruction = _rows(inputs, outputs)
        self._sum += (x - reconstruction).square().sum().item()
        self._count += len(x)

    def compute(self) -> Mapping[str, float]:
        """``mse``."""
        return {"mse": _ratio(self._sum, self._count)}


@final
class CosineSimilarity:
    """E[x·x̂ / (‖x‖ ‖x̂‖)]; a row where either is zero counts as 0."""

    order_independent: ClassVar[bool] = True

    def __init__(self) -> None:
        self._sum = 0.0
        self._count = 0

    def update(self, inputs: Tensor, outputs: Tensor, codes: Any) -> None:
        """Add rows: `inputs` and `outputs` of shape (..., d)."""
        x, reconstruction = _rows(inputs, outputs)
        norms = x.norm(dim=1) * reconstruction.norm(dim=1)
        products = (x * reconstruction).sum(1)
        self._sum += torch.where(norms > 0, products / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0.0).sum().item()
        self._count += len(x)

    def compute(self) -> Mapping[str, float]:
        """``cosine_similarity``."""
        return {"cosine_similarity": _ratio(self._sum, self._count)}


@final
class L0:
    """E[number of latents that are not zero].

    >>> metric = L0()
    >>> metric.update(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([[0.0, 1.0], [0.5, -2.0]]))
    >>> metric.compute()
    {'l0': 1.5}
    """

    order_independent: ClassVar[bool] = True

    def __init__(self) -> None:
        self._sum = 0
        self._count = 0

    def update(self, inputs: Tensor, outputs: Tensor, codes: Any) -> None:
        """Add rows: `codes` is SparseCodes or a dense tensor (..., d_sae)."""
        sparse = _sparse(codes)
        self._sum += int((sparse.values != 0).sum())
        self._count += sparse.rows

    def compute(self) -> Mapping[str, float]:
        """``l0``."""
        return {"l0": _ratio(self._sum, self._count)}


@final
class DeadFraction:
    """The fraction of latents that were zero in every row seen. It falls as rows are added.

    `density` is the other side of the same counts: (d_sae,), the fraction of rows in which each latent is not zero.
    """

    order_independent: ClassVar[bool] = True

    def __init__(self) -> None:
        self._counts: Tensor | None = None
        self._rows = 0

    def update(self, inputs: Tensor, outputs: Tensor, codes: Any) -> None:
        """Add rows: `codes` is SparseCodes or a dense tensor (..., d_sae)."""
        sparse = _sparse(codes)
        counts = sparse.firing_counts()
        if self._counts is None:
            self._counts = torch.zeros_like(counts)
        elif self._counts.shape != counts.shape:
            raise ShapeError(f"dead fraction: codes of {sparse.d_sae} latents after codes of {len(self._counts)}")
        self._counts += counts
        self._rows += sparse.rows

    @property
    def density(self) -> Tensor:
        """(d_sae,) float64 firing frequencies; empty before the first row."""
        counts = torch.zeros(0) if self._counts is None else self._counts
        return counts.double() / max(self._rows, 1)

    def compute(self) -> Mapping[str, float]:
        """``dead_fraction``."""
        if self._counts is None:
            return {"dead_fraction": math.nan}
        return {"dead_fraction": (self._counts == 0).double().mean().item()}


@final
class _Spread:
    """Sums that give E‖v‖² and E‖v - E v‖² of a stream of rows v.

    Rows are measured from the first batch's mean. Otherwise the difference of two huge sums would be lost to rounding
    where the mean dwarfs the variance, as it does in a residual stream.
    """

    def __init__(self) -> None:
        self._origin: Tensor | None = None
        self._sum: Tensor | None = None
        self._squares = 0.0
        self._squares_about_zero = 0.0
        self._count = 0

    def add(self, rows: Tensor) -> None:
        if len(rows) == 0:
            return
        if self._origin is None or self._sum is None:
            self._origin = rows.mean(0)
            self._sum = torch.zeros_like(self._origin)
        moved = rows - self._origin
        self._sum += moved.sum(0)
        self._squares += moved.square().sum().item()
        self._squares_about_zero += rows.square().sum().item()
        self._count += len(rows)

    def about_zero(self) -> float:
        return _ratio(self._squares_about_zero, self._count)

    def about_mean(self) -> float:
        if self._sum is None:
            return math.nan
        return self._squares / self._count - (self._sum / self._count).square().sum().item()


def _rows(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (rows, d) in float64, on the CPU where the device has no float64."""
    if inputs.shape != outputs.shape:
        raise ShapeError(f"metric: inputs {tuple(inputs.shape)} and outputs {tuple(outputs.shape)} differ in shape")
    x, y = (t.detach().reshape(-1, t.shape[-1]) for t in (inputs, outputs))
    if x.device.type == "mps":
        x, y = x.cpu(), y.cpu()
    return x.double(), y.double()


def _sparse(codes: Any) -> SparseCodes:
    return codes.detach() if isinstance(codes, SparseCodes) else SparseCodes.from_dense(codes.detach())


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
