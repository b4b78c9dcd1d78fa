"""GroupMax: latents stand in k groups of neighbours, and the largest of each group stays (EleutherAI's sparsify, 2025).

    h = (z - b_dec) W_enc + b_enc
    f = relu(h * n) for the largest h * n of each of the k groups, else 0,     n the decoder norms, or 1 without rescaling
    y = (f / n) W_dec + b_dec

Like TopK it keeps k latents of every row, but one pass over the pre-activations finds them, and a latent competes only with
the d_sae / k - 1 others of its group, so fewer of them die. The auxiliary loss of dead latents is that of TopK.
"""

# R rows, D d_in, F d_sae

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from sae_core.architectures._parts import (
    auxiliary_loss,
    export_rescaled,
    init_decoder,
    squared_error,
    times_norms,
    with_dead,
    without_norms,
)
from sae_core.codes import Codes, SparseCodes
from sae_core.config import option, require
from sae_core.folding import decoder_norms
from sae_core.ops.decode import decode
from sae_core.ops.encode import encode_entries, latent_major_parameter
from sae_core.ops.select import GroupMax
from sae_core.sae import SAE, Export, Prepared, SAEConfig, StepContext, StepOutput, training_option

__all__ = ["GroupMaxConfig", "GroupMaxSAE"]


@dataclass(frozen=True, kw_only=True)
class GroupMaxConfig(SAEConfig):
    """Config of `GroupMaxSAE`."""

    k: int = option(default=64, help="number of groups, and so of latents kept in every row; must divide d_sae")
    rescale_acts_by_decoder_norm: bool = option(
        default=True, help="rank and report latents by pre-activation times decoder norm"
    )
    aux_loss_coefficient: float = training_option(default=1.0, help="weight of the auxiliary loss of dead latents")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.k <= self.d_sae, f"k must lie in [1, d_sae = {self.d_sae}], not {self.k}")
        require(
            self.d_sae % self.k == 0,
            f"k must divide d_sae = {self.d_sae} into groups of one size, but {self.k} leaves {self.d_sae % self.k} over",
        )
        require(
            self.aux_loss_coefficient >= 0, f"aux_loss_coefficient must not be negative: {self.aux_loss_coefficient}"
        )


@final
class GroupMaxSAE(SAE[GroupMaxConfig]):
    """Keeps the largest latent of each of k groups."""

    architecture: ClassVar[str] = "groupmax"
    config_class: ClassVar[type[SAEConfig]] = GroupMaxConfig

    def __init__(self, config: GroupMaxConfig) -> None:
        super().__init__(config)
        self.W_enc = latent_major_parameter(config.d_in, config.d_sae)
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.W_dec = nn.Parameter(torch.empty(config.d_sae, config.d_in))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Random decoder rows of norm `decoder_init_norm`, the encoder its transpose, biases zero."""
        init_decoder(self.W_dec, self.config.decoder_init_norm, generator)
        self.W_enc.copy_(self.W_dec.t())
        self.b_enc.zero_()
        self.b_dec.zero_()

    def encode_rows(self, prepared: Prepared) -> Codes:
        """The largest latent of each group, those not above zero as zero."""
        norms = self._norms()
        return times_norms(self._select(prepared.z, self.W_enc, norms, None).map(torch.relu), norms)

    def decode_rows(self, codes: Codes, prepared: Prepared | None) -> Tensor:
        """Weighted sum of decoder rows; a zero row contributes zero."""
        return decode(without_norms(codes, self._norms()), self.W_dec) + self.b_dec

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        """Squared error plus the auxiliary loss of dead latents."""
        norms = self._norms()
        norms = None if norms is None else norms.detach()  # ranks only: it cancels in the reconstruction
        wanted = context.dead if self.config.aux_loss_coefficient else None
        W_enc, W_dec, dead = with_dead(self.W_enc, self.b_enc, self.W_dec, wanted)
        codes = self._select(prepared.z, W_enc, norms, context.product_dtype).map(torch.relu)
        y_RD = decode(codes, W_dec)
        reconstruction = self.to_loss_space(y_RD + self.b_dec, prepared)
        losses = {"mse": squared_error(reconstruction, target)}
        if dead is not None:
            losses["auxiliary_reconstruction"] = self.config.aux_loss_coefficient * auxiliary_loss(
                prepared.z,
                prepared.z - y_RD - self.b_dec,
                dead,
                centre_D=self._centre(),
                k_aux=max(self.d_in // 2, 1),
                scale=norms,
            )
        loss = sum(losses.values(), torch.zeros(()))
        return StepOutput(loss, losses, times_norms(codes, norms), reconstruction, target)

    def export(self) -> Export:
        """Unit decoder rows when latents are rescaled, so that readers need not rescale."""
        return export_rescaled(self, self.config)

    def _select(self, z: Tensor, W_enc: Tensor, norms: Tensor | None, product_dtype: torch.dtype | None) -> SparseCodes:
        selection = GroupMax(self.config.k, norms)
        return encode_entries(z, self._centre(), W_enc, self.b_enc, selection, product_dtype=product_dtype)

    def _norms(self) -> Tensor | None:
        return decoder_norms(self.W_dec) if self.config.rescale_acts_by_decoder_norm else None

    def _centre(self) -> Tensor | None:
        return self.b_dec if self.config.apply_b_dec_to_input else None
