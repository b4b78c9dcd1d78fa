"""Plots as plotly figures: they display themselves in notebooks, and `Report` writes them to HTML.

plotly is imported by the functions that draw; without it they say how to install it. The similarity heat maps order
latents so that each stands beside the true feature it points at, which puts a perfect dictionary on the diagonal.
"""

# F latents, N true features, D width

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sae_core import SAE, SparseCodes
from sae_core.config import require
from sae_core.errors import ConfigError, MissingDependencyError
from torch import Tensor

from sae_synthetic.features import FeatureDictionary, cosine_similarities

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = [
    "find_best_feature_ordering",
    "find_best_feature_ordering_across_saes",
    "find_best_feature_ordering_from_sae",
    "plot_firing",
    "plot_pareto",
    "plot_recovery",
    "plot_sae_feature_similarity",
    "plot_similarity",
    "plot_training",
    "require_plotly",
]

_FRACTIONS = ("explained_variance", "dead_fraction", "MCC")
_COLOURS = ("#3366cc", "#dc3912", "#109618", "#ff9900", "#990099", "#0099c6", "#dd4477", "#66aa00")


def require_plotly() -> Any:
    """plotly.graph_objects; MissingDependencyError that says how to install it."""
    try:
        import plotly.graph_objects as go  # half a second that only plots cost
    except ImportError as error:
        raise MissingDependencyError("plots need plotly: pip install 'sae-synthetic[plots]'") from error
    return go


def find_best_feature_ordering(sae_features: Tensor, true_features: Tensor) -> Tensor:
    """(F,) order in which latents (F, D) best line up with true features (N, D): by the place of each one's best match.

    That is the feature of the largest absolute cosine, as in the MCC.

    >>> find_best_feature_ordering(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.eye(2))
    tensor([1, 0])
    """
    cosines = cosine_similarities(sae_features.detach(), true_features.detach())
    return torch.argsort(cosines.abs().argmax(dim=1), stable=True)


def find_best_feature_ordering_from_sae(sae: SAE, feature_dict: FeatureDictionary) -> Tensor:
    """(F,) the order of an SAE's latents by its decoder."""
    return find_best_feature_ordering(sae.directions().cpu(), feature_dict.feature_vectors.detach().cpu())


def find_best_feature_ordering_across_saes(saes: Iterable[SAE], feature_dict: FeatureDictionary) -> Tensor:
    """(F,) the order of the SAE that lines up best with the truth, to plot several SAEs in one order.

    Best is the largest summed cosine between latents, in their order, and the true features they take the places of; where
    their numbers differ, each latent counts with its best match. Raises ConfigError for no SAE.
    """
    best: tuple[float, Tensor] | None = None
    for sae in saes:
        ordering = find_best_feature_ordering_from_sae(sae, feature_dict)
        cosines = cosine_similarities(sae.directions().cpu(), feature_dict.feature_vectors.detach().cpu())[ordering]
        square = len(cosines) == feature_dict.num_features
        score = float(cosines.diagonal().sum() if square else cosines.max(dim=1).values.sum())
        if best is None or score > best[0]:
            best = (score, ordering)
    if best is None:
        raise ConfigError("find_best_feature_ordering_across_saes: no SAE was given")
    return best[1]


