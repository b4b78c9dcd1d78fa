"""What is added up for one candidate of an evaluation, and the losses of one run of a model.

`Scores` compares a candidate's outputs with what they stand for, position by position, and counts its latents; `Losses` are the
cross-entropies of next tokens in one run, and the KL divergence from the clean one.
"""

# K positions that count, P = windows * positions, V vocabulary, W widths

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from sae_core import SAE
from sae_core.codes import SparseCodes
from sae_core.errors import DataError
from sae_core.protocols import Metric
from torch import Tensor
from torch.nn import functional

from sae_lm.latents import select_rows
from sae_lm.metrics import WindowSums
from sae_lm.places import Route
from sae_lm.results import Latents
from sae_lm.tokens import TokenRules, Windows

__all__ = ["Calibration", "Candidate", "Counted", "Losses", "Reconstruct", "Scores"]

_LOGITS_AT_ONCE = 256  # rows of float32 log-probabilities in work at a time: they are as wide as the vocabulary


class Reconstruct(Protocol):
    """Maps activations (rows, d_in) to what stands in for them (rows, d_out), and to the codes between if there are any."""

    def __call__(self, x: Tensor, /) -> tuple[Tensor, SparseCodes | None]: ...


@final
@dataclass(frozen=True, eq=False)
class Calibration:
    """What the first pass found at the places of a route: rows (n, d_in) and (n, d_out), and the mean of all targets."""

    inputs: Tensor
    targets: Tensor
    mean: Tensor


@final
@dataclass(frozen=True, eq=False)
class Candidate:
    """Something to evaluate: where it reads and writes, and how to make the function that does it.

    With `sequences`, the function gets whole windows (windows, positions, d_in) and gives as many outputs. `sae` is the
    dictionary that weight statistics are of, if there is one.
    """

    route: Route
    make: Callable[[Calibration], Reconstruct]
    sequences: bool = False
    sae: SAE[Any] | None = None


@final
@dataclass(frozen=True, eq=False)
class Counted:
    """Which positions (windows * positions,) of a batch count for what, and the token that follows each."""

    kept: Tensor
    counts: Tensor
    next: Tensor
    following: Tensor
    positions: int

    @classmethod
    def of(cls, windows: Windows, rules: TokenRules) -> Counted:
        following_RC = windows.tokens[:, 1:]
        next_RC = windows.kept[:, :-1] & windows.attended[:, 1:]
        counts_RC = next_RC if rules.bos_id is None else next_RC & (following_RC != rules.bos_id)
        padded = [functional.pad(tensor, (0, 1)).flatten() for tensor in (counts_RC, next_RC, following_RC)]
        return cls(windows.kept.flatten(), padded[0], padded[1], padded[2], windows.tokens.shape[1])


