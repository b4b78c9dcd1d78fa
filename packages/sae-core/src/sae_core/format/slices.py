"""One safetensors file written by several ranks, each of which has some of the latents: the bytes that one process writes.

Nothing is gathered. The first rank writes the header and makes the file as long as it will be, then every rank writes its own
latents where they belong: rows that follow each other, or, of a matrix that files hold transposed, a piece of every row. The
checksum of a tensor comes together from those of the pieces. CRC-32 is linear: a piece contributes its own, moved on by the
bytes that come after it, and contributions are added bit by bit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

from zlib_ng import zlib_ng

from sae_core.errors import FormatError, SaeCoreError
from sae_core.format.stream import header_of, pieces_of_rows
from sae_core.format.trouble import trouble

if TYPE_CHECKING:
    from torch import Tensor

    from sae_core.latent_ranks import LatentRanks

__all__ = ["SharedWriter", "TensorPart", "crc32_moved"]

_NOTHING: Any = None
_POLYNOMIAL = 0xEDB88320  # of CRC-32, its bits reflected
_ONE = 1 << 31


class TensorPart(NamedTuple):
    """What a rank has of a tensor: all of it (`latent` None), or its latents, which that dimension counts."""

    tensor: Tensor
    latent: int | None


@final
class SharedWriter:
    """Files that the first of `ranks` decides about, and all write together.

    The first rank calls `write` for each file, within `leading`; the others `follow` meanwhile.
    """

    def __init__(self, ranks: LatentRanks) -> None:
        self._ranks = ranks

    def write(
        self, path: Path, name: str, parts: Mapping[str, TensorPart], said: Callable[[Mapping[str, str]], str]
    ) -> bytes:
        """Write the file `name` to `path`, and return the header with its length before it; see `stream.write_tensors`."""
        whole = {name: _whole(part, self._ranks.size) for name, part in parts.items()}
        before = header_of(whole, said)
        with path.open("wb") as file:
            file.write(before)
            file.truncate(len(before) + sum(tensor.numel() * tensor.element_size() for tensor in whole.values()))
        sums = self._together((str(path), name, before), parts)
        header = header_of(whole, said, {name: f"{found:08x}" for name, found in sums.items()})
        with path.open("r+b") as file:
            file.write(header)
        return header

    @contextmanager
    def leading(self) -> Generator[None]:
        """What the first rank does; afterwards the others are told that there are no more files, and what went wrong."""
        wrong: str | None = "the first rank was stopped while it saved"
        try:
            yield
            wrong = None
        except SaeCoreError as error:
            wrong = str(error)
            raise
        finally:
            self._ranks.everyone(wrong)

    def follow(self, files: Mapping[str, Callable[[], Mapping[str, TensorPart]]]) -> None:
        """Write what the first rank says, of `files` by name. Raises FormatError when it, or any rank, could not."""
        while isinstance(order := self._ranks.everyone(_NOTHING)[0], tuple):
            with suppress(FormatError):  # which the first rank sees too, and says in the end
                self._part_of(order, files[order[1]]())
        if order is not None:
            raise FormatError(order)

    def _together(self, order: tuple[str, str, bytes], parts: Mapping[str, TensorPart]) -> dict[str, int]:
        self._ranks.everyone(order)
        return self._part_of(order, parts)

    def _part_of(self, order: tuple[str, str, bytes], parts: Mapping[str, TensorPart]) -> dict[str, int]:
        """Write this rank's part; the checksums of all. Raises FormatError on every rank when one could not write."""
        path, _, header = order
        sums, problem = dict.fromkeys(parts, 0), None
        try:
            with trouble(Path(path), "writing"), open(path, "r+b", buffering=0) as file:
                for name, part in parts.items():
                    start = len(header) + json.loads(header[8:])[name]["data_offsets"][0]
                    sums[name] = _write(file.fileno(), start, part, self._ranks)
                os.fsync(file.fileno())
        except SaeCoreError as error:
            problem = f"rank {self._ranks.rank}: {error}"
        found = self._ranks.everyone((problem, sums))
        for problem, _ in found:
            if problem is not None:
                raise FormatError(problem)
        total = dict.fromkeys(parts, 0)
        for _, mine in found:
            for name, contribution in mine.items():
                total[name] ^= contribution
        return total


def crc32_moved(sum: int, by: int) -> int:
    """What a piece with this checksum contributes to that of a whole in which so many bytes come after it.

    >>> crc32_moved(zlib_ng.crc32(b"one"), by=3) ^ zlib_ng.crc32(b"two") == zlib_ng.crc32(b"onetwo")
    True
    """
    return _times(_power(by), sum)


def _whole(part: TensorPart, size: int) -> Tensor:
    """Shape and type of a tensor of which this is a rank's part."""
    import torch

    shape = list(part.tensor.shape)
    if part.latent is not None:
        shape[part.latent] *= size
    return torch.empty(shape, dtype=part.tensor.dtype, device="meta")


def _write(file: int, start: int, part: TensorPart, ranks: LatentRanks) -> int:
    """Write a part of the tensor that begins at `start`, and return what it contributes to the checksum."""
    tensor, latent = part
    if latent is None:  # all ranks have it, one writes it
        return 0 if ranks.rank else _write_pieces(file, start, pieces_of_rows(tensor))
    if latent == 0:
        bytes_here = tensor.numel() * tensor.element_size()
        found = _write_pieces(file, start + ranks.rank * bytes_here, pieces_of_rows(tensor))
        return crc32_moved(found, (ranks.size - 1 - ranks.rank) * bytes_here)
    if latent != 1 or tensor.dim() != 2:
        raise FormatError(f"a tensor of shape {tuple(tensor.shape)} cannot be written latent by latent")
    width = tensor.shape[1] * tensor.element_size()
    start, stride = start + ranks.rank * width, ranks.size * width
    found, factor = 0, _power(stride)
    for piece in pieces_of_rows(tensor):
        for first in range(0, len(piece), width):
            row = piece[first : first + width]
            _write_all(file, row, start)
            found, start = _times(factor, found) ^ zlib_ng.crc32(row), start + stride
    return crc32_moved(found, (ranks.size - 1 - ranks.rank) * width)


def _write_pieces(file: int, start: int, pieces: Iterator[memoryview]) -> int:
    found = 0
    for piece in pieces:
        _write_all(file, piece, start)
        found, start = zlib_ng.crc32(piece, found), start + len(piece)
    return found


def _write_all(file: int, data: memoryview, start: int) -> None:
    while data:
        written = os.pwrite(file, data, start)
        data, start = data[written:], start + written


def _times(a: int, b: int) -> int:
    """The product of two polynomials over the field of two elements, modulo that of CRC-32."""
    product, bit = 0, _ONE
    while a:
        if a & bit:
            product ^= b
            a ^= bit
        bit >>= 1
        b = b >> 1 ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


def _power(bytes_after: int) -> int:
    """x to the number of bits of so many bytes."""
    power, square = _ONE, 1 << 23  # x^0, and x^8
    while bytes_after:
        if bytes_after & 1:
            power = _times(square, power)
        square, bytes_after = _times(square, square), bytes_after >> 1
    return power
