"""Whole forests: one of a given shape, what it is saved as, and how much rarer it makes its features.

See `HierarchyNode` for what a tree means.
"""

# N features

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from sae_core.config import option, require, structure
from sae_core.errors import ConfigError
from torch import Tensor

from sae_synthetic._random import checked_seed
from sae_synthetic.forest import HierarchyNode, validate_forest
from sae_synthetic.forest_modifier import hierarchy_modifier
from sae_synthetic.registry import settings_of

__all__ = ["Hierarchy", "HierarchyConfig", "generate_hierarchy"]


@final
@dataclass(frozen=True)
class HierarchyConfig:
    """The shape of a generated forest."""

    total_root_nodes: int = option(default=100, help="number of trees")
    branching_factor: int | tuple[int, int] = option(
        default=100, help="children of a node, or the smallest and largest number to draw from; at least 2"
    )
    max_depth: int = option(default=2, help="levels below the roots")
    mutually_exclusive_portion: float = option(
        default=0.0, help="fraction of parents whose children exclude each other"
    )
    mutually_exclusive_min_depth: int = option(default=0, help="smallest depth of such parents; roots have depth 0")
    mutually_exclusive_max_depth: int | None = option(default=None, help="largest depth of such parents, or no limit")
    compensate_probabilities: bool = option(
        default=False, help="raise children's probabilities so that they fire about as often as without the hierarchy"
    )
    scale_children_by_parent: bool = option(default=False, help="scale a child's value by its parent's relative value")

    def __post_init__(self) -> None:
        require(self.total_root_nodes >= 1, f"total_root_nodes must be at least 1, not {self.total_root_nodes}")
        fewest, most = self.branching_range
        require(2 <= fewest <= most, f"branching_factor must be at least 2, in order, not {self.branching_factor!r}")
        require(self.max_depth >= 1, f"max_depth must be at least 1, not {self.max_depth}")
        portion, low, high = (
            self.mutually_exclusive_portion,
            self.mutually_exclusive_min_depth,
            self.mutually_exclusive_max_depth,
        )
        require(0 <= portion <= 1, f"mutually_exclusive_portion must be in [0, 1], not {portion}")
        require(low >= 0, f"mutually_exclusive_min_depth must not be negative, found {low}")
        require(
            high is None or high >= low,
            f"mutually_exclusive_max_depth {high} is below mutually_exclusive_min_depth {low}",
        )

    @property
    def branching_range(self) -> tuple[int, int]:
        """Fewest and most children of a node."""
        if isinstance(self.branching_factor, int):
            return self.branching_factor, self.branching_factor
        fewest, most = self.branching_factor
        return fewest, most

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        settings = settings_of(self)
        if not isinstance(self.branching_factor, int):
            settings["branching_factor"] = list(self.branching_factor)
        return settings

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> HierarchyConfig:
        """The config that `to_dict` wrote. Raises ConfigError."""
        return structure(d, cls, where="hierarchy")


@final
class Hierarchy:
    """A forest, and the modifier that applies it: by default that of its roots (see `hierarchy_modifier`)."""

    def __init__(
        self,
        roots: Sequence[HierarchyNode],
        modifier: Callable[..., Tensor] | Literal["of_roots"] | None = "of_roots",
    ) -> None:
        self.roots = list(roots)
        validate_forest(self.roots)
        self.modifier = hierarchy_modifier(self.roots) if modifier == "of_roots" else modifier

    def __eq__(self, other: object) -> bool:
        """Whether both have equal trees in the same order."""
        return self.roots == other.roots if isinstance(other, Hierarchy) else NotImplemented

    __hash__ = None  # pyright: ignore[reportAssignmentType] - trees are mutable

    @property
    def feature_indices_used(self) -> set[int]:
        """All features of the forest."""
        return {index for root in self.roots for index in root.get_all_feature_indices()}

    def to_dict(self) -> dict[str, Any]:
        """The forest as JSON values."""
        return {"roots": [root.to_dict() for root in self.roots]}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Hierarchy:
        """The forest that `to_dict` wrote. Raises ConfigError."""
        if not isinstance(d, Mapping) or set(d) != {"roots"} or not isinstance(d["roots"], list):
            raise ConfigError("hierarchy: expected a mapping with the single key 'roots', a list of nodes")
        return cls([HierarchyNode.from_dict(root) for root in d["roots"]])

    def compute_probability_correction_factors(self, base_firing_probabilities: Tensor) -> Tensor:
        """(N,) factors for the probabilities of features so that the hierarchy does not make them rarer.

        A child of a parent with probability P needs 1/P; below a parent that never fires (P = 0) no factor helps, and it is 1.
        Where children exclude each other, a child with siblings of
        conditional probabilities q_j = p_j / P loses to them; the factor grows by 1 + sum_j q_j, which more than makes up
        for the loss (a first-order bound, kept so that saved models mean the same everywhere).
        """
        base = base_firing_probabilities.double()
        factors = torch.ones_like(base)
        for root in self.roots:
            _correct(root, None, base, factors)
        return factors.to(base_firing_probabilities.dtype)


def _correct(node: HierarchyNode, parent: int | None, base: Tensor, factors: Tensor) -> None:
    """Fill in the factors below `node`; `parent` is the nearest feature above it."""
    above = node.feature_index if node.feature_index is not None else parent
    chance = 1.0 if above is None else float(base[above])
    own = [child.feature_index for child in node.children if child.feature_index is not None]
    mass = float(base[own].sum()) if own else 0.0
    for child in node.children:
        if child.feature_index is not None:
            factor = 1 / chance if chance > 0 else 1.0
            if node.mutually_exclusive_children and chance > 0:
                factor *= 1 + (mass - float(base[child.feature_index])) / chance
            factors[child.feature_index] = factor
        _correct(child, above, base, factors)


def generate_hierarchy(num_features: int, config: HierarchyConfig, seed: int | None = None) -> Hierarchy:
    """A forest of the shape that `config` describes: features are given out level by level, roots first.

    The forest ends when all features are used, be it among the roots. Raises ConfigError for less than one feature.
    """
    require(num_features >= 1, f"num_features must be at least 1, not {num_features}")
    source = random.Random(checked_seed(seed))
    fewest, most = config.branching_range
    roots = [HierarchyNode(index) for index in range(min(config.total_root_nodes, num_features))]
    levels, used = [roots], len(roots)
    for _ in range(config.max_depth):
        level: list[HierarchyNode] = []
        for node in levels[-1]:
            wanted = fewest if fewest == most else source.randint(fewest, most)
            count = min(wanted, num_features - used)
            node.children = [HierarchyNode(index) for index in range(used, used + count)]
            used += count
            level += node.children
        levels.append(level)
    _make_exclusive(levels, config, source)
    for node in (node for level in levels[: config.max_depth] for node in level):
        node.scale_children_by_parent = config.scale_children_by_parent
    return Hierarchy(roots)


def _make_exclusive(levels: Iterable[list[HierarchyNode]], config: HierarchyConfig, source: random.Random) -> None:
    """Choose the parents whose children exclude each other."""
    deepest = config.mutually_exclusive_max_depth
    eligible = [
        node
        for depth, level in enumerate(levels)
        for node in level
        if depth >= config.mutually_exclusive_min_depth
        and (deepest is None or depth <= deepest)
        and len(node.children) >= 2
    ]
    for node in source.sample(eligible, int(len(eligible) * config.mutually_exclusive_portion)):
        node.mutually_exclusive_children = True
