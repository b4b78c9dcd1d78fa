"""NumPy archives as bags of tensors, without pickle: a zip file whose members are arrays with a header each.

Members of archives that are not compressed, as ``numpy.savez`` writes them, lie in the file as they are and are memory-mapped.
For the same reason the headers of all of them can be read by byte range, a few hundred bytes of a file of gigabytes.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sae_core.errors import FormatError
from sae_core.format.trouble import trouble
from sae_core.protocols import FileSource

from sae_pretrained.loaders.common.files import place
from sae_pretrained.loaders.common.tensors import TensorBag, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["npz_bag"]

_FIXED_ZIP_FIELDS = 30  # fixed part of a local file header in a zip archive


def npz_bag(
    source: FileSource,
    name: str,
    *,
    sizes: Mapping[str, int] | None = None,
    rows: Sequence[int] | None = None,
    weights: bool = True,
) -> TensorBag:
    """The arrays of a NumPy archive: memory maps where it is not compressed, and never unpickled.

    Without `weights` only the headers of the members are read, by byte range, if the archive allows that.
    """
    where = place(source, "", name)
    if not weights and (index := _npz_headers(source, name)) is not None:
        return TensorBag(where, index, sizes=sizes, rows=rows, weights=False)
    path = source.path(name)
    with trouble(where, "reading"), zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise FormatError(f"{where}: an array is in it twice")
        index = {key: _npy_member(archive, info)[0] for key, info in members.items()}
    return TensorBag(
        where, index, lambda key: _npz_array(path, members[key], where), sizes=sizes, rows=rows, weights=weights
    )


def _npz_array(path: Path, info: zipfile.ZipInfo, where: str) -> Tensor:
    import numpy as np
    import torch

    with trouble(f"{where}: array {info.filename!r}", "reading"):
        with zipfile.ZipFile(path) as archive:
            shaped, dtype, header = _npy_member(archive, info)
            if info.compress_type != zipfile.ZIP_STORED:
                with archive.open(info) as member:
                    array = cast("Any", np.lib.format.read_array(member, allow_pickle=False))
                    member.read()  # to the end, where the checksum is compared
                return torch.from_numpy(np.ascontiguousarray(array))
        with path.open("rb") as file:
            file.seek(info.header_offset)
            start = info.header_offset + _local_header_length(file.read(_FIXED_ZIP_FIELDS))
        # mode "c": changes stay private to this process, and torch wants an array it may write to
        stored = np.memmap(path, dtype=np.uint8, mode="c", offset=start, shape=(info.file_size,))
        if zlib.crc32(cast("Any", stored)) != info.CRC:
            raise FormatError(f"{where}: array {info.filename!r} is damaged: its CRC-32 is not the recorded one")
        size = dtype.itemsize * math.prod(shaped.shape)
        if size != info.file_size - header:
            raise FormatError(
                f"{where}: array {info.filename!r} holds {info.file_size - header} bytes, its shape needs {size}"
            )
        array = np.memmap(path, dtype=dtype, mode="c", offset=start + header, shape=(math.prod(shaped.shape),))
        return torch.from_numpy(array).reshape(shaped.shape)


def _npy_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[TensorInfo, Any, int]:
    """What a member of an archive holds: shape and dtype, the NumPy dtype, and the length of its header."""
    with archive.open(info) as member:
        return _npy_header(member, info.filename)


def _npy_header(member: Any, name: str) -> tuple[TensorInfo, Any, int]:
    import numpy as np
    import torch

    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(member)
    if dtype.hasobject:
        raise ValueError(f"array {name!r} holds Python objects, which are never unpickled")
    if fortran and len(shape) > 1:
        raise ValueError(f"array {name!r} is stored in Fortran order")
    if any(size < 0 for size in shape):
        raise ValueError(f"array {name!r} has the shape {shape}")
    if not dtype.isnative or dtype.kind not in "fiu":
        raise ValueError(f"array {name!r} has the unsupported dtype {dtype}")
    return TensorInfo(tuple(shape), torch.from_numpy(np.empty(0, dtype)).dtype), dtype, member.tell()


def _npz_headers(source: FileSource, name: str) -> dict[str, TensorInfo] | None:
    """Walk the members of an uncompressed archive from its start; None where that cannot be done."""
    index: dict[str, TensorInfo] = {}
    position = 0
    while True:
        fixed = source.read_range(name, position, position + _FIXED_ZIP_FIELDS)
        if fixed[:4] != b"PK\x03\x04":
            return index or None
        flags, method = struct.unpack("<HH", fixed[6:10])
        length = _local_header_length(fixed)
        rest = source.read_range(name, position + _FIXED_ZIP_FIELDS, position + length + 512)
        name_length, extra_length = struct.unpack("<HH", fixed[26:30])
        member = rest[:name_length].decode("utf-8", "replace")
        size = _stored_size(fixed, rest[name_length : name_length + extra_length])
        if flags & 0x8 or method != zipfile.ZIP_STORED or size is None:
            return None
        try:
            index[member.removesuffix(".npy")] = _npy_header(io.BytesIO(rest[name_length + extra_length :]), member)[0]
        except Exception:  # noqa: BLE001 - whatever is wrong here is said when the whole file is read
            return None
        position += length + size


def _local_header_length(fixed: bytes) -> int:
    name_length, extra_length = struct.unpack("<HH", fixed[26:30])
    return _FIXED_ZIP_FIELDS + name_length + extra_length


def _stored_size(fixed: bytes, extra: bytes) -> int | None:
    size = struct.unpack("<I", fixed[18:22])[0]
    if size != 0xFFFFFFFF:
        return size
    position = 0
    while position + 4 <= len(extra):  # zip64: the sizes are in the extra field with id 1, uncompressed first
        kind, length = struct.unpack("<HH", extra[position : position + 4])
        if kind == 1 and length >= 16:
            return struct.unpack("<Q", extra[position + 12 : position + 20])[0]
        position += 4 + length
    return None
