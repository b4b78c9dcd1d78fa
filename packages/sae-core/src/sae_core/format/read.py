"""From files to an SAE: recognise the format, read it, and fill every parameter with exactly one tensor.

An SAE is built without memory for its parameters (on the meta device); the file's tensors, memory-mapped where the format
allows, then become the parameters themselves, cast or moved on the way if asked.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from sae_core.config import distinct_numbers, require, structure
from sae_core.dictionary import Dictionary, as_device, as_dtype
from sae_core.errors import ConfigError, FormatError, PluginError, SaeCoreError
from sae_core.format.files import LocalFiles
from sae_core.format.hook_names import spell_hook_names
from sae_core.format.tensors import common_dtype, plain_tensor
from sae_core.format.trouble import first_line, trouble
from sae_core.latent_ranks import current_ranks, latents_here
from sae_core.ops.memory import fresh_copy
from sae_core.plugins import PluginWarning, get_registry
from sae_core.plugins.errors import OUR_EXTENSIONS, one_line
from sae_core.protocols import FileSource, LoadedSAE, Loader

__all__ = ["Hints", "build_sae", "find_loader", "load_sae", "read_sae", "recognised"]

MAPPED_FROM = 64 * 2**20
"""Bytes of tensors from which on files are memory-mapped unless the caller says otherwise."""


@runtime_checkable
class Hints(Protocol):
    """A loader that could read files which it does not recognise, if the caller vouched for them."""

    def hint(self, source: FileSource, folder: str = "") -> str | None:
        """What to load with, ``format='x' and the fact y``, when the files might be of this format; None when not."""
        ...


def load_sae(
    path: Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    format: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    rows: Sequence[int] | None = None,
    mmap: bool | None = None,
) -> Dictionary:
    """Load from a local folder, or a file where a format is a single file."""
    with trouble(path, "reading"):
        single = path.is_file()
    if single:
        source, folder = LocalFiles(path.parent), path.name
    else:
        source, folder = LocalFiles(path), ""
    return read_sae(
        source, folder, device=device, dtype=dtype, format=format, overrides=overrides, rows=rows, mmap=mmap
    )


def read_sae(
    source: FileSource,
    folder: str = "",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    format: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    rows: Sequence[int] | None = None,
    mmap: bool | None = None,
) -> Dictionary:
    """Load one SAE from a file source; with `rows` some of its latents, whose numbers its metadata then hold as ``rows``.

    The parameters are maps of the file where nothing had to be computed (`mmap` True), or copies in memory (False); None maps
    files of more than 64 MB.

    Inside `sae_core.latent_ranks.latents_over` every rank loads its own latents, and reads no others.
    """
    rows = None if rows is None else distinct_numbers(rows, "rows=")
    name = format or find_loader(source, folder)
    loader = cast("Loader", get_registry().usable("loader", name)())
    where = f"{source.location}/{folder}".rstrip("/")
    ranks = current_ranks()
    if ranks is not None:
        require(rows is None, f"{where}: rows= cannot be used where latents are shared out over ranks")
        d_sae = loader.load(source, folder, weights=False, overrides=overrides).config["d_sae"]
        loaded = loader.load(source, folder, overrides=overrides, rows=latents_here(d_sae, ranks))
        loaded = dataclasses.replace(loaded, config={**loaded.config, "d_sae": d_sae})
        return build_sae(loaded, where=where, device=device, dtype=dtype, mmap=mmap)
    loaded = loader.load(source, folder, overrides=overrides, rows=rows)
    if rows is not None:
        sae_class = cast("type[Dictionary]", get_registry().usable("architecture", loaded.architecture))
        if not sae_class.independent_latents:
            raise ConfigError(
                f"{where}: rows= cannot be used with architecture {loaded.architecture!r}: its latents compete, so some of "
                "them alone would have other values"
            )
    sae = build_sae(loaded, where=where, device=device, dtype=dtype, mmap=mmap)
    if rows is not None:
        sae.metadata["rows"] = list(rows)
    return sae


def find_loader(source: FileSource, folder: str = "") -> str:
    """The one loader that recognises the files; FormatError lists what was tried when none or several do."""
    hints: list[str] = []
    damaged: list[str] = []
    found = recognised(source, folder, hints, damaged)
    if len(found) == 1:
        return found[0]
    place = f"{source.location}/{folder}".rstrip("/")
    if found:
        raise FormatError(f"{place}: several formats fit: {', '.join(found)}; name one with format=")
    here = [name for name in source.files() if name.startswith(folder)][:12]
    if damaged:
        raise FormatError("; ".join(dict.fromkeys(damaged)))
    if hints:
        raise FormatError(
            f"{place}: nothing here says which library wrote it; if you know, load with {', or '.join(hints)}"
        )
    known = ", ".join(contribution.spec.name for contribution in get_registry().contributions("loader"))
    raise FormatError(
        f"{place}: no known format (looked for: {known}); it holds: {', '.join(here) or 'no files'}{_more_formats()}"
    )


def _more_formats() -> str:
    """Which packages of this project would bring further formats, as they are not in use."""
    loaded = {plugin.distribution for plugin in get_registry().plugins() if plugin.state in ("loaded", "conflict")}
    others = [name for name, gives in OUR_EXTENSIONS.items() if "loader" in gives and name not in loaded]
    return f"; further formats come with {' and '.join(others)}, not in use here" if others else ""


def recognised(
    source: FileSource, folder: str = "", hints: list[str] | None = None, damaged: list[str] | None = None
) -> list[str]:
    """The names of all loaders that recognise the files; what others would need goes into `hints`.

    What kept a loader from telling, a config that is no JSON for example, goes into `damaged`.
    """
    registry = get_registry()
    found: list[str] = []
    for contribution in registry.contributions("loader"):
        try:
            loader = cast("Loader", registry.usable("loader", contribution.qualified)())
            fits = loader.matches(source, folder)
            if hints is not None and not fits and isinstance(loader, Hints) and (hint := loader.hint(source, folder)):
                hints.append(hint)
        except Exception as error:  # noqa: BLE001 - a broken loader must not keep the formats of the others from being read
            if isinstance(error, SaeCoreError) and not isinstance(error, PluginError):
                if damaged is not None:
                    damaged.append(str(error))
                continue
            message = f"loader {contribution.qualified} could not be asked about {source.location}: {one_line(error)}"
            warnings.warn(message, PluginWarning, stacklevel=2)
            continue
        if fits:
            found.append(contribution.qualified)
    return found


def build_sae(
    loaded: LoadedSAE,
    *,
    where: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    mmap: bool | None = None,
) -> Dictionary:
    """An SAE from what a loader read. Raises FormatError for tensors that are missing, left over, misshapen or not finite.

    The tensors are handed over: `loaded.tensors` is empty afterwards, so that what has been cast is not kept twice. Tensors of
    several precisions become the narrowest one that holds them all, unless `dtype` says otherwise.
    """
    if loaded.activation_scale is not None and not 0 < loaded.activation_scale < math.inf:
        raise ConfigError(f"{where}: norm_scaling_factor must be a positive number, not {loaded.activation_scale}")
    sae_class = cast("type[Dictionary]", get_registry().usable("architecture", loaded.architecture))
    config = structure(loaded.config, sae_class.config_class, where=f"{where}: architecture {loaded.architecture!r}")
    try:
        with torch.device("meta"):
            sae = sae_class(config)
    except SaeCoreError:
        raise
    except Exception as error:
        raise FormatError(f"{where}: its config asks for tensors that cannot be: {first_line(error)}") from error
    pool = loaded.tensors if isinstance(loaded.tensors, dict) else dict(loaded.tensors)
    for key in pool:
        pool[key] = plain_tensor(pool[key], key, where)
    size = sum(tensor.numel() * tensor.element_size() for tensor in pool.values())
    from_file = set() if mmap or (mmap is None and size > MAPPED_FROM) else {_place(tensor) for tensor in pool.values()}
    kept = {key for key in pool if sae_class.declares(key) and sae_class.axis_in_files(key).keep_float32}
    cast_to = common_dtype(
        tensor.dtype for key, tensor in pool.items() if tensor.is_floating_point() and key not in kept
    )
    _fill(sae, pool, where, as_device(device), cast_to if dtype is None else as_dtype(dtype))
    for tensor in (*sae.parameters(), *sae.buffers()):
        if from_file and not tensor.is_meta and _place(tensor) in from_file:
            tensor.data = fresh_copy(tensor.data)
    sae.forget_statistics()  # of normalisations, which files do not hold: they are still on the meta device
    if loaded.activation_scale is not None:
        sae.normalization.set_scale(loaded.activation_scale)
        if sae.target_normalization is not None:
            sae.target_normalization.set_scale(1.0)  # such files are of transcoders whose targets were not normalised
    sae.metadata = spell_hook_names(loaded.metadata)
    return sae.eval()


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _fill(
    sae: Dictionary, tensors: dict[str, Tensor], where: str, device: torch.device, dtype: torch.dtype | None
) -> None:
    wanted = {sae.axis(name).file or name: (name, tensor) for name, tensor in sae.tensors().items()}
    missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or extra:
        said = [f"missing tensor {name!r}" for name in missing] + [f"unexpected tensor {name!r}" for name in extra]
        raise FormatError(
            f"{where}: {'; '.join(said)} for architecture {sae.architecture!r} (wants: {', '.join(wanted)})"
        )
    for file_name, (name, parameter) in wanted.items():
        tensor, axis = tensors.pop(file_name), sae.axis(name)
        shape = parameter.shape[::-1] if axis.file else parameter.shape
        if tensor.shape != shape:
            raise FormatError(
                f"{where}: tensor {file_name!r} has shape {tuple(tensor.shape)}, but the config asks for {tuple(shape)}"
            )
        if parameter.is_floating_point() != tensor.is_floating_point():
            wants = "floating point" if parameter.is_floating_point() else parameter.dtype
            raise FormatError(f"{where}: tensor {file_name!r} has dtype {tensor.dtype}; {wants} is needed")
        if bad := _not_finite(tensor):
            raise FormatError(f"{where}: tensor {file_name!r} holds {bad} values that are NaN or infinite")
        cast_to = dtype if parameter.is_floating_point() and not axis.keep_float32 else None
        tensor = tensor.to(device, cast_to)
        _assign(sae, name, fresh_copy(tensor.t()) if axis.file else tensor)


def _not_finite(tensor: Tensor) -> int:
    """How many values are NaN or infinite, without a copy of the tensor where there are none."""
    if bool(tensor.sum().isfinite()):  # a sum passes on every NaN and infinity, and may itself overflow: then count
        return 0
    return sum(int((~torch.isfinite(part)).sum()) for part in tensor.flatten().split(2**20))


def _assign(sae: nn.Module, name: str, tensor: Tensor) -> None:
    *parents, leaf = name.split(".")
    module = sae.get_submodule(".".join(parents))
    if leaf in dict(module.named_parameters(recurse=False)):
        module.register_parameter(leaf, nn.Parameter(tensor))
    else:
        module.register_buffer(leaf, tensor)
