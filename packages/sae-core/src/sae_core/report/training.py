"""The report of a training run: what was reached, how it went, what is not well, and everything needed to do it again.

Curves end where the table says, since both are the run's records. A run of several dictionaries has a page that sets them side
by side, and each its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_core.report.figures import curves, histogram, points
from sae_core.report.page import Page
from sae_core.report.surroundings import machine, plugins
from sae_core.training.comparison import compared, last_known
from sae_core.training.trainer import TrainResult
from sae_core.yaml_text import to_yaml

__all__ = ["write_comparison_report", "write_report"]

_SHOWN = 2000  # points of a curve; a screen has no more
_RECOVERED = "held_out.ce_recovered"
_OWN_PLACE = ("step", "samples", "lr", "l0", "explained_variance", "dead_fraction", _RECOVERED)
_LAST = (
    ("loss", "loss", ".5g"),
    ("explained variance", "explained_variance", ".4f"),
    ("L0", "l0", ".2f"),
    ("dead latents", "dead_fraction", ".2%"),
    ("cross-entropy recovered", _RECOVERED, ".4f"),
)


def write_report(path: Path, result: TrainResult, config: Mapping[str, Any], name: str = "") -> Path:
    """Write the report of one dictionary; `config` is the run as it was, with every default. Returns its path.

    Raises MissingDependencyError where plotly's script is missing.
    """
    page = Page(f"Training of {name or f'a {result.sae.architecture} dictionary'}")
    page.text(
        f"{result.sae.architecture}: {result.sae.d_in:,} inputs, {result.sae.config.d_sae:,} latents, trained on "
        f"{result.samples:,} samples."
    )
    page.table(
        ["at the end", ""],
        [[label, _number(last_known(result, key), form)] for label, key, form in _LAST if _logged(result, key)],
    )
    page.text("Numbers are those of the last record, over the steps since the one before; curves end with them.")
    _well_or_not(page, {"": result})
    page.heading("How it went")
    page.figures(_curves(result.history))
    page.heading("Latents at the end")
    page.figures(_latents(page, result))
    _surroundings(page, config)
    return page.write(path)


def write_comparison_report(
    path: Path, results: Mapping[str, TrainResult], config: Mapping[str, Any], links: Mapping[str, str]
) -> Path:
    """Write the page that sets several dictionaries side by side; `links` lead to each one's own. Returns its path."""
    page = Page(f"{len(results)} dictionaries of one stream")
    rows = compared(results)
    measured = [row for row in rows if row["dropped"] is None and row["l0"] is not None]
    best = [row["name"] for row in rows if row["best"]]
    columns = [each for each in _LAST if any(row.get(each[1]) is not None for row in rows)]
    page.table(
        ["dictionary", "architecture", "samples", *(label for label, _, _ in columns), "best"],
        [
            [
                row["name"], row["architecture"], f"{row['samples']:,}",
                *(_number(row.get(key), form) for _, key, form in columns),
                "dropped" if row["dropped"] else "yes" if row["best"] else "",
            ]
            for row in rows
        ],
        links,
    )  # fmt: skip
    page.text("Best: no other one explains as much with a smaller L0.")
    _well_or_not(page, results)
    page.heading("Sparsity against what is kept")
    figures = [_pareto("Explained variance", "explained_variance", measured, best)]
    recovered = [row for row in measured if row.get(_RECOVERED) is not None]
    if recovered:
        front = [row["name"] for row in recovered if not any(_recovers_more(other, row) for other in recovered)]
        figures.append(_pareto("Cross-entropy recovered", _RECOVERED, recovered, front))
    page.figures(figures)
    page.heading("How it went")
    histories = {name: result.history for name, result in results.items()}
    drawn = [
        curves("Explained variance", _series(histories, "explained_variance"), high=1.0),
        curves("L0", _series(histories, "l0"), low=0.0),
        curves("Loss", _series(histories, "loss"), logarithmic=True),
    ]
    if any((dead := _series(histories, "dead_fraction")).values()):  # not known in short runs
        drawn.append(curves("Dead latents, as a fraction", dead, low=0.0, span=0.1))
    page.figures(drawn)
    _surroundings(page, config)
    return page.write(path)


