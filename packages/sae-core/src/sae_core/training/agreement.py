"""Ranks that would train something else than the first one end the run before its first step, and say what differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sae_core.errors import ConfigError
from sae_core.parallel.ranks import Ranks
from sae_core.sae import SAE
from sae_core.training.facts import differences

__all__ = ["check_that_ranks_agree"]


def check_that_ranks_agree(
    ranks: Ranks, facts: Mapping[str, Any], initial: Mapping[str, Any], saes: Sequence[SAE]
) -> None:
    """Raise ConfigError, on every rank alike, where settings, versions, data or weights are not those of the first rank."""
    if ranks.world.size == 1:
        return
    tensors = {
        f"{number}.{name}": tensor
        for number, sae in enumerate(saes)
        for name, tensor in sae.state_dict().items()
        if sae.ranks is None or sae.latent_dimension(name) is None  # others have other latents
    }
    found = ranks.everyone(
        {
            "facts": dict(facts),
            "sae": dict(initial),
            "weights": {name: [list(tensor.shape), _sums(tensor)] for name, tensor in tensors.items()},
        }
    )
    first, *others = found
    lines = [
        f"rank {rank}: {line.replace(' was ', ' is ').replace(', is now ', ' on rank 0 and here ')}"
        for rank, other in enumerate(others, 1)
        for part in ("facts", "sae", "weights")
        for line in differences(first[part], other[part], "" if part == "facts" else part)
    ]
    if lines:
        raise ConfigError(
            "the processes of this run would not train the same: "
            + "; ".join(lines[:5])
            + (f"; and {len(lines) - 5} more differences" if len(lines) > 5 else "")
            + ". Start all of them with one run file, one version of the code and the same data"
        )


def _sums(tensor: Tensor) -> int:
    """A number that another tensor has hardly ever."""
    words = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    words = words[: words.numel() // 4 * 4].view(torch.int32)
    return int(words.sum(dtype=torch.int64)) + 31 * int(words[::7].sum(dtype=torch.int64))
