"""What can go wrong with a file, said once and in one voice.

Reading and writing raise what the system, safetensors, json, zip, yaml, numpy and torch feel like: a full disk is an OSError
with a number, a damaged archive one of a dozen types. `trouble` turns all of it into `FormatError` with the file, what was
being done, what is wrong, and what to do.
"""

from __future__ import annotations

import errno
import json
import os
import zipfile
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from sae_core.errors import FormatError, SaeCoreError

__all__ = ["explained", "first_line", "trouble"]

_SYSTEM: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", "free some space, or choose another place"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or choose another place"),
    errno.EFBIG: ("the file would be larger than this file system allows", "choose another place"),
    errno.EACCES: ("permission denied", "check the owner and the mode of file and folder"),
    errno.EPERM: ("permission denied", "check the owner and the mode of file and folder"),
    errno.EROFS: ("the file system is read-only", "choose another place"),
    errno.ENAMETOOLONG: ("the name is too long for this file system", "choose a shorter one"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "choose another path"),
    errno.EISDIR: ("this is a folder, and a file is needed", "choose another path"),
    errno.EEXIST: ("something of this name is there already, or a file where a folder must be", "choose another path"),
    errno.ENOENT: ("no such file or folder", "check the path"),
    errno.ELOOP: ("links that lead in a circle", "check the path"),
    errno.EMFILE: ("too many files are open in this process", "close some, or raise the limit (ulimit -n)"),
    errno.ENFILE: ("too many files are open on this machine", "close some"),
    errno.EIO: ("the device reports an error", "check the disk, or copy the file from its origin again"),
    errno.ESTALE: ("the file was replaced on its server", "try again"),
    errno.EINVAL: ("the system does not accept this path", "choose another path"),
    errno.ENXIO: ("this is no ordinary file", "choose another path"),
    errno.ENODEV: ("this is no ordinary file", "choose another path"),
}
_READING = "the file is damaged, or not of this format; copy it from its origin again"
_WRITING = "nothing was replaced"


@contextmanager
def trouble(path: str | Path, doing: Literal["reading", "writing"]) -> Generator[None]:
    """Raise FormatError about `path` in place of what reading or writing it raises; errors of this project pass.

    >>> from pathlib import Path
    >>> with trouble("sae/cfg.json", "reading"):
    ...     _ = Path("/dev/null/cfg.json").read_text()
    Traceback (most recent call last):
    sae_core.errors.FormatError: sae/cfg.json: cannot be read: a part of the path is a file, not a folder; choose another path
    """
    try:
        yield
    except SaeCoreError:
        raise
    except Exception as error:
        raise FormatError(f"{path}: {explained(error, doing)}") from error


def explained(error: BaseException, doing: Literal["reading", "writing"] = "reading") -> str:
    """What is wrong, and what to do, in one line."""
    verb = "read" if doing == "reading" else "written"
    number = error.errno if isinstance(error, OSError) else _errno_in(str(error))
    if number in _SYSTEM:
        what, advice = _SYSTEM[number]
        return f"cannot be {verb}: {what}; {advice}"
    if isinstance(error, OSError):
        return f"cannot be {verb}: {error.strerror or first_line(error)}"
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error}"
    if isinstance(error, UnicodeDecodeError):
        return f"not valid text: {first_line(error)}"
    if isinstance(error, UnicodeEncodeError):
        return f"cannot be {verb}: its name holds characters that have no encoding here; choose another one"
    if isinstance(error, RecursionError):
        return "nested too deeply to be what it should be"
    if isinstance(error, MemoryError):
        return "asks for more memory than there is; if its size is right, use a machine with more"
    if isinstance(error, zipfile.BadZipFile | zlib.error | EOFError):
        return f"a damaged archive: {first_line(error)}"
    advice = _READING if doing == "reading" else _WRITING
    return f"cannot be {verb}: {first_line(error)}; {advice}"


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _errno_in(text: str) -> int | None:
    """The system's error number where a library speaks of it in words only, as safetensors and torch do."""
    lowered = text.lower()
    return next((number for number in _SYSTEM if os.strerror(number).lower() in lowered), None)
