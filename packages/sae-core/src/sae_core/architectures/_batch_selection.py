"""What BatchTopK and Matryoshka share: a selection over the batch in training, one threshold for all rows afterwards.

    h = (z - b_dec) W_enc + b_enc
    train mode:  f = relu(h * n) for the int(k * rows) largest of h * n in the batch, else 0
    eval mode:   f = h * n where h * n > t, else 0
    y = (f / n) W_dec + b_dec

n are the decoder norms, or 1 without rescaling; t is the running mean of the smallest latent that stayed. Nobody wants an
output that depends on what else is in the batch, so in eval mode the threshold decides. That is a JumpReLU, and it is saved
as one.

The running mean is exponential and starts from nothing. Uncorrected, it lies too low until about 3 / topk_threshold_lr steps
have passed; here it is divided by the weight it has seen so far, as Adam does with its moments.
"""

# R rows, D d_in, F d_sae

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sae_core.architectures._parts import export_rescaled, init_decoder, times_norms, without_norms
from sae_core.architectures.jumprelu import JumpReLUConfig
from sae_core.codes import Codes, SparseCodes
from sae_core.config import Schedule, option, require, value_at
from sae_core.folding import decoder_norms
from sae_core.ops.active import encode_active
from sae_core.ops.batch_topk import BatchTopK
from sae_core.ops.decode import decode
from sae_core.ops.encode import encode_entries, latent_major_parameter
from sae_core.sae import SAE, Export, Prepared, SAEConfig, training_option

__all__ = ["BatchSelectionConfig", "BatchSelectionSAE"]


