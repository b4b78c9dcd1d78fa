"""From an SAE to files: the inference form, written so that it appears complete or not at all.

A new folder is written under a temporary name beside its place and renamed. In a folder that exists already, a run's for
example, both files are first written and synced under temporary names; then the old cfg.json goes, the new weights come,
the new cfg.json comes. Interrupted anywhere, the folder holds the old SAE, the new one, or plainly none; never a mixture.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_core.config import default_of, unstructure
from sae_core.errors import FormatError
from sae_core.format.exports import exported as checked_export
from sae_core.format.files import CONFIG_FILE, WEIGHTS_FILE
from sae_core.format.sae_lens_names import to_sae_lens
from sae_core.plugins import get_registry
from sae_core.sae import SAE, Export, SAEConfig

__all__ = ["FORMAT_VERSION", "save_sae", "write_atomically"]

FORMAT_VERSION = 1
_SAE_LENS_LAYOUT = "6.28.0"  # readers take a file without this version for one of the flat configs before 6.0


def save_sae(sae: SAE, path: Path) -> Path:
    """Write `sae` in inference form to the folder `path`."""
    exported = checked_export(sae)
    cfg = json.dumps(inference_config(sae, exported), indent=2, ensure_ascii=False) + "\n"
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in exported.tensors.items()}
    _check_finite(tensors, path)
    if path.exists() and not path.is_dir():
        raise FormatError(f"{path}: cannot save an SAE there, it is a file; give a folder")
    if path.is_dir():
        _write_into(path, cfg, tensors)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        temporary.chmod(0o777 & ~_umask())
        _write_into(temporary, cfg, tensors)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync_folder(path.parent)
    return path


def inference_config(sae: SAE, exported: Export) -> dict[str, Any]:
    """The content of cfg.json."""
    architecture, cfg = to_sae_lens(exported.architecture, _inference_fields(exported.config))
    if exported.architecture == sae.architecture:
        provider = get_registry().provider_of("architecture", type(sae))
    else:
        provider = get_registry().find("architecture", exported.architecture)
    dtype = str(sae.dtype).removeprefix("torch.")
    metadata = {
        **sae.metadata,
        "sae_lens_version": sae.metadata.get("sae_lens_version", _SAE_LENS_LAYOUT),
        "training_architecture": sae.metadata.get("training_architecture", sae.architecture),
        "sae_core": {
            **sae.metadata.get("sae_core", {}),
            "format_version": FORMAT_VERSION,
            "provider": {"distribution": provider.distribution, "version": provider.version},
        },
    }
    if "training_config" not in metadata["sae_core"]:
        metadata["sae_core"]["training_config"] = unstructure(sae.config)
    return {**cfg, "dtype": dtype, "device": "cpu", "metadata": metadata, "architecture": architecture}


def _inference_fields(config: SAEConfig) -> dict[str, Any]:
    """What changes the forward pass; fields that other tools do not know only where they are not their defaults."""
    plain = unstructure(config)
    kept = [field for field in dataclasses.fields(config) if not field.metadata.get("training")]
    defaults = {field.name: default_of(field) for field in kept if field.metadata.get("omit_default")}
    return {f.name: plain[f.name] for f in kept if f.name not in defaults or plain[f.name] != defaults[f.name]}


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it, and rename it into place."""
    temporary = _temporary(path.parent, path.name)
    try:
        write(temporary)
        _sync(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _write_into(folder: Path, cfg: str, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    weights, config = _temporary(folder, WEIGHTS_FILE), _temporary(folder, CONFIG_FILE)
    try:
        save_file(tensors, weights)
        config.write_text(cfg, encoding="utf-8")
        for path in (weights, config):
            _sync(path)
            path.chmod(0o666 & ~_umask())
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        weights.replace(folder / WEIGHTS_FILE)
        config.replace(folder / CONFIG_FILE)
    finally:
        weights.unlink(missing_ok=True)
        config.unlink(missing_ok=True)
    _sync_folder(folder)


def _temporary(folder: Path, name: str) -> Path:
    handle, path = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
    os.close(handle)
    return Path(path)


def _check_finite(tensors: dict[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise FormatError(f"{path}: not saved, tensor {name!r} holds NaN or infinite values")


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
