"""Modifiers: plain functions that change feature activations after they were drawn.

A modifier maps activations (batch, num_features) to activations of the same shape; one that takes a second argument gets
the `ActivationGenerator`. After the last one, negative values become zero. A `SparseModifier` additionally works on
`SparseCodes`, so that wide dictionaries never become dense; the hierarchy is one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from sae_core import SparseCodes
from sae_core.errors import ConfigError, ShapeError
from torch import Tensor

from sae_synthetic.forest_modifier import HierarchyModifier, KnowsMeans

__all__ = [
    "ActivationsModifier",
    "ActivationsModifierInput",
    "SparseModifier",
    "apply_modifier",
    "as_modifiers",
    "first_hierarchy",
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
    modifier: ActivationsModifier, codes: SparseCodes, owner: KnowsMeans, random_source: torch.Generator
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


def first_hierarchy(modifiers: Iterable[ActivationsModifier]) -> HierarchyModifier | None:
    """The first modifier, if it is a hierarchy that sampling can take over."""
    for modifier in modifiers:
        return modifier if isinstance(modifier, HierarchyModifier) else None
    return None
