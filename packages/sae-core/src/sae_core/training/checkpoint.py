"""Checkpoints: the whole state of a training run as files that are complete or not there.

A state is what `Resumable` objects give: dictionaries, lists, tuples, numbers, text and None, with tensors anywhere among
them. On disk it is a folder of two files: ``tensors.safetensors``, and ``checkpoint.json`` with everything else, in which
``{"$tensor": NAME}`` stands for a tensor. ``checkpoint.json`` also holds the SHA-256 of both, so that damage is noticed
before anything is restored. No pickle is written or read.

A folder is written under a temporary name, synced and renamed. `Checkpoints` keeps the last few of a run in one folder and
finds the newest whole one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast, final

import torch
from torch import Tensor

from sae_core.durable import sync_file, sync_folder, unique_folder
from sae_core.errors import DataError, FormatError
from sae_core.format.files import read_safetensors
from sae_core.parallel.ranks import Ranks

__all__ = ["CHECKPOINT_VERSION", "Checkpoints", "Found", "read_checkpoint", "sent_from_first", "write_checkpoint"]

CHECKPOINT_VERSION = 1
_JSON, _TENSORS = "checkpoint.json", "tensors.safetensors"
_TRASH = ".removing."


def write_checkpoint(folder: Path, state: Mapping[str, Any]) -> Path:
    """Write `state` as the folder `folder`, which appears complete or not at all; an existing one is replaced.

    Raises DataError for values that are neither tensors nor JSON, FormatError when the disk refuses.
    """
    tensors: dict[str, Tensor] = {}
    plain = _without_tensors(state, "", tensors)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = unique_folder(folder)
    except OSError as error:
        raise FormatError(f"{folder}: the checkpoint cannot be written: {error.strerror or error}") from None
    try:
        _write_files(temporary, plain, tensors)
        if folder.exists():
            _remove(folder)
        temporary.rename(folder)
        sync_folder(folder.parent)
    except (OSError, RuntimeError) as error:  # safetensors reports a full disk as its own kind of error
        raise FormatError(
            f"{folder}: the checkpoint cannot be written: {error}; earlier checkpoints are untouched"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """The state that `write_checkpoint` wrote. Raises FormatError that names the file for anything damaged or missing."""
    try:
        content = json.loads((folder / _JSON).read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{folder / _JSON}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise FormatError(f"{folder / _JSON}: damaged, not valid JSON: {error}") from None
    if not isinstance(content, dict) or not {"version", "sha256", "state"} <= set(cast("dict[str, Any]", content)):
        raise FormatError(f"{folder / _JSON}: not a checkpoint of sae-core")
    content = cast("dict[str, Any]", content)
    if content["version"] != CHECKPOINT_VERSION:
        raise FormatError(
            f"{folder / _JSON}: checkpoint version {content['version']}, this sae-core reads {CHECKPOINT_VERSION}; "
            "go on with the version that wrote it"
        )
    if _digest(_json(content["state"]).encode()) != content["sha256"]["state"]:
        raise FormatError(f"{folder / _JSON}: damaged, its content does not match its hash")
    try:
        found = _file_digest(folder / _TENSORS)
    except OSError as error:
        raise FormatError(f"{folder / _TENSORS}: cannot be read: {error.strerror}") from None
    if found != content["sha256"]["tensors"]:
        raise FormatError(f"{folder / _TENSORS}: damaged, its content does not match the hash in {_JSON}")
    # Cloned: what safetensors gives is mapped from the file, which may be removed while training goes on.
    tensors = {name: tensor.clone() for name, tensor in read_safetensors(folder / _TENSORS).items()}
    state = _with_tensors(content["state"], tensors, folder / _TENSORS)
    if tensors:
        raise FormatError(f"{folder / _TENSORS}: tensors that the checkpoint does not use: {', '.join(tensors)}")
    return state


def sent_from_first(state: Mapping[str, Any] | None, ranks: Ranks) -> dict[str, Any] | None:
    """The state that the first of several ranks has read, on every rank; the others give None."""
    if ranks.size == 1:
        return None if state is None else dict(state)
    tensors: dict[str, Tensor] = {}
    plain = None if state is None else _without_tensors(state, "", tensors)
    plain, shapes = ranks.told((plain, {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}))
    tensors = tensors or {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    ranks.sent([tensor.contiguous() for tensor in tensors.values()] if ranks.first else list(tensors.values()))
    return None if plain is None else _with_tensors(plain, tensors, Path("checkpoint"))


class Found(NamedTuple):
    """The newest whole checkpoint, its content, and what is wrong with the newer ones."""

    folder: Path
    state: dict[str, Any]
    damaged: list[str]


@final
class Checkpoints:
    """The checkpoints of one run, in folders named by the number of samples."""

    def __init__(self, folder: Path, keep_last: int) -> None:
        self.folder = folder
        self.keep_last = keep_last

    def save(self, samples: int, state: Mapping[str, Any]) -> Path:
        """Write one more, and remove all but the newest `keep_last`.

        Checkpoints of more samples than this one belong to a continuation that was given up, and one of as many is replaced:
        both are removed as well.
        """
        path = self.folder / f"{samples:012d}"
        if path.exists():  # written beside it: at every moment there is a whole one
            again = [int(p.suffix[1:]) for p in self._all() if p.stem == path.name and p.suffix]
            path = path.with_suffix(f".{1 + max(again, default=0)}")
        write_checkpoint(path, state)
        present = self._all()
        kept = [each for each in present[present.index(path) :] if each == path or each.stem != path.stem][
            : self.keep_last
        ]
        for old in present:
            if old not in kept:
                _remove(old)
        for leftover in self.folder.glob(f"{_TRASH}*"):  # of a process that was killed while it removed
            shutil.rmtree(leftover, ignore_errors=True)
        return path

    def newest(self) -> Found | None:
        """The newest whole checkpoint, or None when there is none at all.

        Raises FormatError when there are some and all of them are damaged.
        """
        damaged: list[str] = []
        for path in self._all():
            try:
                return Found(path, read_checkpoint(path), damaged)
            except FormatError as error:
                damaged.append(str(error))
        if damaged:
            raise FormatError(f"{self.folder}: no whole checkpoint: " + "; ".join(damaged))
        return None

    def clear_leftovers(self) -> None:
        """Remove what a killed process left half written."""
        if self.folder.is_dir():
            for leftover in self.folder.glob(".*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def _all(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        named = [path for path in self.folder.iterdir() if path.is_dir() and path.stem.isdigit()]
        return sorted(named, key=lambda path: (int(path.stem), int(path.suffix[1:] or 0)), reverse=True)


def _remove(folder: Path) -> None:
    """Rename first, so that a half removed folder is never taken for a checkpoint."""
    away = folder.with_name(f"{_TRASH}{folder.name}")
    shutil.rmtree(away, ignore_errors=True)
    folder.rename(away)
    shutil.rmtree(away, ignore_errors=True)


def _write_files(folder: Path, plain: Any, tensors: dict[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(_separate(tensors), folder / _TENSORS)
    except SafetensorError as error:
        raise OSError(str(error)) from None
    hashes = {"tensors": _file_digest(folder / _TENSORS), "state": _digest(_json(plain).encode())}
    content = {"version": CHECKPOINT_VERSION, "sha256": hashes, "state": plain}
    (folder / _JSON).write_text(_json(content) + "\n", encoding="utf-8")
    for name in (_TENSORS, _JSON):
        sync_file(folder / name)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor on the host, contiguous and in memory of its own, as safetensors wants them."""
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        host = tensor.detach().to("cpu").contiguous()
        storage = host.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != host.numel() * host.element_size():
            host = host.clone()
        seen.add(host.untyped_storage().data_ptr())
        separate[name] = host
    return separate


