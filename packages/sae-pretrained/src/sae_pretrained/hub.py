"""`HubFiles`: a repository on the Hugging Face Hub as loaders see it, and the local cache in front of it.

The cache is huggingface_hub's own, so that what other tools fetched is found and the other way round. It comes first: a
branch that was looked up once stays at that commit until `refresh`, every later file is taken from the same commit, and an
SAE whose files are cached loads without a single request. Offline (``HF_HUB_OFFLINE=1``) nothing else happens anyway.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import cast, final

from sae_core.errors import FormatError
from sae_core.format.files import inside
from sae_core.format.trouble import first_line

from sae_pretrained.hub_errors import HubError, explained, offline_message, trouble_with_cache
from sae_pretrained.transfer import Patience, checksum_problem, fetch_range

__all__ = ["HubFiles"]

_log = logging.getLogger(__name__)
_BLOCK = 1 << 16
_CHEAP = 1 << 20  # bytes that are compared with their checksum whenever they are read
_COMMIT = re.compile("[0-9a-f]{40}")


@final
class HubFiles:
    """Files of one revision of a Hub repository; satisfies `sae_core.protocols.FileSource`.

    `revision` is a commit, branch or tag; `commit` is what it stands for. `refresh` asks the Hub again what a branch stands
    for. `cache_dir` and `endpoint` are huggingface_hub's defaults (HF_HUB_CACHE, HF_ENDPOINT) unless given. Methods raise
    HubError when the Hub refuses or cannot be reached, FormatError for files that are not there or arrive damaged.
    """

    def __init__(
        self,
        repo_id: str,
        revision: str | None = None,
        *,
        refresh: bool = False,
        cache_dir: str | Path | None = None,
        endpoint: str | None = None,
        patience: Patience | None = None,
    ) -> None:
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        self.repo_id = repo_id
        self.revision = revision or "main"
        self._refresh = refresh
        self._endpoint = endpoint or constants.ENDPOINT
        self._cache_dir = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
        self._cache = self._cache_dir / repo_folder_name(repo_id=repo_id, repo_type="model")
        self._patience = patience or Patience()
        self._names: list[str] | None = None
        self._blocks: dict[str, list[tuple[int, int, bytes]]] = {}  # name -> (start, length asked for, bytes)

    @property
    def location(self) -> str:
        """``owner/name@commit``."""
        return f"{self.repo_id}@{self.commit}"

    @cached_property
    def commit(self) -> str:
        """The commit that the revision stands for: as cached, else as the Hub says now."""
        if _COMMIT.fullmatch(self.revision):
            return self.revision
        ref = self._cache / "refs" / inside(self.revision)
        with self._cache_trouble():
            if ref.is_file() and (_offline() or not self._refresh):
                known = ref.read_text(encoding="utf-8", errors="replace").strip()
                if _COMMIT.fullmatch(known):
                    return known
                if _offline():
                    raise HubError(f"{ref}: damaged, it should hold a commit; go online once, and it is repaired")
            commit = self._ask_for_listing(self.revision)
            _write(ref, commit)
        return commit

    def files(self) -> list[str]:
        """Names of all files of the repository, sorted; offline and never listed before, of those that are cached."""
        if self._names is None:
            with self._cache_trouble():
                self._names = self._listed()
                if self._names is None and _offline():
                    cached = (path for path in self._snapshot.rglob("*") if path.is_file())
                    return sorted(path.relative_to(self._snapshot).as_posix() for path in cached)
                if self._names is None:
                    self._ask_for_listing(self.commit)
                    self._names = self._listed() or []
        return self._names

    def _listed(self) -> list[str] | None:
        """The names that were listed before; None when there is no list, or it is damaged and has to be fetched again."""
        try:
            names = json.loads(self._listing_file(self.commit).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError, RecursionError):
            return None
        good = isinstance(names, list) and all(isinstance(name, str) for name in cast("list[object]", names))
        return cast("list[str]", names) if good else None

    def exists(self, name: str) -> bool:
        """Whether the repository has this file."""
        return (self._snapshot / inside(name)).is_file() or inside(name) in self.files()

    def path(self, name: str) -> Path:
        """The file's path in the cache, downloaded first if need be."""
        cached = self._snapshot / inside(name)
        if cached.is_file() and (problem := self._cheap_problem(cached)):
            if _offline():
                raise HubError(
                    f"{cached}: the cached copy is damaged: {problem}; go online once, and it is fetched again"
                )
            _log.warning("%s: the cached copy is damaged (%s); fetching it again", name, problem)
            with self._cache_trouble():
                cached.resolve().unlink(missing_ok=True)
                cached.unlink(missing_ok=True)
        return cached if cached.is_file() else self._download(inside(name))

    def _cheap_problem(self, cached: Path) -> str | None:
        """What is wrong with a small file in the cache; large ones are left to ``pretrained verify``, which takes a while."""
        blob = cached.resolve()
        with self._cache_trouble():
            small = blob.parent.name == "blobs" and blob.stat().st_size <= _CHEAP
            return checksum_problem(blob, blob.name) if small else None

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the file: from the cache if it is there, else just these over the network.

        At least 64 kB are asked for and kept, since whoever reads a header reads on.
        """
        cached = self._snapshot / inside(name)
        if cached.is_file():
            with cached.open("rb") as file:
                file.seek(start)
                return file.read(stop - start)
        for first, wanted, block in self._blocks.setdefault(name, []):
            if (
                first <= start and stop <= first + wanted
            ):  # a block may be shorter than it was wanted: the file ends there
                return block[start - first : stop - first]
        if stop <= start:
            return b""
        wanted = max(stop - start, _BLOCK)
        with self._explained(name):
            block = fetch_range(self._url(inside(name)), self._headers(), start, start + wanted, self._patience)
        self._blocks[name].append((start, wanted, block))
        return block[: stop - start]

    def damage(self, name: str) -> str | None:
        """What is wrong with the cached copy of a file, by the checksum that the cache keeps as its name.

        None if nothing is, or if a server other than the Hub made that name of something else.
        """
        cached = self.path(name)
        return checksum_problem(cached, cached.resolve().name)

    @property
    def _snapshot(self) -> Path:
        return self._cache / "snapshots" / self.commit

    def _listing_file(self, commit: str) -> Path:
        return self._cache / "sae-core-listings" / f"{commit}.json"

    def _ask_for_listing(self, revision: str) -> str:
        """Ask the Hub for the commit and the files of a revision; keep the files, which for a commit never change."""
        from huggingface_hub import HfApi

        place = f"{self.repo_id}@{revision}"
        with explained(self.repo_id, revision):
            try:
                info = self._patience.call(
                    lambda: HfApi(endpoint=self._endpoint).model_info(self.repo_id, revision=revision)
                )
                commit, names = info.sha, sorted(sibling.rfilename for sibling in info.siblings or ())
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise HubError(
                    f"{place}: the server at {self._endpoint} gives an answer that is none of a Hub's ({type(error).__name__}: "
                    f"{first_line(error)}); a proxy or a login page may be in between"
                ) from error
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise HubError(f"{place}: the server at {self._endpoint} states the commit {commit!r}; is it a Hub?")
        if wrong := [name for name in names if not isinstance(name, str)]:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise HubError(f"{place}: the server at {self._endpoint} lists the file {wrong[0]!r}; is it a Hub?")
        with self._cache_trouble():
            _write(self._listing_file(commit), json.dumps(names))
        return commit

    def _download(self, name: str) -> Path:
        """Let huggingface_hub fetch the file into its cache, and check what arrived; a damaged file is fetched once more."""
        from huggingface_hub import hf_hub_download

        if _offline():
            raise HubError(offline_message(f"{self.location}: {name}"))
        problem: str | None = None
        for again in (False, True):
            with self._explained(name), self._cache_trouble():
                path = self._patience.call(
                    lambda again=again: hf_hub_download(
                        self.repo_id,
                        name,
                        revision=self.commit,
                        cache_dir=self._cache_dir,
                        endpoint=self._endpoint,
                        library_name="sae-core",
                        force_download=again,
                    )
                )
            blob = Path(path).resolve()
            problem = checksum_problem(blob, blob.name)
            if problem is None:
                return Path(path)
            _log.warning("%s: damaged in transfer (%s)", name, problem)
            with self._cache_trouble():
                Path(path).unlink(missing_ok=True)
                blob.unlink(missing_ok=True)
        raise FormatError(f"{name}: damaged in transfer, twice: {problem}; try later or from another network")

    def _cache_trouble(self) -> AbstractContextManager[None]:
        return trouble_with_cache(self._cache_dir)

    def _explained(self, name: str) -> AbstractContextManager[None]:
        return explained(self.repo_id, self.commit, self.files, name)

    def _url(self, name: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo_id, name, revision=self.commit, endpoint=self._endpoint)

    def _headers(self) -> dict[str, str]:
        from huggingface_hub.utils import build_hf_headers

        return build_hf_headers(library_name="sae-core")


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _write(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).replace(path)