def plot_sae_feature_similarity(
    sae: SAE,
    feature_dict: FeatureDictionary,
    title: str | None = None,
    reorder_features: bool | Tensor = False,
    decoder_only: bool = False,
    show_values: bool = False,
    height: int = 400,
    width: int = 800,
    save_path: str | Path | None = None,
    show_plot: bool = True,
    dtick: int | None = 1,
    scale: float = 1.0,
) -> go.Figure:
    """Heat maps of the cosines between an SAE's encoder and decoder directions and the true features.

    `reorder_features` True orders latents by their best match, a tensor (F,) gives the order. `save_path` ending in
    ``.html`` writes a self-contained page, other endings an image of `scale` (which needs kaleido). `show_plot` displays
    it. Returns the figure.
    """
    go = require_plotly()
    from plotly.subplots import make_subplots

    truth = feature_dict.feature_vectors.detach().cpu()
    sides = {"decoder": sae.directions().cpu()}
    if not decoder_only:
        sides = {"encoder": _encoder_directions(sae), **sides}
    ordering = torch.arange(sae.d_sae)
    if isinstance(reorder_features, Tensor):
        ordering = reorder_features
    elif reorder_features:
        ordering = find_best_feature_ordering_from_sae(sae, feature_dict)
    figure = make_subplots(rows=1, cols=len(sides), subplot_titles=[f"SAE {side}" for side in sides])
    for place, directions in enumerate(sides.values(), start=1):
        cosines = cosine_similarities(directions.float(), truth.float())[ordering]
        figure.add_trace(_heat_map(go, cosines, show_values, colour_bar=place == len(sides)), row=1, col=place)
    figure.update_xaxes(title_text="true feature", dtick=dtick)
    figure.update_yaxes(title_text="latent", dtick=dtick, autorange="reversed")
    figure.update_layout(title_text=title or "Latents and true features: cosine", height=height, width=width)
    if save_path is not None:
        path = Path(save_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".html":
            figure.write_html(path, include_plotlyjs=True)
        else:
            figure.write_image(path, scale=scale)
    if show_plot:
        figure.show()
    return figure


def plot_similarity(directions: Mapping[str, Tensor], truth: Tensor, title: str = "", most: int = 400) -> go.Figure:
    """Heat maps side by side of |cosine| between directions (F, D), by name, and `truth` (N, D), in the best order.

    At most `most` features and as many matched latents are drawn.
    """
    go = require_plotly()
    from plotly.subplots import make_subplots

    truth = truth.detach().float().cpu()[:most]
    figure = make_subplots(rows=1, cols=len(directions), subplot_titles=list(directions), horizontal_spacing=0.04)
    for place, vectors in enumerate(directions.values(), start=1):
        cosines = cosine_similarities(vectors.detach().float().cpu(), truth).abs()
        best = cosines.max(dim=1).values.argsort(descending=True)[: 2 * most]
        ordering = best[torch.argsort(cosines[best].argmax(dim=1), stable=True)]
        figure.add_trace(
            _heat_map(go, cosines[ordering], False, place == len(directions), signed=False), row=1, col=place
        )
    figure.update_xaxes(title_text="true feature")
    figure.update_yaxes(title_text="latent, by best match", autorange="reversed")
    figure.update_layout(title_text=title, height=620)
    return figure


def plot_training(
    history: Sequence[Mapping[str, float | None]], keys: Sequence[str], title: str = "Training"
) -> go.Figure:
    """One panel a key of the records, over samples.

    Panels begin at 0 and those of fractions end at 1, so that noise does not look like news.
    """
    require(bool(history), "plot_training: the history is empty")
    go = require_plotly()
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=len(keys), subplot_titles=[key.replace("_", " ") for key in keys])
    for place, key in enumerate(keys, start=1):
        points = [(record["samples"], record[key]) for record in history if record.get(key) is not None]
        x, y = zip(*points, strict=True) if points else ((), ())
        line = go.Scatter(x=x, y=y, mode="lines", line={"color": _COLOURS[place % len(_COLOURS)]}, showlegend=False)
        figure.add_trace(line, row=1, col=place)
        figure.update_yaxes(range=_shown_range(y, fraction=key in _FRACTIONS), row=1, col=place)
    figure.update_xaxes(title_text="samples", automargin=True, nticks=4)
    figure.update_yaxes(automargin=True)
    figure.update_layout(title_text=title, height=320, margin={"t": 60, "r": 30})
    return figure


def _shown_range(values: Sequence[float], *, fraction: bool) -> list[float]:
    """From 0, or from the least value where that is negative, to 1 for fractions, else to a little above the largest."""
    least, most = min(values, default=0.0), max(values, default=1.0)
    top = max(1.0, most) if fraction else most
    room = 0.05 * max(top - min(least, 0.0), 1e-12)
    return [min(least, 0.0) - room * (least < 0), top + room]


