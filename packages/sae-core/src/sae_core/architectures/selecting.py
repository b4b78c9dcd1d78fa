"""What architectures that select latents share: those that keep the best of a row, a group or a batch, whatever their size.

    h = (z - b_dec) W_enc + b_enc
    f = h * n for the selected latents, else 0,     n the decoder norms, or 1 without rescaling
    y = (f / n) W_dec + b_dec
    loss = mean over rows of |y - z|^2 + aux_loss_coefficient * (auxiliary loss of dead latents)

Sparsity needs no penalty, since it is exact; what needs care is latents that are never selected. They are kept alive by the
auxiliary loss (Gao et al. 2024, arXiv 2406.04093): dead latents predict the residual. Ranking by h * n, the length of a
latent's contribution, makes the choice independent of how encoder and decoder share their scale; in the reconstruction n
cancels. A subclass says which selection it makes, and what becomes of the values that it keeps.
"""

# R rows, D d_in, F d_sae, O d_out

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from sae_core.architectures.linear import LinearConfig, LinearSAE
from sae_core.architectures.parts import (
    DeadLatents,
    auxiliary_loss,
    squared_error,
    times_norms,
    with_dead,
    without_norms,
)
from sae_core.codes import Codes, SparseCodes
from sae_core.config import Schedule, ends_of, option, require, value_at
from sae_core.errors import ConfigError
from sae_core.ops.decode import decode
from sae_core.ops.select import Selection
from sae_core.sae import Export, Prepared, StepContext, StepOutput, training_option

__all__ = ["SelectingConfig", "SelectingSAE", "require_k"]


@dataclass(frozen=True, kw_only=True)
class SelectingConfig(LinearConfig):
    """Fields of architectures that select latents."""

    rescale_acts_by_decoder_norm: bool = option(
        default=True, help="rank and report latents by pre-activation times decoder norm"
    )
    aux_loss_coefficient: float = training_option(default=1.0, help="weight of the auxiliary loss of dead latents")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.aux_loss_coefficient >= 0, f"aux_loss_coefficient must not be negative: {self.aux_loss_coefficient}"
        )


def require_k(k: float | Schedule, d_sae: int, *, least: float | None = None) -> None:
    """Raise ConfigError unless k, or both ends of its schedule, lies in [least, d_sae]; without `least`, in (0, d_sae]."""
    for value in ends_of(k):
        if least is None:
            require(0 < value <= d_sae, f"k must lie in (0, d_sae = {d_sae}], not {value}")
        else:
            require(least <= value <= d_sae, f"k must lie in [{least}, d_sae = {d_sae}], not {value}")


C = TypeVar("C", bound=SelectingConfig, covariant=True)


class SelectingSAE(LinearSAE[C], ABC):
    """Encoding, decoding, objective and export; the selection is the subclass's."""

    folds: ClassVar[bool] = True

    @abstractmethod
    def selection(self, progress: float, norms: Tensor | None) -> Selection:
        """What is kept at this fraction of training, ranked by pre-activation times `norms` (d_sae,) if given."""

    def activation(self, values: Tensor) -> Tensor:
        """What becomes of the pre-activations that were kept: those below zero become zero."""
        return torch.relu(values)

    def auxiliary_selection(self, k: int, norms: Tensor | None) -> Selection:
        """How dead latents compete in the auxiliary loss."""
        from sae_core.ops.select import TopK

        return TopK(k, norms)

    def final_config(self) -> Any:
        """The config with schedules at their ends, for files."""
        return self.config

    def encode_rows(self, prepared: Prepared) -> Codes:
        """The selected latents, as at the end of training."""
        norms = self.latent_norms()
        return times_norms(self.select(prepared, self.selection(1.0, norms)).map(self.activation), norms)

    def decode_rows(self, codes: Codes, prepared: Prepared | None) -> Tensor:
        """Weighted sum of decoder rows, plus bias and skip path; a zero row contributes zero."""
        return self.with_bias_and_skip(decode(without_norms(codes, self.latent_norms()), self.W_dec), prepared)

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        """Squared error plus the auxiliary loss of dead latents."""
        norms, codes, W_dec, dead = self.selected(prepared, context)
        y_RO = self.with_bias_and_skip(decode(codes, W_dec), prepared)
        reconstruction = self.to_loss_space(y_RO, prepared)
        losses = {"mse": squared_error(reconstruction, target)}
        if dead is not None:
            losses["auxiliary_reconstruction"] = self.auxiliary(
                prepared, self.residual(prepared, target, y_RO), dead, norms
            )
        loss = sum(losses.values(), torch.zeros(()))
        return StepOutput(loss, losses, times_norms(codes, norms), reconstruction, target)

    def selected(
        self, prepared: Prepared, context: StepContext
    ) -> tuple[Tensor | None, SparseCodes, Tensor, DeadLatents | None]:
        """For an objective: norms as constants, the kept latents in units of h, the decoder to use, and the dead latents."""
        norms = self.latent_norms()
        norms = None if norms is None else norms.detach()  # ranks only: it cancels in the reconstruction
        wanted = context.dead if self.config.aux_loss_coefficient else None
        encoder, W_dec, dead = with_dead(
            self.encoder, self.get_parameter("b_enc"), self.W_dec, wanted, context.dead_elsewhere
        )
        codes = self.select(prepared, self.selection(context.progress, norms), context, encoder).map(self.activation)
        return norms, codes, W_dec, dead

    def auxiliary(self, prepared: Prepared, residual_RO: Tensor, dead: DeadLatents, norms: Tensor | None) -> Tensor:
        """The weighted auxiliary loss: dead latents predict the residual (rows, d_out)."""
        return self.config.aux_loss_coefficient * auxiliary_loss(
            prepared.z,
            residual_RO,
            dead,
            centre_D=self.centre(),
            k_aux=max(self.d_in // 2, 1),
            scale=norms,
            selection=self.auxiliary_selection,
        )

    def latent_norms(self) -> Tensor | None:
        """(d_sae,) decoder norms, or None when latents are not rescaled."""
        return self.decoder_norms() if self.config.rescale_acts_by_decoder_norm else None

    def unit_norm_config(self, config: Any) -> Any:
        """Ranks that are rescaled stay what they are when norms move into the encoder."""
        if not self.config.rescale_acts_by_decoder_norm:
            raise ConfigError(
                f"{self.architecture}: with rescale_acts_by_decoder_norm: false latents are ranked by their "
                "pre-activations, and folding decoder norms into those would change which are kept"
            )
        return dataclasses.replace(config, rescale_acts_by_decoder_norm=False)

    def export(self) -> Export:
        """Unit decoder rows when latents are rescaled, so that readers need not rescale."""
        return Export(self.architecture, *self.in_inference_form(self.final_config()))


def last_k(config: Any) -> Any:
    """`config` with the k that its schedule ends with."""
    return dataclasses.replace(config, k=round(value_at(config.k, 1.0)))
