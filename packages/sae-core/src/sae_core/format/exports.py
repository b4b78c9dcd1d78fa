"""What an SAE says it is in files, checked before anything is written: whoever loads it must be able to.

An export names an architecture, its config and tensors. That architecture, made of that config, must ask for exactly these
tensors in these shapes, and need nothing that files do not hold. An SAE that cannot be saved is thus known before training
starts, not when it has ended.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch

from sae_core.config import structure, unstructure
from sae_core.dictionary import Dictionary, Export
from sae_core.errors import FormatError
from sae_core.latent_ranks import latents_over
from sae_core.plugins import Contribution, get_registry

__all__ = ["check_export", "class_of", "exported", "provider_of", "qualified"]


def exported(sae: Dictionary) -> Export:
    """``sae.export()``, checked. Raises FormatError that says what is wrong with it."""
    with latents_over(sae.ranks):
        made = sae.export()
        if not isinstance(made, Export):
            raise FormatError(f"{sae.architecture}: export() must return an Export, not {type(made).__name__}")
        check_export(made, by=sae)
    return made


def check_export(made: Export, *, by: Dictionary) -> None:
    """Raise FormatError unless what `by` exports can be loaded again as what it says it is."""
    who = f"{by.architecture}: export() gives architecture {made.architecture!r}"
    sae_class = class_of(made, by)
    if not isinstance(made.config, sae_class.config_class):
        raise FormatError(
            f"{who} with a {type(made.config).__name__}, which is not its {sae_class.config_class.__name__}"
        )
    if structure(unstructure(made.config), sae_class.config_class) != made.config:
        raise FormatError(f"{who} with a config that is another one when it is read back")
    with torch.device("meta"):
        empty = sae_class(made.config)
    if empty.normalization.learns:
        raise FormatError(
            f"{who} with normalize_activations: {made.config.normalize_activations!r}, whose statistics files do not hold; "
            "fold it into the weights, or keep it as a factor (SAE.kept_as_factor)"
        )
    wanted = {
        empty.axis(name).file or name: tensor.shape[::-1] if empty.axis(name).file else tensor.shape
        for name, tensor in empty.tensors().items()
    }
    given = {name: tensor.shape for name, tensor in made.tensors.items()}
    for name in sorted({*wanted, *given}):
        if name not in given:
            raise FormatError(f"{who} without its tensor {name!r}")
        if name not in wanted:
            raise FormatError(f"{who} with a tensor {name!r} that is not one of it (it has: {', '.join(wanted)})")
        if given[name] != wanted[name]:
            raise FormatError(
                f"{who} with {name!r} of shape {tuple(given[name])}, but its config asks for {tuple(wanted[name])}"
            )


def class_of(made: Export, by: Dictionary) -> type[Dictionary]:
    """The class of what `by` exports as."""
    if made.architecture == by.architecture:
        return type(by)
    return cast("type[Dictionary]", get_registry().usable("architecture", made.architecture))


def provider_of(made: Export, by: Dictionary) -> Contribution:
    """Who provides the architecture that `by` exports as: where it is its own, its class, whoever else has that name."""
    if made.architecture == by.architecture:
        return get_registry().provider_of("architecture", type(by))
    return get_registry().find("architecture", made.architecture)


def qualified(made: Export, by: Dictionary) -> Export:
    """`made` with the architecture under its full name, ``"sae-core:topk"``."""
    return dataclasses.replace(made, architecture=provider_of(made, by).qualified)
