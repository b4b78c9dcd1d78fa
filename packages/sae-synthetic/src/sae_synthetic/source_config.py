"""What the configs of all sources of known features share: a saved world, or the settings of a new one, and what to draw of it.

A config names a folder, or says what a new world is like, never both. What it says goes to the config of the world under the
field's own name, so that a source adds the fields that its worlds alone have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from sae_core.config import check_fields, option, require
from sae_core.errors import ConfigError

__all__ = ["WorldSourceConfig", "check_world", "new_world", "saved_world", "world_settings"]

ConfigT = TypeVar("ConfigT")

_OF_NO_WORLD = ("model", "seed", "total_samples", "device")
_PREFIXES = ("multi-site model: ", "synthetic model: ")


@dataclass(frozen=True, kw_only=True)
class WorldSourceConfig:
    """The fields that all sources of known features have; abstract."""

    model: Path | None = option(default=None, help="folder of a saved world; no other setting of a world then")
    num_features: int | None = option(default=None, help="number of true features")
    firing_probability: float | dict[str, Any] | None = option(
        default=None, help="one number, or generator_name: NAME and its settings; by default zipfian"
    )
    hierarchy: dict[str, Any] | None = option(default=None, help="settings of a generated hierarchy")
    orthogonalization: dict[str, Any] | None = option(default=None, help="settings of the orthogonalisation")
    correlation: dict[str, Any] | None = option(default=None, help="settings of a low-rank correlation")
    std_firing_magnitudes: float | dict[str, Any] | None = option(
        default=None, help="spread of a firing feature's value, a number or a rule; by default 0"
    )
    mean_firing_magnitudes: float | dict[str, Any] | None = option(
        default=None, help="mean of a firing feature's value, a number or a rule; by default 1"
    )
    bias: float | None = option(default=None, help="norm of the bias, each site's own; by default 0")
    seed: int = option(default=0, help="decides the world, and the samples")
    total_samples: int | None = option(default=None, help="end after this many samples; by default never")
    device: str = option(default="cpu", help="where samples are made")


def world_settings(config: WorldSourceConfig) -> dict[str, Any]:
    """What the config says about a new world, by the names of its fields."""
    given = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in _OF_NO_WORLD}
    return {name: value for name, value in given.items() if value is not None}


def saved_world(config: WorldSourceConfig) -> str | None:
    """The saved world's folder as it is found from anywhere, so that a run can be resumed from another directory."""
    return None if config.model is None else str(config.model.absolute())


def check_world(config: WorldSourceConfig, needed: Sequence[str], make: Callable[[], object]) -> None:
    """Raise ConfigError unless there is a saved world or all `needed` settings of a new one, which `make` then accepts."""
    check_fields(config)
    settings = world_settings(config)
    if config.model is not None:
        require(not settings, f"model: the saved world has its own {', '.join(settings)}; give one or the other")
    else:
        missing = [key for key in needed if key not in settings]
        require(not missing, f"missing key {', '.join(missing)} (or model: the folder of a saved world)")
        make()
    require(
        config.total_samples is None or config.total_samples >= 1,
        f"total_samples must be at least 1, not {config.total_samples}",
    )


def new_world(
    config: WorldSourceConfig, from_dict: Callable[[Mapping[str, Any]], ConfigT], renamed: Mapping[str, str]
) -> ConfigT:
    """The world's config, as `from_dict` makes it of the settings; `renamed` are fields that it calls otherwise."""
    settings = {renamed.get(name, name): value for name, value in world_settings(config).items()}
    if isinstance(config.firing_probability, int | float):
        settings["firing_probability"] = {"generator_name": "constant", "probability": config.firing_probability}
    try:
        return from_dict({"bias": False, **settings, "seed": config.seed})
    except ConfigError as error:
        message = str(error)
        for prefix in _PREFIXES:
            message = message.removeprefix(prefix)
        raise ConfigError(message) from error
