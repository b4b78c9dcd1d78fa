"""BatchTopK: the k * rows largest latents of a whole batch stay, however they fall to its rows (2412.06410).

A row that is hard to explain may use more latents than an easy one; on average there are k. How the selection works, and
what stands in for it once training is over, is in `batch_selecting`; the objective is that of `selecting`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import Tensor

from sae_core.architectures.batch_selecting import BatchSelectingConfig, BatchSelectingSAE
from sae_core.sae import Prepared, SAEConfig, StepContext, StepOutput

__all__ = ["BatchTopKConfig", "BatchTopKSAE"]


@dataclass(frozen=True, kw_only=True)
class BatchTopKConfig(BatchSelectingConfig):
    """Config of `BatchTopKSAE`."""


@final
class BatchTopKSAE(BatchSelectingSAE[BatchTopKConfig]):
    """Keeps k latents a row on average over the batch; a threshold in eval mode (arXiv 2412.06410)."""

    architecture: ClassVar[str] = "batchtopk"
    config_class: ClassVar[type[SAEConfig]] = BatchTopKConfig
    example: ClassVar[Mapping[str, Any]] = {"k": 4}

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        """Squared error plus the auxiliary loss of dead latents; in train mode the threshold moves."""
        return self.with_moved_threshold(super().objective(prepared, target, context))
