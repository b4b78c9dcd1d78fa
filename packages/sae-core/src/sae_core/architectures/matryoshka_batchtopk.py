"""Matryoshka: nested dictionaries, each of which must reconstruct alone (Bussmann et al. 2025, arXiv 2503.17547).

The first w_1 latents are a dictionary, the first w_2 > w_1 are a larger one that contains it, and so on up to d_sae. All use
the same BatchTopK selection (see `_batch_selection`), and every level is trained:

    y_l = sum_{i < w_l} (f_i / n_i) w_i + b_dec
    loss = sum over levels l of  mean over rows of |y_l - z|^2  +  aux_loss_coefficient * (auxiliary loss of dead latents)

General features end up in the small dictionaries, since those must do without the others. All levels are decoded in one
pass: level l + 1 adds its own latents to level l, and a latent's gradient sums over the levels that contain it.

With `use_matryoshka_aux_loss` each level has its own auxiliary loss: the dead latents that the level adds predict what the
level leaves over. Without, all dead latents predict what the whole dictionary leaves over.
"""

# L levels, R rows, D d_in, F d_sae

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, final

import torch
from torch import Tensor

from sae_core.architectures._batch_selection import BatchSelectionConfig, BatchSelectionSAE
from sae_core.architectures._parts import DeadLatents, auxiliary_loss, squared_error, times_norms, with_dead
from sae_core.config import option, require
from sae_core.ops.decode import decode_prefixes
from sae_core.sae import Prepared, SAEConfig, StepContext, StepOutput, training_option

__all__ = ["MatryoshkaBatchTopKConfig", "MatryoshkaBatchTopKSAE"]


@dataclass(frozen=True, kw_only=True)
class MatryoshkaBatchTopKConfig(BatchSelectionConfig):
    """Config of `MatryoshkaBatchTopKSAE`."""

    matryoshka_widths: tuple[int, ...] = option(
        help="widths of the nested dictionaries, increasing; d_sae is the last level whether named or not"
    )
    use_matryoshka_aux_loss: bool = training_option(
        default=False, help="an auxiliary loss for every level instead of one for the whole dictionary"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        widths = self.matryoshka_widths
        require(bool(widths), "matryoshka_widths must name at least one width below d_sae")
        require(widths[0] > 0, f"matryoshka_widths must be positive, not {list(widths)}")
        require(all(a < b for a, b in pairwise(widths)), f"matryoshka_widths must increase, not {list(widths)}")
        require(widths[-1] <= self.d_sae, f"matryoshka_widths {list(widths)} go beyond d_sae = {self.d_sae}")

    @property
    def levels(self) -> tuple[int, ...]:
        """The widths, d_sae included."""
        named = self.matryoshka_widths
        return named if named[-1] == self.d_sae else (*named, self.d_sae)


@final
class MatryoshkaBatchTopKSAE(BatchSelectionSAE[MatryoshkaBatchTopKConfig]):
    """Nested BatchTopK dictionaries trained together (arXiv 2503.17547)."""

    architecture: ClassVar[str] = "matryoshka_batchtopk"
    config_class: ClassVar[type[SAEConfig]] = MatryoshkaBatchTopKConfig

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        """Squared error of every level plus auxiliary losses; in train mode the threshold moves."""
        norms = self.norms()
        norms = None if norms is None else norms.detach()  # ranks only: it cancels in the reconstruction
        wanted = context.dead if self.config.aux_loss_coefficient else None
        W_enc, W_dec, dead = with_dead(self.W_enc, self.b_enc, self.W_dec, wanted)
        codes = self.select(prepared.z, W_enc, self.k_at(context.progress), norms, context.product_dtype)
        levels = self.config.levels
        y_LRD = decode_prefixes(codes, W_dec, levels) + self.b_dec
        outputs = [self.to_loss_space(y_RD, prepared) for y_RD in y_LRD.unbind()]
        losses = {"mse": squared_error(outputs[-1], target)}
        for width, output in zip(levels[:-1], outputs, strict=False):
            losses[f"inner_mse_{width}"] = squared_error(output, target)
        if dead is not None:
            losses["auxiliary_reconstruction"] = self.config.aux_loss_coefficient * self._auxiliary(
                prepared.z, y_LRD, norms, dead
            )
        latents = times_norms(codes, norms)
        self.move_threshold(latents)
        metrics = {"topk_threshold": self.topk_threshold.clone()}
        return StepOutput(sum(losses.values(), torch.zeros(())), losses, latents, outputs[-1], target, metrics)

    def _auxiliary(self, z_RD: Tensor, y_LRD: Tensor, norms: Tensor | None, dead: DeadLatents) -> Tensor:
        """Dead latents predict what their level, or the whole dictionary, leaves over."""
        parts = [(dead, y_LRD[-1])]
        if self.config.use_matryoshka_aux_loss:
            levels = self.config.levels
            added = [(dead.indices >= start) & (dead.indices < end) for start, end in pairwise((0, *levels))]
            parts = [(dead.where(mask), y_RD) for mask, y_RD in zip(added, y_LRD.unbind(), strict=True)]
        total = z_RD.new_zeros(())
        for some, y_RD in parts:
            if some.indices.numel() == 0:
                continue
            total = total + auxiliary_loss(
                z_RD,
                z_RD - y_RD,
                some,
                centre_D=self.centre(),
                k_aux=max(self.d_in // 2, 1),
                scale=norms,
            )
        return total
