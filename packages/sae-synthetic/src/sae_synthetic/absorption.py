"""Absorption and hedging: how an SAE bends the features of a hierarchy, measured edge by edge.

Latents are matched one to one to true features. For a parent and its child, with v their true unit directions:

- absorption (arXiv 2409.14507): where both fire, the parent's latent is silent and the child's latent speaks for both;
  the child's decoder direction then leans towards the parent.
- hedging (arXiv 2505.11756): the SAE lacks room for both, or was told to be too sparse, and the parent's latent carries
  part of the child; the parent's decoder direction leans towards the child.
"""

# B rows, E edges, F latents, N features

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sae_core import SAE
from sae_core.config import require
from sae_core.errors import ConfigError
from torch import Tensor

from sae_synthetic.features import FeatureDictionary
from sae_synthetic.forest import HierarchyNode, HierarchyPlan
from sae_synthetic.generator import ActivationGenerator
from sae_synthetic.matching import match_features

__all__ = ["EdgeScores", "StructureScores", "structure_scores"]


@dataclass(frozen=True)
class EdgeScores:
    """One parent and child.

    `absorption` is the share of samples in which both fire where the parent's latent is silent while the child's fires;
    `missed_alone` the share of samples with the parent but without the child where the parent's latent is silent anyway.
    `hedging` is how much the parent's decoder direction leans towards the child, and `child_lean` how much the child's
    leans towards the parent: cosines, minus that of the true directions. NaN where a latent or a sample is missing.
    """

    parent: int
    child: int
    absorption: float
    missed_alone: float
    hedging: float
    child_lean: float


@dataclass(frozen=True)
class StructureScores:
    """All edges, and the means over those that could be measured."""

    edges: list[EdgeScores]
    absorption: float
    hedging: float
    child_lean: float


@torch.no_grad()
def structure_scores(
    sae: SAE,
    feature_dict: FeatureDictionary,
    activations_generator: ActivationGenerator,
    edges: Sequence[tuple[int, int]] | Sequence[HierarchyNode] | None = None,
    num_samples: int = 50_000,
    batch_size: int = 4096,
) -> StructureScores:
    """Absorption and hedging on held-out samples.

    `edges` are pairs (parent, child), or the roots of a hierarchy; by default the generator's own hierarchy. Raises
    ConfigError when there is none.
    """
    require(num_samples >= 1, f"num_samples must be at least 1, not {num_samples}")
    pairs = _pairs(edges, activations_generator)
    matching = match_features(sae.directions(), feature_dict.feature_vectors)
    latent_of = torch.full((feature_dict.num_features,), -1)
    latent_of[matching.b_indices] = matching.a_indices
    parents, children = pairs.unbind(1)
    parent_latents, child_latents = latent_of[parents], latent_of[children]
    counts = torch.zeros(4, len(pairs), dtype=torch.double)  # both, absorbed, alone, missed alone
    generator = activations_generator.held_out()
    was_training = sae.training
    sae.eval()
    for start in range(0, num_samples, batch_size):
        codes = generator.sample_codes(min(batch_size, num_samples - start))
        latents = sae.encode_sparse(feature_dict(codes).to(sae.device, sae.dtype))
        fires = codes.to_dense().cpu() > 0
        speaks = latents.to_dense().cpu() != 0
        with_parent, with_child = fires[:, parents], fires[:, children]
        silent = ~speaks[:, parent_latents]
        both, alone = with_parent & with_child, with_parent & ~with_child
        absorbed = both & silent & speaks[:, child_latents]
        counts += torch.stack([part.double().sum(0) for part in (both, absorbed, alone, alone & silent)])
    sae.train(was_training)
    return _summary(pairs, counts, parent_latents, child_latents, sae.directions(), feature_dict)


def _pairs(edges: Sequence[tuple[int, int]] | Sequence[HierarchyNode] | None, generator: ActivationGenerator) -> Tensor:
    """(E, 2) parents and children."""
    roots = generator.hierarchy_roots if edges is None else [e for e in edges if isinstance(e, HierarchyNode)]
    if roots:
        above = HierarchyPlan(roots, generator.num_features).parent
        pairs = torch.stack([above, torch.arange(len(above))], dim=1)[above >= 0]
    else:
        pairs = torch.tensor([list(edge) for edge in edges or [] if not isinstance(edge, HierarchyNode)])
    if not len(pairs):
        raise ConfigError("structure_scores: there is no hierarchy; give edges as pairs (parent, child)")
    fits = pairs.shape[1:] == (2,) and 0 <= int(pairs.min()) <= int(pairs.max()) < generator.num_features
    require(fits, f"structure_scores: edges must be pairs of features below {generator.num_features}, found {edges}")
    return pairs


def _summary(
    pairs: Tensor,
    counts: Tensor,
    parent_latents: Tensor,
    child_latents: Tensor,
    W_dec: Tensor,
    truth: FeatureDictionary,
) -> StructureScores:
    both, absorbed, alone, missed = counts
    missing = float("nan")
    has_parent, has_child = parent_latents >= 0, child_latents >= 0
    absorption = torch.where(has_parent & has_child, absorbed / both, missing)
    missed_alone = torch.where(has_parent, missed / alone, missing)
    hedging = torch.where(has_parent, _lean(parent_latents, pairs[:, 0], pairs[:, 1], W_dec, truth), missing)
    child_lean = torch.where(has_child, _lean(child_latents, pairs[:, 1], pairs[:, 0], W_dec, truth), missing)
    columns = (absorption.tolist(), missed_alone.tolist(), hedging.tolist(), child_lean.tolist())
    edges = [EdgeScores(*pair, *values) for pair, *values in zip(pairs.tolist(), *columns, strict=True)]
    means = [float(values[~values.isnan()].mean()) for values in (absorption, hedging, child_lean)]
    return StructureScores(edges, *means)


def _lean(latents: Tensor, own: Tensor, other: Tensor, W_dec: Tensor, truth: FeatureDictionary) -> Tensor:
    """(E,) cosine of each latent's decoder direction with `other`, minus that of its own true feature with `other`.

    A direction that points away from its own feature counts turned round.
    """
    vectors = torch.nn.functional.normalize(truth.feature_vectors.detach().double().cpu(), dim=1)
    directions = torch.nn.functional.normalize(W_dec.double().cpu()[latents], dim=1)
    sign = torch.where((directions * vectors[own]).sum(dim=1) < 0, -1.0, 1.0)
    return sign * (directions * vectors[other]).sum(dim=1) - (vectors[own] * vectors[other]).sum(dim=1)
