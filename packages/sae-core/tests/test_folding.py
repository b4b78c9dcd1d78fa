from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_core import SAE, ActivationBatch, create
from sae_core.errors import ConfigError

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 + 1
T = torch.randn(40, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3 - 1
FIELDS: dict[str, dict[str, Any]] = {
    "standard": {},
    "gated": {},
    "jumprelu": {},
    "topk": {"k": 3},
    "abstopk": {"k": 3},
    "groupmax": {"k": 3},
    "batchtopk": {"k": 3},
    "matryoshka_batchtopk": {"k": 3, "matryoshka_widths": (4, 12)},
}
SHAPES: dict[str, dict[str, Any]] = {
    "SAE": {},
    "transcoder": {"d_out": 5},
    "skip transcoder": {"d_out": 5, "skip": True, "writes": {"a": 2, "b": 3}},
    "crosscoder": {"reads": {"a": 4, "b": 2}},
    "crosscoder, joint norm": {"reads": {"a": 4, "b": 2}, "decoder_norm": "joint"},
}
every_shape = pytest.mark.parametrize("shape", SHAPES)
RESCALED = ("topk", "abstopk", "groupmax", "batchtopk", "matryoshka_batchtopk")
FIXED = ("expected_average_only_in", "covariance_whitening", "constant_scalar_rescale")


def trained_looking(architecture: str, **fields: Any) -> SAE:
    """An SAE in which every parameter and threshold matters, one decoder row being zero."""
    sae = create(architecture, d_in=6, d_sae=12, dtype="float64", **{**FIELDS[architecture], **fields}).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * 0.2 if name == "threshold" else parameter + 0.4 * (noise - 0.5))
        sae.W_dec[3] = 0.0
        if fields.get("skip"):
            assert sae.get_parameter("W_skip").any()
        for buffer in ("topk_threshold", "topk_threshold_weight"):
            if hasattr(sae, buffer):
                getattr(sae, buffer).fill_(0.1)
    sae.fit_normalization(ActivationBatch(X, None if sae.reconstructs_input else T))
    return sae


def norms_of(sae: SAE) -> torch.Tensor:
    """Decoder norms by hand: summed over the sites, unless joint."""
    W_dec = sae.get_parameter("W_dec").detach()
    if getattr(sae.config, "decoder_norm", "") == "joint":
        return W_dec.norm(dim=-1)
    return torch.stack([part.norm(dim=-1) for part in W_dec.split(list(sae.writes.values()), dim=-1)]).sum(0)


@every_shape
@pytest.mark.parametrize("architecture", FIELDS)
def test_folding_decoder_norms_keeps_reconstructions_and_gives_unit_rows(architecture: str, shape: str) -> None:
    sae = trained_looking(architecture, **SHAPES[shape])
    y, latents, norms = sae(X), sae.encode(X), norms_of(sae)
    sae.fold_decoder_norm()
    torch.testing.assert_close(sae(X), y)
    torch.testing.assert_close(norms_of(sae), (norms > 0).double())
    torch.testing.assert_close(sae.encode(X), latents if architecture in RESCALED else latents * norms)


@pytest.mark.parametrize("normalization", FIXED)
@every_shape
@pytest.mark.parametrize("architecture", FIELDS)
def test_folding_a_fixed_normalisation_changes_neither_latents_nor_reconstructions(
    architecture: str, shape: str, normalization: str
) -> None:
    factor = {"activation_normalization_factor": 2.5} if normalization == "constant_scalar_rescale" else {}
    sae = trained_looking(architecture, normalize_activations=normalization, **factor, **SHAPES[shape])
    y, latents = sae(X), sae.encode(X)
    sae.fold_normalization()
    assert sae.config.normalize_activations == "none"
    torch.testing.assert_close(sae(X), y)
    torch.testing.assert_close(sae.encode(X), latents)


@pytest.mark.parametrize("normalization", FIXED)
@every_shape
@pytest.mark.parametrize("architecture", ["standard", "gated", "topk", "jumprelu"])
def test_folding_without_subtracting_the_decoder_bias_shifts_the_biases_of_the_latents(
    architecture: str, shape: str, normalization: str
) -> None:
    factor = {"activation_normalization_factor": 2.5} if normalization == "constant_scalar_rescale" else {}
    fields = {**SHAPES[shape], "apply_b_dec_to_input": False}
    sae = trained_looking(architecture, normalize_activations=normalization, **factor, **fields)
    y, latents = sae(X), sae.encode(X)
    sae.fold_normalization()
    torch.testing.assert_close(sae(X), y)
    torch.testing.assert_close(sae.encode(X), latents)


def test_what_is_folded_is_folded_once() -> None:
    sae = trained_looking("topk", normalize_activations="covariance_whitening", d_out=5, skip=True)
    y = sae(X)
    for fold in (sae.fold_decoder_norm, sae.fold_normalization, sae.fold_normalization):
        fold()
        torch.testing.assert_close(sae(X), y)
    assert sae.target_normalization is not None
    assert (sae.normalization.name, sae.target_normalization.name) == ("none", "none")


def test_folding_nothing_does_nothing() -> None:
    sae = trained_looking("standard", normalize_activations="layer_norm")
    y = sae(X)
    sae.fold_normalization()
    assert torch.equal(sae(X), y)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_folding_that_would_change_the_ranking_is_refused(architecture: str) -> None:
    with pytest.raises(ConfigError, match="would change which are kept"):
        trained_looking(architecture, rescale_acts_by_decoder_norm=False).fold_decoder_norm()


def test_tied_architectures_refuse_to_fold() -> None:
    sae = create("matching_pursuit", d_in=6, d_sae=12, normalize_activations="constant_scalar_rescale",
                 activation_normalization_factor=2.0)  # fmt: skip
    for fold in (sae.fold_decoder_norm, sae.fold_normalization):
        with pytest.raises(ConfigError, match="matching_pursuit"):
            fold()
