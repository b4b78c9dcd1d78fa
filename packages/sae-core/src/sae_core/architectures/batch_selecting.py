"""What BatchTopK and Matryoshka share: a selection over the batch in training, one threshold for all rows afterwards.

    train mode:  f = relu(h * n) for the int(k * rows) largest of h * n in the batch, else 0
    eval mode:   f = h * n where h * n > t, else 0

t is the running mean of the smallest latent that stayed. An output should not depend on what else is in the batch, so in
eval mode the threshold decides. That is a JumpReLU, and it is saved as one. The rest is in `selecting`.

The running mean is exponential and starts from nothing. Uncorrected, it lies too low until about 3 / topk_threshold_lr steps
have passed; here it is divided by the weight it has seen so far, as Adam does with its moments.
"""

# R rows, D d_in, F d_sae

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from sae_core.architectures.jumprelu import JumpReLUConfig
from sae_core.architectures.linear import LinearConfig
from sae_core.architectures.parts import times_norms
from sae_core.architectures.selecting import SelectingConfig, SelectingSAE, require_k
from sae_core.codes import Codes, SparseCodes
from sae_core.config import Schedule, option, require, value_at
from sae_core.ops.batch_topk import BatchTopK
from sae_core.ops.merging import smallest_value
from sae_core.ops.whole_batch import smallest_in_batch
from sae_core.sae import Axis, Export, Prepared, StepContext, StepOutput, training_option

__all__ = ["BatchSelectingConfig", "BatchSelectingSAE"]


@dataclass(frozen=True, kw_only=True)
class BatchSelectingConfig(SelectingConfig):
    """Fields of architectures that select over the batch."""

    k: float | Schedule = option(default=100.0, help="latents kept per row on average; may be a schedule")
    topk_threshold_lr: float = training_option(
        default=0.01, help="weight of one step in the running threshold that eval mode uses"
    )
    topk_threshold_bias_correction: bool = training_option(
        default=True, help="correct the running threshold for its start at zero; false as in SAELens"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_k(self.k, self.d_sae)
        require(0 < self.topk_threshold_lr <= 1, f"topk_threshold_lr must lie in (0, 1], not {self.topk_threshold_lr}")


C = TypeVar("C", bound=BatchSelectingConfig, covariant=True)


class BatchSelectingSAE(SelectingSAE[C], ABC):
    """The selection over the batch, the threshold that stands in for it, and export as a JumpReLU."""

    AXES: ClassVar[Mapping[str, Axis]] = {
        **SelectingSAE.AXES,
        "topk_threshold": Axis(None, keep_float32=True),
        "topk_threshold_weight": Axis(None, keep_float32=True),
    }
    topk_threshold: Tensor
    topk_threshold_weight: Tensor

    def __init__(self, config: C) -> None:
        super().__init__(config)
        self.register_buffer("topk_threshold", torch.zeros((), dtype=torch.float64))
        self.register_buffer("topk_threshold_weight", torch.zeros((), dtype=torch.float64))

    def selection(self, progress: float, norms: Tensor | None) -> BatchTopK:
        """The ``int(k * rows)`` largest positive latents of the batch."""
        return BatchTopK(value_at(self.config.k, progress), norms)

    def encode_rows(self, prepared: Prepared) -> Codes:
        """In train mode the largest latents of the batch, in eval mode those above the threshold."""
        if self.training:
            return super().encode_rows(prepared)
        norms = self.latent_norms()
        threshold = self.topk_threshold.clamp(min=0).to(self.dtype)
        floor = threshold.expand(self.d_sae) if norms is None else threshold / norms.detach()
        expected = StepContext(density=value_at(self.config.k, 1.0) / self.config.d_sae)
        codes = self.pre(prepared, expected, floor=floor)
        return times_norms(codes.map(lambda h: torch.where(h > codes.per_latent(floor), h, 0.0)), norms)

    def with_moved_threshold(self, output: StepOutput) -> StepOutput:
        """`output` of an objective, after the smallest latent that stayed was taken into the running mean."""
        assert isinstance(output.codes, SparseCodes)
        self._move_threshold(output.codes)
        return replace(output, metrics={**output.metrics, "topk_threshold": self.topk_threshold.clone()})

    def export(self) -> Export:
        """A JumpReLU with the same threshold for every latent."""
        shared = {field.name for field in fields(LinearConfig)}
        folded, tensors = self.in_inference_form(self.config)
        inference = JumpReLUConfig(**{name: getattr(folded, name) for name in shared})
        precision = torch.promote_types(self.dtype, torch.float32)
        threshold = self.topk_threshold.clamp(min=0).to(precision).expand(self.d_sae)
        return Export("jumprelu", inference, {**tensors, "threshold": threshold})

    @torch.no_grad()
    def _move_threshold(self, latents: SparseCodes) -> None:
        """In eval mode, and with no latent in the batch, nothing happens."""
        if not self.training:
            return
        rate = self.config.topk_threshold_lr
        smallest = smallest_in_batch(smallest_value(latents, self.ranks).double())
        if not self.config.topk_threshold_bias_correction:
            moved = torch.lerp(self.topk_threshold.double(), smallest, rate)
        else:
            before = self.topk_threshold_weight * (1 - rate)
            moved = (before * self.topk_threshold + rate * smallest) / (before + rate)
            self.topk_threshold_weight.copy_((before + rate).where(smallest.isfinite(), self.topk_threshold_weight))
        self.topk_threshold.copy_(moved.where(smallest.isfinite(), self.topk_threshold))
