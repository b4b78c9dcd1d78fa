"""The training form of an SAE beside its inference form, where the latter cannot hold it.

What is saved is what other tools read: BatchTopK becomes JumpReLU, a scaling learnt from data moves into the weights. Whoever
wants to train on needs the form before that. It is one more file, training_form.safetensors, with the parameters, buffers and
statistics as training has them, the architecture and its config in its header, and the digest of the weights it belongs to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from sae_core.config import structure, unstructure
from sae_core.errors import FormatError, UnknownNameError
from sae_core.format.files import CONFIG_FILE, TRAINING_FILE, WEIGHTS_FILE, LocalFiles, read_safetensors
from sae_core.format.hook_names import spell_hook_names
from sae_core.format.pair import read_pair, said_in_header, weights_named
from sae_core.format.sae_lens_names import of_its_provider
from sae_core.format.tensors import plain_tensor
from sae_core.plugins import get_registry

if TYPE_CHECKING:
    from torch import Tensor

    from sae_core.dictionary import Dictionary, Export

__all__ = ["load_training_form", "needs_training_form", "training_header", "training_tensors"]


def needs_training_form(sae: Dictionary, exported: Export) -> bool:
    """Whether the inference form leaves out more than the choices of a training run, which the metadata keep."""
    return (
        exported.architecture != sae.architecture
        or sae.normalization.folds
        or set(exported.tensors) != _names_in_files(sae)
    )


def _names_in_files(sae: Dictionary) -> set[str]:
    return {sae.axis(name).file or name for name in sae.tensors()}


def training_tensors(sae: Dictionary) -> dict[str, Tensor]:
    """Everything that a module of this architecture and config needs to go on where `sae` is."""
    return {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in sae.state_dict().items()}


def training_header(sae: Dictionary, weights: str) -> Callable[[Mapping[str, str]], str]:
    """What the file's header says; `weights` is the digest of the weights that it belongs to."""
    provider = get_registry().provider_of("architecture", type(sae))
    said = {
        "architecture": sae.architecture,
        "config": unstructure(sae.config),
        "provider": provider.distribution,
        "weights": weights,
    }
    return lambda sums: json.dumps({**said, "crc32": dict(sorted(sums.items()))}, sort_keys=True)


def load_training_form(
    path: Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    architecture: str | None = None,
) -> Dictionary:
    """The SAE in `path` as it was in training, in train mode; `architecture` is what provides it now, if that has another name.

    That is the inference form itself where it holds everything, with the config of the run. Raises FormatError where it does
    not and there is no training form, or one of another save.
    """
    from sae_core.dictionary import as_device, as_dtype
    from sae_core.format.read import load_sae

    file = path / TRAINING_FILE
    said = said_in_header(file) if file.is_file() else None
    if said is None and file.is_file():
        raise FormatError(
            f"{file}: damaged, or not a training form that sae.save wrote; copy it from its origin again, or remove it"
        )
    if said is None:
        claimed = None if architecture is None else {"architecture": architecture}
        sae = load_sae(path, device=device, dtype=dtype, format="sae_lens", overrides=claimed)
        return _with_training_config(sae, path).train()
    cfg, _ = read_pair(LocalFiles(path), "")
    if said.get("weights") != (weights_named(cfg) or ""):
        raise FormatError(
            f"{file}: it belongs to another save than {WEIGHTS_FILE} and {CONFIG_FILE}; remove it, or save again"
        )
    name, provider = str(said.get("architecture")), str(said.get("provider", ""))
    known = of_its_provider(name, provider) if architecture is None else architecture
    try:
        sae_class = cast("type[Dictionary]", get_registry().usable("architecture", known))
    except UnknownNameError as error:
        raise UnknownNameError(
            f"{file}: {error}\nif another package provides it now, load with overrides={{'architecture': 'distribution:name'}}"
        ) from None
    config = said.get("config")
    trained = sae_class(structure(cast("Mapping[str, Any]", config), sae_class.config_class, where=f"{file}: config"))
    tensors = {key: _here(trained, key, plain_tensor(t, key, str(file))) for key, t in read_safetensors(file).items()}
    wanted = trained.state_dict()
    for key in sorted({*wanted, *tensors}):
        if key not in tensors or key not in wanted or tensors[key].shape != wanted[key].shape:
            raise FormatError(f"{file}: tensor {key!r} does not fit architecture {name!r} of this config")
    trained.load_state_dict(tensors, assign=True)
    if dtype is not None:
        trained.to(as_dtype(dtype))
    trained.metadata = spell_hook_names(cfg["metadata"])
    return trained.to(as_device(device)).train()


def _here(sae: Dictionary, name: str, tensor: Tensor) -> Tensor:
    """Of a tensor of the state of all latents what this rank holds."""
    if sae.ranks is None or name not in sae.state_dict() or (latent := sae.latent_dimension(name)) is None:
        return tensor
    if tensor.dim() <= latent or tensor.shape[latent] != sae.config.d_sae:
        return tensor  # which does not fit, as the caller says
    return tensor.narrow(latent, sae.latent_range.start, sae.d_sae).clone()


def _with_training_config(sae: Dictionary, path: Path) -> Dictionary:
    """The inference form `sae` with the config that it was trained with, if that is what its tensors are.

    They are when they are exported as what is in the file: norms that were folded are one, a schedule has come to its end.
    A config that was edited by hand is another one, and stays.
    """
    trained_as = sae.metadata.get("training_architecture") or sae.architecture
    if trained_as != sae.architecture:
        raise FormatError(_lost(path, f"trained as {trained_as!r} and saved as {sae.architecture!r}"))
    ours = sae.metadata.get("sae_core")
    recorded = cast("Mapping[str, Any]", ours).get("training_config") if isinstance(ours, Mapping) else None
    if not isinstance(recorded, Mapping):
        return sae
    kind, known = type(sae), cast("Mapping[str, Any]", recorded)
    config = structure(known, kind.config_class, where=f"{path}: metadata.sae_core.training_config")
    if config == sae.config:
        return sae
    with torch.device("meta"):
        trained = kind(config)
    if trained.normalization.folds or set(trained.state_dict()) != set(sae.state_dict()):
        raise FormatError(_lost(path, "saved in another form than that of training"))
    tensors = sae.state_dict()
    if any(tensor.shape != tensors[name].shape for name, tensor in trained.state_dict().items()):
        return sae
    trained.load_state_dict(tensors, assign=True)
    made, asked = trained.export(), sae.export()
    same = made.config == asked.config and all(
        torch.allclose(tensor, asked.tensors[name], rtol=8 * torch.finfo(tensor.dtype).eps, atol=0)
        for name, tensor in made.tensors.items()
    )
    if sae.ranks is not None:  # which all have some of the rows
        same = all(sae.ranks.everyone(same))
    trained.metadata = sae.metadata
    return trained if same else sae


def _lost(path: Path, how: str) -> str:
    return f"{path}: it was {how}; the training form ({TRAINING_FILE}) is not beside it, so training cannot go on where it was"