@final
class Losses:
    """Cross-entropy of next tokens, and KL from the clean run, of one run over a batch.

    They are measured at the positions whose next token counts, with `saelens` at all that are kept.
    """

    def __init__(self, counted: Counted, logits_PV: Tensor, clean: Losses | None, saelens: bool) -> None:
        self._counted, self._logits_PV, self._clean, self._saelens = counted, logits_PV, clean, saelens
        where = counted.kept if saelens else counted.counts
        self.ce = torch.zeros(len(where), dtype=torch.float64)
        self.kl = torch.zeros(len(where), dtype=torch.float64)
        device = logits_PV.device
        for at in where.nonzero().squeeze(1).split(_LOGITS_AT_ONCE):
            here = at.to(device)
            log_q = logits_PV[here].float().log_softmax(-1)
            targets = counted.following[at].to(device).unsqueeze(1)
            self.ce[at] = -log_q.gather(1, targets).squeeze(1).double().cpu()
            if clean is not None:
                log_p = clean._logits_PV[here].float().log_softmax(-1)
                self.kl[at] = (log_p.exp() * (log_p - log_q)).sum(-1).double().cpu()

    def beside(self, logits_PV: Tensor) -> Losses:
        """Those of another run over the same batch, with KL from this one."""
        return Losses(self._counted, logits_PV, self, self._saelens)

    def of_predictions(self, *names: str) -> tuple[Tensor, dict[str, Tensor]]:
        """The windows of the next tokens that count, and by name their cross-entropies and, if named, KL."""
        at = self._counted.counts.nonzero().squeeze(1)
        losses = dict(zip(names, (self.ce[at], self.kl[at]), strict=False))
        return at // self._counted.positions, losses

    def add_as_saelens(self, sums: WindowSums, windows: int, end: str = "") -> None:
        """Add these losses over SAELens's positions: all kept ones that have a next token, and for KL the last one too."""
        positions = self._counted.positions
        following, everywhere = (mask.nonzero().squeeze(1) for mask in (self._counted.next, self._counted.kept))
        sums.add(windows, following // positions, {f"saelens_ce{end}": self.ce[following]})
        if self._clean is None:
            sums.add(windows, following // positions, {"saelens_next": torch.ones(len(following))})
            sums.add(windows, everywhere // positions, {"saelens_all": torch.ones(len(everywhere))})
        else:
            sums.add(windows, everywhere // positions, {f"saelens_kl{end}": self.kl[everywhere]})


@final
class Scores:
    """All sums of one candidate."""

    def __init__(self, candidate: Candidate, found: Calibration, more: Sequence[Metric], saelens: bool = False) -> None:
        self._candidate, self._more_metrics, self._saelens = candidate, more, saelens
        self.sequences = candidate.sequences
        self._reconstruct = candidate.make(found)
        self._mean = found.mean
        self.sums = WindowSums()
        self.has_codes = False
        self._residual: Tensor | None = None
        self._rows = 0
        self._counts: Tensor | None = None
        self._windows_fired: Tensor | None = None
        self._total: Tensor | None = None
        self._largest: Tensor | None = None

    def add(
        self, x_PW: Tensor, target_PW: Tensor, counting_K: Tensor, window_of: Tensor, shape: tuple[int, int]
    ) -> Tensor:
        """Account for one batch of `shape` (windows, positions); return the outputs (K, d_out) where positions count."""
        here = counting_K.to(x_PW.device)
        if self._candidate.sequences:
            y, codes = self._reconstruct(x_PW.view(*shape, -1))
            y_KW = y.reshape(len(x_PW), -1)[here]
            if codes is not None:
                codes = select_rows(codes.reshape(codes.rows), here.to(codes.device))
        else:
            y_KW, codes = self._reconstruct(x_PW[here])
        target_KW = target_PW[here]
        if y_KW.shape != target_KW.shape:
            raise DataError(f"eval: outputs of shape {tuple(y_KW.shape)} for activations {tuple(target_KW.shape)}")
        self._add_rows(target_KW, y_KW, codes, window_of, shape[0])
        if codes is not None:
            self._add_codes(codes, window_of)
            for metric in self._more_metrics:
                metric.update(target_KW, y_KW, codes)
        return y_KW

    def totals(self) -> dict[str, Tensor]:
        """Sums that are not sums of windows."""
        if self._residual is None:
            return {}
        return {"error_of_mean": (self._residual.square().sum() / self._rows).cpu()}

    def more(self) -> dict[str, float]:
        """Numbers that are not quotients of sums, and further metrics."""
        found: dict[str, float] = {}
        if self._counts is not None:
            found |= self.latents().summary()
            for metric in self._more_metrics:
                found.update(metric.compute())
        return found

    def latents(self) -> Latents:
        """What is known of each latent."""
        assert self._counts is not None
        assert self._windows_fired is not None
        assert self._total is not None
        assert self._largest is not None
        return Latents.of(
            counts=self._counts,
            windows=self._windows_fired,
            totals=self._total,
            largest=self._largest,
            rows=self._rows,
            sae=self._candidate.sae,
        )

    def _add_rows(self, x: Tensor, y: Tensor, codes: SparseCodes | None, window_of: Tensor, windows: int) -> None:
        x, y = x.double(), y.to(x.device).double()
        mean = self._mean.to(x)
        residual = x - y
        self._rows += len(x)
        self._residual = residual.sum(0) + (0 if self._residual is None else self._residual)
        norm_in, norm_out, dot = x.norm(dim=1), y.norm(dim=1), (x * y).sum(1)
        both = norm_in * norm_out
        tiny = torch.finfo(torch.float64).tiny
        error, spread = residual.square().sum(1), (x - mean).square().sum(1)
        quantities = {
            "positions": torch.ones(len(x)),
            "error": error,
            "spread": spread,
            "cosine": torch.where(both > 0, dot / both.clamp_min(tiny), 0.0),
            "norm_in": norm_in,
            "norm_out": norm_out,
            "nonzero": (norm_in > 0).double(),
            "norm_ratio": torch.where(norm_in > 0, norm_out / norm_in.clamp_min(tiny), 0.0),
            "square_out": norm_out.square(),
            "dot": dot,
        }
        if self._saelens:
            quantities["legacy"] = torch.where(spread > 0, 1 - error / spread.clamp_min(tiny), 0.0)
        if codes is not None:
            quantities["l0"] = codes.l0().double()
            quantities["l1"] = codes.row_sums(codes.values.abs()).double()
        self.sums.add(windows, window_of, quantities)

    def _add_codes(self, codes: SparseCodes, window_of: Tensor) -> None:
        self.has_codes = True
        codes = codes.detach()
        values_ = codes.values.double()
        d_sae = codes.d_sae
        if self._counts is None:
            self._counts = torch.zeros(d_sae, dtype=torch.long, device=codes.device)
            self._windows_fired = torch.zeros_like(self._counts)
            self._total = torch.zeros(d_sae, dtype=torch.float64, device=codes.device)
            self._largest = torch.zeros(d_sae, dtype=torch.float64, device=codes.device)
        assert self._windows_fired is not None
        assert self._total is not None
        assert self._largest is not None
        self._counts += codes.firing_counts()
        self._total.index_add_(0, codes.indices, values_)
        self._largest.scatter_reduce_(0, codes.indices, values_.abs(), "amax")
        active = codes.values != 0
        keys = window_of.to(codes.device)[codes.row_ids()[active]] * d_sae + codes.indices[active]
        self._windows_fired += torch.bincount(keys.unique() % d_sae, minlength=d_sae)
