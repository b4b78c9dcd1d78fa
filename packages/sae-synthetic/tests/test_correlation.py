"""Correlation matrices: given, random, of low rank, and the nearest one where what was asked for is impossible."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_core.errors import ConfigError
from sae_synthetic import (
    ActivationGenerator,
    LowRankCorrelationMatrix,
    compute_correlation_matrix_stats,
    create_correlation_matrix_from_correlations,
    generate_random_correlation_matrix,
    generate_random_correlations,
    generate_random_low_rank_correlation_matrix,
    nearest_correlation_matrix,
)
from torch import Tensor

IMPOSSIBLE = torch.tensor([[1.0, 0.9, -0.9], [0.9, 1.0, 0.9], [-0.9, 0.9, 1.0]])


def _smallest(matrix: Tensor) -> float:
    return float(torch.linalg.eigvalsh(matrix.double())[0])


def test_correlations_and_their_repair_are_those_of_sae_lens(
    golden_tensors: dict[str, Tensor], golden_numbers: dict[str, Any]
) -> None:
    low_rank = generate_random_low_rank_correlation_matrix(9, 3, correlation_scale=0.2, seed=5)
    torch.testing.assert_close(low_rank.correlation_factor, golden_tensors["correlation_factor"])
    torch.testing.assert_close(low_rank.correlation_diag, golden_tensors["correlation_diag"])
    wanted = [(tuple(pair), value) for *pair, value in golden_numbers["correlations"]]
    found = generate_random_correlations(9, seed=6)
    assert len(found) == len(wanted)
    with pytest.warns(UserWarning, match="no variables have these correlations together; they were changed by up to"):
        fixed = create_correlation_matrix_from_correlations(3, {(0, 1): 0.9, (1, 2): 0.9, (0, 2): -0.9})
    torch.testing.assert_close(fixed, golden_tensors["fixed_correlations"], atol=1e-3, rtol=0)


def test_pairs_come_back_and_the_others_have_the_default() -> None:
    matrix = create_correlation_matrix_from_correlations(4, {(0, 1): 0.5, (3, 2): -0.25}, default_correlation=0.1)
    wanted = torch.full((4, 4), 0.1).fill_diagonal_(1.0)
    wanted[0, 1] = wanted[1, 0] = 0.5
    wanted[2, 3] = wanted[3, 2] = -0.25
    assert torch.equal(matrix, wanted)


def test_what_creating_functions_return_is_always_accepted_by_a_generator() -> None:
    with pytest.warns(UserWarning, match="changed by up to"):
        repaired = create_correlation_matrix_from_correlations(3, {(0, 1): 1.0, (1, 2): 1.0, (0, 2): -1.0})
    strong = generate_random_correlation_matrix(60, 0.5, 0.0, 0.5, 1.0, seed=1)
    for matrix in (repaired, strong):
        ActivationGenerator(len(matrix), 0.1, correlation_matrix=matrix, seed=0).sample_codes(10)


def test_random_pairs_have_the_shares_and_strengths_asked_for() -> None:
    pairs = generate_random_correlations(30, 0.25, 0.4, 0.2, 0.6, seed=1)
    total = 30 * 29 // 2
    assert len(pairs) == total - int(0.4 * total)
    assert sum(value > 0 for value in pairs.values()) == int(0.25 * len(pairs))
    assert all(i < j for i, j in pairs)
    assert all(0.2 <= abs(value) <= 0.6 for value in pairs.values())
    assert pairs == generate_random_correlations(30, 0.25, 0.4, 0.2, 0.6, seed=1)
    assert pairs != generate_random_correlations(30, 0.25, 0.4, 0.2, 0.6, seed=2)


def test_a_random_matrix_that_needs_no_repair_has_the_shares_asked_for() -> None:
    matrix = generate_random_correlation_matrix(30, 0.25, 0.4, 0.01, 0.02, seed=1, dtype="float64")
    values = matrix[tuple(torch.triu_indices(30, 30, offset=1))]
    total = 30 * 29 // 2
    correlated = total - int(0.4 * total)
    assert int((values != 0).sum()) == correlated
    assert int((values > 0).sum()) == int(0.25 * correlated)
    strengths = values[values != 0].abs()
    assert 0.01 <= float(strengths.min()) < float(strengths.max()) <= 0.02 + 1e-9
    assert matrix.dtype == torch.float64
    assert torch.equal(matrix, matrix.T)


def test_a_low_rank_matrix_has_unit_diagonal_and_the_strength_it_says() -> None:
    factor, diagonal = generate_random_low_rank_correlation_matrix(400, 16, 0.1, seed=2)
    torch.testing.assert_close(factor.square().sum(1) + diagonal, torch.ones(400))
    found = compute_correlation_matrix_stats(factor @ factor.T + torch.diag(diagonal)).rms_correlation
    assert found == pytest.approx(0.1**2 * 16**0.5, rel=0.1)


def test_rows_too_strong_for_a_low_rank_matrix_are_weakened_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="of 50 features are almost fully correlated and were weakened"):
        factor, diagonal = generate_random_low_rank_correlation_matrix(50, 8, 0.5, seed=0)
    assert float(diagonal.min()) == pytest.approx(0.01, abs=1e-5)
    torch.testing.assert_close(factor.square().sum(1) + diagonal, torch.ones(50))


def test_the_nearest_matrix_is_one_and_no_small_change_brings_it_nearer() -> None:
    found = nearest_correlation_matrix(IMPOSSIBLE.double())
    assert torch.equal(found.diagonal(), torch.ones(3, dtype=torch.float64))
    assert torch.equal(found, found.T)
    assert _smallest(found) > 5e-5
    best = float((found - IMPOSSIBLE).norm())
    upper = torch.tensor([(0, 1), (0, 2), (1, 2)]).T
    for step in itertools.product((-0.02, 0.0, 0.02), repeat=3):
        other = found.clone()
        other[upper[0], upper[1]] += torch.tensor(step, dtype=torch.float64)
        other[upper[1], upper[0]] = other[upper[0], upper[1]]
        assert _smallest(other) < 1e-4 or float((other - IMPOSSIBLE).norm()) > best - 2e-3


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.integers(0, 1000))
def test_the_nearest_matrix_is_accepted_and_possible_ones_stay(n: int, seed: int) -> None:
    noise = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
    symmetric = ((noise + noise.T) / 2).clamp(-1, 1).fill_diagonal_(1.0)
    ActivationGenerator(n, 0.3, correlation_matrix=nearest_correlation_matrix(symmetric), seed=0)
    possible = create_correlation_matrix_from_correlations(n, default_correlation=0.3)
    torch.testing.assert_close(nearest_correlation_matrix(possible), possible, atol=1e-5, rtol=0)


def test_an_impossible_matrix_is_refused_and_the_error_offers_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"smallest eigenvalue -0\.8.*sae_synthetic\.nearest_correlation_matrix"):
        ActivationGenerator(3, 0.1, correlation_matrix=IMPOSSIBLE)
    ActivationGenerator(3, 0.1, correlation_matrix=nearest_correlation_matrix(IMPOSSIBLE)).sample(5)


def test_a_full_matrix_is_factorised_once_not_at_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = generate_random_correlation_matrix(20, seed=0)
    generator = ActivationGenerator(20, 0.2, correlation_matrix=matrix, seed=0)

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("factorised while sampling")

    for name in ("cholesky", "cholesky_ex", "eigh", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    assert generator.sample(10).shape == (10, 20)
    with pytest.raises(AssertionError, match="factorised"):
        ActivationGenerator(20, 0.2, correlation_matrix=matrix, seed=0)


LOW_RANK = LowRankCorrelationMatrix(torch.full((3, 2), 0.5), torch.full((3,), 0.5))


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.eye(4), r"correlation_matrix: shape \(4, 4\) does not fit 3 features"),
        (torch.full((3, 3), float("nan")), "not finite"),
        (LOW_RANK._replace(correlation_diag=torch.full((4,), 0.5)), r"diagonal \(4,\) do not fit \(3, rank\)"),
        (LOW_RANK._replace(correlation_factor=torch.zeros(2, 2)), r"factor \(2, 2\)"),
        (LOW_RANK._replace(correlation_diag=torch.tensor([0.5, 0.0, 0.5])), "correlation_diag must be positive"),
        (LOW_RANK._replace(correlation_diag=torch.full((3,), 0.7)), "must be 1; it is off by 0.2"),
        (LOW_RANK._replace(correlation_factor=torch.full((3, 2), float("inf"))), "not finite"),
        ("strong", "correlation_matrix must be"),
    ],
)
def test_matrices_that_are_no_correlations_are_refused(matrix: Any, message: str) -> None:
    ActivationGenerator(3, 0.1, correlation_matrix=LOW_RANK)
    with pytest.raises(ConfigError, match=message):
        ActivationGenerator(3, 0.1, correlation_matrix=matrix)


def test_a_plain_pair_of_tensors_is_a_low_rank_matrix() -> None:
    low_rank = generate_random_low_rank_correlation_matrix(6, 2, 0.3, seed=0)
    named, plain = (ActivationGenerator(6, 0.4, correlation_matrix=m, seed=1) for m in (low_rank, tuple(low_rank)))
    assert torch.equal(named.sample(50), plain.sample(50))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: create_correlation_matrix_from_correlations(0), "num_features must be at least 1"),
        (lambda: create_correlation_matrix_from_correlations(2, {(0, 2): 0.1}), r"pair \(0, 2\) must name two"),
        (lambda: create_correlation_matrix_from_correlations(2, {(1, 1): 0.1}), r"pair \(1, 1\) must name two"),
        (lambda: create_correlation_matrix_from_correlations(2, {(0, 1): 1.5}), r"value of \(0, 1\) must be in \[-1"),
        (lambda: create_correlation_matrix_from_correlations(2, None, 2.0), "default_correlation must be in"),
        (lambda: generate_random_correlations(5, positive_ratio=1.5), "positive_ratio must be in"),
        (lambda: generate_random_correlations(5, uncorrelated_ratio=-0.1), "uncorrelated_ratio must be in"),
        (lambda: generate_random_correlation_matrix(5, 0.5, 0.3, 0.8, 0.1), "min_correlation_strength = 0.8"),
        (lambda: generate_random_low_rank_correlation_matrix(5, 0), "rank must be at least 1"),
        (lambda: generate_random_low_rank_correlation_matrix(5, 1, -1.0), "correlation_scale must not be negative"),
        (lambda: generate_random_low_rank_correlation_matrix(5, 1, dtype="int8"), "dtype must be one of"),
        (lambda: nearest_correlation_matrix(torch.ones(2, 3)), r"square matrix of finite numbers, found \(2, 3\)"),
    ],
)
def test_impossible_settings_are_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
