"""The Hugging Face Hub, as far as synthetic models need it: a folder fetched, files sent in one commit.

huggingface_hub is needed here only, and its errors become one `SyntheticHubError` that says what to do.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae_core.errors import FormatError, MissingDependencyError, SaeCoreError

__all__ = ["SyntheticHubError", "fetch_folder", "send_files"]


class SyntheticHubError(SaeCoreError, OSError):
    """The Hub refused, has not what was asked for, or could not be reached."""


def fetch_folder(
    repo_id: str, folder: str, names: Sequence[str], *, revision: str | None = None, force_download: bool = False
) -> Path:
    """A local copy of the folder that holds those of `names` that there are, all of one commit; the first must be there.

    Raises FormatError when it is not, SyntheticHubError where the Hub refuses.
    """
    library = _library()
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    inside = [part for part in folder.split("/") if part]
    place: Path | None = None
    for name in names:
        with _explained(repo_id, revision or "main"):
            try:
                file: str = library.hf_hub_download(
                    repo_id, "/".join([*inside, name]), revision=revision, force_download=force_download
                )
            except LocalEntryNotFoundError:
                if place is not None and not _reachable(library):
                    continue  # offline, what the cache lacks may not exist there either; the model's reader will say
                raise
            except EntryNotFoundError:
                if place is None:
                    where = f"{repo_id}, folder {folder}" if inside else repo_id
                    raise FormatError(f"{where}: no synthetic model there ({name} is missing)") from None
                continue
        if place is None:
            place = Path(file).parent
            revision = place.parents[len(inside) - 1].name if inside else place.name
    assert place is not None
    return place


def _reachable(library: Any) -> bool:
    return not library.constants.HF_HUB_OFFLINE


def send_files(
    repo_id: str,
    files: Mapping[str, Path | bytes],
    *,
    if_missing: Mapping[str, bytes],
    revision: str = "main",
    private: bool = False,
    message: str,
) -> str:
    """Send `files`, and those of `if_missing` that are not there yet, as one commit; returns its id.

    The repository is made if there is none, `private` or not. Raises SyntheticHubError; nothing is changed there then.
    """
    library = _library()
    api: Any = library.HfApi(library_name="sae-synthetic")
    with _explained(repo_id, revision):
        if not api.repo_exists(repo_id):
            api.create_repo(repo_id, private=private)
        there = {file.rfilename for file in api.model_info(repo_id, revision=revision).siblings or ()}
        wanted = {**files, **{name: content for name, content in if_missing.items() if name not in there}}
        operations = [
            library.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in wanted.items()
        ]
        try:
            return api.create_commit(repo_id, operations, commit_message=message, revision=revision).oid
        except RuntimeError as error:  # huggingface_hub's word for a large file that did not arrive
            reason = " ".join(str(error.__cause__ or "").split())
            raise SyntheticHubError(f"{repo_id}: {error} {reason}\nno file of the model is there; try again") from error


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingDependencyError(
            "synthetic models on the Hub need huggingface_hub: pip install 'sae-synthetic[hub]'"
        ) from error
    return huggingface_hub


@contextmanager
def _explained(repo_id: str, revision: str) -> Generator[None]:
    from huggingface_hub import errors

    network: type[Exception] = errors.HfHubHTTPError.__bases__[0]  # root of the HTTP library's
    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise SyntheticHubError(f"{repo_id}: the Hub has no revision {revision!r} of this repository") from error
    except errors.GatedRepoError as error:
        raise SyntheticHubError(f"{repo_id}: access is restricted; ask for it on the repository's page") from error
    except errors.RepositoryNotFoundError as error:
        raise SyntheticHubError(
            f"{repo_id}: there is no such repository, or it is private; check the name, log in with `hf auth login`"
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise SyntheticHubError(
            f"{repo_id}: the Hub answered {status}; writing needs a token with that right: `hf auth login`, or HF_TOKEN"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, network) as error:
        raise SyntheticHubError(
            f"{repo_id}@{revision}: not in the cache, and the Hub cannot be reached ({type(error).__name__}); check the "
            "connection, and HF_HUB_OFFLINE"
        ) from error
