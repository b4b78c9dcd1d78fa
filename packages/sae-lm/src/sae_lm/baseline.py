"""A random dictionary, made as good as it can be, to hold a trained one against.

It has as many latents as the trained dictionary, of random directions that were never trained, and as many of them are
active on average: a latent fires where the centred activation's product with its direction is above one threshold, which is
chosen for that. Its output is the data's mean plus the active latents' share, scaled by the one factor that leaves the least
squared error. What such a dictionary recovers, nothing was learnt for.
"""

# K rows, D input width, O output width, F d_sae

from __future__ import annotations

from typing import final

import torch
from sae_core.codes import SparseCodes
from sae_core.config import require
from torch import Tensor

__all__ = ["RandomDictionary"]

_ENTRIES_AT_ONCE = 1 << 24


@final
class RandomDictionary:
    """Maps activations (rows, d_in) to reconstructions (rows, d_out) and codes, as a trained dictionary does.

    `inputs` (rows, d_in) and `targets` (rows, d_out) are the activations it is fitted to; `in_place` says that they are the
    same, and the encoder is then the decoder's transpose. `l0` is the average number of active latents to reach.
    """

    def __init__(
        self, inputs: Tensor, targets: Tensor, d_sae: int, l0: float, *, in_place: bool = True, seed: int = 0
    ) -> None:
        require(0 <= l0 <= d_sae, f"random dictionary: an L0 of {l0:g} is beyond its {d_sae} latents")
        generator = torch.Generator().manual_seed(seed)
        inputs, targets = inputs.float(), targets.float()

        def directions(width: int) -> Tensor:
            drawn = torch.randn(d_sae, width, generator=generator)
            return torch.nn.functional.normalize(drawn, dim=1).to(inputs.device)

        self._encoder = directions(inputs.shape[1])
        self._decoder = self._encoder if in_place else directions(targets.shape[1])
        self._mean_in, self._mean_out = inputs.mean(0), targets.mean(0)
        self._scale = 1.0
        self.d_sae = d_sae
        rows = max(1, min(len(inputs), _ENTRIES_AT_ONCE // d_sae))
        products = ((inputs[:rows] - self._mean_in) @ self._encoder.T).flatten()
        active = min(max(round(l0 * rows), 0), len(products))
        self.threshold = float("inf") if active == 0 else float(products.topk(active).values[-1])
        self.threshold = max(self.threshold, 0.0)
        y, _ = self(inputs[:rows])
        share, wanted = (y - self._mean_out).double(), (targets[:rows] - self._mean_out).double()
        square = share.square().sum()
        self._scale = float((share * wanted).sum() / square) if square > 0 else 0.0

    def __call__(self, x: Tensor, /) -> tuple[Tensor, SparseCodes]:
        """Reconstructions and codes of rows (…, d_in)."""
        rows = x.reshape(-1, x.shape[-1]).float()
        parts: list[Tensor] = []
        codes: list[SparseCodes] = []
        for block in rows.split(max(1, _ENTRIES_AT_ONCE // self.d_sae)):
            products = (block - self._mean_in) @ self._encoder.T
            latents = torch.where(products >= self.threshold, products, 0.0).relu_() * self._scale
            parts.append(latents @ self._decoder + self._mean_out)
            codes.append(SparseCodes.from_dense(latents))
        shape = tuple(x.shape[:-1])
        return torch.cat(parts).view(*shape, -1), _joined(codes).reshape(*shape)


def _joined(codes: list[SparseCodes]) -> SparseCodes:
    """Rows of several codes, one after the other."""
    counts = torch.cat([part.row_offsets().diff() for part in codes])
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    values, indices = torch.cat([part.values for part in codes]), torch.cat([part.indices for part in codes])
    return SparseCodes(values, indices, (len(counts),), codes[0].d_sae, offsets)
