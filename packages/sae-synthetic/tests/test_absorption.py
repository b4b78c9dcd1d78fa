"""Absorption and hedging on SAEs that absorb or hedge by construction."""

from __future__ import annotations

import math

import pytest
import torch
from sae_core import SAE, create
from sae_core.errors import ConfigError
from sae_synthetic import (
    ActivationGenerator,
    FeatureDictionary,
    HierarchyNode,
    hierarchy_modifier,
    init_sae_to_match_feature_dict,
    structure_scores,
)

TREE = HierarchyNode(0, [HierarchyNode(1), HierarchyNode(2)])


@pytest.fixture
def world() -> tuple[FeatureDictionary, ActivationGenerator]:
    """A parent that fires half the time, and two children that each fire in half of those."""
    generator = ActivationGenerator(4, 0.5, modify_activations=hierarchy_modifier(TREE), seed=1)
    return FeatureDictionary(4, 8, seed=0), generator


def _at_the_truth(features: FeatureDictionary, latents: int = 4) -> SAE:
    sae = create("standard", d_in=8, d_sae=latents)
    init_sae_to_match_feature_dict(sae, features)
    with torch.no_grad():
        sae.b_enc.fill_(-0.1)
    return sae


def test_the_truth_neither_absorbs_nor_hedges(world: tuple[FeatureDictionary, ActivationGenerator]) -> None:
    found = structure_scores(_at_the_truth(world[0]), *world, num_samples=2000)
    assert [(edge.parent, edge.child) for edge in found.edges] == [(0, 1), (0, 2)]
    for edge in found.edges:
        assert (edge.absorption, edge.missed_alone) == (0.0, 0.0)
        assert (edge.hedging, edge.child_lean) == pytest.approx((0.0, 0.0), abs=1e-5)
    assert (found.absorption, found.hedging) == pytest.approx((0.0, 0.0), abs=1e-5)


def test_a_child_that_speaks_for_its_parent_is_absorption(
    world: tuple[FeatureDictionary, ActivationGenerator],
) -> None:
    features, generator = world
    sae = _at_the_truth(features)
    with (
        torch.no_grad()
    ):  # the parent's latent is silent where child 1 fires, and child 1's direction carries the parent
        sae.W_enc[:, 0] -= 2 * features.feature_vectors[1]
        sae.W_dec[1] = (features.feature_vectors[1] + features.feature_vectors[0]) / math.sqrt(2)
    found = structure_scores(sae, features, generator, num_samples=4000)
    absorbing, other = found.edges
    assert absorbing.absorption == 1.0
    assert absorbing.missed_alone == 0.0  # where child 1 is not there, the parent's latent speaks
    assert absorbing.child_lean == pytest.approx(1 / math.sqrt(2), abs=1e-4)
    assert absorbing.hedging == pytest.approx(0.0, abs=1e-4)
    # Child 2 is there together with child 1 in half the samples, and its latent speaks, so half of its samples count.
    assert other.absorption == pytest.approx(0.5, abs=0.08)
    assert found.absorption == pytest.approx((1.0 + other.absorption) / 2)


def test_a_parent_that_carries_its_child_is_hedging(world: tuple[FeatureDictionary, ActivationGenerator]) -> None:
    features, generator = world
    sae = _at_the_truth(features)
    with torch.no_grad():
        sae.W_dec[0] = -(0.8 * features.feature_vectors[0] + 0.6 * features.feature_vectors[1])  # and turned round
    found = structure_scores(sae, features, generator, num_samples=500)
    assert [edge.hedging for edge in found.edges] == pytest.approx([0.6, 0.0], abs=1e-4)
    assert found.hedging == pytest.approx(0.3, abs=1e-4)
    assert found.child_lean == pytest.approx(0.0, abs=1e-4)


def test_what_cannot_be_measured_is_nan_and_left_out_of_the_means(
    world: tuple[FeatureDictionary, ActivationGenerator],
) -> None:
    features, generator = world
    found = structure_scores(_at_the_truth(features, latents=2), features, generator, num_samples=500)
    assert not math.isnan(found.edges[0].absorption)
    assert math.isnan(found.edges[1].absorption)  # child 2 has no latent
    assert math.isnan(found.edges[1].child_lean)
    assert found.edges[1].hedging == pytest.approx(0.0, abs=1e-5)  # its parent has one
    assert found.absorption == found.edges[0].absorption


def test_edges_may_be_given_and_batches_do_not_matter(world: tuple[FeatureDictionary, ActivationGenerator]) -> None:
    features, generator = world
    sae = _at_the_truth(features)
    assert [e.parent for e in structure_scores(sae, *world, edges=[(3, 1)], num_samples=100).edges] == [3]
    assert structure_scores(sae, *world, edges=[TREE], num_samples=100) == structure_scores(
        sae, *world, num_samples=100
    )
    flat = ActivationGenerator(4, 0.5, seed=1)
    with pytest.raises(ConfigError, match=r"no hierarchy; give edges as pairs"):
        structure_scores(sae, features, flat)
    for edges in ([(0, 9)], [(-1, 1)], [(0, 1, 2)]):
        with pytest.raises(ConfigError, match="edges must be pairs of features below 4"):
            structure_scores(sae, features, generator, edges=edges)  # type: ignore[arg-type]


def test_the_saes_mode_is_given_back(world: tuple[FeatureDictionary, ActivationGenerator]) -> None:
    sae = _at_the_truth(world[0]).train()
    structure_scores(sae, *world, num_samples=10)
    assert sae.training
    structure_scores(sae.eval(), *world, num_samples=10)
    assert not sae.training
