"""Latent scaling on crosscoders made by hand, where it is known what each latent hides."""

from __future__ import annotations

import pytest
import torch
from sae_core import SAE, create
from sae_core.errors import DataError
from sae_core.site_analysis import latent_scaling
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
    found = latent_scaling(sae, _world(strength).split(100), own="tuned")
    assert float(found.error_ratio("base")[1]) == pytest.approx(strength, abs=1e-6)
    assert float(found.reconstruction_ratio("base")[1]) == pytest.approx(0, abs=1e-6)
    assert found.error["tuned"].tolist() == pytest.approx([1, 1])


def test_the_reconstruction_holds_a_feature_that_another_latent_has_there() -> None:
    base_only = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    sae = _crosscoder([SHARED, TUNED_ONLY, base_only], [READS_SECOND, READS_FIRST, READS_FIRST])
    found = latent_scaling(sae, [_world(1.0)], own="tuned")
    assert float(found.reconstruction_ratio("base")[1]) == pytest.approx(1, abs=1e-6)
    assert float(found.error_ratio("base")[1]) == pytest.approx(0, abs=1e-6)


def test_batches_add_up_and_the_mode_stays() -> None:
    sae = _crosscoder([SHARED, TUNED_ONLY], [READS_SECOND, READS_FIRST]).train()
    x = _world(0.4)
    whole, parts = (latent_scaling(sae, batches, own="tuned") for batches in ([x], x.split(37)))
    torch.testing.assert_close(whole.error_ratio("base"), parts.error_ratio("base"))
    assert sae.training


def test_a_latent_that_never_fires_has_no_number() -> None:
    sae = _crosscoder([SHARED, TUNED_ONLY], [READS_SECOND, [-1.0] * 6])
    found = latent_scaling(sae, [_world(0.4)], own="tuned")
    assert bool(found.error_ratio("base").isnan()[1])
    assert not bool(found.error_ratio("base").isnan()[0])


def test_without_a_batch_there_is_nothing_to_say() -> None:
    with pytest.raises(DataError, match="there was no batch"):
        latent_scaling(_crosscoder([SHARED], [READS_SECOND]), [], own="tuned")


def test_a_decoder_bias_is_not_what_latents_explain() -> None:
    sae = _crosscoder([SHARED, TUNED_ONLY], [READS_SECOND, READS_FIRST])
    with torch.no_grad():
        sae.get_parameter("b_dec").copy_(torch.tensor([5.0, 0.0, 0.0, 0.0, 0.0, 0.0]))
    found = latent_scaling(sae, [_world(0.0)], own="tuned")
    assert float(found.reconstruction_ratio("base")[1]) == pytest.approx(0, abs=1e-6)
