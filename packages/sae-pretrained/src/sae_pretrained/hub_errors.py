"""What the Hub's refusals mean for the person who asked, and what to do about each.

`explained` turns the errors of huggingface_hub into one `HubError` (or FormatError for a file that is not there) with the
way out: what to accept for a gated repository, how to log in, which names are near, how to work offline.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae_core.errors import FormatError, SaeCoreError
from sae_core.format.trouble import explained as explained_system
from sae_core.format.trouble import first_line

__all__ = ["HubError", "explained", "near_names", "network_error", "offline_message", "status_of", "trouble_with_cache"]


class HubError(SaeCoreError, OSError):
    """The Hub refused, failed or could not be reached."""


@contextmanager
def explained(
    repo_id: str, revision: str, names: Callable[[], Sequence[str]] | None = None, name: str = ""
) -> Generator[None]:
    """Raise HubError or FormatError in place of huggingface_hub's errors.

    `name` is the file that is asked for, `names` gives the files that there are.
    """
    from huggingface_hub import errors

    place = f"{repo_id}@{revision}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(_gated(repo_id)) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repo_id}: the Hub has no revision {revision!r} of this repository") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(_no_repository(repo_id)) from error
    except errors.EntryNotFoundError as error:
        # Raised for a missing file, and, as LocalEntryNotFoundError, for one that is not cached while the Hub is away.
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise HubError(_away(place, error)) from error
        raise FormatError(f"{place}: no such file {name!r}{near_names(name, names() if names else ())}") from error
    except errors.OfflineModeIsEnabled as error:
        raise HubError(offline_message(place)) from error
    except errors.HfHubHTTPError as error:
        raise HubError(_refused(place, error)) from error
    except network_error() as error:
        raise HubError(_away(place, error)) from error
    except SaeCoreError:
        raise
    except OSError as error:
        if error.errno is not None:
            raise
        # huggingface_hub's own, for a body that is shorter or longer than was announced
        raise HubError(f"{place}: {name}: the transfer failed: {first_line(error)}; try again later") from error


@contextmanager
def trouble_with_cache(cache_dir: Path) -> Generator[None]:
    """Raise HubError in place of the system's errors while the cache is written; errors of the network pass."""
    from huggingface_hub import errors

    try:
        yield
    except (SaeCoreError, errors.HfHubHTTPError, network_error()):
        raise
    except OSError as error:
        if error.errno is None:  # not the system's, but one of huggingface_hub's
            raise
        raise HubError(
            f"the cache of the Hub, {cache_dir}, {explained_system(error, 'writing')} (HF_HUB_CACHE names another place)"
        ) from error


def network_error() -> type[Exception]:
    """Root of the errors of the HTTP library below huggingface_hub (httpx, or httpx2 since its version 2)."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def status_of(error: BaseException) -> int | None:
    """HTTP status of one of huggingface_hub's errors."""
    return getattr(getattr(error, "response", None), "status_code", None)


def near_names(name: str, known: Sequence[str], what: str = "it holds") -> str:
    """``"; did you mean 'a' or 'b'?"`` for names like `name`, else the first few that there are.

    >>> near_names("layer_1/cfg.jsn", ["layer_1/cfg.json", "README.md"])
    "; did you mean 'layer_1/cfg.json'?"
    """
    import difflib

    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    more = ", …" if len(known) > 8 else ""
    return f" ({what}: {', '.join(known[:8])}{more})" if known else ""


def _logged_in() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _gated(repo_id: str) -> str:
    page = f"https://huggingface.co/{repo_id}"
    if _logged_in():
        return (
            f"{repo_id} is a gated repository, and the account of your token may not read it\n"
            f"1. open {page} in a browser, logged in to the same account, and accept its conditions\n"
            "2. some owners approve by hand: wait until the page shows the files\n"
            "3. a fine-grained token also needs the permission to read public gated repositories (Settings, Access Tokens)"
        )
    return (
        f"{repo_id} is a gated repository, and you are not logged in\n"
        f"1. open {page} in a browser, log in and accept its conditions\n"
        "2. make a token of type 'read' at https://huggingface.co/settings/tokens\n"
        "3. run `hf auth login`, or set HF_TOKEN, and try again"
    )


def _no_repository(repo_id: str) -> str:
    login = "your token may not read it" if _logged_in() else "you are not logged in (`hf auth login`, or set HF_TOKEN)"
    return f"the Hub shows no repository {repo_id!r}: the name is wrong, or it is private and {login}"


def offline_message(what: str) -> str:
    """For something that is neither cached nor, in offline mode, to be had."""
    return (
        f"{what}: this is not in the local cache, and HF_HUB_OFFLINE is set\n"
        "unset it, or fetch the SAE once on a machine with network: sae-core pretrained download RELEASE ID"
    )


def _refused(place: str, error: Any) -> str:
    status = status_of(error)
    if status == 401:
        return f"{place}: the Hub does not accept your token; make a new one and run `hf auth login`, or unset HF_TOKEN"
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        when = f"in {wait} seconds" if wait else "in a few minutes"
        return (
            f"{place}: too many requests to the Hub; try again {when}\n"
            "logged-in users may ask more often (`hf auth login`); what is cached also loads with HF_HUB_OFFLINE=1"
        )
    said = error.response.headers.get("X-Error-Message") or str(error).strip().splitlines()[0]
    if status == 403:
        return f"{place}: the Hub forbids this: {said}; check what your token may do at https://huggingface.co/settings/tokens"
    return f"{place}: the Hub answers with an error ({status}): {said}; its state is at https://status.huggingface.co"


def _away(place: str, error: Exception) -> str:
    from huggingface_hub import constants

    cause = error.__cause__ or error
    reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
    return (
        f"{place}: cannot reach {constants.ENDPOINT}: {reason}\n"
        "check the network (HF_ENDPOINT names the server); SAEs in the cache also load with HF_HUB_OFFLINE=1"
    )
