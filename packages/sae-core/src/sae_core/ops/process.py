"""What this process and its machine have of memory, as far as the system says."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

__all__ = ["available_memory", "peak_while", "resident_memory", "total_memory"]

_STATUS, _REFS, _MEMORY = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/meminfo")
T = TypeVar("T")


def total_memory() -> int | None:
    """Bytes of the machine's memory, None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on every platform
        return None


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a device, None where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    return _field(_MEMORY, "MemAvailable:")


def resident_memory() -> int | None:
    """Bytes of memory that this process has now, None where the system does not say."""
    return _field(_STATUS, "VmRSS:")


def peak_while(function: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """What a function returns, and how many bytes it took at most beside what there was before, None where nobody says."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        return result, torch.cuda.max_memory_allocated(device) - before
    try:
        _REFS.write_text("5")  # the peak starts anew
    except OSError:
        return function(), None
    before = resident_memory()
    result = function()
    peak = _field(_STATUS, "VmHWM:")
    return result, None if before is None or peak is None else max(peak - before, 0)


def _field(path: Path, name: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith(name)), None)
    return None if found is None else 1024 * int(found.split()[1])
