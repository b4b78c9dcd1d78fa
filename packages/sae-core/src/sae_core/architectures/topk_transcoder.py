"""TopK transcoders: a transcoder that keeps the k largest latents (Paulo et al. 2025, arXiv 2501.18823).

    h = x W_enc + b_enc
    f = relu(h) for the k largest of h, else 0
    y = f W_dec + b_dec   (topk_skip_transcoder: + x W_skip^T)
    loss = mean over rows of |y - target|^2, plus the auxiliary loss of dead latents

Latents are ranked by their pre-activations, as in EleutherAI's sparsify. Why there is an auxiliary loss is said in `topk`;
everything else is `TranscoderBase`.
"""

# R rows, D d_in, F d_sae, O d_out

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from sae_core.architectures._parts import auxiliary_loss, squared_error, with_dead
from sae_core.architectures.transcoder import TranscoderBase, TranscoderBaseConfig
from sae_core.codes import Codes, SparseCodes
from sae_core.config import option, require
from sae_core.ops.decode import decode
from sae_core.ops.encode import encode_entries
from sae_core.ops.select import TopK
from sae_core.sae import Prepared, SAEConfig, StepContext, StepOutput, training_option

__all__ = ["TopKSkipTranscoder", "TopKTranscoder", "TopKTranscoderConfig"]


@dataclass(frozen=True, kw_only=True)
class TopKTranscoderConfig(TranscoderBaseConfig):
    """Config of `TopKTranscoder` and `TopKSkipTranscoder`."""

    k: int = option(default=64, help="latents kept in every row")
    aux_loss_coefficient: float = training_option(default=1.0, help="weight of the auxiliary loss of dead latents")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.k <= self.d_sae, f"k must lie in [1, d_sae = {self.d_sae}], not {self.k}")
        require(
            self.aux_loss_coefficient >= 0, f"aux_loss_coefficient must not be negative: {self.aux_loss_coefficient}"
        )


class _TopKTranscoder(TranscoderBase[TopKTranscoderConfig], ABC):
    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Random encoder and decoder; biases and the skip path zero."""
        self.reset_linear(generator)

    def encode_rows(self, prepared: Prepared) -> Codes:
        """The k largest latents, those not above zero as zero."""
        return self._select(prepared.z, self.W_enc, None).map(torch.relu)

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        """Squared error against the target plus the auxiliary loss of dead latents."""
        wanted = context.dead if self.config.aux_loss_coefficient else None
        W_enc, W_dec, dead = with_dead(self.W_enc, self.b_enc, self.W_dec, wanted)
        codes = self._select(prepared.z, W_enc, context.product_dtype).map(torch.relu)
        y_RO = self.with_bias_and_skip(decode(codes, W_dec), prepared)
        losses = {"mse": squared_error(y_RO, target)}
        if dead is not None:
            losses["auxiliary_reconstruction"] = self.config.aux_loss_coefficient * auxiliary_loss(
                prepared.z,
                target - y_RO,
                dead,
                centre_D=None,
                k_aux=max(self.d_in // 2, 1),
            )
        return StepOutput(sum(losses.values(), torch.zeros(())), losses, codes, y_RO, target)

    def _select(self, z: Tensor, W_enc: Tensor, product_dtype: torch.dtype | None) -> SparseCodes:
        return encode_entries(z, None, W_enc, self.b_enc, TopK(self.config.k, None), product_dtype=product_dtype)


@final
class TopKTranscoder(_TopKTranscoder):
    """A transcoder that keeps the k largest latents of every row."""

    architecture: ClassVar[str] = "topk_transcoder"
    config_class: ClassVar[type[SAEConfig]] = TopKTranscoderConfig
    has_skip: ClassVar[bool] = False


@final
class TopKSkipTranscoder(_TopKTranscoder):
    """A TopK transcoder beside an affine map, which takes over what is linear (arXiv 2501.18823)."""

    architecture: ClassVar[str] = "topk_skip_transcoder"
    config_class: ClassVar[type[SAEConfig]] = TopKTranscoderConfig
    has_skip: ClassVar[bool] = True
