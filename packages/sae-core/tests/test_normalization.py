from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_core.errors import ConfigError
from sae_core.normalization import Normalization

NAMES = (
    "none",
    "layer_norm",
    "constant_norm_rescale",
    "constant_scalar_rescale",
    "expected_average_only_in",
    "covariance_whitening",
)


def rows(seed: int, n: int = 40, d: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.linspace(0.5, 3, d, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * scales + torch.arange(d)


def fitted(name: str, x: torch.Tensor) -> Normalization:
    normalization = Normalization(name, x.shape[-1], 2.5 if name == "constant_scalar_rescale" else 1.0).double()
    normalization.fit([x[:10], x[10:]])
    return normalization


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 2**20))
def test_undoing_a_normalisation_gives_the_input_back(name: str, seed: int) -> None:
    x = rows(seed)
    normalization = fitted(name, x)
    z, units = normalization(x)
    # SAELens adds its epsilon on the way in only, so the round trip of layer_norm is off by that much.
    tolerance = 1e-4 if name == "layer_norm" else 1e-9
    torch.testing.assert_close(units.undo(z), x, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["none", "constant_norm_rescale", "constant_scalar_rescale", "layer_norm"])
def test_zero_rows_stay_zero_both_ways(name: str) -> None:
    z, units = Normalization(name, 4)(torch.zeros(2, 4))
    assert torch.equal(z, torch.zeros(2, 4))
    assert torch.equal(units.undo(z), torch.zeros(2, 4))


def test_layer_norm_by_hand() -> None:
    z, units = Normalization("layer_norm", 3)(torch.tensor([[1.0, 2.0, 3.0]]))
    torch.testing.assert_close(z, torch.tensor([[-1.0, 0.0, 1.0]]), rtol=1e-4, atol=1e-4)  # unbiased std is 1
    torch.testing.assert_close(units.undo(torch.tensor([[0.0, 0.0, 2.0]])), torch.tensor([[2.0, 2.0, 4.0]]))


def test_expected_average_scales_to_root_of_the_width() -> None:
    normalization = Normalization("expected_average_only_in", 4)
    normalization.fit([torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([[0.0, 3.0, 0.0, 0.0]])])
    z, _ = normalization(torch.tensor([[2.0, 0.0, 0.0, 0.0]]))
    assert z.norm() == pytest.approx(2.0)  # mean norm 2, root of the width 2: factor 1


def test_whitened_activations_have_unit_covariance() -> None:
    x = rows(3, n=5000)
    z, _ = fitted("covariance_whitening", x)(x)
    covariance = torch.cov(z.T)
    torch.testing.assert_close(covariance, torch.eye(6, dtype=torch.float64), rtol=0.01, atol=0.01)
    torch.testing.assert_close(z.mean(0), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["expected_average_only_in", "covariance_whitening"])
def test_statistics_that_are_not_there_are_an_error_that_says_how_to_get_them(name: str) -> None:
    with pytest.raises(ConfigError, match=r"sae\.fit_normalization\(batch\)"):
        Normalization(name, 3)(torch.ones(1, 3))


@pytest.mark.parametrize("name", ["expected_average_only_in", "covariance_whitening"])
def test_fitting_on_nothing_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match="found 0 usable rows"):
        Normalization(name, 3).fit([])


@pytest.mark.parametrize("name", ["expected_average_only_in", "covariance_whitening"])
def test_statistics_travel_in_the_state_dict(name: str) -> None:
    x = rows(1)
    trained, fresh = fitted(name, x), Normalization(name, 6).double()
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(x)[0], trained(x)[0])


@pytest.mark.parametrize("name", ["layer_norm", "constant_norm_rescale"])
def test_per_row_normalisations_cannot_be_undone_without_the_input(name: str) -> None:
    with pytest.raises(ConfigError, match="pass the input too"):
        Normalization(name, 3).restore(torch.ones(1, 3))


def test_an_unknown_normalisation_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'layernorm' is not one of none, layer_norm"):
        Normalization("layernorm", 3)  # pyright: ignore[reportArgumentType]
