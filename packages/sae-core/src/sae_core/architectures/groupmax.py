"""GroupMax: latents stand in k groups of neighbours, and the largest of each group stays (EleutherAI's sparsify, 2025).

    f = relu(h * n) for the largest h * n of each of the k groups, else 0

Like TopK it keeps k latents of every row, but one pass over the pre-activations finds them, and a latent competes only with
the d_sae / k - 1 others of its group, so fewer of them die. The rest is in `selecting`.
"""

# F d_sae

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import Tensor

from sae_core.architectures.selecting import SelectingConfig, SelectingSAE, require_k
from sae_core.config import option, require
from sae_core.ops.select import GroupMax
from sae_core.sae import SAEConfig

__all__ = ["GroupMaxConfig", "GroupMaxSAE"]


@dataclass(frozen=True, kw_only=True)
class GroupMaxConfig(SelectingConfig):
    """Config of `GroupMaxSAE`."""

    k: int = option(default=64, help="number of groups, and so of latents kept in every row; must divide d_sae")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_k(self.k, self.d_sae, least=1)
        require(
            self.d_sae % self.k == 0,
            f"k must divide d_sae = {self.d_sae} into groups of one size, but {self.k} leaves {self.d_sae % self.k} over",
        )


@final
class GroupMaxSAE(SelectingSAE[GroupMaxConfig]):
    """Keeps the largest latent of each of k groups."""

    architecture: ClassVar[str] = "groupmax"
    config_class: ClassVar[type[SAEConfig]] = GroupMaxConfig
    example: ClassVar[Mapping[str, Any]] = {"k": 4}

    def selection(self, progress: float, norms: Tensor | None) -> GroupMax:
        """The largest of every group."""
        return GroupMax(self.config.k, norms)
