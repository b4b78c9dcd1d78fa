"""Hierarchies of features: a child fires only when its parent does.

A tree of `HierarchyNode`s says who is whose child, whether the children of a node exclude each other (of those that
would fire together one is kept, at random), and whether a child's value is scaled by its parent's. A node without a
feature only groups its children: they hang on the nearest feature above it, and in a group of excluding children such a
node counts as firing when anything directly below it fires.

`generate_hierarchy` makes a forest of a given shape. `HierarchyPlan` is the same forest as tensors, which is what
sampling works on, and `hierarchy_modifier` applies it to activations that were drawn without it.
"""

# N features

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from sae_core.config import option, require, structure
from sae_core.errors import ConfigError
from torch import Tensor

from sae_synthetic._random import checked_seed
from sae_synthetic.registry import settings_of

__all__ = ["Hierarchy", "HierarchyConfig", "HierarchyNode", "HierarchyPlan", "generate_hierarchy", "validate_forest"]


@final
class HierarchyNode:
    """A feature, or a group without one, and what hangs on it.

    `feature_index` None makes a group. `mutually_exclusive_children` needs at least two children.
    `scale_children_by_parent` multiplies each direct child's value by parent value / parent's mean value.

    >>> animal = HierarchyNode(0, [HierarchyNode(1, feature_id="cat"), HierarchyNode(2)], mutually_exclusive_children=True)
    >>> animal.get_all_feature_indices()
    [0, 1, 2]
    >>> print(animal)
    0 (exclusive children)
      1 [cat]
      2
    """

    def __init__(
        self,
        feature_index: int | None = None,
        children: Sequence[HierarchyNode] | None = None,
        mutually_exclusive_children: bool = False,
        scale_children_by_parent: bool = False,
        feature_id: str | None = None,
    ) -> None:
        self.feature_index = feature_index
        self.children: list[HierarchyNode] = list(children or [])
        self.mutually_exclusive_children = mutually_exclusive_children
        self.scale_children_by_parent = scale_children_by_parent
        self.feature_id = feature_id
        self._check_alone()

    @classmethod
    def from_dict(cls, tree_dict: Mapping[str, Any]) -> HierarchyNode:
        """A tree from nested mappings with the keys that `to_dict` writes; ``id`` is another name of ``feature_id``."""
        known = {
            "feature_index",
            "children",
            "mutually_exclusive_children",
            "scale_children_by_parent",
            "feature_id",
            "id",
        }
        if not isinstance(tree_dict, Mapping) or set(tree_dict) - known:
            raise ConfigError(
                f"hierarchy: a node must be a mapping with keys among {', '.join(sorted(known))}; found {tree_dict!r}"
            )
        identity = tree_dict.get("feature_id", tree_dict.get("id"))
        return cls(
            feature_index=tree_dict.get("feature_index"),
            children=[cls.from_dict(child) for child in tree_dict.get("children") or []],
            mutually_exclusive_children=bool(tree_dict.get("mutually_exclusive_children", False)),
            scale_children_by_parent=bool(tree_dict.get("scale_children_by_parent", False)),
            feature_id=None if identity is None else str(identity),
        )

    def to_dict(self) -> dict[str, Any]:
        """The tree as nested mappings of JSON values."""
        return {
            "feature_index": self.feature_index,
            "mutually_exclusive_children": self.mutually_exclusive_children,
            "scale_children_by_parent": self.scale_children_by_parent,
            "feature_id": self.feature_id,
            "children": [child.to_dict() for child in self.children],
        }

    def walk(self) -> Iterator[HierarchyNode]:
        """This node and all below it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()

    def get_all_feature_indices(self) -> list[int]:
        """Features of this node and of all below it, parents first."""
        return [node.feature_index for node in self.walk() if node.feature_index is not None]

    def validate(self) -> None:
        """Raise ConfigError for a loop, a node with two parents, or a feature that occurs twice."""
        validate_forest([self])

    def _check_alone(self) -> None:
        where = f"hierarchy node (feature_index {self.feature_index})"
        index = self.feature_index
        require(
            index is None or (isinstance(index, int) and not isinstance(index, bool) and index >= 0),
            f"{where}: feature_index must be an integer from 0, or None for a group",
        )
        require(
            not self.mutually_exclusive_children or len(self.children) >= 2,
            f"{where}: mutually_exclusive_children needs at least 2 children, found {len(self.children)}",
        )

    def __repr__(self) -> str:
        name = "group" if self.feature_index is None else str(self.feature_index)
        name += f" [{self.feature_id}]" if self.feature_id is not None else ""
        name += " (exclusive children)" if self.mutually_exclusive_children else ""
        below = [line for child in self.children for line in repr(child).splitlines()]
        return "\n".join([name, *("  " + line for line in below)])


def validate_forest(roots: Sequence[HierarchyNode], num_features: int | None = None) -> None:
    """Raise ConfigError for loops, nodes with two parents, repeated features, and features that do not exist."""
    parents: dict[int, str] = {}
    features: set[int] = set()
    path: list[int] = []

    def visit(node: HierarchyNode, above: str) -> None:
        where = f"hierarchy node (feature_index {node.feature_index})"
        require(id(node) not in path, f"{where}: loop, it is below itself")
        require(id(node) not in parents, f"{where}: it has two parents, {parents.get(id(node))} and {above}")
        parents[id(node)] = above
        node._check_alone()  # pyright: ignore[reportPrivateUsage] - nodes are mutable, so they are looked at again
        if node.feature_index is not None:
            require(node.feature_index not in features, f"{where}: the feature occurs twice in the hierarchy")
            require(
                num_features is None or node.feature_index < num_features,
                f"{where}: there are only {num_features} features",
            )
            features.add(node.feature_index)
        path.append(id(node))
        for child in node.children:
            visit(child, where)
        path.pop()

    for root in roots:
        visit(root, "the top")


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
    def from_dict(cls, data: Mapping[str, Any]) -> HierarchyConfig:
        """The config that `to_dict` wrote. Raises ConfigError."""
        return structure(data, cls, where="hierarchy")


@final
class HierarchyPlan:
    """A forest over features 0 .. N-1 as tensors, the form in which it is applied.

    `parent` (N,) is the nearest feature above or -1. `scaled` (N,) bool: the value is scaled by the parent's. `layers` are
    pairs (group, unit) of (N,) tensors, -1 outside any group: of the units of one group that fire under one parent, one is
    kept. Nested groups without a feature between them are several layers, outermost first.
    """

    def __init__(self, roots: Sequence[HierarchyNode], num_features: int, device: torch.device | str = "cpu") -> None:
        validate_forest(roots, num_features)
        parent, scaled = [-1] * num_features, [False] * num_features
        memberships: list[list[tuple[int, int]]] = [[] for _ in range(num_features)]
        groups = units = 0

        def visit(node: HierarchyNode, feature_above: int, inside: list[tuple[int, int]], scale: bool) -> None:
            nonlocal groups, units
            index = node.feature_index
            if index is not None:
                parent[index], scaled[index], memberships[index] = feature_above, scale, inside
                feature_above, inside = index, []
            require(
                feature_above >= 0 or not node.scale_children_by_parent,
                "hierarchy: scale_children_by_parent on a group that has no feature above it; there is nothing to scale by",
            )
            group = -1
            if node.mutually_exclusive_children:
                group, groups = groups, groups + 1
            for child in node.children:
                visit(
                    child,
                    feature_above,
                    inside if group < 0 else [*inside, (group, units)],
                    node.scale_children_by_parent,
                )
                units += 1

        for root in roots:
            visit(root, -1, [], False)
        self.num_features, self.num_groups, self.num_units = num_features, groups, units
        self.parent = torch.tensor(parent, dtype=torch.long, device=device)
        self.scaled = torch.tensor(scaled, dtype=torch.bool, device=device)
        self.layers: list[tuple[Tensor, Tensor]] = []
        for layer in range(max(map(len, memberships), default=0)):
            pairs = [inside[layer] if layer < len(inside) else (-1, -1) for inside in memberships]
            group_N, unit_N = torch.tensor(pairs, dtype=torch.long, device=device).unbind(1)
            self.layers.append((group_N.contiguous(), unit_N.contiguous()))
        self.levels = self._levels()

    def _levels(self) -> Tensor:
        """(N,) number of features above each feature."""
        levels = torch.zeros_like(self.parent)
        above = self.parent.clone()
        while bool((above >= 0).any()):
            levels += above >= 0
            above = torch.where(above >= 0, self.parent[above.clamp_min(0)], above)
        return levels

    def keep_one_per_group(self, parents: Tensor, features: Tensor, generator: torch.Generator) -> Tensor:
        """(entries,) bool: which of the firing `features` stay when groups are resolved.

        `parents` (entries,) tells entries of different samples or parents apart; every choice is uniform over the units
        that fire.
        """
        keep = torch.ones_like(features, dtype=torch.bool)
        for group_N, unit_N in self.layers:
            inside = ((group_N[features] >= 0) & keep).nonzero().squeeze(1)
            if not len(inside):
                continue
            group, unit = group_N[features[inside]], unit_N[features[inside]]
            contest = parents[inside] * self.num_groups + group
            contestants, which = torch.unique(contest * self.num_units + unit, return_inverse=True)
            # contestants are sorted, so those of one contest are neighbours: a random rank picks one of each run.
            _, contest_of = torch.unique_consecutive(contestants // self.num_units, return_inverse=True)
            rank = torch.randperm(len(contestants), generator=generator, device=features.device)
            best = rank.new_full((len(contestants),), -1).scatter_reduce_(0, contest_of, rank, "amax")
            keep[inside] = (rank == best[contest_of])[which]
        return keep


@final
class Hierarchy:
    """A forest, and the modifier that applies it (see `hierarchy_modifier`)."""

    def __init__(self, roots: Sequence[HierarchyNode], modifier: Any = None) -> None:
        self.roots = list(roots)
        validate_forest(self.roots)
        self.modifier = modifier

    @property
    def feature_indices_used(self) -> set[int]:
        """All features of the forest."""
        return {index for root in self.roots for index in root.get_all_feature_indices()}

    def to_dict(self) -> dict[str, Any]:
        """The forest as JSON values."""
        return {"roots": [root.to_dict() for root in self.roots]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Hierarchy:
        """The forest that `to_dict` wrote. Raises ConfigError."""
        if not isinstance(data, Mapping) or set(data) != {"roots"} or not isinstance(data["roots"], list):
            raise ConfigError("hierarchy: expected a mapping with the single key 'roots', a list of nodes")
        return _with_modifier([HierarchyNode.from_dict(root) for root in data["roots"]])

    def compute_probability_correction_factors(self, base_firing_probabilities: Tensor) -> Tensor:
        """(N,) factors for the probabilities of features so that the hierarchy does not make them rarer.

        A child of a parent with probability P needs 1/P. Where children exclude each other, a child with siblings of
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
            factor = 1 / chance
            if node.mutually_exclusive_children:
                factor *= 1 + (mass - float(base[child.feature_index])) / chance
            factors[child.feature_index] = factor
        _correct(child, above, base, factors)


def generate_hierarchy(num_features: int, config: HierarchyConfig, seed: int | None = None) -> Hierarchy:
    """A forest of the shape that `config` describes: features are given out level by level, roots first.

    The forest ends when all features are used. Raises ConfigError when there are not enough features for the roots.
    """
    require(
        config.total_root_nodes <= num_features,
        f"hierarchy: total_root_nodes {config.total_root_nodes} is more than the {num_features} features",
    )
    source = random.Random(checked_seed(seed))
    fewest, most = config.branching_range
    roots = [HierarchyNode(index) for index in range(config.total_root_nodes)]
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
    return _with_modifier(roots)


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


def _with_modifier(roots: list[HierarchyNode]) -> Hierarchy:
    from sae_synthetic.modifiers import hierarchy_modifier  # the modifier needs the plan above

    return Hierarchy(roots, hierarchy_modifier(roots))
