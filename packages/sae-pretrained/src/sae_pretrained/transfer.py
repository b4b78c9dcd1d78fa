"""What huggingface_hub does not do: byte ranges of files, waiting as long as the server says, and checking what arrived.

Whole files are huggingface_hub's job: its cache, its resumption within a process, its transfers from Xet storage. It has no
way to read just the few kilobytes at the start of a file that hold the shapes of its tensors, it gives up on a server that asks
for a minute's patience, and of what arrives it compares sizes, not checksums.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sae_pretrained.hub_errors import network_error, status_of

if TYPE_CHECKING:
    from tenacity import RetryCallState

__all__ = ["Patience", "checksum_problem", "fetch_range", "states_checksum"]

T = TypeVar("T")

_log = logging.getLogger(__name__)
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long to go on after failures that may pass: 408, 425, 429, 5xx, and broken connections.

    There are `attempts` in a row without progress. Waits start at `first_wait` seconds and double, with some chance in them;
    where the server says how long (Retry-After), that is waited instead, unless it is more than `longest_wait` seconds.
    """

    attempts: int = 6
    first_wait: float = 0.5
    longest_wait: float = 600.0

    def call(self, function: Callable[[], T]) -> T:
        """`function()`, again after a failure that may pass."""
        import tenacity

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(self.may_pass),
            wait=self._wait,
            stop=tenacity.stop_after_attempt(self.attempts),
            before_sleep=self._tell,
            reraise=True,
        )
        return retrying(function)

    def may_pass(self, error: BaseException) -> bool:
        """Whether it makes sense to try again after this failure."""
        status = status_of(error)
        if status is not None:
            return status in _TRANSIENT_STATUS and (_retry_after(error) or 0) <= self.longest_wait
        return isinstance(error, network_error())

    def _wait(self, state: RetryCallState) -> float:
        import tenacity

        error = state.outcome.exception() if state.outcome else None
        asked = _retry_after(error) if error else None
        if asked is not None:
            return asked
        return tenacity.wait_random_exponential(multiplier=self.first_wait, max=30)(state)

    def _tell(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        status = status_of(error) if error else None
        what = f"the Hub answers with {status}" if status else f"connection lost ({type(error).__name__})"
        wait = state.next_action.sleep if state.next_action else 0.0
        _log.warning("%s; waiting %.1f s (attempt %d of %d)", what, wait, state.attempt_number, self.attempts)


def fetch_range(url: str, headers: dict[str, str], start: int, stop: int, patience: Patience) -> bytes:
    """Bytes [start, stop) of `url`; fewer where the file ends before `stop`. Not more is read than needed."""

    def once() -> bytes:
        with _response(url, {**headers, "Range": f"bytes={start}-{stop - 1}"}) as response:
            if response.status_code == 416:  # the file ends before `start`
                return b""
            skip = 0 if response.status_code == 206 else start  # a server may ignore the range and send everything
            received = bytearray()
            for chunk in response.iter_bytes():
                received += chunk
                if len(received) >= skip + stop - start:
                    break
            return bytes(received[skip : skip + stop - start])

    return patience.call(once)


def states_checksum(etag: str) -> bool:
    """Whether an etag is a checksum: the Hub's are, another server may make them as it likes.

    >>> states_checksum("0" * 40), states_checksum("5f3-62b")
    (True, False)
    """
    return re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", etag) is not None


def checksum_problem(path: Path, etag: str, size: int | None = None) -> str | None:
    """What is wrong with a file, or None; an etag of the Hub is a SHA-256 (LFS, Xet) or a git blob id (small files).

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "empty"
    >>> path.touch()
    >>> checksum_problem(path, "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391")
    >>> checksum_problem(path, "0" * 40)
    'git blob id e69de29bb2d1d6434b8b29ae775ad8c2e48c5391 instead of 0000000000000000000000000000000000000000'
    """
    found_size = path.stat().st_size
    if size is not None and found_size != size:
        return f"{found_size} bytes instead of {size}"
    if re.fullmatch("[0-9a-f]{64}", etag):
        name, digest = "SHA-256", hashlib.sha256()
    elif re.fullmatch("[0-9a-f]{40}", etag):
        name, digest = "git blob id", hashlib.sha1(b"blob %d\0" % found_size, usedforsecurity=False)
    else:
        return None  # a server other than the Hub may make etags as it likes
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return None if digest.hexdigest() == etag else f"{name} {digest.hexdigest()} instead of {etag}"


@contextmanager
def _response(url: str, headers: dict[str, str]) -> Generator[Any]:
    """An open response; huggingface_hub's errors for what is not 200, 206 or 416."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session, hf_raise_for_status

    request = {**headers, "Accept-Encoding": "identity"}  # a compressed body could not be resumed
    with get_session().stream("GET", url, headers=request, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        if response.status_code != 416:
            hf_raise_for_status(response)
        yield response


def _retry_after(error: BaseException) -> float | None:
    """Seconds to wait, as the server says; it may also state a date."""
    headers: Mapping[str, str] = getattr(getattr(error, "response", None), "headers", {})
    text = headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    if not text:
        return None
    try:
        when = parsedate_to_datetime(text)
    except ValueError:
        return None
    if when.tzinfo is None:  # a date without a zone means UTC, as everywhere in HTTP
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(tz=UTC)).total_seconds())
