"""A safetensors file written from memory as it lies there, with a checksum of every tensor taken on the way.

The safetensors library turns every tensor into bytes of its own before it writes one, and knows the header before the data, so
checksums in the header would cost a pass over all of it first. Here a second thread turns transposed tensors and takes the
checksums while the system takes the bytes, and the header, whose length does not depend on them, is filled in at the end.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sae_core.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["crc32", "write_tensors"]

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


def crc32(tensor: Tensor) -> str:
    """The CRC-32 of a contiguous tensor's bytes, as eight hexadecimal digits.

    >>> import torch
    >>> crc32(torch.zeros(4, dtype=torch.uint8))
    '2144df1c'
    """
    return f"{zlib.crc32(_bytes(tensor)):08x}"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], said: Callable[[Mapping[str, str]], str]) -> bytes:
    """Write `tensors`, on the CPU and in any layout, and return the header with its length before it.

    `said` makes what the header says of the file from the checksums by name; its length must not depend on them.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # so that all are aligned
    before = _header(ordered, said(dict.fromkeys(tensors, _NO_SUM)))
    with path.open("wb") as file, ThreadPoolExecutor(1) as beside:
        in_order = {name: beside.submit(tensor.contiguous) for name, tensor in ordered}
        sums = {name: beside.submit(lambda made: crc32(made.result()), made) for name, made in in_order.items()}
        file.write(before)
        for made in in_order.values():
            file.write(_bytes(made.result()))
        header = _header(ordered, said({name: found.result() for name, found in sums.items()}))
        if len(header) != len(before):
            raise FormatError(f"{path}: not written: the header's length depends on the checksums in it")
        file.seek(0)
        file.write(header)
    return header


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


def _bytes(tensor: Tensor) -> Any:
    import torch

    return cast("Any", tensor.detach().reshape(-1).view(torch.uint8).numpy())
