"""Which latents two dictionaries of one place share, by the directions that they write."""

# F latents of the first, G of the second

from __future__ import annotations

from typing import Any

import torch
from sae_core.config import require

from sae_explorer.directions import nearest
from sae_explorer.reading import Studied

__all__ = ["SHARED", "compared"]

SHARED, _ONLY, _SHOWN = 0.7, 0.5, 200


def compared(a: Studied, b: Studied, words: Any) -> dict[str, Any]:
    """Pairs of latents that are each other's nearest with a cosine of 0.7 or more, best first; and those that have no latent
    of a cosine of 0.5 or more in the other. `words` maps a dictionary and latents to what they fire on.

    Raises ConfigError for dictionaries that write other widths, or twice the same.
    """
    require(a is not b, "compare: choose two dictionaries that differ")
    require(
        a.sae.d_out == b.sae.d_out,
        f"compare: {a.name} writes {a.sae.d_out} columns, {b.name} {b.sae.d_out}; they share no space",
    )
    cosine_a, in_b = (t.squeeze(1) for t in nearest(a.unit, torch.arange(a.sae.d_sae), 1, b.unit))
    cosine_b, in_a = (t.squeeze(1) for t in nearest(b.unit, torch.arange(b.sae.d_sae), 1, a.unit))
    mutual = (in_a[in_b] == torch.arange(a.sae.d_sae)) & (cosine_a >= SHARED)
    pairs = mutual.nonzero().squeeze(1)
    pairs = pairs[cosine_a[pairs].argsort(descending=True, stable=True)]
    shown = pairs[:_SHOWN].tolist()
    text_a, text_b = words(a, shown), words(b, in_b[shown].tolist())

    def lonely(studied: Studied, cosines: torch.Tensor) -> tuple[int, list[list[Any]]]:
        alive = studied.study.latents["count"] > 0
        found = ((cosines < _ONLY) & alive).nonzero().squeeze(1)
        by_use = found[studied.study.latents["count"][found].argsort(descending=True, stable=True)][:_SHOWN].tolist()
        texts = words(studied, by_use)
        return len(found), [[n, round(float(cosines[n]), 4), texts.get(n, "")] for n in by_use]

    only_a_count, only_a = lonely(a, cosine_a)
    only_b_count, only_b = lonely(b, cosine_b)
    return {
        "matched": len(pairs),
        "shared": SHARED,
        "mean": round(float(cosine_a.mean()), 4),
        "pairs": [
            [n, int(in_b[n]), round(float(cosine_a[n]), 4), text_a.get(n, ""), text_b.get(int(in_b[n]), "")] for n in shown
        ],
        "only_a": only_a, "only_a_count": only_a_count, "only_b": only_b, "only_b_count": only_b_count,
    }  # fmt: skip
