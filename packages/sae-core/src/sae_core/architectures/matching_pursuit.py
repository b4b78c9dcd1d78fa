"""Matching pursuit: the encoder is the decoder, applied one latent at a time (Costa et al. 2025, arXiv 2506.03093).

    r = z - b_dec
    repeat   j = argmax_i r . w_i,   v = relu(r . w_j),   f_j += v,   r <- r - v w_j
    y = f W_dec + b_dec,   loss = mean over rows of |y - z|^2

A row is finished after `max_iterations` latents, when its residual is shorter than `residual_threshold`, or when it chooses
a latent a second time. There is no encoder to train and no penalty: sparsity is how soon a row is explained.

Projections mean lengths only if the rows w_i have unit norm, so training restores that after every step.
"""

# R rows, D d_in, F d_sae

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from sae_core.architectures.parts import init_decoder, squared_error
from sae_core.codes import Codes, SparseCodes
from sae_core.config import option, require
from sae_core.ops.decode import decode
from sae_core.ops.pursuit import PursuitLimits, matching_pursuit
from sae_core.sae import SAE, Axis, Export, Prepared, SAEConfig, StepContext, StepOutput, training_option

__all__ = ["MatchingPursuitConfig", "MatchingPursuitSAE"]


@dataclass(frozen=True, kw_only=True)
class MatchingPursuitConfig(SAEConfig):
    """Config of `MatchingPursuitSAE`."""

    residual_threshold: float = option(
        default=1e-2, help="a row is finished when its residual is shorter, in normalised units; 0 never stops for that"
    )
    max_iterations: int | None = option(default=None, help="most latents of a row; null is d_in")
    stop_on_duplicate_support: bool = option(
        default=True, help="a row is finished when it chooses a latent a second time"
    )
    decoder_init_norm: float | None = training_option(default=1.0, help="always 1: decoder rows keep unit norm")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.residual_threshold >= 0, f"residual_threshold must not be negative: {self.residual_threshold}")
        require(
            self.max_iterations is None or self.max_iterations > 0,
            f"max_iterations must be positive or null, not {self.max_iterations}",
        )
        require(
            self.decoder_init_norm == 1.0,
            f"decoder_init_norm must be 1: matching pursuit keeps unit decoder rows, not {self.decoder_init_norm}",
        )
        require(
            self.normalize_activations != "covariance_whitening",
            "normalize_activations: covariance_whitening cannot be folded into a matching pursuit, whose encoder is tied to "
            "its decoder; use another one",
        )


@final
class MatchingPursuitSAE(SAE[MatchingPursuitConfig]):
    """Greedy, sequential encoding with the decoder's own rows (arXiv 2506.03093)."""

    architecture: ClassVar[str] = "matching_pursuit"
    config_class: ClassVar[type[SAEConfig]] = MatchingPursuitConfig
    AXES: ClassVar[Mapping[str, Axis]] = {"W_dec": Axis(0), "b_dec": Axis(None)}

    def __init__(self, config: MatchingPursuitConfig) -> None:
        super().__init__(config)
        self.W_dec = nn.Parameter(torch.empty(config.d_sae, config.d_in))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Random unit decoder rows, bias zero."""
        init_decoder(self.W_dec, 1.0, generator)
        self.b_dec.zero_()

    def encode_rows(self, prepared: Prepared) -> Codes:
        """What the pursuit found, repeats of a latent added up."""
        return self._pursue(prepared.z)

    def decode_rows(self, codes: Codes, prepared: Prepared | None) -> Tensor:
        """Weighted sum of decoder rows; b_dec is added only if it was subtracted, since the pursuit starts from there."""
        y_RD = decode(codes, self.W_dec)
        return y_RD + self.b_dec if self.config.apply_b_dec_to_input else y_RD

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        """Squared error, through every step of the pursuit."""
        codes = self._pursue(prepared.z)
        y_RD = self.decode_rows(codes, prepared)
        reconstruction = self.to_loss_space(y_RD, prepared)
        losses = {"mse": squared_error(reconstruction, target)}
        with torch.no_grad():
            left = (prepared.z - y_RD).norm(dim=-1)
            metrics = {
                "residual_norm": left.mean(),
                "converged_fraction": (left < self.config.residual_threshold).to(left.dtype).mean(),
            }
        return StepOutput(losses["mse"], losses, codes, reconstruction, target, metrics)

    @torch.no_grad()
    def after_step(self) -> None:
        """Decoder rows have unit norm again; a row of zeros stays."""
        norms = self.W_dec.norm(dim=-1, keepdim=True)
        self.W_dec.div_(torch.where(norms > 0, norms, 1.0))

    def export(self) -> Export:
        """The parameters; a fixed scale of the input is kept as a constant factor, since latents are lengths in its units."""
        return Export(self.architecture, self.kept_as_factor(), self.tensors())

    @torch.no_grad()
    def start_at(self, centre_O: Tensor) -> None:
        """b_dec starts at the centre of the activations."""
        self.b_dec.copy_(centre_O)

    def _pursue(self, z: Tensor) -> SparseCodes:
        limits = PursuitLimits(
            steps=self.config.max_iterations or self.d_in,
            residual=self.config.residual_threshold,
            stop_on_repeat=self.config.stop_on_duplicate_support,
        )
        return matching_pursuit(z - self.b_dec if self.config.apply_b_dec_to_input else z, self.W_dec, limits)
