"""What an evaluation came to: numbers, intervals, a table of latents; as JSON, CSV, a page, and files beside an SAE."""

# F d_sae

from __future__ import annotations

import csv
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from sae_core import SAE
from torch import Tensor

from sae_lm.metrics import DEFINITIONS, METRICS_VERSION

__all__ = ["LATENT_FIELDS", "MASK_RULE", "SUMMARIES", "Evaluation", "Latents", "write_atomically"]

MASK_RULE = (
    "positions kept by the token policy are replaced and measured; a next token counts where its position is kept and it "
    "is neither padding nor BOS"
)
SUMMARIES: Mapping[str, tuple[str, str, str]] = {
    "dead_fraction": ("dead latents", "fraction of latents that were zero at every position seen", "{:.2%}"),
    "density_median": (
        "median density",
        "median over latents of the share of positions where each is active",
        "{:.3g}",
    ),
    "dense_fraction": ("dense latents", "fraction of latents active at more than one position in ten", "{:.2%}"),
    "rare_fraction": ("rare latents", "fraction of latents active, but at fewer than one position in 10,000", "{:.2%}"),
    "window_consistency": (
        "consistency in a window",
        "mean over latents that are active at all of: positions at which it is active / windows in which it is",
        "{:.3g}",
    ),
}
"""Numbers of a dictionary that are taken over its latents: label, definition, how it is printed."""
LATENT_FIELDS: Mapping[str, str] = {
    "density": "fraction of positions at which the latent is active",
    "window_consistency": "positions at which it is active / windows in which it is; 0 where it never is",
    "mean_active": "mean value where it is active",
    "largest": "largest absolute value",
    "encoder_norm": "norm of its encoder direction",
    "decoder_norm": "norm of its decoder direction",
    "encoder_bias": "its encoder bias",
    "encoder_decoder_cosine": "cosine of its encoder and decoder directions",
}
"""What is kept of each latent, each (d_sae,). Weight statistics exist where the dictionary has such weights."""


@final
@dataclass(frozen=True, eq=False)
class Latents:
    """Statistics of each latent: tensors (d_sae,) under the names of `LATENT_FIELDS`."""

    fields: Mapping[str, Tensor]

    @classmethod
    def of(
        cls, *, counts: Tensor, windows: Tensor, totals: Tensor, largest: Tensor, rows: int, sae: SAE[Any] | None
    ) -> Latents:
        """From sums over `rows` positions: active positions, windows and values of each latent (d_sae,)."""
        active = counts.double().cpu()
        fields = {
            "density": active / max(rows, 1),
            "window_consistency": active / windows.double().cpu().clamp_min(1),
            "mean_active": totals.double().cpu() / active.clamp_min(1),
            "largest": largest.double().cpu(),
        }
        return cls({name: value.float() for name, value in {**fields, **_weights(sae)}.items()})

    def summary(self) -> dict[str, float]:
        """The numbers of `SUMMARIES`."""
        density, consistency = self.fields["density"].double(), self.fields["window_consistency"].double()
        alive = density > 0
        return {
            "dead_fraction": (~alive).double().mean().item(),
            "density_median": density.median().item(),
            "dense_fraction": (density > 0.1).double().mean().item(),
            "rare_fraction": (alive & (density < 1e-4)).double().mean().item(),
            "window_consistency": consistency[alive].mean().item() if bool(alive.any()) else math.nan,
        }


