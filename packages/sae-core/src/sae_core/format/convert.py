"""Writing SAEs in the formats of other libraries, by whatever writers plugins bring.

What is written is the inference form (`sae.export()`), so input scaling and decoder norms are folded into the weights already.
Writers say what their format cannot express and approximate nothing. A folder appears complete or not at all, and never
replaces another.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sae_core.durable import sync_file, sync_folder, unique_folder
from sae_core.errors import ConfigError, FormatError, PluginError, SaeCoreError
from sae_core.format.exports import exported as checked_export
from sae_core.format.exports import qualified
from sae_core.format.trouble import explained, trouble
from sae_core.plugins import Contribution, get_registry

if TYPE_CHECKING:
    from sae_core.protocols import Writer
    from sae_core.sae import SAE, Export

__all__ = ["convert"]


def convert(sae: SAE, to: str, output: str | Path) -> list[str]:
    """Write `sae` to the folder `output` in the format `to`; returns notes on what the format leaves out.

    Raises UnknownNameError for a format that no installed plugin writes, ConfigError for an `output` that is there already,
    FormatError when the format cannot express the SAE, PluginError when the writer returns anything but sentences.
    """
    contribution = get_registry().find("writer", to)
    writer = cast("Writer", get_registry().usable("writer", contribution.qualified)())
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output}: is there already; give the name of a new folder")
    made = checked_export(sae)
    for name, tensor in made.tensors.items():
        if not bool(tensor.isfinite().all()):
            raise FormatError(f"not converted: tensor {name!r} holds NaN or infinite values")
    made = qualified(made, sae)
    with trouble(output, "writing"):
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = unique_folder(output)
        try:
            folder = temporary / output.name
            folder.mkdir()
            notes = _written(writer, contribution, sae, made, folder)
            for path in folder.rglob("*"):
                if path.is_file():
                    sync_file(path)
            sync_folder(folder)
            folder.rename(output)
            sync_folder(output.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return notes


def _written(writer: Writer, contribution: Contribution, sae: SAE, made: Export, folder: Path) -> list[str]:
    try:
        notes = cast("object", writer.write(sae, made, folder))
    except (SaeCoreError, OSError):
        raise
    except Exception as error:
        said = explained(error, "writing")  # what the disk refuses, libraries say in their own ways
        raise PluginError(f"{folder.name}: the writer {contribution.qualified} failed: {said}") from error
    if not isinstance(notes, list | tuple) or not all(isinstance(note, str) for note in cast("list[object]", notes)):
        raise PluginError(f"the writer {contribution.qualified} returned {notes!r}, not a list of notes")
    if not any(folder.iterdir()):
        raise PluginError(f"the writer {contribution.qualified} wrote nothing")
    return list(cast("list[str]", notes))
