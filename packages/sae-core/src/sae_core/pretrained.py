"""Published SAEs by name: ask every catalogue, take the entry, let the right loader read its files.

The core knows no catalogue itself; plugins bring them (sae-pretrained brings the public ones and the user's own). A
catalogue may know more than it lists: a name that none of them lists is offered to each, which is how a Hub repository,
``owner/name``, can be asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from sae_core.errors import FormatError, SaeCoreError, UnknownNameError
from sae_core.protocols import Catalogue, CatalogueEntry, FileSource, KnowsBaseModels, LoadedSAE, Loader

if TYPE_CHECKING:
    import torch

    from sae_core.dictionary import Dictionary

__all__ = ["all_catalogues", "describe_origin", "find_entry", "format_of", "load_pretrained", "read_config"]


def load_pretrained(
    release: str,
    sae_id: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    rows: Sequence[int] | None = None,
    mmap: bool | None = None,
) -> Dictionary:
    """Load a published SAE; `SAE.from_pretrained` is this function.

    `overrides` are facts that the files lack, over those that the catalogue knows; `rows` the latents to load, None for all.
    Its metadata say where it comes from and for which model it is (`describe_origin`). Raises UnknownNameError for names
    that no catalogue knows, and what the catalogue's file source and the loader raise.
    """
    from sae_core.format.read import read_sae

    entry, catalogue = find_entry(release, sae_id)
    if revision is not None:
        entry = replace(entry, revision=revision)
    source = catalogue.files(entry)
    sae = read_sae(
        source,
        entry.path,
        device=device,
        dtype=dtype,
        format=format_of(source, entry),
        overrides={**entry.overrides, **(overrides or {})} or None,
        rows=rows,
        mmap=mmap,
    )
    sae.metadata = describe_origin(entry, catalogue, source, sae.metadata)
    return sae


def read_config(source: FileSource, entry: CatalogueEntry) -> LoadedSAE:
    """What the files say about an SAE besides its weights, which are not read."""
    from sae_core.plugins import get_registry

    loader = cast("Loader", get_registry().usable("loader", format_of(source, entry))())
    return loader.load(source, entry.path, weights=False, overrides=dict(entry.overrides) or None)


def find_entry(
    release: str, sae_id: str, catalogues: Mapping[str, Catalogue] | None = None
) -> tuple[CatalogueEntry, Catalogue]:
    """The entry of a published SAE and the catalogue that has it; `catalogues` by name are all installed ones by default.

    Raises UnknownNameError when no catalogue knows the release, when several list it, or when it has no such SAE.
    """
    catalogues = all_catalogues() if catalogues is None else catalogues
    listing = {name: catalogue for name, catalogue in catalogues.items() if release in _releases(name, catalogue)}
    if len(listing) > 1:
        raise UnknownNameError(
            f"release {release!r} is listed by several catalogues: {', '.join(listing)}; disable one"
        )
    refusals: list[str] = []
    for name, catalogue in (listing or catalogues).items():
        try:
            return catalogue.lookup(release, sae_id), catalogue
        except UnknownNameError as refusal:
            refusals.append(str(refusal))
        except SaeCoreError:
            raise
        except Exception as error:  # noqa: BLE001 - one catalogue's trouble must not hide what the others have
            refusals.append(_say(name, error))
    if listing:
        raise UnknownNameError(refusals[0])
    raise UnknownNameError(_unknown_release(release, catalogues, refusals))


def _releases(name: str, catalogue: Catalogue) -> Sequence[str]:
    """The catalogue's releases; none, with a PluginWarning, when it cannot say."""
    try:
        return catalogue.releases()
    except Exception as error:  # noqa: BLE001 - one catalogue's trouble must not hide what the others have
        _say(name, error)
        return ()


def _say(name: str, error: Exception) -> str:
    from sae_core.plugins import PluginWarning

    said = f"the catalogue {name!r} cannot be used: {type(error).__name__}: {error}"
    warnings.warn(PluginWarning(said), stacklevel=3)
    return said


