"""The numbers of an evaluation: what each is called, how it is defined, and how it comes from sums.

Every number is a quotient of sums over positions, so it does not depend on how the text was cut into batches, and the sums
are kept for each window: resampling windows then says how far a number would move on other text of the same kind.

x is what a dictionary's output stands for at a position (its input, or a transcoder's target), x̂ the output, r = x - x̂,
E the mean over the positions that count, and CE the mean cross-entropy of next tokens in nats.
"""

# W windows, B resamples

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

__all__ = ["DEFINITIONS", "METRICS_VERSION", "Definition", "WindowSums", "intervals", "values"]

METRICS_VERSION = 1
"""Grows when a definition changes, so that numbers of different versions are not compared unknowingly."""

Sums = Mapping[str, Tensor]
"""Sums by name: scalars for all windows together, or (resamples,)."""


@final
@dataclass(frozen=True, kw_only=True)
class Definition:
    """One number: `name` in results, `label` for people, `text` the definition, `form` how it is printed.

    `needs` are the sums it is made of; it exists where all of them do. `better` is the direction of improvement, if any.
    """

    name: str
    label: str
    text: str
    needs: tuple[str, ...]
    compute: Callable[[Sums], Tensor]
    form: str = "{:.4f}"
    group: str = "reconstruction"


def _mean(name: str, over: str = "positions") -> Callable[[Sums], Tensor]:
    return lambda s: s[name] / s[over]


def _recovered(loss: str, ablated: str, clean: str | None = None) -> Callable[[Sums], Tensor]:
    """(ablated - loss) / (ablated - clean); without `clean` the best value is zero."""
    return lambda s: (s[ablated] - s[loss]) / (s[ablated] - (0 if clean is None else s[clean]))


def _d(
    name: str,
    label: str,
    text: str,
    needs: str,
    compute: Callable[[Sums], Tensor],
    form: str = "{:.4f}",
    group: str = "",
) -> Definition:
    return Definition(
        name=name, label=label, text=text, needs=tuple(needs.split()), compute=compute, form=form, group=group
    )


_R, _S, _M, _L = "reconstruction", "sparsity", "model", "saelens"
DEFINITIONS: tuple[Definition, ...] = (
    _d("explained_variance", "explained variance", "1 - E‖r‖² / E‖x - E x‖²",
       "positions error spread", lambda s: 1 - s["error"] / s["spread"], group=_R),
    _d("explained_variance_centered", "  forgiving a constant offset", "1 - E‖r - E r‖² / E‖x - E x‖²",
       "positions error error_of_mean spread",
       lambda s: 1 - (s["error"] - s["error_of_mean"]) / s["spread"], group=_R),
    _d("mse", "mean squared error", "E‖r‖², summed over the width", "positions error", _mean("error"), "{:.5g}", _R),
    _d("cosine_similarity", "cosine similarity", "E[x·x̂ / (‖x‖ ‖x̂‖)]; 0 where either is zero",
       "positions cosine", _mean("cosine"), group=_R),
    _d("l2_norm_in", "norm of x", "E‖x‖", "positions norm_in", _mean("norm_in"), "{:.5g}", _R),
    _d("l2_norm_out", "norm of x̂", "E‖x̂‖", "positions norm_out", _mean("norm_out"), "{:.5g}", _R),
    _d("l2_ratio", "shrinkage, norm of x̂ to norm of x", "E[‖x̂‖ / ‖x‖] over positions where x is not zero",
       "nonzero norm_ratio", _mean("norm_ratio", "nonzero"), group=_R),
    _d("relative_reconstruction_bias", "relative reconstruction bias",
       "E‖x̂‖² / E[x·x̂]: below 1 the outputs are too short (arXiv 2404.16014, eq. 10)",
       "positions square_out dot", lambda s: s["square_out"] / s["dot"], group=_R),
    _d("l0", "L0", "E[latents that are not zero]", "positions l0", _mean("l0"), "{:.2f}", _S),
    _d("l1", "L1", "E[sum of the latents' absolute values]", "positions l1", _mean("l1"), "{:.5g}", _S),
    _d("ce_clean", "cross-entropy, clean", "CE of the model as it is", "predictions ce_clean",
       _mean("ce_clean", "predictions"), group=_M),
    _d("ce", "cross-entropy", "CE with x̂ in place of x", "predictions ce", _mean("ce", "predictions"), group=_M),
    _d("ce_zero_ablation", "  with zeros", "CE with zeros in place of x", "predictions ce_zero",
       _mean("ce_zero", "predictions"), group=_M),
    _d("ce_mean_ablation", "  with the mean", "CE with E x in place of x", "predictions ce_mean",
       _mean("ce_mean", "predictions"), group=_M),
    _d("ce_recovered", "cross-entropy recovered", "(CE zeros - CE) / (CE zeros - CE clean)",
       "predictions ce ce_zero ce_clean", _recovered("ce", "ce_zero", "ce_clean"), group=_M),
    _d("ce_recovered_mean", "  beside the mean", "(CE mean - CE) / (CE mean - CE clean)",
       "predictions ce ce_mean ce_clean", _recovered("ce", "ce_mean", "ce_clean"), group=_M),
    _d("kl", "KL from the clean model", "E Σ p clean (log p clean - log p), in nats", "predictions kl",
       _mean("kl", "predictions"), group=_M),
    _d("kl_zero_ablation", "  with zeros", "the same with zeros in place of x", "predictions kl_zero",
       _mean("kl_zero", "predictions"), group=_M),
    _d("kl_mean_ablation", "  with the mean", "the same with E x in place of x", "predictions kl_mean",
       _mean("kl_mean", "predictions"), group=_M),
    _d("kl_recovered", "KL recovered", "(KL zeros - KL) / KL zeros", "predictions kl kl_zero",
       _recovered("kl", "kl_zero"), group=_M),
    _d("kl_recovered_mean", "  beside the mean", "(KL mean - KL) / KL mean", "predictions kl kl_mean",
       _recovered("kl", "kl_mean"), group=_M),
    _d("saelens.explained_variance_legacy", "explained_variance_legacy", "E[1 - ‖r‖² / ‖x - E x‖²]",
       "positions legacy", _mean("legacy"), group=_L),
    _d("saelens.ce_loss_without_sae", "ce_loss_without_sae",
       "mean CE over positions that count, whatever token comes next", "saelens_next saelens_ce_clean",
       _mean("saelens_ce_clean", "saelens_next"), group=_L),
    _d("saelens.ce_loss_with_sae", "ce_loss_with_sae", "the same with x̂ in place of x", "saelens_next saelens_ce",
       _mean("saelens_ce", "saelens_next"), group=_L),
    _d("saelens.ce_loss_with_ablation", "ce_loss_with_ablation", "the same with zeros at every position, BOS included",
       "saelens_next saelens_ce_zero", _mean("saelens_ce_zero", "saelens_next"), group=_L),
    _d("saelens.ce_loss_score", "ce_loss_score", "(with ablation - with SAE) / (with ablation - without SAE)",
       "saelens_ce saelens_ce_zero saelens_ce_clean",
       _recovered("saelens_ce", "saelens_ce_zero", "saelens_ce_clean"), group=_L),
    _d("saelens.kl_div_with_sae", "kl_div_with_sae",
       "KL from the clean model over positions that count, the last of a window included", "saelens_all saelens_kl",
       _mean("saelens_kl", "saelens_all"), group=_L),
    _d("saelens.kl_div_with_ablation", "kl_div_with_ablation", "the same with zeros at every position, BOS included",
       "saelens_all saelens_kl_zero", _mean("saelens_kl_zero", "saelens_all"), group=_L),
    _d("saelens.kl_div_score", "kl_div_score", "(with ablation - with SAE) / with ablation",
       "saelens_kl saelens_kl_zero", _recovered("saelens_kl", "saelens_kl_zero"), group=_L),
)  # fmt: skip
"""All numbers that are quotients of sums, in the order in which they are shown."""