def plot_firing(codes: SparseCodes, most: int = 100, title: str = "Firing and co-firing") -> go.Figure:
    """Firing rates of the first `most` features, and how much more often pairs fire together than chance (log2 ratio)."""
    go = require_plotly()
    from plotly.subplots import make_subplots

    shown = min(most, codes.d_sae)
    kept = (codes.indices < shown) & (codes.values > 0)
    fires = torch.zeros(codes.rows, shown)
    fires[codes.row_ids()[kept].cpu(), codes.indices[kept].cpu()] = 1.0
    rates = codes.firing_counts().cpu() / codes.rows
    together = fires.T @ fires / codes.rows
    chance = rates[:shown].unsqueeze(0) * rates[:shown].unsqueeze(1)
    ratio = torch.log2((together + 1e-9) / (chance + 1e-9)).clamp(-4, 4).fill_diagonal_(0)
    figure = make_subplots(rows=1, cols=2, subplot_titles=["firing rate", "log2 of co-firing over chance"])
    figure.add_trace(go.Scatter(y=rates.tolist(), mode="markers", marker={"size": 4}, showlegend=False), row=1, col=1)
    heat = go.Heatmap(z=ratio.numpy(), colorscale="RdBu", zmid=0, zmin=-4, zmax=4)
    figure.add_trace(heat, row=1, col=2)
    figure.update_xaxes(title_text="feature")
    figure.update_yaxes(type="log", row=1, col=1)
    figure.update_layout(title_text=title, height=460)
    return figure


def plot_recovery(
    directions: Mapping[str, Tensor], truth: Tensor, frequencies: Tensor, title: str = "Recovery against frequency"
) -> go.Figure:
    """The largest |cosine| any latent of each set (F, D) has with each true feature (N, D), over its firing rate (N,)."""
    go = require_plotly()
    figure = go.Figure()
    for place, (name, vectors) in enumerate(directions.items()):
        best = torch.cat(
            [
                cosine_similarities(part, vectors.detach().float().cpu()).abs().max(dim=1).values
                for part in truth.detach().float().cpu().split(4096)
            ]
        )
        figure.add_trace(
            go.Scatter(
                x=frequencies.tolist(),
                y=best.tolist(),
                mode="markers",
                name=name,
                marker={"size": 5, "opacity": 0.6, "color": _COLOURS[place % len(_COLOURS)]},
            )
        )
    figure.update_xaxes(type="log", title_text="firing rate")
    figure.update_yaxes(range=[0, 1.02], title_text="best |cosine|")
    figure.update_layout(title_text=title, height=460)
    return figure


def plot_pareto(
    points: Mapping[str, Sequence[tuple[float, float]]], x_title: str, y_title: str, title: str = ""
) -> go.Figure:
    """Points (x, y) of several series by name, joined in order of x."""
    go = require_plotly()
    figure = go.Figure()
    for place, (name, series) in enumerate(points.items()):
        x, y = zip(*sorted(series), strict=True) if series else ((), ())
        colour = _COLOURS[place % len(_COLOURS)]
        figure.add_trace(go.Scatter(x=x, y=y, mode="lines+markers", name=name, line={"color": colour}))
    figure.update_xaxes(title_text=x_title)
    figure.update_yaxes(title_text=y_title)
    figure.update_layout(title_text=title, height=460)
    return figure


def _heat_map(go: Any, cosines: Tensor, show_values: bool, colour_bar: bool, *, signed: bool = True) -> Any:
    values = cosines.numpy().round(4)
    return go.Heatmap(
        z=values,
        zmin=-1 if signed else 0,
        zmax=1,
        colorscale="RdBu" if signed else "Blues",
        showscale=colour_bar,
        texttemplate="%{z:.2f}" if show_values else None,
    )


def _encoder_directions(sae: SAE) -> Tensor:
    """(F, D) what each latent reads."""
    encoder = getattr(sae, "W_enc", None)
    if not isinstance(encoder, Tensor):
        raise ConfigError(f"a {sae.architecture} SAE has no encoder matrix W_enc; plot it with decoder_only=True")
    return encoder.detach().T.cpu()
