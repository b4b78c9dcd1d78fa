"""Steering a sparsity coefficient to an L0 while a dictionary trains.

The coefficient grows where L0 is above its target and shrinks where it is below, as in the toy of Nabeshima 2024 and the
tuner of SynthSAEBench. L0 answers slowly, so what is compared with the target is where L0 is heading, not where it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from sae_core.config import Schedule, require
from sae_core.errors import ConfigError
from sae_core.parallel.ranks import ALONE, Ranks
from sae_core.sae import SAE
from sae_core.training.row_blocks import StepResult

__all__ = ["CoefficientSteering", "L0Controller"]

_SMOOTHING = 0.3
_REACH = 1e4  # by how much a coefficient can change in half a run


@final
class L0Controller:
    """By which factor to change a coefficient, from one reading of L0 to the next.

    The factor is 1 + `rate` * off, where off, cut to [-1, 1], is the logarithm of L0 / `target` as it will be after a tenth of
    the run at its present speed.

    >>> L0Controller(target=10.0, rate=0.1).factor(l0=1000.0, adjustments=100)
    1.1
    """

    def __init__(self, target: float, rate: float) -> None:
        require(target > 0, f"target L0 must be positive, not {target}")
        self.target, self.rate = target, rate
        self._off: float | None = None
        self._speed = 0.0  # change of the logarithm of L0 from one reading to the next

    def factor(self, l0: float, adjustments: float) -> float:
        """The factor after a reading of `l0`, in a run of that many `adjustments`."""
        now = math.log(max(l0, 1e-3) / self.target)
        before = now if self._off is None else self._off
        self._off = before + _SMOOTHING * (now - before)
        self._speed += _SMOOTHING * (self._off - before - self._speed)
        heading = self._off + self._speed * adjustments / 10
        return 1 + self.rate * max(min(heading, 1.0), -1.0)

    def state_dict(self) -> dict[str, Any]:
        """What it remembers of L0."""
        return {"off": self._off, "speed": self._speed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with it."""
        self._off, self._speed = state["off"], state["speed"]


@final
class CoefficientSteering:
    """Changes the sparsity coefficient in the config of `sae` so that its L0 comes to `target` within `steps` steps.

    It is adjusted every `every` steps, by the mean L0 since the last time. Raises ConfigError for an architecture without such
    a coefficient, and for one that follows a schedule or is zero.
    """

    def __init__(self, sae: SAE, target: float, *, steps: float, every: int) -> None:
        name = sae.sparsity_coefficient
        if name is None:
            raise ConfigError(f"target_l0: {sae.architecture} has no sparsity coefficient to steer")
        value = getattr(sae.config, name)
        if isinstance(value, Schedule) or value <= 0:
            raise ConfigError(f"target_l0 steers {name}, so it must be a positive number to start from, not {value}")
        require(target <= sae.config.d_sae, f"target_l0 must lie in (0, d_sae = {sae.config.d_sae}], not {target}")
        self._sae, self._field = sae, name
        self.started_at = float(value)
        self._adjustments = max(steps / every, 1.0)
        rate = min(max(2 * math.log(_REACH) / self._adjustments, 0.01), 0.2)
        self.controller = L0Controller(target, rate)
        self._l0 = torch.zeros((), dtype=torch.float64, device=sae.device)
        self._rows = 0

    @property
    def coefficient(self) -> float:
        """What it is now."""
        return float(getattr(self._sae.config, self._field))

    @torch.no_grad()
    def add(self, result: StepResult, rows: int | None = None, share: float = 1.0) -> None:
        """Account for one step on `rows`, None for those of `result`, of which this process counts a `share`."""
        l0_R: Tensor = result.l0
        if share:
            self._l0 += l0_R.sum()
        self._rows += l0_R.numel() if rows is None else rows

    def settle(self, ranks: Ranks) -> None:
        """Bring the sums of all ranks together at the first."""
        ranks.add([self._l0])
        if ranks.rank:
            self.forget()

    def forget(self) -> None:
        """The sum of L0, but not the rows: another rank has it."""
        self._l0.zero_()

    def adjust(self, ranks: Ranks = ALONE) -> None:
        """Look at L0, which waits for the device, and change the coefficient."""
        if not self._rows:
            return
        ranks.add([self._l0])
        factor = self.controller.factor(float(self._l0) / self._rows, self._adjustments)
        self._sae.config = dataclasses.replace(self._sae.config, **{self._field: self.coefficient * factor})
        self._l0.zero_()
        self._rows = 0

    def state_dict(self) -> dict[str, Any]:
        """The readings so far; the coefficient itself is in the SAE's config."""
        return {
            "controller": self.controller.state_dict(),
            "l0": self._l0,
            "rows": self._rows,
            "started_at": self.started_at,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with them."""
        self.controller.load_state_dict(state["controller"])
        self._l0.copy_(state["l0"])
        self._rows, self.started_at = state["rows"], state["started_at"]
