"""Trees of features, and the same trees as tensors.

A tree of `HierarchyNode`s says who is whose child, whether the children of a node exclude each other (of those that
would fire together one is kept, at random), and whether a child's value is scaled by its parent's. A node without a
feature only groups its children: they hang on the nearest feature above it, and in a group of excluding children such a
node counts as firing when anything directly below it fires.

`HierarchyPlan` is the form in which a forest is sampled from and applied.
"""

# N features

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import torch
from sae_core.config import require
from sae_core.errors import ConfigError
from torch import Tensor

__all__ = ["HierarchyNode", "HierarchyPlan", "validate_forest"]


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

    def __eq__(self, other: object) -> bool:
        """Whether both trees say the same, children in the same order."""
        if not isinstance(other, HierarchyNode):
            return NotImplemented
        return self._own() == other._own() and self.children == other.children

    __hash__ = None  # pyright: ignore[reportAssignmentType] - nodes are mutable

    def _own(self) -> tuple[Any, ...]:
        return (
            self.feature_index,
            self.mutually_exclusive_children,
            self.scale_children_by_parent,
            self.feature_id,
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
        self._single = [bool((torch.bincount(unit_N[unit_N >= 0]) <= 1).all()) for _, unit_N in self.layers]
        self.levels = self._levels()
        self.depth = int(self.levels.max()) + 1
        self._columns: list[tuple[Tensor, Tensor]] | None = None

    def _levels(self) -> Tensor:
        """(N,) number of features above each feature."""
        levels = torch.zeros_like(self.parent)
        above = self.parent.clone()
        while bool((above >= 0).any()):
            levels += above >= 0
            above = torch.where(above >= 0, self.parent[above.clamp_min(0)], above)
        return levels

    def columns(self) -> list[tuple[Tensor, Tensor]]:
        """For every level from the top: its features, and those of them that are in a group."""
        if self._columns is None:
            in_group = self.layers[0][0] >= 0 if self.layers else torch.zeros_like(self.scaled)
            levels = [self.levels == level for level in range(self.depth)]
            self._columns = [(here.nonzero().squeeze(1), (here & in_group).nonzero().squeeze(1)) for here in levels]
        return self._columns

    def keep_one_per_group(
        self, parents: Tensor, features: Tensor, generator: torch.Generator, num_parents: int | None = None
    ) -> Tensor:
        """(entries,) bool: which of the firing `features` stay when groups are resolved.

        `parents` (entries,) tells entries of different samples or parents apart; every choice is uniform over the units
        that fire. With `num_parents`, a bound on `parents`, no sorting is needed where each unit is one feature.
        """
        keep = torch.ones_like(features, dtype=torch.bool)
        for layer, (group_N, unit_N) in enumerate(self.layers):
            inside = ((group_N[features] >= 0) & keep).nonzero().squeeze(1)
            if not len(inside):
                continue
            group, unit = group_N[features[inside]], unit_N[features[inside]]
            contest = parents[inside] * self.num_groups + group
            if num_parents is not None and self._single[layer] and num_parents * self.num_groups <= 8 * len(inside):
                contest_of, which, size = contest, None, num_parents * self.num_groups
            else:
                contestants, which = torch.unique(contest * self.num_units + unit, return_inverse=True)
                # contestants are sorted, so those of one contest are neighbours: a random rank picks one of each run.
                runs, contest_of = torch.unique_consecutive(contestants // self.num_units, return_inverse=True)
                size = len(runs)
            rank = torch.randperm(len(contest_of), generator=generator, device=features.device)
            best = rank.new_full((size,), -1).scatter_reduce_(0, contest_of, rank, "amax")
            wins = rank == best[contest_of]
            keep[inside] = wins if which is None else wins[which]
        return keep
