"""How strongly each feature fires when it does: one number a feature, used as mean or as standard deviation.

>>> ExponentialMagnitudeConfig(1.0, 8.0).generate(4)
tensor([1., 2., 4., 8.])
>>> generate_magnitudes(2, 1.5)
tensor([1.5000, 1.5000])
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from sae_core.config import option, require
from torch import Tensor

from sae_synthetic._random import generator_for
from sae_synthetic.registry import GeneratorConfig, Registry

__all__ = [
    "ConstantMagnitudeConfig",
    "ExponentialMagnitudeConfig",
    "FoldedNormalMagnitudeConfig",
    "LinearMagnitudeConfig",
    "MagnitudeConfig",
    "generate_magnitudes",
    "get_magnitude_class",
    "magnitude_names",
    "register_magnitude",
]


class MagnitudeConfig(GeneratorConfig):
    """A rule for magnitudes; derive a dataclass from it and register that to add a kind."""

    @classmethod
    def generator_name(cls) -> str:
        """The registered name."""
        return _REGISTRY.name_of(cls)

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> MagnitudeConfig:
        """The config that some kind's `to_dict` wrote. Raises ConfigError or UnknownNameError."""
        return _REGISTRY.from_dict(d, "magnitude")

    @abstractmethod
    def generate(self, num_features: int, seed: int | None = None) -> Tensor:
        """(num_features,) magnitudes, none negative."""


@final
@dataclass(frozen=True)
class ConstantMagnitudeConfig(MagnitudeConfig):
    """The same for every feature."""

    value: float = option(default=1.0, help="the magnitude, not negative")

    def __post_init__(self) -> None:
        require(self.value >= 0, f"value must not be negative, found {self.value}")

    def generate(self, num_features: int, seed: int | None = None) -> Tensor:
        """(num_features,) the constant."""
        return torch.full((_positive(num_features),), float(self.value))


@final
@dataclass(frozen=True)
class LinearMagnitudeConfig(MagnitudeConfig):
    """Evenly spaced from the first feature to the last."""

    start: float = option(help="magnitude of the first feature, positive")
    end: float = option(help="magnitude of the last feature, positive")

    def __post_init__(self) -> None:
        _check_ends(self.start, self.end)

    def generate(self, num_features: int, seed: int | None = None) -> Tensor:
        """(num_features,) magnitudes; `seed` plays no part."""
        return torch.linspace(self.start, self.end, _positive(num_features))


@final
@dataclass(frozen=True)
class ExponentialMagnitudeConfig(MagnitudeConfig):
    """Neighbouring features have one constant ratio."""

    start: float = option(help="magnitude of the first feature, positive")
    end: float = option(help="magnitude of the last feature, positive")

    def __post_init__(self) -> None:
        _check_ends(self.start, self.end)

    def generate(self, num_features: int, seed: int | None = None) -> Tensor:
        """(num_features,) magnitudes; `seed` plays no part."""
        fraction = torch.linspace(0, 1, _positive(num_features), dtype=torch.float64)
        return (self.start * (self.end / self.start) ** fraction).float()


@final
@dataclass(frozen=True)
class FoldedNormalMagnitudeConfig(MagnitudeConfig):
    """Absolute values of normal draws, cut off at the given ends."""

    mean: float = option(default=0.0, help="mean of the normal distribution before folding")
    std: float = option(default=0.1, help="standard deviation of the normal distribution, positive")
    min_value: float | None = option(default=None, help="smallest value allowed, or none")
    max_value: float | None = option(default=None, help="largest value allowed, or none")

    def __post_init__(self) -> None:
        require(self.std > 0, f"std must be positive, not {self.std}")
        require(
            self.min_value is None or self.min_value >= 0, f"min_value must not be negative, found {self.min_value}"
        )
        require(self.max_value is None or self.max_value > 0, f"max_value must be positive, not {self.max_value}")
        if self.min_value is not None and self.max_value is not None:
            require(
                self.min_value <= self.max_value,
                f"min_value {self.min_value} is larger than max_value {self.max_value}",
            )

    def generate(self, num_features: int, seed: int | None = None) -> Tensor:
        """(num_features,) magnitudes of that seed."""
        values = torch.randn(_positive(num_features), generator=generator_for(seed)) * self.std + self.mean
        return values.abs().clamp(self.min_value, self.max_value) if self._cut else values.abs()

    @property
    def _cut(self) -> bool:
        return self.min_value is not None or self.max_value is not None


def _check_ends(start: float, end: float) -> None:
    require(start > 0, f"start must be positive, not {start}")
    require(end > 0, f"end must be positive, not {end}")


def _positive(num_features: int) -> int:
    require(num_features >= 1, f"num_features must be at least 1, not {num_features}")
    return num_features


_REGISTRY: Registry[MagnitudeConfig] = Registry("magnitude", MagnitudeConfig)


def register_magnitude(name: str, config_class: type[MagnitudeConfig] | str) -> None:
    """Add a kind by name: a class, or ``"package.module:Class"``. Raises ConfigError when the name is taken."""
    _REGISTRY.register(name, config_class)


def get_magnitude_class(name: str) -> type[MagnitudeConfig]:
    """The class of a registered name or of ``"package.module:Class"``. Raises UnknownNameError."""
    return _REGISTRY.get(name)


def magnitude_names() -> list[str]:
    """Names of all registered kinds."""
    return _REGISTRY.names()


def generate_magnitudes(num_features: int, config: float | MagnitudeConfig, seed: int | None = None) -> Tensor:
    """(num_features,) magnitudes from a rule, or one number for all."""
    if isinstance(config, MagnitudeConfig):
        return config.generate(num_features, seed)
    return torch.full((_positive(num_features),), float(config))


register_magnitude("constant", ConstantMagnitudeConfig)
register_magnitude("exponential", ExponentialMagnitudeConfig)
register_magnitude("folded_normal", FoldedNormalMagnitudeConfig)
register_magnitude("linear", LinearMagnitudeConfig)
