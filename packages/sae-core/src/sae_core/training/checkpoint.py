"""Checkpoints: the whole state of a training run as files that are complete or not there.

A state is what `Resumable` objects give: dictionaries, lists, tuples, numbers, text and None, with tensors anywhere among
them. On disk it is a folder of two files: ``tensors.safetensors``, and ``checkpoint.json`` with everything else, in which
``{"$tensor": NAME}`` stands for a tensor; where one of its dimensions counts latents, ``"latent"`` says which. The tensors'
header holds the CRC-32 of each, and ``checkpoint.json`` the SHA-256 of that header and of what it says itself, so that damage
is noticed before anything is restored. No pickle is written or read.

Where latents are shared out over ranks, a state holds a rank's `TensorPart` of what belongs to latents. The ranks write one
file together, the same as one process writes, and each reads its own latents from it, however many ranks there were.

A folder is written under a temporary name, synced and renamed. `Checkpoints` keeps the last few of a run in one folder and
finds the newest whole one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast, final

import torch
from torch import Tensor

from sae_core.durable import sync_file, sync_folder, unique_folder
from sae_core.errors import DataError, FormatError
from sae_core.format.files import read_safetensors
from sae_core.format.pair import header_digest, read_claim, sign, tensor_problem
from sae_core.format.slices import SharedWriter, TensorPart
from sae_core.format.stream import write_tensors
from sae_core.format.trouble import trouble
from sae_core.latent_ranks import LatentRanks, current_ranks, latents_here
from sae_core.parallel.ranks import Ranks

__all__ = [
    "CHECKPOINT_VERSION",
    "Checkpoints",
    "Found",
    "read_checkpoint",
    "sent_from_first",
    "without_parts",
    "write_checkpoint",
]

CHECKPOINT_VERSION = 1
_JSON, _TENSORS = "checkpoint.json", "tensors.safetensors"
_TRASH = ".removing."


def write_checkpoint(folder: Path, state: Mapping[str, Any], ranks: LatentRanks | None = None) -> Path:
    """Write `state` as the folder `folder`, which appears complete or not at all; an existing one is replaced.

    Of several `ranks` all call this, each with its part of the latents; where to, the first one says. Raises DataError for
    values that are neither tensors nor JSON, FormatError when the disk refuses.
    """
    parts: dict[str, TensorPart] = {}
    plain = _without_tensors(state, "", parts)
    parts = {name: TensorPart(part.tensor.detach().to("cpu"), part.latent) for name, part in parts.items()}
    if ranks is None:
        _write_folder(
            folder,
            plain,
            lambda path, said: write_tensors(path, {name: part.tensor for name, part in parts.items()}, said),
        )
        return folder
    writer = SharedWriter(ranks)
    if ranks.rank:
        writer.follow({_TENSORS: lambda: parts})
        return folder
    with writer.leading():
        _write_folder(folder, plain, lambda path, said: writer.write(path, _TENSORS, parts, said))
    return folder


def _write_folder(folder: Path, plain: Any, write: Callable[[Path, Callable[[Mapping[str, str]], str]], bytes]) -> None:
    """Fill a folder beside `folder`, the tensors with `write`, and rename it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = unique_folder(folder)
    except OSError as error:
        raise FormatError(f"{folder}: the checkpoint cannot be written: {error.strerror or error}") from None
    try:
        header = write(temporary / _TENSORS, sign(plain))
        content = {
            "version": CHECKPOINT_VERSION,
            "sha256": {"header": header_digest(header), "state": _digest(plain)},
            "state": plain,
        }
        (temporary / _JSON).write_text(_json(content) + "\n", encoding="utf-8")
        for name in (_TENSORS, _JSON):
            sync_file(temporary / name)
        if folder.exists():
            _remove(folder)
        temporary.rename(folder)
        sync_folder(folder.parent)
    except (OSError, FormatError) as error:
        raise FormatError(
            f"{folder}: the checkpoint cannot be written: {error}; earlier checkpoints are untouched"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_checkpoint(folder: Path, *, check: bool = True) -> dict[str, Any]:
    """The state that `write_checkpoint` wrote; inside `latents_over`, of what belongs to latents this rank's.

    Raises FormatError that names the file for anything damaged or missing; without `check`, tensors are not compared with their
    checksums, for a rank that knows that another one has done so.
    """
    path = folder / _TENSORS
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
    if _digest(content["state"]) != content["sha256"]["state"]:
        raise FormatError(f"{folder / _JSON}: damaged, its content does not match its hash")
    claim = read_claim(path)
    if claim is None or claim.header != content["sha256"]["header"]:
        raise FormatError(f"{path}: damaged, or of another checkpoint: its header does not match the hash in {_JSON}")
    if check and (problem := tensor_problem(path)) is not None:
        raise FormatError(f"{path}: damaged, {problem}")
    tensors, ranks = read_safetensors(path), current_ranks()

    def taken(name: str, latent: int | None) -> Tensor:
        if name not in tensors:
            raise FormatError(f"{path}: no tensor {name!r}")
        tensor = tensors.pop(name)
        if latent is not None and ranks is not None:
            here = latents_here(tensor.shape[latent], ranks)
            tensor = tensor.narrow(latent, here.start, len(here))
        # Cloned: what safetensors gives is mapped from the file, which may be removed while training goes on.
        return tensor.clone()

    with trouble(path, "reading"):
        state = _with_tensors(content["state"], taken)
    if tensors:
        raise FormatError(f"{path}: tensors that the checkpoint does not use: {', '.join(tensors)}")
    return state


def sent_from_first(state: Mapping[str, Any] | None, ranks: Ranks) -> dict[str, Any] | None:
    """The state that the first of several ranks has read, on every rank; the others give None."""
    if ranks.size == 1:
        return None if state is None else dict(state)
    parts: dict[str, TensorPart] = {}
    plain = None if state is None else _without_tensors(state, "", parts)
    plain, shapes = ranks.told((plain, {name: (part.tensor.shape, part.tensor.dtype) for name, part in parts.items()}))
    tensors = {name: part.tensor.contiguous() for name, part in parts.items()} or {
        name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()
    }
    ranks.sent(list(tensors.values()))
    return None if plain is None else _with_tensors(plain, lambda name, _: tensors[name])


def without_parts(state: Any) -> Any:
    """`state` with tensors where it has a rank's parts of them."""
    if isinstance(state, TensorPart):
        return state.tensor
    if isinstance(state, Mapping):
        return {key: without_parts(value) for key, value in cast("Mapping[Any, Any]", state).items()}
    if isinstance(state, list | tuple):
        items = [without_parts(item) for item in cast("list[Any]", state)]
        return items if isinstance(state, list) else tuple(items)
    return state


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

    def save(self, samples: int, state: Mapping[str, Any], ranks: LatentRanks | None = None) -> Path:
        """Write one more, and remove all but the newest `keep_last`; of several `ranks` all call this, and the first one knows
        the folder.

        Checkpoints of more samples than this one belong to a continuation that was given up, and one of as many is replaced:
        both are removed as well.
        """
        if ranks is not None and ranks.rank:
            return write_checkpoint(self.folder, state, ranks)
        path = self.folder / f"{samples:012d}"
        if path.exists():  # written beside it: at every moment there is a whole one
            again = [int(p.suffix[1:]) for p in self._all() if p.stem == path.name and p.suffix]
            path = path.with_suffix(f".{1 + max(again, default=0)}")
        write_checkpoint(path, state, ranks)
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


def _without_tensors(value: Any, path: str, parts: dict[str, TensorPart]) -> Any:
    """`value` as JSON; its tensors go to `parts` under their path."""
    if isinstance(value, Tensor):
        value = TensorPart(value, None)
    if isinstance(value, TensorPart):
        name = path or "state"
        while name in parts:  # "a.b" may be one key or two
            name += "'"
        parts[name] = value
        return {"$tensor": name} if value.latent is None else {"$tensor": name, "latent": value.latent}
    if isinstance(value, Mapping):
        keys = list(cast("Mapping[Any, Any]", value))
        wrong = [key for key in keys if not isinstance(key, str) or key.startswith("$")]
        if wrong:
            raise DataError(f"checkpoint: {path or 'state'}: keys must be text without a leading $, found {wrong[0]!r}")
        return {key: _without_tensors(value[key], f"{path}.{key}" if path else key, parts) for key in keys}
    if isinstance(value, list | tuple):
        items = [_without_tensors(item, f"{path}.{i}", parts) for i, item in enumerate(cast("list[Any]", value))]
        return items if isinstance(value, list) else {"$tuple": items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise DataError(
        f"checkpoint: {path or 'state'} is a {type(value).__name__}; a state holds tensors, numbers, text, lists and "
        "dictionaries of them"
    )


def _with_tensors(value: Any, taken: Callable[[str, int | None], Tensor]) -> Any:
    """The inverse of `_without_tensors`; `taken` gives the tensor of a name, of which a dimension may count latents."""
    if isinstance(value, list):
        return [_with_tensors(item, taken) for item in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    mapping = cast("dict[str, Any]", value)
    if "$tensor" in mapping:
        return taken(mapping["$tensor"], mapping.get("latent"))
    if "$tuple" in mapping:
        return tuple(_with_tensors(item, taken) for item in mapping["$tuple"])
    return {key: _with_tensors(item, taken) for key, item in mapping.items()}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _digest(value: Any) -> str:
    return hashlib.sha256(_json(value).encode()).hexdigest()
