"""The {{ name }} source. As rendered it gives sums of random directions; make it give your activations.

A source says the widths of its columns, gives batches from the beginning each time it is asked, and owns its randomness. An
iterator with `state_dict` and `load_state_dict` lets a run that was killed go on exactly where it was.
"""

# R rows, D width, N directions

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from sae_core.config import option, require
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class {{ config_name }}:
    """Config of `{{ class_name }}`."""

    d_in: int = option(default=16, help="width of the activations")
    directions: int = option(default=64, help="number of directions that are added up")
    seed: int = option(default=0, help="seed of directions and amounts")

    def __post_init__(self) -> None:
        require(self.d_in > 0, f"d_in must be positive, not {self.d_in}")
        require(self.directions > 0, f"directions must be positive, not {self.directions}")


@final
class {{ class_name }}:
    """One sentence that `sae-core show {{ name }}` prints."""

    config_class: ClassVar[type] = {{ config_name }}

    def __init__(self, config: {{ config_name }}) -> None:
        self.config = config
        drawn = torch.Generator().manual_seed(config.seed)
        self._directions_ND = torch.randn(config.directions, config.d_in, generator=drawn)

    @property
    def sites(self) -> Mapping[str, int]:
        """Names and widths of the columns; one place needs no name."""
        return {"": self.config.d_in}

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Batches (batch_size, d_in) without an end."""
        return _Batches(self._directions_ND, batch_size, self.config.seed)

    def metadata(self) -> Mapping[str, Any]:
        """Facts that are kept with the SAE, plain data."""
        return {"dataset_path": "{{ name }}"}


@final
class _Batches(Iterator[Tensor]):
    """One row of batches, with a position of its own."""

    def __init__(self, directions_ND: Tensor, batch_size: int, seed: int) -> None:
        self._directions_ND, self._batch_size = directions_ND, batch_size
        self._drawn = torch.Generator().manual_seed(seed)

    def __next__(self) -> Tensor:
        active_RN = torch.rand(self._batch_size, len(self._directions_ND), generator=self._drawn) < 0.05
        amounts_RN = 1 + torch.rand(active_RN.shape, generator=self._drawn)
        return (active_RN * amounts_RN) @ self._directions_ND

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch comes from: tensors and JSON values."""
        return {"generator": self._drawn.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved position."""
        self._drawn.set_state(state["generator"])
