"""What a run measures as it goes, without ever waiting for the device.

Each step adds to sums that live where the SAE lives; every N steps the sums cross to the host in one transfer and start
anew. Explained variance is then that of the whole window,

    EV = 1 - sum |y - x|^2 / sum |x - mean x|^2,        the mean over the window, per dimension,

not an average of batch values, so it does not depend on the batch size. What an architecture reports besides its loss terms
is averaged over the window too, under ``metrics/NAME``.
"""

# R rows, O d_out, F d_sae

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from sae_core.errors import DataError
from sae_core.parallel.ranks import ALONE, Ranks
from sae_core.training.row_blocks import StepResult

__all__ = ["DeadLatents", "Window", "check_batch"]


@final
class Window:
    """Sums over the steps since the last flush.

    A name that was announced, or seen once, is in every record: in a window in which it did not occur, a loss term is 0
    and a metric None, as one that is not finite.
    """

    def __init__(self, d_out: int, d_sae: int, device: torch.device) -> None:
        self.d_sae = d_sae
        self._mean_and_squares = torch.zeros(d_out + 1, dtype=torch.float64, device=device)
        self._sums: dict[str, Tensor] = {}
        self._names: dict[str, None] = {}  # an ordered set
        self._rows = 0

    @torch.no_grad()
    def add(self, result: StepResult, rows: int | None = None, share: float = 1.0) -> None:
        """Account for one step on `rows`, None for those of `result`, of which this process counts a `share`.

        Raises DataError for losses and metrics that are not one number each.
        """
        target, residual = result.target, result.reconstruction - result.target
        rows = target.shape[0] if rows is None else rows
        self._rows += rows
        sums = {"residual": residual.square().sum(), "l0": result.l0.sum(), "loss": result.loss * (rows * share)}
        for name, value in _names(result.losses, result.metrics).items():
            sums[name] = value.reshape(()) * (rows * share)
        if share:
            self._mean_and_squares[:-1] += target.sum(0)
            self._mean_and_squares[-1] += target.square().sum()
        for name, total in sums.items():
            self._add(name, total if share else torch.zeros_like(total))  # others count these rows

    @torch.no_grad()
    def settle(self, ranks: Ranks) -> None:
        """Bring the sums of all ranks together at the first, for a state that does not depend on how many there are."""
        if ranks.size == 1:
            return
        self._together(ranks)
        if ranks.rank:
            self.forget()

    def forget(self) -> None:
        """The sums, but not the rows: another rank has them."""
        for sums in (self._mean_and_squares, *self._sums.values()):
            sums.zero_()

    def _together(self, ranks: Ranks) -> list[Tensor]:
        """All sums, replaced by those over all ranks."""
        sums = [self._mean_and_squares, *self._sums.values()]
        ranks.add(sums)
        return sums

    def announce(self, losses: Mapping[str, Tensor], metrics: Mapping[str, Tensor]) -> None:
        """Expect these names, so that records have the same keys from the first one on."""
        for name in ("residual", "l0", "loss", *_names(losses, metrics)):
            self._names.setdefault(name)

    def flush(self, ranks: Ranks = ALONE) -> dict[str, float | None]:
        """Means over the window, and ``residual``, the squared error of a row; then start anew. Empty without a step."""
        if not self._rows:
            return {}
        self._together(ranks)
        names = list(self._sums)
        on_host = torch.stack([self._sums[name] for name in names]).tolist()
        *means, squares = self._mean_and_squares.tolist()
        rows = self._rows
        variance = squares - sum(total * total for total in means) / rows
        sums = dict(zip(names, on_host, strict=True))
        record = {name: _mean(name, sums.get(name), rows) for name in self._names}
        record["explained_variance"] = 1 - sums["residual"] / variance if variance > 0 else None
        self._mean_and_squares.zero_()
        self._sums, self._rows = {}, 0
        return record

    def state_dict(self) -> dict[str, Any]:
        """The sums so far."""
        return {
            "mean_and_squares": self._mean_and_squares,
            "sums": dict(self._sums),
            "names": list(self._names),
            "rows": self._rows,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with saved sums."""
        self._mean_and_squares.copy_(state["mean_and_squares"])
        self._sums = {name: total.to(self._mean_and_squares.device) for name, total in state["sums"].items()}
        self._names = dict.fromkeys(state["names"])
        self._rows = state["rows"]

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach().double()
        self._names.setdefault(name)
        self._sums[name] = self._sums[name] + value if name in self._sums else value


@final
class DeadLatents:
    """Which latents have not fired for `after` samples."""

    def __init__(self, d_sae: int, after: int, device: torch.device) -> None:
        self.after = after
        self.samples_since_fired = torch.zeros(d_sae, dtype=torch.long, device=device)

    @torch.no_grad()
    def add(self, result: StepResult, rows: int | None = None) -> None:
        """Account for one step on `rows` samples, None for those of `result`: what fired starts counting again."""
        self.samples_since_fired += result.target.shape[0] if rows is None else rows
        self.samples_since_fired.masked_fill_(result.firing_counts > 0, 0)

    def indices(self, ranks: Ranks = ALONE) -> Tensor | None:
        """(n_dead,) indices of the dead latents, or None when there are none. Waits for the device, and for other ranks."""
        ranks.least(self.samples_since_fired)
        dead = (self.samples_since_fired > self.after).nonzero().squeeze(-1)
        return dead if dead.numel() else None


def _mean(name: str, total: float | None, rows: int) -> float | None:
    if total is None:
        return 0.0 if name.startswith("loss/") else None
    mean = total / rows
    return None if name.startswith("metrics/") and not math.isfinite(mean) else mean


def _names(losses: Mapping[str, Tensor], metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Loss terms and metrics under the names that records have. Raises DataError for what is not one number."""
    found = {f"loss/{name}": value for name, value in losses.items()}
    found |= {f"metrics/{name}": value for name, value in metrics.items()}
    for name, value in found.items():
        if not isinstance(value, Tensor) or value.numel() != 1:
            what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise DataError(f"the architecture reports {name} as {what}; a tensor of one number is needed")
    return found


def check_batch(batch: Tensor, first_sample: int, what: str = "batch", every: int = 1) -> None:
    """Raise DataError for NaN or infinite values, saying how many, and at which sample and dimension the first is.

    The rows are every `every`-th sample from `first_sample` on.
    """
    if bool(torch.isfinite(batch.sum(dtype=torch.float64))):  # one pass; a single bad value makes the sum bad
        return
    finite = torch.isfinite(batch)
    flat = batch.reshape(-1, batch.shape[-1])
    rows, columns = (~finite.reshape_as(flat)).nonzero(as_tuple=True)
    row, column = int(rows[0]), int(columns[0])
    raise DataError(
        f"{what}: {int(batch.isnan().sum())} NaN and {int(batch.isinf().sum())} infinite values, the first "
        f"({float(flat[row, column])}) in sample {first_sample + row * every}, dimension {column}; "
        "training stopped before this batch was used"
    )
