"""Weights files as bags of tensors: safetensors, and what ``torch.save`` writes.

Tensors are memory maps where the file allows it, so nothing is read before it is used and a view costs nothing. Pickles are
read with ``weights_only=True``, which accepts tensors and plain values and runs no code.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, final

from sae_core.errors import FormatError
from sae_core.format.trouble import explained, first_line, trouble
from sae_core.protocols import FileSource

from sae_pretrained.loaders.common.files import place
from sae_pretrained.loaders.common.tensors import TensorBag, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["safetensors_bag", "safetensors_names", "torch_bag", "torch_mapping"]

_MAX_HEADER = 100 * 2**20  # the safetensors library's own limit for the JSON header


def safetensors_bag(
    source: FileSource,
    name: str,
    *,
    sizes: Mapping[str, int] | None = None,
    rows: Sequence[int] | None = None,
    weights: bool = True,
) -> TensorBag:
    """The tensors of a safetensors file. Without `weights` only its header is read, by byte range.

    Each tensor is a private memory map of its own: releasing it releases its memory, and changing it leaves the file alone.
    """
    where = place(source, "", name)
    index, offsets = _safetensors_header(source, name, where)
    if not weights:

        def peek(key: str) -> float:
            import torch

            start, stop = offsets[key]
            with trouble(f"{where}: tensor {key!r}", "reading"):
                data = bytearray(source.read_range(name, start, stop))
                return float(torch.frombuffer(data, dtype=index[key].dtype).item())

        return TensorBag(where, index, sizes=sizes, rows=rows, weights=False, peek=peek)
    path = source.path(name)

    def fetch(key: str) -> Tensor:
        from safetensors import safe_open

        with trouble(where, "reading"), safe_open(path, framework="pt") as file:
            return cast("Tensor", file.get_tensor(key))

    return TensorBag(where, index, fetch, sizes=sizes, rows=rows)


def safetensors_names(source: FileSource, name: str) -> list[str]:
    """Names of the tensors in a safetensors file, from its header alone."""
    return sorted(_safetensors_header(source, name, place(source, "", name))[0])


def _safetensors_header(
    source: FileSource, name: str, where: str
) -> tuple[dict[str, TensorInfo], dict[str, tuple[int, int]]]:
    """Shapes and dtypes, and where in the file the bytes of each tensor lie."""
    import torch

    dtypes = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
    start = source.read_range(name, 0, 8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= _MAX_HEADER:
        raise FormatError(f"{where}: not a safetensors file (its first eight bytes are no header length)")
    try:
        header = cast("dict[str, dict[str, Any]]", json.loads(source.read_range(name, 8, 8 + length)))
        header.pop("__metadata__", None)
        index: dict[str, TensorInfo] = {}
        offsets: dict[str, tuple[int, int]] = {}
        for key, entry in header.items():
            shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
            if not all(type(size) is int and size >= 0 for size in (*shape, start, stop)) or stop < start:
                raise ValueError(f"tensor {key!r} has the shape {shape} at {start} to {stop}")
            index[key] = TensorInfo(shape, dtypes[entry["dtype"]])
            offsets[key] = (8 + length + start, 8 + length + stop)
        return index, offsets
    except KeyError as error:
        raise FormatError(f"{where}: a tensor has the unsupported dtype or field {error}") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{where}: damaged safetensors header: {first_line(error)}") from error


@final
class TorchFile(dict[str, Any]):
    """The dictionary in a file of ``torch.save``. `again` maps the file once more; None where it had to be read whole.

    `check` raises FormatError when the file's own checksums say that it is damaged.
    """

    again: Callable[[], Mapping[str, Any]] | None = None
    check: Callable[[], None] | None = None


def torch_mapping(source: FileSource, name: str, *, skip: int = 0) -> TorchFile:
    """The dictionary in a file of ``torch.save``; tensors are memory maps where the file's age allows it.

    `skip` bytes at the start of the file are not part of it. Only tensors and plain values are accepted: a file that would
    have to run code is refused.
    """
    where, path = place(source, "", name), source.path(name)
    value = _torch_load(path, where, skip)
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in cast("Mapping[Any, Any]", value)):
        raise FormatError(f"{where}: expected a dictionary of tensors, found {type(value).__name__}")
    read = TorchFile(cast("Mapping[str, Any]", value))
    if zipfile.is_zipfile(path):
        read.check = lambda: _check_records(path, where)
        if not skip:
            read.again = lambda: cast("Mapping[str, Any]", _torch_load(path, where, skip))
    return read


def _check_records(path: Path, where: str) -> None:
    """Compare the records of an archive of ``torch.save`` with their checksums, which torch itself does not look at.

    `torch.serialization.set_crc32_options` makes files whose checksums are all none; those say nothing.
    """
    with trouble(where, "reading"), zipfile.ZipFile(path) as archive, path.open("rb") as file:
        wrong: list[str] = []
        records = [info for info in archive.infolist() if info.compress_type == zipfile.ZIP_STORED]
        for info in records:
            file.seek(info.header_offset)
            fixed = file.read(30)
            name_length, extra_length = struct.unpack("<HH", fixed[26:30])
            file.seek(name_length + extra_length, io.SEEK_CUR)
            found, left = 0, info.file_size
            while left and (block := file.read(min(left, 1 << 20))):
                found, left = zlib.crc32(block, found), left - len(block)
            if left or found != info.CRC:
                wrong.append(info.filename)
        if wrong and len(wrong) < len(records):
            raise FormatError(f"{where}: damaged: the CRC-32 of {wrong[0]!r} is not the recorded one")


def _torch_load(path: Path, where: str, skip: int) -> object:
    import torch

    try:
        if skip:
            with path.open("rb") as file:
                file.seek(skip)
                return torch.load(io.BytesIO(file.read()), map_location="cpu", weights_only=True)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        # torch raises many types, OSError among them, for files that are damaged, not its own, or hold more than tensors
        if isinstance(error, OSError) and error.errno is not None:
            raise FormatError(f"{where}: {explained(error)}") from error
        raise FormatError(
            f"{where}: cannot be read as plain tensors, and files that would run code are refused: {first_line(error)}"
        ) from error


def torch_bag(
    mapping: Mapping[str, Any],
    where: str,
    *,
    sizes: Mapping[str, int] | None = None,
    rows: Sequence[int] | None = None,
    weights: bool = True,
) -> TensorBag:
    """The tensors of a dictionary. Raises FormatError when it holds anything else.

    Tensors of a `TorchFile` that can be mapped get a mapping each: releasing one releases its memory.
    """
    import torch

    for key, value in mapping.items():
        if not isinstance(value, torch.Tensor):
            raise FormatError(f"{where}: entry {key!r} is {type(value).__name__}, not a tensor")
    if weights and isinstance(mapping, TorchFile) and mapping.check is not None:
        mapping.check()
    index = {key: TensorInfo(tuple(value.shape), value.dtype) for key, value in mapping.items()}
    again = mapping.again if isinstance(mapping, TorchFile) else None

    def fetch(key: str) -> Tensor:
        return cast("Tensor", (mapping if again is None else again())[key]).detach()

    return TensorBag(where, index, fetch, sizes=sizes, rows=rows, weights=weights)
