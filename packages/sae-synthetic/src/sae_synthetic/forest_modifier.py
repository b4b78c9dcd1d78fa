"""A hierarchy as a modifier: applied to activations that were drawn without it.

Level by level from the top: a child without a firing parent is silenced, of excluding children that fire together one is
kept at random, and a child's value is scaled where its parent says so. Values that are not positive do not fire; they pass
as they are, unless what they hang on does not fire. Sparse activations are worked on entry by entry, dense ones column by
column.
"""

# B rows, N features, K entries

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, final

import torch
from sae_core import SparseCodes
from sae_core.errors import ConfigError, ShapeError
from torch import Tensor

from sae_synthetic._random import generator_for
from sae_synthetic.forest import HierarchyNode, HierarchyPlan, validate_forest

__all__ = ["HierarchyModifier", "KnowsMeans", "hierarchy_modifier"]

_SPARSE = 0.04  # share of entries up to which working on them one by one is the quicker way


class KnowsMeans(Protocol):
    """What a hierarchy that scales children needs to know: `ActivationGenerator` has it."""

    mean_firing_magnitudes: Tensor


def hierarchy_modifier(roots: Sequence[HierarchyNode] | HierarchyNode) -> HierarchyModifier:
    """A modifier that lets a feature fire only where its parent does; see `HierarchyNode`.

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
        fewest = 1 + max((index for root in roots for index in root.get_all_feature_indices()), default=0)
        HierarchyPlan(self.roots, fewest)  # refuses what has no meaning now, not at the first sample
        self._plans: dict[tuple[int, torch.device], HierarchyPlan] = {}
        self._own_source = generator_for(None)

    def plan(self, num_features: int, device: torch.device) -> HierarchyPlan:
        """The hierarchy as tensors over `num_features` on `device`, made once."""
        key = (num_features, device)
        if key not in self._plans:
            self._plans[key] = HierarchyPlan(self.roots, num_features, device)
        return self._plans[key]

    def require_scalable(self, means: Tensor, stds: Tensor) -> None:
        """Raise ConfigError where a child is scaled by value / mean of a parent whose mean (N,) is 0, or too small for it."""
        plan = self.plan(len(means), means.device)
        above = plan.parent[plan.scaled].unique()
        above = above[above >= 0]
        largest = (means[above] + 10 * stds[above]) / means[above]  # 0 / 0 where a parent never fires: nothing to scale
        bad = above[~torch.isfinite(largest) & ((means[above] > 0) | (stds[above] > 0))]
        if len(bad):
            first = int(bad[0])
            raise ConfigError(
                f"mean_firing_magnitudes: scale_children_by_parent divides by the mean of feature {first}, which is "
                f"{float(means[first]):.3g} ({len(bad)} such); give it a positive mean, or do not scale its children"
            )

    def __call__(self, activations: Tensor, generator: KnowsMeans | None = None) -> Tensor:
        """`activations` (B, N), dense or sparse COO, with the hierarchy applied, in the same layout."""
        if activations.dim() != 2:
            raise ShapeError(
                f"hierarchy_modifier: activations must be (batch, features), not {tuple(activations.shape)}"
            )
        means = None if generator is None else generator.mean_firing_magnitudes.to(activations.device)
        if self._own_source.device != activations.device:
            self._own_source = generator_for(None, activations.device)
        if not activations.is_sparse:
            if int(torch.count_nonzero(activations)) < _SPARSE * activations.numel():
                return self.modify_codes(SparseCodes.from_dense(activations), means, self._own_source).to_dense()
            return self._modify_dense(activations, means, self._own_source)
        entries = activations.coalesce()
        rows, features = entries.indices()
        offsets = _offsets(rows, len(activations))
        codes = SparseCodes(entries.values(), features, (len(activations),), activations.shape[1], offsets=offsets)
        changed = self.modify_codes(codes, means, self._own_source)
        places = torch.stack([changed.row_ids(), changed.indices])
        return torch.sparse_coo_tensor(
            places, changed.values, activations.shape, is_coalesced=True, check_invariants=False
        )

    def modify_codes(self, codes: SparseCodes, means: Tensor | None, random_source: torch.Generator) -> SparseCodes:
        """The same of `SparseCodes`; entries that are silenced are left out."""
        plan = self._plan_for(codes.d_sae, codes.device, means)
        rows, features = codes.row_ids(), codes.indices
        values = codes.values.clone()
        keys, order = torch.sort(rows * codes.d_sae + features)
        above = plan.parent[features]
        place = torch.searchsorted(keys, rows * codes.d_sae + above).clamp_max(max(len(keys) - 1, 0))
        has_parent = above >= 0
        parent_entry = order[place] if len(order) else place  # meaningful only where the parent is really there
        parent_there = has_parent & (features[parent_entry] == above) & (rows[parent_entry] == rows)
        kept = values != 0
        level_of = plan.levels[features]
        for level in range(plan.depth):
            here = (kept & (level_of == level)).nonzero().squeeze(1)
            if level:
                parents = parent_entry[here]
                fires = parent_there[here] & kept[parents] & (values[parents] > 0)
                kept[here[~fires]] = False
                here = here[fires]
                if means is not None:
                    scaled = here[plan.scaled[features[here]]]
                    values[scaled] *= values[parent_entry[scaled]] / _positive(means, above[scaled])
            firing = here[values[here] > 0]
            contests = parent_entry[firing] if level else rows[firing]
            stays = plan.keep_one_per_group(contests, features[firing], random_source)
            kept[firing[~stays]] = False
        kept &= values != 0
        return SparseCodes(
            values[kept],
            features[kept],
            codes.leading_shape,
            codes.d_sae,
            offsets=_offsets(rows[kept], codes.rows),
        )

    def _modify_dense(self, activations_BN: Tensor, means: Tensor | None, random_source: torch.Generator) -> Tensor:
        plan = self._plan_for(activations_BN.shape[1], activations_BN.device, means)
        changed_BN = activations_BN.clone()
        for level, (features, grouped) in enumerate(plan.columns()):
            if level and len(features):
                above = plan.parent[features]
                value = changed_BN.index_select(1, above)
                factor = (value > 0).to(value.dtype)
                scaled = plan.scaled[features]
                if means is not None and bool(scaled.any()):
                    fires = (factor[:, scaled] > 0).any(dim=0)  # a mean matters where its parent fires
                    divisor = torch.ones_like(means[above[scaled]])
                    divisor[fires] = _positive(means, above[scaled][fires])
                    factor[:, scaled] *= value[:, scaled] / divisor
                changed_BN.index_copy_(1, features, changed_BN.index_select(1, features) * factor)
            if not len(grouped):
                continue
            fires_BG = changed_BN.index_select(1, grouped) > 0
            # Only where two of one group fire is there anything to decide. A group is of one parent, so of one sample.
            group = plan.layers[0][0][grouped]
            counts = torch.zeros(len(changed_BN), plan.num_groups, dtype=torch.int32, device=changed_BN.device)
            counts.index_add_(1, group, fires_BG.int())
            fires_BG &= (counts > 1).index_select(1, group)
            rows, places = fires_BG.nonzero(as_tuple=True)
            stays = plan.keep_one_per_group(rows, grouped[places], random_source, len(changed_BN))
            changed_BN[rows[~stays], grouped[places[~stays]]] = 0
        return changed_BN

    def _plan_for(self, num_features: int, device: torch.device, means: Tensor | None) -> HierarchyPlan:
        plan = self.plan(num_features, device)
        if means is None and bool(plan.scaled.any()):
            raise ConfigError(
                "hierarchy_modifier: scale_children_by_parent needs the features' mean magnitudes; "
                "give the modifier to an ActivationGenerator, or pass one as its second argument"
            )
        return plan


def _positive(means: Tensor, features: Tensor) -> Tensor:
    """The means of `features`. Raises ConfigError where one of them is not positive."""
    chosen = means[features]
    if bool((chosen <= 0).any()):
        first = int(features[chosen <= 0][0])
        raise ConfigError(
            f"hierarchy_modifier: scale_children_by_parent divides by the mean magnitude of feature {first}, which is "
            f"{float(means[first]):.3g}; give it a positive mean, or do not scale its children"
        )
    return chosen


def _offsets(rows: Tensor, num_rows: int) -> Tensor:
    offsets = torch.zeros(num_rows + 1, dtype=torch.long, device=rows.device)
    torch.cumsum(torch.bincount(rows, minlength=num_rows), 0, out=offsets[1:])
    return offsets
