"""Files that survive a crash: what it takes beside writing, namely temporary names and syncing."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["sync_file", "sync_folder", "umask", "unique_folder"]


def sync_file(path: Path) -> None:
    """Wait until the file's content is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the names in the folder, after a rename in particular, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unique_folder(path: Path) -> Path:
    """A new hidden folder beside `path` to be filled and renamed to it, with the permissions that `mkdir` gives."""
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}."[:200], suffix=".tmp", dir=path.parent))
    folder.chmod(0o777 & ~umask())
    return folder


def umask() -> int:
    """The permissions that this process does not give to new files and folders."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
