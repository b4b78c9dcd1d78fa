"""What every writer promises: files of its format for what that format can express, one FormatError for what it cannot."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch

from sae_core.errors import FormatError, SaeCoreError
from sae_core.format.convert import convert
from sae_core.format.files import LocalFiles
from sae_core.format.read import recognised
from sae_core.plugins import get_registry
from sae_core.plugins.errors import one_line
from sae_core.protocols import Writer
from sae_core.sae import SAE
from sae_core.testing.kit import Check, NotApplicable, Subject, check_class
from sae_core.testing.small import batch_for, same

__all__ = [
    "CHECKS",
    "check_loads_again",
    "check_refuses",
    "check_writes",
]


def check_writes(subject: Subject) -> None:
    """Some architecture that is installed can be written: files appear, notes are sentences, the SAE stays as it was."""
    written = 0
    for sae in _dictionaries():
        folder = subject.folder / f"{sae.architecture}_{sae.reconstructs_input}"
        state = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
        try:
            notes = convert(sae, subject.contribution.qualified, folder)
        except SaeCoreError:
            continue
        written += 1
        assert all(isinstance(note, str) and note.strip() for note in notes), f"{sae.architecture}: notes are {notes!r}"
        assert any(path.is_file() for path in folder.rglob("*")), f"{sae.architecture}: no file was written"
        for name, tensor in sae.state_dict().items():
            assert torch.equal(tensor, state[name]), f"{sae.architecture}: writing changed {name!r}"
    assert written, "it writes none of the architectures that are installed"


def check_refuses(subject: Subject) -> None:
    """What the format cannot express is a FormatError, and nothing else is raised: another plugin's architecture for one."""
    for sae in _dictionaries():
        try:
            convert(
                sae, subject.contribution.qualified, subject.folder / f"{sae.architecture}_{sae.reconstructs_input}"
            )
        except FormatError:
            continue
        except Exception as error:
            raise AssertionError(f"{sae.architecture} raises {one_line(error)}, not a FormatError") from error
    sae = next(_dictionaries())
    empty = subject.folder / "strange"
    empty.mkdir()
    try:
        writer = cast("Writer", subject.new())
        writer.write(sae, dataclasses.replace(sae.export(), architecture="nobody:no_such_architecture"), empty)
    except FormatError:
        return
    except Exception as error:
        raise AssertionError(f"an unknown architecture raises {one_line(error)}, not a FormatError") from error
    raise AssertionError("an unknown architecture was written")


def check_loads_again(subject: Subject) -> None:
    """Where an installed loader recognises what was written, it gives the same latents and outputs."""
    seen = 0
    for sae in _dictionaries():
        folder = subject.folder / f"{sae.architecture}_{sae.reconstructs_input}"
        try:
            convert(sae, subject.contribution.qualified, folder)
        except SaeCoreError:
            continue
        for place in _saes(folder):
            seen += 1
            loaded, x = SAE.load(place), batch_for(sae, 16)
            same(loaded(x), sae(x), f"{sae.architecture}: the output after it was written and loaded", 1e-4)
    if not seen:
        raise NotApplicable("no installed loader recognises what it writes")


def _dictionaries() -> Iterator[SAE]:
    """A small one of every architecture that is installed and can be made, and of every transcoder."""
    place = {"model_name": "gpt2", "hook_name": "blocks.2.hook_mlp_in", "hook_name_out": "blocks.2.hook_mlp_out"}
    for contribution in get_registry().contributions("architecture"):
        for shape in ({}, {"d_out": 16}):
            try:
                sae: SAE = Subject("architecture", contribution.qualified).new(**shape)
            except SaeCoreError:
                continue
            sae.metadata.update(place)
            yield _shaken(sae).eval()


@torch.no_grad()
def _shaken(sae: SAE) -> SAE:
    """No parameter is left at zero, or equal to another one, where a writer that drops it would not be noticed."""
    drawn = torch.Generator().manual_seed(0)
    for parameter in sae.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=drawn))
    sae.after_step()
    return sae


def _saes(folder: Path) -> list[Path]:
    """Folders and files in `folder` that are recognised as one dictionary."""
    places: list[Any] = [folder, *sorted(path for path in folder.rglob("*") if path.is_dir())]
    return [place for place in places if len(recognised(LocalFiles(place))) == 1][:1]


CHECKS: tuple[Check, ...] = (check_class, check_writes, check_refuses, check_loads_again)
