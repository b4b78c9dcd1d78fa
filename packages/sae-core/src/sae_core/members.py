"""Which dictionaries a run file asks for: one, a list of them, every combination of a grid, or both.

Each is a name, the fields of its architecture, the seed of its start and its way of training. What `saes` and `grid` say is put
over `sae` and `train`: ``seed`` is the seed, ``train.lr`` or ``train: {lr: …}`` a setting of training, anything else a field of
the architecture.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sae_core.config import require, structure, unstructure
from sae_core.training.config import TrainConfig

__all__ = ["Member", "members_of"]

_NAME = re.compile(r"[A-Za-z0-9][\w.,=+-]*")


@dataclass(frozen=True, kw_only=True)
class Member:
    """One dictionary of a run."""

    sae: Mapping[str, Any]
    seed: int
    train: TrainConfig


def members_of(
    sae: Mapping[str, Any] | None,
    saes: Sequence[Mapping[str, Any]],
    grid: Mapping[str, Sequence[Any]],
    train: TrainConfig,
    seed: int,
) -> dict[str, Member]:
    """The dictionaries by name; a single one has the name "".

    Raises ConfigError for a run without any, for names that are given twice or cannot be folders, and for empty grids.

    >>> found = members_of({"architecture": "topk"}, [], {"k": [16, 32], "seed": [0, 1]}, TrainConfig(total_samples=1), 0)
    >>> list(found), found["k=32,seed=1"].sae, found["k=32,seed=1"].seed
    (['k=16,seed=0', 'k=16,seed=1', 'k=32,seed=0', 'k=32,seed=1'], {'architecture': 'topk', 'k': 32}, 1)
    """
    for key, values in grid.items():
        require(isinstance(values, list) and len(values) > 0, f"grid: {key}: a list of values, not {values!r}")
    chosen = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    found: dict[str, Member] = {}
    for number, entry in enumerate(saes or [{}], start=1):
        for point in chosen:
            own = {key: value for key, value in entry.items() if key != "name"}
            given = entry.get("name", number if len(saes) > 1 else None)
            parts = [str(given)] if given is not None else []
            parts += [f"{key.removeprefix('train.')}={_short(value)}" for key, value in point.items()]
            name = ",".join(parts)
            require(name not in found, f"saes: two are called {name!r}; give each a name of its own")
            require(
                not name or _NAME.fullmatch(name) is not None,
                f"saes: {name!r} cannot be a folder's name; give it a name of letters, digits and . , = + - _",
            )
            found[name] = _member({**(sae or {}), **own, **point}, train, seed, name)
    return found


def _member(settings: dict[str, Any], train: TrainConfig, seed: int, name: str) -> Member:
    where = f"saes: {name}" if name else "sae"
    inner = settings.pop("train", {})
    require(isinstance(inner, Mapping), f"{where}: train is a group of settings, not {inner!r}")
    changes = dict(cast("Mapping[str, Any]", inner))
    changes |= {key.removeprefix("train."): settings.pop(key) for key in list(settings) if key.startswith("train.")}
    seed = settings.pop("seed", seed)
    require(isinstance(seed, int) and not isinstance(seed, bool), f"{where}: seed must be a whole number, not {seed!r}")
    require(
        "architecture" in settings or "start" in settings,
        f"{where}: missing key 'architecture' (or start: the folder of a trained SAE to start from)",
    )
    if changes:
        train = structure({**unstructure(train), **changes}, TrainConfig, where=f"{where}: train")
    return Member(sae=settings, seed=seed, train=train)


def _short(value: Any) -> str:
    """`value` as part of a folder's name.

    >>> _short([1, 2]), _short(1e-4), _short({"from": 1, "to": 2})
    ('1-2', '0.0001', 'from-1-to-2')
    """
    return re.sub(r"[^\w.+]+", "-", str(value)).strip("-")