def all_catalogues() -> dict[str, Catalogue]:
    """Every catalogue of every plugin, ready to use, by name; one that cannot be used is left out with a PluginWarning."""
    from sae_core.plugins import PluginWarning, get_registry

    registry = get_registry()
    found: dict[str, Catalogue] = {}
    for name in registry.names("catalogue"):
        try:
            found[name] = cast("Catalogue", registry.usable("catalogue", name)())
        except Exception as error:  # noqa: BLE001 - one catalogue's trouble must not hide what the others have
            warnings.warn(PluginWarning(f"the catalogue {name!r} cannot be used: {error}"), stacklevel=2)
    return found


def describe_origin(
    entry: CatalogueEntry, catalogue: Catalogue, source: FileSource, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """`metadata` with the facts of the catalogue added.

    Adds ``neuronpedia_id``, ``l0``, ``variance_explained`` and whatever the catalogue knows of the base model, and under
    ``sae_core``: ``base_model`` (its Hub id), ``base_model_revision`` and ``origin``: release, id, repository, path and the
    exact revision of the files.
    """
    facts: dict[str, Any] = {
        "model_name": entry.model,
        "neuronpedia_id": entry.neuronpedia_id,
        "l0": entry.l0,
        "variance_explained": entry.variance_explained,
    }
    described = {**metadata}
    described |= {key: value for key, value in facts.items() if value is not None and metadata.get(key) is None}
    known = dict(catalogue.base_model_facts(entry, described)) if isinstance(catalogue, KnowsBaseModels) else {}
    base_model = known.pop("base_model", entry.model)
    described |= known
    described["sae_core"] = {
        **metadata.get("sae_core", {}),
        "base_model": base_model,
        "base_model_revision": entry.model_revision,
        "origin": {
            "release": entry.release,
            "sae_id": entry.sae_id,
            "repository": entry.repo_id,
            "path": entry.path,
            "revision": source.location.partition("@")[2] or entry.revision,
        },
    }
    return described


def format_of(source: FileSource, entry: CatalogueEntry) -> str:
    """The loader that the catalogue names, else the one that recognises the files."""
    from sae_core.format.read import find_loader

    if entry.format is not None:
        return entry.format
    _require_folder(source, entry.path)
    return find_loader(source, entry.path)


def _require_folder(source: FileSource, path: str) -> None:
    """FormatError with near names unless the source has a folder or file at `path`."""
    names = source.files()
    if not path or path in names or any(name.startswith(path.rstrip("/") + "/") for name in names):
        return
    folders = {name.rpartition("/")[0] for name in names if "/" in name}
    near = _near(path, sorted(folders | set(names)))
    raise FormatError(f"{source.location}: no folder or file {path!r}; {near}")


def _unknown_release(release: str, catalogues: Mapping[str, Catalogue], refusals: list[str]) -> str:
    if not catalogues:
        return f"unknown release {release!r}: there is no catalogue to look it up in\n{_how_to_get_catalogues()}"
    if "/" in release:  # each catalogue said why it has no such repository
        return "\n".join(dict.fromkeys(refusals))
    known = sorted({known for name, catalogue in catalogues.items() for known in _releases(name, catalogue)})
    return f"unknown release {release!r}; {_near(release, known)}\ncatalogues: {', '.join(catalogues)}{_listing()}"


def _how_to_get_catalogues() -> str:
    """What `public`, the catalogue of published SAEs, waits for: being installed, enabled or mended."""
    from sae_core.plugins import get_registry
    from sae_core.plugins.errors import unknown_name

    registry = get_registry()
    if known := registry.names("catalogue"):
        return f"{', '.join(known)} are installed; sae-core doctor says whether they work"
    return unknown_name("catalogue", "public", known, registry.plugins())


def _listing() -> str:
    """The command that lists all releases, where it is installed."""
    from sae_core.plugins import get_registry

    name = "pretrained"
    return f"; all releases: sae-core {name} list" if name in get_registry().names("command") else ""


def _near(name: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"there are: {', '.join(known[:8])}{', …' if len(known) > 8 else ''}" if known else "there are none"
