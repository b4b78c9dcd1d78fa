"""Several dictionaries of one stream side by side: what each is, what it reached, and which of them nothing beats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_core.config import unstructure
from sae_core.format.write import write_atomically
from sae_core.training.facts import named_architecture
from sae_core.training.trainer import TrainResult

__all__ = ["compared", "last_known", "write_comparison"]

_MEASURED = ("loss", "l0", "explained_variance", "dead_fraction", "held_out.ce_recovered")


def compared(results: Mapping[str, TrainResult]) -> list[dict[str, Any]]:
    """A row for each dictionary, the sparsest first: name, architecture, config, samples, the last record, `dropped`.

    ``best`` is true where no other one explains as much with a smaller L0, or more with the same.
    """
    rows: list[dict[str, Any]] = []
    for name, result in results.items():
        rows.append(
            {
                "name": name,
                "architecture": named_architecture(result.sae),
                "config": unstructure(result.sae.config),
                "samples": result.samples,
                **{key: last_known(result, key) for key in _MEASURED},
                "dropped": result.dropped,
            }
        )
    for row in rows:
        row["best"] = _measured(row) and not any(_beats(other, row) for other in rows if other is not row)
    return sorted(rows, key=lambda row: (not _measured(row), row["l0"] or 0.0))


def write_comparison(path: Path, results: Mapping[str, TrainResult]) -> None:
    """`compared` as JSON; the file appears complete or not at all."""
    text = json.dumps(compared(results), indent=2, ensure_ascii=False) + "\n"

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def last_known(result: TrainResult, key: str) -> float | None:
    """The value in the last record; of what is not measured for every record, the last that there is."""
    return next((value for record in reversed(result.history) if (value := record.get(key)) is not None), None)


def _measured(row: Mapping[str, Any]) -> bool:
    return row["dropped"] is None and row["l0"] is not None and row["explained_variance"] is not None


def _beats(other: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    if not _measured(other):
        return False
    fewer, more = other["l0"] <= row["l0"], other["explained_variance"] >= row["explained_variance"]
    return fewer and more and (other["l0"], other["explained_variance"]) != (row["l0"], row["explained_variance"])
