"""Sites: named slices of the columns of one (rows, width) tensor.

What a dictionary reads and writes is always one tensor. An ordinary SAE reads and writes one site; a crosscoder reads and
writes several, laid side by side; a transcoder writes others than it reads. So nothing but column slices tells these apart,
and every sparsifier works for all of them.
"""

# F d_sae, W width

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, final

import torch
from torch import Tensor

from sae_core.config import require

__all__ = ["NormKind", "Sites"]

NormKind = Literal["sum_of_sites", "joint"]


@final
@dataclass(frozen=True, slots=True)
class Sites:
    """Widths of sites by name, in the order of their columns. Raises ConfigError for none, or a width that is not positive.

    >>> sites = Sites({"blocks.3": 2, "blocks.9": 3})
    >>> sites.total, sites.slices()["blocks.9"]
    (5, slice(2, 5, None))
    """

    widths: Mapping[str, int]

    def __post_init__(self) -> None:
        require(bool(self.widths), "sites: there must be at least one")
        for name, width in self.widths.items():
            require(width > 0, f"sites: width of {name!r} must be positive, not {width}")

    @classmethod
    def of(cls, widths: Mapping[str, int], total: int, what: str) -> Sites:
        """Sites that add up to `total`; without any, one unnamed site. Raises ConfigError when they add up to something else.

        >>> Sites.of({}, 8, "reads").widths
        {'': 8}
        """
        found = sum(widths.values())
        require(not widths or found == total, f"{what}: widths {dict(widths)} add up to {found}, not to {total}")
        return cls(dict(widths) or {"": total})

    @property
    def total(self) -> int:
        """Width of all sites together."""
        return sum(self.widths.values())

    @property
    def sizes(self) -> list[int]:
        """Widths in order, as ``tensor.split`` takes them."""
        return list(self.widths.values())

    def slices(self) -> dict[str, slice]:
        """The columns of each site."""
        ends = accumulate(self.sizes, initial=0)
        return {name: slice(start, end) for name, (start, end) in zip(self.widths, pairwise(ends), strict=True)}

    def per_site_norms(self, W_FW: Tensor) -> Tensor:
        """(sites, d_sae) Euclidean norms of the rows of `W_FW` (d_sae, width) within each site."""
        return torch.stack([part.norm(dim=-1) for part in W_FW.split(self.sizes, dim=-1)])

    def norms(self, W_FW: Tensor, kind: NormKind = "sum_of_sites") -> Tensor:
        """(d_sae,) norms of the rows of `W_FW` (d_sae, width): of each site, summed (Lindsey et al. 2024), or of all at once.

        >>> W = torch.tensor([[3.0, 4.0, 0.0, 12.0]])
        >>> Sites({"a": 2, "b": 2}).norms(W).item(), Sites({"a": 2, "b": 2}).norms(W, "joint").item()
        (17.0, 13.0)
        """
        if kind == "joint" or len(self.widths) == 1:
            return W_FW.norm(dim=-1)
        return self.per_site_norms(W_FW).sum(0)
