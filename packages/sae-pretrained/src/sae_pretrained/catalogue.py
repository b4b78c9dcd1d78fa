"""Which SAEs have been published, and where their files are.

Two catalogues: `PublicCatalogue` holds the releases that come with this package, one small TOML file each
(`release_file` tells how to read them), so that a look-up opens one file. `UserCatalogue` holds the user's own: YAML or
TOML files in the folder ``catalogue`` of sae-core's config folder (``~/.config/sae-core/catalogue`` on Linux), and those
that ``SAE_CORE_CATALOGUE`` names, separated as in ``PATH``. Such a file maps releases to their facts:

```yaml
lab-saes:
  repository: lab/saes
  model: lab/small
  format: sae_lens
  saes:
    - id: layer_{layer}
      columns: layer
      rows: 0..11
```

Other packages add catalogues by the hook ``sae_register_catalogues``; `FolderCatalogue` makes one of a folder of files like
those of this package. `lookup` and `releases` ask all of them.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

from sae_core.errors import ConfigError, UnknownNameError
from sae_core.protocols import CatalogueEntry

from sae_pretrained.release_file import parse_release, sort_key

if TYPE_CHECKING:
    from sae_core.protocols import FileSource

__all__ = [
    "CATALOGUE_VARIABLE",
    "FolderCatalogue",
    "PublicCatalogue",
    "ReleaseCatalogue",
    "UserCatalogue",
    "lookup",
    "releases",
]

CATALOGUE_VARIABLE = "SAE_CORE_CATALOGUE"
_PUBLIC_FOLDER = Path(__file__).parent / "releases"


def lookup(release: str, sae_id: str) -> CatalogueEntry:
    """The entry of one published SAE, from any catalogue.

    `release` is a release's name, or a Hub repository ``owner/name`` (``owner/name@revision``) with `sae_id` a folder in
    it. Raises UnknownNameError with near matches.

    >>> entry = lookup("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical")
    >>> entry.repo_id, entry.path, entry.model
    ('google/gemma-scope-2b-pt-res', 'layer_20/width_16k/average_l0_71', 'google/gemma-2-2b')
    """
    public = PublicCatalogue()
    if public.has(release):  # names that come with this package are nobody else's, so there is no need to ask further
        return public.lookup(release, sae_id)
    from sae_core.pretrained import find_entry

    return find_entry(release, sae_id)[0]


def releases() -> list[str]:
    """Names of all releases of all catalogues, sorted."""
    from sae_core.pretrained import all_catalogues

    return sorted({name for catalogue in all_catalogues().values() for name in catalogue.releases()}, key=sort_key)


class ReleaseCatalogue(ABC):
    """What catalogues that are made of release files have in common."""

    @abstractmethod
    def releases(self) -> Sequence[str]:
        """Names of all releases, sorted."""

    @abstractmethod
    def entries(self, release: str) -> Mapping[str, CatalogueEntry]:
        """The SAEs of a release by id, in no particular order. Raises UnknownNameError for a release that is not here."""

    def has(self, release: str) -> bool:
        """Whether the catalogue lists this release."""
        return release in self.releases()

    def sae_ids(self, release: str) -> Sequence[str]:
        """Ids of a release, in natural order. Raises UnknownNameError."""
        return sorted(self.entries(release), key=sort_key)

    def lookup(self, release: str, sae_id: str) -> CatalogueEntry:
        """The entry of one SAE. Raises UnknownNameError with near matches."""
        if not self.has(release) and "/" in release:
            return _hub_entry(release, sae_id)
        entries = self.entries(release)
        if sae_id not in entries:
            raise UnknownNameError(
                f"release {release!r} has no SAE {sae_id!r}\n{_near(sae_id, entries, 'its ids')}\n"
                f"all of them: sae-core pretrained show {release}"
            )
        return entries[sae_id]

    def files(self, entry: CatalogueEntry) -> FileSource:
        """The entry's repository on the Hub."""
        from sae_pretrained.hub import HubFiles

        return HubFiles(entry.repo_id, revision=entry.revision)

    def base_model_facts(self, entry: CatalogueEntry, metadata: Mapping[str, Any]) -> Mapping[str, Any]:
        """The base model's Hub id, and its hook points in the terms that the files do not use."""
        from sae_pretrained.models import hook_facts

        return hook_facts(entry.model, metadata)


class FolderCatalogue(ReleaseCatalogue):
    """A folder of TOML files, one a release and named after it: what a package that publishes its own SAEs derives from.

    ```python
    class LabCatalogue(FolderCatalogue):                    # CatalogueSpec(name="lab", target="lab_saes:LabCatalogue", …)
        folder = Path(__file__).parent / "releases"
    ```
    """

    folder: ClassVar[Path]

    def has(self, release: str) -> bool:
        """Whether the folder has a file of this release."""
        return _is_plain(release) and (self.folder / f"{release}.toml").is_file()

    def releases(self) -> Sequence[str]:
        """Names of the files, in natural order."""
        return sorted((path.stem for path in self.folder.glob("*.toml")), key=sort_key)

    def entries(self, release: str) -> Mapping[str, CatalogueEntry]:
        """The SAEs of a release by id. Raises UnknownNameError, or ConfigError that names file and key."""
        if not self.has(release):
            raise UnknownNameError(_unknown_release(release, self.releases()))
        path = self.folder / f"{release}.toml"
        return parse_release(release, _read_toml(path), path.name)


