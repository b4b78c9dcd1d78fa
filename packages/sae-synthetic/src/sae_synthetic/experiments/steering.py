"""Steer a sparsity coefficient to an L0 while an SAE trains.

The rule is `sae_core`'s, by which ``target_l0`` works; here it starts from a step size of the experiment's own.
"""

from __future__ import annotations

import dataclasses
from typing import Any, final

from sae_core.training.steering import L0Controller
from sae_core.training.trainer import Progress

__all__ = ["SteerL0"]

_EVERY = 10


@final
class SteerL0:
    """A callback for `Trainer` that changes the config field `name` of its SAE, a number, towards the L0 `target`.

    Every ten steps it looks at the step's L0 and multiplies the coefficient by what `L0Controller` says for this `rate`.
    """

    def __init__(self, name: str, target: float, total_samples: int, rate: float = 0.03) -> None:
        self._controller = L0Controller(target, rate)
        self._name, self._total = name, total_samples

    def __call__(self, progress: Progress) -> None:
        """Look at the step's L0; adjust."""
        trainer = progress.trainer
        if trainer.steps % _EVERY:
            return
        l0 = float(progress.result.l0.double().mean())
        adjustments = self._total / (trainer.samples / trainer.steps) / _EVERY
        sae: Any = trainer.sae
        value = getattr(sae.config, self._name) * self._controller.factor(l0, adjustments)
        sae.config = dataclasses.replace(sae.config, **{self._name: value})
