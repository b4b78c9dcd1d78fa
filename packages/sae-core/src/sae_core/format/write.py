"""From an SAE to files: the inference form, written so that it is there whole or not at all.

A new folder is written under a temporary name beside its place and renamed. In a folder that exists already, a run's for
example, weights and config are replaced one after the other, and know each other (`sae_core.format.pair`): whoever comes in
between finds the old SAE or the new one, never a mixture, and the user's other files stay. What is there and is not an SAE
of this format is not overwritten unless the caller says so.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import Tensor

from sae_core.config import default_of, unstructure
from sae_core.dictionary import Dictionary, Export, SAEConfig
from sae_core.durable import sync_file, sync_folder, umask, unique_folder
from sae_core.errors import FormatError, SaeCoreError
from sae_core.format.exports import class_of, provider_of
from sae_core.format.exports import exported as checked_export
from sae_core.format.files import CONFIG_FILE, TRAINING_FILE, WEIGHTS_FILE, LocalFiles
from sae_core.format.pair import (
    header_digest,
    locked,
    named_by,
    read_claim,
    said_in_header,
    settle,
    sign,
    temporary_name,
)
from sae_core.format.plain import plain
from sae_core.format.read import recognised
from sae_core.format.sae_lens_names import to_sae_lens
from sae_core.format.slices import SharedWriter, TensorPart
from sae_core.format.stream import write_tensors
from sae_core.format.training_form import needs_training_form, training_header, training_tensors
from sae_core.format.trouble import trouble
from sae_core.latent_ranks import LatentRanks
from sae_core.plugins.records import CORE
from sae_core.scaled_rows import scaling_put_off

__all__ = ["FORMAT_VERSION", "save_sae", "write_atomically"]

FORMAT_VERSION = 1
_ABANDONED = 60.0  # seconds without a change after which a temporary folder that nobody has locked is left behind
_SAE_LENS_LAYOUT = "6.28.0"  # readers take a file without this version for one of the flat configs before 6.0


def save_sae(sae: Dictionary, path: Path, *, overwrite: bool = False) -> Path:
    """Write `sae` in inference form to the folder `path`; `overwrite` replaces files that are not an SAE of this format.

    Where its latents are shared out over ranks, all of them call this with the same path, on a file system that all see, and
    write one file together.
    """
    if sae.ranks is not None:
        return _save_over_ranks(sae, sae.ranks, path, overwrite=overwrite)
    _save(_contents(sae, path), path, partial(_write_alone, path), overwrite=overwrite)
    return path


class _Contents(NamedTuple):
    """What is to be saved: cfg.json, tensors in inference form, and the SAE itself where it has a training form beside that."""

    cfg: dict[str, Any]
    tensors: dict[str, Tensor]
    training: Dictionary | None
    saved_as: type[Dictionary]


Write = Callable[[Path, str, Mapping[str, Tensor], Callable[[Mapping[str, str]], str]], bytes]
"""Writes the file of a name to a path, and returns its header; raises FormatError where weights are not finite."""


def _write_alone(
    folder: Path, path: Path, name: str, tensors: Mapping[str, Tensor], said: Callable[[Mapping[str, str]], str]
) -> bytes:
    return write_tensors(path, tensors, said, partial(_check_finite, folder) if name == WEIGHTS_FILE else None)


def _contents(sae: Dictionary, path: Path) -> _Contents:
    with scaling_put_off():
        exported = checked_export(sae)
    cfg = plain(inference_config(sae, exported), f"{path}: not saved: cfg.json")
    tensors = {
        name: tensor.detach() if tensor.device.type == "cpu" else tensor.detach().cpu()
        for name, tensor in exported.tensors.items()
    }
    return _Contents(cfg, tensors, sae if needs_training_form(sae, exported) else None, class_of(exported, sae))


def _save_over_ranks(sae: Dictionary, ranks: LatentRanks, path: Path, *, overwrite: bool) -> Path:
    """The first rank decides, as one process does; whatever is wrong anywhere is raised everywhere."""
    what, problem = None, None
    try:
        what = _contents(sae, path)
        for name, tensor in what.tensors.items():
            _check_finite(path, name, tensor)
    except SaeCoreError as error:
        problem = str(error)
    problems = [problem for problem in ranks.everyone(problem) if problem is not None]
    if problems or what is None:
        raise FormatError(problems[0])
    writer = SharedWriter(ranks)

    def parts(name: str, tensors: Mapping[str, Tensor]) -> dict[str, TensorPart]:
        if name == WEIGHTS_FILE:
            return {key: TensorPart(tensor, what.saved_as.axis_in_files(key).latent) for key, tensor in tensors.items()}
        return {key: TensorPart(tensor, sae.latent_dimension(key)) for key, tensor in tensors.items()}

    if ranks.rank:
        writer.follow(
            {
                WEIGHTS_FILE: lambda: parts(WEIGHTS_FILE, what.tensors),
                TRAINING_FILE: lambda: parts(TRAINING_FILE, training_tensors(sae)),
            }
        )
        return path
    with writer.leading():
        _save(
            what,
            path,
            lambda at, name, tensors, said: writer.write(at, name, parts(name, tensors), said),
            overwrite=overwrite,
        )
    return path


def _save(what: _Contents, path: Path, write: Write, *, overwrite: bool) -> None:
    """Write it all with `write`, before anything takes its place."""
    training = what.training
    with trouble(path, "writing"):
        if path.exists() and not path.is_dir():
            raise FormatError(f"{path}: cannot save an SAE there, it is a file; give a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_dir():
            _sweep_folders(path)
            if _write_new(path, what, write):
                return
        with locked(path):
            _refuse_folders(path, training is not None)
            settle(path)
            if not overwrite:
                _refuse_strangers(path, training is not None)
            _write_into(path, what, write)


def _write_new(path: Path, what: _Contents, write: Write) -> bool:
    """Make the folder; False when somebody else made one in the meantime."""
    temporary = unique_folder(path)
    try:
        with locked(temporary):  # so that nobody sweeps it
            _write_into(temporary, what, write)
            try:
                temporary.rename(path)
            except OSError:
                if path.is_dir():
                    return False
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(path.parent)
    return True


def _sweep_folders(path: Path) -> None:
    """Remove what interrupted saves of this folder left beside it, unless somebody is at work in it."""
    with suppress(OSError):
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            if left.is_dir() and time.time() - left.stat().st_mtime > _ABANDONED:
                with locked(left, wait=False) as held:
                    if held:
                        shutil.rmtree(left, ignore_errors=True)


def _refuse_folders(path: Path, with_training_form: bool) -> None:
    """Raise FormatError when a folder is where a file has to be, before anything is written."""
    for name in (CONFIG_FILE, WEIGHTS_FILE, *([TRAINING_FILE] if with_training_form else [])):
        if (path / name).is_dir():
            raise FormatError(f"{path}: not saved: {name} is a folder there; choose another folder, or move it away")


def _refuse_strangers(path: Path, with_training_form: bool) -> None:
    """Raise FormatError when writing our files would destroy or hide something else."""
    advice = "choose another folder, or pass overwrite=True"
    config, weights = path / CONFIG_FILE, path / WEIGHTS_FILE
    if config.exists() and not weights.exists():
        raise FormatError(f"{path}: not saved: it holds a {CONFIG_FILE} that is not that of an SAE; {advice}")
    if weights.exists() and not config.exists() and read_claim(weights) is None:
        raise FormatError(f"{path}: not saved: it holds a {WEIGHTS_FILE} of another kind; {advice}")
    trained = path / TRAINING_FILE
    if with_training_form and trained.is_file() and said_in_header(trained) is None:
        raise FormatError(f"{path}: not saved: it holds a {TRAINING_FILE} of another kind; {advice}")
    others = [name for name in recognised(LocalFiles(path)) if name.rpartition(":")[2] != "sae_lens"]
    if others:
        raise FormatError(
            f"{path}: not saved: it holds files of the format {', '.join(others)}, beside which neither could be recognised; "
            f"{advice} (and load it with format='sae_lens')"
        )


def inference_config(sae: Dictionary, exported: Export) -> dict[str, Any]:
    """The content of cfg.json."""
    provider = provider_of(exported, sae)
    architecture, cfg = provider.spec.name, _inference_fields(exported.config)
    if provider.distribution == CORE:
        architecture, cfg = to_sae_lens(architecture, cfg)
    dtype = str(sae.dtype).removeprefix("torch.")
    said = sae.metadata.get("sae_core") or {}
    if not isinstance(said, Mapping):
        raise FormatError(
            f"not saved: metadata['sae_core'] is where this project keeps its own facts, and holds {said!r}; rename that key"
        )
    ours: dict[str, Any] = {
        **cast("Mapping[str, Any]", said),
        "format_version": FORMAT_VERSION,
        "provider": {"distribution": provider.distribution, "version": provider.version},
    }
    trained_as = sae.metadata.get("training_architecture") or sae.architecture
    if trained_as == sae.architecture or "training_config" not in ours:
        ours["training_config"] = unstructure(sae.config)
    metadata = {
        **sae.metadata,
        "sae_lens_version": sae.metadata.get("sae_lens_version") or _SAE_LENS_LAYOUT,
        "training_architecture": trained_as,
        "sae_core": ours,
    }
    return {**cfg, "dtype": dtype, "device": "cpu", "metadata": metadata, "architecture": architecture}


def _inference_fields(config: SAEConfig) -> dict[str, Any]:
    """What changes the forward pass; fields that other tools do not know only where they are not their defaults."""
    plain = unstructure(config)
    kept = [field for field in dataclasses.fields(config) if not field.metadata.get("training")]
    defaults = {field.name: default_of(field) for field in kept if field.metadata.get("omit_default")}
    return {f.name: plain[f.name] for f in kept if f.name not in defaults or plain[f.name] != defaults[f.name]}


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it, and rename it into place.

    Raises FormatError when the system refuses; what was at `path` is then still there.
    """
    with trouble(path, "writing"):
        temporary = _temporary(path.parent, path.name)
        try:
            write(temporary)
            sync_file(temporary)
            temporary.chmod(0o666 & ~umask())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def _write_into(folder: Path, what: _Contents, write: Write) -> None:
    cfg, tensors, training, _ = what
    weights, config = _temporary(folder, WEIGHTS_FILE), _temporary(folder, CONFIG_FILE)
    trained = _temporary(folder, TRAINING_FILE) if training is not None else None
    try:
        digest = header_digest(write(weights, WEIGHTS_FILE, tensors, sign(cfg)))
        text = json.dumps(named_by(cfg, digest), indent=2, ensure_ascii=False, allow_nan=False)
        config.write_text(text + "\n", encoding="utf-8")
        if training is not None and trained is not None:
            write(trained, TRAINING_FILE, training_tensors(training), training_header(training, digest))
        for path in (weights, config, *([trained] if trained else [])):
            sync_file(path)
            path.chmod(0o666 & ~umask())
        weights.replace(folder / WEIGHTS_FILE)
        config.replace(folder / CONFIG_FILE)
        if trained is not None:
            trained.replace(folder / TRAINING_FILE)
        else:
            _remove_training_form(folder / TRAINING_FILE)
    finally:
        for path in (weights, config, *([trained] if trained else [])):
            path.unlink(missing_ok=True)
    sync_folder(folder)


def _remove_training_form(path: Path) -> None:
    """Remove what belongs to the SAE that was here; a file of this name that is not ours stays."""
    if path.is_file() and said_in_header(path) is not None:
        path.unlink(missing_ok=True)


def _temporary(folder: Path, name: str) -> Path:
    prefix, suffix = temporary_name(name)
    handle, path = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=folder)
    os.close(handle)
    return Path(path)


def _check_finite(folder: Path, name: str, tensor: Tensor) -> None:
    # a sum passes on every NaN and infinity, and may itself overflow: then look at each value
    if not bool(tensor.sum().isfinite()) and not bool(tensor.isfinite().all()):
        raise FormatError(f"{folder}: not saved, tensor {name!r} holds NaN or infinite values")
