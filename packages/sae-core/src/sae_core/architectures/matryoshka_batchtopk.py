"""Matryoshka: nested dictionaries, each of which must reconstruct alone (Bussmann et al. 2025, arXiv 2503.17547).

The first w_1 latents are a dictionary, the first w_2 > w_1 are a larger one that contains it, and so on up to d_sae. All use
the same BatchTopK selection (see `batch_selecting`), and every level is trained:

    y_l = sum_{i < w_l} (f_i / n_i) w_i + b_dec
    loss = sum over levels l of  mean over rows of |y_l - z|^2  +  aux_loss_coefficient * (auxiliary loss of dead latents)

General features end up in the small dictionaries, since those must do without the others. All levels are decoded in one
pass: level l + 1 adds its own latents to level l, and a latent's gradient sums over the levels that contain it.

With `use_matryoshka_aux_loss` each level has its own auxiliary loss: the dead latents that the level adds predict what the
level leaves over. Without, all dead latents predict what the whole dictionary leaves over.
"""

# L levels, R rows, F d_sae, O d_out

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from sae_core.architectures.batch_selecting import BatchSelectingConfig, BatchSelectingSAE
from sae_core.architectures.parts import DeadLatents, squared_error, times_norms
from sae_core.config import option, require
from sae_core.ops.decode import decode_prefixes
from sae_core.sae import Prepared, SAEConfig, StepContext, StepOutput, training_option

__all__ = ["MatryoshkaBatchTopKConfig", "MatryoshkaBatchTopKSAE"]


@dataclass(frozen=True, kw_only=True)
class MatryoshkaBatchTopKConfig(BatchSelectingConfig):
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
class MatryoshkaBatchTopKSAE(BatchSelectingSAE[MatryoshkaBatchTopKConfig]):
    """Nested BatchTopK dictionaries trained together (arXiv 2503.17547)."""

    architecture: ClassVar[str] = "matryoshka_batchtopk"
    config_class: ClassVar[type[SAEConfig]] = MatryoshkaBatchTopKConfig
    example: ClassVar[Mapping[str, Any]] = {"k": 4, "matryoshka_widths": [16, 32, 64]}

    def objective(self, prepared: Prepared, target: Tensor, context: StepContext) -> StepOutput:
        """Squared error of every level plus auxiliary losses; in train mode the threshold moves."""
        norms, codes, W_dec, dead = self.selected(prepared, context)
        levels = self.config.levels
        y_LRO = decode_prefixes(codes, W_dec, levels)
        inner = [self.with_bias_and_skip(y_RO, prepared) for y_RO in y_LRO.unbind()]
        outputs = [self.to_loss_space(y_RO, prepared) for y_RO in inner]
        losses = {"mse": squared_error(outputs[-1], target)}
        for width, output in zip(levels[:-1], outputs, strict=False):
            losses[f"inner_mse_{width}"] = squared_error(output, target)
        if dead is not None:
            residuals = [self.residual(prepared, target, y_RO) for y_RO in inner]
            losses["auxiliary_reconstruction"] = self._auxiliary_of_levels(prepared, residuals, norms, dead)
        loss = sum(losses.values(), torch.zeros(()))
        return self.with_moved_threshold(StepOutput(loss, losses, times_norms(codes, norms), outputs[-1], target))

    def _auxiliary_of_levels(
        self, prepared: Prepared, residuals: list[Tensor], norms: Tensor | None, dead: DeadLatents
    ) -> Tensor:
        """Dead latents predict what their level, or the whole dictionary, leaves over."""
        if not self.config.use_matryoshka_aux_loss:
            return self.auxiliary(prepared, residuals[-1], dead, norms)
        total = prepared.z.new_zeros(())
        for (start, end), residual in zip(pairwise((0, *self.config.levels)), residuals, strict=True):
            numbers = dead.indices + self.latent_range.start
            added = dead.where((numbers >= start) & (numbers < end))
            if added.total:
                total = total + self.auxiliary(prepared, residual, added, norms)
        return total
