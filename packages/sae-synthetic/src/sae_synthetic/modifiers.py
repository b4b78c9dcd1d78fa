"""Modifiers: plain functions that change feature activations after they were drawn.

A modifier maps activations (batch, num_features) to activations of the same shape; one that takes a second argument gets
the `ActivationGenerator`. After the last one, negative values become zero. A `SparseModifier` additionally works on
`SparseCodes`, so that wide dictionaries never become dense; the hierarchy is one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast, final, runtime_checkable

import torch
from sae_core import SparseCodes
from sae_core.errors import ConfigError, ShapeError
from torch import Tensor

from sae_synthetic._random import generator_for
from sae_synthetic.hierarchy import HierarchyNode, HierarchyPlan, validate_forest

if TYPE_CHECKING:
    from sae_synthetic.generator import ActivationGenerator

__all__ = [
    "ActivationsModifier",
    "ActivationsModifierInput",
    "HierarchyModifier",
    "SparseModifier",
    "apply_modifier",
    "as_modifiers",
    "hierarchy_modifier",
]

ActivationsModifier = Callable[[Tensor], Tensor] | Callable[[Tensor, Any], Tensor]
ActivationsModifierInput = ActivationsModifier | Sequence[ActivationsModifier] | None


@runtime_checkable
class SparseModifier(Protocol):
    """A modifier that needs no dense activations."""

    def modify_codes(self, codes: SparseCodes, means: Tensor | None, random_source: torch.Generator) -> SparseCodes:
        """`codes` changed; `means` (num_features,) are the features' mean magnitudes where they are known."""
        ...


def as_modifiers(modifiers: ActivationsModifierInput) -> list[ActivationsModifier]:
    """None, one modifier or several, as a list. Raises ConfigError for anything that cannot be called."""
    if modifiers is None:
        return []
    several: list[Any] = (
        list(modifiers) if isinstance(modifiers, Sequence) and not isinstance(modifiers, str) else [modifiers]
    )
    for modifier in several:
        if not callable(modifier):
            raise ConfigError(f"modify_activations: {modifier!r} is not a function of activations")
    return several


def apply_modifier(
    modifier: ActivationsModifier, codes: SparseCodes, owner: ActivationGenerator, random_source: torch.Generator
) -> SparseCodes:
    """The activations after `modifier`; dense in between only if the modifier is a plain function."""
    if isinstance(modifier, SparseModifier):
        return modifier.modify_codes(codes, owner.mean_firing_magnitudes, random_source)
    dense = codes.to_dense()
    changed = cast("Any", modifier)(dense, owner) if _takes_owner(modifier) else cast("Any", modifier)(dense)
    if not isinstance(changed, Tensor) or changed.shape != dense.shape:
        shape = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
        raise ShapeError(f"modify_activations: {modifier!r} returned {shape} for activations {tuple(dense.shape)}")
    if changed.is_sparse:
        changed = changed.to_dense()
    return SparseCodes.from_dense(changed.clamp_min(0))


def _takes_owner(modifier: ActivationsModifier) -> bool:
    try:
        parameters = inspect.signature(modifier).parameters.values()
    except (TypeError, ValueError):  # builtins and C functions have no signature
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len([p for p in positional if p.default is p.empty]) >= 2 or any(p.name == "generator" for p in positional)


def hierarchy_modifier(roots: Sequence[HierarchyNode] | HierarchyNode) -> HierarchyModifier:
    """A modifier that lets a feature fire only where its parent does; see `sae_synthetic.hierarchy`.

    Raises ConfigError for loops, nodes with two parents, and features that occur twice.

    >>> modifier = hierarchy_modifier(HierarchyNode(0, [HierarchyNode(1)]))
    >>> modifier(torch.tensor([[1.0, 2.0], [0.0, 2.0]]))
    tensor([[1., 2.],
            [0., 0.]])
    """
    return HierarchyModifier([roots] if isinstance(roots, HierarchyNode) else roots)


