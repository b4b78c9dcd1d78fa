"""`LocalFiles`: a folder on disk as loaders see it, and safe reading of the small files in it.

Loaders work on a `FileSource`, so the same code reads a local folder and a repository on the Hub.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast, final

from sae_core.errors import FormatError, did_you_mean
from sae_core.format.trouble import first_line, trouble
from sae_core.protocols import FileSource

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LocalFiles", "inside", "join", "parse_json", "read_json", "read_safetensors"]

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
TRAINING_FILE = "training_form.safetensors"


def inside(name: str) -> str:
    """`name` in normal form, or FormatError when it is absolute or climbs out of its folder.

    >>> inside("layer_1/cfg.json")
    'layer_1/cfg.json'
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not name:
        raise FormatError(f"file name {name!r} is not a relative path inside its folder")
    return str(path)


def join(folder: str, name: str) -> str:
    """`name` inside `folder`, either of which may be empty."""
    return inside(f"{folder}/{name}" if folder else name)


@final
class LocalFiles:
    """A local folder. Raises FormatError when there is none at `root`."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        with trouble(self.root, "reading"):
            if not self.root.exists():
                near = did_you_mean(self.root.name, [p.name for p in self.root.parent.glob("*")])
                raise FormatError(f"{self.root}: no such file or folder{near}")

    @property
    def location(self) -> str:
        """The folder's path."""
        return str(self.root)

    def files(self) -> Sequence[str]:
        """Names of all files in the folder and below, sorted."""
        with trouble(self.root, "reading"):
            return sorted(path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        with trouble(self.root / inside(name), "reading"):
            return (self.root / inside(name)).is_file()

    def path(self, name: str) -> Path:
        """The file's path."""
        path = self.root / inside(name)
        with trouble(path, "reading"):
            if path.is_dir():
                raise FormatError(f"{path}: this is a folder, and a file is needed")
            if path.is_file():
                return path
            present = [p.name for p in sorted(path.parent.glob("*"))][:12] if path.parent.is_dir() else []
            near = did_you_mean(path.name, present)
            raise FormatError(f"{path}: no such file{near} (the folder holds: {', '.join(present) or 'nothing'})")

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the file."""
        path = self.path(name)
        with trouble(path, "reading"), path.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)


def read_json(source: FileSource, name: str) -> dict[str, Any]:
    """A JSON object from a file; FormatError names the file when it is not one."""
    path = source.path(name)
    with trouble(path, "reading"):
        text = path.read_text(encoding="utf-8")
    return parse_json(text, path)


def parse_json(text: str, where: str | Path) -> dict[str, Any]:
    """A JSON object from text. Raises FormatError when it is not one, or has a key twice.

    NaN and infinity, which JSON does not have and some writers write, are None: unknown.
    """
    with trouble(where, "reading"):
        data = json.loads(text, parse_constant=lambda _: None, object_pairs_hook=_once_each)
    if not isinstance(data, Mapping):
        raise FormatError(f"{where}: expected a JSON object, found {type(data).__name__}")
    return dict(cast("Mapping[str, Any]", data))


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return found


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, memory-mapped. Raises FormatError for anything else, a pickle in particular.

    Each has a mapping of its own, so that releasing one releases its memory.
    """
    from safetensors import SafetensorError, safe_open

    with trouble(path, "reading"), path.open("rb") as file:
        head = file.read(10)
    # a safetensors file starts with the length of its header, which may look like a pickle's first bytes: 640 is 80 02
    pickled = head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))
    if pickled and head[8:9] != b"{":
        raise FormatError(f"{path}: this is a pickle, not a safetensors file; pickles can run code and are not read")
    with trouble(path, "reading"):
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
            return {name: _one_tensor(path, name) for name in names}
        except SafetensorError as error:
            raise FormatError(f"{path}: damaged or not a safetensors file: {first_line(error)}") from None


def _one_tensor(path: Path, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)
