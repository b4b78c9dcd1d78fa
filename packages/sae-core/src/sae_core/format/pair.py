"""Weights and config that know each other, so that two files change as one.

No file system replaces two files at once. So each says which other one it belongs to: the header of sae_weights.safetensors
holds a digest of the config and a checksum of every tensor, and cfg.json a digest of that header. Whoever finds the weights
of one save beside the config of another sees it, and finds the missing config under its temporary name:

    write both under temporary names, sync      -> the old SAE
    rename the weights into place               -> a mixture that everybody recognises; the new config is at hand
    rename the config into place                -> the new SAE

A reader that meets the middle takes the config from its temporary name, and finishes the step if the saver is gone. Savers
take turns by a lock on the folder, where the system has one. Files of other writers say nothing of each other and are read
as they are; so is a config that was edited by hand, as long as it still names its weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sae_core.errors import FormatError
from sae_core.format.files import (
    CONFIG_FILE,
    TRAINING_FILE,
    WEIGHTS_FILE,
    join,
    parse_json,
    read_json,
    read_safetensors,
)
from sae_core.format.stream import crc32
from sae_core.format.trouble import trouble

if TYPE_CHECKING:
    from torch import Tensor

    from sae_core.protocols import FileSource

__all__ = [
    "Claim",
    "header_digest",
    "locked",
    "named_by",
    "read_claim",
    "read_pair",
    "said_in_header",
    "settle",
    "sign",
    "temporary_name",
    "tensor_problem",
    "weights_named",
]

_KEY = "sae_core"
_LEFT_BEHIND = re.compile(
    r"\.(?:cfg\.json|sae_weights\.safetensors|training_form\.safetensors)\.[A-Za-z0-9_]{8}(?:\.tmp)?"
)
_WAITS = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # seconds; a saver needs less between its two renames
_STALE = 24 * 3600.0  # seconds after which a temporary file is nobody's, where there are no locks


@dataclass(frozen=True, slots=True)
class Claim:
    """What weights say of themselves: the digest of their header, that of their config, and a CRC-32 for each tensor."""

    header: str
    config: str
    sums: Mapping[str, str]


def sign(cfg: Mapping[str, Any]) -> Callable[[Mapping[str, str]], str]:
    """What the header of weights that belong to `cfg` says, given the checksums of the tensors by name."""
    config = _digest(cfg)
    return lambda sums: json.dumps({"config": config, "crc32": dict(sorted(sums.items()))})


def named_by(cfg: Mapping[str, Any], weights: str) -> dict[str, Any]:
    """`cfg` with the digest of its weights' header in it."""
    metadata = dict(cfg["metadata"])
    metadata["sae_core"] = {**metadata["sae_core"], "weights": weights}
    return {**cfg, "metadata": metadata}


def header_digest(header: bytes) -> str:
    """SHA-256 of a safetensors header and the length before it."""
    return hashlib.sha256(header).hexdigest()


def read_claim(path: Path) -> Claim | None:
    """What the weights file says, or None when another writer made it. Raises FormatError when it has no header."""
    header = _header(path)
    if header is None:  # not safetensors; whoever reads the tensors says so
        return None
    try:
        said = _said(header)
        sums = {str(name): str(value) for name, value in said["crc32"].items()}
        return Claim(header_digest(header), str(said["config"]), sums)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def said_in_header(path: Path) -> dict[str, Any] | None:
    """What this project wrote into the header of a safetensors file; None when another writer made it."""
    try:
        return _said(_header(path) or b"")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _said(header: bytes) -> dict[str, Any]:
    return dict(json.loads(json.loads(header[8:])["__metadata__"][_KEY]))


def _header(path: Path) -> bytes | None:
    """The header with the length before it; None for a file that is not safetensors."""
    with trouble(path, "reading"), path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        return start + file.read(length) if 2 <= length <= path.stat().st_size - 8 else None


