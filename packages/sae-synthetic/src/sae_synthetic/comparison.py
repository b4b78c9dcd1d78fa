"""Two dictionaries side by side: which latents are the same, and what one has and the other lacks.

Latents are compared by their decoder directions, so nothing but the two SAEs is needed: two seeds, two architectures, two
libraries. `pairs` is the one-to-one matching with the largest sum of cosines (`match_features`, signed: a latent and its
opposite are two things); `best_in_a` and `best_in_b` are the largest cosine with any latent of the other, whoever else
has it. A random dictionary of the same size is the measure of what comes for nothing.
"""

# A, B latents of the two

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from sae_core import SAE
from sae_core.config import require
from sae_core.errors import ShapeError
from torch import Tensor

from sae_synthetic.features import cosine_similarities
from sae_synthetic.matching import Matching, match_features, random_dictionary

__all__ = ["Comparison", "compare_dictionaries", "compare_saes"]

_ROWS_AT_ONCE = 2048


@final
@dataclass(frozen=True)
class Comparison:
    """What `compare_dictionaries` finds.

    `pairs` are matched latents with their cosines, `best_in_b` (A,) and `best_in_a` (B,) the largest cosines with any latent
    of the other; `random_consistency` is what a random dictionary in b's place gets.
    """

    pairs: Matching
    best_in_b: Tensor
    best_in_a: Tensor
    random_consistency: float

    @property
    def consistency(self) -> float:
        """Mean cosine of the matched pairs (PW-MCC, arXiv 2505.20254)."""
        return float(self.pairs.cosines.double().mean())

    def shared(self, at_least: float = 0.7) -> Tensor:
        """(pairs, 2) latents of a and of b that are matched with at least this cosine."""
        kept = self.pairs.cosines >= at_least
        return torch.stack([self.pairs.a_indices[kept], self.pairs.b_indices[kept]], dim=1)

    def only_in_a(self, below: float = 0.5) -> Tensor:
        """Latents of a that are like none of b: no cosine reaches `below`. The least alike first."""
        return _unlike(self.best_in_b, below)

    def only_in_b(self, below: float = 0.5) -> Tensor:
        """Latents of b that are like none of a. The least alike first."""
        return _unlike(self.best_in_a, below)

    def to_dict(self, at_least: float = 0.7, below: float = 0.5) -> dict[str, Any]:
        """Everything as JSON values."""
        a, b, cosines = self.pairs
        return {
            "latents": [len(self.best_in_b), len(self.best_in_a)],
            "consistency": self.consistency,
            "random_consistency": self.random_consistency,
            "shared_at_least": at_least,
            "shared": len(self.shared(at_least)),
            "only_below": below,
            "only_in_a": self.only_in_a(below).tolist(),
            "only_in_b": self.only_in_b(below).tolist(),
            "pairs": [[int(i), int(j), float(cosine)] for i, j, cosine in zip(a, b, cosines, strict=True)],
        }


def compare_dictionaries(a: Tensor, b: Tensor, seed: int = 0) -> Comparison:
    """Compare directions `a` (A, width) with `b` (B, width); `seed` is that of the random dictionary.

    Raises ShapeError for different widths, DataError for values that are not finite.

    >>> found = compare_dictionaries(torch.eye(4)[:3], torch.eye(4)[1:])
    >>> found.shared().tolist(), found.only_in_a().tolist(), found.only_in_b().tolist()
    ([[1, 0], [2, 1]], [0], [2])
    """
    a, b = a.detach().float().cpu(), b.detach().float().cpu()
    pairs = match_features(a, b, signed=True)
    random = random_dictionary(len(b), b.shape[1], seed)
    return Comparison(
        pairs,
        _best(a, b),
        _best(b, a),
        float(match_features(a, random, signed=True).cosines.double().mean()),
    )


def compare_saes(a: SAE, b: SAE, seed: int = 0) -> Comparison:
    """Compare two SAEs by what their latents write. Raises ShapeError when they write different widths."""
    if a.d_out != b.d_out or list(a.writes.values()) != list(b.writes.values()):
        raise ShapeError(
            f"compare: one writes {_sites(a)}, the other {_sites(b)}; only dictionaries of the same activations compare"
        )
    return compare_dictionaries(a.directions(), b.directions(), seed)


def _sites(sae: SAE) -> str:
    return ", ".join(f"{name}: {width}" if name else str(width) for name, width in sae.writes.items())


def _best(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([cosine_similarities(part, b).amax(dim=1) for part in a.split(_ROWS_AT_ONCE)])


def _unlike(best: Tensor, below: float) -> Tensor:
    require(-1 <= below <= 1, f"below must be a cosine in [-1, 1], not {below}")
    order = torch.argsort(best, stable=True)
    return order[best[order] < below]
