"""Shared by the tests: where golden files are, and bounds for empirical rates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def golden_tensors() -> dict[str, Tensor]:
    return load_file(GOLDEN / "tensors.safetensors")


@pytest.fixture(scope="session")
def golden_numbers() -> dict[str, Any]:
    return json.loads((GOLDEN / "numbers.json").read_text())


@pytest.fixture(scope="session")
def assert_rates() -> Callable[[Tensor, int, Tensor], None]:
    """Counts of independent events agree with their probabilities: a chi-square test at the level 1e-4.

    Events are pooled where few are expected; with fixed seeds the outcome never changes.
    """

    def check(counts: Tensor, trials: int, probabilities: Tensor) -> None:
        expected = probabilities.double() * trials
        spread = (expected * (1 - probabilities.double())).clamp_min(1e-9)
        certain = probabilities >= 1
        assert torch.equal(counts[certain], torch.full_like(counts[certain], trials))
        many = (expected >= 10) & ~certain
        statistic = float(((counts.double() - expected).square() / spread)[many].sum())
        cells = int(many.sum())
        few = ~many & ~certain
        if bool(few.any()):  # the sum of many rare events is Poisson
            total, mean = int(counts[few].sum()), float(expected[few].sum())
            assert stats.poisson.cdf(total, mean) > 1e-5
            assert stats.poisson.sf(total - 1, mean) > 1e-5
        assert stats.chi2.sf(statistic, cells) > 1e-4
        # and not suspiciously good either: the draws are really random
        assert stats.chi2.cdf(statistic, cells) > 1e-4

    return check


@pytest.fixture(scope="session")
def by_hand_mcc() -> Callable[[Tensor, Tensor], float]:
    """The definition of the MCC, by trying every matching of a few rows."""
    from itertools import permutations

    def mcc(a: Tensor, b: Tensor) -> float:
        cosines = torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T
        cosines = cosines.abs() if len(a) <= len(b) else cosines.abs().T
        rows = range(len(cosines))
        choices = permutations(range(cosines.shape[1]), len(cosines))
        return max(float(cosines[list(rows), list(choice)].mean()) for choice in choices)

    return mcc
