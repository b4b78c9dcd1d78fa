"""Statistics of a world against their definitions, and conditional rates of its features against theirs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sae_core.errors import ConfigError
from sae_synthetic import (
    ActivationGenerator,
    FeatureDictionary,
    Hierarchy,
    HierarchyNode,
    compute_correlation_matrix_stats,
    compute_low_rank_correlation_matrix_stats,
    compute_superposition_stats,
    generate_random_correlation_matrix,
    generate_random_low_rank_correlation_matrix,
    hierarchy_modifier,
)
from scipy import stats
from torch import Tensor

Rates = Callable[[Tensor, int, Tensor], None]
ROWS = 100_000


def test_summaries_are_those_of_sae_lens(golden_numbers: dict[str, Any], golden_tensors: dict[str, Tensor]) -> None:
    low_rank = generate_random_low_rank_correlation_matrix(9, 3, correlation_scale=0.2, seed=5)
    found = compute_low_rank_correlation_matrix_stats(low_rank)
    assert vars(found) == pytest.approx(golden_numbers["low_rank_stats"], rel=1e-5)
    overlaps = compute_superposition_stats(FeatureDictionary(12, 6, bias=2.0, seed=9), batch_size=5)
    wanted = golden_numbers["superposition"]
    assert overlaps.mean_max_abs_cos_sim == pytest.approx(wanted["mean_max"], rel=1e-4)
    assert overlaps.mean_abs_cos_sim == pytest.approx(wanted["mean"], rel=1e-4)
    assert overlaps.mean_percentile_abs_cos_sim[95] == pytest.approx(wanted["mean_95"], rel=1e-4)
    torch.testing.assert_close(overlaps.max_abs_cos_sims, golden_tensors["max_abs_cos_sims"], atol=1e-4, rtol=0)
    torch.testing.assert_close(overlaps.percentile_abs_cos_sims[95], golden_tensors["percentile_95"], atol=1e-4, rtol=0)


def test_low_rank_summaries_are_those_of_the_same_matrix_in_full() -> None:
    factor, diagonal = low_rank = generate_random_low_rank_correlation_matrix(30, 4, 0.2, seed=1)
    full = compute_correlation_matrix_stats(factor @ factor.T + torch.diag(diagonal))
    assert vars(compute_low_rank_correlation_matrix_stats(low_rank)) == pytest.approx(vars(full), rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_overlaps_are_those_of_all_pairs(batch_size: int) -> None:
    features = FeatureDictionary(23, 6, initializer=None, seed=2)
    found = compute_superposition_stats(features, batch_size, percentiles=[0, 30, 100])
    cosines = (features.feature_vectors @ features.feature_vectors.T).detach().abs()
    others = cosines[~torch.eye(23, dtype=torch.bool)].view(23, 22)
    torch.testing.assert_close(found.max_abs_cos_sims, others.amax(1))
    for q in (0, 30, 100):
        torch.testing.assert_close(found.percentile_abs_cos_sims[q], others.quantile(q / 100, dim=1))
    assert found.mean_abs_cos_sim == pytest.approx(float(others.mean()), rel=1e-5)


def test_statistics_of_too_little_are_refused() -> None:
    with pytest.raises(ConfigError, match="need at least 2 features, found 1"):
        compute_superposition_stats(FeatureDictionary(1, 4, initializer=None))
    with pytest.raises(ConfigError, match="percentiles must be in"):
        compute_superposition_stats(FeatureDictionary(3, 4, initializer=None), percentiles=[101])


def _firing(generator: ActivationGenerator, rows: int = ROWS) -> Tensor:
    return generator.sample_codes(rows).to_dense() > 0


def test_a_child_fires_at_its_probability_where_its_parent_fires(assert_rates: Rates) -> None:
    p = torch.tensor([0.3, 0.6, 0.2, 0.5, 0.05])
    chain = HierarchyNode(0, [HierarchyNode(1, [HierarchyNode(2), HierarchyNode(3)]), HierarchyNode(4)])
    fires = _firing(ActivationGenerator(5, p, modify_activations=hierarchy_modifier(chain), seed=1))
    assert_rates(fires[:, :1].sum(0), ROWS, p[:1])
    for parent, children in ((0, [1, 4]), (1, [2, 3])):
        where = fires[:, parent]
        assert_rates(fires[where][:, children].sum(0), int(where.sum()), p[children])
        assert not bool(fires[~where][:, children].any())


def test_each_of_excluding_children_keeps_its_share() -> None:
    p = [0.5, 0.4, 0.2]
    tree = HierarchyNode(0, [HierarchyNode(i) for i in (1, 2, 3)], mutually_exclusive_children=True)
    fires = _firing(
        ActivationGenerator(4, torch.tensor([0.5, *p]), modify_activations=hierarchy_modifier(tree), seed=2)
    )
    below = fires[fires[:, 0]][:, 1:]
    # child i stays if it is drawn, and then against each number of drawn siblings with probability 1 / (1 + number)
    wanted = []
    for i in range(3):
        a, b = (p[j] for j in range(3) if j != i)
        wanted.append(p[i] * ((1 - a) * (1 - b) + (a * (1 - b) + b * (1 - a)) / 2 + a * b / 3))
    counts = below.sum(0).tolist()
    observed = [*counts, len(below) - sum(counts)]
    expected = [len(below) * share for share in [*wanted, 1 - sum(wanted)]]
    assert stats.chisquare(observed, expected).pvalue > 1e-4


def test_compensated_children_without_exclusion_fire_as_often_as_wanted(assert_rates: Rates) -> None:
    wanted = torch.tensor([0.5, 0.3, 0.2, 0.1, 0.05, 0.02])
    roots = [HierarchyNode(0, [HierarchyNode(1, [HierarchyNode(3)]), HierarchyNode(2, [HierarchyNode(4)])])]
    factors = Hierarchy(roots).compute_probability_correction_factors(wanted)
    generator = ActivationGenerator(6, wanted * factors, modify_activations=hierarchy_modifier(roots), seed=3)
    assert_rates(generator.sample_codes(ROWS).firing_counts(), ROWS, wanted)


def test_scaled_children_have_the_mean_and_spread_of_the_product() -> None:
    tree = HierarchyNode(0, [HierarchyNode(1)], scale_children_by_parent=True)
    means, spreads = torch.tensor([4.0, 2.0]), torch.tensor([0.8, 0.3])
    generator = ActivationGenerator(2, 1.0, spreads, means, hierarchy_modifier(tree), seed=4)
    values = generator.sample(ROWS).double()
    parent, child = values.unbind(1)
    spread = math.sqrt((0.3**2 + 4.0) * (1 + 0.2**2) - 4.0)  # of the product of independent child and parent / mean
    assert abs(float(child.mean()) - 2.0) < 4 * spread / math.sqrt(ROWS)
    assert float(child.std()) == pytest.approx(spread, rel=0.015)
    own = child / (parent / 4.0)
    assert stats.kstest(((own - 2.0) / 0.3).numpy(), "norm").pvalue > 1e-4


def test_wide_full_correlations_show_in_pairs() -> None:
    n = 24
    matrix = generate_random_correlation_matrix(n, 0.5, 0.3, 0.1, 0.5, seed=5)
    fires = _firing(ActivationGenerator(n, 0.3, correlation_matrix=matrix, seed=5)).double()
    together = (fires.T @ fires)[tuple(torch.triu_indices(n, n, offset=1))]
    point = [stats.norm.ppf(0.3)] * 2
    scores = []
    for count, r in zip(together.tolist(), matrix[tuple(torch.triu_indices(n, n, offset=1))].tolist(), strict=True):
        share = float(stats.multivariate_normal(cov=[[1, r], [r, 1]]).cdf(point))
        scores.append((count - ROWS * share) / math.sqrt(ROWS * share * (1 - share)))
    assert max(map(abs, scores)) < 4.5
    assert stats.kstest(scores, "norm").pvalue > 1e-4
