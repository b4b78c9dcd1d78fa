"""Scores of a dictionary against the truth: pure functions, and streaming ones that are fed batch by batch.

Everything that looks at activations takes dense tensors or `SparseCodes`, and works on the active entries only. A latent
is active where its value is not zero (AbsTopK has negative ones), a true feature where it is positive.
"""

# B rows, F latents, N true features, D width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from sae_core import SAE, SparseCodes
from sae_core.config import require
from sae_core.errors import DataError, ShapeError
from torch import Tensor

from sae_synthetic.features import cosine_similarities
from sae_synthetic.matching import mean_correlation_coefficient

__all__ = [
    "ClassificationMetrics",
    "ClassificationMetricsCalculator",
    "DeadLatentsCalculator",
    "ExplainedVarianceCalculator",
    "L0Calculator",
    "SeedConsistency",
    "ShrinkageCalculator",
    "best_matches",
    "compute_classification_metrics",
    "decoder_projection",
    "feature_uniqueness",
    "seed_consistency",
]

_ROWS_AT_ONCE = 4096


def best_matches(sae_features: Tensor, gt_features: Tensor) -> Tensor:
    """(F,) the true feature whose direction has the largest absolute cosine with each latent's; several may share one."""
    if not len(gt_features):
        raise ShapeError("best_matches: there are no true features to match latents with")
    parts = [cosine_similarities(part, gt_features).abs().argmax(dim=1) for part in sae_features.split(_ROWS_AT_ONCE)]
    return torch.cat(parts)


def feature_uniqueness(sae_features: Tensor, gt_features: Tensor) -> float:
    """Distinct best matches per latent: 1 when no two latents (F, D) are nearest to the same true feature (N, D), 0 for none.

    >>> feature_uniqueness(torch.tensor([[1.0, 0.0], [2.0, 0.1]]), torch.eye(2))
    0.5
    """
    return len(best_matches(sae_features, gt_features).unique()) / max(len(sae_features), 1)


@dataclass(frozen=True)
class SeedConsistency:
    """`pairwise` (runs, runs) holds the MCC between runs, `mean` its average over different runs."""

    mean: float
    pairwise: Tensor


def seed_consistency(dictionaries: Sequence[Tensor], signed: bool = True) -> SeedConsistency:
    """How alike dictionaries (F, D) of several runs are: the mean MCC of all pairs (PW-MCC, arXiv 2505.20254).

    >>> seed_consistency([torch.eye(3), torch.eye(3).flip(0)]).mean
    1.0
    """
    require(len(dictionaries) >= 2, f"seed_consistency needs at least 2 dictionaries, found {len(dictionaries)}")
    pairwise = torch.eye(len(dictionaries))
    for i, one in enumerate(dictionaries):
        for j in range(i):
            pairwise[i, j] = pairwise[j, i] = mean_correlation_coefficient(one, dictionaries[j], signed)
    different = ~torch.eye(len(dictionaries), dtype=torch.bool)
    return SeedConsistency(float(pairwise[different].double().mean()), pairwise)


@torch.no_grad()
def decoder_projection(sae: SAE, hidden_acts: Tensor, n: int) -> float:
    """The n-th decoder projection s_n^dec (arXiv 2508.16560), small where the sparsity of training was right.

    The products of `hidden_acts` - b_dec (B, D) with the unit decoder directions, all rows together in descending order,
    at place n B. Choose `n` a little above every L0 that is compared. Raises ConfigError unless 0 <= n < d_sae.
    """
    require(0 <= n < sae.d_sae, f"decoder_projection: n must be in [0, {sae.d_sae}), not {n}")
    directions = torch.nn.functional.normalize(sae.directions().float(), dim=1)
    projections = (sae.prepare(hidden_acts).z.float() - sae.offset().float()) @ directions.T
    place = projections.numel() - n * len(projections)  # the place counted from the smallest, which kthvalue wants
    return float(torch.kthvalue(projections.flatten(), place).values)


