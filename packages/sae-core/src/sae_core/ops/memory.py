"""Large memory that one training step leaves to the next.

On a CPU, fresh memory costs more than filling it: glibc returns every large block to the kernel as soon as it is free, and
the kernel maps and clears every page of the next one on first touch, which for a gradient of 50 MB takes longer than
computing it. While `large_memory_is_kept`, glibc keeps what is freed and hands it out again. Nothing else changes: tensors
belong to those who hold them.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["fresh_copy", "fresh_like", "large_memory_is_kept"]

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX = 128 * 2**10, 65536  # mallopt(3)
_KEEP = 2**31 - 1

_open = 0


@contextmanager
def large_memory_is_kept() -> Generator[None]:
    """Inside, freed memory stays with this process; afterwards it goes back to the system. Does nothing without glibc."""
    global _open
    libc = _glibc()
    if libc is None:
        yield
        return
    _open += 1
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, _KEEP)
    try:
        yield
    finally:
        _open -= 1
        if not _open:
            libc.mallopt(_M_MMAP_MAX, _DEFAULT_MMAP_MAX)
            libc.mallopt(_M_TRIM_THRESHOLD, _DEFAULT_TRIM_THRESHOLD)
            libc.malloc_trim(0)


def fresh_like(tensor: Tensor) -> Tensor:
    """A contiguous tensor of this shape, dtype and device, its values not set, to be filled once.

    On the CPU it is numpy's memory, which asks the kernel for huge pages: a third of the time to fill it is saved.
    """
    import torch

    if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)
    import numpy as np

    return torch.from_numpy(np.empty(tensor.shape, dtype=np.float32))  # pyright: ignore[reportUnknownMemberType]


def fresh_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy of the tensor in memory of its own."""
    return fresh_like(tensor).copy_(tensor)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The C library of this process, where it is glibc's."""
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows knows no library without a name
        return None
    known = all(hasattr(libc, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim"))
    return libc if known else None  # macOS and musl have none of them
