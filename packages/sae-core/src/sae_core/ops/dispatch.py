"""Dense or sparse: which form of a step is cheaper, from numbers known before it starts.

The choice is a fixed function of width, density and device, from crossovers measured by ``benchmarks/crossover.py``; it is
not timed at run time, so that two runs of one seed take the same path and give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_core.codes import SparseCodes

__all__ = ["entries_pay", "entries_pay_in", "prefer_sparse"]

_CROSSOVER = 0.12  # with this density both forms of a step take as long on a CPU, where rows are wide
_ENTRY = 64  # what sorting an entry and looking it up costs, in columns of a row
_CPU_DENSITY = 0.07  # lower, as latents close to a threshold are entries too but are not counted as active
_MIN_WIDTH = 512


def prefer_sparse(*, d_sae: int, density: float | None, device: torch.device) -> bool:
    """Whether codes with this fraction of active latents (None: not known yet) should be held as entries.

    This is for latents above a threshold, of which a row may have any number. On a GPU they stay dense: how long their list
    is would have to be read back, and every step would wait for that. A top-k does not ask; it gives k entries a row
    everywhere.

    >>> prefer_sparse(d_sae=16384, density=0.01, device=torch.device("cpu"))
    True
    >>> prefer_sparse(d_sae=16384, density=None, device=torch.device("cpu"))
    False
    """
    if density is None or d_sae < _MIN_WIDTH:
        return False
    return device.type == "cpu" and density <= _CPU_DENSITY


def entries_pay(*, entries: int, rows: int, d_sae: int, width: int, device: torch.device) -> bool:
    """Whether to go through codes entry by entry; else a matrix product with their zeros written out is cheaper.

    An entry costs something besides the `width` of the rows that are summed; narrow dictionaries multiply sooner.

    >>> entries_pay(entries=32, rows=1, d_sae=16384, width=768, device=torch.device("cpu"))
    True
    >>> entries_pay(entries=16, rows=1, d_sae=256, width=64, device=torch.device("cpu"))
    False
    """
    return device.type != "cpu" or entries <= _CROSSOVER * width / (width + _ENTRY) * rows * d_sae


def entries_pay_in(codes: SparseCodes, weights: Tensor) -> bool:
    """`entries_pay` of these codes, whose latents have the rows of `weights` (d_sae, width)."""
    entries, rows = codes.values.numel(), codes.rows
    return entries_pay(entries=entries, rows=rows, d_sae=codes.d_sae, width=weights.shape[1], device=codes.device)
