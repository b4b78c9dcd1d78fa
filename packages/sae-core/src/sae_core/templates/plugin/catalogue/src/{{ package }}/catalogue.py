"""The {{ name }} catalogue: SAEs in a folder that colleagues share. Make it list yours.

A catalogue says which SAEs there are without asking anybody, and how to get at the files of one. For repositories on the Hub,
sae-pretrained has a catalogue to derive from (`FolderCatalogue`) and its file source (`HubFiles`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import final

from sae_core.errors import UnknownNameError, did_you_mean
from sae_core.format.files import LocalFiles
from sae_core.protocols import CatalogueEntry, FileSource

FOLDER = "{{ variable }}"
"""The environment variable that names the shared folder."""

RELEASES: Mapping[str, Mapping[str, str]] = {
    "{{ name }}-small": {"layer_3": "layers/3", "layer_6": "layers/6"},
}
"""Ids and their folders, by release."""


@final
class {{ class_name }}:
    """One sentence that `sae-core show {{ name }}` prints."""

    def releases(self) -> Sequence[str]:
        """Names of all releases."""
        return sorted(RELEASES)

    def sae_ids(self, release: str) -> Sequence[str]:
        """Ids of a release. Raises UnknownNameError."""
        if release not in RELEASES:
            raise UnknownNameError(f"unknown release {release!r}{did_you_mean(release, RELEASES)}")
        return list(RELEASES[release])

    def lookup(self, release: str, sae_id: str) -> CatalogueEntry:
        """Where an SAE is. Raises UnknownNameError."""
        ids = self.sae_ids(release)
        if sae_id not in ids:
            raise UnknownNameError(f"release {release!r} has no SAE {sae_id!r}{did_you_mean(sae_id, ids)}")
        return CatalogueEntry(
            release=release, sae_id=sae_id, repo_id=f"{{ name }}/{release}", path=RELEASES[release][sae_id]
        )

    def files(self, entry: CatalogueEntry) -> FileSource:
        """The files of the entry's repository; its `path` is a folder in it."""
        return LocalFiles(Path(os.environ.get(FOLDER, ".")) / entry.repo_id)
