"""What every catalogue promises: lists that need no network, and entries that lead somewhere."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest import mock

from sae_core.errors import FormatError, SaeCoreError, UnknownNameError
from sae_core.format.files import inside
from sae_core.plugins import get_registry
from sae_core.protocols import Catalogue, CatalogueEntry, FileSource, KnowsBaseModels
from sae_core.testing.kit import Check, NotApplicable, Subject, check_class

__all__ = [
    "CHECKS",
    "check_entries",
    "check_files",
    "check_lists",
    "check_unknown_names",
]

_RELEASES, _IDS = 40, 3  # looked at, spread over the list: some catalogues hold thousands of entries
_REPOSITORY = re.compile(r"[^/\s]+/[^/\s]+")


def check_lists(subject: Subject) -> None:
    """Releases and ids are listed without a network, each name once, as text."""
    with _no_network():
        catalogue = _catalogue(subject)
        releases = list(catalogue.releases())
        _check_names(releases, "releases")
        for release in _some(releases, _RELEASES):
            ids = list(catalogue.sae_ids(release))
            assert ids, f"release {release!r} has no SAE"
            _check_names(ids, f"ids of {release!r}")


def check_entries(subject: Subject) -> None:
    """Every id leads to an entry of that release and id: a repository, a path inside it, a registered loader or None."""
    loaders = {contribution.spec.name for contribution in get_registry().contributions("loader")}
    for catalogue, entry, release, sae_id in _entries(subject):
        where = f"{release}, {sae_id}"
        assert isinstance(entry, CatalogueEntry), f"{where}: lookup gave {type(entry).__name__}, not a CatalogueEntry"
        assert (entry.release, entry.sae_id) == (release, sae_id), (
            f"{where}: the entry says {entry.release}, {entry.sae_id}"
        )
        assert _REPOSITORY.fullmatch(entry.repo_id), f"{where}: repo_id {entry.repo_id!r} is not owner/name"
        try:
            inside(entry.path or ".")
        except FormatError as error:
            raise AssertionError(f"{where}: path: {error}") from None
        known = entry.format is None or entry.format.rpartition(":")[2] in loaders
        assert known, f"{where}: no loader {entry.format!r} is installed"
        for what in ("overrides", "links"):
            try:
                json.dumps(dict(getattr(entry, what)), allow_nan=False)
            except (TypeError, ValueError) as error:
                raise AssertionError(f"{where}: {what} are no plain data: {error}") from None
        if isinstance(catalogue, KnowsBaseModels):
            facts = catalogue.base_model_facts(entry, {})
            assert all(isinstance(name, str) for name in facts), f"{where}: base_model_facts has a name that is no text"


def check_unknown_names(subject: Subject) -> None:
    """A release or an id that is not listed is an UnknownNameError, without a network."""
    with _no_network():
        catalogue = _catalogue(subject)
        asked = [("no-such-release-of-anybody", "no-such-id")]
        asked += [(release, "no-such-id-of-anybody") for release in list(catalogue.releases())[:1]]
        for release, sae_id in asked:
            try:
                found = catalogue.lookup(release, sae_id)
            except UnknownNameError:
                continue
            except SaeCoreError as error:
                raise AssertionError(f"lookup({release!r}, {sae_id!r}) raises {type(error).__name__}") from None
            raise AssertionError(f"lookup({release!r}, {sae_id!r}) gave {found!r}")


def check_files(subject: Subject) -> None:
    """`files` gives a file source for each entry; nothing is fetched before a file is asked for."""
    for catalogue, entry, release, sae_id in _entries(subject):
        with _no_network():
            try:
                source = catalogue.files(entry)
            except SaeCoreError as error:
                raise NotApplicable(f"{release}, {sae_id}: {error}") from error
        wanted = [name for name in vars(FileSource) if not name.startswith("_")]
        lacking = [name for name in wanted if not hasattr(type(source), name)]  # asking the source itself may fetch
        assert not lacking, f"{release}, {sae_id}: files() gave {type(source).__name__}, without {', '.join(lacking)}"
        return


def _catalogue(subject: Subject) -> Catalogue:
    return cast("Catalogue", subject.new())


def _entries(subject: Subject) -> Iterator[tuple[Catalogue, CatalogueEntry, str, str]]:
    with _no_network():
        catalogue = _catalogue(subject)
        found = [
            (catalogue, catalogue.lookup(release, sae_id), release, sae_id)
            for release in _some(list(catalogue.releases()), _RELEASES)
            for sae_id in _some(list(catalogue.sae_ids(release)), _IDS)
        ]
    if not found:
        raise NotApplicable("the catalogue is empty here")
    yield from found


def _check_names(names: list[Any], what: str) -> None:
    wrong = [name for name in names if not isinstance(name, str) or not name]
    assert not wrong, f"{what}: {wrong[0]!r} is no name"
    assert len(set(names)) == len(names), (
        f"{what}: {next(name for name in names if names.count(name) > 1)!r} comes twice"
    )


def _some(names: list[str], most: int) -> list[str]:
    """At most so many, spread over all of them, the first and the last among them."""
    if len(names) <= most:
        return names
    return [names[round(number * (len(names) - 1) / (most - 1))] for number in range(most)]


@contextmanager
def _no_network() -> Generator[None]:
    """Every attempt to connect or to look up a host is a failure of the check."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network is used")

    with (
        mock.patch.object(socket.socket, "connect", refuse),
        mock.patch.object(socket.socket, "connect_ex", refuse),
        mock.patch.object(socket, "getaddrinfo", refuse),
    ):
        yield


CHECKS: tuple[Check, ...] = (check_class, check_lists, check_entries, check_unknown_names, check_files)
