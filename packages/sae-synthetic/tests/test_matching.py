"""Matching latents with features, and the mean correlation coefficient: by hand, against SciPy, and at full size."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_core.errors import DataError, ShapeError
from sae_synthetic import match_features, matching, mean_correlation_coefficient, random_dictionary
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor

MCC = Callable[[Tensor, Tensor], float]


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T


def _best_sum(a: Tensor, b: Tensor, signed: bool) -> float:
    weights = _cosines(a.double(), b.double())
    weights = (weights if signed else weights.abs()).numpy()
    return float(weights[linear_sum_assignment(weights, maximize=True)].sum())


def test_a_case_by_hand() -> None:
    truth = torch.eye(3)
    # Greedily, latent 0 would take feature 0 (0.8) and leave latent 1, which has nothing else, with 0: 0.8 + 0 + 1.
    latents = torch.tensor([[0.8, 0.6, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    assert mean_correlation_coefficient(latents, truth) == pytest.approx((0.6 + 1.0 + 1.0) / 3)
    # With signs, feature 0 is worth -1 to latent 1 and 0.8 to latent 0; feature 1 is worth 0 to latent 1.
    assert mean_correlation_coefficient(latents, truth, signed=True) == pytest.approx((0.8 + 0.0 + 1.0) / 3)
    matching_ = match_features(latents, truth)
    assert matching_.a_indices.tolist() == [0, 1, 2]
    assert matching_.b_indices.tolist() == [1, 0, 2]
    torch.testing.assert_close(matching_.cosines, torch.tensor([0.6, -1.0, 1.0]))  # with their signs


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**31))
def test_it_is_the_best_of_all_matchings(by_hand_mcc: MCC, a: int, b: int, width: int, seed: int) -> None:
    one, other = _normal(a, width, seed=seed), _normal(b, width, seed=seed + 1)
    assert mean_correlation_coefficient(one, other) == pytest.approx(by_hand_mcc(one, other), abs=1e-5)
    assert mean_correlation_coefficient(other, one) == pytest.approx(by_hand_mcc(one, other), abs=1e-5)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("a", "b", "noise"), [(150, 400, 0.02), (150, 400, 0.5), (120, 120, 0.1), (300, 140, None)])
def test_sparse_candidates_give_the_exact_optimum(
    a: int, b: int, noise: float | None, signed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "_SMALL", 0)
    monkeypatch.setattr(matching, "_CANDIDATES", 6)
    truth = torch.nn.functional.normalize(_normal(b, 24, seed=1), dim=1)
    latents = _normal(a, 24, seed=2)
    if noise is not None:
        latents = truth[_normal(b, seed=3).argsort()[:a]] + noise * latents
    found = match_features(latents, truth, signed=signed)
    assert len(found.a_indices.unique()) == len(found.b_indices.unique()) == min(a, b)
    total = float((found.cosines if signed else found.cosines.abs()).double().sum())
    assert total == pytest.approx(_best_sum(latents, truth, signed), abs=1e-4)


@pytest.mark.parametrize("signed", [False, True])
def test_latents_that_all_want_the_same_features_still_get_one_each(
    signed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "_SMALL", 0)
    monkeypatch.setattr(matching, "_CANDIDATES", 4)
    truth = torch.nn.functional.normalize(_normal(60, 8, seed=1), dim=1)
    latents = truth[:1] + 0.01 * _normal(50, 8, seed=2)
    latents[7] = 0.0  # a dead direction is alike to nothing, and takes what is left
    found = match_features(latents, truth, signed=signed)
    assert found.a_indices.tolist() == list(range(50))
    assert len(found.b_indices.unique()) == 50
    assert int(found.b_indices.min()) >= 0
    total = float((found.cosines if signed else found.cosines.abs()).double().sum())
    assert total == pytest.approx(_best_sum(latents, truth, signed), abs=1e-4)


def test_it_agrees_with_sae_lens(golden_folder: Path) -> None:
    tensors, numbers = (
        load_file(golden_folder / "scores.safetensors"),
        json.loads((golden_folder / "scores.json").read_text()),
    )
    assert mean_correlation_coefficient(tensors["wide_a"], tensors["wide_b"]) == pytest.approx(numbers["mcc"], abs=1e-6)


def test_scale_and_sign_do_not_count_unless_signed() -> None:
    a, b = _normal(8, 5, seed=1), _normal(12, 5, seed=2)
    scaled = a * torch.tensor([1.0, -2.0, 3.0, -0.1, 1e3, -1e-3, 1.0, 1.0]).unsqueeze(1)
    assert mean_correlation_coefficient(scaled, b) == pytest.approx(mean_correlation_coefficient(a, b), abs=1e-5)
    assert mean_correlation_coefficient(-b, b, signed=True) < 0.9 < mean_correlation_coefficient(b, b, signed=True)


def test_half_precision_and_gradients_are_no_hindrance() -> None:
    a = _normal(8, 5, seed=1).requires_grad_()
    assert mean_correlation_coefficient(a, a.detach().bfloat16()) == pytest.approx(1.0, abs=1e-3)


def test_what_cannot_be_matched_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"one width, found \(3, 4\) and \(3, 5\)"):
        match_features(torch.ones(3, 4), torch.ones(3, 5))
    for name, sizes in (("first", (0, 3)), ("second", (3, 0))):
        with pytest.raises(ShapeError, match=f"the {name} matrix has no rows"):
            mean_correlation_coefficient(*(torch.ones(size, 4) for size in sizes))
    with pytest.raises(DataError, match="second matrix has values that are not finite"):
        match_features(torch.ones(2, 2), torch.tensor([[1.0, float("nan")]]))


def test_a_random_dictionary_is_of_unit_vectors_that_know_nothing() -> None:
    vectors = random_dictionary(500, 40, seed=3)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(500))
    assert torch.equal(vectors, random_dictionary(500, 40, seed=3))
    same_seed = torch.nn.functional.normalize(_normal(500, 40, seed=3), dim=1)
    spread = (vectors * same_seed).sum(1)
    assert abs(float(spread.mean())) < 4 / np.sqrt(500 * 40)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.02, None])
def test_a_wide_matching_takes_seconds(noise: float | None) -> None:
    truth = random_dictionary(16_384, 768, seed=1)
    latents = _normal(4096, 768, seed=2)
    if noise is not None:
        latents = truth[:4096] + noise * latents
    started = time.process_time()
    found = match_features(latents, truth)
    assert time.process_time() - started < 20
    assert len(found.b_indices.unique()) == 4096
    if noise is not None:
        assert torch.equal(found.b_indices, torch.arange(4096))