def read_pair(source: FileSource, folder: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of one save. Raises FormatError when the two files belong to different SAEs."""
    alone = False
    for wait in _WAITS:
        time.sleep(wait)
        cfg = read_json(source, join(folder, CONFIG_FILE))
        path = source.path(join(folder, WEIGHTS_FILE))
        before = _identity(path)
        claim = read_claim(path)
        if claim is not None and not _belongs(cfg, claim):
            cfg = next((found for _, found in _pending(path.parent) if _belongs(found, claim)), None)
            settled = _settle_if_alone(path.parent)
            if cfg is None and alone:
                break  # nobody is at work here, and looking twice has not helped
            alone = settled
            if cfg is None:
                continue
        tensors = read_safetensors(path)
        if _identity(path) == before:  # else the file was replaced while its tensors were read one by one
            return cfg, tensors
    where = f"{source.location}/{folder}".rstrip("/")
    claim = read_claim(source.path(join(folder, WEIGHTS_FILE)))
    raise FormatError(
        f"{where}: {CONFIG_FILE} and {WEIGHTS_FILE} belong to different SAEs, as after copying one of them alone; copy both "
        "from one place again. If you wrote this config yourself, let it say so: metadata.sae_core.weights = "
        f"{claim.header if claim else ''!r}"
    )


def settle(folder: Path) -> None:
    """Finish an interrupted save, or undo it, and sweep what it left behind; call it with the folder `locked`."""
    weights = folder / WEIGHTS_FILE
    claim = read_claim(weights) if weights.is_file() else None
    if claim is not None and not _belongs(_parsed(folder / CONFIG_FILE) or {}, claim):
        for path, cfg in _pending(folder):
            if _belongs(cfg, claim):
                path.replace(folder / CONFIG_FILE)
                break
    if claim is not None:
        for path in folder.glob(f".{TRAINING_FILE}.*"):
            if (said_in_header(path) or {}).get("weights") == claim.header:
                path.replace(folder / TRAINING_FILE)
                break
    for path in folder.iterdir():
        if _LEFT_BEHIND.fullmatch(path.name) and (_can_lock() or _age(path) > _STALE):
            path.unlink(missing_ok=True)


def _settle_if_alone(folder: Path) -> bool:
    """Finish what an interrupted save left, unless a saver is at work; gives whether nobody is."""
    with suppress(OSError, FormatError), locked(folder, wait=False) as held:
        if held:
            settle(folder)
            return True
    return False


def temporary_name(name: str) -> tuple[str, str]:
    """Prefix and suffix of the temporary names of a file, as `settle` knows them."""
    return f".{name}.", ".tmp"


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Generator[bool]:
    """Hold the folder's lock, so that savers take turns; gives whether it is held. Without locks everybody holds it."""
    if not _can_lock():
        yield True
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks
            pass
        yield True
    finally:
        os.close(handle)


def tensor_problem(path: Path) -> str | None:
    """What is wrong with the tensors of a weights file, by the checksums in it; None if nothing, or if it holds none."""
    claim = read_claim(path)
    if claim is None:
        return None
    tensors = read_safetensors(path)
    for name, expected in claim.sums.items():
        if name not in tensors:
            return f"tensor {name!r} is missing"
        if crc32(tensors.pop(name).contiguous()) != expected:
            return f"tensor {name!r} has changed since it was saved (CRC-32)"
    return None


def _belongs(cfg: Mapping[str, Any], claim: Claim) -> bool:
    """Whether `cfg` names these weights, or is exactly what they were saved with."""
    if not isinstance(cfg.get("metadata", {}), Mapping):
        return True  # no config at all, which is for its reader to say
    named = weights_named(cfg)
    return named == claim.header or (named is None and _digest(cfg) == claim.config)


def weights_named(cfg: Mapping[str, Any]) -> str | None:
    """The digest of the weights that a config says it belongs to, None if it names none."""
    metadata = cfg.get("metadata")
    ours = cast("Mapping[str, Any]", metadata).get("sae_core") if isinstance(metadata, Mapping) else None
    named = cast("Mapping[str, Any]", ours).get("weights") if isinstance(ours, Mapping) else None
    return named if isinstance(named, str) else None


def _digest(cfg: Mapping[str, Any]) -> str:
    """SHA-256 of a config without what it says of its weights, however its keys are ordered and spaced."""
    metadata = cfg.get("metadata")
    if weights_named(cfg) is not None:
        kept = dict(cast("Mapping[str, Any]", metadata))
        kept["sae_core"] = {key: value for key, value in kept["sae_core"].items() if key != "weights"}
        cfg = {**cfg, "metadata": kept}
    text = json.dumps(cfg, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _pending(folder: Path) -> Iterable[tuple[Path, dict[str, Any]]]:
    """Configs that are complete but not in their place yet."""
    with suppress(OSError):
        for path in sorted(folder.glob(f".{CONFIG_FILE}.*")):
            if _LEFT_BEHIND.fullmatch(path.name) and (cfg := _parsed(path)) is not None:
                yield path, cfg


def _parsed(path: Path) -> dict[str, Any] | None:
    try:
        return parse_json(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError, FormatError):
        return None


def _identity(path: Path) -> tuple[int, int, int, int]:
    with trouble(path, "reading"):
        found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _age(path: Path) -> float:
    with suppress(OSError):
        return time.time() - path.stat().st_mtime
    return 0.0


def _can_lock() -> bool:
    return os.name == "posix"