@final
class HierarchyModifier:
    """Applies a hierarchy to activations; give one to `ActivationGenerator` as `modify_activations`.

    As the first modifier of a generator it is not applied afterwards but sampled from: children are drawn only where
    their parent fires. Called by itself on activations that were drawn elsewhere, choices among excluding children come
    from a generator of its own, seeded from the operating system.
    """

    def __init__(self, roots: Sequence[HierarchyNode]) -> None:
        self.roots = list(roots)
        validate_forest(self.roots)
        self._least_features = 1 + max((index for root in roots for index in root.get_all_feature_indices()), default=0)
        HierarchyPlan(self.roots, self._least_features)  # refuses what has no meaning now, not at the first sample
        self._plans: dict[tuple[int, torch.device], HierarchyPlan] = {}
        self._own_source = generator_for(None)

    def plan(self, num_features: int, device: torch.device) -> HierarchyPlan:
        """The hierarchy as tensors over `num_features` on `device`, made once."""
        key = (num_features, device)
        if key not in self._plans:
            self._plans[key] = HierarchyPlan(self.roots, num_features, device)
        return self._plans[key]

    def __call__(self, activations: Tensor, generator: ActivationGenerator | None = None) -> Tensor:
        """`activations` (batch, num_features), dense or sparse COO, with the hierarchy applied, in the same layout."""
        if activations.dim() != 2:
            raise ShapeError(
                f"hierarchy_modifier: activations must be (batch, features), not {tuple(activations.shape)}"
            )
        means = None if generator is None else generator.mean_firing_magnitudes
        dense = activations.to_dense() if activations.is_sparse else activations
        if self._own_source.device != dense.device:
            self._own_source = generator_for(None, dense.device)
        changed = self.modify_codes(SparseCodes.from_dense(dense), means, self._own_source).to_dense()
        return changed.to_sparse() if activations.is_sparse else changed

    def modify_codes(self, codes: SparseCodes, means: Tensor | None, random_source: torch.Generator) -> SparseCodes:
        """Level by level from the top: drop children without a firing parent, resolve groups, scale by the parent."""
        plan = self.plan(codes.d_sae, codes.device)
        if means is None and bool(plan.scaled.any()):
            raise ConfigError(
                "hierarchy_modifier: scale_children_by_parent needs the features' mean magnitudes; "
                "give the modifier to an ActivationGenerator, or pass one as its second argument"
            )
        rows, features = codes.row_ids(), codes.indices
        values = codes.values.clone()
        keys, order = torch.sort(rows * codes.d_sae + features)
        above = plan.parent[features]
        place = torch.searchsorted(keys, rows * codes.d_sae + above).clamp_max(max(len(keys) - 1, 0))
        has_parent = above >= 0
        parent_entry = order[place] if len(order) else place  # meaningful only where the parent is really there
        parent_fires = has_parent & (features[parent_entry] == above) & (rows[parent_entry] == rows)
        alive = values > 0
        level_of = plan.levels[features]
        for level in range(int(plan.levels.max()) + 1):
            here = (alive & (level_of == level)).nonzero().squeeze(1)
            if level:
                fires = parent_fires[here] & alive[parent_entry[here]]
                alive[here[~fires]] = False
                here = here[fires]
            contests = parent_entry[here] if level else rows[here]
            stays = plan.keep_one_per_group(contests, features[here], random_source)
            alive[here[~stays]] = False
            here = here[stays]
            if level and means is not None:
                scaled = here[plan.scaled[features[here]]]
                values[scaled] *= values[parent_entry[scaled]] / means[above[scaled]]
        alive &= values > 0
        kept = rows[alive]
        offsets = torch.zeros(codes.rows + 1, dtype=torch.long, device=codes.device)
        torch.cumsum(torch.bincount(kept, minlength=codes.rows), 0, out=offsets[1:])
        return SparseCodes(values[alive], features[alive], codes.leading_shape, codes.d_sae, offsets=offsets)


def first_hierarchy(modifiers: Iterable[ActivationsModifier]) -> HierarchyModifier | None:
    """The first modifier, if it is a hierarchy that sampling can take over."""
    for modifier in modifiers:
        return modifier if isinstance(modifier, HierarchyModifier) else None
    return None