def _curves(history: Sequence[Mapping[str, float | None]]) -> list[dict[str, Any]]:
    keys = list(dict.fromkeys(key for record in history for key in record))
    losses = [key for key in keys if key.startswith("loss")]
    others = [key for key in keys if key not in _OWN_PLACE and key not in losses]

    def series(*wanted: str) -> dict[str, list[tuple[float, float]]]:
        found = {key: _points(history, key) for key in wanted}
        return {key: each for key, each in found.items() if each}

    figures = [
        curves("Losses", series(*losses), logarithmic=True),
        curves("Explained variance", series("explained_variance"), high=1.0),
        curves("L0", series("l0"), low=0.0),
        curves("Learning rate", series("lr"), low=0.0),
    ]
    if series("dead_fraction"):  # not known in short runs
        figures.append(curves("Dead latents, as a fraction", series("dead_fraction"), low=0.0, span=0.1))
    if series(_RECOVERED):
        figures.append(curves("Cross-entropy recovered, on data held out", series(_RECOVERED), high=1.0))
    return figures + [curves(key, series(key)) for key in others if series(key)]


def _latents(page: Page, result: TrainResult) -> list[dict[str, Any]]:
    norms = result.sae.direction_norms() if result.norms is None else result.norms
    figures = [histogram("Norms of the decoder rows", norms.float(), "norm")]
    density = result.density
    if density is not None:
        fired = density[density > 0]
        title = "How often latents fire"
        page.text(
            f"Over the last tenth of the run, {density.numel() - fired.numel():,} of {density.numel():,} latents never fired; "
            "how often the others did is shown on a logarithmic axis."
        )
        if fired.numel():
            figures.insert(0, histogram(title, fired, "fraction of samples", logarithmic=True))
    return figures


def _well_or_not(page: Page, results: Mapping[str, TrainResult]) -> None:
    for name, result in results.items():
        of = f"{name}: " if name else ""
        if result.dropped is not None:
            page.text(f"{of}dropped: {result.dropped}", finding=True)
        for finding in result.health:
            page.text(f"{of}{finding}.", finding=True)


def _surroundings(page: Page, config: Mapping[str, Any]) -> None:
    page.heading("To do it again")
    page.folded("run.yaml, with every default", to_yaml(config))
    page.table(["plugin", "version", "state"], plugins())
    page.table(["machine", ""], machine())


def _pareto(title: str, key: str, rows: Sequence[Mapping[str, Any]], best: Sequence[str]) -> dict[str, Any]:
    named = {row["name"]: (row["l0"], row[key]) for row in rows if row[key] is not None}
    return points(f"{title} against L0", named, best, x_title="L0", y_title=title.lower())


def _recovers_more(other: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    fewer, more = other["l0"] <= row["l0"], other[_RECOVERED] >= row[_RECOVERED]
    return fewer and more and (other["l0"], other[_RECOVERED]) != (row["l0"], row[_RECOVERED])


def _series(
    histories: Mapping[str, Sequence[Mapping[str, float | None]]], key: str
) -> dict[str, list[tuple[float, float]]]:
    found = {name: _points(history, key) for name, history in histories.items()}
    return {name: each for name, each in found.items() if each}


def _points(history: Sequence[Mapping[str, float | None]], key: str) -> list[tuple[float, float]]:
    """(samples, value) where it is known; of a long run, every so many, the last one always."""
    found = [
        (float(samples), float(value))
        for record in history
        if (value := record.get(key)) is not None and (samples := record["samples"]) is not None
    ]
    every = -(-len(found) // _SHOWN)
    return found if every <= 1 else [*found[:-1:every], found[-1]]


def _logged(result: TrainResult, key: str) -> bool:
    return any(key in record for record in result.history)


def _number(value: float | None, form: str) -> str:
    return "not known" if value is None else f"{value:{form}}"
