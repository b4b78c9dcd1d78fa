"""Which L0 is right, found without the truth (arXiv 2508.16560).

A dictionary trained with too few active latents mixes correlated features into each other's directions, and then its inactive
latents project onto activations: the n-th largest projection s_n (`decoder_projection`) is large. With too many it is large
again. It is least where L0 is that of the data, on real activations as well as on synthetic ones.

`best_l0` compares dictionaries that are there; `find_l0` trains the ones it needs: a coarse grid first, then ever smaller
steps around the least until its neighbours are known. `l0_path` asks one dictionary on its way down, which is less noisy.
"""

# B rows

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from sae_core import SAE
from sae_core.config import require
from torch import Tensor

from sae_synthetic.scores import decoder_projection

__all__ = ["L0Selection", "best_l0", "find_l0"]


@final
@dataclass(frozen=True)
class L0Selection:
    """`k` is the chosen L0, `projections` s_n of every L0 that was looked at, in ascending order of L0."""

    k: float
    projections: dict[float, float]


def best_l0(saes: Mapping[int, SAE], activations: Tensor, places: Sequence[int]) -> L0Selection:
    """The L0 whose dictionary has the least s_n on `activations` (B, d_in), averaged over n in `places`.

    The places must lie above every L0 compared (the paper's advice) and below the number of latents. Raises ConfigError.
    """
    require(bool(saes), "best_l0: there is nothing to compare")
    _check_places(places, max(saes))
    found: dict[float, float] = {k: _projection(saes[k], activations, places) for k in sorted(saes)}
    return L0Selection(min(found, key=found.__getitem__), found)


def find_l0(
    train: Callable[[int], SAE],
    activations: Tensor,
    *,
    lowest: int,
    highest: int,
    places: Sequence[int],
    coarse: int = 5,
) -> L0Selection:
    """Train dictionaries between `lowest` and `highest` and home in on the least s_n.

    `train(k)` returns a dictionary of L0 k; it is called once for each L0 that is looked at: `coarse` evenly spaced ones,
    then the middles of the gaps beside the least, until both neighbours of it are known. Raises ConfigError for an empty range
    and for places that do not lie above it.

    >>> from sae_core import create
    >>> import torch
    >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    >>> found = find_l0(lambda k: create("topk", d_in=8, d_sae=16, k=k), x, lowest=1, highest=4, places=[6])
    >>> list(found.projections)
    [1, 2, 3, 4]
    """
    require(1 <= lowest < highest, f"find_l0: need 1 <= lowest < highest, found {lowest} and {highest}")
    require(coarse >= 2, f"find_l0: coarse must be at least 2, not {coarse}")
    _check_places(places, highest)
    found: dict[int, float] = {}
    wanted = sorted({round(lowest + (highest - lowest) * i / (coarse - 1)) for i in range(coarse)})
    while wanted:
        for k in wanted:
            found[k] = _projection(train(k), activations, places)
        known = sorted(found)
        best = known.index(min(found, key=found.__getitem__))
        beside = [(known[i], known[i + 1]) for i in (best - 1, best) if 0 <= i < len(known) - 1]
        wanted = [(a + b) // 2 for a, b in beside if b - a > 1]
    best_k = min(found, key=found.__getitem__)
    return L0Selection(best_k, {k: found[k] for k in sorted(found)})


def _projection(sae: SAE, activations: Tensor, places: Sequence[int]) -> float:
    return sum(decoder_projection(sae, activations, n) for n in places) / len(places)


def _check_places(places: Sequence[int], highest: int) -> None:
    require(bool(places), "places: give at least one")
    require(
        min(places) > highest,
        f"places: {min(places)} is not above every L0 compared, the highest of which is {highest}",
    )
