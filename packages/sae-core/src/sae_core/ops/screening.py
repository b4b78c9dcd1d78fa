"""Which form encoder products take, and what became of their rows.

Whoever computes says how, for all products inside:

    with encoder_products("full"):
        codes = sae.encode_sparse(x)

`auto` leaves it to the hardware: products are screened (`sae_core.ops.screened`) where it multiplies bfloat16 faster than
float32, which is asked and not timed, so that two runs of one seed on one machine take the same path. `screened` does it
wherever that is possible, in float32 that is; the choice is exact in every form.
"""

from __future__ import annotations

import functools
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, final

import torch
from torch import Tensor

__all__ = [
    "ProductForm",
    "Tally",
    "ask",
    "count",
    "encoder_products",
    "is_screened",
    "may_screen",
    "multiplies_bfloat16",
    "tallied",
]

ProductForm = Literal["auto", "full", "screened"]
_MIN_ROWS = 256  # with fewer, making a copy of the weights takes as long as it saves
_MIN_WIDTH = 2048
_MIN_D_IN = 128
_MAX_WANTED = 1 / 64  # of the latents: some three times as many are recomputed, one by one

_form: ContextVar[ProductForm] = ContextVar("form of encoder products", default="auto")
_tally: ContextVar[Tally | None] = ContextVar("what becomes of rows of encoder products", default=None)


@final
@dataclass(slots=True, eq=False)
class Tally:
    """Rows of screened products: how many `rows` there were, of which `full` were computed in full, and their `candidates`.

    `asked` counts products that would have been screened where the hardware is made for it. Counts stay on the device.
    """

    asked: int = 0
    rows: int = 0
    _full: list[Tensor | int] = field(default_factory=list[Tensor | int])
    _candidates: list[Tensor | int] = field(default_factory=list[Tensor | int])

    @property
    def full(self) -> int:
        """Rows that were uncertain, and computed in full; waits for the device."""
        return sum(int(count) for count in self._full)

    @property
    def candidates(self) -> int:
        """Entries that were recomputed; waits for the device."""
        return sum(int(count) for count in self._candidates)

    def share(self, device: torch.device) -> Tensor:
        """The part of the rows that were computed in full, a tensor without dimensions; 0 where none was screened."""
        full = torch.zeros((), device=device)
        for number in self._full:
            full = full + number
        return full / max(self.rows, 1)

    def count(self, rows: int, full: Tensor | int, candidates: Tensor | int) -> None:
        """Account for one product."""
        self.rows += rows
        self._full.append(full)
        self._candidates.append(candidates)


@contextmanager
def encoder_products(form: ProductForm) -> Generator[None]:
    """Encoder products inside take this form, in this thread."""
    token = _form.set(form)
    try:
        yield
    finally:
        _form.reset(token)


@contextmanager
def tallied() -> Generator[Tally]:
    """Counts the rows of the products inside."""
    tally = Tally()
    token = _tally.set(tally)
    try:
        yield tally
    finally:
        _tally.reset(token)


def count(rows: int, full: Tensor | int, candidates: Tensor | int) -> None:
    """Called by every selection from a screened product."""
    tally = _tally.get()
    if tally is not None:
        tally.count(rows, full, candidates)


def ask() -> None:
    """Called by every op whose product may be screened."""
    tally = _tally.get()
    if tally is not None:
        tally.asked += 1


def is_screened(
    *, rows: int, d_sae: int, d_in: int, dtype: torch.dtype, device: torch.device, wanted: float = 0.0
) -> bool:
    """Whether a product of this size is screened, of whose entries `wanted` a row are to be kept.

    >>> with encoder_products("full"):
    ...     is_screened(rows=2048, d_sae=16384, d_in=768, dtype=torch.float32, device=torch.device("cuda"))
    False
    """
    form = _form.get()
    if form == "full" or dtype != torch.float32 or not rows or device.type not in ("cpu", "cuda"):
        return False
    if form == "screened":
        return True
    large = rows >= _MIN_ROWS and d_sae >= _MIN_WIDTH and d_in >= _MIN_D_IN
    return large and wanted <= _MAX_WANTED * d_sae and multiplies_bfloat16(device)


def may_screen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether any product in this precision is screened on this device."""
    return is_screened(rows=2**20, d_sae=2**20, d_in=2**20, dtype=dtype, device=device)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices of bfloat16 faster than of float32: processors with AMX or AVX512-BF16, and GPUs
    from NVIDIA's Ampere on (compute capability 8).
    """
    if device.type == "cuda":
        return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and _processor_multiplies_bfloat16()


@functools.cache
def _processor_multiplies_bfloat16() -> bool:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return "amx_bf16" in flags or "avx512_bf16" in flags
