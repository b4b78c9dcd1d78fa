"""The learning rate over a run: linear warm-up, constant, linear decay to zero, counted in samples; and SAELens's shapes.

>>> [learning_rate_factor(n, total=100, warmup=10, decay=20) for n in (0, 5, 50, 90, 100)]
[0.0, 0.5, 1.0, 0.5, 0.0]
"""

from __future__ import annotations

from math import cos, pi
from typing import Literal

from sae_core.config import Schedule, require

__all__ = ["learning_rate_factor", "sae_lens_learning_rate"]


def learning_rate_factor(samples: int, *, total: int, warmup: int, decay: int) -> float:
    """The factor of the learning rate after `samples` of `total` samples."""
    factor = 1.0
    if samples < warmup:
        factor = samples / warmup
    if decay and samples > total - decay:
        factor = min(factor, max(total - samples, 0) / decay)
    return factor


def sae_lens_learning_rate(
    name: Literal["constant", "cosineannealing", "cosineannealingwarmrestarts"],
    lr: float,
    *,
    steps: int,
    warm_up_steps: int = 0,
    decay_steps: int = 0,
    lr_end: float | None = None,
    num_cycles: int = 1,
) -> Schedule:
    """The learning rate of a run of `steps` equal steps as SAELens has it, under its names and with its defaults.

    Warm-up is a line through lr / w, 2 lr / w, ..., lr; the decay one from where the main part ends (`lr_end`, by default a
    tenth of `lr`; for constant `lr` itself) towards zero. Raises ConfigError where the parts do not fit into the steps.

    >>> from sae_core.config import value_at
    >>> schedule = sae_lens_learning_rate("constant", 1.0, steps=10, warm_up_steps=2, decay_steps=2)
    >>> [round(value_at(schedule, step / 10), 3) for step in (0, 1, 2, 7, 8, 9)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 0.5]
    """
    main = steps - warm_up_steps - decay_steps
    require(main > 0, f"warm-up {warm_up_steps} and decay {decay_steps} leave nothing of {steps} steps")
    end = lr if name == "constant" else lr / 10 if lr_end is None else lr_end
    schedule: Schedule | None = None
    if decay_steps:
        require(end > 0, "a decay after lr_end 0 has nowhere to go")
        schedule = Schedule(end, 0.0, over=decay_steps / steps)
    if name == "cosineannealingwarmrestarts":
        cycle = main // num_cycles
        require(cycle > 0, f"num_cycles: {num_cycles} do not fit into {main} steps")
        for step in reversed(range(main - cycle * num_cycles)):  # the beginning of one more cycle, step by step
            here, there = (end + (lr - end) * (1 + cos(pi * at / cycle)) / 2 for at in (step, step + 1))
            schedule = Schedule(here, there, over=1 / steps, then=schedule)
        schedule = Schedule(
            lr, end, over=cycle * num_cycles / steps, shape="cosine", restarts=num_cycles - 1, then=schedule
        )
    else:
        schedule = Schedule(
            lr, end, over=main / steps, shape="linear" if name == "constant" else "cosine", then=schedule
        )
    if warm_up_steps:
        w = warm_up_steps
        schedule = Schedule(lr / w, lr * (w + 1) / w, over=w / steps, then=schedule)
    return schedule
