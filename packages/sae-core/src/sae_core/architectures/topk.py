"""TopK: of all latents, the k with the largest pre-activations stay (Gao et al. 2024, arXiv 2406.04093).

    f = relu(h * n) for the k largest of h * n, else 0

How latents are ranked and reported, decoded, and kept alive is in `selecting`. With ``apply_relu: false`` selected latents
keep their value where it is below zero, as in circuit-tracer's TopK transcoders.
"""

# F d_sae

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from sae_core.architectures.selecting import SelectingConfig, SelectingSAE, last_k, require_k
from sae_core.config import Schedule, option, value_at
from sae_core.ops.select import TopK
from sae_core.sae import SAEConfig

__all__ = ["TopKConfig", "TopKSAE"]


@dataclass(frozen=True, kw_only=True)
class TopKConfig(SelectingConfig):
    """Config of `TopKSAE`."""

    k: int | Schedule = option(default=100, help="latents kept in every row; may be a schedule")
    apply_relu: bool = option(
        default=True, help="selected latents below zero become zero; false keeps them", omit_default=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_k(self.k, self.d_sae, least=1)


@final
class TopKSAE(SelectingSAE[TopKConfig]):
    """Keeps the k largest latents of every row (arXiv 2406.04093)."""

    architecture: ClassVar[str] = "topk"
    config_class: ClassVar[type[SAEConfig]] = TopKConfig
    example: ClassVar[Mapping[str, Any]] = {"k": 4}

    def selection(self, progress: float, norms: Tensor | None) -> TopK:
        """The k largest of every row."""
        return TopK(round(value_at(self.config.k, progress)), norms)

    def activation(self, values: Tensor) -> Tensor:
        """ReLU, unless the config says otherwise."""
        return torch.relu(values) if self.config.apply_relu else values

    def final_config(self) -> Any:
        """With the last k."""
        return last_k(self.config)
