"""A study in the format that Neuronpedia takes: the files that SAEDashboard writes and Neuronpedia's converter reads.

A folder holds ``batch-0.json``, ``batch-1.json``, … with 128 latents each, and ``skipped_indexes.json`` with those that never
fired. What a study does not have stays empty: alignment with neurons, correlated neurons and latents.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, final

import torch
from sae_core.config import require
from sae_core.durable import sync_folder
from sae_core.errors import ConfigError
from sae_lm.studies import Example

from sae_explorer.dashboard import begun
from sae_explorer.directions import logit_histograms
from sae_explorer.reading import Studied

__all__ = ["NeuronpediaId", "write_upload"]

_BATCH = 128
_EMPTY = (
    "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices",
    "correlated_neurons_l1", "correlated_neurons_pearson", "correlated_features_indices", "correlated_features_l1",
    "correlated_features_pearson", "decoder_weights_dist", "vector",
)  # fmt: skip


@final
@dataclass(frozen=True, kw_only=True)
class NeuronpediaId:
    """Where on Neuronpedia latents belong: a model, a layer, a set of SAEs, and which one of the set, if it has several.

    >>> NeuronpediaId.parse("gemma-2-2b/20-res-16k__l0-71")
    NeuronpediaId(model='gemma-2-2b', layer=20, set='res-16k', suffix='l0-71')
    """

    model: str
    layer: int
    set: str
    suffix: str | None = None

    @classmethod
    def parse(cls, text: str) -> NeuronpediaId:
        """The parts of MODEL/LAYER-SET or MODEL/LAYER-SET__SUFFIX. Raises ConfigError for anything else."""
        match = re.fullmatch(r"([^/\s]+)/(\d+)-([^/\s]+?)(?:__([^/\s]+))?", text)
        if match is None:
            raise ConfigError(f"neuronpedia: {text!r} is no id such as 'gpt2-small/8-res-jb'")
        return cls(model=match[1], layer=int(match[2]), set=match[3], suffix=match[4])


def write_upload(
    studied: Studied,
    out: str | Path,
    where: NeuronpediaId,
    latents: Sequence[int] | None = None,
    *,
    progress: Callable[[int], object] | None = None,
) -> Path:
    """Write some latents, None for all, to the folder `out`, and return it. It appears complete or not at all.

    `progress` is called with the number of latents done. Raises ConfigError when `out` exists.
    """
    out = Path(out)
    require(not out.exists(), f"neuronpedia: {out} exists; name another, or remove it")
    chosen = range(studied.sae.d_sae) if latents is None else sorted(set(latents))
    fired = studied.study.latents["count"] > 0
    active = [latent for latent in chosen if fired[latent]]
    facts = {"model_id": where.model, "layer": where.layer, "sae_set": where.set, "sae_id_suffix": where.suffix}
    folder = begun(out)
    try:
        for number, start in enumerate(range(0, len(active), _BATCH)):
            part = active[start : start + _BATCH]
            _write(folder / f"batch-{number}.json", {**facts, "features": list(_features(studied, part))})
            if progress is not None:
                progress(start + len(part))
        skipped = {**facts, "layer": str(where.layer), "skipped_indexes": [n for n in chosen if not fired[n]]}
        _write(folder / "skipped_indexes.json", skipped)
        sync_folder(folder)
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return out


def _features(studied: Studied, latents: Sequence[int]) -> Iterator[dict[str, Any]]:
    study = studied.study
    logits = [([], [])] * len(latents)
    if studied.lens is not None:
        counts, ends = logit_histograms(studied.sae, studied.lens, torch.tensor(latents))
        logits = [
            (heights, _middles(torch.linspace(low, high, len(heights) + 1).tolist()))
            for heights, (low, high) in zip(counts.tolist(), ends.tolist(), strict=True)
        ]
    edges = study.latents["histogram_edges"].tolist()
    for latent, (logit_heights, logit_values) in zip(latents, logits, strict=True):
        heights = study.latents["histogram"][latent].tolist()
        filled = [n for n, height in enumerate(heights) if height]
        first, end = filled[0], filled[-1] + 1
        promoted, suppressed = study.promoted(latent), study.suppressed(latent)
        yield {
            "feature_index": latent,
            **{name: [] for name in _EMPTY},
            "pos_str": [text for text, _ in promoted],
            "pos_values": [_rounded(value) for _, value in promoted],
            "neg_str": [text for text, _ in suppressed],
            "neg_values": [_rounded(value) for _, value in suppressed],
            "frac_nonzero": float(study.latents["density"][latent]),
            "freq_hist_data_bar_values": _middles(edges[first : end + 1]),
            "freq_hist_data_bar_heights": heights[first:end],
            "logits_hist_data_bar_values": logit_values,
            "logits_hist_data_bar_heights": logit_heights,
            "n_prompts_total": int(study.index["windows"]),
            "n_tokens_in_prompt": int(study.index["context_size"]),
            "dataset": str(study.index.get("text")),
            "activations": _activations(list(study.examples(latent))),
        }


def _activations(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Examples with the range of their band, -1 to the largest for the top ones, as Neuronpedia tells them apart."""
    random = max(1, sum(example.band > 0 for example in examples))
    found: list[dict[str, Any]] = []
    for band in sorted({example.band for example in examples}):
        own = [example for example in examples if example.band == band]
        low, high = min(e.value for e in own), max(e.value for e in own)
        about = {
            "bin_min": -1 if band == 0 else _rounded(low),
            "bin_max": _rounded(high),
            "bin_contains": -1 if band == 0 else _rounded(len(own) / random),
        }
        found += [
            {
                **about,
                "tokens": list(example.texts),
                "values": [_rounded(value) for value in example.activations],
                "qualifying_token_index": example.peak,
            }
            for example in own
        ]
    return found


def _middles(edges: Sequence[float]) -> list[float]:
    """The middles of bins, as many as there are heights."""
    return [_rounded((low + high) / 2) for low, high in pairwise(edges)]


def _rounded(value: float) -> float:
    return round(float(value), 3)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, allow_nan=False), "utf-8")
