"""Ranks that are threads of this process, for tests: the same collectives, without processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, final

import torch
from torch import Tensor

__all__ = ["ThreadRanks", "on_ranks"]

T = TypeVar("T")
R = TypeVar("R")


@final
class ThreadRanks:
    """Rank `rank` of `size`; `board` and `barrier` are shared."""

    def __init__(self, rank: int, size: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, size
        self._board, self._barrier = board, barrier
        self.numbers_received = 0  # that other ranks have sent to this one
        self.calls = 0

    def everyone(self, value: T) -> list[T]:
        self._board[self.rank] = value
        self._barrier.wait(timeout=60)
        found = list(self._board)
        self._barrier.wait(timeout=60)
        self.calls += 1
        return found

    def add(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            parts = self.everyone(tensor.detach().clone())
            total = parts[0].clone()
            for part in parts[1:]:
                total += part
            tensor.data.copy_(total)
            self.numbers_received += tensor.numel()

    def least(self, tensor: Tensor) -> Tensor:
        parts = self.everyone(tensor.clone())
        return tensor.copy_(torch.stack(parts).amin(0))

    def whole(self, part: Tensor, items: int) -> Tensor:
        parts = self.everyone(part.clone())
        self.numbers_received += part.numel() * (self.size - 1)
        return torch.stack(parts, 1).flatten(0, 1)[:items]


def on_ranks(size: int, what: Callable[[ThreadRanks], R]) -> list[R]:
    """What `what` returns on every rank; the first error of any rank is raised."""
    barrier = threading.Barrier(size)
    board: list[Any] = [None] * size
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = what(ThreadRanks(rank, size, board, barrier))
        except BaseException as error:  # noqa: BLE001 - of whatever kind, the test is to see it
            if not isinstance(error, threading.BrokenBarrierError):
                errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