@final
class L0Calculator:
    """Mean number of active entries a row."""

    def __init__(self) -> None:
        self._active = self._rows = 0

    def add_batch(self, activations: Tensor | SparseCodes) -> None:
        """Account for activations (B, anything)."""
        codes = _codes(activations)
        self._active += int((codes.values != 0).sum())
        self._rows += codes.rows

    def compute(self) -> float:
        """The mean. Raises DataError when nothing was added."""
        return self._active / _seen(self._rows)


@final
class DeadLatentsCalculator:
    """Number of latents that were never active."""

    def __init__(self, num_latents: int) -> None:
        self._fired = torch.zeros(num_latents, dtype=torch.bool)

    def add_batch(self, sae_latents: Tensor | SparseCodes) -> None:
        """Account for latents (B, num_latents)."""
        codes = _codes(sae_latents)
        if codes.d_sae != len(self._fired):
            raise ShapeError(f"DeadLatentsCalculator: {codes.d_sae} latents, made for {len(self._fired)}")
        self._fired[codes.indices[codes.values != 0].cpu()] = True

    def compute(self) -> int:
        """The number."""
        return int((~self._fired).sum())


@final
class ShrinkageCalculator:
    """Mean of |reconstruction| / |input| over inputs longer than `min_input_norm`; below 1 the SAE shrinks."""

    def __init__(self, min_input_norm: float = 1e-6) -> None:
        self._least = min_input_norm
        self._sum, self._rows = 0.0, 0

    def add_batch(self, sae_output: Tensor, hidden_acts: Tensor) -> None:
        """Account for reconstructions and inputs, both (B, D)."""
        norms = hidden_acts.double().norm(dim=-1)
        kept = norms > self._least
        self._sum += float((sae_output.double().norm(dim=-1)[kept] / norms[kept]).sum())
        self._rows += int(kept.sum())

    def compute(self) -> float:
        """The mean. Raises DataError when no input was long enough."""
        return self._sum / _seen(self._rows)


@final
class ExplainedVarianceCalculator:
    """1 - sum |y - x|^2 / sum |x - mean x|^2 over everything added."""

    def __init__(self) -> None:
        self._shift: Tensor | None = None
        self._sum: Tensor | None = None
        self._squares = self._residual = 0.0
        self._rows = 0

    def add_batch(self, sae_output: Tensor, hidden_acts: Tensor) -> None:
        """Account for reconstructions and inputs, both (B, D)."""
        x_BD = hidden_acts.double()
        if not len(x_BD):
            return
        if self._shift is None or self._sum is None:
            self._shift, self._sum = x_BD.mean(dim=0), torch.zeros_like(x_BD[0])
        centred = x_BD - self._shift  # by the first batch's mean, so that the squares stay small
        self._sum += centred.sum(dim=0)
        self._squares += float(centred.square().sum())
        self._residual += float((sae_output.double() - x_BD).square().sum())
        self._rows += len(x_BD)

    def compute(self) -> float:
        """The explained variance; NaN for inputs that do not vary. Raises DataError when nothing was added."""
        _seen(self._rows)
        assert self._sum is not None
        variance = self._squares - float(self._sum.square().sum()) / self._rows
        return 1 - self._residual / variance if variance > 0 else float("nan")


@dataclass(frozen=True)
class ClassificationMetrics:
    """How well latents, taken as detectors of their matched features, do: means over latents."""

    precision: float
    recall: float
    f1_score: float
    accuracy: float


