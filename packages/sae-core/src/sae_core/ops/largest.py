"""Finding the few entries of long rows that matter, in one pass over memory instead of a sort.

`largest` splits a row into short groups and ranks the groups by their maxima. The k groups with the largest maxima contain
the k largest entries: any entry outside them is no larger than its own group's maximum, which k others reach. So a top-k
over the maxima and one over the members of k groups replace one over the row; the maxima of long rows are such a row again.

`above` compares eight entries at a time and looks more closely only where one of them passed.
"""

# R rows, F d_sae, K kept entries a row, G entries of a group, N groups of a row, E entries

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

__all__ = ["above", "first_largest", "largest"]

_GROUP = 8
_MIN_WIDTH = 2048
_MAX_DENSITY = 1 / 32
_PART_ENTRIES = 2**16  # a thread gets no fewer
_OF_NUMPY = (torch.float32, torch.float64)


def largest(x_RF: Tensor, k: int, *, sort: bool = False) -> tuple[Tensor, Tensor]:
    """Values and indices (rows, k) of the k largest entries of every row, in no order unless `sort`; NaN counts as largest.

    >>> values, indices = largest(torch.tensor([[1.0, 3.0, 2.0]]), 2)
    >>> sorted(indices.flatten().tolist())
    [1, 2]
    """
    rows, width = x_RF.shape
    if x_RF.device.type != "cpu" or width < _MIN_WIDTH or k > width * _MAX_DENSITY or rows == 0:
        return torch.topk(x_RF, k, dim=-1) if sort else _first_largest_of_short(x_RF, k)
    groups = width // _GROUP
    grouped = groups * _GROUP  # group n has the members n, n + groups, n + 2 groups, ...: maxima then run along memory
    maxima_RN = x_RF[:, :grouped].unflatten(-1, (_GROUP, groups)).amax(1)
    _, best_RK = largest(maxima_RN, k)
    members = torch.arange(0, grouped, groups, device=x_RF.device)
    candidates = (best_RK.unsqueeze(-1) + members).flatten(1)
    if grouped < width:
        rest = torch.arange(grouped, width, device=x_RF.device).expand(rows, -1)
        candidates = torch.cat([candidates, rest], dim=1)
    found_RM = x_RF.gather(1, candidates)
    values, positions = torch.topk(found_RM, k, dim=-1) if sort else _first_largest_of_short(found_RM, k)
    return values, candidates.gather(1, positions)


def first_largest(x_RF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `largest`; of entries that are equal, the first (on a GPU those that `torch.topk` takes, which are the first too).

    >>> first_largest(torch.tensor([[2.0, 1.0, 3.0, 1.0]]), 3)[1].sort().values.tolist()
    [[0, 1, 2]]
    """
    if x_RF.device.type != "cpu" or k >= x_RF.shape[1] or not k:
        return largest(x_RF, k)
    if x_RF.shape[1] < _MIN_WIDTH and x_RF.dtype in _OF_NUMPY:
        return _first_largest_of_short(x_RF, k)
    value_RM, index_RM = largest(x_RF, k + 1, sort=True)
    value_RK, index_RK = value_RM[:, :k], index_RM[:, :k]
    tied_R = value_RM[:, k - 1] == value_RM[:, k]
    if bool(tied_R.any()):
        rows = tied_R.nonzero().squeeze(1)
        some_RF, last_R1 = x_RF[rows], value_RM[rows, k, None]
        index_RK[rows] = kept_RK = _first_above(some_RF, last_R1, k)
        value_RK[rows] = some_RF.gather(1, kept_RK)
    return value_RK, index_RK


def _first_above(x_RF: Tensor, last_R1: Tensor, k: int) -> Tensor:
    """(rows, k) indices of all that is above the k-th largest of a row, and of the first that are equal to it."""
    better_RF, equal_RF = (x_RF > last_R1) | x_RF.isnan(), x_RF == last_R1
    room_R1 = k - better_RF.sum(1, keepdim=True)
    return (better_RF | (equal_RF & (equal_RF.cumsum(1) <= room_R1))).nonzero()[:, 1].view(-1, k)


def _first_largest_of_short(x_RF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """By numpy on a CPU, which finds the k-th largest of a row with vector instructions, and then all that are no smaller."""
    rows, width = x_RF.shape
    if x_RF.device.type != "cpu" or x_RF.dtype not in _OF_NUMPY or not 0 < k < width or not rows:
        values, indices = torch.topk(x_RF, k, dim=-1, sorted=False)
        return values, indices
    parts = x_RF.detach().split(max(-(-rows // torch.get_num_threads()), -(-_PART_ENTRIES // width)))
    indices = torch.cat(_on_threads(lambda part: _partitioned(part, k), parts))
    return x_RF.gather(1, indices), indices


def _partitioned(x_RF: Tensor, k: int) -> Tensor:
    """(rows, k) indices, those of a row in order, and of equal values the first."""
    import numpy as np

    rows, width = x_RF.shape
    array = x_RF.numpy()
    last_R1 = np.partition(array, width - k, axis=-1)[:, width - k, None].copy()
    positions = np.flatnonzero(array >= last_R1)
    if len(positions) == rows * k:
        positions = positions.reshape(rows, k) - np.arange(0, rows * width, width)[:, None]
        if positions.min() >= 0 and positions.max() < width:  # k in every row
            return torch.from_numpy(positions)  # pyright: ignore[reportUnknownMemberType]
    last = torch.from_numpy(last_R1)  # pyright: ignore[reportUnknownMemberType]
    if bool(last.isnan().any()):
        return torch.topk(x_RF, k, dim=-1, sorted=False).indices
    return _first_above(x_RF, last, k)


def _on_threads(function: Callable[[Tensor], Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    if len(parts) == 1:
        return [function(parts[0])]
    return list(_pool(torch.get_num_threads()).map(function, parts))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="largest")


def above(x_RF: Tensor, threshold: Tensor | float) -> Tensor:
    """(entries,) positions ``row * width + index`` of all entries strictly above `threshold`, a number or (width,), in order.

    >>> above(torch.tensor([[1.0, -3.0], [0.0, 2.0]]), 0.5).tolist()
    [0, 3]
    """
    mask = (x_RF > threshold).view(-1)
    if mask.numel() % 8 or mask.device.type != "cpu":
        return mask.nonzero().squeeze(-1)
    words = mask.view(torch.int64).nonzero().squeeze(-1)
    word, byte = mask.view(-1, 8)[words].nonzero(as_tuple=True)
    return words[word] * 8 + byte
