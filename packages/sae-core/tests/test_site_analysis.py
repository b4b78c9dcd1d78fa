"""Latents of several sites: norms, cosines and latent scaling, with numbers worked by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sae_core import SAE, ActivationBatch, create
from sae_core.errors import ConfigError, DataError, ShapeError
from sae_core.site_analysis import (
    cosine_between,
    decoder_site_norms,
    latent_scaling,
    least_squares_beta,
    relative_norms,
)

SITES = {"base": 2, "chat": 2}
# what each latent writes: both sites alike, chat alone, base alone in another direction
W = torch.tensor([[3.0, 4.0, 3.0, 4.0], [0.0, 0.0, 0.0, 2.0], [5.0, 0.0, 0.0, 12.0], [0.0, 0.0, 0.0, 0.0]])


def test_norms_relative_norms_and_cosines() -> None:
    norms = decoder_site_norms(W, SITES)
    assert norms["base"].tolist() == [5.0, 0.0, 5.0, 0.0]
    assert norms["chat"].tolist() == [5.0, 2.0, 12.0, 0.0]
    relative = relative_norms(W, SITES)["chat"]
    assert relative[:3].tolist() == pytest.approx([0.5, 1.0, 12 / 17])
    assert math.isnan(relative[3])
    cosines = cosine_between(W, SITES, "base", "chat")
    assert cosines[[0, 2]].tolist() == [1.0, 0.0]
    assert cosines[[1, 3]].isnan().all()


def test_sites_that_do_not_fit_are_named() -> None:
    with pytest.raises(ShapeError, match=r"\(4, 4\) are not \(d_sae, 5\)"):
        decoder_site_norms(W, {"base": 2, "chat": 3})
    with pytest.raises(ConfigError, match="no site 'chta'; did you mean 'chat'"):
        cosine_between(W, SITES, "base", "chta")
    with pytest.raises(ShapeError, match="1 and 3 wide"):
        cosine_between(W, {"base": 1, "chat": 3}, "base", "chat")


def test_beta_is_that_of_least_squares() -> None:
    random = torch.Generator().manual_seed(0)
    f, d, t = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in ((50, 3), (3, 4), (50, 3, 4)))
    for latent in range(3):
        design = (f[:, latent, None] * d[latent]).reshape(-1, 1)
        solution = torch.linalg.lstsq(design, t[:, latent].reshape(-1, 1)).solution
        torch.testing.assert_close(least_squares_beta(f, d, t)[latent], solution[0, 0])
    assert math.isnan(least_squares_beta(torch.zeros(5, 1), d[:1].float(), torch.ones(5, 1, 4))[0])


def crosscoder(W_dec: torch.Tensor) -> SAE:
    """Latents are what their direction at chat finds."""
    sae = create("standard", d_in=4, d_sae=len(W_dec), reads=SITES, apply_b_dec_to_input=False, dtype="float64")
    with torch.no_grad():
        sae.get_parameter("W_dec").copy_(W_dec)
        sae.get_parameter("encoder").zero_()[:, 2:] = torch.nn.functional.normalize(W_dec[:, 2:], dim=1)
    return sae.eval()


def test_a_latent_whose_norm_was_shrunk_away_is_told_from_one_that_is_exclusive() -> None:
    """Both write to chat alone. What the first finds is in base too, 0.8 of it, and nobody reconstructs it there."""
    sae = crosscoder(torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]))
    first, second = (
        torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64),
        torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64),
    )
    x = torch.stack([0.8 * first, torch.zeros(3), first, second], dim=1)
    found = latent_scaling(sae, [x[:2], x[2:]], [0, 1], own="chat")
    assert found.error["chat"].tolist() == pytest.approx([1.0, 1.0])
    assert found.error_ratio("base").tolist() == pytest.approx([0.8, 0.0])
    assert found.reconstruction_ratio("base").tolist() == pytest.approx([0.0, 0.0])


def test_one_half_of_a_split_concept_is_found_in_the_reconstruction() -> None:
    """Latent 0 writes a concept to chat and latent 1 the same one to base, whenever latent 0 does."""
    sae = crosscoder(torch.tensor([[0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]))
    with torch.no_grad():
        sae.get_parameter("encoder")[1] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    concept = torch.tensor([[1.0], [2.0], [0.0]], dtype=torch.float64)
    x = concept @ torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    found = latent_scaling(sae, [x], [0], own="chat")
    assert found.error_ratio("base").tolist() == pytest.approx([0.0])
    assert found.reconstruction_ratio("base").tolist() == pytest.approx([1.0])


def test_betas_are_those_of_the_targets_written_out_for_any_dictionary() -> None:
    sae = create("topk", d_in=4, d_sae=12, k=4, reads=SITES, d_out=6, writes={"a": 3, "b": 3}, dtype="float64").eval()
    random = torch.Generator().manual_seed(3)
    x, y = (torch.randn(40, width, generator=random, dtype=torch.float64) for width in (4, 6))
    latents = [0, 5, 7]
    found = latent_scaling(sae, [ActivationBatch(x[:15], y[:15]), ActivationBatch(x[15:], y[15:])], latents, own="b")
    norms = sae.latent_norms().detach()  # latents are reported in units of these
    f, directions = sae.encode(x)[:, latents], (sae.directions() / norms[:, None])[latents]
    for site, part in (("a", slice(0, 3)), ("b", slice(3, 6))):
        bias = sae.offset()[part]
        without = (sae(x)[:, None, part] - f[:, :, None] * directions[:, part]).detach()
        for targets, betas in (
            (y[:, None, part] - without, found.error),
            (sae(x)[:, None, part] - bias, found.reconstruction),
        ):
            expected = least_squares_beta(f, directions[:, 3:], targets)
            torch.testing.assert_close(betas[site], expected.detach())


def test_what_cannot_be_compared_is_refused() -> None:
    x = torch.ones(2, 4)
    with pytest.raises(ConfigError, match="no site 'chta'; did you mean 'chat'"):
        latent_scaling(create("standard", d_in=4, d_sae=3, reads=SITES), [x], [0], own="chta")
    with pytest.raises(ConfigError, match="sites of one width"):
        latent_scaling(create("standard", d_in=4, d_sae=3, reads={"base": 1, "chat": 3}), [x], [0], own="chat")
    by_row = create("standard", d_in=4, d_sae=3, reads=SITES, normalize_activations="layer_norm")
    with pytest.raises(ConfigError, match="with layer_norm it differs by row"):
        latent_scaling(by_row, [x], [0], own="chat")


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        ([16], r"latents must lie in \[0, d_sae = 16\), not 16"),
        ([-1], "counted from 0; -1 is negative"),
        ([0.5], "latents must be a sequence of distinct latent numbers"),
        ([True, False], "latents must be a sequence of distinct latent numbers"),
        (torch.ones(16, dtype=torch.bool), "latents must be a sequence of distinct latent numbers"),
        ([], "this one is empty"),
    ],
)
def test_latents_that_there_are_not_are_refused(latents: Any, message: str) -> None:
    sae = create("topk", d_in=8, d_sae=16, k=3, reads={"a": 4, "b": 4})
    with pytest.raises(ConfigError, match=message):
        latent_scaling(sae, [torch.randn(5, 8)], latents, own="a")


def test_batches_without_rows_are_no_batches() -> None:
    sae = create("topk", d_in=8, d_sae=16, k=3, reads={"a": 4, "b": 4})
    with pytest.raises(DataError, match="latent scaling: there was no batch"):
        latent_scaling(sae, [torch.zeros(0, 8)], own="a")
