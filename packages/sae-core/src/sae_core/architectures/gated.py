"""Gated: whether a latent is active and how strongly are decided apart (Rajamanoharan et al. 2024, arXiv 2404.16014).

    p = (z - b_dec) W_enc
    gate = p + b_gate,   magnitude = relu(p exp(r_mag) + b_mag)
    f = 1[gate > 0] magnitude,   y = f W_dec + b_dec
    loss = mean over rows of  |y - z|^2 + l1_coefficient * sum_i relu(gate_i) n_i + |relu(gate) W_dec* + b_dec* - z|^2

The L1 penalty shrinks the gate, not the magnitude, and the last term gives the gate a reason to be open. The stars stand for
a frozen copy: the decoder must serve the magnitudes, not the gates. n are the decoder norms.

Both paths share one product with W_enc, and wherever the gate is closed neither contributes; so only entries with an open
gate are ever needed.
"""

# R rows, D d_in, F d_sae

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from sae_core.architectures._parts import export_tensors, init_decoder, squared_error
from sae_core.codes import Codes
from sae_core.config import Schedule, value_at
from sae_core.ops.active import encode_active
from sae_core.ops.decode import decode, decode_and_norms
from sae_core.ops.encode import latent_major_parameter
from sae_core.sae import SAE, Export, Prepared, SAEConfig, StepContext, StepOutput, training_option

__all__ = ["GatedConfig", "GatedSAE"]


@dataclass(frozen=True, kw_only=True)
class GatedConfig(SAEConfig):
    """Config of `GatedSAE`."""

    l1_coefficient: float | Schedule = training_option(
        default=1.0, help="weight of the gate's L1 penalty; a schedule from 0 is a warm-up"
    )
    freeze_decoder_in_aux: bool = training_option(
        default=True,
        help="the gate's own reconstruction does not train the decoder (as the paper); false as in SAELens",
    )


@final
class GatedSAE(SAE[GatedConfig]):
    """A gate and a magnitude for every latent (arXiv 2404.16014)."""

    architecture: ClassVar[str] = "gated"
    config_class: ClassVar[type[SAEConfig]] = GatedConfig
    independent_latents: ClassVar[bool] = True

    def __init__(self, config: GatedConfig) -> None:
        super().__init__(config)
        self.W_enc = latent_major_parameter(config.d_in, config.d_sae)
        self.b_gate = nn.Parameter(torch.zeros(config.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(config.d_sae))
        self.r_mag = nn.Parameter(torch.zeros(config.d_sae))
        self.W_dec = nn.Parameter(torch.empty(config.d_sae, config.d_in))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Random decoder rows of norm `decoder_init_norm`, the encoder its transpose, biases and log-gains zero."""
        init_decoder(self.W_dec, self.config.decoder_init_norm, generator)
        self.W_enc.copy_(self.W_dec.t())
        for parameter in (self.b_gate, self.b_mag, self.r_mag, self.b_dec):
            parameter.zero_()

    def encode_rows(self, prepared: Prepared) -> Codes:
        """Magnitudes where the gate is open."""
        _, codes = self._paths(prepared.z, None, None)
        return codes

    def decode_rows(self, codes: Codes, prepared: Prepared | None) -> Tensor:
        """Weighted sum of decoder rows."""
        return decode(codes, self.W_dec) + self.b_dec

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        """Squared error, the gate's L1 penalty, and the gate's own reconstruction."""
        gate, codes = self._paths(prepared.z, context.density, context.product_dtype)
        y_RD, norms = decode_and_norms(codes, self.W_dec)
        reconstruction = self.to_loss_space(y_RD + self.b_dec, prepared)
        penalty = gate.row_dots(norms).mean()
        W_dec, b_dec = self.W_dec, self.b_dec
        if self.config.freeze_decoder_in_aux:
            W_dec, b_dec = W_dec.detach(), b_dec.detach()
        losses = {
            "mse": squared_error(reconstruction, target),
            "l1": value_at(self.config.l1_coefficient, context.progress) * penalty,
            "auxiliary_reconstruction": squared_error(
                self.to_loss_space(decode(gate, W_dec) + b_dec, prepared), target
            ),
        }
        loss = losses["mse"] + losses["l1"] + losses["auxiliary_reconstruction"]
        return StepOutput(loss, losses, codes, reconstruction, target)

    @property
    def loss_is_mean_over_rows(self) -> bool:
        """Always."""
        return True

    def export(self) -> Export:
        """The parameters themselves."""
        return export_tensors(self, self.config)

    def _paths(self, z: Tensor, density: float | None, product_dtype: torch.dtype | None) -> tuple[Codes, Codes]:
        """``relu(gate)`` and the latents, from one product; both hold the entries with an open gate."""
        centre = self.b_dec if self.config.apply_b_dec_to_input else None
        no_bias = torch.zeros_like(self.b_gate)
        closed = -self.b_gate.detach()
        p = encode_active(z, centre, self.W_enc, no_bias, closed, density=density, product_dtype=product_dtype)
        gate = p.values + p.per_latent(self.b_gate)
        magnitude = p.values * p.per_latent(self.r_mag.exp()) + p.per_latent(self.b_mag)
        return p.with_values(gate.relu()), p.with_values(torch.where(gate > 0, magnitude.relu(), 0.0))
