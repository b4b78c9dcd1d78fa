"""BatchTopK: the k * rows largest latents of a whole batch stay, however they fall to its rows (2412.06410).

A row that is hard to explain may use more latents than an easy one; on average there are k. How the selection works, and
what stands in for it once training is over, is in `_batch_selection`. The objective is that of TopK:

    loss = mean over rows of |y - z|^2 + aux_loss_coefficient * (auxiliary loss of dead latents)
"""

# R rows, D d_in, F d_sae

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from sae_core.architectures._batch_selection import BatchSelectionConfig, BatchSelectionSAE
from sae_core.architectures._parts import auxiliary_loss, squared_error, times_norms, with_dead
from sae_core.ops.decode import decode
from sae_core.sae import Prepared, SAEConfig, StepContext, StepOutput

__all__ = ["BatchTopKConfig", "BatchTopKSAE"]


@dataclass(frozen=True, kw_only=True)
class BatchTopKConfig(BatchSelectionConfig):
    """Config of `BatchTopKSAE`."""


@final
class BatchTopKSAE(BatchSelectionSAE[BatchTopKConfig]):
    """Keeps k latents a row on average over the batch; a threshold in eval mode (arXiv 2412.06410)."""

    architecture: ClassVar[str] = "batchtopk"
    config_class: ClassVar[type[SAEConfig]] = BatchTopKConfig

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        """Squared error plus the auxiliary loss of dead latents; in train mode the threshold moves."""
        norms = self.norms()
        norms = None if norms is None else norms.detach()  # ranks only: it cancels in the reconstruction
        wanted = context.dead if self.config.aux_loss_coefficient else None
        W_enc, W_dec, dead = with_dead(self.W_enc, self.b_enc, self.W_dec, wanted)
        codes = self.select(prepared.z, W_enc, self.k_at(context.progress), norms, context.product_dtype)
        y_RD = decode(codes, W_dec)
        reconstruction = self.to_loss_space(y_RD + self.b_dec, prepared)
        losses = {"mse": squared_error(reconstruction, target)}
        if dead is not None:
            losses["auxiliary_reconstruction"] = self.config.aux_loss_coefficient * auxiliary_loss(
                prepared.z,
                prepared.z - y_RD - self.b_dec,
                dead,
                centre_D=self.centre(),
                k_aux=max(self.d_in // 2, 1),
                scale=norms,
            )
        latents = times_norms(codes, norms)
        self.move_threshold(latents)
        metrics = {"topk_threshold": self.topk_threshold.clone()}
        return StepOutput(sum(losses.values(), torch.zeros(())), losses, latents, reconstruction, target, metrics)
