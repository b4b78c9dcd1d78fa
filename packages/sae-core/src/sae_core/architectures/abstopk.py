"""AbsTopK: the k latents that are largest in absolute value stay, with their sign (Zhu et al. 2025, arXiv 2510.00404).

    f = h * n for the k largest of |h * n|, else 0

A latent may point either way, so one direction can hold two opposite concepts instead of two latents holding one each.
Otherwise this is TopK without its ReLU, auxiliary loss included: dead latents, too, compete by absolute value. The rest is in
`selecting`.
"""

# F d_sae

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import Tensor

from sae_core.architectures.selecting import SelectingConfig, SelectingSAE, last_k, require_k
from sae_core.config import Schedule, option, value_at
from sae_core.ops.select import AbsTopK
from sae_core.sae import SAEConfig

__all__ = ["AbsTopKConfig", "AbsTopKSAE"]


@dataclass(frozen=True, kw_only=True)
class AbsTopKConfig(SelectingConfig):
    """Config of `AbsTopKSAE`."""

    k: int | Schedule = option(default=100, help="latents kept in every row; may be a schedule")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_k(self.k, self.d_sae, least=1)


@final
class AbsTopKSAE(SelectingSAE[AbsTopKConfig]):
    """Keeps the k latents of every row that are largest in absolute value, signs included (arXiv 2510.00404)."""

    architecture: ClassVar[str] = "abstopk"
    config_class: ClassVar[type[SAEConfig]] = AbsTopKConfig
    example: ClassVar[Mapping[str, Any]] = {"k": 4}

    def selection(self, progress: float, norms: Tensor | None) -> AbsTopK:
        """The k of every row that are largest in absolute value."""
        return AbsTopK(round(value_at(self.config.k, progress)), norms)

    def activation(self, values: Tensor) -> Tensor:
        """None: signs stay."""
        return values

    def auxiliary_selection(self, k: int, norms: Tensor | None) -> AbsTopK:
        """Dead latents compete by absolute value, too."""
        return AbsTopK(k, norms)

    def final_config(self) -> Any:
        """With the last k."""
        return last_k(self.config)
