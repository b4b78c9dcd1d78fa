"""A safetensors file written from memory as it lies there, with a checksum of every tensor taken on the way.

The safetensors library turns every tensor into bytes of its own before it writes one, and knows the header before the data, so
checksums in the header would cost a pass over all of it first. Here one thread turns transposed tensors and another takes the
checksums while the system takes the bytes, and the header, whose length does not depend on them, is filled in at the end.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from zlib_ng import zlib_ng

from sae_core.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor

    from sae_core.scaled_rows import ScaledRows

__all__ = ["crc32", "header_of", "pieces_of_rows", "write_tensors"]

_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_NO_SUM = "0" * 8
_PIECE_BYTES = 2**22
_SYNC_BYTES = 2**23  # after which the disk starts on what it has, instead of all at the end
_TILE = 64


def crc32(tensor: Tensor) -> str:
    """The CRC-32 of a contiguous tensor's bytes, as eight hexadecimal digits.

    >>> import torch
    >>> crc32(torch.zeros(4, dtype=torch.uint8))
    '2144df1c'
    """
    return f"{zlib_ng.crc32(_buffer(tensor)):08x}"


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    said: Callable[[Mapping[str, str]], str],
    look: Callable[[str, Tensor], None] | None = None,
) -> bytes:
    """Write `tensors`, on the CPU and in any layout, and return the header with its length before it.

    `said` makes what the header says of the file from the checksums by name; its length must not depend on them. `look` sees
    every tensor's name with a few of its rows at a time, and may raise.
    """
    ordered = _ordered(tensors)
    before = header_of(tensors, said)
    sums = dict.fromkeys(tensors, 0)
    pieces = _pieces(ordered)

    def add(name: str, data: memoryview) -> None:
        sums[name] = zlib_ng.crc32(data, sums[name])

    with path.open("wb") as file, ThreadPoolExecutor(4) as beside:
        file.write(before)
        synced = beside.submit(os.fsync, file.fileno())
        since = 0
        coming = beside.submit(next, pieces, None)
        while (piece := coming.result()) is not None:
            coming = beside.submit(next, pieces, None)
            name, rows = piece
            data = memoryview(_buffer(rows))
            summed = beside.submit(add, name, data)
            seen = beside.submit(look, name, rows) if look is not None else None
            since += file.write(data)
            if since >= _SYNC_BYTES and synced.done():
                synced.result()
                synced, since = beside.submit(os.fsync, file.fileno()), 0
            summed.result()
            if seen is not None:
                seen.result()
        synced.result()  # a disk's error is told once, to whoever synced first
        header = header_of(tensors, said, {name: f"{found:08x}" for name, found in sums.items()})
        if len(header) != len(before):
            raise FormatError(f"{path}: not written: the header's length depends on the checksums in it")
        file.seek(0)
        file.write(header)
    return header


def header_of(
    tensors: Mapping[str, Tensor], said: Callable[[Mapping[str, str]], str], sums: Mapping[str, str] | None = None
) -> bytes:
    """The header, with its length before it, of a file with tensors of these shapes and types; None: sums are not known yet."""
    return _header(_ordered(tensors), said(dict.fromkeys(tensors, _NO_SUM) if sums is None else sums))


def pieces_of_rows(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor on the CPU in any layout, a few megabytes of whole rows (dimension 0) at a time.

    A piece is valid until the one after the next is asked for.
    """
    for rows in _blocks_of_rows(tensor):
        yield memoryview(_buffer(rows))


def _ordered(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    return sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # so that all are aligned


def _pieces(ordered: list[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """All tensors with their names, a few megabytes of contiguous rows at a time; valid as long as `pieces_of_rows` says."""
    return ((name, rows) for name, tensor in ordered for rows in _blocks_of_rows(tensor))


def _blocks_of_rows(tensor: Tensor) -> Iterator[Tensor]:
    from sae_core.scaled_rows import ScaledRows

    if isinstance(tensor, ScaledRows):
        return _scaled_blocks(tensor)
    if tensor.dim() == 2 and not tensor.is_contiguous():
        return _turned_blocks(tensor)
    if tensor.dim() == 0 or not len(tensor):
        return iter([tensor.reshape(-1)])
    return iter(tensor.contiguous().split(_rows_of_a_piece(tensor)))


def _rows_of_a_piece(tensor: Tensor) -> int:
    return max(1, min(len(tensor), _PIECE_BYTES // max(tensor.shape[1:].numel() * tensor.element_size(), 1)))


def _scaled_blocks(tensor: ScaledRows) -> Iterator[Tensor]:
    """Rows of a matrix that is scaled as it is written, in tiles that fit the cache."""
    import torch

    if tensor.turned:
        yield from _turned_blocks(tensor.rows.t(), tensor)
        return
    rows = _rows_of_a_piece(tensor)
    rooms = torch.empty((2, rows, tensor.shape[1]), dtype=tensor.dtype)
    for number, (block, numbers) in enumerate(zip(tensor.rows.split(rows), tensor.numbers.split(rows), strict=True)):
        made = rooms[number % 2, : len(block)]
        scales = numbers[:, None].split(_TILE)
        for room, tile, scale in zip(made.split(_TILE), block.split(_TILE), scales, strict=True):
            tensor.operation(tile, scale, out=room)
        yield made


def _turned_blocks(tensor: Tensor, scaled: ScaledRows | None = None) -> Iterator[Tensor]:
    """Rows of a transposed matrix, turned in tiles that fit the cache: twice as fast as all at once.

    With `scaled` columns are scaled as its rows are to be.
    """
    import torch

    rows, width = _rows_of_a_piece(tensor), 8 * _TILE
    rooms = torch.empty((2, rows, tensor.shape[1]), dtype=tensor.dtype)
    scales = [None] * -(-tensor.shape[1] // width) if scaled is None else scaled.numbers.split(width)
    for number, block in enumerate(tensor.detach().split(rows)):
        made = rooms[number % 2, : len(block)]
        for high in range(0, len(block), _TILE):
            into, of = made[high : high + _TILE].split(width, dim=1), block[high : high + _TILE].split(width, dim=1)
            for room, tile, scale in zip(into, of, scales, strict=True):
                room.copy_(tile)
                if scaled is not None:
                    scaled.operation(room, scale, out=room)
        yield made


def _header(ordered: list[tuple[str, Tensor]], said: str) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"sae_core": said}}
    position = 0
    for name, tensor in ordered:
        size = tensor.numel() * tensor.element_size()
        dtype = _DTYPES.get(str(tensor.dtype).removeprefix("torch."))
        if dtype is None:
            raise FormatError(f"tensor {name!r} has dtype {tensor.dtype}, which safetensors files do not have")
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes(tensor: Tensor) -> Tensor:
    import torch

    return tensor.detach().reshape(-1).view(torch.uint8)


def _buffer(tensor: Tensor) -> Any:
    """The bytes of a contiguous tensor, as files and checksums take them."""
    return cast("Any", _bytes(tensor).numpy())
