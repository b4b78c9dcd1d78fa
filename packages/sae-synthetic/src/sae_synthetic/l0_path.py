"""The right L0 from one training in which the L0 falls (arXiv 2508.16560).

Dictionaries trained from scratch at different L0 end in different places, and where training is short that noise hides which
n-th decoder projection s_n is least. A dictionary whose L0 falls slowly from too high to too low has no such jumps: it passes
the right L0, from above, which is the side from which features are recovered, and s_n along the way has one clear least.

`L0Path` is a callback that looks at s_n while any trainer runs, on activations of any model; let `k`, or the penalty, move by
a schedule. Where the L0 falls fast, features are not found yet when it is right, and the least is seen where it is still too
high: go down once over a wide range, and once more, slowly, around what was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from sae_core.config import require
from sae_core.training.trainer import Progress
from torch import Tensor

from sae_synthetic.l0_selection import L0Selection
from sae_synthetic.scores import decoder_projection

__all__ = ["L0Path"]


@final
class L0Path:
    """A callback for `Trainer`: every `every_steps` steps, s_n on `activations` (B, d_in), averaged over n in `places`.

    The places must lie above every L0 passed that is to be compared, and below the number of latents. `projections` holds what
    was seen, by the mean L0 of the steps since the last look. Raises ConfigError for settings without meaning.

    >>> from sae_core import TrainConfig, Trainer, create
    >>> import torch
    >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    >>> sae = create("topk", d_in=8, d_sae=16, k={"from": 4, "to": 2, "over": 1.0})
    >>> path = L0Path(x, places=[6], every_steps=5)
    >>> batches = (x for _ in range(20))
    >>> _ = Trainer(sae, batches, TrainConfig(total_samples=1280, batch_size=64, progress_bar=False), callbacks=[path]).fit()
    >>> [round(l0, 1) for l0 in path.projections]
    [4.0, 3.2, 3.0, 2.0]
    """

    def __init__(self, activations: Tensor, places: Sequence[int], every_steps: int) -> None:
        require(bool(places), "L0Path: give at least one place")
        require(min(places) >= 1, f"L0Path: places must be positive, found {min(places)}")
        require(every_steps >= 1, f"L0Path: every_steps must be at least 1, not {every_steps}")
        self._activations, self._places, self._every = activations, tuple(places), every_steps
        self._l0 = 0.0
        self.projections: dict[float, float] = {}

    def __call__(self, progress: Progress) -> None:
        """Add the step's L0; look where it is due."""
        trainer = progress.trainer
        self._l0 += float(progress.result.l0.double().mean()) / self._every
        if trainer.steps % self._every:
            return
        sae = trainer.sae
        seen = [abs(decoder_projection(sae, self._activations, n)) for n in self._places]
        self.projections[self._l0] = sum(seen) / len(seen)
        self._l0 = 0.0

    def best(self) -> L0Selection:
        """The L0 at which s_n was least, each value averaged with its neighbours on the way.

        Looks at an L0 not below all places are left out. Raises ConfigError where fewer than three are left.
        """
        seen = sorted((l0, value) for l0, value in self.projections.items() if l0 < min(self._places))
        require(len(seen) >= 3, f"L0Path: {len(seen)} looks below place {min(self._places)}; at least 3 are needed")
        smooth: dict[float, float] = {}
        for at, (l0, _) in enumerate(seen):
            around = [value for _, value in seen[max(at - 1, 0) : at + 2]]
            smooth[l0] = sum(around) / len(around)
        return L0Selection(min(smooth, key=smooth.__getitem__), dict(seen))
