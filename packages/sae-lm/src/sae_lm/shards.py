"""Small things that writers of large outputs share: hashes, JSON written atomically, a word on sizes, upload."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from sae_core.errors import ConfigError, DataError, FormatError
from sae_core.format.write import write_atomically

__all__ = ["check_hash", "check_space", "differences", "file_hash", "read_record", "size", "upload", "write_record"]


def file_hash(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_hash(path: Path, expected: str, remedy: str) -> None:
    """Raise FormatError, naming the file, unless it is there with the hash that was written down."""
    if not path.is_file():
        raise FormatError(f"{path}: this file is missing; {remedy}")
    if file_hash(path) != expected:
        raise FormatError(f"{path}: damaged: its SHA-256 is not the one that was written down; {remedy}")


def read_record(path: Path, what: str, version: int) -> dict[str, Any]:
    """The JSON object in `path`. Raises FormatError where it is none, or of a version that is not known."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{path.parent}: no {what}: {path.name} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise FormatError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(data, dict) or cast("dict[str, Any]", data).get("format") != version:
        raise FormatError(f"{path}: not a {what} of format {version}, which is the one this version reads")
    return cast("dict[str, Any]", data)


def write_record(path: Path, data: Mapping[str, Any]) -> None:
    """Write `data` as JSON, atomically."""
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: cast("None", temporary.write_text(text, encoding="utf-8")))


def differences(found: Any, wanted: Any, path: str = "") -> list[str]:
    """Where two JSON values differ, each as ``key: found, not wanted``.

    >>> differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
    ['b.c: 2, not 3']
    """
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        ours, theirs = cast("Mapping[str, Any]", found), cast("Mapping[str, Any]", wanted)
        return [
            line
            for key in dict.fromkeys([*ours, *theirs])
            for line in differences(ours.get(key), theirs.get(key), f"{path}.{key}" if path else str(key))
        ]
    return [] if found == wanted else [f"{path}: {found!r}, not {wanted!r}"]


def size(count: float) -> str:
    """A number of bytes for people.

    >>> size(512), size(23_400_000), size(1.5e12)
    ('512 B', '23.4 MB', '1.50 TB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def check_space(folder: Path, needed: float) -> None:
    """Raise ConfigError when the disk of `folder` has less than `needed` bytes free."""
    at = next(each for each in [folder, *folder.absolute().parents] if each.exists())
    free = shutil.disk_usage(at).free
    if needed > free:
        raise ConfigError(
            f"{folder}: {size(needed)} are needed, and {size(free)} are free there; take fewer rows or another disk"
        )


def upload(folder: Path, repository: str, *, private: bool) -> str:
    """Put a folder into a data set repository of the Hub, which is made if need be; the address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    hub = HfApi()
    try:
        hub.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        return str(hub.upload_folder(repo_id=repository, repo_type="dataset", folder_path=folder))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise DataError(
            f"hub: {folder} cannot be uploaded to {repository!r}: {error}; it is complete, and the command can be repeated"
        ) from error
