"""The {{ name }} metric. As rendered it is the mean share that a row's largest latent has of all of them; make it yours.

    E[max_i |f_i| / sum_i |f_i|]        rows without an active latent aside

A metric keeps sums, not rows, so that its number is that of one big batch whatever the batches were.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, final

from sae_core.codes import SparseCodes
from torch import Tensor


@final
class {{ class_name }}:
    """One sentence that `sae-core show {{ name }}` prints."""

    order_independent: ClassVar[bool] = True  # rows in another order give the same number

    def __init__(self) -> None:
        self._sum = 0.0
        self._rows = 0

    def update(self, inputs: Tensor, outputs: Tensor, codes: Any) -> None:
        """Add rows: inputs and outputs are (..., d), codes are SparseCodes or dense latents (..., d_sae)."""
        dense = codes.to_dense() if isinstance(codes, SparseCodes) else codes
        sizes = dense.detach().double().abs().flatten(0, -2)
        sizes = sizes[sizes.sum(-1) > 0]
        if len(sizes):
            self._sum += (sizes.amax(-1) / sizes.sum(-1)).sum().item()
            self._rows += len(sizes)

    def compute(self) -> Mapping[str, float]:
        """Numbers under names that start with the metric's; NaN for what no row was seen."""
        return {"{{ name }}": self._sum / self._rows if self._rows else math.nan}
