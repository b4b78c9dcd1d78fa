"""Rules for firing probabilities and magnitudes: their numbers, their errors, and rules of other packages."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_core.errors import ConfigError, UnknownNameError
from sae_synthetic import (
    ConstantFiringProbabilityConfig,
    ConstantMagnitudeConfig,
    ExponentialMagnitudeConfig,
    FiringProbabilityConfig,
    FoldedNormalMagnitudeConfig,
    LinearFiringProbabilityConfig,
    LinearMagnitudeConfig,
    MagnitudeConfig,
    RandomFiringProbabilityConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
    generate_magnitudes,
    get_firing_probability_class,
    get_magnitude_class,
    linear_firing_probabilities,
    random_firing_probabilities,
    register_firing_probability,
    register_magnitude,
    zipfian_firing_probabilities,
)
from scipy import stats
from torch import Tensor

STRANGER = """
from dataclasses import dataclass
import torch
from sae_synthetic import FiringProbabilityConfig, MagnitudeConfig

@dataclass(frozen=True)
class Sawtooth(FiringProbabilityConfig):
    high: float = 0.5
    low: float = 0.25

    def generate(self, num_features, seed=None):
        return torch.tensor([self.high, self.low] * num_features)[:num_features]

@dataclass(frozen=True)
class Doubling(MagnitudeConfig):
    first: float = 1.0

    def generate(self, num_features, seed=None):
        return self.first * 2.0 ** torch.arange(num_features)

class NoDataclass(MagnitudeConfig):
    def generate(self, num_features, seed=None):
        return torch.ones(num_features)