@dataclass(frozen=True, kw_only=True)
class BatchSelectionConfig(SAEConfig):
    """Fields of architectures that select over the batch."""

    k: float | Schedule = option(default=100.0, help="latents kept per row on average; may be a schedule")
    rescale_acts_by_decoder_norm: bool = option(
        default=True, help="rank and report latents by pre-activation times decoder norm"
    )
    aux_loss_coefficient: float = training_option(default=1.0, help="weight of the auxiliary loss of dead latents")
    topk_threshold_lr: float = training_option(
        default=0.01, help="weight of one step in the running threshold that eval mode uses"
    )
    topk_threshold_bias_correction: bool = training_option(
        default=True, help="correct the running threshold for its start at zero; false as in SAELens"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for k in (self.k.start, self.k.end) if isinstance(self.k, Schedule) else (self.k,):
            require(0 < k <= self.d_sae, f"k must lie in (0, d_sae = {self.d_sae}], not {k}")
        require(
            self.aux_loss_coefficient >= 0, f"aux_loss_coefficient must not be negative: {self.aux_loss_coefficient}"
        )
        require(0 < self.topk_threshold_lr <= 1, f"topk_threshold_lr must lie in (0, 1], not {self.topk_threshold_lr}")


ConfigT = TypeVar("ConfigT", bound=BatchSelectionConfig, covariant=True)


class BatchSelectionSAE(SAE[ConfigT], ABC):
    """Parameters, encoding, decoding, threshold and export; the objective is the subclass's."""

    topk_threshold: Tensor
    topk_threshold_weight: Tensor

    def __init__(self, config: ConfigT) -> None:
        super().__init__(config)
        self.W_enc = latent_major_parameter(config.d_in, config.d_sae)
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.W_dec = nn.Parameter(torch.empty(config.d_sae, config.d_in))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))
        self.register_buffer("topk_threshold", torch.zeros((), dtype=torch.float64))
        self.register_buffer("topk_threshold_weight", torch.zeros((), dtype=torch.float64))

    def _apply(self, fn: Any, recurse: bool = True) -> BatchSelectionSAE[ConfigT]:
        before = self.topk_threshold, self.topk_threshold_weight
        super()._apply(fn, recurse)
        # sae.to(bfloat16) is about the weights: a running mean that rounds to eight bits stops moving.
        if self.topk_threshold.dtype != torch.float64:
            device = self.topk_threshold.device
            self.topk_threshold, self.topk_threshold_weight = (buffer.to(device) for buffer in before)
        return self

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Random decoder rows of norm `decoder_init_norm`, the encoder its transpose, biases and threshold zero."""
        init_decoder(self.W_dec, self.config.decoder_init_norm, generator)
        self.W_enc.copy_(self.W_dec.t())
        for tensor in (self.b_enc, self.b_dec, self.topk_threshold, self.topk_threshold_weight):
            tensor.zero_()

    def k_at(self, progress: float) -> float:
        """The mean number of latents kept per row at this fraction of training; after training, the last one."""
        return value_at(self.config.k, progress)

    def encode_rows(self, prepared: Prepared) -> Codes:
        """In train mode the largest latents of the batch, in eval mode those above the threshold."""
        norms = self.norms()
        if self.training:
            return times_norms(self.select(prepared.z, self.W_enc, self.k_at(1.0), norms, None), norms)
        threshold = self.topk_threshold.clamp(min=0).to(self.dtype)
        floor = threshold.expand(self.d_sae) if norms is None else threshold / norms.detach()
        codes = encode_active(
            prepared.z, self.centre(), self.W_enc, self.b_enc, floor, density=self.k_at(1.0) / self.d_sae
        )
        return times_norms(codes.map(lambda h: torch.where(h > codes.per_latent(floor), h, 0.0)), norms)

    def decode_rows(self, codes: Codes, prepared: Prepared | None) -> Tensor:
        """Weighted sum of decoder rows; a zero row contributes zero."""
        return decode(without_norms(codes, self.norms()), self.W_dec) + self.b_dec

    def export(self) -> Export:
        """A JumpReLU with the same threshold for every latent."""
        as_trained = export_rescaled(self, self.config)
        inference = JumpReLUConfig(
            d_in=self.d_in,
            d_sae=self.d_sae,
            apply_b_dec_to_input=self.config.apply_b_dec_to_input,
            normalize_activations=as_trained.config.normalize_activations,
            reshape_activations=self.config.reshape_activations,
            activation_normalization_factor=as_trained.config.activation_normalization_factor,
        )
        precision = torch.promote_types(self.dtype, torch.float32)
        threshold = self.topk_threshold.clamp(min=0).to(precision).expand(self.d_sae)
        return Export("jumprelu", inference, {**as_trained.tensors, "threshold": threshold})

    def select(
        self, z: Tensor, W_enc: Tensor, k: float, norms: Tensor | None, product_dtype: torch.dtype | None
    ) -> SparseCodes:
        """Pre-activations of the ``int(k * rows)`` largest positive latents of the batch, ranked by ``h * norms``."""
        selection = BatchTopK(k, None if norms is None else norms.detach())
        return encode_entries(z, self.centre(), W_enc, self.b_enc, selection, product_dtype=product_dtype)

    @torch.no_grad()
    def move_threshold(self, latents: SparseCodes) -> None:
        """Take the smallest latent that stayed into the running mean; in eval mode, and with none, do nothing."""
        if not self.training or latents.values.numel() == 0:
            return
        rate, smallest = self.config.topk_threshold_lr, latents.values.min().double()
        if not self.config.topk_threshold_bias_correction:
            self.topk_threshold.lerp_(smallest, rate)
            return
        before = self.topk_threshold_weight * (1 - rate)
        self.topk_threshold_weight.copy_(before + rate)
        self.topk_threshold.copy_((before * self.topk_threshold + rate * smallest) / self.topk_threshold_weight)

    def norms(self) -> Tensor | None:
        """(d_sae,) decoder norms, or None when latents are not rescaled."""
        return decoder_norms(self.W_dec) if self.config.rescale_acts_by_decoder_norm else None

    def centre(self) -> Tensor | None:
        """What is subtracted from the input, or None."""
        return self.b_dec if self.config.apply_b_dec_to_input else None