@final
class PublicCatalogue(FolderCatalogue):
    """The releases that come with this package."""

    folder = _PUBLIC_FOLDER


@final
class UserCatalogue(ReleaseCatalogue):
    """The user's own releases; `files` are read besides those of the config folder and of SAE_CORE_CATALOGUE.

    Raises ConfigError that names file and key when one of them is malformed, describes a release twice, or claims the name
    of a release that comes with this package.
    """

    def __init__(self, files: Iterable[str | Path] = ()) -> None:
        named = [Path(name) for name in os.environ.get(CATALOGUE_VARIABLE, "").split(os.pathsep) if name]
        self._facts = _read_files([*_config_files(), *named, *map(Path, files)])

    def releases(self) -> Sequence[str]:
        return sorted(self._facts, key=sort_key)

    def entries(self, release: str) -> Mapping[str, CatalogueEntry]:
        if release not in self._facts:
            raise UnknownNameError(_unknown_release(release, self.releases()))
        path, facts = self._facts[release]
        return parse_release(release, facts, str(path))


def _read_files(files: Iterable[Path]) -> dict[str, tuple[Path, Any]]:
    """Release -> the file that describes it, and its facts there, not yet checked."""
    found: dict[str, tuple[Path, Any]] = {}
    public = PublicCatalogue()
    for path in dict.fromkeys(files):
        for release, facts in _read_file(path).items():
            if not isinstance(release, str):
                raise ConfigError(f"{path}: the release name {release!r} must be text; put it in quotation marks")
            if release in found:
                raise ConfigError(f"{path}: release {release!r} is also described in {found[release][0]}")
            if public.has(release):
                raise ConfigError(f"{path}: release {release!r} comes with sae-pretrained; choose another name")
            found[release] = (path, facts)
    return found


def _hub_entry(repository: str, folder: str) -> CatalogueEntry:
    """An entry for a folder of a Hub repository; what a public release says about that very folder is taken over."""
    from dataclasses import replace

    repo_id, _, revision = repository.partition("@")
    owner, _, name = repo_id.partition("/")
    if not (_is_plain(owner) and _is_plain(name)):
        raise UnknownNameError(
            f"{repository!r} is neither a release nor a Hub repository of the form owner/name[@revision]"
        )
    for known in _described(repo_id):
        if known.path == folder:
            return replace(known, revision=revision or known.revision)
    return CatalogueEntry(release=repo_id, sae_id=folder, repo_id=repo_id, path=folder, revision=revision or None)


def _described(repo_id: str) -> Iterator[CatalogueEntry]:
    """Public entries whose files are in this repository."""
    catalogue = PublicCatalogue()
    line = f'repository = "{repo_id}"'
    for release in catalogue.releases():
        if (_PUBLIC_FOLDER / f"{release}.toml").read_text(encoding="utf-8").startswith(line):
            yield from catalogue.entries(release).values()


def _is_plain(name: str) -> bool:
    """Whether `name` can be one part of a path."""
    return name not in ("", ".", "..") and all(character.isalnum() or character in "-_." for character in name)


def _unknown_release(release: str, known: Sequence[str]) -> str:
    return f"unknown release {release!r}\n{_near(release, known, 'releases')}\nall of them: sae-core pretrained list"


def _near(name: str, known: Iterable[str], what: str) -> str:
    """Up to three of `known` that look like `name`."""
    import difflib  # needed only for messages

    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"{what}: {', '.join(known[:5])}, …"


def _config_files() -> list[Path]:
    import platformdirs

    folder = platformdirs.user_config_path("sae-core", appauthor=False) / "catalogue"
    return sorted(path for path in folder.glob("*") if path.suffix in (".yaml", ".yml", ".toml"))


def _read_file(path: Path) -> Mapping[Any, Any]:
    facts = _read_toml(path) if path.suffix == ".toml" else _read_yaml(path)
    if not isinstance(facts, dict):
        raise ConfigError(f"{path}: expected a mapping of release names to their facts, found {type(facts).__name__}")
    return facts


def _read_toml(path: Path) -> Mapping[str, Any]:
    import tomllib

    try:
        return tomllib.loads(_read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _read_yaml(path: Path) -> Any:
    """The plain data of a YAML file, in which no key may come twice."""
    from sae_core.yaml_text import parse_yaml

    try:
        return parse_yaml(_read_text(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such catalogue file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