"""


def test_rules_give_the_numbers_of_sae_lens(golden_tensors: dict[str, Tensor]) -> None:
    found = {
        "zipfian": zipfian_firing_probabilities(20),
        "linear": linear_firing_probabilities(20),
        "random": random_firing_probabilities(20, seed=7),
        "exponential": ExponentialMagnitudeConfig(1.0, 8.0).generate(20),
        "folded_normal": FoldedNormalMagnitudeConfig(0.5, 0.5, min_value=0.2, max_value=0.9).generate(20, seed=8),
    }
    for name, values in found.items():
        torch.testing.assert_close(values, golden_tensors[name], rtol=1e-5, atol=1e-7, msg=name)


def test_one_feature_fires_at_the_largest_probability() -> None:
    assert zipfian_firing_probabilities(1, max_prob=0.4).tolist() == pytest.approx([0.4])
    assert linear_firing_probabilities(1, max_prob=0.4).tolist() == pytest.approx([0.4])


@given(
    st.integers(2, 200),
    st.floats(0.1, 3.0),
    st.lists(st.floats(1e-4, 1.0), min_size=2, max_size=2, unique=True).map(sorted),
)
def test_zipfian_probabilities_fall_from_one_end_to_the_other(n: int, exponent: float, ends: list[float]) -> None:
    low, high = ends
    found = zipfian_firing_probabilities(n, exponent, high, low)
    torch.testing.assert_close(found[[0, -1]], torch.tensor([high, low]), rtol=1e-5, atol=1e-7)
    assert bool((found.diff() <= 1e-7).all())


def test_random_probabilities_are_uniform() -> None:
    found = (random_firing_probabilities(5000, 0.5, 0.1, seed=3) - 0.1) / 0.4
    assert stats.kstest(found.numpy(), "uniform").pvalue > 1e-4


def test_folded_normal_magnitudes_have_their_distribution() -> None:
    found = FoldedNormalMagnitudeConfig(0.5, 0.4).generate(5000, seed=1)
    assert stats.kstest(found.numpy(), stats.foldnorm(0.5 / 0.4, scale=0.4).cdf).pvalue > 1e-4


@pytest.mark.parametrize("rule", [RandomFiringProbabilityConfig(), FoldedNormalMagnitudeConfig()])
def test_a_seed_of_a_rule_is_exact_and_none_is_random(rule: FiringProbabilityConfig | MagnitudeConfig) -> None:
    assert torch.equal(rule.generate(30, 5), rule.generate(30, 5))
    assert not torch.equal(rule.generate(30, 5), rule.generate(30, 6))
    assert not torch.equal(rule.generate(30), rule.generate(30))


@pytest.mark.parametrize(
    "rule",
    [
        ConstantFiringProbabilityConfig(0.2),
        LinearFiringProbabilityConfig(0.5, 0.2),
        ZipfianFiringProbabilityConfig(0.5, 0.5, 0.2),
        RandomFiringProbabilityConfig(0.5, 0.2),
    ],
)
def test_probability_rules_survive_json(rule: FiringProbabilityConfig) -> None:
    assert FiringProbabilityConfig.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule
    assert rule.to_dict()["generator_name"] == rule.generator_name()
    assert get_firing_probability_class(rule.generator_name()) is type(rule)


@pytest.mark.parametrize(
    "rule",
    [
        ConstantMagnitudeConfig(2.0),
        LinearMagnitudeConfig(5.0, 4.0),
        ExponentialMagnitudeConfig(1.0, 2.0),
        FoldedNormalMagnitudeConfig(0.5, 0.5, max_value=0.9),
    ],
)
def test_magnitude_rules_survive_json(rule: MagnitudeConfig) -> None:
    assert MagnitudeConfig.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule
    assert get_magnitude_class(rule.generator_name()) is type(rule)


def test_a_number_is_a_magnitude_for_all() -> None:
    assert generate_magnitudes(3, 1.5).tolist() == [1.5] * 3
    assert generate_magnitudes(3, LinearMagnitudeConfig(1.0, 3.0)).tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConstantFiringProbabilityConfig(0.0), r"probability must be in \(0, 1\], not 0"),
        (lambda: ConstantFiringProbabilityConfig(1.2), r"probability must be in \(0, 1\], not 1.2"),
        (lambda: LinearFiringProbabilityConfig(0.1, 0.2), "min_prob = 0.2 and max_prob = 0.1"),
        (lambda: RandomFiringProbabilityConfig(1.5, 0.2), "max_prob = 1.5"),
        (lambda: ZipfianFiringProbabilityConfig(0.0), "exponent must be positive"),
        (lambda: zipfian_firing_probabilities(0), "num_features must be at least 1"),
        (lambda: zipfian_firing_probabilities(3, min_prob=0.0), "min_prob = 0.0"),
        (lambda: ConstantMagnitudeConfig(-1.0), "value must not be negative"),
        (lambda: LinearMagnitudeConfig(0.0, 1.0), "start must be positive"),
        (lambda: ExponentialMagnitudeConfig(1.0, -1.0), "end must be positive"),
        (lambda: FoldedNormalMagnitudeConfig(std=0.0), "std must be positive"),
        (lambda: FoldedNormalMagnitudeConfig(max_value=0.0), "max_value must be positive, not 0"),
        (lambda: FoldedNormalMagnitudeConfig(min_value=2.0, max_value=1.0), "min_value 2.0 is larger than max_value"),
        (lambda: generate_magnitudes(0, 1.0), "num_features must be at least 1"),
        (lambda: FiringProbabilityConfig.from_dict({"probability": 0.1}), "'generator_name', one of constant, linear"),
        (
            lambda: FiringProbabilityConfig.from_dict({"generator_name": "constant", "probabilty": 0.1}),
            "probability",
        ),
    ],
)
def test_impossible_rules_are_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_an_unknown_rule_is_answered_with_what_there_is() -> None:
    with pytest.raises(UnknownNameError, match=r"'zipfain'.*zipfian.*known: constant, linear, random, .*zipfian"):
        get_firing_probability_class("zipfain")
    with pytest.raises(UnknownNameError, match=r"unknown magnitude 'normal'.*known: constant, exponential"):
        get_magnitude_class("normal")


def test_a_model_with_rules_of_another_package_is_read_by_a_fresh_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stranger_rules.py").write_text(STRANGER)
    monkeypatch.syspath_prepend(tmp_path)
    from stranger_rules import Doubling, Sawtooth  # type: ignore[import-not-found]

    config = SyntheticModelConfig(
        num_features=3, hidden_dim=4, firing_probability=Sawtooth(0.75), mean_firing_magnitudes=Doubling(3.0), seed=1
    )
    assert config.to_dict()["firing_probability"]["generator_name"] == "stranger_rules:Sawtooth"
    SyntheticModel(config).save(tmp_path / "model")
    code = (
        "import sys; from sae_synthetic import SyntheticModel\n"
        "model = SyntheticModel(SyntheticModel.load_from_disk(sys.argv[1]).cfg)\n"
        "print(model.activation_generator.firing_probabilities.tolist())\n"
        "print(model.activation_generator.mean_firing_magnitudes.tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.stdout.splitlines() == ["[0.75, 0.25, 0.75]", "[3.0, 6.0, 12.0]"], done.stderr


def test_a_registered_rule_is_imported_when_it_is_used_and_known_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lazy_rules.py").write_text(STRANGER)
    monkeypatch.syspath_prepend(tmp_path)
    register_firing_probability("sawtooth", "lazy_rules:Sawtooth")
    register_magnitude("doubling", "lazy_rules:Doubling")
    assert "lazy_rules" not in sys.modules
    rule = FiringProbabilityConfig.from_dict({"generator_name": "sawtooth", "low": 0.125})
    assert rule.generate(2).tolist() == [0.5, 0.125]
    assert rule.to_dict() == {"high": 0.5, "low": 0.125, "generator_name": "sawtooth"}
    assert MagnitudeConfig.from_dict({"generator_name": "doubling"}).generate(3).tolist() == [1.0, 2.0, 4.0]
    with pytest.raises(ConfigError, match=r"NoDataclass.* is not a dataclass derived from MagnitudeConfig"):
        get_magnitude_class("lazy_rules:NoDataclass")
    with pytest.raises(UnknownNameError, match=r"lazy_rules:Missing.*cannot be imported.*is its package installed"):
        get_magnitude_class("lazy_rules:Missing")


@dataclass(frozen=True)
class Ones(MagnitudeConfig):
    def generate(self, num_features: int, seed: int | None = None) -> Tensor:
        return torch.ones(num_features)


def test_a_name_belongs_to_one_rule() -> None:
    register_magnitude("ones", Ones)
    register_magnitude("ones", Ones)  # again is no clash
    with pytest.raises(ConfigError, match="magnitude 'constant' is registered already"):
        register_magnitude("constant", Ones)
    with pytest.raises(ConfigError, match="is not a dataclass derived from FiringProbabilityConfig"):
        register_firing_probability("ones", Ones)  # type: ignore[arg-type]


def test_an_unknown_kind_is_a_value_error_as_in_sae_lens() -> None:
    for find in (get_magnitude_class, get_firing_probability_class):
        with pytest.raises(ValueError, match=r"unknown .* 'zipfain'"):
            find("zipfain")
