"""The figures of reports as plain data for plotly.js: curves over samples, histograms, points.

Axes show what matters. A count begins at 0, explained variance ends at 1, and no axis is stretched until the noise of a
curve that has long been flat fills it: it spans at least a tenth of the values' size, and for fractions a tenth of all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["curves", "histogram", "points"]

Figure = dict[str, Any]
Record = Mapping[str, float | None]

_COLOURS = ("#3366cc", "#dc3912", "#109618", "#ff9900", "#990099", "#0099c6", "#dd4477", "#66aa00")
_LEAST_SPAN = 0.1
_DECADES = 2.5  # of a logarithmic axis, beyond which ticks at powers of ten are enough
_ORDERS = 20.0  # a logarithmic axis pays off where values differ by more


def curves(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    low: float | None = None,
    high: float | None = None,
    span: float = 0.0,
    logarithmic: bool = False,
) -> Figure:
    """Curves by name over samples; the axis always shows the values `low` and `high`, and spans at least `span`.

    With `logarithmic` the axis is so where all values are positive and differ by much.
    """
    values = [y for points in series.values() for _, y in points]
    logarithmic = logarithmic and bool(values) and min(values) > 0 and max(values) / min(values) > _ORDERS
    axis: dict[str, Any] = {"range": _range(values, low, high, span)}
    if logarithmic:
        axis = {"type": "log", "dtick": 1}
    data = [
        {
            "type": "scatter",
            "mode": "lines" if len(points) > 1 else "markers",
            "name": name,
            "x": [x for x, _ in points],
            "y": [y for _, y in points],
            "line": {"color": _COLOURS[place % len(_COLOURS)]},
        }
        for place, (name, points) in enumerate(series.items())
    ]
    return _figure(title, data, {"title": {"text": "samples"}}, axis)


def histogram(title: str, values: Tensor, x_title: str, *, logarithmic: bool = False, bins: int = 60) -> Figure:
    """How many latents have which value (n,); with `logarithmic` over the logarithm of the values, which are positive."""
    values = values.detach().double().cpu()
    values = values.log10() if logarithmic else values
    low, high = (float(values.min()), float(values.max())) if values.numel() else (0.0, 1.0)
    if high - low < _LEAST_SPAN * max(abs(high), 1e-12):  # all alike, give or take noise
        middle = (low + high) / 2
        reach = max(abs(middle), 1e-12) * _LEAST_SPAN / 2
        low, high = middle - reach, middle + reach
    counts = torch.histc(values.float(), bins=bins, min=low, max=high)
    width = (high - low) / bins
    centres = [low + (i + 0.5) * width for i in range(bins)]
    axis: dict[str, Any] = {"title": {"text": x_title}}
    if logarithmic:
        places = [low + (high - low) * part / 5 for part in range(6)]
        if high - low > _DECADES:
            places = [float(power) for power in range(math.ceil(low), math.floor(high) + 1)]
        axis |= {"tickvals": places, "ticktext": [f"{10**place:.2g}" for place in places]}
    bars = {"type": "bar", "x": centres, "y": counts.tolist(), "width": width, "marker": {"color": _COLOURS[0]}}
    return _figure(title, [bars], axis, {"title": {"text": "latents"}, "rangemode": "tozero"}, gap=0)


def points(
    title: str,
    named: Mapping[str, tuple[float, float]],
    best: Sequence[str],
    *,
    x_title: str,
    y_title: str,
) -> Figure:
    """A point (x, y) for each name, and a line through the `best` of them in order of x."""
    ordered = sorted(named, key=lambda name: named[name])
    front = [name for name in ordered if name in set(best)]
    data: list[dict[str, Any]] = [
        {
            "type": "scatter", "mode": "lines", "name": "nothing beats these",
            "x": [named[name][0] for name in front], "y": [named[name][1] for name in front],
            "line": {"color": "#999", "dash": "dot"}, "hoverinfo": "skip",
        },
        {
            "type": "scatter", "mode": "markers+text", "name": "dictionaries",
            "x": [named[name][0] for name in ordered], "y": [named[name][1] for name in ordered],
            "text": ordered, "cliponaxis": False,
            "textposition": [("bottom center", "top center")[place % 2] for place in range(len(ordered))],
            "marker": {"size": 9, "color": [_COLOURS[0] if name in front else "#aaa" for name in ordered]},
        },
    ]  # fmt: skip
    xs, ys = [x for x, _ in named.values()], [y for _, y in named.values()]
    reach = max(xs, default=1.0) * 1.25  # room for half of a name
    low, top = _range(ys, 0.0 if min(ys, default=0.0) < _LEAST_SPAN else None, None, _LEAST_SPAN)
    figure = _figure(
        title,
        data,
        {"title": {"text": x_title}, "range": [0, reach]},
        {"title": {"text": y_title}, "range": [low - 0.1 * (top - low), top + 0.1 * (top - low)]},
    )
    figure["layout"] |= {"height": 440, "showlegend": False}
    return figure


def _range(values: Sequence[float], low: float | None, high: float | None, span: float) -> list[float]:
    """A range of an axis around the values, with room, at least `span` wide and a tenth of their size."""
    shown = [*values, *(bound for bound in (low, high) if bound is not None)]
    if not shown:
        return [0.0, 1.0]
    least, most = min(shown), max(shown)
    missing = max(span, _LEAST_SPAN * max(abs(least), abs(most)), 1e-12) - (most - least)
    begins = least == low  # what begins there grows upwards
    if missing > 0:
        least, most = least - (0 if begins else missing / 2), most + (missing if begins else missing / 2)
    room = 0.05 * (most - least)
    return [least if begins else least - room, most + room]


def _figure(
    title: str, data: list[dict[str, Any]], x: Mapping[str, Any], y: Mapping[str, Any], gap: float | None = None
) -> Figure:
    layout: dict[str, Any] = {
        "title": {"text": title, "font": {"size": 15}, "x": 0, "xref": "paper", "xanchor": "left"},
        "height": 320,
        "margin": {"l": 60, "r": 20, "t": 45, "b": 45},
        "xaxis": {"automargin": True, **x},
        "yaxis": {"automargin": True, "exponentformat": "e", **y},
        "showlegend": len(data) > 1,
        "legend": {"orientation": "h", "y": -0.32},
        "template": {"layout": {"colorway": list(_COLOURS)}},
    }
    if gap is not None:
        layout["bargap"] = gap
    return {"data": data, "layout": layout}
