"""Gated: whether a latent is active and how strongly are decided apart (Rajamanoharan et al. 2024, arXiv 2404.16014).

    p = (z - b_dec) W_enc
    gate = p + b_gate,   magnitude = relu(p exp(r_mag) + b_mag)
    f = 1[gate > 0] magnitude,   y = f W_dec + b_dec
    loss = mean over rows of  |y - z|^2 + l1_coefficient * sum_i relu(gate_i) n*_i + |relu(gate) W_dec* + b_dec* - z|^2

The L1 penalty shrinks the gate, not the magnitude, and the last term gives the gate a reason to be open. n are the decoder
norms. The paper lets neither starred term train the decoder (`freeze_decoder_in_aux`), which then serves the magnitudes
alone. The norms are then constants too: the paper holds them at 1, and a decoder that may shrink under the penalty alone,
while the gains grow, escapes from it. Where both terms train the decoder, as in SAELens and here by default, shrinking gains
nothing, and latents find more of the features.

Both paths share one product with W_enc, and wherever the gate is closed neither contributes; so only entries with an open
gate are ever needed.
"""

# R rows, D d_in, F d_sae

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from sae_core.architectures.linear import LinearConfig, LinearSAE
from sae_core.architectures.parts import squared_error
from sae_core.codes import Codes
from sae_core.config import Schedule, value_at
from sae_core.ops.decode import decode, decode_and_norms
from sae_core.sae import Axis, Prepared, SAEConfig, StepContext, StepOutput, training_option

__all__ = ["GatedConfig", "GatedSAE"]


@dataclass(frozen=True, kw_only=True)
class GatedConfig(LinearConfig):
    """Config of `GatedSAE`."""

    l1_coefficient: float | Schedule = training_option(
        default=1.0, help="weight of the gate's L1 penalty; a schedule from 0 is a warm-up"
    )
    freeze_decoder_in_aux: bool = training_option(
        default=False,
        help="true: the gate's penalty and its own reconstruction do not train the decoder, as in the paper",
    )


@final
class GatedSAE(LinearSAE[GatedConfig]):
    """A gate and a magnitude for every latent (arXiv 2404.16014)."""

    architecture: ClassVar[str] = "gated"
    config_class: ClassVar[type[SAEConfig]] = GatedConfig
    AXES: ClassVar[Mapping[str, Axis]] = {
        **LinearSAE.AXES,
        "b_gate": Axis(0, "with_norm"),
        "b_mag": Axis(0, "with_norm"),
        "r_mag": Axis(0),
    }
    biases: ClassVar[tuple[str, ...]] = ("b_gate", "b_mag")
    folds: ClassVar[bool] = True
    sparsity_coefficient: ClassVar[str | None] = "l1_coefficient"
    independent_latents: ClassVar[bool] = True
    b_gate: nn.Parameter
    b_mag: nn.Parameter

    def __init__(self, config: GatedConfig) -> None:
        super().__init__(config)
        self.r_mag = nn.Parameter(torch.zeros(self.d_sae))

    def encode_rows(self, prepared: Prepared) -> Codes:
        """Magnitudes where the gate is open."""
        return self._paths(prepared, None)[1]

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        """Squared error, the gate's L1 penalty, and the gate's own reconstruction."""
        gate, codes = self._paths(prepared, context)
        y_RO, norms = decode_and_norms(codes, self.W_dec, self.norm_sizes())
        reconstruction = self.to_loss_space(self.with_bias_and_skip(y_RO, prepared), prepared)
        W_dec, b_dec = self.W_dec, self.b_dec
        skipped = None if self.W_skip is None else prepared.raw @ self.W_skip.t()
        if self.config.freeze_decoder_in_aux:
            W_dec, b_dec, norms = W_dec.detach(), b_dec.detach(), norms.detach()
            skipped = None if skipped is None else skipped.detach()
        opened = decode(gate, W_dec) + (b_dec if skipped is None else b_dec + skipped)
        losses = {
            "mse": squared_error(reconstruction, target),
            "l1": value_at(self.config.l1_coefficient, context.progress) * gate.row_dots(norms).mean(),
            "auxiliary_reconstruction": squared_error(self.to_loss_space(opened, prepared), target),
        }
        loss = losses["mse"] + losses["l1"] + losses["auxiliary_reconstruction"]
        return StepOutput(loss, losses, codes, reconstruction, target)

    @property
    def loss_is_mean_over_rows(self) -> bool:
        """Always."""
        return True

    @property
    def input_gains(self) -> Mapping[str, Tensor | None]:
        """A shift of the input reaches the magnitude through its gain."""
        return {"b_gate": None, "b_mag": self.r_mag.detach().exp()}

    def _paths(self, prepared: Prepared, context: StepContext | None) -> tuple[Codes, Codes]:
        """``relu(gate)`` and the latents, from one product; both hold the entries with an open gate."""
        gate = self.pre(prepared, context, floor=0.0)
        p = gate.values - gate.per_latent(self.b_gate)
        magnitude = p * gate.per_latent(self.r_mag.exp()) + gate.per_latent(self.b_mag)
        latents = gate.with_values(torch.where(gate.values > 0, magnitude.relu(), 0.0))
        return gate.map(torch.relu), latents
