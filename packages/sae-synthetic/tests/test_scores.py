"""Scores against hand-worked numbers, against SAELens, and in batches against all at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_core import SparseCodes, create
from sae_core.errors import ConfigError, DataError, ShapeError
from sae_synthetic import (
    ActivationGenerator,
    ClassificationMetricsCalculator,
    DeadLatentsCalculator,
    ExplainedVarianceCalculator,
    FeatureDictionary,
    L0Calculator,
    ShrinkageCalculator,
    best_matches,
    compute_classification_metrics,
    decoder_projection,
    feature_uniqueness,
    init_sae_to_match_feature_dict,
    seed_consistency,
)
from safetensors.torch import load_file
from torch import Tensor

LATENTS = torch.tensor([[2.0, 0.0, 0.5], [1.0, 0.0, 0.0], [0.0, 0.0, 3.0], [0.0, 0.0, 0.0]])
TRUTH = torch.tensor([[1.0, 1.0], [0.0, 1.0], [2.0, 0.0], [0.0, 0.5]])
DIRECTIONS = torch.tensor([[1.0, 0.2], [0.1, -1.0], [-3.0, 0.3]])  # nearest to features 0, 1 and 0


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _sparse(dense: Tensor) -> SparseCodes:
    return SparseCodes.from_dense(dense)


def test_best_matches_and_uniqueness_by_hand() -> None:
    assert best_matches(DIRECTIONS, torch.eye(2)).tolist() == [0, 1, 0]
    assert feature_uniqueness(DIRECTIONS, torch.eye(2)) == pytest.approx(2 / 3)


def test_best_matches_work_in_parts() -> None:
    latents, truth = _normal(5000, 6, seed=1), _normal(7, 6, seed=2)
    cosines = torch.nn.functional.normalize(latents, dim=1) @ torch.nn.functional.normalize(truth, dim=1).T
    assert torch.equal(best_matches(latents, truth), cosines.abs().argmax(1))


@pytest.mark.parametrize("form", [torch.Tensor.clone, _sparse])
def test_detectors_by_hand(form: Callable[[Tensor], Tensor | SparseCodes]) -> None:
    # Feature 0 is there in rows 0 and 2, feature 1 in rows 0, 1 and 3.
    # Latent 0 fires in 0 and 1: 1 hit of 2 fired and 2 present. Latent 1 never fires. Latent 2 fires in 0 and 2: all right.
    calculator = ClassificationMetricsCalculator(DIRECTIONS, torch.eye(2))
    calculator.add_batch(form(LATENTS), form(TRUTH))
    found = calculator.per_latent()
    assert found["precision"].tolist() == [0.5, 0.0, 1.0]
    assert found["recall"].tolist() == [0.5, 0.0, 1.0]
    assert found["f1_score"].tolist() == [0.5, 0.0, 1.0]
    assert found["accuracy"].tolist() == [0.5, 0.25, 1.0]
    means = compute_classification_metrics(form(LATENTS), form(TRUTH), DIRECTIONS, torch.eye(2))
    assert means == calculator.compute()
    assert means.f1_score == pytest.approx(0.5)
    assert means.accuracy == pytest.approx(1.75 / 3)


def test_matches_may_be_given() -> None:
    calculator = ClassificationMetricsCalculator(DIRECTIONS, torch.eye(2), matches=torch.tensor([1, 1, 1]))
    calculator.add_batch(LATENTS, TRUTH)
    assert calculator.per_latent()["recall"].tolist() == pytest.approx([2 / 3, 0.0, 1 / 3])


def test_detectors_agree_with_sae_lens(
    golden_tensors: dict[str, Tensor], golden_numbers: dict[str, dict[str, float]]
) -> None:
    g = golden_tensors
    found = compute_classification_metrics(g["latents"], g["truth"], g["a"], g["b"])
    assert vars(found) == pytest.approx(golden_numbers["classification"], abs=1e-6)
    assert feature_uniqueness(g["a"], g["b"]) == golden_numbers["uniqueness"]


def test_uniqueness_agrees_with_sae_lens_where_there_are_more_latents_than_width(golden_folder: Path) -> None:
    tensors, numbers = (
        load_file(golden_folder / "scores.safetensors"),
        json.loads((golden_folder / "scores.json").read_text()),
    )
    assert feature_uniqueness(tensors["wide_a"], tensors["wide_b"]) == numbers["uniqueness"]


def test_negative_latents_are_active_but_negative_features_are_absent() -> None:
    l0, dead = L0Calculator(), DeadLatentsCalculator(3)
    signed = torch.tensor([[-1.0, 0.0, 2.0], [0.0, 0.0, -3.0]])
    l0.add_batch(signed)
    dead.add_batch(signed)
    assert (l0.compute(), dead.compute()) == (1.5, 1)
    found = ClassificationMetricsCalculator(torch.eye(3), torch.eye(3))
    found.add_batch(signed, torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.0, 1.0]]))
    assert found.per_latent()["precision"].tolist() == [1.0, 0.0, 0.5]


def test_shrinkage_by_hand_leaves_out_inputs_without_length() -> None:
    calculator = ShrinkageCalculator()
    calculator.add_batch(
        torch.tensor([[3.0, 0.0], [0.0, 1.0], [5.0, 5.0]]), torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]])
    )
    assert calculator.compute() == pytest.approx((3 / 5 + 1 / 2) / 2)


def test_explained_variance_by_hand() -> None:
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0]])  # squares around the mean: 4 + 0 + 4
    y = torch.tensor([[0.0, 1.0], [2.0, 0.0], [3.0, 0.0]])  # squared errors: 1 + 0 + 1
    calculator = ExplainedVarianceCalculator()
    calculator.add_batch(y, x)
    assert calculator.compute() == pytest.approx(1 - 2 / 8)
    constant = ExplainedVarianceCalculator()
    constant.add_batch(torch.zeros(3, 2), torch.ones(3, 2))
    assert constant.compute() != constant.compute()  # NaN: nothing varies


def test_explained_variance_survives_a_large_offset() -> None:
    x = _normal(4000, 8, seed=1)
    y = x + 0.5 * _normal(4000, 8, seed=2)
    plain, far = ExplainedVarianceCalculator(), ExplainedVarianceCalculator()
    for part in range(0, 4000, 500):
        plain.add_batch(y[part : part + 500], x[part : part + 500])
        far.add_batch(y[part : part + 500].double() + 1e6, x[part : part + 500].double() + 1e6)
    assert far.compute() == pytest.approx(plain.compute(), abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 40), min_size=1, max_size=5), st.booleans())
def test_batch_by_batch_is_all_at_once(seed: int, sizes: list[int], sparse: bool) -> None:
    rows, latents, features, width = sum(sizes), 7, 9, 5
    z = torch.relu(_normal(rows, latents, seed=seed) - 0.5)
    g = torch.relu(_normal(rows, features, seed=seed + 1) - 0.5)
    x, y = _normal(rows, width, seed=seed + 2) + 3, _normal(rows, width, seed=seed + 3)
    W, V = _normal(latents, width, seed=seed + 4), _normal(features, width, seed=seed + 5)
    form = _sparse if sparse else torch.Tensor.clone
    results: list[list[float]] = []
    for parts in (sizes, [rows]):
        l0, dead, shrinkage, variance = (
            L0Calculator(),
            DeadLatentsCalculator(latents),
            ShrinkageCalculator(),
            ExplainedVarianceCalculator(),
        )
        detectors = ClassificationMetricsCalculator(W, V)
        for z_part, g_part, x_part, y_part in zip(*(t.split(parts) for t in (z, g, x, y)), strict=True):
            l0.add_batch(form(z_part))
            dead.add_batch(form(z_part))
            shrinkage.add_batch(y_part, x_part)
            variance.add_batch(y_part, x_part)
            detectors.add_batch(form(z_part), form(g_part))
        results.append([l0.compute(), dead.compute(), shrinkage.compute(), *vars(detectors.compute()).values()])
        if rows > 1:
            results[-1].append(variance.compute())
    assert results[0] == pytest.approx(results[1], rel=1e-9, abs=1e-9)
    fires = z > 0
    wanted = [
        float(fires.sum()) / rows,
        int((~fires.any(0)).sum()),
        float((y.norm(dim=1) / x.norm(dim=1)).double().mean()),
    ]
    assert results[0][:3] == pytest.approx(wanted, rel=1e-5)


def test_nothing_added_is_nothing_to_compute() -> None:
    for calculator in (
        L0Calculator(),
        ShrinkageCalculator(),
        ExplainedVarianceCalculator(),
        ClassificationMetricsCalculator(torch.eye(2), torch.eye(2)),
    ):
        with pytest.raises(DataError, match="no batch was added"):
            calculator.compute()


def test_wrong_widths_are_refused() -> None:
    with pytest.raises(ShapeError, match="2 latents, made for 3"):
        DeadLatentsCalculator(3).add_batch(torch.ones(4, 2))
    with pytest.raises(ShapeError, match=r"do not fit \(rows, 3\) and \(rows, 2\)"):
        ClassificationMetricsCalculator(DIRECTIONS, torch.eye(2)).add_batch(LATENTS, TRUTH[:2])


def test_seed_consistency_by_hand() -> None:
    a = torch.eye(3)
    b = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.6, 0.8], [0.0, -0.8, 0.6]])
    found = seed_consistency([a, a.flip(0), b])
    # a and b: rows 1 and 2 of b are worth 0.6 + 0.6 straight, 0.8 - 0.8 crossed (0.8 + 0.8 without signs).
    wanted = (1 + 0.6 + 0.6) / 3
    torch.testing.assert_close(found.pairwise, torch.tensor([[1, 1, wanted], [1, 1, wanted], [wanted, wanted, 1]]))
    assert found.mean == pytest.approx((1 + 2 * wanted) / 3)
    assert seed_consistency([a, b], signed=False).mean == pytest.approx((1 + 0.8 + 0.8) / 3)
    with pytest.raises(ConfigError, match="at least 2 dictionaries, found 1"):
        seed_consistency([a])


def test_decoder_projection_is_the_place_of_the_definition() -> None:
    sae = create("topk", d_in=6, d_sae=10, k=2, seed=0)
    with torch.no_grad():
        sae.b_dec.copy_(_normal(6, seed=1))
        sae.W_dec.mul_(torch.arange(1.0, 11.0).unsqueeze(1))  # lengths do not matter
    x = _normal(30, 6, seed=2)
    directions = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    products = ((x - sae.b_dec.detach()) @ directions.T).flatten().sort(descending=True).values
    for n in (0, 1, 4, 9):
        assert decoder_projection(sae, x, n) == pytest.approx(float(products[n * 30]), abs=1e-6)
    for n in (-1, 10):
        with pytest.raises(ConfigError, match=r"n must be in \[0, 10\)"):
            decoder_projection(sae, x, n)


def test_decoder_projection_is_small_at_the_truth_and_large_where_latents_mix() -> None:
    features, generator = FeatureDictionary(10, 20, seed=0), ActivationGenerator(10, 0.2, seed=0)
    x = features(generator.sample(2000)).detach()  # two of ten fire at a time, so place 3 lies among the silent
    sae = create("topk", d_in=20, d_sae=10, k=2)
    init_sae_to_match_feature_dict(sae, features)
    assert abs(decoder_projection(sae, x, 3)) < 1e-3
    with torch.no_grad():
        sae.W_dec.add_(0.4 * features.feature_vectors[:1])  # all latents see feature 0
    assert decoder_projection(sae, x, 3) > 0.3


def test_a_dictionary_without_latents_finds_nothing() -> None:
    none, truth = torch.zeros(0, 4), torch.eye(4)
    assert feature_uniqueness(none, truth) == 0.0
    assert compute_classification_metrics(torch.zeros(5, 0), torch.rand(5, 4), none, truth).f1_score == 0.0
    with pytest.raises(ShapeError, match="no true features"):
        feature_uniqueness(truth, none)


@pytest.mark.parametrize(
    ("calculator", "parts"),
    [
        (L0Calculator(), [torch.zeros(0, 4)]),
        (ShrinkageCalculator(), [torch.zeros(0, 4), torch.zeros(0, 4)]),
        (ExplainedVarianceCalculator(), [torch.zeros(0, 4), torch.zeros(0, 4)]),
        (ClassificationMetricsCalculator(torch.eye(4), torch.eye(4)), [torch.zeros(0, 4), torch.zeros(0, 4)]),
    ],
)
def test_an_empty_batch_adds_nothing_and_alone_gives_no_number(calculator: Any, parts: list[Tensor]) -> None:
    calculator.add_batch(*parts)
    with pytest.raises(DataError, match="no batch was added"):
        calculator.compute()
    full = [torch.eye(4) for _ in parts]
    calculator.add_batch(*full)
    alone = calculator.compute()
    calculator.add_batch(*parts)
    assert calculator.compute() == alone
