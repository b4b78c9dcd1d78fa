"""Measuring dictionaries during training on data that are held out from it, for the records that training writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import final

from sae_core.latent_ranks import latents_over
from sae_core.sae import SAE
from sae_core.training.config import samples_of
from sae_core.training.learner import Learner, Record

__all__ = ["HeldOut"]


@final
class HeldOut:
    """Adds ``held_out.NAME`` to the first record after every `every` samples, and to the last one.

    `every` is a whole number of samples, or a fraction of `total_samples`; `measure` maps an SAE to numbers by name. A number
    that is not finite is None. When a run goes on from a checkpoint, it measures where it would have.
    """

    def __init__(self, measure: Callable[[SAE], Mapping[str, float]], every: int | float) -> None:
        self._measure, self._every = measure, every

    def __call__(self, learner: Learner, record: Record) -> None:
        """Measure, if it is time, and add the numbers to `record`, the newest of the learner's."""
        size = max(samples_of(self._every, learner.config.total_samples), 1)
        before = learner.history[-2]["samples"] if len(learner.history) > 1 else 0
        if not learner.finished and learner.samples // size == int(before or 0) // size:
            return
        with latents_over(learner.sae.ranks):  # what is asked of codes is of all latents
            measured = self._measure(learner.sae)
        for name, value in measured.items():
            record[f"held_out.{name}"] = value if math.isfinite(value) else None