@final
class ClassificationMetricsCalculator:
    """Precision, recall, F1 and accuracy of every latent as a detector of the true feature it points at most.

    `sae_decoder` (F, D), `gt_features` (N, D). `matches` (F,) replaces the default, the largest absolute cosine. A ratio
    whose denominator is zero counts as 0, so a latent that never fires has precision, recall and F1 of 0.
    """

    def __init__(self, sae_decoder: Tensor, gt_features: Tensor, matches: Tensor | None = None) -> None:
        self.matches = (best_matches(sae_decoder.detach(), gt_features.detach()) if matches is None else matches).cpu()
        self._num_features = len(gt_features)
        num_latents = len(sae_decoder)
        self._true_positives = torch.zeros(num_latents, dtype=torch.long)
        self._fired = torch.zeros(num_latents, dtype=torch.long)
        self._present = torch.zeros(self._num_features, dtype=torch.long)
        self._rows = 0

    def add_batch(self, sae_latents: Tensor | SparseCodes, gt_feature_acts: Tensor | SparseCodes) -> None:
        """Account for latents (B, F) and the true activations (B, N) of the same rows."""
        latents, truth = _codes(sae_latents), _codes(gt_feature_acts)
        if latents.rows != truth.rows or latents.d_sae != len(self._fired) or truth.d_sae != self._num_features:
            raise ShapeError(
                f"classification: latents {latents.shape} and features {truth.shape} do not fit "
                f"(rows, {len(self._fired)}) and (rows, {self._num_features})"
            )
        rows, fired = _entries(latents, latents.values != 0)
        truth_rows, present = _entries(truth, truth.values > 0)
        keys = torch.sort(truth_rows * self._num_features + present).values
        wanted = rows * self._num_features + self.matches[fired]
        place = torch.searchsorted(keys, wanted)
        hit = place < len(keys)
        hit[hit.clone()] = keys[place[hit]] == wanted[hit]
        self._true_positives += torch.bincount(fired[hit], minlength=len(self._fired))
        self._fired += torch.bincount(fired, minlength=len(self._fired))
        self._present += torch.bincount(present, minlength=self._num_features)
        self._rows += latents.rows

    def per_latent(self) -> dict[str, Tensor]:
        """precision, recall, f1_score and accuracy, each (F,). Raises DataError when nothing was added."""
        rows = _seen(self._rows)
        hits, fired = self._true_positives.double(), self._fired.double()
        present = self._present[self.matches].double()
        precision, recall = _ratio(hits, fired), _ratio(hits, present)
        return {
            "precision": precision,
            "recall": recall,
            "f1_score": _ratio(2 * hits, fired + present),
            "accuracy": 1 - (fired + present - 2 * hits) / rows,
        }

    def compute(self) -> ClassificationMetrics:
        """Means over latents; 0 where there are none."""
        means = {name: float(values.sum()) / max(len(values), 1) for name, values in self.per_latent().items()}
        return ClassificationMetrics(**means)


def compute_classification_metrics(
    sae_latents: Tensor | SparseCodes, gt_feature_acts: Tensor | SparseCodes, sae_decoder: Tensor, gt_features: Tensor
) -> ClassificationMetrics:
    """The metrics of one batch; see `ClassificationMetricsCalculator`."""
    calculator = ClassificationMetricsCalculator(sae_decoder, gt_features)
    calculator.add_batch(sae_latents, gt_feature_acts)
    return calculator.compute()


def _codes(activations: Tensor | SparseCodes) -> SparseCodes:
    if isinstance(activations, SparseCodes):
        return activations
    if not activations.shape[-1]:  # no columns, so no entries
        empty = activations.new_zeros(0)
        return SparseCodes(empty, empty.long(), tuple(activations.shape[:-1]), 0, k=0)
    return SparseCodes.from_dense(activations.to_dense() if activations.is_sparse else activations)


def _entries(codes: SparseCodes, active: Tensor) -> tuple[Tensor, Tensor]:
    """(entries,) rows and (entries,) columns of the active entries, on the CPU."""
    return codes.row_ids()[active].cpu(), codes.indices[active].cpu()


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator.clamp_min(1), 0.0)


def _seen(rows: int) -> int:
    if not rows:
        raise DataError("no batch was added, so there is nothing to compute")
    return rows
