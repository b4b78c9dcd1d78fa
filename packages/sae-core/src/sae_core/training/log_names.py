"""The names under which dashboards of SAELens show what is logged, so that a sweep can hold runs of both.

`shown_as` translates the names of a record. What SAELens does not log keeps its name, under ``metrics/`` where it has no group.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from sae_core.protocols import RunFacts

__all__ = ["LogNames", "shown_as"]

LogNames = Literal["sae_lens", "sae_core"]

_NAMES = {
    "samples": "details/n_training_samples",
    "lr": "details/current_learning_rate",
    "loss": "losses/overall_loss",
    "l0": "metrics/l0",
    "explained_variance": "metrics/explained_variance",
}
_NUMBERED = re.compile(r"(.*?)((?:_\d+)?)")


def shown_as(
    record: Mapping[str, float | int | str | None], run: RunFacts, names: LogNames = "sae_lens"
) -> dict[str, float]:
    """The numbers of `record` that are known, without ``step``, under SAELens's names or ours.

    >>> from sae_core import create
    >>> run = RunFacts(sae=create("standard", d_in=4, d_sae=8, l1_coefficient=1.0))
    >>> record = {"step": 50, "loss": 3.0, "loss/mse": 2.0, "loss/inner_mse_8": 1.0, "dead_fraction": 0.25, "l0": None}
    >>> shown_as(record, run)
    {'losses/overall_loss': 3.0, 'losses/mse_loss': 2.0, 'losses/inner_mse_loss_8': 1.0, 'sparsity/dead_features': 2.0}
    """
    known = {key: float(value) for key, value in record.items() if isinstance(value, int | float) and key != "step"}
    if names == "sae_core":
        return known
    return dict(_shown(key, value, run) for key, value in known.items())


def _shown(key: str, value: float, run: RunFacts) -> tuple[str, float]:
    if key == "dead_fraction":
        return "sparsity/dead_features", float(round(value * run.sae.d_sae))
    if key == "sparsity_coefficient":
        return f"details/{run.sae.sparsity_coefficient}", value
    if key.startswith("loss/"):
        found = _NUMBERED.fullmatch(key.removeprefix("loss/"))
        assert found is not None  # it matches whatever has no line breaks
        return f"losses/{found[1]}_loss{found[2]}", value
    if key.startswith("held_out."):
        return key.replace(".", "/", 1), value
    return _NAMES.get(key, key if "/" in key else f"metrics/{key}"), value