@torch.no_grad()
def _weights(sae: SAE[Any] | None) -> dict[str, Tensor]:
    """Weight statistics of a dictionary with an encoder (d_in, d_sae), a decoder (d_sae, d_out) or biases (d_sae,)."""
    if sae is None:
        return {}
    found: dict[str, Tensor] = {}
    encoder, decoder, bias = (getattr(sae, name, None) for name in ("W_enc", "W_dec", "b_enc"))
    if isinstance(encoder, Tensor) and encoder.shape == (sae.d_in, sae.d_sae):
        found["encoder_norm"] = encoder.float().norm(dim=0)
    if isinstance(decoder, Tensor) and decoder.shape == (sae.d_sae, sae.d_out):
        found["decoder_norm"] = decoder.float().norm(dim=1)
    if isinstance(bias, Tensor) and bias.shape == (sae.d_sae,):
        found["encoder_bias"] = bias.float()
    if isinstance(encoder, Tensor) and isinstance(decoder, Tensor) and encoder.T.shape == decoder.shape:
        found["encoder_decoder_cosine"] = torch.nn.functional.cosine_similarity(encoder.T.float(), decoder.float())
    return {name: value.detach().cpu() for name, value in found.items()}


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """What came out. Cross-entropies are in nats a token; models that do not predict next tokens have none.

    `candidates` maps each candidate to its numbers, by the names in `sae_lm.metrics`; `intervals` to 95 % confidence intervals
    of those that are sums over windows; `places` says where each reads and writes; `latents` holds statistics of latents.
    """

    activations: int
    predictions: int
    windows: int
    candidates: Mapping[str, Mapping[str, float]]
    intervals: Mapping[str, Mapping[str, tuple[float, float]]]
    places: Mapping[str, str]
    latents: Mapping[str, Latents]

    def only(self, names: Sequence[str]) -> Evaluation:
        """The same for some of the candidates."""
        return replace(
            self,
            candidates={name: self.candidates[name] for name in names},
            intervals={name: self.intervals[name] for name in names},
            places={name: self.places[name] for name in names},
            latents={name: self.latents[name] for name in names if name in self.latents},
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON values; a number that does not exist is None."""
        return {
            "metrics_version": METRICS_VERSION,
            "activations": self.activations,
            "predictions": self.predictions,
            "windows": self.windows,
            "mask": MASK_RULE,
            "places": dict(self.places),
            "candidates": {name: _plain(metrics) for name, metrics in self.candidates.items()},
            "intervals": {
                name: {metric: [_finite(low), _finite(high)] for metric, (low, high) in spans.items()}
                for name, spans in self.intervals.items()
            },
        }

    def as_csv(self) -> str:
        """One line a candidate, with a column for each number and for the ends of its interval."""
        names = list(dict.fromkeys(name for metrics in self.candidates.values() for name in metrics))
        spanned = [name for name in names if any(name in spans for spans in self.intervals.values())]
        header = ["candidate", "place", "activations", "predictions", "metrics_version"]
        columns = [c for name in names for c in ((name, f"{name}_low", f"{name}_high") if name in spanned else (name,))]
        text = io.StringIO()
        writer = csv.DictWriter(text, [*header, *columns], lineterminator="\n")
        writer.writeheader()
        for candidate, metrics in self.candidates.items():
            row: dict[str, Any] = dict(_plain(metrics))
            for name, (low, high) in self.intervals.get(candidate, {}).items():
                row |= {f"{name}_low": low, f"{name}_high": high}
            facts = [candidate, self.places[candidate], self.activations, self.predictions, METRICS_VERSION]
            writer.writerow({**dict(zip(header, facts, strict=True)), **row})
        return text.getvalue()

    def as_html(self, facts: Mapping[str, Any]) -> str:
        """A page that needs nothing else: the numbers with their intervals and definitions, and densities."""
        return _page(self, facts)

    def save(self, folder: Path, facts: Mapping[str, Any]) -> Path:
        """Keep the results in `folder`, an SAE's own for one: evaluation.json, and evaluation.safetensors with the latents.

        Each file appears complete or not at all. Returns the path of the JSON file.
        """
        from safetensors.torch import save

        if self.latents:
            tensors = {
                f"{name}/{field}": value.contiguous().clone()
                for name, latents in self.latents.items()
                for field, value in latents.fields.items()
            }
            write_atomically(folder / "evaluation.safetensors", save(tensors))
        text = json.dumps({**facts, **self.as_dict()}, indent=2, allow_nan=False)
        return write_atomically(folder / "evaluation.json", text.encode())


def write_atomically(path: Path, content: bytes) -> Path:
    """Write a file that appears complete or not at all."""
    import os
    import tempfile

    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _plain(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _finite(value) for name, value in metrics.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; color: #1c2430; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #dde3ea; }
th:first-child, td:first-child, td.text { text-align: left; } td.text, small { color: #5b6673; font-size: .85rem; }
td small { display: block; } svg rect { fill: #3d6fb6; } svg text { font-size: 11px; fill: #5b6673; }
@media (prefers-color-scheme: dark) { body { background: #14181d; color: #dfe5ec; } th, td { border-color: #2b333d; }
  td.text, small, svg text { color: #97a3b0; fill: #97a3b0; } }
"""


def _page(result: Evaluation, facts: Mapping[str, Any]) -> str:
    known = {d.name: (d.label, d.text, d.form) for d in DEFINITIONS} | dict(SUMMARIES)
    known |= {
        f"second.{d.name}": (f"{d.label}, second model", d.text, d.form) for d in DEFINITIONS if d.group == "model"
    }
    names = list(dict.fromkeys(name for metrics in result.candidates.values() for name in metrics))
    shown = [name for name in known if name in names] + [name for name in names if name not in known]
    rows: list[str] = []
    for name in shown:
        label, text, form = known.get(name, (name, "", "{:.5g}"))
        cells = "".join(f"<td>{_cell(result, candidate, name, form)}</td>" for candidate in result.candidates)
        rows.append(f"<tr><td>{html.escape(label)}</td>{cells}<td class=text>{html.escape(text)}</td></tr>")
    heads = "".join(
        f"<th>{html.escape(name)}<br><small>{html.escape(result.places[name])}</small></th>"
        for name in result.candidates
    )
    described = "".join(f"<li>{html.escape(str(key))}: {html.escape(str(value))}</li>" for key, value in facts.items())
    counts = f"{result.activations:,} activations and {result.predictions:,} next tokens in {result.windows:,} windows"
    pictures = "".join(
        f"<h2>Density of latents: {html.escape(name)}</h2>{_histogram(latents.fields['density'])}"
        for name, latents in result.latents.items()
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Evaluation</title><style>{_STYLE}</style>"
        f"<h1>Evaluation</h1><ul>{described}<li>{counts}</li><li>mask: {MASK_RULE}</li>"
        f"<li>metrics version {METRICS_VERSION}; in small print 95 % intervals over windows</li></ul>"
        f"<table><tr><th></th>{heads}<th>definition</th></tr>{''.join(rows)}</table>{pictures}</html>\n"
    )


def _cell(result: Evaluation, candidate: str, name: str, form: str) -> str:
    value = result.candidates[candidate].get(name)
    if value is None or not math.isfinite(value):
        return ""
    span = result.intervals.get(candidate, {}).get(name)
    return form.format(value) + (f"<small>{form.format(span[0])} – {form.format(span[1])}</small>" if span else "")


def _histogram(density_F: Tensor) -> str:
    """Latents by the decimal logarithm of their density, as an SVG picture; those that never fire stand on the left."""
    alive = density_F[density_F > 0].double().log10()
    edges = torch.arange(-7.0, 0.01, 0.25, dtype=torch.float64)
    counts = torch.histogram(alive.clamp(-7, 0).cpu(), edges).hist.long().tolist()
    never = ("never", int((density_F == 0).sum()))
    bars: Sequence[tuple[str, int]] = [never, *zip(map(_power, edges.tolist()), counts, strict=False)]
    top = max(max(count for _, count in bars), 1)
    width, height, step = 22 * len(bars), 150, 22
    parts: list[str] = []
    for number, (label, count) in enumerate(bars):
        size = height * count / top
        parts.append(
            f'<rect x="{number * step}" y="{height - size:.1f}" width="{step - 2}" height="{size:.1f}">'
            f"<title>{label}: {count}</title></rect>"
        )
        if number % 4 == 1 or number == 0:
            parts.append(f'<text x="{number * step}" y="{height + 14}">{label}</text>')
    return f'<svg viewBox="0 0 {width} {height + 20}" width="100%" role="img">{"".join(parts)}</svg>'


def _power(exponent: float) -> str:
    return f"1e{exponent:g}"
