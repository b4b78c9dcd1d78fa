"""Latent scaling on crosscoders made by hand, where it is known what each latent hides."""

from __future__ import annotations

import pytest
import torch
from sae_core import SAE, create
from sae_core.errors import ConfigError, DataError, ShapeError
from sae_core.latent_scaling import latent_scaling
from torch import Tensor


def _crosscoder(rows: list[list[float]], encoder: list[list[float]]) -> SAE:
    """ReLU latents with these decoder and encoder rows over two sites of width 3."""
    sae = create("standard", d_in=6, d_sae=len(rows), reads={"base": 3, "tuned": 3}, apply_b_dec_to_input=False)
    parameters = dict(sae.named_parameters())
    with torch.no_grad():
        parameters["W_dec"].copy_(torch.tensor(rows))
        parameters["encoder"].copy_(torch.tensor(encoder))
    return sae.eval()


def _world(strength_in_base: float, rows: int = 400) -> Tensor:
    """One feature along the first axis of both sites, as strong in base as said, and another that is at both."""
    source = torch.Generator().manual_seed(0)
    first, second = (
        torch.rand(rows, 1, generator=source) * (torch.rand(rows, 1, generator=source) < 0.3) for _ in "ab"
    )
    zero = torch.zeros(rows, 1)
    return torch.cat([strength_in_base * first, second, zero, first, second, zero], dim=1)


SHARED = [0.0, 1.0, 0.0, 0.0, 1.0, 0.0]
READS_SECOND = [0.0, 0.5, 0.0, 0.0, 0.5, 0.0]
READS_FIRST = [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
TUNED_ONLY = [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_the_error_holds_a_feature_that_was_shrunk_away(strength: float) -> None:
    sae = _crosscoder([SHARED, TUNED_ONLY], [READS_SECOND, READS_FIRST])
    found = latent_scaling(sae, _world(strength).split(100), "tuned", "base")
    assert float(found.nu_error[1]) == pytest.approx(strength, abs=1e-6)
    assert float(found.nu_reconstruction[1]) == pytest.approx(0, abs=1e-6)
    assert found.reference_error.tolist() == pytest.approx([1, 1])


def test_the_reconstruction_holds_a_feature_that_another_latent_has_there() -> None:
    base_only = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    sae = _crosscoder([SHARED, TUNED_ONLY, base_only], [READS_SECOND, READS_FIRST, READS_FIRST])
    found = latent_scaling(sae, [_world(1.0)], "tuned", "base")
    assert float(found.nu_reconstruction[1]) == pytest.approx(1, abs=1e-6)
    assert float(found.nu_error[1]) == pytest.approx(0, abs=1e-6)


def test_batches_add_up_and_the_mode_stays() -> None:
    sae = _crosscoder([SHARED, TUNED_ONLY], [READS_SECOND, READS_FIRST]).train()
    x = _world(0.4)
    whole, parts = (latent_scaling(sae, batches, "tuned", "base") for batches in ([x], x.split(37)))
    torch.testing.assert_close(whole.nu_error, parts.nu_error)
    assert sae.training


def test_a_latent_that_never_fires_has_no_number() -> None:
    sae = _crosscoder([SHARED, TUNED_ONLY], [READS_SECOND, [-1.0] * 6])
    found = latent_scaling(sae, [_world(0.4)], "tuned", "base")
    assert bool(found.nu_error.isnan()[1])
    assert not bool(found.nu_error.isnan()[0])


def test_what_cannot_be_compared_is_refused() -> None:
    sae = _crosscoder([SHARED], [READS_SECOND])
    with pytest.raises(DataError, match="there was no batch"):
        latent_scaling(sae, [], "tuned", "base")
    with pytest.raises(ConfigError, match="no site 'chat'"):
        latent_scaling(sae, [], "chat", "base")
    with pytest.raises(ConfigError, match="both 'base'"):
        latent_scaling(sae, [], "base", "base")
    wide = create("standard", d_in=5, d_sae=2, reads={"a": 2, "b": 3})
    with pytest.raises(ShapeError, match="'a' is 2 wide, 'b' 3"):
        latent_scaling(wide, [], "a", "b")
    transcoder = create("standard", d_in=4, d_sae=2, d_out=4, writes={"a": 2, "b": 2})
    with pytest.raises(ConfigError, match="a transcoder has no two sites"):
        latent_scaling(transcoder, [], "a", "b")
