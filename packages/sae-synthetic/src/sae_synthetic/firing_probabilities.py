"""How often each feature fires: constant, linear, Zipfian or random over the features, or a stranger's own rule.

>>> zipfian_firing_probabilities(4, exponent=1.0, max_prob=0.3, min_prob=0.01)
tensor([0.3000, 0.1067, 0.0422, 0.0100])
>>> FiringProbabilityConfig.from_dict({"generator_name": "constant", "probability": 0.2}).generate(2)
tensor([0.2000, 0.2000])
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
    "ConstantFiringProbabilityConfig",
    "FiringProbabilityConfig",
    "LinearFiringProbabilityConfig",
    "RandomFiringProbabilityConfig",
    "ZipfianFiringProbabilityConfig",
    "firing_probability_names",
    "get_firing_probability_class",
    "linear_firing_probabilities",
    "random_firing_probabilities",
    "register_firing_probability",
    "zipfian_firing_probabilities",
]


def zipfian_firing_probabilities(
    num_features: int, exponent: float = 1.0, max_prob: float = 0.3, min_prob: float = 0.01
) -> Tensor:
    """(num_features,) i^-exponent for rank i = 1, 2, ..., moved and scaled to run from `max_prob` to `min_prob`."""
    _check(num_features, max_prob, min_prob)
    require(exponent > 0, f"exponent must be positive, not {exponent}")
    weights = torch.arange(1, num_features + 1, dtype=torch.float64) ** -exponent
    if num_features == 1:
        return torch.tensor([max_prob], dtype=torch.float32)
    unit = (weights - weights[-1]) / (weights[0] - weights[-1])
    return (min_prob + (max_prob - min_prob) * unit).float()


def linear_firing_probabilities(num_features: int, max_prob: float = 0.3, min_prob: float = 0.01) -> Tensor:
    """(num_features,) evenly spaced from `max_prob` to `min_prob`."""
    _check(num_features, max_prob, min_prob)
    return torch.linspace(max_prob, min_prob, num_features)


def random_firing_probabilities(
    num_features: int, max_prob: float = 0.5, min_prob: float = 0.01, seed: int | None = None
) -> Tensor:
    """(num_features,) uniform in [min_prob, max_prob)."""
    _check(num_features, max_prob, min_prob)
    return min_prob + (max_prob - min_prob) * torch.rand(num_features, generator=generator_for(seed))


class FiringProbabilityConfig(GeneratorConfig):
    """A rule for firing probabilities; derive a dataclass from it and register that to add a kind."""

    @classmethod
    def generator_name(cls) -> str:
        """The registered name."""
        return _REGISTRY.name_of(cls)

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> FiringProbabilityConfig:
        """The config that some kind's `to_dict` wrote. Raises ConfigError or UnknownNameError."""
        return _REGISTRY.from_dict(d, "firing_probability")

    @abstractmethod
    def generate(self, num_features: int, seed: int | None = None) -> Tensor:
        """(num_features,) probabilities in (0, 1]."""


@final
@dataclass(frozen=True)
class ConstantFiringProbabilityConfig(FiringProbabilityConfig):
    """Every feature fires equally often."""

    probability: float = option(default=0.1, help="probability that a feature fires in a sample, in (0, 1]")

    def __post_init__(self) -> None:
        require(0 < self.probability <= 1, f"probability must be in (0, 1], not {self.probability}")

    def generate(self, num_features: int, seed: int | None = None) -> Tensor:
        """(num_features,) the constant."""
        _check(num_features, 1.0, 1.0)
        return torch.full((num_features,), float(self.probability))


@final
@dataclass(frozen=True)
class LinearFiringProbabilityConfig(FiringProbabilityConfig):
    """Probabilities fall in a straight line from the first feature to the last."""

    max_prob: float = option(default=0.3, help="probability of the first feature")
    min_prob: float = option(default=0.01, help="probability of the last feature")

    def __post_init__(self) -> None:
        _check(1, self.max_prob, self.min_prob)

    def generate(self, num_features: int, seed: int | None = None) -> Tensor:
        """(num_features,) probabilities; `seed` plays no part."""
        return linear_firing_probabilities(num_features, self.max_prob, self.min_prob)


@final
@dataclass(frozen=True)
class ZipfianFiringProbabilityConfig(FiringProbabilityConfig):
    """Probabilities fall as a power of the feature's rank."""

    exponent: float = option(default=1.0, help="power of the rank")
    max_prob: float = option(default=0.3, help="probability of the first feature")
    min_prob: float = option(default=0.01, help="probability of the last feature")

    def __post_init__(self) -> None:
        _check(1, self.max_prob, self.min_prob)
        require(self.exponent > 0, f"exponent must be positive, not {self.exponent}")

    def generate(self, num_features: int, seed: int | None = None) -> Tensor:
        """(num_features,) probabilities; `seed` plays no part."""
        return zipfian_firing_probabilities(num_features, self.exponent, self.max_prob, self.min_prob)


@final
@dataclass(frozen=True)
class RandomFiringProbabilityConfig(FiringProbabilityConfig):
    """Probabilities are drawn uniformly."""

    max_prob: float = option(default=0.5, help="upper end of the range")
    min_prob: float = option(default=0.01, help="lower end of the range")

    def __post_init__(self) -> None:
        _check(1, self.max_prob, self.min_prob)

    def generate(self, num_features: int, seed: int | None = None) -> Tensor:
        """(num_features,) probabilities of that seed."""
        return random_firing_probabilities(num_features, self.max_prob, self.min_prob, seed)


def _check(num_features: int, max_prob: float, min_prob: float) -> None:
    require(num_features >= 1, f"num_features must be at least 1, not {num_features}")
    require(
        0 < min_prob <= max_prob <= 1,
        f"need 0 < min_prob <= max_prob <= 1, found min_prob = {min_prob} and max_prob = {max_prob}",
    )


_REGISTRY: Registry[FiringProbabilityConfig] = Registry("firing probability", FiringProbabilityConfig)


def register_firing_probability(name: str, config_class: type[FiringProbabilityConfig] | str) -> None:
    """Add a kind by name: a class, or ``"package.module:Class"``. Raises ConfigError when the name is taken."""
    _REGISTRY.register(name, config_class)


def get_firing_probability_class(name: str) -> type[FiringProbabilityConfig]:
    """The class of a registered name or of ``"package.module:Class"``. Raises UnknownNameError."""
    return _REGISTRY.get(name)


def firing_probability_names() -> list[str]:
    """Names of all registered kinds."""
    return _REGISTRY.names()


register_firing_probability("constant", ConstantFiringProbabilityConfig)
register_firing_probability("linear", LinearFiringProbabilityConfig)
register_firing_probability("random", RandomFiringProbabilityConfig)
register_firing_probability("zipfian", ZipfianFiringProbabilityConfig)