@final
class WindowSums:
    """Sums over positions, for each window, by name; float64 on the CPU."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, windows: int, window_of: Tensor, quantities: Mapping[str, Tensor]) -> None:
        """Add a batch of `windows` windows: `window_of` (n,) is the window of each value of the quantities (n,)."""
        for name, quantity in quantities.items():
            sums = torch.zeros(windows, dtype=torch.float64)
            sums.index_add_(0, window_of, quantity.detach().to("cpu", torch.float64))
            self._parts.setdefault(name, []).append(sums)

    def by_window(self) -> dict[str, Tensor]:
        """(windows,) sums of each quantity."""
        return {name: torch.cat(parts) for name, parts in self._parts.items()}


def values(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """All numbers that these sums give: `sums` (windows,) by name, or scalars.

    >>> sums = {"positions": torch.tensor([2.0, 2.0]), "l0": torch.tensor([3.0, 5.0])}
    >>> values(sums)
    {'l0': 2.0}
    """
    totals = {name: value.double().sum() for name, value in sums.items()}
    return {d.name: float(d.compute(totals)) for d in DEFINITIONS if all(name in totals for name in d.needs)}


def intervals(
    sums: Mapping[str, Tensor], *, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Bootstrap confidence intervals of all numbers, by drawing windows with replacement (percentile method).

    The windows are those of `sums` (windows,); numbers that are not sums of windows keep none. Fewer than two windows give
    no interval.

    >>> sums = {"positions": torch.ones(400), "l0": torch.arange(400.0)}
    >>> low, high = intervals(sums)["l0"]
    >>> 180 < low < 199.5 < high < 220
    True
    """
    by_window = {name: value.double() for name, value in sums.items() if value.dim() == 1}
    windows = max((len(value) for value in by_window.values()), default=0)
    if windows < 2 or resamples < 1:
        return {}
    generator = torch.Generator().manual_seed(seed)
    resampled: dict[str, list[Tensor]] = {name: [] for name in by_window}
    table = torch.stack(list(by_window.values()), dim=1)
    for start in range(0, resamples, 64):  # a block of resamples at a time: memory does not follow the windows squared
        rows = min(64, resamples - start)
        drawn = torch.randint(windows, (rows, windows), generator=generator)
        counts = torch.zeros(rows, windows, dtype=torch.float64).scatter_add_(
            1, drawn, torch.ones(1).double().expand_as(drawn)
        )
        for name, column in zip(by_window, (counts @ table).T, strict=True):
            resampled[name].append(column)
    totals = {name: torch.cat(parts) for name, parts in resampled.items()}
    tail = (1 - level) / 2
    found: dict[str, tuple[float, float]] = {}
    for definition in DEFINITIONS:
        if all(name in totals for name in definition.needs):
            drawn_values = definition.compute(totals)
            drawn_values = drawn_values[torch.isfinite(drawn_values)]
            if len(drawn_values):
                low, high = torch.quantile(drawn_values, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
                found[definition.name] = (low, high)
    return found