def _without_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON; its tensors go to `tensors` under their path."""
    if isinstance(value, Tensor):
        name = path or "state"
        while name in tensors:  # "a.b" may be one key or two
            name += "'"
        tensors[name] = value
        return {"$tensor": name}
    if isinstance(value, Mapping):
        keys = list(cast("Mapping[Any, Any]", value))
        wrong = [key for key in keys if not isinstance(key, str) or key.startswith("$")]
        if wrong:
            raise DataError(f"checkpoint: {path or 'state'}: keys must be text without a leading $, found {wrong[0]!r}")
        return {key: _without_tensors(value[key], f"{path}.{key}" if path else key, tensors) for key in keys}
    if isinstance(value, list | tuple):
        items = [_without_tensors(item, f"{path}.{i}", tensors) for i, item in enumerate(cast("list[Any]", value))]
        return items if isinstance(value, list) else {"$tuple": items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise DataError(
        f"checkpoint: {path or 'state'} is a {type(value).__name__}; a state holds tensors, numbers, text, lists and "
        "dictionaries of them"
    )


def _with_tensors(value: Any, tensors: dict[str, Tensor], where: Path) -> Any:
    """The inverse of `_without_tensors`; takes the tensors out of `tensors`."""
    if isinstance(value, list):
        return [_with_tensors(item, tensors, where) for item in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    mapping = cast("dict[str, Any]", value)
    if "$tensor" in mapping:
        if mapping["$tensor"] not in tensors:
            raise FormatError(f"{where}: no tensor {mapping['$tensor']!r}")
        return tensors.pop(mapping["$tensor"])
    if "$tuple" in mapping:
        return tuple(_with_tensors(item, tensors, where) for item in mapping["$tuple"])
    return {key: _with_tensors(item, tensors, where) for key, item in mapping.items()}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
