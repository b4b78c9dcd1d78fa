"""All that a page shows of one latent, as JSON values: from the study, read when it is asked for, and from the decoder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast, final

import torch
from sae_core import SAE
from sae_core.config import require
from sae_core.errors import ConfigError
from sae_lm.lens import Lens
from sae_lm.neuronpedia import latent_url
from sae_lm.studies import StudyFolder

from sae_explorer.directions import logit_histograms, nearest, site_norms, unit_directions
from sae_explorer.index import build_index
from sae_explorer.labels import LABELS_FILE, Labels

__all__ = ["LONGEST_TOKEN", "Studied", "finite", "shortened"]

_NEAREST = 10
LONGEST_TOKEN = 200


def shortened(text: str, longest: int = LONGEST_TOKEN) -> str:
    """A token's text, with an ellipsis in place of what is too much to show.

    >>> shortened("abc", 2), shortened("ab", 2)
    ('ab…', 'ab')
    """
    return text if len(text) <= longest else text[:longest] + "…"


@final
class Studied:
    """A dictionary and its study. `lens` leads to the model's logits, None where there is none to lead to.

    Raises ConfigError when the study is one of another dictionary.
    """

    def __init__(self, name: str, sae: SAE[Any], study: StudyFolder, *, lens: Lens | None = None) -> None:
        require(
            study.d_sae == sae.d_sae,
            f"{study.path} is a study of {study.d_sae:,} latents, {name} has {sae.d_sae:,}; name its own with --study",
        )
        self.name, self.sae, self.study = name, sae.eval(), study
        self.lens = lens if lens is not None and lens.unembed.shape[1] == sae.d_out else None
        self.index = build_index(study)

    @cached_property
    def labels(self) -> Labels:
        """One's own labels, beside the study."""
        return Labels(self.study.path / LABELS_FILE, self.sae.d_sae)

    @property
    def labels_path(self) -> Path:
        """Where labels are, if there are any."""
        return self.study.path / LABELS_FILE

    @cached_property
    def unit(self) -> torch.Tensor:
        """(d_sae, d_out) unit directions."""
        return unit_directions(self.sae)

    def facts(self) -> dict[str, Any]:
        """What is said of the whole: name, architecture, place, model, how much was studied."""
        index = self.study.index
        architecture = cast("Mapping[str, Any]", index.get("sae") or {}).get("architecture")
        source = cast("Mapping[str, Any]", index.get("source") or {})
        return {
            "name": self.name, "d_sae": self.sae.d_sae, "architecture": str(architecture), "place": str(index.get("place")),
            "model": str(source.get("model")), "positions": int(index["positions"]), "text": str(index.get("text")),
            "active": int(index.get("active_latents", 0)), "bands": int(index["study"]["bands"]),
        }  # fmt: skip

    def latent(self, latent: int) -> dict[str, Any]:
        """Everything of one latent. Raises ConfigError for one that is not there."""
        return self.latents([latent])[0]

    def latents(self, latents: Sequence[int]) -> list[dict[str, Any]]:
        """Everything of several latents, which costs less than one by one."""
        for latent in latents:
            require(0 <= latent < self.sae.d_sae, f"there is no latent {latent}; the dictionary has {self.sae.d_sae:,}")
        chosen = torch.tensor(latents)
        cosines, near = nearest(self.unit, chosen, _NEAREST)
        spread: list[dict[str, Any] | None] = [None] * len(latents)
        if self.lens is not None:
            counts, ends = logit_histograms(self.sae, self.lens, chosen)
            spread = [
                {"counts": each, "low": finite(low), "high": finite(high)}
                for each, (low, high) in zip(counts.tolist(), ends.tolist(), strict=True)
            ]
        return [
            self._one(latent, [[n, finite(c)] for n, c in zip(indices, values, strict=True)], logits)
            for latent, indices, values, logits in zip(latents, near.tolist(), cosines.tolist(), spread, strict=True)
        ]

    def _one(self, latent: int, near: list[Any], logits: dict[str, Any] | None) -> dict[str, Any]:
        study, stats = self.study, self.study.latents
        return {
            "latent": latent,
            "density": finite(stats["density"][latent]),
            "count": int(stats["count"][latent]),
            "largest": finite(stats["largest"][latent]),
            "mean": finite(stats["mean_active"][latent]),
            "histogram": self._histogram(latent),
            "logits": logits,
            "promoted": [[shortened(text), finite(value)] for text, value in study.promoted(latent)],
            "suppressed": [[shortened(text), finite(value)] for text, value in study.suppressed(latent)],
            "partners": [[other, count, finite(jaccard)] for other, count, jaccard in study.partners(latent)],
            "nearest": near,
            "sites": {name: finite(norm) for name, norm in site_norms(self.sae, latent).items()},
            "examples": [
                {
                    "band": example.band,
                    "value": finite(example.value),
                    "tokens": [shortened(text) for text in example.texts],
                    "values": [finite(value) for value in example.activations],
                    "peak": example.peak,
                }
                for example in study.examples(latent)
            ],
            "neuronpedia": self._link(latent),
        }

    def _histogram(self, latent: int) -> dict[str, Any]:
        """The bins in which there is something, and those between."""
        counts, edges = self.study.latents["histogram"][latent], self.study.latents["histogram_edges"]
        filled = counts.nonzero().squeeze(1).tolist()
        if not filled:
            return {"counts": [], "edges": []}
        first, last = filled[0], filled[-1]
        return {"counts": counts[first : last + 1].tolist(), "edges": [finite(e) for e in edges[first : last + 2]]}

    def _link(self, latent: int) -> str | None:
        try:
            return latent_url(self.sae, latent)
        except ConfigError:  # it has no id there
            return None


def finite(value: Any) -> float | None:
    """JSON has no NaN; four digits are enough for a page."""
    number = float(value)
    return float(f"{number:.4g}") if math.isfinite(number) else None
